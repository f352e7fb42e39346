//! Entries that must be alone: all workers of a process hold one at a time, and none blocks the others for long.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, GroupSpec, Quarantine, Worker};
use aurora_bus::event::{Delivery, EntryId};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::sink::{Origin, Sink, SinkError, SinkErrorClass};
use aurora_bus::store::{Cursor, Order, Range, Start, Store};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores;
use crate::support::until;

const BOUND: Duration = Duration::from_secs(20);
/// Longer than any test waits.
const LONG: Duration = Duration::from_hours(1);

/// The number of concurrent calls of sinks.
#[derive(Debug, Default)]
struct ConcurrentCalls {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Takes each entry slowly, and none before `let_go` is set.
#[derive(Debug)]
struct SlowSink {
    takes: Duration,
    let_go: watch::Sender<bool>,
    /// An entry that is never taken.
    poison: Option<EntryId>,
    calls: Arc<ConcurrentCalls>,
    begun: AtomicUsize,
    taken: AtomicUsize,
}

impl SlowSink {
    fn new(takes: Duration, is_let_go: bool, calls: &Arc<ConcurrentCalls>) -> Self {
        Self {
            takes,
            let_go: watch::Sender::new(is_let_go),
            poison: None,
            calls: Arc::clone(calls),
            begun: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
        }
    }

    async fn has_begun(&self, calls: usize) {
        until("calls of the sink", BOUND, async || (self.begun.load(Ordering::SeqCst) >= calls).then_some(())).await;
    }

    async fn has_taken(&self, entries: usize) {
        until("entries taken", BOUND, async || (self.taken.load(Ordering::SeqCst) >= entries).then_some(())).await;
    }
}

#[async_trait]
impl Sink for SlowSink {
    async fn check(&self) -> Result<(), SinkError> {
        Ok(())
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let now = self.calls.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.calls.most.fetch_max(now, Ordering::SeqCst);
        self.let_go.subscribe().wait_for(|is_let_go| *is_let_go).await.expect("the sink is there");
        tokio::time::sleep(self.takes).await;
        self.calls.now.fetch_sub(1, Ordering::SeqCst);
        if batch.iter().any(|delivery| Some(delivery.entry.id) == self.poison) {
            return Err(SinkError::new(SinkErrorClass::Transient, "not this one"));
        }
        self.taken.fetch_add(batch.len(), Ordering::SeqCst);
        Ok(())
    }
}

/// Makes a stream of entries that are pending on `consumer`, each delivered so often that it must be alone.
async fn suspects(store: &dyn Store, consumer: &str, count: usize) -> Cursor {
    let cursor = cursor(&unique_stream(), "siem", consumer);
    store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await.expect("a group");
    append(store, &cursor, count).await;
    let fetched = store.fetch(&cursor, count, Duration::ZERO).await.expect("fetched");
    let ids: Vec<EntryId> = fetched.iter().map(|delivery| delivery.entry.id).collect();
    for _ in 0..2 {
        let claimed = store.claim(&cursor, &ids, Duration::ZERO).await.expect("claimed");
        assert_eq!(claimed.deliveries.len(), count);
    }
    cursor
}

async fn append(store: &dyn Store, cursor: &Cursor, count: usize) {
    let entries = (0..count).map(|_| new_entry("x")).collect();
    store.append(&cursor.stream, entries).await.expect("appended");
}

/// The workers of one process.
struct Process {
    store: Arc<dyn Store>,
    quarantine: Quarantine,
    workers: JoinSet<()>,
}

impl Process {
    fn new(store: &Arc<dyn Store>, quarantine: Quarantine) -> Self {
        Self { store: Arc::clone(store), quarantine, workers: JoinSet::new() }
    }

    fn start(&mut self, cursor: &Cursor, claim_idle: Duration, sink: &Arc<SlowSink>) {
        let mut config = GroupConfig::new(cursor.group.clone());
        config.sink = Some("slow".to_owned());
        config.retry.max_attempts = 4;
        config.breaker.pause = Duration::from_millis(20);
        config.breaker.max_pause = Duration::from_millis(100);
        config.handler_timeout = LONG;
        config.claim_idle = claim_idle;
        let (stream, dead_letter) = (cursor.stream.clone(), cursor.stream.default_dead_letter());
        let spec = GroupSpec { stream, dead_letter, config };
        let part = Readiness::default().part("worker", None);
        let consumer = "soc-a-0".parse().expect("a valid name");
        let (store, quarantine) = (Arc::clone(&self.store), self.quarantine.clone());
        let worker = Worker::new(store, Arc::<SlowSink>::clone(sink), spec, consumer, quarantine, Metrics::new(), part);
        self.workers.spawn(worker.run(CancellationToken::new()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_of_a_process_hold_one_lone_entry_at_a_time() {
    let test = stores::embedded().await;
    let mut process = Process::new(&test.store, Quarantine::with_max_hold(LONG));
    let calls = Arc::<ConcurrentCalls>::default();
    let sink = Arc::new(SlowSink::new(Duration::from_millis(50), true, &calls));
    // Entries of an earlier run of the worker, and of another one.
    for (consumer, claim_idle) in [("soc-a-0", LONG), ("soc-a-0", LONG), ("soc-b-0", Duration::from_millis(100))] {
        let cursor = suspects(&*test.store, consumer, 5).await;
        process.start(&cursor, claim_idle, &sink);
    }
    sink.has_taken(15).await;
    assert_eq!(calls.most.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hanging_sink_does_not_block_recovery_of_other_groups() {
    let test = stores::embedded().await;
    let mut process = Process::new(&test.store, Quarantine::with_max_hold(Duration::from_millis(100)));
    let calls = Arc::<ConcurrentCalls>::default();
    let hanging = Arc::new(SlowSink::new(Duration::ZERO, false, &calls));
    process.start(&suspects(&*test.store, "soc-a-0", 3).await, LONG, &hanging);
    hanging.has_begun(1).await;
    let quick = Arc::new(SlowSink::new(Duration::ZERO, true, &calls));
    let cursor = suspects(&*test.store, "soc-a-0", 3).await;
    append(&*test.store, &cursor, 10).await;
    process.start(&cursor, LONG, &quick);
    quick.has_taken(13).await;
    assert_eq!(hanging.begun.load(Ordering::SeqCst), 1, "the other entries of its group wait");
    hanging.let_go.send_replace(true);
    hanging.has_taken(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_that_waits_for_its_sink_holds_no_quarantine() {
    let test = stores::embedded().await;
    let mut process = Process::new(&test.store, Quarantine::with_max_hold(Duration::from_millis(100)));
    let calls = Arc::<ConcurrentCalls>::default();
    let hanging = Arc::new(SlowSink::new(Duration::ZERO, false, &calls));
    let left = suspects(&*test.store, "soc-b-0", 1).await;
    append(&*test.store, &left, 1).await;
    // The search finds the entry of the other daemon when the new entry is with the sink already.
    process.start(&left, Duration::from_secs(1), &hanging);
    hanging.has_begun(1).await;
    let quick = Arc::new(SlowSink::new(Duration::from_millis(20), true, &calls));
    process.start(&suspects(&*test.store, "soc-a-0", 40).await, LONG, &quick);
    quick.has_taken(40).await;
    hanging.let_go.send_replace(true);
    hanging.has_taken(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_entry_does_not_block_lone_entries_for_ever() {
    let test = stores::embedded().await;
    let mut process = Process::new(&test.store, Quarantine::default());
    let left = suspects(&*test.store, "soc-a-0", 3).await;
    let first = test.store.pending(&left, true, EntryId::MIN, 1).await.expect("listed")[0].id;
    let calls = Arc::<ConcurrentCalls>::default();
    let sink = Arc::new(SlowSink { poison: Some(first), ..SlowSink::new(Duration::ZERO, true, &calls) });
    // The entry is exhausted before the sink has taken any. Only other entries can show that the sink is up.
    process.start(&left, LONG, &sink);
    sink.has_taken(2).await;
    until("a dead letter", BOUND, async || {
        let everything = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
        let letters = test.store.range(&left.stream.default_dead_letter(), everything, 10).await.expect("read");
        (letters.len() == 1).then_some(())
    })
    .await;
}
