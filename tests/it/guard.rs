//! Groups whose consumers live outside the daemon: what real consumers leave, and who gets it then.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::delivery::{GroupConfig, GroupSpec, Guard};
use aurora_bus::event::{DeadLetter, DeadLetterReason, EntryId, StreamName, field};
use aurora_bus::maintenance::Reaper;
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{Cursor, GroupStatus, Order, Range, Start, Store};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::python::Python;
use crate::support::redis::RedisServer;
use crate::support::stores::{on_stores, own_redis};
use crate::support::{counted, until};

const PATIENCE: Duration = Duration::from_mins(1);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// A store, a stream with the group `agents` that is consumed from outside, and its guards.
struct Guarded {
    store: Arc<dyn Store>,
    spec: GroupSpec,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Guarded {
    async fn new(store: Arc<dyn Store>, max_deliveries: u32) -> Self {
        let stream = unique_stream();
        let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
        // Long enough for a worker that has to wait for its turn on a busy machine.
        config.claim_idle = Duration::from_secs(2);
        config.max_deliveries = max_deliveries;
        config.reap_after = Duration::from_secs(1);
        assert_eq!(config.validate(), []);
        store.ensure_group(&stream, &config.name, Start::Oldest).await.expect("a group");
        let spec = GroupSpec { dead_letter: stream.default_dead_letter(), stream, config };
        let (metrics, readiness) = (Metrics::new(), Readiness::default());
        Self { store, spec, metrics, readiness, stop: CancellationToken::new(), tasks: JoinSet::new() }
    }

    /// Starts a guard, as each daemon has one.
    fn guard(&mut self, name: &str) {
        let part = self.readiness.part(name, None);
        let name = name.parse().expect("a valid name");
        let guard = Guard::new(self.store.clone(), self.spec.clone(), name, &self.metrics, part);
        self.tasks.spawn(guard.run(self.stop.clone()));
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

/// A consumer as they are written everywhere: it reads new entries only. By its mode, it dies of the entry, hangs, or
/// takes its time and says that it is alive.
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

/// Starts that worker.
fn agent(server: &RedisServer, stream: &StreamName, name: &str, mode: &str) -> Python {
    let port = server.port().to_string();
    Python::start(WORKER, &[&port, stream.as_str(), "agents", name, mode])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_task_of_a_killed_worker_reaches_another_worker_once() {
    let (server, store) = own_redis().await;
    let mut guarded = Guarded::new(store, 15).await;
    guarded.guard("soc-a-guard");
    guarded.guard("soc-b-guard");
    guarded.publish(&["one"]).await;
    let first = agent(&server, guarded.stream(), "agent-1", "hang");
    first.wait_for_line("got one").await;
    drop(first);
    guarded.publish(&["two", "three"]).await;
    let second = agent(&server, guarded.stream(), "agent-2", "work");
    for line in ["done two", "done three", "done one"] {
        second.wait_for_line(line).await;
    }
    guarded.is_settled().await;
    assert_eq!(second.lines().iter().filter(|line| *line == "got one").count(), 1);
    assert_eq!(guarded.counter("aurora_bus_redelivered_total"), 1, "by one of the two guards");
    assert_eq!(guarded.length(guarded.stream()).await, 4);
    let last = guarded.store.range(guarded.stream(), EVERYTHING, 10).await.expect("read").pop().expect("an entry");
    assert_eq!(last.fields.text(field::REPLAY_ATTEMPTS), Some("1"));
    assert_eq!(guarded.dead_letters().await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_kills_every_worker_ends_in_the_dead_letters() {
    let (server, store) = own_redis().await;
    let mut guarded = Guarded::new(store, 3).await;
    guarded.guard("soc-a-guard");
    guarded.guard("soc-b-guard");
    guarded.publish(&["poison"]).await;
    for n in 1..=3 {
        let worker = agent(&server, guarded.stream(), &format!("agent-{n}"), "die");
        worker.wait_for_line("got poison").await;
    }
    let letters = until("dead letter", PATIENCE, async || {
        Some(guarded.dead_letters().await).filter(|letters| !letters.is_empty())
    })
    .await;
    guarded.is_settled().await;
    let first = guarded.store.range(guarded.stream(), EVERYTHING, 1).await.expect("read").remove(0);
    let letter = &letters[0];
    assert_eq!((letter.reason, letter.attempts, letter.id), (DeadLetterReason::Crashed, 3, first.id));
    assert_eq!(letter.fields, first.fields, "as it was published");
    assert_eq!(letter.error, "delivered 3 times to consumers outside and never acknowledged");
    assert_eq!(guarded.dead_letters().await.len(), 1);
    assert_eq!(guarded.counter("aurora_bus_redelivered_total"), 2);
    // It is counted once the store has answered.
    until("count of it", PATIENCE, async || (guarded.counter("aurora_bus_dead_letters_total") == 1).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_that_shows_it_is_alive_is_left_alone() {
    let (server, store) = own_redis().await;
    let mut guarded = Guarded::new(store, 15).await;
    guarded.guard("soc-a-guard");
    guarded.publish(&["long"]).await;
    let worker = agent(&server, guarded.stream(), "agent-1", "slow");
    worker.wait_for_line("done long").await;
    guarded.is_settled().await;
    assert_eq!(guarded.length(guarded.stream()).await, 1);
    assert_eq!(guarded.counter("aurora_bus_redelivered_total"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroyed_group_does_not_get_all_its_tasks_once_more() {
    let (server, store) = own_redis().await;
    let mut guarded = Guarded::new(store, 15).await;
    guarded.publish(&["one", "two"]).await;
    let worker = agent(&server, guarded.stream(), "agent-1", "work");
    worker.wait_for_line("done two").await;
    guarded.is_settled().await;
    drop(worker);
    guarded.guard("soc-a-guard");
    until("word of the guard", PATIENCE, async || guarded.readiness.report()[0].reason.is_none().then_some(())).await;
    // Each search ends with a note of how far the group has come; the second shows the end of the first.
    server.note_commands();
    let searches = || server.commands(&[guarded.stream().as_str(), "soc-a-guard"]);
    until("two searches", PATIENCE, async || (searches() >= 2).then_some(())).await;
    assert_eq!(server.cli(&["XGROUP", "DESTROY", guarded.stream().as_str(), "agents"]), "1");
    guarded.publish(&["three"]).await;
    until("group", PATIENCE, async || (guarded.counter("aurora_bus_groups_recreated_total") == 1).then_some(())).await;
    let worker = agent(&server, guarded.stream(), "agent-2", "work");
    worker.wait_for_line("done three").await;
    assert!(!worker.lines().iter().any(|line| line == "got one" || line == "got two"), "{:?}", worker.lines());
}

async fn a_guard_hands_on_what_was_left_and_leaves_no_consumer(store: Arc<dyn Store>) {
    let mut guarded = Guarded::new(store, 2).await;
    guarded.guard("soc-a-guard");
    guarded.publish(&["task"]).await;
    for attempt in ["first", "second"] {
        let taken = until(attempt, PATIENCE, async || {
            let fetched = guarded.store.fetch(&guarded.cursor("agent-1"), 1, Duration::ZERO).await.expect("fetched");
            fetched.into_iter().next()
        })
        .await;
        assert_eq!(taken.entry.data().map(|data| &data[..]), Some(&b"task"[..]));
    }
    let letters = until("dead letter", PATIENCE, async || {
        Some(guarded.dead_letters().await).filter(|letters| !letters.is_empty())
    })
    .await;
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    guarded.is_settled().await;
    assert_eq!(guarded.readiness.report()[0].reason, None);
    guarded.stop.cancel();
    while let Some(ended) = guarded.tasks.join_next().await {
        ended.expect("no panic");
    }
    let consumers: Vec<String> = guarded.group().await.consumers.iter().map(|c| c.name.to_string()).collect();
    assert_eq!(consumers, ["agent-1"]);
}

async fn consumers_that_are_gone_are_removed_and_no_others(store: Arc<dyn Store>) {
    let mut guarded = Guarded::new(store, 15).await;
    guarded.publish(&["held"]).await;
    let fetch = async |consumer: &str| {
        guarded.store.fetch(&guarded.cursor(consumer), 1, Duration::ZERO).await.expect("fetched")
    };
    assert_eq!(fetch("busy").await.len(), 1);
    for consumer in ["gone", "soc-a-0"] {
        guarded.publish(&["x"]).await;
        let delivery = fetch(consumer).await.remove(0);
        let outcome = aurora_bus::store::Outcome::Acknowledge;
        let settlement = aurora_bus::store::Settlement { delivery, outcome };
        let settled = guarded.store.settle(&guarded.cursor(consumer), &[settlement]).await.expect("settled");
        assert_eq!(settled.settled, 1);
    }
    let own = ["soc-a-0".parse().expect("a valid name")].into_iter().collect();
    let reaper = Reaper::new(guarded.store.clone(), vec![guarded.spec.clone()], own, guarded.metrics.clone());
    guarded.tasks.spawn(reaper.run(guarded.stop.clone()));
    let names = until("removed consumer", PATIENCE, async || {
        let names: Vec<String> = guarded.group().await.consumers.iter().map(|c| c.name.to_string()).collect();
        Some(names).filter(|names| names.len() < 3)
    })
    .await;
    assert_eq!(names, ["busy", "soc-a-0"]);
    until("count of it", PATIENCE, async || (guarded.counter("aurora_bus_consumers_reaped_total") == 1).then_some(()))
        .await;
    assert_eq!(guarded.group().await.pending, 1);
}

/// On Redis 7.0 a read that brings nothing is no sign of life: a live consumer of a quiet stream may be removed.
async fn a_consumer_removed_while_it_waits_gets_what_comes(store: Arc<dyn Store>) {
    let guarded = Guarded::new(store, 15).await;
    let waiting = guarded.cursor("waiting");
    guarded.publish(&["first"]).await;
    let delivery = guarded.store.fetch(&waiting, 1, Duration::ZERO).await.expect("fetched").remove(0);
    let outcome = aurora_bus::store::Outcome::Acknowledge;
    let settlement = aurora_bus::store::Settlement { delivery, outcome };
    guarded.store.settle(&waiting, &[settlement]).await.expect("settled");
    let mut reads = JoinSet::new();
    let (store, cursor) = (guarded.store.clone(), waiting.clone());
    reads.spawn(async move {
        loop {
            let fetched = store.fetch(&cursor, 1, Duration::from_secs(2)).await.expect("fetched");
            if !fetched.is_empty() {
                return fetched;
            }
        }
    });
    // However often, also while the read is under way.
    let removed_at = std::time::Instant::now();
    until("removals", PATIENCE, async || {
        guarded.store.remove_consumer(&waiting).await.expect("removed or not");
        (removed_at.elapsed() > Duration::from_millis(300)).then_some(())
    })
    .await;
    guarded.publish(&["second"]).await;
    let fetched = reads.join_next().await.expect("a read").expect("no panic");
    assert_eq!(fetched[0].entry.data().map(|data| &data[..]), Some(&b"second"[..]));
    let group = guarded.group().await;
    assert_eq!((group.pending, group.consumers.len()), (1, 1));
    let outcome = aurora_bus::store::Outcome::Acknowledge;
    let settlements: Vec<_> = fetched
        .into_iter()
        .map(|delivery| aurora_bus::store::Settlement { delivery, outcome: outcome.clone() })
        .collect();
    assert_eq!(guarded.store.settle(&waiting, &settlements).await.expect("settled").settled, 1);
}

on_stores! { embedded redis valkey: [
    a_guard_hands_on_what_was_left_and_leaves_no_consumer
    consumers_that_are_gone_are_removed_and_no_others
    a_consumer_removed_while_it_waits_gets_what_comes
] }
