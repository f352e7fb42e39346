//! Follows one stream and fills its ring.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounter;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backoff::Backoff;
use super::batch::Batch;
use super::members::{Membership, Wakes};
use super::pages::{PageSize, bounded};
use super::ring::{Past, Ring};
use crate::event::{Entry, EntryId, Epoch};
use crate::readiness::Part;
use crate::store::{NotJoined, Order, Range, Store, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// How long one read waits for news.
const WAIT: Duration = Duration::from_secs(2);

/// How long the store may take beyond that.
const GRACE: Duration = Duration::from_secs(8);

/// How often the stream is compared with what was read of it.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The most entries of one read, and about how many bytes it should have.
const MAX_READ: usize = 512;
const READ_BYTES: usize = 1024 * 1024;

/// The size at which a batch is closed: what a client has under way keeps its batches alive.
const BATCH_BYTES: usize = 64 * 1024;

/// The one reader of a relayed stream.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) store: Arc<dyn Store>,
    pub(super) ring: Arc<Ring>,
    /// Told of every change of the ring.
    pub(super) wakes: Arc<Wakes>,
    pub(super) gaps: Gaps,
    pub(super) part: Part,
    /// Where the stream is of a family, which it becomes a member of.
    pub(super) membership: Option<Membership>,
}

/// Counts, in every channel of a stream, what its clients can't be given.
#[derive(Debug)]
pub(super) struct Gaps {
    pub(super) undecodable: Vec<IntCounter>,
    pub(super) trimmed: Vec<IntCounter>,
    pub(super) state_lost: Vec<IntCounter>,
}

impl Tail {
    /// Follows the stream until `stop`. Errors are waited out: nothing that is still in the stream is passed over.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        let mut backoff = Backoff::default();
        let mut at = loop {
            match self.begin().await {
                Ok(at) => break at,
                Err(error) => {
                    if !matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Full) {
                        self.ring.set_unreadable();
                        self.wake();
                    }
                    self.wait_out(&error, &mut backoff).await;
                }
            }
        };
        self.part.ready();
        if backoff.reset() {
            tracing::info!(stream = %self.ring.stream(), "follows the stream now");
        }
        let mut size = PageSize::new(MAX_READ, READ_BYTES);
        let mut check_due = Instant::now() + CHECK_INTERVAL;
        loop {
            match self.step(&mut at, &mut size, &mut check_due).await {
                Ok(()) => {
                    self.part.ready();
                    if backoff.reset() {
                        tracing::info!(stream = %self.ring.stream(), "follows the stream again");
                    }
                }
                Err(error) => {
                    // Whatever happened to the stream meanwhile is to be seen before anything is read.
                    check_due = Instant::now();
                    self.wait_out(&error, &mut backoff).await;
                }
            }
        }
    }

    /// Finds out where "now" is. From here on only concrete ids are asked for, so that no error makes a hole.
    async fn begin(&self) -> Result<EntryId, StoreError> {
        if let Some(Membership { roster, .. }) = &self.membership {
            bounded(GRACE, async {
                let joined = roster.join(&*self.store, self.ring.stream()).await;
                joined.map_err(|error| match error {
                    NotJoined::Full { .. } => StoreError::new(StoreErrorKind::Full, error.to_string()),
                    NotJoined::Store(error) => error,
                })
            })
            .await?;
        }
        let epoch = self.epoch().await?;
        let status = bounded(GRACE, self.store.describe(self.ring.stream())).await?;
        let at = match &self.membership {
            Some(membership) => membership.start(status.as_ref()),
            None => status.map_or(EntryId::MIN, |status| status.last_id),
        };
        let past = self.past(&epoch, at).await;
        self.restart(epoch, at, past);
        Ok(at)
    }

    /// The newest entries up to `at`, as many as the ring keeps: those who were connected before a restart come back,
    /// and miss just these. What can't be read now, they read when they need it.
    async fn past(&self, epoch: &Epoch, at: EntryId) -> Past {
        let (mut past, mut to, limits) = (Past::default(), at, self.ring.limits());
        let (mut bytes, mut count, mut size) = (0, 0, PageSize::new(MAX_READ, READ_BYTES));
        while to > EntryId::MIN && bytes < limits.bytes && count < limits.entries {
            let range = Range { from: EntryId::MIN, to, order: Order::Backward };
            let limit = size.limit().min(limits.entries - count);
            let mut entries = match bounded(GRACE, self.store.range(self.ring.stream(), range, limit)).await {
                Ok(entries) => entries,
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(stream = %self.ring.stream(), error, "cannot read the newest entries");
                    break;
                }
            };
            entries.reverse();
            let Some(oldest) = entries.first().map(|entry| entry.id) else { break };
            size.learn(&entries);
            let (mut batches, _) = self.frame(epoch, &entries);
            bytes += batches.iter().map(Batch::size_bytes).sum::<usize>();
            count += entries.len();
            batches.append(&mut past.batches);
            (past.batches, past.floor, to) = (batches, Some(oldest.previous()), oldest.previous());
            if entries.len() < limit {
                break;
            }
        }
        past
    }

    async fn step(&mut self, at: &mut EntryId, size: &mut PageSize, check_due: &mut Instant) -> Result<(), StoreError> {
        if Instant::now() >= *check_due {
            *at = self.check(*at).await?;
            *check_due = Instant::now() + CHECK_INTERVAL;
            self.ring.shelf().tidy();
        }
        let limit = size.limit();
        let entries = bounded(WAIT + GRACE, self.store.tail(self.ring.stream(), *at, limit, WAIT)).await?;
        if let Some(newest) = entries.last() {
            *at = newest.id;
            self.push(&entries);
            size.learn(&entries);
            // Dashboards first: asking for more can wait until they have been written to.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Compares the stream with what was read of it up to `at`: says where to go on.
    async fn check(&self, at: EntryId) -> Result<EntryId, StoreError> {
        let status = bounded(GRACE, self.store.describe(self.ring.stream())).await?;
        let last = status.as_ref().map_or(EntryId::MIN, |status| status.last_id);
        let epoch = self.epoch().await?;
        if last < at {
            tracing::warn!(stream = %self.ring.stream(), "the stream was lost and has begun anew");
            count(&self.gaps.state_lost, 1);
            self.restart(epoch, EntryId::MIN, Past::default());
            return Ok(EntryId::MIN);
        }
        if self.ring.mark().is_none_or(|mark| mark.epoch != epoch) {
            tracing::warn!(stream = %self.ring.stream(), "the stream has a new epoch");
            count(&self.gaps.state_lost, 1);
            self.restart(epoch, at, Past::default());
        }
        let was_passed = at > EntryId::MIN && status.is_some_and(|s| last > at && s.first_id.is_none_or(|f| f > at));
        if was_passed {
            tracing::warn!(stream = %self.ring.stream(), entry.id = %at, "entries were trimmed before they were relayed");
            count(&self.gaps.trimmed, 1);
        }
        Ok(at)
    }

    async fn epoch(&self) -> Result<Epoch, StoreError> {
        bounded(GRACE, self.store.epoch(self.ring.stream())).await
    }

    fn restart(&self, epoch: Epoch, at: EntryId, past: Past) {
        self.ring.begin(epoch, at, past);
        self.wake();
    }

    fn push(&self, entries: &[Entry]) {
        let Some(mark) = self.ring.mark() else { return };
        let (batches, undecodable) = self.frame(&mark.epoch, entries);
        if undecodable > 0 {
            count(&self.gaps.undecodable, undecodable);
        }
        for batch in batches {
            self.ring.push(batch);
        }
        self.wake();
    }

    /// Frames entries; says also how many can't be sent.
    fn frame(&self, epoch: &Epoch, mut entries: &[Entry]) -> (VecDeque<Batch>, u64) {
        let (mut batches, mut undecodable) = (VecDeque::with_capacity(1), 0);
        while !entries.is_empty() {
            let framed = Batch::frame(self.ring.stream(), epoch, entries, BATCH_BYTES);
            undecodable += framed.undecodable;
            batches.push_back(framed.batch);
            entries = &entries[framed.taken..];
        }
        (batches, undecodable)
    }

    fn wake(&self) {
        self.wakes.wake();
    }

    async fn wait_out(&self, error: &StoreError, backoff: &mut Backoff) {
        // One line for an outage, however long it takes.
        if backoff.is_fresh() {
            let source = std::error::Error::source(error).map(tracing::field::display);
            tracing::warn!(stream = %self.ring.stream(), %error, source, "cannot follow the stream");
        }
        self.part.not_ready(format!("cannot follow stream `{}`: {error}", self.ring.stream()));
        tokio::time::sleep(backoff.next()).await;
    }
}

fn count(counters: &[IntCounter], count: u64) {
    for counter in counters {
        counter.inc_by(count);
    }
}
