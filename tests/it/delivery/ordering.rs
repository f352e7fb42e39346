//! Ordered groups keep their order while sinks fail and workers change.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, OnPoison, Ordering, RetryPolicy};
use aurora_bus::event::{DeadLetterReason, Delivery, field};
use aurora_bus::sink::{Origin, Sink, SinkError, SinkErrorClass};
use aurora_bus::store::Store;

use super::{
    Bus, PATIENCE, Reaction, Running, TestSink, entry, fails_until_others_are_taken, firsts, group, number_of, patient,
};
use crate::support::stores::on_stores;
use crate::support::{random_below, until};

on_stores! { embedded redis: [
    failed_entry_blocks_only_its_key
    failed_entry_without_a_key_blocks_no_other
    failed_entry_blocks_its_stream_until_it_is_taken
    entry_that_is_given_up_unblocks_its_stream
    halted_group_reports_its_entry_and_continues_on_restart
    ordered_group_has_one_worker_at_a_time
    next_worker_starts_with_the_entries_of_a_crash
    order_by_key_survives_failures
    order_by_stream_survives_failures
] }

fn in_order(ordering: Ordering) -> GroupConfig {
    let mut config = group();
    config.ordering = ordering;
    if ordering == Ordering::Key {
        config.order_by = Some("source".to_owned().try_into().expect("a field"));
        config.concurrency = 4;
    }
    config
}

/// The same with a short group lease, so that the group of a crashed worker is free soon.
fn soon_free(ordering: Ordering) -> GroupConfig {
    let mut config = in_order(ordering);
    config.claim_idle = Duration::from_secs(1);
    config.handler_timeout = Duration::from_millis(900);
    config
}

/// Returns the ordering key of an entry. Every seventh entry has none.
fn key_of(number: u64) -> Option<&'static str> {
    let keys = ["zeek", "suricata", "wazuh", "falco"];
    (!number.is_multiple_of(7)).then(|| keys[usize::try_from(number % 4).expect("small")])
}

impl Bus {
    async fn publish_keyed(&self, numbers: std::ops::RangeInclusive<u64>) {
        let keyed = |number| match key_of(number) {
            Some(key) => entry(number, &[(field::DATA, "{}"), (field::SOURCE, key)]),
            None => entry(number, &[(field::DATA, "{}")]),
        };
        let numbers: Vec<u64> = numbers.collect();
        for numbers in numbers.chunks(100) {
            self.store.append(&self.stream, numbers.iter().copied().map(keyed).collect()).await.expect("appended");
        }
    }

    fn reason(&self) -> Option<String> {
        self.readiness.report()[0].reason.clone()
    }
}

pub(super) async fn failed_entry_blocks_only_its_key(store: Arc<dyn Store>) {
    const PAUSE: Duration = Duration::from_millis(500);
    let mut bus = Bus::new(store).await;
    bus.publish_keyed(1..=60).await;
    let fails = |number, attempt| if (number, attempt) == (5, 1) { Reaction::Throttle(PAUSE) } else { Reaction::Take };
    for max_batch in [1, 10] {
        let sink = TestSink::new(max_batch, fails);
        let worker = bus.start("soc-a-0", &sink, in_order(Ordering::Key));
        let taken = sink.has_taken(60).await;
        bus.is_settled().await;
        let place = |number| taken.iter().position(|(n, _)| *n == number).expect("taken");
        let held = |number: u64| number >= 5 && key_of(number) == key_of(5);
        for number in (6..=60).filter(|n| !held(*n)) {
            assert!(place(number) < place(5), "{number} did not wait: {taken:?}");
        }
        let same_key: Vec<_> = taken.iter().copied().filter(|(number, _)| held(*number)).collect();
        let expected: Vec<_> = (5..=60).filter(|n| held(*n)).map(|n| (n, if n == 5 { 2 } else { 1 })).collect();
        assert_eq!(same_key, expected);
        assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
        bus.stop(worker).await;
        bus = Bus::new(bus.store.clone()).await;
        bus.publish_keyed(1..=60).await;
    }
}

pub(super) async fn failed_entry_without_a_key_blocks_no_other(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=30).await;
    let sink = TestSink::new(1, fails_until_others_are_taken(7, 29));
    bus.start("soc-a-0", &sink, patient(in_order(Ordering::Key)));
    let taken = sink.has_taken(30).await;
    assert!(matches!(taken.last(), Some((7, 3..))), "the other entries went first: {taken:?}");
    bus.is_settled().await;
}

pub(super) async fn failed_entry_blocks_its_stream_until_it_is_taken(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=50).await;
    let fails = |number, attempt| match (number, attempt) {
        (7, 1..=2) | (30, 1) => Reaction::Fail(SinkErrorClass::Transient),
        (20, 1) => Reaction::Panic,
        _ => Reaction::Take,
    };
    let sink = TestSink::new(8, fails);
    bus.start("soc-a-0", &sink, in_order(Ordering::Stream));
    let mut first = BTreeSet::new();
    let taken = sink.has_taken(50).await;
    let order: Vec<u64> = taken.iter().map(|(number, _)| *number).filter(|number| first.insert(*number)).collect();
    assert_eq!(order, (1..=50).collect::<Vec<_>>());
    assert!(taken.contains(&(7, 3)), "{taken:?}");
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
}

pub(super) async fn entry_that_is_given_up_unblocks_its_stream(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=20).await;
    let fails = |number, _| match number {
        7 => Reaction::Fail(SinkErrorClass::Transient),
        9 => Reaction::Fail(SinkErrorClass::Permanent),
        _ => Reaction::Take,
    };
    let sink = TestSink::new(1, fails);
    bus.start("soc-a-0", &sink, in_order(Ordering::Stream));
    assert_eq!(sink.has_taken(18).await, firsts((1..=20).filter(|n| ![7, 9].contains(n))));
    let reasons: Vec<_> = bus.has_dead_letters(2).await.iter().map(|letter| (letter.reason, letter.attempts)).collect();
    assert_eq!(reasons, [(DeadLetterReason::Exhausted, 3), (DeadLetterReason::Rejected, 1)]);
    bus.is_settled().await;
}

pub(super) async fn halted_group_reports_its_entry_and_continues_on_restart(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=9).await;
    let unreadable = entry(10, &[("payload", "{}")]);
    let id = bus.store.append(&bus.stream, vec![unreadable]).await.expect("appended")[0].id;
    bus.publish(11..=15).await;
    let refuses = |number, _| if number == 5 { Reaction::Fail(SinkErrorClass::Permanent) } else { Reaction::Take };
    let sink = TestSink::new(4, refuses);
    let mut config = in_order(Ordering::Stream);
    config.on_poison = OnPoison::Halt;
    let worker = bus.start("soc-a-0", &sink, config.clone());
    let reason =
        until("reason of the halt", PATIENCE, async || bus.reason().filter(|text| text.contains("stopped"))).await;
    assert!(reason.contains("no to 5") && reason.contains("restart with on_poison"), "{reason}");
    assert_eq!(sink.taken(), firsts(1..=4));
    bus.stop(worker).await;
    assert_eq!(bus.group().await.pending, 11);

    // After the repair it goes on up to the unreadable entry.
    let sink = TestSink::takes_all(4);
    let worker = bus.start("soc-b-0", &sink, config.clone());
    let stopped_at = format!("stopped at entry {id}");
    until("reason of the halt", PATIENCE, async || bus.reason().filter(|text| text.contains(&stopped_at))).await;
    assert_eq!(sink.taken().iter().map(|(number, _)| *number).collect::<Vec<_>>(), [5, 6, 7, 8, 9]);
    bus.stop(worker).await;
    config.on_poison = OnPoison::DeadLetter;
    bus.start("soc-b-0", &sink, config);
    assert_eq!(bus.has_dead_letters(1).await[0].reason, DeadLetterReason::Undecodable);
    sink.has_taken(10).await;
    bus.is_settled().await;
    assert_eq!(sink.taken().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [5, 6, 7, 8, 9, 11, 12, 13, 14, 15]);
}

pub(super) async fn ordered_group_has_one_worker_at_a_time(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    let sinks = [TestSink::takes_all(1), TestSink::takes_all(1)];
    let first = bus.start("soc-a-0", &sinks[0], in_order(Ordering::Stream));
    bus.publish(1..=10).await;
    sinks[0].has_taken(10).await;
    bus.start("soc-b-0", &sinks[1], in_order(Ordering::Stream));
    until("note about waiting", PATIENCE, async || {
        let report = bus.readiness.report().remove(0);
        (report.note.as_deref() == Some("waiting: soc-a-0 works") && report.reason.is_none()).then_some(())
    })
    .await;
    bus.publish(11..=20).await;
    assert_eq!(sinks[0].has_taken(20).await, firsts(1..=20));
    let stopped = Instant::now();
    bus.stop(first).await;
    bus.publish(21..=30).await;
    assert_eq!(sinks[1].has_taken(10).await, firsts(21..=30));
    assert!(stopped.elapsed() < Duration::from_secs(3), "a released group lease is free soon: {:?}", stopped.elapsed());
    bus.is_settled().await;
}

pub(super) async fn next_worker_starts_with_the_entries_of_a_crash(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=40).await;
    let hanging = TestSink::new(1, |number, _| if number > 3 { Reaction::Hang } else { Reaction::Take });
    let worker = bus.start("soc-a-0", &hanging, soon_free(Ordering::Stream));
    hanging.has_begun(4).await;
    until("pending entries", PATIENCE, async || (bus.group().await.pending == 37).then_some(())).await;
    let sink = TestSink::takes_all(1);
    bus.start("soc-b-0", &sink, soon_free(Ordering::Stream));
    bus.crash(worker).await;
    bus.publish(41..=60).await;
    let crashed = Instant::now();
    let taken = sink.has_taken(57).await;
    assert!(crashed.elapsed() < Duration::from_secs(5), "after {:?}", crashed.elapsed());
    assert_eq!(taken, (4..=60).map(|n| (n, if n <= 40 { 2 } else { 1 })).collect::<Vec<_>>());
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_claimed_total"), 37);
}

/// The observations of a sink, over all workers.
#[derive(Debug, Default)]
struct Observed {
    with_sink: BTreeMap<String, usize>,
    /// Keys with two entries at the sink at the same time.
    overlaps: Vec<String>,
    /// The entries of each key, in the order of their first success.
    firsts: BTreeMap<String, Vec<u64>>,
    succeeded: BTreeSet<u64>,
}

/// A sink that fails by chance and observes the order.
struct ObservingSink {
    seed: u64,
    has_one_key: bool,
    seen: Arc<Mutex<Observed>>,
}

impl fmt::Debug for ObservingSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ObservingSink")
    }
}

/// Records that these keys are with the sink while it exists.
struct WithSink {
    seen: Arc<Mutex<Observed>>,
    keys: BTreeSet<String>,
}

impl WithSink {
    fn new(seen: &Arc<Mutex<Observed>>, keys: BTreeSet<String>) -> Self {
        let mut now = seen.lock().expect("unpoisoned");
        for key in &keys {
            let count = now.with_sink.entry(key.clone()).or_default();
            *count += 1;
            if *count > 1 {
                now.overlaps.push(key.clone());
            }
        }
        Self { seen: seen.clone(), keys }
    }
}

impl Drop for WithSink {
    fn drop(&mut self) {
        let mut now = self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for key in &self.keys {
            *now.with_sink.entry(key.clone()).or_default() -= 1;
        }
    }
}

impl ObservingSink {
    /// Returns the ordering key of an entry, if it has one.
    fn key(&self, number: u64) -> Option<String> {
        if self.has_one_key { Some("all".to_owned()) } else { key_of(number).map(str::to_owned) }
    }

    /// Returns a number below 100 that is the same for each repetition of a delivery.
    fn chance(&self, number: u64, attempt: u32) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.seed, number, attempt).hash(&mut hasher);
        hasher.finish() % 100
    }
}

#[async_trait]
impl Sink for ObservingSink {
    fn max_batch(&self) -> usize {
        5
    }

    async fn check(&self) -> Result<(), SinkError> {
        Ok(())
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let numbers: Vec<u64> = batch.iter().map(|delivery| number_of(&delivery.entry)).collect();
        let keys = numbers.iter().filter_map(|number| self.key(*number)).collect();
        let _with_sink = WithSink::new(&self.seen, keys);
        tokio::time::sleep(Duration::from_millis(1 + numbers[0] % 3)).await;
        for (delivery, number) in batch.iter().zip(&numbers) {
            match self.chance(*number, delivery.attempt) {
                0..=9 => return Err(SinkError::new(SinkErrorClass::Transient, "not now")),
                10..=12 => return Err(SinkError::new(SinkErrorClass::Permanent, "never")),
                13 => panic!("a defect"),
                14 => std::future::pending::<()>().await,
                _ => {}
            }
        }
        let mut seen = self.seen.lock().expect("unpoisoned");
        for number in numbers {
            if seen.succeeded.insert(number)
                && let Some(key) = self.key(number)
            {
                seen.firsts.entry(key).or_default().push(number);
            }
        }
        Ok(())
    }
}

pub(super) async fn order_by_key_survives_failures(store: Arc<dyn Store>) {
    order_survives_failures(store, Ordering::Key).await;
}

pub(super) async fn order_by_stream_survives_failures(store: Arc<dyn Store>) {
    order_survives_failures(store, Ordering::Stream).await;
}

/// Starts, stops and crashes two workers by chance, with a sink that fails by chance.
///
/// The entries of each key must succeed first in the order of the stream, and one at a time may be with the sink.
async fn order_survives_failures(store: Arc<dyn Store>, ordering: Ordering) {
    const ENTRIES: u64 = 400;
    let seed = random_below(u64::MAX);
    let case = format!("{ordering:?}, seed {seed}");
    let mut bus = Bus::new(store).await;
    let seen = Arc::new(Mutex::new(Observed::default()));
    let sink: Arc<dyn Sink> =
        Arc::new(ObservingSink { seed, has_one_key: ordering == Ordering::Stream, seen: seen.clone() });
    let mut config = soon_free(ordering);
    config.handler_timeout = Duration::from_millis(100);
    config.max_in_flight = 60;
    config.retry = RetryPolicy { max_attempts: 12, base: Duration::from_millis(5), cap: Duration::from_millis(50) };
    config.max_deliveries = 100;
    let mut workers: [Option<Running>; 2] = [None, None];
    for pass in 0..10 {
        let from = pass * ENTRIES / 10;
        bus.publish_keyed(from + 1..=from + ENTRIES / 10).await;
        let n = usize::try_from(random_below(2)).expect("small");
        let name = ["soc-a-0", "soc-b-0"][n];
        match workers[n].take() {
            None => workers[n] = Some(bus.start_with(name, sink.clone(), config.clone())),
            Some(worker) if random_below(2) == 0 => bus.stop(worker).await,
            Some(worker) => bus.crash(worker).await,
        }
        tokio::time::sleep(Duration::from_millis(random_below(400))).await;
    }
    for (n, name) in ["soc-a-0", "soc-b-0"].into_iter().enumerate() {
        if workers[n].is_none() {
            bus.start_with(name, sink.clone(), config.clone());
        }
    }
    until(&format!("end of pending entries, {case}"), PATIENCE, async || {
        let group = bus.group().await;
        (group.pending == 0 && group.lag == Some(0)).then_some(())
    })
    .await;
    let dead: BTreeSet<u64> = bus
        .has_dead_letters(0)
        .await
        .iter()
        .map(|letter| letter.fields.text("number").expect("numbered").parse().expect("a number"))
        .collect();
    let seen = seen.lock().expect("unpoisoned");
    assert_eq!(seen.overlaps, [""; 0], "{case}");
    for (key, numbers) in &seen.firsts {
        assert!(numbers.is_sorted(), "{case}, key {key}: {numbers:?}");
    }
    let all: BTreeSet<u64> = seen.succeeded.union(&dead).copied().collect();
    assert_eq!(all, (1..=ENTRIES).collect(), "{case}");
    assert!(dead.len() < 100, "{case}");
}
