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
use crate::relay::log::frame_batch::FrameBatch;
use crate::relay::log::keyed_rings::{MemberStart, WakeList};
use crate::relay::log::page_reader::with_timeout;
use crate::relay::log::page_size::PageSize;
use crate::relay::log::ring::{Preload, Ring};
use crate::store::{JoinError, Order, Range, Store, StoreError, StoreErrorKind, StreamStatus};
use crate::telemetry::chain;

/// The time that one read waits for new entries.
const READ_WAIT: Duration = Duration::from_secs(2);

/// The time that the store may take beyond that.
const STORE_TIMEOUT: Duration = Duration::from_secs(8);

/// The interval between comparisons of the stream with the entries read.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The maximum number of entries of one read, and its target size in bytes.
const MAX_READ: usize = 512;
const READ_BYTES: usize = 1024 * 1024;

/// The size at which a batch is closed. A slow client keeps alive whole batches.
const BATCH_BYTES: usize = 64 * 1024;

/// A position in a stream, with the number of entries up to it.
#[derive(Debug)]
struct ReadPosition {
    /// All entries up to this one were read, or are missing.
    id: EntryId,
    /// The number of entries that were ever appended up to this one, if known.
    count: Option<u64>,
}

impl ReadPosition {
    /// Creates a position from the present state of the stream.
    fn of(at: EntryId, status: Option<&StreamStatus>) -> Self {
        let count = match status {
            None => Some(0),
            Some(status) => (status.last_id == at).then_some(status.entries_added),
        };
        Self { id: at, count }
    }

    /// Returns the number of entries after this position that are gone, given the stream's state after `read` was
    /// read.
    ///
    /// That is the number of entries appended, less those that were read. Returns 0 if the server cannot tell.
    fn missing(&self, status: &StreamStatus, read: &[Entry]) -> u64 {
        let appended = if read.last().map_or(self.id, |entry| entry.id) == status.last_id {
            Some((status.entries_added, read.len()))
        } else if status.first_id.is_none_or(|first| first > self.id) {
            let is_removed = |entry: &Entry| status.first_id.is_none_or(|first| entry.id < first);
            status.before_first.map(|before| (before, read.partition_point(is_removed)))
        } else {
            None
        };
        let missing = |(count, (appended, read)): (u64, (u64, usize))| appended.saturating_sub(count + read as u64);
        self.count.zip(appended).map_or(0, missing)
    }

    /// Moves the position over entries that were read.
    fn advance(&mut self, read: &[Entry]) {
        if let Some(newest) = read.last() {
            (self.id, self.count) = (newest.id, self.count.map(|count| count + read.len() as u64));
        }
    }
}

/// The size of the next read, and the time of the next comparison.
#[derive(Debug)]
struct ReadSchedule {
    size: PageSize,
    check_due: Instant,
    /// Whether there may be, or were, more entries than one read returns.
    is_behind: bool,
}

/// The only reader of a relayed stream.
#[derive(Debug)]
pub(crate) struct Tail {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) ring: Arc<Ring>,
    /// Notified of every change of the ring.
    pub(crate) wake_list: Arc<WakeList>,
    pub(crate) gaps: GapCounters,
    pub(crate) part: Part,
    /// Set for a stream of a family, which the tail makes a member.
    pub(crate) member_start: Option<MemberStart>,
}

/// The gap counters of all channels that have a stream.
#[derive(Debug)]
pub(crate) struct GapCounters {
    pub(crate) undecodable: Vec<IntCounter>,
    pub(crate) trimmed: Vec<IntCounter>,
    pub(crate) state_lost: Vec<IntCounter>,
}

impl Tail {
    /// Follows the stream until `stop`. Retries after errors, so that no entry that is still in the stream is skipped.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&mut self) {
        let mut backoff = Backoff::default();
        let mut position = loop {
            match self.begin().await {
                Ok(position) => break position,
                Err(error) => {
                    if !matches!(error.kind(), StoreErrorKind::Unavailable | StoreErrorKind::Full) {
                        self.ring.set_unreadable();
                        self.wake();
                    }
                    self.report_and_wait(&error, &mut backoff).await;
                }
            }
        };
        self.part.ready();
        if backoff.reset() {
            tracing::info!(stream = %self.ring.stream(), "relay tail started");
        }
        let mut schedule = ReadSchedule {
            size: PageSize::new(MAX_READ, READ_BYTES),
            check_due: Instant::now() + CHECK_INTERVAL,
            is_behind: false,
        };
        loop {
            match self.read_next(&mut position, &mut schedule).await {
                Ok(()) => {
                    self.part.ready();
                    if backoff.reset() {
                        tracing::info!(stream = %self.ring.stream(), "relay tail recovered");
                    }
                }
                Err(error) => {
                    // A loss of the stream must be detected before the next read.
                    schedule.check_due = Instant::now();
                    self.report_and_wait(&error, &mut backoff).await;
                }
            }
        }
    }

    /// Finds the present end of the stream. All later reads start after a known id, so that no error causes a gap.
    async fn begin(&self) -> Result<ReadPosition, StoreError> {
        if let Some(MemberStart { family_members, .. }) = &self.member_start {
            with_timeout(STORE_TIMEOUT, async {
                let joined = family_members.join(&*self.store, self.ring.stream()).await;
                joined.map_err(|error| match error {
                    JoinError::Full { .. } => StoreError::new(StoreErrorKind::Full, error.to_string()),
                    JoinError::Store(error) => error,
                })
            })
            .await?;
        }
        let epoch = self.epoch().await?;
        let status = with_timeout(STORE_TIMEOUT, self.store.describe(self.ring.stream())).await?;
        let at = match &self.member_start {
            Some(member_start) => member_start.start_after(status.as_ref()),
            None => status.as_ref().map_or(EntryId::MIN, |status| status.last_id),
        };
        let position = ReadPosition::of(at, status.as_ref());
        let preload = self.preload(&epoch, &position).await;
        self.restart(epoch, at, preload);
        Ok(position)
    }

    /// Reads the newest entries up to `position`, as many as the ring holds.
    ///
    /// Clients that were connected before a restart reconnect, and miss just these. Entries that cannot be read now
    /// are read when a client needs them.
    async fn preload(&self, epoch: &Epoch, position: &ReadPosition) -> Preload {
        let (mut preload, mut to, limits) = (Preload::default(), position.id, self.ring.limits());
        let (mut bytes, mut count, mut size) = (0, 0, PageSize::new(MAX_READ, READ_BYTES));
        while to > EntryId::MIN && bytes < limits.bytes && count < limits.entries {
            let range = Range { from: EntryId::MIN, to, order: Order::Backward };
            let limit = size.limit().min(limits.entries - count);
            let mut entries = match with_timeout(STORE_TIMEOUT, self.store.range(self.ring.stream(), range, limit))
                .await
            {
                Ok(entries) => entries,
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(stream = %self.ring.stream(), error, "ring partly filled, reading the rest later");
                    break;
                }
            };
            entries.reverse();
            let Some(oldest) = entries.first().map(|entry| entry.id) else { break };
            size.adapt(&entries);
            let (mut batches, _) = self.frame(epoch, &entries);
            bytes += batches.iter().map(FrameBatch::size_bytes).sum::<usize>();
            count += entries.len();
            batches.append(&mut preload.batches);
            (preload.batches, preload.floor, to) = (batches, Some(oldest.previous()), oldest.previous());
            if position.count == Some(count as u64) {
                // The stream never had others.
                preload.floor = Some(EntryId::MIN);
                break;
            }
            if entries.len() < limit {
                break;
            }
        }
        preload
    }

    async fn read_next(&mut self, position: &mut ReadPosition, schedule: &mut ReadSchedule) -> Result<(), StoreError> {
        if Instant::now() >= schedule.check_due {
            self.compare_with_store(position).await?;
            (schedule.check_due, schedule.is_behind) = (Instant::now() + CHECK_INTERVAL, true);
            self.ring.page_cache().evict_idle();
        }
        let limit = schedule.size.limit();
        let entries =
            with_timeout(READ_WAIT + STORE_TIMEOUT, self.store.tail(self.ring.stream(), position.id, limit, READ_WAIT))
                .await?;
        if !entries.is_empty() {
            let is_full = entries.len() >= limit;
            // At the head, entries are read before they can be trimmed, so no check is needed.
            if schedule.is_behind || is_full {
                let status = with_timeout(STORE_TIMEOUT, self.store.describe(self.ring.stream())).await?;
                self.detect_missing(position, status.as_ref(), &entries);
            }
            schedule.is_behind = is_full;
            position.advance(&entries);
            self.push(&entries);
            schedule.size.adapt(&entries);
            // Live clients come first: the next read waits until they were written to.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Compares the stream with the entries read, and begins again if the stream did.
    async fn compare_with_store(&self, position: &mut ReadPosition) -> Result<(), StoreError> {
        let status = with_timeout(STORE_TIMEOUT, self.store.describe(self.ring.stream())).await?;
        let last = status.as_ref().map_or(EntryId::MIN, |status| status.last_id);
        let epoch = self.epoch().await?;
        if last < position.id {
            tracing::warn!(stream = %self.ring.stream(), "stream lost, reporting a gap");
            count(&self.gaps.state_lost, 1);
            // A server that came back with older data has lost the end of the same epoch.
            let is_older = self.ring.snapshot().is_some_and(|snapshot| snapshot.epoch == epoch);
            *position =
                if is_older { ReadPosition::of(last, status.as_ref()) } else { ReadPosition::of(EntryId::MIN, None) };
            self.restart(epoch, position.id, Preload::default());
        } else if self.ring.snapshot().is_none_or(|snapshot| snapshot.epoch != epoch) {
            tracing::warn!(stream = %self.ring.stream(), "stream has a new epoch, reporting a gap");
            count(&self.gaps.state_lost, 1);
            self.restart(epoch, position.id, Preload::default());
            *position = ReadPosition::of(position.id, status.as_ref());
        } else {
            self.detect_missing(position, status.as_ref(), &[]);
            if last == position.id {
                *position = ReadPosition::of(last, status.as_ref());
            }
        }
        Ok(())
    }

    /// Detects entries that are gone before the relay could read them: those before `read`.
    fn detect_missing(&self, position: &mut ReadPosition, status: Option<&StreamStatus>, read: &[Entry]) {
        let missing = status.map_or(0, |status| position.missing(status, read));
        if missing > 0 {
            let stream = self.ring.stream();
            tracing::warn!(%stream, entry.id = %position.id, gone = missing, "unread entries removed, reporting a gap");
            count(&self.gaps.trimmed, 1);
            self.ring.mark_gap();
            position.count = position.count.map(|count| count + missing);
        }
    }

    async fn epoch(&self) -> Result<Epoch, StoreError> {
        with_timeout(STORE_TIMEOUT, self.store.epoch(self.ring.stream())).await
    }

    fn restart(&self, epoch: Epoch, at: EntryId, preload: Preload) {
        self.ring.begin(epoch, at, preload);
        self.wake();
    }

    fn push(&self, entries: &[Entry]) {
        let Some(snapshot) = self.ring.snapshot() else { return };
        let (batches, undecodable) = self.frame(&snapshot.epoch, entries);
        if undecodable > 0 {
            count(&self.gaps.undecodable, undecodable);
        }
        for batch in batches {
            self.ring.push(batch);
        }
        self.wake();
    }

    /// Frames entries. Returns also the number of entries that cannot be sent.
    fn frame(&self, epoch: &Epoch, mut entries: &[Entry]) -> (VecDeque<FrameBatch>, u64) {
        let (mut batches, mut undecodable) = (VecDeque::with_capacity(1), 0);
        while !entries.is_empty() {
            let framed = FrameBatch::frame(self.ring.stream(), epoch, entries, BATCH_BYTES);
            undecodable += framed.undecodable;
            batches.push_back(framed.batch);
            entries = &entries[framed.taken..];
        }
        (batches, undecodable)
    }

    fn wake(&self) {
        self.wake_list.wake();
    }

    async fn report_and_wait(&self, error: &StoreError, backoff: &mut Backoff) {
        // One warning per outage.
        if backoff.is_fresh() {
            let source = std::error::Error::source(error).map(tracing::field::display);
            tracing::warn!(stream = %self.ring.stream(), %error, source, "relay tail failed, retrying");
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

    /// Creates the status of a stream with `added` entries ever, of which `first` is the oldest left.
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
    fn missing_entries_are_those_appended_less_those_read() {
        let position = ReadPosition { id: id(100), count: Some(100) };
        let cases = [
            ("nothing is missing", status(110, Some(90)), read(101..=110), 0),
            ("entries that were read are gone", status(100, None), Vec::new(), 0),
            ("the oldest entry left is the next one", status(110, Some(101)), read(101..=110), 0),
            ("there is more to read", status(200, Some(101)), read(101..=110), 0),
            ("some are missing before those that were read", status(110, Some(106)), read(106..=110), 5),
            ("some are missing and there is more to read", status(200, Some(106)), read(106..=110), 5),
            ("a trim continues during the read", status(200, Some(109)), read(106..=110), 5),
            ("all are missing", status(110, None), Vec::new(), 10),
            ("the oldest are missing before a read", status(110, Some(104)), Vec::new(), 3),
            ("one was removed from the middle", status(110, Some(101)), [read(101..=104), read(106..=110)].concat(), 1),
            ("an older state than the position", status(90, Some(80)), Vec::new(), 0),
        ];
        for (case, status, read, expected) in cases {
            assert_eq!(position.missing(&status, &read), expected, "{case}");
        }
        let unsure = StreamStatus { before_first: None, ..status(200, Some(106)) };
        assert_eq!(position.missing(&unsure, &read(106..=110)), 0, "it is detected when all is read");
        let unknown = ReadPosition { count: None, ..position };
        assert_eq!(unknown.missing(&status(110, Some(106)), &read(106..=110)), 0);
    }

    #[test]
    fn count_is_known_only_at_the_end_of_the_stream() {
        let status = status(110, Some(50));
        let count = |ms| ReadPosition::of(id(ms), Some(&status)).count;
        assert_eq!((count(110), count(109)), (Some(110), None));
        let mut position = ReadPosition::of(EntryId::MIN, None);
        position.advance(&read(1..=7));
        assert_eq!((position.id, position.count), (id(7), Some(7)));
    }
}
