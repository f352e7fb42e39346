//! Workers on real stores: the outcome of each entry while sinks, workers and stores fail.
//!
//! Most cases run on both backends.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, GroupSpec, Quarantine, RetryPolicy, Worker};
use aurora_bus::event::{
    DeadLetter, DeadLetterReason, Delivery, Entry, EntryId, Fields, NewEntry, Severity, StreamName, field,
};
use aurora_bus::maintenance::{Retention, Scheduler, StreamSpec};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::sink::{Origin, Sink, SinkError, SinkErrorClass};
use aurora_bus::store::{Cursor, GroupStatus, HardLimits, MAX_APPEND, Order, Range, Start, Store};
use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::support::stores::on_stores;
use crate::support::{counted, until};

/// The longest time that a test waits for a state.
const PATIENCE: Duration = Duration::from_mins(1);

/// The default name lease: how long the name of a crashed worker stays taken.
const NAME_LEASE: Duration = Duration::from_secs(1);

/// The reaction of the sink to an entry.
#[derive(Debug, Clone, Copy)]
enum Reaction {
    Take,
    Fail(SinkErrorClass),
    /// Fails and requests a pause.
    Throttle(Duration),
    Panic,
    Hang,
    Sleep(Duration),
}

type Script = dyn Fn(u64, u32) -> Reaction + Send + Sync;

/// A sink with scripted reactions that records the entries it took.
struct TestSink {
    max_batch: usize,
    is_down: AtomicBool,
    /// The reaction, by the number of the entry and its attempt.
    script: Box<Script>,
    taken: Mutex<Vec<(u64, u32)>>,
    begun: AtomicUsize,
    largest_batch: AtomicUsize,
}

impl fmt::Debug for TestSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestSink")
    }
}

impl TestSink {
    fn new(max_batch: usize, script: impl Fn(u64, u32) -> Reaction + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            max_batch,
            is_down: AtomicBool::new(false),
            script: Box::new(script),
            taken: Mutex::default(),
            begun: AtomicUsize::new(0),
            largest_batch: AtomicUsize::new(0),
        })
    }

    fn takes_all(max_batch: usize) -> Arc<Self> {
        Self::new(max_batch, |_, _| Reaction::Take)
    }

    /// Returns the numbers and attempts of all entries taken, in order.
    fn taken(&self) -> Vec<(u64, u32)> {
        self.taken.lock().expect("unpoisoned").clone()
    }

    async fn has_taken(&self, entries: usize) -> Vec<(u64, u32)> {
        until("end of deliveries", PATIENCE, async || Some(self.taken()).filter(|taken| taken.len() >= entries)).await
    }

    async fn has_begun(&self, calls: usize) {
        until("call of the sink", PATIENCE, async || (self.begun.load(Ordering::SeqCst) >= calls).then_some(())).await;
    }
}

#[async_trait]
impl Sink for TestSink {
    fn max_batch(&self) -> usize {
        self.max_batch
    }

    async fn check(&self) -> Result<(), SinkError> {
        let down = || SinkError::new(SinkErrorClass::Transient, "connection refused");
        if self.is_down.load(Ordering::SeqCst) { Err(down()) } else { Ok(()) }
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.largest_batch.fetch_max(batch.len(), Ordering::SeqCst);
        self.check().await?;
        let mut taken = Vec::new();
        for delivery in batch {
            let number = number_of(&delivery.entry);
            match (self.script)(number, delivery.attempt) {
                Reaction::Take => {}
                Reaction::Fail(class) => return Err(SinkError::new(class, format!("no to {number}"))),
                Reaction::Throttle(time) => {
                    return Err(SinkError::new(SinkErrorClass::Transient, "HTTP 429").with_retry_after(time));
                }
                Reaction::Panic => panic!("a defect"),
                Reaction::Hang => std::future::pending().await,
                Reaction::Sleep(time) => tokio::time::sleep(time).await,
            }
            taken.push((number, delivery.attempt));
        }
        self.taken.lock().expect("unpoisoned").extend(taken);
        Ok(())
    }
}

fn number_of(entry: &Entry) -> u64 {
    entry.fields.text("number").expect("the tests' entries are numbered").parse().expect("a number")
}

/// A store, a stream of its own, and the workers on it.
struct Bus {
    store: Arc<dyn Store>,
    stream: StreamName,
    dead_letters: StreamName,
    quarantine: Quarantine,
    name_lease: Duration,
    metrics: Metrics,
    readiness: Readiness,
    workers: JoinSet<()>,
}

/// A running worker.
struct Running {
    stop: CancellationToken,
    crash: tokio::task::AbortHandle,
}

impl Bus {
    async fn new(store: Arc<dyn Store>) -> Self {
        let stream: StreamName = format!("test:{}", uuid::Uuid::new_v4().simple()).parse().expect("a valid name");
        let bus = Self {
            store,
            dead_letters: stream.default_dead_letter(),
            stream,
            quarantine: Quarantine::default(),
            name_lease: NAME_LEASE,
            metrics: Metrics::new(),
            readiness: Readiness::default(),
            workers: JoinSet::new(),
        };
        bus.store
            .ensure_group(&bus.stream, &"siem".parse().expect("a valid name"), Start::Oldest)
            .await
            .expect("the store answers");
        bus
    }

    /// Appends entries with these numbers.
    async fn publish(&self, numbers: std::ops::RangeInclusive<u64>) {
        let numbers: Vec<u64> = numbers.collect();
        for numbers in numbers.chunks(MAX_APPEND) {
            let entries = numbers.iter().map(|n| entry(*n, &[(field::DATA, "{}")])).collect();
            self.store.append(&self.stream, entries).await.expect("the store answers");
        }
    }

    fn start(&mut self, consumer: &str, sink: &Arc<TestSink>, config: GroupConfig) -> Running {
        self.start_with(consumer, Arc::<TestSink>::clone(sink), config)
    }

    fn start_with(&mut self, consumer: &str, sink: Arc<dyn Sink>, config: GroupConfig) -> Running {
        let group = GroupSpec { stream: self.stream.clone(), dead_letter: self.dead_letters.clone(), config };
        let part = self.readiness.part("worker", None);
        let consumer = consumer.parse().expect("a valid name");
        let (store, quarantine, metrics) = (self.store.clone(), self.quarantine.clone(), self.metrics.clone());
        let worker = Worker::new(store, sink, group, consumer, quarantine, metrics, part);
        let worker = worker.with_grace(Duration::from_millis(200)).with_name_lease(self.name_lease);
        let stop = CancellationToken::new();
        let crash = self.workers.spawn(worker.run(stop.clone()));
        Running { stop, crash }
    }

    /// Stops a worker and waits for its end.
    async fn stop(&mut self, running: Running) {
        running.stop.cancel();
        let end = timeout(PATIENCE, self.workers.join_next()).await.expect("the worker stops");
        end.expect("a worker").expect("no panic");
    }

    /// Ends a worker as a crash would: its tasks are dropped.
    async fn crash(&mut self, running: Running) {
        running.crash.abort();
        assert!(self.workers.join_next().await.expect("a worker").is_err());
    }

    fn cursor(&self, consumer: &str) -> Cursor {
        Cursor {
            stream: self.stream.clone(),
            group: "siem".parse().expect("a valid name"),
            consumer: consumer.parse().expect("a valid name"),
            claim_idle: Duration::from_mins(1),
            lease: None,
        }
    }

    async fn group(&self) -> GroupStatus {
        let status = self.store.describe(&self.stream).await.expect("the store answers").expect("the stream exists");
        status.groups.into_iter().next().expect("the group exists")
    }

    /// Waits until every entry is delivered and settled.
    async fn is_settled(&self) {
        until("end of pending entries", PATIENCE, async || {
            let group = self.group().await;
            (group.pending == 0 && group.lag == Some(0)).then_some(())
        })
        .await;
    }

    async fn has_dead_letters(&self, count: usize) -> Vec<DeadLetter> {
        let all = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
        until("dead letters", PATIENCE, async || {
            let entries = self.store.range(&self.dead_letters, all, 1000).await.expect("the store answers");
            let letters = entries.iter().map(|entry| DeadLetter::from_entry(entry).expect("a dead letter"));
            Some(letters.collect::<Vec<_>>()).filter(|letters| letters.len() >= count)
        })
        .await
    }

    fn counter(&self, name: &str) -> u64 {
        counted(&self.metrics, name)
    }

    async fn counts(&self, name: &str, count: u64) {
        until(&format!("{name} {count}"), PATIENCE, async || (self.counter(name) == count).then_some(())).await;
    }
}

fn entry(number: u64, fields: &[(&'static str, &'static str)]) -> NewEntry {
    let mut all: Fields = [(Bytes::from("number"), Bytes::from(number.to_string()))].into_iter().collect();
    for (name, value) in fields {
        all.push(*name, *value);
    }
    NewEntry { fields: all, idempotency: None }
}

/// A group with short retries.
fn group() -> GroupConfig {
    let retry = RetryPolicy { max_attempts: 3, base: Duration::from_millis(20), cap: Duration::from_millis(50) };
    let mut config = GroupConfig::new("siem".parse().expect("a valid name"));
    config.sink = Some("test".to_owned());
    config.retry = retry;
    config
}

/// The same group without a limit for attempts.
fn patient(mut config: GroupConfig) -> GroupConfig {
    config.retry.max_attempts = u32::MAX;
    config.max_deliveries = u32::MAX;
    config
}

/// One entry fails at least twice, and until `others` entries were taken. So these cannot wait for it.
fn fails_until_others_are_taken(number: u64, others: usize) -> impl Fn(u64, u32) -> Reaction + Send + Sync {
    let taken = AtomicUsize::new(0);
    move |entry, attempt| {
        if entry != number {
            taken.fetch_add(1, Ordering::SeqCst);
        }
        let fails = entry == number && (attempt <= 2 || taken.load(Ordering::SeqCst) < others);
        if fails { Reaction::Fail(SinkErrorClass::Transient) } else { Reaction::Take }
    }
}

fn firsts(numbers: impl IntoIterator<Item = u64>) -> Vec<(u64, u32)> {
    numbers.into_iter().map(|number| (number, 1)).collect()
}

async fn entries_are_delivered_once_and_in_order(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=2500).await;
    let sink = TestSink::takes_all(100);
    let worker = bus.start("soc-a-0", &sink, group());
    sink.has_taken(2500).await;
    bus.publish(2501..=2600).await;
    assert_eq!(sink.has_taken(2600).await, firsts(1..=2600));
    bus.is_settled().await;
    bus.counts("aurora_bus_acknowledged_total", 2600).await;
    assert!(sink.largest_batch.load(Ordering::SeqCst) <= 100);
    assert_eq!(bus.readiness.report()[0].reason, None);
    bus.stop(worker).await;
    assert_eq!(bus.group().await.consumers, [], "a worker without pending entries removes its consumer");
    assert_eq!(bus.counter("aurora_bus_in_flight{"), 0);
}

async fn transient_failure_is_retried_without_blocking_others(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=50).await;
    let sink = TestSink::new(1, fails_until_others_are_taken(7, 49));
    bus.start("soc-a-0", &sink, patient(group()));
    let mut taken = sink.has_taken(50).await;
    let (number, attempt) = taken.pop().expect("an entry");
    assert!(number == 7 && attempt >= 3, "{number} came last, at attempt {attempt}");
    assert_eq!(taken, firsts((1..=50).filter(|n| *n != 7)));
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_retries_total"), u64::from(attempt) - 1);
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
}

async fn bad_entry_of_a_batch_is_dead_lettered_alone(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=200).await;
    let fails = |number, _| if number == 77 { Reaction::Fail(SinkErrorClass::Permanent) } else { Reaction::Take };
    let sink = TestSink::new(100, fails);
    bus.start("soc-a-0", &sink, group());
    let letters = bus.has_dead_letters(1).await;
    bus.is_settled().await;
    assert_eq!(sink.taken(), firsts((1..=200).filter(|n| *n != 77)));
    let letter = &letters[0];
    assert_eq!((letter.reason, letter.attempts, letter.replays), (DeadLetterReason::Rejected, 1, 0));
    assert_eq!((&letter.stream, letter.group.as_str(), letter.error.as_str()), (&bus.stream, "siem", "no to 77"));
    assert_eq!(letter.fields, entry(77, &[(field::DATA, "{}")]).fields);
    assert_eq!(bus.has_dead_letters(1).await.len(), 1);
    bus.counts("aurora_bus_dead_letters_total", 1).await;
}

async fn entry_that_fails_too_often_is_dead_lettered(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=20).await;
    let fails = |number, _| if number % 10 == 3 { Reaction::Fail(SinkErrorClass::Transient) } else { Reaction::Take };
    let sink = TestSink::new(20, fails);
    bus.start("soc-a-0", &sink, group());
    let letters = bus.has_dead_letters(2).await;
    bus.is_settled().await;
    for letter in &letters {
        assert_eq!((letter.reason, letter.attempts), (DeadLetterReason::Exhausted, 3));
        assert!(letter.first_failure < letter.last_failure);
    }
    let mut taken: Vec<u64> = sink.taken().into_iter().map(|(number, _)| number).collect();
    taken.sort_unstable();
    assert_eq!(taken, (1..=20).filter(|n| n % 10 != 3).collect::<Vec<_>>(), "the other entries were taken, each once");
}

async fn unreadable_entry_is_dead_lettered_at_once(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    let entries = vec![entry(1, &[("payload", "{}")]), entry(2, &[(field::DATA, "{}")])];
    bus.store.append(&bus.stream, entries).await.expect("the store answers");
    let sink = TestSink::takes_all(10);
    bus.start("soc-a-0", &sink, group());
    let letters = bus.has_dead_letters(1).await;
    bus.is_settled().await;
    assert_eq!((letters[0].reason, letters[0].attempts), (DeadLetterReason::Undecodable, 1));
    assert_eq!(sink.taken(), firsts([2]));
}

async fn filtered_entries_are_acknowledged_undelivered(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    let entries = vec![
        entry(1, &[(field::DATA, "{}"), (field::SEVERITY, "low")]),
        entry(2, &[(field::DATA, "{}"), (field::SEVERITY, "critical")]),
        entry(3, &[(field::DATA, r#"{"severity":"medium"}"#)]),
        entry(4, &[(field::DATA, r#"{"severity":"high"}"#)]),
        entry(5, &[(field::DATA, r#"{"severity":"purple"}"#)]),
        entry(6, &[(field::DATA, "not json")]),
    ];
    bus.store.append(&bus.stream, entries).await.expect("the store answers");
    let sink = TestSink::takes_all(10);
    let mut config = group();
    config.min_severity = Some(Severity::High);
    bus.start("soc-a-0", &sink, config);
    assert_eq!(sink.has_taken(3).await, firsts([2, 4, 5]));
    assert_eq!(bus.has_dead_letters(1).await[0].reason, DeadLetterReason::Undecodable);
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_filtered_total"), 2);
    bus.counts("aurora_bus_acknowledged_total", 3).await;
}

async fn sink_panic_or_hang_fails_only_that_delivery(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=30).await;
    let fails = |number, attempt| match (number, attempt) {
        (5, 1) => Reaction::Panic,
        (20, 1) => Reaction::Hang,
        _ => Reaction::Take,
    };
    let sink = TestSink::new(1, fails);
    let mut config = group();
    config.handler_timeout = Duration::from_millis(100);
    bus.start("soc-a-0", &sink, config);
    let mut taken = sink.has_taken(30).await;
    bus.is_settled().await;
    taken.sort_unstable();
    let expected: Vec<_> = (1..=30).map(|n| (n, if n == 5 || n == 20 { 2 } else { 1 })).collect();
    assert_eq!(taken, expected);
}

async fn outage_of_the_sink_uses_up_no_attempts(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=20).await;
    let sink = TestSink::takes_all(5);
    sink.is_down.store(true, Ordering::SeqCst);
    bus.start("soc-a-0", &sink, group());
    let reason = until("note about the outage", PATIENCE, async || bus.readiness.report()[0].note.clone());
    let reason = reason.await;
    assert!(reason.starts_with("the sink `test` is down since 2"), "{reason}");
    assert!(reason.ends_with("Z: connection refused"), "{reason}");
    sink.is_down.store(false, Ordering::SeqCst);
    assert_eq!(sink.has_taken(20).await, firsts(1..=20));
    bus.is_settled().await;
    until("end of the note", PATIENCE, async || bus.readiness.report()[0].note.is_none().then_some(())).await;
}

async fn entries_of_a_crash_are_recovered_by_the_same_consumer(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=150).await;
    let hanging = TestSink::new(1, |number, _| if number > 3 { Reaction::Hang } else { Reaction::Take });
    let worker = bus.start("soc-a-0", &hanging, group());
    hanging.has_taken(3).await;
    until("settled entries", PATIENCE, async || (bus.counter("aurora_bus_acknowledged_total") == 3).then_some(()))
        .await;
    until("pending entries", PATIENCE, async || (bus.group().await.pending == 147).then_some(())).await;
    bus.crash(worker).await;
    let sink = TestSink::takes_all(500);
    bus.start("soc-a-0", &sink, group());
    let again: Vec<_> = (4..=150).map(|number| (number, 2)).collect();
    let mut taken = sink.has_taken(147).await;
    taken.sort_unstable();
    assert_eq!(taken, again);
    bus.is_settled().await;
}

async fn entries_of_a_crash_are_claimed_by_another_worker(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=150).await;
    let hanging = TestSink::new(1, |_, _| Reaction::Hang);
    let mut config = group();
    config.claim_idle = Duration::from_secs(1);
    let worker = bus.start("soc-a-0", &hanging, config.clone());
    until("pending entries", PATIENCE, async || (bus.group().await.pending == 150).then_some(())).await;
    bus.crash(worker).await;
    let sink = TestSink::takes_all(500);
    bus.start("soc-b-0", &sink, config);
    let mut taken = sink.has_taken(150).await;
    taken.sort_unstable();
    assert_eq!(taken, (1..=150).map(|number| (number, 2)).collect::<Vec<_>>());
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 150);
}

async fn entries_in_flight_are_not_claimed_by_others(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=5).await;
    let sink = TestSink::new(1, |_, _| Reaction::Sleep(Duration::from_secs(1)));
    let mut config = group();
    config.claim_idle = Duration::from_secs(3);
    bus.start("soc-a-0", &sink, config.clone());
    until("pending entries", PATIENCE, async || (bus.group().await.pending == 5).then_some(())).await;
    bus.start("soc-b-0", &sink, config);
    assert_eq!(sink.has_taken(5).await, firsts(1..=5));
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 0);
}

async fn entry_with_a_long_retry_is_not_claimed_early(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=3).await;
    let wait = Duration::from_secs(5);
    let fails =
        move |number, attempt| if (number, attempt) == (2, 1) { Reaction::Throttle(wait) } else { Reaction::Take };
    let sink = TestSink::new(1, fails);
    let mut config = group();
    config.claim_idle = Duration::from_secs(2);
    let began = Instant::now();
    for consumer in ["soc-a-0", "soc-b-0"] {
        bus.start(consumer, &sink, config.clone());
    }
    assert_eq!(sink.has_taken(3).await.last(), Some(&(2, 2)));
    assert!(began.elapsed() >= wait, "after {:?}", began.elapsed());
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 0);
}

async fn sampler_updates_gauges_and_stops(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=10).await;
    bus.store.fetch(&bus.cursor("soc-a-0"), 4, Duration::ZERO).await.expect("the store answers");
    let stop = CancellationToken::new();
    let absent: StreamName = format!("{}:absent", bus.stream).parse().expect("a valid name");
    let specs = [absent, bus.stream.clone()].map(|name| StreamSpec {
        name,
        retention: Retention::default(),
        groups: vec![group()],
    });
    let (store, readiness) = (bus.store.clone(), Readiness::default());
    let scheduler = Scheduler::new(store, specs.to_vec(), HardLimits::default(), bus.metrics.clone(), &readiness);
    bus.workers.spawn(scheduler.run(stop.clone()));
    bus.counts("aurora_bus_group_pending{", 4).await;
    bus.counts("aurora_bus_group_lag{", 6).await;
    bus.counts("aurora_bus_stream_length{", 10).await;
    assert!(bus.metrics.render().contains("aurora_bus_group_oldest_pending_seconds{"));
    stop.cancel();
    timeout(PATIENCE, bus.workers.join_next()).await.expect("the sampler stops");
}

async fn entry_that_crashes_every_worker_is_dead_lettered(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=2).await;
    let cursor = bus.cursor("soc-a-0");
    let id = bus.store.fetch(&cursor, 1, Duration::ZERO).await.expect("the store answers")[0].entry.id;
    for _ in 0..4 {
        assert_eq!(
            bus.store.claim(&cursor, &[id], Duration::ZERO).await.expect("the store answers").deliveries.len(),
            1
        );
    }
    let sink = TestSink::takes_all(10);
    let mut config = group();
    config.max_deliveries = 5;
    bus.start("soc-a-0", &sink, config);
    let letters = bus.has_dead_letters(1).await;
    assert_eq!((letters[0].id, letters[0].reason), (id, DeadLetterReason::Crashed));
    assert_eq!(letters[0].error, "delivered 5 times without a result");
    assert_eq!(sink.has_taken(1).await, firsts([2]));
    bus.is_settled().await;
}

async fn entries_lost_while_pending_are_counted(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=10).await;
    let fetched = bus.store.fetch(&bus.cursor("soc-a-0"), 5, Duration::ZERO).await.expect("the store answers");
    let lost: Vec<EntryId> = fetched.iter().take(2).map(|delivery| delivery.entry.id).collect();
    assert_eq!(bus.store.discard(&bus.stream, &lost).await.expect("the store answers"), 2);
    let sink = TestSink::takes_all(10);
    bus.start("soc-a-0", &sink, group());
    let mut taken: Vec<u64> = sink.has_taken(8).await.into_iter().map(|(number, _)| number).collect();
    taken.sort_unstable();
    assert_eq!(taken, (3..=10).collect::<Vec<_>>());
    bus.counts("aurora_bus_lost_total", 2).await;
    until("end of pending entries", PATIENCE, async || (bus.group().await.pending == 0).then_some(())).await;
}

async fn stopped_worker_releases_entries_it_has_not_begun(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=40).await;
    let hanging = TestSink::new(1, |number, _| if number == 5 { Reaction::Hang } else { Reaction::Take });
    let worker = bus.start("soc-a-0", &hanging, group());
    hanging.has_begun(5).await;
    bus.stop(worker).await;
    assert_eq!(hanging.taken(), firsts(1..=4));
    assert_eq!(bus.group().await.pending, 36);
    let sink = TestSink::takes_all(1);
    bus.start("soc-b-0", &sink, group());
    let attempts: BTreeMap<u64, u32> = sink.has_taken(36).await.into_iter().collect();
    let expected: BTreeMap<u64, u32> = (5..=40).map(|n| (n, if n == 5 { 2 } else { 1 })).collect();
    assert_eq!(attempts, expected);
    bus.is_settled().await;
}

async fn workers_of_a_group_share_its_entries(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    let sink = TestSink::takes_all(50);
    for n in 0..3 {
        bus.start(&format!("soc-a-{n}"), &sink, group());
    }
    bus.publish(1..=3000).await;
    let mut taken = sink.has_taken(3000).await;
    bus.is_settled().await;
    taken.sort_unstable();
    assert_eq!(taken, firsts(1..=3000));
}

async fn sink_calls_of_an_unordered_group_run_concurrently(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=20).await;
    // None of the first ten calls returns alone.
    let barrier = Arc::new(AtomicUsize::new(0));
    let sink = TestSink::new(1, move |number, attempt| {
        let is_first = number <= 10 && attempt == 1;
        if is_first && barrier.fetch_add(1, Ordering::SeqCst) < 9 { Reaction::Hang } else { Reaction::Take }
    });
    let mut config = group();
    config.concurrency = 10;
    config.breaker.failures = 20;
    config.handler_timeout = Duration::from_millis(500);
    bus.start("soc-a-0", &sink, config);
    let taken = sink.has_taken(20).await;
    assert_eq!(taken.iter().filter(|(_, attempt)| *attempt == 2).count(), 9);
    assert_eq!(taken.last().map(|(_, attempt)| *attempt), Some(2), "the other entries did not wait");
    bus.is_settled().await;
}

on_stores! { embedded redis: [
    entries_are_delivered_once_and_in_order
    transient_failure_is_retried_without_blocking_others
    bad_entry_of_a_batch_is_dead_lettered_alone
    entry_that_fails_too_often_is_dead_lettered
    unreadable_entry_is_dead_lettered_at_once
    filtered_entries_are_acknowledged_undelivered
    sink_panic_or_hang_fails_only_that_delivery
    outage_of_the_sink_uses_up_no_attempts
    entries_of_a_crash_are_recovered_by_the_same_consumer
    entries_of_a_crash_are_claimed_by_another_worker
    entries_in_flight_are_not_claimed_by_others
    entry_with_a_long_retry_is_not_claimed_early
    sampler_updates_gauges_and_stops
    entry_that_crashes_every_worker_is_dead_lettered
    entries_lost_while_pending_are_counted
    stopped_worker_releases_entries_it_has_not_begun
    workers_of_a_group_share_its_entries
    sink_calls_of_an_unordered_group_run_concurrently
] }

mod names;
mod ordering;
mod outage;
mod server;
