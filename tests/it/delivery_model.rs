//! Random histories of delivery, with one invariant: every event is accounted for.
//!
//! A history publishes, starts, stops and crashes workers, takes the sink down, trims, and removes pending entries. The
//! number of an event decides how the sink reacts. In the end each event was handled, is a dead letter, or was removed
//! and counted as lost. No entry is pending, and no event has two dead letters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, GroupSpec, Quarantine, RetryPolicy, Worker};
use aurora_bus::event::{DeadLetter, DeadLetterReason, Delivery, EntryId, StreamName};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::sink::{Origin, Sink, SinkError, SinkErrorClass};
use aurora_bus::store::{Cursor, Order, Range, Start, Store, Trim, embedded, redis};
use bytesize::ByteSize;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{new_entry, unique_stream};
use crate::support::counted;
use crate::support::redis::{Product, RedisServer};

const CONSUMERS: [&str; 3] = ["a", "b", "c"];
/// The period of the fates by number. The first one is fine.
const FATES: u64 = 23;
/// How long a history may take to settle all entries.
const REST: Duration = Duration::from_mins(1);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

#[derive(Debug, Clone)]
enum Action {
    Publish(u64),
    Start(usize),
    Crash(usize),
    Stop(usize),
    Outage(bool),
    Trim(u64),
    /// Another client removes pending entries.
    Remove(Vec<Index>),
    /// Workers work for this many milliseconds.
    Pass(u64),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let consumer = 0..CONSUMERS.len();
    let one = prop_oneof![
        4 => (1_u64..60).prop_map(Action::Publish),
        4 => consumer.clone().prop_map(Action::Start),
        3 => consumer.clone().prop_map(Action::Crash),
        1 => consumer.prop_map(Action::Stop),
        1 => any::<bool>().prop_map(Action::Outage),
        2 => (0_u64..40).prop_map(Action::Trim),
        2 => vec(any::<Index>(), 1..6).prop_map(Action::Remove),
        4 => (1_u64..60).prop_map(Action::Pass),
    ];
    vec(one, 4..30)
}

/// The reaction of the sink to an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Fine,
    FailsTwice,
    Refused,
    AlwaysFails,
    PanicsOnce,
    HangsOnce,
    Slow,
}

fn fate(number: u64) -> Fate {
    match number % FATES {
        3 | 13 => Fate::FailsTwice,
        5 => Fate::Refused,
        7 => Fate::AlwaysFails,
        11 => Fate::PanicsOnce,
        17 => Fate::HangsOnce,
        2 | 12 | 22 => Fate::Slow,
        _ => Fate::Fine,
    }
}

#[derive(Debug, Default)]
struct FateSink {
    is_down: AtomicBool,
    seen: Mutex<BTreeMap<u64, u32>>,
    begun: Mutex<BTreeSet<u64>>,
}

#[async_trait]
impl Sink for FateSink {
    fn max_batch(&self) -> usize {
        7
    }

    async fn check(&self) -> Result<(), SinkError> {
        let is_down = self.is_down.load(Ordering::SeqCst);
        if is_down { Err(SinkError::new(SinkErrorClass::Transient, "away")) } else { Ok(()) }
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        self.check().await?;
        let mut taken = Vec::new();
        for delivery in batch {
            let number = number_of(delivery.entry.fields.text("data"));
            let is_first = self.begun.lock().expect("unpoisoned").insert(number);
            match fate(number) {
                Fate::Slow => tokio::time::sleep(Duration::from_millis(2)).await,
                Fate::FailsTwice if delivery.attempt > 2 => {}
                Fate::FailsTwice | Fate::AlwaysFails => {
                    return Err(SinkError::new(SinkErrorClass::Transient, "not now"));
                }
                Fate::Refused => return Err(SinkError::new(SinkErrorClass::Permanent, "never")),
                Fate::PanicsOnce if is_first => panic!("a defect"),
                Fate::HangsOnce if is_first => std::future::pending().await,
                Fate::Fine | Fate::PanicsOnce | Fate::HangsOnce => {}
            }
            taken.push(number);
        }
        let mut seen = self.seen.lock().expect("unpoisoned");
        for number in taken {
            *seen.entry(number).or_default() += 1;
        }
        Ok(())
    }
}

fn number_of(data: Option<&str>) -> u64 {
    data.and_then(|data| data.parse().ok()).expect("the events of the test are numbers")
}

/// One history on a stream of its own.
struct History {
    store: Arc<dyn Store>,
    stream: StreamName,
    sink: Arc<FateSink>,
    quarantine: Quarantine,
    metrics: Metrics,
    published: u64,
    removed: BTreeSet<EntryId>,
    numbers: BTreeMap<EntryId, u64>,
    workers: JoinSet<()>,
    running: [Option<(CancellationToken, AbortHandle)>; CONSUMERS.len()],
    has_crashed: bool,
}

impl History {
    async fn new(store: Arc<dyn Store>) -> Self {
        let stream = unique_stream();
        let history = Self {
            store,
            stream,
            sink: Arc::default(),
            quarantine: Quarantine::default(),
            metrics: Metrics::new(),
            published: 0,
            removed: BTreeSet::new(),
            numbers: BTreeMap::new(),
            workers: JoinSet::new(),
            running: Default::default(),
            has_crashed: false,
        };
        let cursor = history.cursor();
        history.store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await.expect("a group");
        history
    }

    fn cursor(&self) -> Cursor {
        let (group, consumer) = ("g".parse().expect("a valid name"), "auditor".parse().expect("a valid name"));
        Cursor { stream: self.stream.clone(), group, consumer, claim_idle: Duration::from_millis(400), lease: None }
    }

    async fn perform(&mut self, action: &Action) {
        match action {
            Action::Publish(count) => {
                let numbers: Vec<u64> = (self.published..self.published + count).collect();
                self.published += count;
                let entries = numbers.iter().map(|number| new_entry(&number.to_string())).collect();
                let appended = self.store.append(&self.stream, entries).await.expect("appended");
                self.numbers.extend(appended.into_iter().map(|one| one.id).zip(numbers));
            }
            Action::Start(place) => self.start(*place),
            Action::Crash(place) => {
                if let Some((_, crash)) = self.running[*place].take() {
                    self.has_crashed = true;
                    crash.abort();
                    self.ended().await;
                }
            }
            Action::Stop(place) => {
                if let Some((stop, _)) = self.running[*place].take() {
                    stop.cancel();
                    self.ended().await;
                }
            }
            Action::Outage(is_down) => self.sink.is_down.store(*is_down, Ordering::SeqCst),
            Action::Trim(length) => {
                self.store.trim(&self.stream, Trim::ToLength(*length)).await.expect("trimmed");
            }
            Action::Remove(picks) => {
                let pending = self.store.pending(&self.cursor(), false, EntryId::MIN, 100).await.expect("listed");
                let picked: Vec<EntryId> =
                    picks.iter().filter(|_| !pending.is_empty()).map(|pick| pick.get(&pending).id).collect();
                self.store.discard(&self.stream, &picked).await.expect("discarded");
                self.removed.extend(picked);
            }
            Action::Pass(ms) => tokio::time::sleep(Duration::from_millis(*ms)).await,
        }
    }

    fn start(&mut self, place: usize) {
        if self.running[place].is_some() {
            return;
        }
        let mut config = GroupConfig::new(self.cursor().group);
        config.sink = Some("fickle".to_owned());
        config.retry = RetryPolicy { max_attempts: 4, base: Duration::from_millis(5), cap: Duration::from_millis(20) };
        config.max_deliveries = 12;
        config.claim_idle = self.cursor().claim_idle;
        config.handler_timeout = Duration::from_millis(100);
        config.batch = 20;
        config.concurrency = 1 + place;
        let dead_letter = self.stream.default_dead_letter();
        let spec = GroupSpec { stream: self.stream.clone(), dead_letter, config };
        let part = Readiness::default().part("worker", None);
        let consumer = CONSUMERS[place].parse().expect("a valid name");
        let (store, sink, metrics) = (self.store.clone(), self.sink.clone(), self.metrics.clone());
        let worker = Worker::new(store, sink, spec, consumer, self.quarantine.clone(), metrics, part);
        let worker = worker.with_grace(Duration::from_millis(50));
        let stop = CancellationToken::new();
        let crash = self.workers.spawn(worker.run(stop.clone()));
        self.running[place] = Some((stop, crash));
    }

    /// Waits until a worker has ended.
    async fn ended(&mut self) {
        let ended = tokio::time::timeout(REST, self.workers.join_next()).await.expect("it ends");
        assert!(ended.expect("a worker").is_ok_and(|()| true) || self.has_crashed, "a worker panicked");
    }

    /// Waits until all entries are settled, then stops the workers.
    async fn rest(&mut self) {
        self.sink.is_down.store(false, Ordering::SeqCst);
        self.start(0);
        // An entry that always fails is given up only after the sink has taken another one. So publishing goes on.
        let deadline = Instant::now() + REST;
        loop {
            let status = self.store.describe(&self.stream).await.expect("described").expect("it exists");
            let group = &status.groups[0];
            if group.pending == 0 && group.last_delivered >= status.last_id {
                break;
            }
            assert!(Instant::now() < deadline, "entries are not settled within {REST:?}: {group:?}");
            self.published = self.published.next_multiple_of(FATES);
            self.perform(&Action::Publish(1)).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for running in self.running.iter_mut().filter_map(Option::take) {
            running.0.cancel();
        }
        while self.workers.join_next().await.is_some() {}
    }

    /// Checks the invariant.
    async fn check(&self) -> Result<(), TestCaseError> {
        let entries = self.store.range(&self.stream.default_dead_letter(), EVERYTHING, 100_000).await.expect("read");
        let letters: Vec<DeadLetter> =
            entries.iter().map(|entry| DeadLetter::from_entry(entry).expect("a dead letter")).collect();
        let dead: BTreeMap<EntryId, DeadLetterReason> =
            letters.iter().map(|letter| (letter.id, letter.reason)).collect();
        prop_assert_eq!(dead.len(), letters.len(), "a dead letter was written twice");
        let seen = self.sink.seen.lock().expect("unpoisoned");
        let mut lost = 0;
        for (id, number) in &self.numbers {
            let (is_seen, reason) = (seen.contains_key(number), dead.get(id));
            match fate(*number) {
                Fate::Refused | Fate::AlwaysFails => prop_assert!(!is_seen, "{number} must not be handled"),
                // A handled event may become a dead letter only if a worker crashed before its ack.
                _ if is_seen => {
                    prop_assert!(reason.is_none() || self.has_crashed, "{number} is a dead letter: {reason:?}")
                }
                _ => {}
            }
            if !is_seen && reason.is_none() {
                prop_assert!(self.removed.contains(id), "{number} ({id}) has vanished");
                lost += 1;
            }
        }
        let sum = |name| counted(&self.metrics, name);
        let counted = (sum("aurora_bus_lost_total{"), sum("aurora_bus_dead_letters_total{"));
        if self.has_crashed {
            // A process may crash between a reply and its counter.
            prop_assert!(counted.1 <= letters.len() as u64, "{counted:?} of {} dead", letters.len());
        } else {
            prop_assert!(counted.0 >= lost, "{lost} are lost, {} were counted", counted.0);
            prop_assert_eq!(counted.1, letters.len() as u64, "dead letters and their count");
        }
        Ok(())
    }
}

fn check(store: impl AsyncFn() -> Arc<dyn Store>, cases: u32) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let store = runtime.block_on(store());
    let config = Config { cases, max_shrink_iters: 40, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&actions(), |actions| {
        runtime.block_on(async {
            let mut history = History::new(store.clone()).await;
            for action in &actions {
                history.perform(action).await;
            }
            history.rest().await;
            history.check().await
        })
    });
    runtime.block_on(store.close());
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn all_events_are_accounted_for_on_the_embedded_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = embedded::Config {
        path: folder.path().to_owned(),
        reserve: ByteSize::kib(64),
        recent: ByteSize::kib(40),
        ..embedded::Config::default()
    };
    check(async || Arc::new(config.clone().open().await.expect("opened")) as Arc<dyn Store>, 16);
}

/// Runs fewer histories: the model test of the store shows that both stores behave alike.
fn check_on_redis(product: Product) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = runtime.block_on(RedisServer::start(product, &[]));
    let config = redis::Config { url: server.url().into(), ..redis::Config::default() };
    check(async || Arc::new(config.clone().connect().await.expect("a valid configuration")) as Arc<dyn Store>, 8);
}

#[test]
fn all_events_are_accounted_for_on_redis() {
    check_on_redis(Product::Redis);
}

#[test]
fn all_events_are_accounted_for_on_valkey() {
    check_on_redis(Product::Valkey);
}
