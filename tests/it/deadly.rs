//! An entry that ends every daemon that handles it becomes a dead letter. The other entries do not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use aurora_bus::event::{DeadLetter, DeadLetterReason, EntryId};
use aurora_bus::store::redis::Config;
use aurora_bus::store::{Order, Range, Store};
use serde_json::{Value, json};

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::receiver::{Receiver, Reply};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAM: &str = "aurora:alerts";
const EVENTS: u64 = 50;
const DEADLY: u64 = 17;
const MAX_DELIVERIES: u32 = 5;
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// Returns the numbers in a batch of events.
fn numbers(body: &[u8]) -> Vec<u64> {
    let batch: Vec<Value> = serde_json::from_slice(body).expect("a batch of events");
    batch.iter().map(|event| event["n"].as_u64().expect("a number")).collect()
}

/// Returns the home of a daemon with a new name, which posts to a path with that name.
fn home(server: &RedisServer, receiver: &Receiver, number: usize) -> Home {
    Home::named(
        &format!("soc-{number}"),
        &format!(
            r#"
[[streams]]
name = "{STREAM}"
[[streams.groups]]
name = "siem"
sink = "siem"
max_deliveries = {MAX_DELIVERIES}
claim_idle = "1s"
handler_timeout = "900ms"
[sinks.siem]
type = "webhook"
url = "{}"
allow_private = true
batch = 50
[store]
backend = "redis"
[store.redis]
url = "{}"
"#,
            receiver.url(&format!("/soc-{number}")),
            server.url()
        ),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadly_entry_uses_up_only_its_own_deliveries() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let doomed: Arc<Mutex<Option<String>>> = Arc::default();
    let to_kill = Arc::clone(&doomed);
    let receiver = Receiver::start(move |request| {
        if !numbers(&request.body).contains(&DEADLY) {
            return Reply::Status(204);
        }
        to_kill.lock().expect("unpoisoned").get_or_insert_with(|| request.path.clone());
        Reply::Silence
    })
    .await;
    let mut number = 0;
    let mut start = async || {
        number += 1;
        let home = home(&server, &receiver, number);
        (format!("/soc-{number}"), home.start().await, home)
    };
    let mut daemons: Vec<(String, Daemon, Home)> = vec![start().await, start().await];
    let payloads: Vec<String> = (0..EVENTS).map(|n| json!({ "n": n }).to_string()).collect();
    daemons[0].1.publish(STREAM, &payloads).await.expect("accepted");

    let store = Config { url: server.url().into(), ..Config::default() };
    let store = store.connect().await.expect("a valid configuration");
    let stream = STREAM.parse().expect("a valid name");
    let is_over = async || {
        let status = store.describe(&stream).await.expect("the store answers").expect("a stream");
        let group = &status.groups[0];
        (group.pending == 0 && group.undelivered == Some(0)).then_some(None)
    };
    let mut crashes = 0;
    while let Some(path) = until("a crash or the end", BOUND, async || {
        let next = doomed.lock().expect("unpoisoned").clone();
        if next.is_some() { Some(next) } else { is_over().await }
    })
    .await
    {
        // The process crashes during the call, and another daemon starts.
        let place = daemons.iter().position(|(known, ..)| *known == path).expect("a running daemon");
        daemons.swap_remove(place).1.crash();
        *doomed.lock().expect("unpoisoned") = None;
        crashes += 1;
        daemons.push(start().await);
    }

    assert_eq!(crashes, MAX_DELIVERIES, "as often as it may be delivered");
    let letters = store.range(&"aurora:alerts:dead_letter".parse().expect("a name"), EVERYTHING, 100).await;
    let letters: Vec<DeadLetter> =
        letters.expect("read").iter().map(|entry| DeadLetter::from_entry(entry).expect("a dead letter")).collect();
    let dead: Vec<(DeadLetterReason, &str)> =
        letters.iter().map(|letter| (letter.reason, letter.fields.text("data").expect("a payload"))).collect();
    assert_eq!(dead, [(DeadLetterReason::Crashed, &*payloads[17])]);
    let mut deliveries: BTreeMap<u64, usize> = BTreeMap::new();
    let received = receiver.received();
    for request in &received {
        for number in numbers(&request.body) {
            *deliveries.entry(number).or_default() += 1;
        }
    }
    let taken: BTreeSet<u64> =
        received.iter().filter(|request| request.is_taken).flat_map(|request| numbers(&request.body)).collect();
    assert_eq!(taken, (0..EVENTS).filter(|n| *n != DEADLY).collect());
    deliveries.remove(&DEADLY);
    assert!(deliveries.values().all(|times| *times <= 4), "other entries were delivered more often: {deliveries:?}");
    for (_, daemon, _home) in daemons {
        daemon.stop().await;
    }
}
