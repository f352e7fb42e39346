//! Groups with external consumers: redelivery of abandoned entries, with real consumers.

mod family;

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::delivery::{GroupConfig, GroupSpec, Redeliverer};
use aurora_bus::event::{DeadLetter, DeadLetterReason, EntryId, StreamName, field};
use aurora_bus::maintenance::{Retention, Scheduler, StreamSpec};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{Cursor, GroupStatus, HardLimits, Order, Range, Start, Store};
use aurora_bus::validate::Validate;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::python::Python;
use crate::support::redis::RedisServer;
use crate::support::stores::{on_stores, own_redis};
use crate::support::{counted, until};

const PATIENCE: Duration = Duration::from_mins(1);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// A stream with the group `agents` for external consumers, and its redeliverers.
struct Setup {
    store: Arc<dyn Store>,
    spec: GroupSpec,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Setup {
    async fn new(store: Arc<dyn Store>, max_deliveries: u32) -> Self {
        let stream = unique_stream();
        let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
        // Long enough for a worker on a busy machine.
        config.claim_idle = Duration::from_secs(2);
        config.max_deliveries = max_deliveries;
        config.reap_after = Duration::from_secs(1);
        assert_eq!(config.problems(), []);
        store.ensure_group(&stream, &config.name, Start::Oldest).await.expect("a group");
        let spec = GroupSpec { dead_letter: stream.default_dead_letter(), stream, config };
        let (metrics, readiness) = (Metrics::new(), Readiness::default());
        Self { store, spec, metrics, readiness, stop: CancellationToken::new(), tasks: JoinSet::new() }
    }

    /// Starts the redeliverer of one daemon.
    fn start_redeliverer(&mut self, name: &str) {
        let part = self.readiness.part(name, None);
        let name = name.parse().expect("a valid name");
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        let redeliverer = Redeliverer::of_stream(store, self.spec.clone(), name, metrics, part);
        self.tasks.spawn(redeliverer.run(self.stop.clone()));
    }

    async fn publish(&self, texts: &[&str]) {
        let entries = texts.iter().map(|text| new_entry(text)).collect();
        self.store.append(self.stream(), entries).await.expect("appended");
    }

    fn stream(&self) -> &StreamName {
        &self.spec.stream
    }

    fn cursor(&self, consumer: &str) -> Cursor {
        cursor(self.stream(), "agents", consumer)
    }

    async fn group(&self) -> GroupStatus {
        let status = self.store.describe(self.stream()).await.expect("described").expect("the stream exists");
        status.groups.into_iter().next().expect("the group exists")
    }

    async fn length(&self, stream: &StreamName) -> usize {
        self.store.range(stream, EVERYTHING, 1000).await.expect("read").len()
    }

    async fn is_settled(&self) {
        until("end of pending entries", PATIENCE, async || {
            let group = self.group().await;
            (group.pending == 0 && group.lag == Some(0)).then_some(())
        })
        .await;
    }

    async fn dead_letters(&self) -> Vec<DeadLetter> {
        let entries = self.store.range(&self.spec.dead_letter, EVERYTHING, 1000).await.expect("read");
        entries.iter().map(|entry| DeadLetter::from_entry(entry).expect("a dead letter")).collect()
    }

    fn counter(&self, name: &str) -> u64 {
        counted(&self.metrics, name)
    }
}

/// A typical consumer, which reads new entries only. By its mode, it dies of the entry, hangs, or is slow and keeps
/// resetting the idle time of its entry.
const WORKER: &str = r#"
import os, sys, time, redis
port, stream, group, name, mode = sys.argv[1:]
r = redis.Redis(port=int(port))
print("ready", flush=True)
while True:
    for _, entries in r.xreadgroup(group, name, {stream: ">"}, count=1, block=500) or []:
        for id, fields in entries:
            print("got", fields[b"data"].decode(), flush=True)
            if mode == "die":
                os.kill(os.getpid(), 9)
            if mode == "hang":
                time.sleep(3600)
            if mode == "slow":
                for _ in range(20):
                    time.sleep(0.25)
                    r.xclaim(stream, group, name, 0, [id], justid=True)
            r.xack(stream, group, id)
            print("done", fields[b"data"].decode(), flush=True)
"#;

/// Starts this consumer.
fn agent(server: &RedisServer, stream: &StreamName, name: &str, mode: &str) -> Python {
    let port = server.port().to_string();
    Python::start(WORKER, &[&port, stream.as_str(), "agents", name, mode])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entry_of_a_killed_consumer_reaches_another_once() {
    let (server, store) = own_redis().await;
    let mut setup = Setup::new(store, 15).await;
    setup.start_redeliverer("soc-a-guard");
    setup.start_redeliverer("soc-b-guard");
    setup.publish(&["one"]).await;
    let first = agent(&server, setup.stream(), "agent-1", "hang");
    first.wait_for_line("got one").await;
    drop(first);
    setup.publish(&["two", "three"]).await;
    let second = agent(&server, setup.stream(), "agent-2", "work");
    for line in ["done two", "done three", "done one"] {
        second.wait_for_line(line).await;
    }
    setup.is_settled().await;
    assert_eq!(second.lines().iter().filter(|line| *line == "got one").count(), 1);
    assert_eq!(setup.counter("aurora_bus_redelivered_total"), 1, "by one of the two redeliverers");
    assert_eq!(setup.length(setup.stream()).await, 4);
    let last = setup.store.range(setup.stream(), EVERYTHING, 10).await.expect("read").pop().expect("an entry");
    assert_eq!(last.fields.text(field::REPLAY_ATTEMPTS), Some("1"));
    assert_eq!(setup.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entry_that_kills_every_consumer_is_dead_lettered() {
    let (server, store) = own_redis().await;
    let mut setup = Setup::new(store, 3).await;
    setup.start_redeliverer("soc-a-guard");
    setup.start_redeliverer("soc-b-guard");
    setup.publish(&["poison"]).await;
    for n in 1..=3 {
        let worker = agent(&server, setup.stream(), &format!("agent-{n}"), "die");
        worker.wait_for_line("got poison").await;
    }
    let letters =
        until("dead letter", PATIENCE, async || Some(setup.dead_letters().await).filter(|letters| !letters.is_empty()))
            .await;
    setup.is_settled().await;
    let first = setup.store.range(setup.stream(), EVERYTHING, 1).await.expect("read").remove(0);
    let letter = &letters[0];
    assert_eq!((letter.reason, letter.attempts, letter.id), (DeadLetterReason::Crashed, 3, first.id));
    assert_eq!(letter.fields, first.fields, "as it was published");
    assert_eq!(letter.error, "delivered 3 times to external consumers and never acknowledged");
    assert_eq!(setup.dead_letters().await.len(), 1);
    assert_eq!(setup.counter("aurora_bus_redelivered_total"), 2);
    // The counter follows the response of the store.
    until("the count", PATIENCE, async || (setup.counter("aurora_bus_dead_letters_total") == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumer_that_resets_its_idle_time_keeps_its_entry() {
    let (server, store) = own_redis().await;
    let mut setup = Setup::new(store, 15).await;
    setup.start_redeliverer("soc-a-guard");
    setup.publish(&["long"]).await;
    let worker = agent(&server, setup.stream(), "agent-1", "slow");
    worker.wait_for_line("done long").await;
    setup.is_settled().await;
    assert_eq!(setup.length(setup.stream()).await, 1);
    assert_eq!(setup.counter("aurora_bus_redelivered_total"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destroyed_group_resumes_at_its_ack_floor() {
    let (server, store) = own_redis().await;
    let mut setup = Setup::new(store, 15).await;
    setup.publish(&["one", "two"]).await;
    let worker = agent(&server, setup.stream(), "agent-1", "work");
    worker.wait_for_line("done two").await;
    setup.is_settled().await;
    drop(worker);
    setup.start_redeliverer("soc-a-guard");
    until("report of the redeliverer", PATIENCE, async || setup.readiness.report()[0].reason.is_none().then_some(()))
        .await;
    // Each search ends with a read of the ack floor; the second search shows that the first one has ended.
    server.note_commands();
    let searches = || server.commands(&[setup.stream().as_str(), "soc-a-guard"]);
    until("two searches", PATIENCE, async || (searches() >= 2).then_some(())).await;
    assert_eq!(server.cli(&["XGROUP", "DESTROY", setup.stream().as_str(), "agents"]), "1");
    setup.publish(&["three"]).await;
    until("group", PATIENCE, async || (setup.counter("aurora_bus_groups_recreated_total") == 1).then_some(())).await;
    let worker = agent(&server, setup.stream(), "agent-2", "work");
    worker.wait_for_line("done three").await;
    assert!(!worker.lines().iter().any(|line| line == "got one" || line == "got two"), "{:?}", worker.lines());
}

async fn abandoned_entry_is_redelivered_then_dead_lettered(store: Arc<dyn Store>) {
    let mut setup = Setup::new(store, 2).await;
    setup.start_redeliverer("soc-a-guard");
    setup.publish(&["task"]).await;
    for attempt in ["first", "second"] {
        let taken = until(attempt, PATIENCE, async || {
            let fetched = setup.store.fetch(&setup.cursor("agent-1"), 1, Duration::ZERO).await.expect("fetched");
            fetched.into_iter().next()
        })
        .await;
        assert_eq!(taken.entry.data().map(|data| &data[..]), Some(&b"task"[..]));
    }
    let letters =
        until("dead letter", PATIENCE, async || Some(setup.dead_letters().await).filter(|letters| !letters.is_empty()))
            .await;
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    setup.is_settled().await;
    assert_eq!(setup.readiness.report()[0].reason, None);
    setup.stop.cancel();
    while let Some(ended) = setup.tasks.join_next().await {
        ended.expect("no panic");
    }
    let consumers: Vec<String> = setup.group().await.consumers.iter().map(|c| c.name.to_string()).collect();
    assert_eq!(consumers, ["agent-1"]);
}

async fn only_idle_consumers_without_pending_entries_are_reaped(store: Arc<dyn Store>) {
    let mut setup = Setup::new(store, 15).await;
    setup.publish(&["held"]).await;
    let fetch =
        async |consumer: &str| setup.store.fetch(&setup.cursor(consumer), 1, Duration::ZERO).await.expect("fetched");
    assert_eq!(fetch("busy").await.len(), 1);
    for consumer in ["gone", "soc-a-0"] {
        setup.publish(&["x"]).await;
        let delivery = fetch(consumer).await.remove(0);
        let outcome = aurora_bus::store::Outcome::Acknowledge;
        let settlement = aurora_bus::store::Settlement { delivery, outcome };
        let settled = setup.store.settle(&setup.cursor(consumer), &[settlement]).await.expect("settled");
        assert_eq!(settled.settled, 1);
    }
    let own = ["soc-a-0".parse().expect("a valid name")].into_iter().collect();
    let spec = StreamSpec {
        name: setup.stream().clone(),
        retention: Retention::default(),
        groups: vec![setup.spec.config.clone()],
    };
    let (store, metrics) = (setup.store.clone(), setup.metrics.clone());
    let scheduler = Scheduler::new(store, vec![spec], HardLimits::default(), metrics, &setup.readiness);
    setup.tasks.spawn(scheduler.with_own_consumers(own).run(setup.stop.clone()));
    let names = until("removed consumer", PATIENCE, async || {
        let names: Vec<String> = setup.group().await.consumers.iter().map(|c| c.name.to_string()).collect();
        Some(names).filter(|names| names.len() < 3)
    })
    .await;
    assert_eq!(names, ["busy", "soc-a-0"]);
    until("the count", PATIENCE, async || (setup.counter("aurora_bus_consumers_reaped_total") == 1).then_some(()))
        .await;
    assert_eq!(setup.group().await.pending, 1);
}

/// Redis 7.0 does not count an empty read as activity: a live consumer of a quiet stream may be reaped.
async fn consumer_reaped_during_a_read_receives_new_entries(store: Arc<dyn Store>) {
    let setup = Setup::new(store, 15).await;
    let waiting = setup.cursor("waiting");
    setup.publish(&["first"]).await;
    let delivery = setup.store.fetch(&waiting, 1, Duration::ZERO).await.expect("fetched").remove(0);
    let outcome = aurora_bus::store::Outcome::Acknowledge;
    let settlement = aurora_bus::store::Settlement { delivery, outcome };
    setup.store.settle(&waiting, &[settlement]).await.expect("settled");
    let mut reads = JoinSet::new();
    let (store, cursor) = (setup.store.clone(), waiting.clone());
    reads.spawn(async move {
        loop {
            let fetched = store.fetch(&cursor, 1, Duration::from_secs(2)).await.expect("fetched");
            if !fetched.is_empty() {
                return fetched;
            }
        }
    });
    // Removed again and again, also during the read.
    let removed_at = std::time::Instant::now();
    until("removals", PATIENCE, async || {
        setup.store.remove_consumer(&waiting).await.expect("removed or not");
        (removed_at.elapsed() > Duration::from_millis(300)).then_some(())
    })
    .await;
    setup.publish(&["second"]).await;
    let fetched = reads.join_next().await.expect("a read").expect("no panic");
    assert_eq!(fetched[0].entry.data().map(|data| &data[..]), Some(&b"second"[..]));
    let group = setup.group().await;
    assert_eq!((group.pending, group.consumers.len()), (1, 1));
    let outcome = aurora_bus::store::Outcome::Acknowledge;
    let settlements: Vec<_> = fetched
        .into_iter()
        .map(|delivery| aurora_bus::store::Settlement { delivery, outcome: outcome.clone() })
        .collect();
    assert_eq!(setup.store.settle(&waiting, &settlements).await.expect("settled").settled, 1);
}

on_stores! { embedded redis valkey: [
    abandoned_entry_is_redelivered_then_dead_lettered
    only_idle_consumers_without_pending_entries_are_reaped
    consumer_reaped_during_a_read_receives_new_entries
] }
