//! The whole daemon on a real Redis Cluster whose primaries die under load: workers, dashboards, dead letters on
//! another node, retention and accounts.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aurora_bus::event::{DeadLetter, EntryId};
use aurora_bus::store::redis::Config;
use aurora_bus::store::{Order, Range, Store};
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use crate::support::app::{BOUND, Daemon, Home, Socket};
use crate::support::cluster::Cluster;
use crate::support::ledger::{Account, Ledger};
use crate::support::receiver::{Receiver, Reply};
use crate::support::until;

const STREAM: &str = "aurora:alerts";
const GROUP: &str = "siem";
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
/// The time after a promotion within which the daemon must work again.
const RECOVERY: Duration = Duration::from_secs(10);

/// Returns whether the receiver rejects the event with this name.
fn is_refused(name: &str) -> bool {
    name.ends_with('7')
}

/// Returns the name of the event with this payload.
fn name_of(payload: &[u8]) -> String {
    let event: Value = serde_json::from_slice(payload).expect("an event");
    event["id"].as_str().expect("a name").to_owned()
}

/// Returns the first of many names that fits.
fn named(prefix: &str, fits: impl Fn(&str) -> bool) -> String {
    (0..1000).map(|n| format!("{prefix}{n}")).find(|name| fits(name)).expect("a name that fits")
}

/// A cluster, a daemon's home on it, and a store for queries.
struct Site {
    cluster: Cluster,
    receiver: Receiver,
    /// Whether the receiver accepts every request.
    is_mended: Arc<AtomicBool>,
    home: Home,
    account: Account,
    /// A stream on the same node as [`STREAM`] that accepts events without a replica.
    probe: String,
    ledger: Arc<Ledger>,
    store: Arc<dyn Store>,
    /// Number of requests that the ledger has recorded.
    noted: usize,
}

impl Site {
    async fn start() -> Self {
        let cluster = Cluster::start().await;
        let (primary, _) = cluster.nodes_of(STREAM);
        let dead_letter = named("it:dead-", |name| cluster.nodes_of(name).0 != primary);
        let probe = named("it:probe-", |name| cluster.nodes_of(name).0 == primary);
        let is_mended = Arc::new(AtomicBool::new(false));
        let takes_all = Arc::clone(&is_mended);
        let receiver = Receiver::start(move |request| {
            let is_refused = is_refused(&name_of(&request.body)) && !takes_all.load(Ordering::SeqCst);
            Reply::Status(if is_refused { 400 } else { 204 })
        })
        .await;
        let home = Home::new(&format!(
            r#"
[[streams]]
name = "{STREAM}"
dead_letter = "{dead_letter}"
durability = "replicated"
relay = true
retention = {{ max_len = 1000 }}
[[streams.groups]]
name = "{GROUP}"
sink = "siem"
concurrency = 8
claim_idle = "3s"
handler_timeout = "2s"
[[streams]]
name = "{probe}"
[[streams.groups]]
name = "log"
sink = "log"
[sinks.log]
type = "log"
[sinks.siem]
type = "webhook"
url = "{receiver}"
allow_private = true
[store]
backend = "redis"
[store.redis]
url = "{url}"
"#,
            receiver = receiver.url("/in"),
            url = cluster.url(),
        ));
        let account =
            Account { dead_letter: dead_letter.parse().expect("a valid name"), ..Account::new(STREAM, GROUP) };
        let store = Config { url: cluster.url().into(), ..Config::default() };
        let store = Arc::new(store.connect().await.expect("a valid configuration"));
        Self { cluster, receiver, is_mended, home, account, probe, ledger: Arc::default(), store, noted: 0 }
    }

    /// Records the received events in the ledger.
    fn record_received(&mut self) {
        let received = self.receiver.received();
        for request in received.iter().skip(self.noted).filter(|request| request.is_taken) {
            let attempt = request.header("aurora-attempt").parse().expect("an attempt");
            self.ledger.record_handled(&name_of(&request.body), attempt);
        }
        self.noted = received.len();
    }

    /// Kills a primary under load. The daemon must work again soon after the promotion of its replica. The promoted
    /// node has no replica until the killed node is back.
    async fn kill_primary_of(&mut self, key: &str, daemon: &Daemon) {
        let (primary, replica) = self.cluster.nodes_of(key);
        self.cluster.crash(primary);
        self.cluster.promoted(replica).await;
        let promoted = Instant::now();
        let event = [serde_json::json!({ "id": "probe" }).to_string()];
        until("accepted probe", BOUND, async || daemon.publish(&self.probe, &event).await.ok()).await;
        let probe = self.probe.parse().expect("a valid name");
        until("handled probe", BOUND, async || {
            let group = self.store.describe(&probe).await.ok()??.groups.into_iter().next()?;
            (group.pending == 0 && group.undelivered == Some(0)).then_some(())
        })
        .await;
        daemon.ready(StatusCode::OK).await;
        assert!(promoted.elapsed() < RECOVERY, "back after {:?}", promoted.elapsed());
        self.cluster.restart(primary).await;
        let accepted = self.ledger.accepted_count();
        let more = async || (self.ledger.accepted_count() > accepted + 300).then_some(());
        until("events that are replicated again", BOUND, more).await;
    }
}

/// The events of a dashboard in order, and its last position.
#[derive(Debug, Default)]
struct Seen {
    names: Vec<String>,
    position: String,
}

/// Reads events until it is stopped.
async fn watch(mut socket: Socket, stop: CancellationToken, seen: Arc<Mutex<Seen>>) {
    loop {
        let message = tokio::select! {
            () = stop.cancelled() => return,
            message = socket.next() => message,
        };
        let text = match message.expect("an open socket").expect("an open socket") {
            Message::Text(text) => text,
            Message::Ping(_) | Message::Pong(_) => continue,
            other => panic!("not an event: {other:?}"),
        };
        let event: Value = serde_json::from_str(&text).expect("JSON");
        let mut seen = seen.lock().expect("unpoisoned");
        event["_pos"].as_str().expect("a position").clone_into(&mut seen.position);
        seen.names.push(event["id"].as_str().expect("a name").to_owned());
    }
}

/// Publishes about 500 events a second, each until it is accepted.
fn start_load(site: &Site, daemon: &Arc<Daemon>, stop: &CancellationToken) -> JoinSet<()> {
    let mut publishers = JoinSet::new();
    for _ in 0..4 {
        let (daemon, stop, ledger) = (Arc::clone(daemon), stop.clone(), Arc::clone(&site.ledger));
        let stream = site.account.stream.clone();
        publishers.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(40));
            while !stop.is_cancelled() {
                ticks.tick().await;
                let events = ledger.events(5, 50);
                while ledger.publish(&daemon, &stream, &events).await.is_err() {
                    ticks.tick().await;
                }
            }
        });
    }
    publishers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cluster_failovers_under_load_lose_nothing() {
    let mut site = Site::start().await;
    let daemon = Arc::new(site.home.start().await);
    let path = format!("/api/v1/ws/alerts?meta=1&stream={STREAM}");
    let (stop_watching, stop_first) = (CancellationToken::new(), CancellationToken::new());
    let [all, before, after] = [(); 3].map(|()| Arc::new(Mutex::new(Seen::default())));
    let mut dashboards = JoinSet::new();
    dashboards.spawn(watch(daemon.watch(&path).await, stop_watching.clone(), Arc::clone(&all)));
    dashboards.spawn(watch(daemon.watch(&path).await, stop_first.clone(), Arc::clone(&before)));
    let stop = CancellationToken::new();
    let mut publishers = start_load(&site, &daemon, &stop);
    until("load", BOUND, async || (site.ledger.accepted_count() > 300).then_some(())).await;

    // One dashboard stays connected, the other reconnects at the end.
    stop_first.cancel();
    site.kill_primary_of(STREAM, &daemon).await;
    let position = before.lock().expect("unpoisoned").position.clone();
    let resumed = daemon.watch(&format!("{path}&since={position}")).await;
    dashboards.spawn(watch(resumed, stop_watching.clone(), Arc::clone(&after)));
    let dead_letter = site.account.dead_letter.to_string();
    site.kill_primary_of(&dead_letter, &daemon).await;
    stop.cancel();
    while let Some(ended) = publishers.join_next().await {
        ended.expect("everything is accepted");
    }

    until("a settled account", BOUND, async || {
        let balance = site.ledger.balance(&*site.store, &site.account).await;
        (balance.pending + balance.undelivered == 0).then_some(())
    })
    .await;
    // An event is acknowledged after the receiver's response, so no request is outstanding.
    site.record_received();
    site.ledger.balance(&*site.store, &site.account).await.assert_settled();
    let accepted: BTreeSet<String> = site.ledger.accepted_names();
    assert!(accepted.len() > 900, "only {} events", accepted.len());
    let refused: BTreeSet<String> = accepted.iter().filter(|name| is_refused(name)).cloned().collect();
    let letters = site.store.range(&site.account.dead_letter, EVERYTHING, 10_000).await.expect("read");
    let dead = letters.iter().map(|letter| {
        let letter = DeadLetter::from_entry(letter).expect("a dead letter");
        name_of(letter.fields.get("data").expect("a payload"))
    });
    let dead: Vec<String> = dead.collect();
    assert_eq!(dead.iter().cloned().collect::<BTreeSet<_>>(), refused, "exactly the rejected events are dead");
    assert_eq!(dead.len(), refused.len(), "each is dead once");

    // Both dashboards, the connected and the reconnected one, have received every event.
    let last = accepted.len();
    let names = |seen: &[&Mutex<Seen>]| -> BTreeSet<String> {
        seen.iter().flat_map(|seen| seen.lock().expect("unpoisoned").names.clone()).collect()
    };
    for seen in [&[&*all][..], &[&*before, &*after]] {
        let misses = || accepted.difference(&names(seen)).cloned().collect::<Vec<_>>();
        let waited = tokio::time::timeout(BOUND, async {
            while !misses().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert!(waited.await.is_ok(), "{:?} of {last} events were never shown", misses());
    }
    stop_watching.cancel();
    while let Some(ended) = dashboards.join_next().await {
        ended.expect("no dashboard was cut off");
    }

    // Retention works, and the accounts add up.
    until("a trimmed stream", BOUND, async || {
        let status = site.store.describe(&site.account.stream).await.ok()??;
        (status.length <= 1100).then_some(())
    })
    .await;
    let output = site.home.run(&["reconcile", "--url", &daemon.url(""), "--wait", "60s"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    Arc::into_inner(daemon).expect("the last reference").stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letter_written_before_crash_is_not_repeated() {
    let site = Site::start().await;
    let (primary, _) = site.cluster.nodes_of(STREAM);
    let daemon = site.home.start().await;
    let may_acknowledge = |may: bool| {
        let right = if may { "+xack" } else { "-xack" };
        assert_eq!(site.cluster.node(primary).cli(&["ACL", "SETUSER", "default", right]), "OK");
    };
    may_acknowledge(false);
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &site.ledger.events(8, 10)).await;
    let letters = async || site.store.range(&site.account.dead_letter, EVERYTHING, 10).await.expect("read").len();
    until("a letter", BOUND, async || (letters().await == 1).then_some(())).await;
    let pending = async || {
        let status = site.store.describe(&site.account.stream).await.ok()??;
        status.groups.into_iter().next().map(|group| (group.pending, group.undelivered))
    };
    until("handled events", BOUND, async || (pending().await == Some((8, Some(0)))).then_some(())).await;
    daemon.crash();

    // Another worker could deliver the entry by now.
    site.is_mended.store(true, Ordering::SeqCst);
    may_acknowledge(true);
    let daemon = site.home.start().await;
    until("a settled account", BOUND, async || (pending().await == Some((0, Some(0)))).then_some(())).await;
    assert_eq!(letters().await, 1);
    let received = site.receiver.received();
    let taken = received.iter().filter(|request| request.is_taken && name_of(&request.body) == "e-7").count();
    assert_eq!(taken, 0, "the dead entry was delivered again");
    let output = site.home.run(&["reconcile", "--url", &daemon.url(""), "--wait", "60s"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    daemon.stop().await;
}
