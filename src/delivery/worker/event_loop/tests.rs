//! A property of the loop: after the start of all due tasks nothing is overdue, for any result of store and sink.
//!
//! An overdue part would let the loop spin: it would wake at once, start nothing, and wake again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant as WallInstant};

use async_trait::async_trait;
use bytes::Bytes;
use fastrand::Rng;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::*;
use crate::delivery::worker::leases::WorkerLeases;
use crate::delivery::worker::poison::Quarantine;
use crate::delivery::{BreakerPolicy, GroupConfig, GroupSpec, OnPoison, OrderBy, RetryPolicy};
use crate::event::{Delivery, Entry, Epoch, Fields, GroupName, NewEntry, StreamName};
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::sink::{Sink, SinkError, SinkErrorClass};
use crate::store::{
    Appended, IsolationLimits, Claimed, Dropped, Lease, Leased, Pending, Range, Receipt, Reclaimed, Redelivered, Redelivery,
    ReceiptAction, Settled, Settlement, Start, Store, StoreError, StoreErrorKind, StoreStatus, StreamStatus, Trim,
};

/// A store and a sink that return anything that their contracts allow, by chance.
#[derive(Debug)]
struct Chance {
    rng: Mutex<(Rng, u64)>,
}

impl Chance {
    fn lock(&self) -> MutexGuard<'_, (Rng, u64)> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one_in(&self, n: u32) -> bool {
        self.lock().0.u32(0..n) == 0
    }

    fn up_to(&self, most: usize) -> usize {
        self.lock().0.usize(0..=most)
    }

    fn id(&self) -> EntryId {
        let mut state = self.lock();
        state.1 += 1;
        EntryId::new(state.1, 0)
    }

    fn attempts(&self) -> u32 {
        self.lock().0.u32(1..=5)
    }

    /// Fails one call in six, rarely for good.
    fn call(&self) -> Result<(), StoreError> {
        let kind = match self.lock().0.u32(0..100) {
            0 => StoreErrorKind::LeaseLost,
            1..4 => StoreErrorKind::NoGroup,
            4..16 => StoreErrorKind::Unavailable,
            _ => return Ok(()),
        };
        Err(StoreError::new(kind, "by chance"))
    }

    fn delivery(&self, id: EntryId, attempt: u32) -> Delivery {
        let key = ["a", "b", "c"][self.up_to(2)];
        let fields = [("data", "{}"), ("source", key)].map(|(name, value)| (Bytes::from(name), Bytes::from(value)));
        let mut fields: Fields = fields.into_iter().collect();
        if self.one_in(10) {
            fields = Fields::default();
        }
        Delivery { entry: Entry { id, fields }, attempt, delivered_at: WallInstant::now() }
    }

    fn claimed(&self, ids: impl IntoIterator<Item = EntryId>) -> Claimed {
        let mut claimed = Claimed::default();
        for id in ids {
            match self.up_to(9) {
                0 => claimed.lost.push(id),
                1 => {}
                _ => claimed.deliveries.push(self.delivery(id, self.attempts() + 1)),
            }
        }
        claimed
    }
}

#[async_trait]
impl Sink for Chance {
    fn max_batch(&self) -> usize {
        4
    }

    async fn check(&self) -> Result<(), SinkError> {
        if self.one_in(3) { Err(SinkError::new(SinkErrorClass::Transient, "down")) } else { Ok(()) }
    }

    async fn deliver(&self, _: &Origin, _: &[Delivery]) -> Result<(), SinkError> {
        let pause = Duration::from_millis(self.lock().0.u64(1..5000));
        match self.up_to(9) {
            0 => Err(SinkError::new(SinkErrorClass::Permanent, "refused")),
            1..3 => Err(SinkError::new(SinkErrorClass::Transient, "failed")),
            3 => Err(SinkError::new(SinkErrorClass::Transient, "throttled").with_retry_after(pause)),
            4 => Err(SinkError::new(SinkErrorClass::Transient, "full").as_outage()),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Store for Chance {
    async fn ensure_group(&self, _: &StreamName, _: &GroupName, _: Start) -> Result<bool, StoreError> {
        self.call().map(|()| self.one_in(2))
    }

    async fn fetch(&self, _: &Cursor, limit: usize, _: Duration) -> Result<Vec<Delivery>, StoreError> {
        self.call()?;
        Ok((0..self.up_to(limit)).map(|_| self.delivery(self.id(), 1)).collect())
    }

    async fn claim(&self, _: &Cursor, ids: &[EntryId], _: Duration) -> Result<Claimed, StoreError> {
        self.call().map(|()| self.claimed(ids.iter().copied()))
    }

    async fn reclaim_isolated(
        &self,
        _: &Cursor,
        _: Duration,
        _: EntryId,
        limit: usize,
        _: IsolationLimits,
    ) -> Result<Reclaimed, StoreError> {
        self.call()?;
        let claimed = self.claimed((0..self.up_to(limit.min(3))).map(|_| self.id()));
        let next = if self.one_in(2) { EntryId::MIN } else { self.id() };
        let held_back = self.one_in(3).then(|| self.attempts());
        Ok(Reclaimed { claimed, next, held_back })
    }

    async fn settle(&self, _: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.call()?;
        let not_owned = if self.one_in(5) { self.up_to(settlements.len()) } else { 0 };
        Ok(Settled { settled: settlements.len() - not_owned, not_owned })
    }

    async fn extend(&self, _: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.call().map(|()| ids.iter().copied().filter(|_| self.one_in(8)).collect())
    }

    async fn pending(&self, cursor: &Cursor, _: bool, _: EntryId, limit: usize) -> Result<Vec<Pending>, StoreError> {
        self.call()?;
        let count = if self.one_in(2) { 0 } else { self.up_to(limit) };
        let pending = |_| Pending {
            id: self.id(),
            consumer: cursor.consumer.clone(),
            idle: Duration::ZERO,
            attempts: self.attempts(),
        };
        Ok((0..count).map(pending).collect())
    }

    async fn describe(&self, _: &StreamName) -> Result<Option<StreamStatus>, StoreError> {
        self.call().map(|()| None)
    }

    async fn append(&self, _: &StreamName, _: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn range(&self, _: &StreamName, _: Range, _: usize) -> Result<Vec<Entry>, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn tail(&self, _: &StreamName, _: EntryId, _: usize, _: Duration) -> Result<Vec<Entry>, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn redeliver(&self, _: &Cursor, _: Redelivery, _: EntryId, _: usize) -> Result<Redelivered, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn settle_by_receipt(&self, _: &Cursor, _: &[(Receipt, ReceiptAction)]) -> Result<Vec<bool>, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn epoch(&self, _: &StreamName) -> Result<Epoch, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn trim_past(&self, _: &StreamName, _: Trim, _: &[GroupName]) -> Result<u64, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn drop_oldest(&self, _: &StreamName, _: u64) -> Result<Dropped, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn write_off(&self, _: &StreamName, _: &GroupName, _: u64, _: u64) -> Result<bool, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn discard(&self, _: &StreamName, _: &[EntryId]) -> Result<u64, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn remove_consumer(&self, _: &Cursor) -> Result<bool, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn lease(&self, _: &StreamName, _: &str, _: &str, _: Duration) -> Result<Leased, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn release_lease(&self, _: &StreamName, _: &Lease) -> Result<bool, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn check(&self) -> Result<StoreStatus, StoreError> {
        unreachable!("a worker does not call this")
    }

    async fn close(&self) {
        unreachable!("a worker does not call this")
    }
}

/// A step of the world around the loop.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Up to this many tasks end.
    TasksEnd(usize),
    /// The loop sleeps until it planned to wake.
    Sleep,
    /// Time passes while the process does not run.
    Pause(u64),
    /// The worker is stopped.
    Stop,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => (1_usize..4).prop_map(Step::TasksEnd),
        10 => Just(Step::Sleep),
        3 => (1_u64..2_000).prop_map(Step::Pause),
        1 => (30_000_u64..120_000).prop_map(Step::Pause),
        1 => Just(Step::Stop),
    ];
    prop::collection::vec(step, 1..120)
}

fn configs() -> impl Strategy<Value = GroupConfig> {
    let ordering = prop_oneof![Just(Ordering::None), Just(Ordering::Key), Just(Ordering::Stream)];
    (ordering, any::<bool>(), 1_usize..4, 0_u32..4, 1_usize..40, 1_u32..4).prop_map(
        |(ordering, halts, concurrency, failures, max_in_flight, max_attempts)| {
            let mut config = GroupConfig::new("g".parse().expect("a valid name"));
            config.sink = Some("chance".to_owned());
            config.ordering = ordering;
            config.order_by = (ordering == Ordering::Key).then(|| OrderBy::Field("source".to_owned()));
            config.on_poison = if halts { OnPoison::Halt } else { OnPoison::DeadLetter };
            config.concurrency = if ordering == Ordering::Stream { 1 } else { concurrency };
            config.max_in_flight = max_in_flight;
            config.retry = RetryPolicy { max_attempts, ..RetryPolicy::default() };
            config.max_deliveries = 4;
            config.breaker = BreakerPolicy { failures, ..BreakerPolicy::default() };
            config
        },
    )
}

fn worker(config: GroupConfig, seed: u64) -> Worker {
    let chance = Arc::new(Chance { rng: Mutex::new((Rng::with_seed(seed), 0)) });
    let stream: StreamName = "s".parse().expect("a valid name");
    let group = GroupSpec { dead_letter: stream.default_dead_letter(), stream, config };
    let part = Readiness::default().part("worker", None);
    let consumer = "c".parse().expect("a valid name");
    Worker::new(chance.clone(), chance, group, consumer, Quarantine::default(), Metrics::new(), part)
}

async fn run(config: GroupConfig, seed: u64, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let worker = worker(config, seed);
    let leases = WorkerLeases::unbounded(worker.consumer.clone());
    let mut event_loop = WorkerLoop::new(&worker, &leases, CancellationToken::new());
    let mut now = Instant::now();
    for step in steps {
        event_loop.start_due_tasks(now);
        if event_loop.lifecycle.state() == WorkerState::LeaseLost || event_loop.is_finished(now) {
            break;
        }
        let wake_at = event_loop.next_due(now);
        prop_assert!(wake_at > now, "overdue before {step:?}: {event_loop:?}");
        event_loop.ownership.sleep_until(wake_at);
        match step {
            Step::TasksEnd(most) => {
                tokio::task::yield_now().await;
                for _ in 0..most {
                    if let Some(ended) = event_loop.tasks.try_join_next() {
                        event_loop.on_task_ended(ended, now);
                    }
                }
            }
            Step::Sleep => now = wake_at,
            Step::Pause(ms) => now += Duration::from_millis(ms),
            Step::Stop => event_loop.begin_stop(now),
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_overdue_after_the_start_of_due_tasks(config in configs(), seed in any::<u64>(), steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(run(config, seed, steps))?;
    }
}
