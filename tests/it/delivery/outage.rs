//! Outages of a sink: no entry is lost or given up, and no attempts are used up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aurora_bus::delivery::{BreakerPolicy, GroupConfig};
use aurora_bus::event::DeadLetterReason;
use aurora_bus::sink::SinkErrorClass;
use aurora_bus::store::Store;

use super::{Bus, PATIENCE, Reaction, TestSink, firsts, group};
use crate::support::stores::on_stores;
use crate::support::until;

/// A group with three attempts that pauses soon and probes often.
fn cautious() -> GroupConfig {
    let mut config = group();
    config.claim_idle = Duration::from_secs(1);
    config.handler_timeout = Duration::from_millis(900);
    let (pause, max_pause) = (Duration::from_millis(20), Duration::from_millis(100));
    config.breaker = BreakerPolicy { failures: 5, pause, max_pause };
    config
}

/// A sink whose check succeeds, but that takes no entry while it is down.
fn overloaded(max_batch: usize) -> (Arc<TestSink>, Arc<AtomicBool>) {
    let is_down = Arc::new(AtomicBool::new(true));
    let seen = is_down.clone();
    let fails = move |_, _| {
        if seen.load(Ordering::SeqCst) { Reaction::Fail(SinkErrorClass::Transient) } else { Reaction::Take }
    };
    (TestSink::new(max_batch, fails), is_down)
}

async fn has_note(bus: &Bus) -> String {
    until("note about the outage", PATIENCE, async || bus.readiness.report()[0].note.clone()).await
}

async fn outage_longer_than_all_attempts_gives_up_no_entry(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=200).await;
    let (sink, is_down) = overloaded(1);
    // So that each worker has some entries, and a slow machine causes no claims.
    let config = GroupConfig { max_in_flight: 100, claim_idle: Duration::from_secs(3), ..cautious() };
    for consumer in ["soc-a-0", "soc-b-0"] {
        bus.start(consumer, &sink, config.clone());
    }
    bus.counts("aurora_bus_breaker_open{", 2).await;
    assert!(has_note(&bus).await.starts_with("the sink `test` is down since 2"));
    assert_eq!(bus.readiness.report()[0].reason, None, "the daemon stays in service");
    // Long enough for a worker to claim entries that the other one did not extend.
    let began = Instant::now();
    until("end of the outage", PATIENCE, async || (began.elapsed() > Duration::from_secs(6)).then_some(())).await;
    let pending_before = bus.group().await.pending;
    is_down.store(false, Ordering::SeqCst);
    let mut taken = sink.has_taken(200).await;
    bus.is_settled().await;
    taken.sort_unstable();
    assert_eq!(taken.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (1..=200).collect::<Vec<_>>());
    let again: Vec<_> = taken.iter().filter(|(_, attempt)| *attempt > 1).collect();
    assert!(again.len() <= 12 && again.iter().all(|(_, attempt)| *attempt <= 3), "{again:?} of {pending_before}");
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
    bus.counts("aurora_bus_breaker_open{", 0).await;
    assert_eq!(bus.counter("aurora_bus_breaker_opened_total"), 2);
    until("end of the note", PATIENCE, async || bus.readiness.report()[0].note.is_none().then_some(())).await;
}

async fn only_entry_of_an_outage_is_not_given_up(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=1).await;
    let (sink, is_down) = overloaded(10);
    bus.start("soc-a-0", &sink, cautious());
    sink.has_begun(20).await;
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
    is_down.store(false, Ordering::SeqCst);
    let taken = sink.has_taken(1).await;
    assert!(taken[0].1 <= 3, "{taken:?}");
    bus.is_settled().await;
}

async fn poison_entry_in_an_outage_does_not_block_retries(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=2).await;
    // The sink has taken no entry when the first one is exhausted, so it counts as down. No new entry shows the contrary.
    let fails = |number, attempt| match (number, attempt) {
        (1, _) => Reaction::Fail(SinkErrorClass::Transient),
        (_, 1) => Reaction::Throttle(Duration::from_secs(1)),
        _ => Reaction::Take,
    };
    let sink = TestSink::new(1, fails);
    bus.start("soc-a-0", &sink, cautious());
    assert_eq!(sink.has_taken(1).await, [(2, 2)]);
    assert_eq!(bus.has_dead_letters(1).await[0].fields, super::entry(1, &[("data", "{}")]).fields);
    assert_eq!(bus.counter("aurora_bus_breaker_opened_total"), 1);
    bus.is_settled().await;
}

async fn repeated_outages_lose_no_entry(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    let (sink, is_down) = overloaded(7);
    is_down.store(false, Ordering::SeqCst);
    let mut config = cautious();
    config.concurrency = 4;
    bus.start("soc-a-0", &sink, config);
    bus.publish(1..=100).await;
    sink.has_taken(100).await;
    for outage in 1..=3 {
        is_down.store(true, Ordering::SeqCst);
        bus.publish(outage * 100 + 1..=outage * 100 + 100).await;
        bus.counts("aurora_bus_breaker_opened_total", outage).await;
        let calls = sink.begun.load(Ordering::SeqCst);
        sink.has_begun(calls + 6).await;
        is_down.store(false, Ordering::SeqCst);
        let entries = usize::try_from(outage * 100 + 100).expect("few");
        sink.has_taken(entries).await;
        bus.is_settled().await;
    }
    let mut numbers: Vec<u64> = sink.taken().into_iter().map(|(number, _)| number).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=400).collect::<Vec<_>>());
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
}

async fn poison_entry_among_good_ones_causes_no_outage(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=50).await;
    let fails = |number, _| if number == 7 { Reaction::Fail(SinkErrorClass::Transient) } else { Reaction::Take };
    let sink = TestSink::new(1, fails);
    bus.start("soc-a-0", &sink, cautious());
    let letters = bus.has_dead_letters(1).await;
    assert_eq!((letters[0].reason, letters[0].attempts), (DeadLetterReason::Exhausted, 3));
    bus.is_settled().await;
    assert_eq!(sink.taken(), firsts((1..=50).filter(|n| *n != 7)));
    assert_eq!(bus.counter("aurora_bus_breaker_opened_total"), 0);
}

async fn poison_entry_that_causes_an_outage_blocks_no_later_ones(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=1).await;
    let fails = |number, _| if number == 1 { Reaction::Fail(SinkErrorClass::Transient) } else { Reaction::Take };
    let sink = TestSink::new(1, fails);
    bus.start("soc-a-0", &sink, cautious());
    bus.counts("aurora_bus_breaker_open{", 1).await;
    bus.publish(2..=40).await;
    assert_eq!(sink.has_taken(39).await, firsts(2..=40));
    let letters = bus.has_dead_letters(1).await;
    assert_eq!((letters[0].reason, letters[0].attempts), (DeadLetterReason::Exhausted, 3));
    bus.is_settled().await;
    bus.counts("aurora_bus_breaker_open{", 0).await;
}

async fn stop_in_an_outage_releases_entries_without_an_attempt(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=30).await;
    let sink = TestSink::takes_all(1);
    sink.is_down.store(true, Ordering::SeqCst);
    let worker = bus.start("soc-a-0", &sink, cautious());
    bus.counts("aurora_bus_breaker_open{", 1).await;
    bus.stop(worker).await;
    assert_eq!(bus.counter("aurora_bus_breaker_open{"), 0);
    let sink = TestSink::takes_all(10);
    bus.start("soc-b-0", &sink, cautious());
    let mut taken = sink.has_taken(30).await;
    taken.sort_unstable();
    assert_eq!(taken, firsts(1..=30));
    bus.is_settled().await;
}

async fn outage_without_a_breaker_uses_up_attempts(store: Arc<dyn Store>) {
    let mut bus = Bus::new(store).await;
    bus.publish(1..=3).await;
    let (sink, _is_down) = overloaded(1);
    let mut config = cautious();
    config.breaker.failures = 0;
    bus.start("soc-a-0", &sink, config);
    let letters = bus.has_dead_letters(3).await;
    assert!(letters.iter().all(|letter| letter.attempts == 3));
    bus.is_settled().await;
}

on_stores! { embedded redis: [
    outage_longer_than_all_attempts_gives_up_no_entry
    only_entry_of_an_outage_is_not_given_up
    poison_entry_in_an_outage_does_not_block_retries
    repeated_outages_lose_no_entry
    poison_entry_among_good_ones_causes_no_outage
    poison_entry_that_causes_an_outage_blocks_no_later_ones
    stop_in_an_outage_releases_entries_without_an_attempt
    outage_without_a_breaker_uses_up_attempts
] }
