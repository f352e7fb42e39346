//! Follows one stream and fills its ring.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use prometheus::IntCounter;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::event::{Entry, EntryId, Epoch};
use crate::readiness::Part;
use crate::relay::log::frame_batch::Batch;
use crate::relay::log::keyed_rings::{Membership, Wakes};
use crate::relay::log::page_reader::{PageSize, bounded};
use crate::relay::log::ring::{Past, Ring};
use crate::store::{NotJoined, Order, Range, Store, StoreError, StoreErrorKind, StreamStatus};
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

/// How far a stream was read.
#[derive(Debug)]
struct Place {
    /// Everything up to here was read, or is gone.
    at: EntryId,
    /// How many entries the stream had been given with that one, as far as that is known.
    count: Option<u64>,
}

impl Place {
    /// Where a stream is now.
    fn of(at: EntryId, status: Option<&StreamStatus>) -> Self {
        let count = match status {
            None => Some(0),
            Some(status) => (status.last_id == at).then_some(status.entries_added),
        };
        Self { at, count }
    }

    /// How many entries that come next are gone, by how the stream is after these ones that come next were read: what it
    /// was given, less what was read of it. Nothing where the server can't tell.
    fn gone(&self, status: &StreamStatus, read: &[Entry]) -> u64 {
        let given = if read.last().map_or(self.at, |entry| entry.id) == status.last_id {
            Some((status.entries_added, read.len()))
        } else if status.first_id.is_none_or(|first| first > self.at) {
            let is_removed = |entry: &Entry| status.first_id.is_none_or(|first| entry.id < first);
            status.before_first.map(|before| (before, read.partition_point(is_removed)))
        } else {
            None
        };
        let gone = |(count, (given, read)): (u64, (u64, usize))| given.saturating_sub(count + read as u64);
        self.count.zip(given).map_or(0, gone)
    }

    /// Moves on over entries that were read.
    fn pass(&mut self, read: &[Entry]) {
        if let Some(newest) = read.last() {
            (self.at, self.count) = (newest.id, self.count.map(|count| count + read.len() as u64));
        }
    }
}

/// How a stream is read on.
#[derive(Debug)]
struct Pace {
    size: PageSize,
    check_due: Instant,
    /// Whether there may be more than comes with one read, or may have been.
    is_behind: bool,
}

/// The one reader of a relayed stream.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) ring: Arc<Ring>,
    /// Told of every change of the ring.
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) gaps: Gaps,
    pub(crate) part: Part,
    /// Where the stream is of a family, which it becomes a member of.
    pub(crate) membership: Option<Membership>,
}

/// Counts, in every channel of a stream, what its clients can't be given.
#[derive(Debug)]
pub(crate) struct Gaps {
    pub(crate) undecodable: Vec<IntCounter>,
    pub(crate) trimmed: Vec<IntCounter>,
    pub(crate) state_lost: Vec<IntCounter>,
}

impl Tail {
    /// Follows the stream until `stop`. Errors are waited out: nothing that is still in the stream is passed over.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        let mut backoff = Backoff::default();
        let mut place = loop {
            match self.begin().await {
                Ok(place) => break place,
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
        let mut pace = Pace {
            size: PageSize::new(MAX_READ, READ_BYTES),
            check_due: Instant::now() + CHECK_INTERVAL,
            is_behind: false,
        };
        loop {
            match self.step(&mut place, &mut pace).await {
                Ok(()) => {
                    self.part.ready();
                    if backoff.reset() {
                        tracing::info!(stream = %self.ring.stream(), "follows the stream again");
                    }
                }
                Err(error) => {
                    // Whatever happened to the stream meanwhile is to be seen before anything is read.
                    pace.check_due = Instant::now();
                    self.wait_out(&error, &mut backoff).await;
                }
            }
        }
    }

    /// Finds out where "now" is. From here on only concrete ids are asked for, so that no error makes a hole.
    async fn begin(&self) -> Result<Place, StoreError> {
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
            None => status.as_ref().map_or(EntryId::MIN, |status| status.last_id),
        };
        let place = Place::of(at, status.as_ref());
        let past = self.past(&epoch, &place).await;
        self.restart(epoch, at, past);
        Ok(place)
    }

    /// The newest entries up to `place`, as many as the ring keeps: those who were connected before a restart come back,
    /// and miss just these. What can't be read now, they read when they need it.
    async fn past(&self, epoch: &Epoch, place: &Place) -> Past {
        let (mut past, mut to, limits) = (Past::default(), place.at, self.ring.limits());
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
            if place.count == Some(count as u64) {
                // These are all that there ever were.
                past.floor = Some(EntryId::MIN);
                break;
            }
            if entries.len() < limit {
                break;
            }
        }
        past
    }

    async fn step(&mut self, place: &mut Place, pace: &mut Pace) -> Result<(), StoreError> {
        if Instant::now() >= pace.check_due {
            self.check(place).await?;
            (pace.check_due, pace.is_behind) = (Instant::now() + CHECK_INTERVAL, true);
            self.ring.shelf().tidy();
        }
        let limit = pace.size.limit();
        let entries = bounded(WAIT + GRACE, self.store.tail(self.ring.stream(), place.at, limit, WAIT)).await?;
        if !entries.is_empty() {
            let is_full = entries.len() >= limit;
            // Whoever reads all there is reads it before it is trimmed.
            if pace.is_behind || is_full {
                let status = bounded(GRACE, self.store.describe(self.ring.stream())).await?;
                self.look_for_gone(place, status.as_ref(), &entries);
            }
            pace.is_behind = is_full;
            place.pass(&entries);
            self.push(&entries);
            pace.size.learn(&entries);
            // Dashboards first: asking for more can wait until they have been written to.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Compares the stream with what was read of it, and begins anew where it did.
    async fn check(&self, place: &mut Place) -> Result<(), StoreError> {
        let status = bounded(GRACE, self.store.describe(self.ring.stream())).await?;
        let last = status.as_ref().map_or(EntryId::MIN, |status| status.last_id);
        let epoch = self.epoch().await?;
        if last < place.at {
            tracing::warn!(stream = %self.ring.stream(), "the stream was lost and has begun anew");
            count(&self.gaps.state_lost, 1);
            // A server that came back with what it had a while ago has lost the end of the same life.
            let is_older = self.ring.mark().is_some_and(|mark| mark.epoch == epoch);
            *place = if is_older { Place::of(last, status.as_ref()) } else { Place::of(EntryId::MIN, None) };
            self.restart(epoch, place.at, Past::default());
        } else if self.ring.mark().is_none_or(|mark| mark.epoch != epoch) {
            tracing::warn!(stream = %self.ring.stream(), "the stream has a new epoch");
            count(&self.gaps.state_lost, 1);
            self.restart(epoch, place.at, Past::default());
            *place = Place::of(place.at, status.as_ref());
        } else {
            self.look_for_gone(place, status.as_ref(), &[]);
            if last == place.at {
                *place = Place::of(last, status.as_ref());
            }
        }
        Ok(())
    }

    /// Notes where entries are gone that should come next: before those that were `read`, which do.
    fn look_for_gone(&self, place: &mut Place, status: Option<&StreamStatus>, read: &[Entry]) {
        let gone = status.map_or(0, |status| place.gone(status, read));
        if gone > 0 {
            let stream = self.ring.stream();
            tracing::warn!(%stream, entry.id = %place.at, gone, "entries were removed before they were relayed");
            count(&self.gaps.trimmed, 1);
            self.ring.tear();
            place.count = place.count.map(|count| count + gone);
        }
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
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

fn count(counters: &[IntCounter], count: u64) {
    for counter in counters {
        counter.inc_by(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::log::frame_batch::testing::entry;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    /// A stream that was given `added` entries, of which the oldest that is left is the one of that number.
    fn status(added: u64, first: Option<u64>) -> StreamStatus {
        StreamStatus {
            length: first.map_or(0, |first| added + 1 - first),
            first_id: first.map(id),
            last_id: id(added),
            entries_added: added,
            removed_by_others: None,
            before_first: Some(first.map_or(added, |first| first - 1)),
            groups: Vec::new(),
        }
    }

    fn read(numbers: std::ops::RangeInclusive<u64>) -> Vec<Entry> {
        numbers.map(|ms| entry(ms, &[("data", "{}")])).collect()
    }

    #[test]
    fn what_is_gone_is_what_was_given_less_what_was_read() {
        let place = Place { at: id(100), count: Some(100) };
        let cases = [
            ("nothing is gone", status(110, Some(90)), read(101..=110), 0),
            ("what was read is gone", status(100, None), Vec::new(), 0),
            ("and what comes now is not", status(110, Some(101)), read(101..=110), 0),
            ("nor is more to come", status(200, Some(101)), read(101..=110), 0),
            ("some are gone before those that were read", status(110, Some(106)), read(106..=110), 5),
            ("and there is more to come", status(200, Some(106)), read(106..=110), 5),
            ("which is being trimmed meanwhile", status(200, Some(109)), read(106..=110), 5),
            ("all are gone", status(110, None), Vec::new(), 10),
            ("the oldest are gone before anything is read", status(110, Some(104)), Vec::new(), 3),
            ("one was taken from the middle", status(110, Some(101)), [read(101..=104), read(106..=110)].concat(), 1),
            ("others were there before", status(90, Some(80)), Vec::new(), 0),
        ];
        for (what, status, read, expected) in cases {
            assert_eq!(place.gone(&status, &read), expected, "{what}");
        }
        let unsure = StreamStatus { before_first: None, ..status(200, Some(106)) };
        assert_eq!(place.gone(&unsure, &read(106..=110)), 0, "it is seen when all is read");
        let unknown = Place { count: None, ..place };
        assert_eq!(unknown.gone(&status(110, Some(106)), &read(106..=110)), 0);
    }

    #[test]
    fn a_count_is_known_at_the_end_of_the_stream_only() {
        let status = status(110, Some(50));
        let count = |ms| Place::of(id(ms), Some(&status)).count;
        assert_eq!((count(110), count(109)), (Some(110), None));
        let mut place = Place::of(EntryId::MIN, None);
        place.pass(&read(1..=7));
        assert_eq!((place.at, place.count), (id(7), Some(7)));
    }
}
