//! Several daemons on one Redis: names, restarts, and frozen daemons.
//!
//! Each test run has ten restarts.
//! `cargo test --release --test it -- --ignored --nocapture two_hundred_rolling_restarts` runs two hundred.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aurora_bus::event::EntryId;
use serde_json::json;
use tokio::sync::{Barrier, Mutex};
use tokio::task::JoinSet;

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::receiver::{Receiver, Reply};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAM: &str = "aurora:alerts";
const GROUP: &str = "alert-processor";

/// Returns the configuration of one group whose sink writes a line per entry to the daemon's log.
fn logging(server: &RedisServer, group: &str) -> String {
    format!(
        r#"
[[streams]]
name = "{STREAM}"
retention = {{ max_len = 900_000 }}

[[streams.groups]]
name = "{GROUP}"
sink = "log"
claim_idle = "2s"
handler_timeout = "1s"
{group}

[log]
format = "json"
[store]
backend = "redis"
[store.redis]
url = "{}"
"#,
        server.url()
    )
}

async fn publish(daemon: &Daemon, events: std::ops::Range<u64>) -> BTreeSet<String> {
    let payloads: Vec<String> = events.map(|number| json!({ "number": number }).to_string()).collect();
    let results = daemon.publish(STREAM, &payloads).await.expect("accepted");
    results.into_iter().map(|accepted| accepted.id).collect()
}

/// Returns the entries that a daemon delivered, from its log, in order.
fn deliveries(log: &str) -> Vec<String> {
    let lines = log.lines().filter(|line| line.contains("entry of severity"));
    let id = |line: &str| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        let id = line.pointer("/fields/entry.id").or_else(|| line.get("entry.id"))?;
        Some(id.as_str()?.to_owned())
    };
    lines.map(|line| id(line).unwrap_or_else(|| panic!("no entry id in {line}"))).collect()
}

fn times<'a>(logs: impl IntoIterator<Item = &'a String>) -> BTreeMap<String, usize> {
    let mut times = BTreeMap::new();
    for id in logs.into_iter().flat_map(|log| deliveries(log)) {
        *times.entry(id).or_default() += 1;
    }
    times
}

async fn stopped(daemon: Daemon) -> String {
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    ended.log
}

fn consumers(server: &RedisServer) -> usize {
    server.cli(&["XINFO", "CONSUMERS", STREAM, GROUP]).lines().filter(|line| *line == "name").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_daemons_of_one_name_deliver_each_entry_once() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    // A busy machine must not cause claims.
    let config = logging(&server, "").replace("claim_idle = \"2s\"", "claim_idle = \"30s\"");
    let homes = [Home::new(&config), Home::new(&config)];
    let first = homes[0].start().await;
    let mut accepted = publish(&first, 0..500).await;
    let second = homes[1].start().await;
    until("the conflict of names", BOUND, async || {
        second.get("/ready").await.contains("works as it-0~2: another daemon has the name it-0").then_some(())
    })
    .await;
    for batch in 1..20 {
        let daemon = if batch % 2 == 0 { &first } else { &second };
        accepted.extend(publish(daemon, batch * 500..(batch + 1) * 500).await);
    }
    first.handled(STREAM, GROUP).await;
    let logs = [stopped(first).await, stopped(second).await];
    assert!(logs[1].contains("another daemon has the name it-0"), "{}", logs[1]);
    let times = times(&logs);
    assert_eq!(times.keys().cloned().collect::<BTreeSet<_>>(), accepted);
    let repeated: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert!(repeated.is_empty(), "delivered more than once: {repeated:?}");
    assert_eq!(consumers(&server), 0, "both consumers are removed");
}

/// The maximum number of entries in flight of a daemon in a rolling restart.
const IN_HAND: usize = 100;

/// Daemons of random names replace one another while another daemon publishes. Every fourth is killed.
async fn survives_rolling_restarts(rounds: usize) {
    let server = Arc::new(RedisServer::start(Product::Redis, &[]).await);
    let limits = format!("batch = {IN_HAND}\nmax_in_flight = {IN_HAND}\nreap_after = \"1s\"");
    let config = logging(&server, &limits);
    let start = async || {
        let home = Home::named(&format!("pod-{}", uuid::Uuid::new_v4().simple()), &config);
        (Arc::new(home.start().await), home)
    };
    let (publisher, home) = start().await;
    let is_over = Arc::new(AtomicBool::new(false));
    let accepted = Arc::new(Mutex::new(BTreeSet::new()));
    let mut publishing = JoinSet::new();
    {
        let (publisher, is_over, accepted) = (publisher.clone(), is_over.clone(), accepted.clone());
        publishing.spawn(async move {
            let mut batch = 0;
            while !is_over.load(Ordering::Relaxed) {
                let ids = publish(&publisher, batch * 20..(batch + 1) * 20).await;
                accepted.lock().await.extend(ids);
                batch += 1;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    let begun = Instant::now();
    let mut logs = Vec::new();
    let (mut kills, mut most_consumers) = (0, 0);
    let mut live = vec![start().await];
    // One daemon after each round, and the publisher.
    let alive = live.len() + 1;
    for round in 0..rounds {
        live.push(start().await);
        let (oldest, _home) = live.remove(0);
        let oldest = Arc::into_inner(oldest).expect("the only reference");
        if round % 4 == 3 {
            kills += 1;
            oldest.signal("KILL");
            logs.push(oldest.ended().await.log);
        } else {
            logs.push(stopped(oldest).await);
        }
        most_consumers = most_consumers.max(consumers(&server));
        // A stopped daemon leaves its pending entries to the others, and its consumer until they have claimed them.
        until("consumers of the running daemons and one more", BOUND, async || {
            (consumers(&server) <= alive + 1).then_some(())
        })
        .await;
        if round % 20 == 19 {
            tell(&format!("{} restarts after {:?}", round + 1, begun.elapsed()));
        }
    }
    is_over.store(true, Ordering::Relaxed);
    publishing.join_all().await;
    publisher.handled(STREAM, GROUP).await;
    until("consumers of the running daemons only", BOUND, async || (consumers(&server) <= alive).then_some(())).await;
    for (daemon, _home) in live.into_iter().chain([(publisher, home)]) {
        logs.push(stopped(Arc::into_inner(daemon).expect("the only reference")).await);
    }
    assert_eq!(consumers(&server), 0, "all consumers are removed");
    let times = times(&logs);
    let accepted = accepted.lock().await;
    let missing: Vec<_> = accepted.iter().filter(|id| !times.contains_key(*id)).collect();
    assert!(missing.is_empty(), "never delivered: {missing:?}");
    let repeated = times.values().filter(|times| **times > 1).count();
    let events = accepted.len();
    tell(&format!(
        "{rounds} restarts, {kills} of them kills, in {:?}: {events} events, {repeated} delivered again, at most \
         {most_consumers} consumers at a time",
        begun.elapsed()
    ));
    assert!(repeated <= kills * IN_HAND, "{repeated} of {events} were delivered more than once");
}

#[expect(clippy::print_stderr, reason = "progress of a test that runs for minutes")]
fn tell(text: &str) {
    eprintln!("{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_rolling_restarts_lose_no_entry_and_leave_no_consumer() {
    survives_rolling_restarts(10).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: cargo test --release --test it -- --ignored --nocapture two_hundred_rolling_restarts"]
async fn two_hundred_rolling_restarts_lose_no_entry() {
    survives_rolling_restarts(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_of_a_frozen_daemon_are_handled_once_elsewhere() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let homes = ["soc-a", "soc-b"].map(|instance| Home::named(instance, &logging(&server, "")));
    let (frozen, other) = (homes[0].start().await, homes[1].start().await);
    let mut accepted = publish(&frozen, 0..100).await;
    frozen.handled(STREAM, GROUP).await;
    frozen.signal("STOP");
    // Its read still waits at the server, and receives the next entries.
    let published = Instant::now();
    accepted.extend(publish(&other, 100..200).await);
    other.handled(STREAM, GROUP).await;
    let limit = Duration::from_secs(2) + Duration::from_secs(2).mul_f64(0.25 * 1.2) + Duration::from_secs(3);
    assert!(published.elapsed() < limit, "taken over after {:?}", published.elapsed());
    frozen.signal("CONT");
    accepted.extend(publish(&frozen, 200..300).await);
    frozen.handled(STREAM, GROUP).await;
    let logs = [stopped(frozen).await, stopped(other).await];
    let times = times(&logs);
    assert_eq!(times.keys().cloned().collect::<BTreeSet<_>>(), accepted);
    let repeated: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert!(repeated.is_empty(), "delivered more than once: {repeated:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ordered_group_moves_from_a_frozen_daemon_to_the_next() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let config = logging(&server, "ordering = \"stream\"");
    let homes = ["soc-a", "soc-b"].map(|instance| Home::named(instance, &config));
    let first = homes[0].start().await;
    // The first daemon holds the group lease before the second starts.
    until("the group lease", BOUND, async || {
        (server.cli(&["EXISTS", &format!("{{{STREAM}}}:lease:group/{GROUP}")]) == "1").then_some(())
    })
    .await;
    let second = homes[1].start().await;
    until("a waiting daemon", BOUND, async || {
        second.get("/ready").await.contains("waiting: soc-a-0 works").then_some(())
    })
    .await;
    let mut accepted = publish(&first, 0..300).await;
    first.handled(STREAM, GROUP).await;
    first.signal("STOP");
    accepted.extend(publish(&second, 300..600).await);
    second.handled(STREAM, GROUP).await;
    first.signal("CONT");
    accepted.extend(publish(&second, 600..900).await);
    second.handled(STREAM, GROUP).await;
    until("a waiting daemon", BOUND, async || {
        first.get("/ready").await.contains("waiting: soc-b-0 works").then_some(())
    })
    .await;
    second.signal("TERM");
    accepted.extend(publish(&first, 900..1200).await);
    first.handled(STREAM, GROUP).await;
    let second = second.ended().await.log;
    let first = stopped(first).await;
    let delivered: Vec<String> = deliveries(&first).into_iter().chain(deliveries(&second)).collect();
    let mut seen = BTreeSet::new();
    assert!(delivered.iter().all(|id| seen.insert(id.clone())), "an entry was delivered twice");
    assert_eq!(seen, accepted);
    for log in [&first, &second] {
        let ids: Vec<EntryId> = deliveries(log).iter().map(|id| id.parse().expect("an id")).collect();
        assert!(ids.is_sorted(), "out of order");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_result_of_a_frozen_daemon_is_ignored() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let barrier = Arc::new(Barrier::new(2));
    let receiver = Receiver::start(move |_| Reply::Meet(barrier.clone())).await;
    let webhook =
        format!("[sinks.siem]\ntype = \"webhook\"\nurl = \"{}\"\nallow_private = true\n", receiver.url("/in"));
    let config = format!("{}{webhook}", logging(&server, "").replace("sink = \"log\"", "sink = \"siem\""));
    let homes = ["soc-a", "soc-b"].map(|instance| Home::named(instance, &config));
    let frozen = homes[0].start().await;
    let accepted = publish(&frozen, 0..1).await;
    until("a request", BOUND, async || (receiver.received().len() == 1).then_some(())).await;
    frozen.signal("STOP");
    // The receiver answers both requests when the second daemon has claimed the entry.
    let other = homes[1].start().await;
    other.handled(STREAM, GROUP).await;
    frozen.signal("CONT");
    let counter = async |daemon: &Daemon, name: &str| {
        let metrics = daemon.get("/metrics").await;
        let value = metrics.lines().find(|line| line.starts_with(name)).and_then(|line| line.rsplit(' ').next());
        value.map_or(0, |value| value.parse::<u64>().expect("a number"))
    };
    until("the late result", BOUND, async || (counter(&frozen, "aurora_bus_not_owned_total{").await > 0).then_some(()))
        .await;
    assert_eq!(counter(&frozen, "aurora_bus_acknowledged_total{").await, 0);
    assert_eq!(counter(&other, "aurora_bus_acknowledged_total{").await, 1);
    assert_eq!(counter(&other, "aurora_bus_claimed_total{").await, 1);
    assert_eq!((receiver.received().len(), accepted.len()), (2, 1));
    frozen.stop().await;
    other.stop().await;
}
