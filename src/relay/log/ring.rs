//! The recent entries of one stream, framed once and shared by all clients.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::event::{EntryId, Epoch, Filter, StreamName};
use crate::relay::log::frame_batch::FrameBatch;
use crate::relay::log::page_cache::PageCache;

/// The capacity of a ring.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingLimits {
    /// The size of plain frames in bytes. Other encodings, if a client uses them, add to this.
    pub(crate) bytes: usize,
    /// The number of entries.
    pub(crate) entries: usize,
}

/// A bounded log of batches.
///
/// It has all entries after its `floor` up to its `last`, except for entries that cannot be sent and for gaps, which
/// it knows.
#[derive(Debug)]
pub(crate) struct Ring {
    stream: StreamName,
    limits: RingLimits,
    state: RwLock<RingState>,
    /// Pages of the entries before the floor.
    page_cache: PageCache,
    /// Whether the stream cannot be read, for a reason that concerns only this stream.
    is_unreadable: AtomicBool,
    /// Grows with every change, so that readers find new entries without the lock.
    changes: AtomicU64,
}

#[derive(Debug, Default)]
struct RingState {
    /// The number of times that the stream has begun; 0 before the first.
    generation: u64,
    epoch: Option<Epoch>,
    start: EntryId,
    floor: EntryId,
    last: EntryId,
    batches: VecDeque<RingSlot>,
    bytes: usize,
    entries: usize,
    total_bytes: u64,
    /// Whether entries between `last` and the next one are gone.
    has_gap_after_last: bool,
}

impl RingState {
    fn push(&mut self, mut batch: FrameBatch) {
        self.last = self.last.max(batch.last());
        if batch.len() > 0 {
            if std::mem::take(&mut self.has_gap_after_last) {
                batch.set_gap_before();
            }
            self.bytes += batch.size_bytes();
            self.entries += batch.len();
            self.total_bytes += batch.size_bytes() as u64;
            self.batches.push_back(RingSlot { batch: Arc::new(batch), total_bytes: self.total_bytes });
        }
    }
}

/// The entries that a ring begins with: all after the floor.
#[derive(Debug, Default)]
pub(crate) struct Preload {
    /// `None` if there are no batches.
    pub(crate) floor: Option<EntryId>,
    /// In the order of the stream.
    pub(crate) batches: VecDeque<FrameBatch>,
}

/// One batch, and the total of bytes up to its end.
#[derive(Debug, Clone)]
struct RingSlot {
    batch: Arc<FrameBatch>,
    total_bytes: u64,
}

/// The state of a ring at one moment.
#[derive(Debug, Clone)]
pub(crate) struct RingSnapshot {
    /// The number of times that the stream has begun.
    pub(crate) generation: u64,
    /// The epoch of this generation.
    pub(crate) epoch: Epoch,
    /// The entry after which this generation begins for readers of an earlier one.
    pub(crate) start: EntryId,
    /// The ring has all entries after this one.
    pub(crate) floor: EntryId,
    /// The newest entry that was read.
    pub(crate) last: EntryId,
    /// The size of all plain frames ever added, in bytes.
    pub(crate) total_bytes: u64,
    /// The size of the plain frames in the ring, in bytes.
    pub(crate) bytes: usize,
    /// The number of entries in the ring.
    pub(crate) entries: usize,
}

/// The result of a lookup in a ring.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// The batch with the next entry, the total of bytes up to its end, and whether it is the newest.
    Batch(Arc<FrameBatch>, u64, bool),
    /// There is no newer entry.
    Head,
    /// The next entries have left the ring.
    Behind,
    /// The stream has begun again, in a new generation.
    Restarted,
}

impl Ring {
    /// Creates an empty ring that has not begun.
    pub(crate) fn new(stream: StreamName, limits: RingLimits) -> Self {
        Self {
            stream,
            limits,
            state: RwLock::default(),
            page_cache: PageCache::new(limits.bytes / 2),
            is_unreadable: AtomicBool::new(false),
            changes: AtomicU64::new(0),
        }
    }

    /// Returns the stream.
    pub(crate) fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// Returns the capacity.
    pub(crate) fn limits(&self) -> RingLimits {
        self.limits
    }

    /// Returns the pages of entries that have left the ring.
    pub(crate) fn page_cache(&self) -> &PageCache {
        &self.page_cache
    }

    /// Begins a generation: entries after `start` will come, and `preload` has some before it.
    pub(crate) fn begin(&self, epoch: Epoch, start: EntryId, preload: Preload) {
        let mut state = self.write();
        let (generation, total_bytes) = (state.generation + 1, state.total_bytes);
        let floor = preload.floor.unwrap_or(start);
        *state = RingState {
            generation,
            epoch: Some(epoch),
            start,
            floor,
            last: start,
            total_bytes,
            ..RingState::default()
        };
        for batch in preload.batches {
            state.push(batch);
        }
        // Under the lock, so that a reader which has seen the change sees the number too.
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Notes that the stream cannot be read, perhaps for long.
    pub(crate) fn set_unreadable(&self) {
        self.is_unreadable.store(true, Ordering::Release);
    }

    /// Returns whether the ring has not begun, but will when the store is available.
    pub(crate) fn is_starting(&self) -> bool {
        !self.is_unreadable.load(Ordering::Acquire) && self.read().epoch.is_none()
    }

    /// Notes that the next entries of the stream are gone and were never read.
    pub(crate) fn mark_gap(&self) {
        self.write().has_gap_after_last = true;
    }

    /// Adds entries at the head, and removes the oldest ones beyond the capacity.
    pub(crate) fn push(&self, batch: FrameBatch) {
        let mut state = self.write();
        state.push(batch);
        while state.batches.len() > 1 && (state.bytes > self.limits.bytes || state.entries > self.limits.entries) {
            let Some(RingSlot { batch: oldest, .. }) = state.batches.pop_front() else { break };
            state.bytes -= oldest.size_bytes();
            state.entries -= oldest.len();
            state.floor = oldest.last();
        }
        // Under the lock, so that a reader which has seen the change sees the number too.
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Returns a number that grows with every change.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Returns the present state, or `None` before the ring has begun.
    pub(crate) fn snapshot(&self) -> Option<RingSnapshot> {
        let state = self.read();
        let epoch = state.epoch.clone()?;
        Some(RingSnapshot {
            generation: state.generation,
            epoch,
            start: state.start,
            floor: state.floor,
            last: state.last,
            total_bytes: state.total_bytes,
            bytes: state.bytes,
            entries: state.entries,
        })
    }

    /// Returns the batch with the first entry after `id`.
    pub(crate) fn after(&self, generation: u64, id: EntryId) -> Lookup {
        let state = self.read();
        if state.generation != generation {
            return Lookup::Restarted;
        }
        if id < state.floor {
            return Lookup::Behind;
        }
        let newest = state.batches.len().wrapping_sub(1);
        let is_passed = |index: usize| state.batches.get(index).is_none_or(|slot| slot.batch.last() <= id);
        if is_passed(newest) {
            return Lookup::Head;
        }
        // Most readers are at the head: they need the newest batch and no search.
        let index = if is_passed(newest.wrapping_sub(1)) {
            newest
        } else {
            state.batches.partition_point(|slot| slot.batch.last() <= id)
        };
        let RingSlot { batch, total_bytes } = &state.batches[index];
        Lookup::Batch(batch.clone(), *total_bytes, index == newest)
    }

    /// Returns the ids of the newest entries at or before `cut` that pass, at most `count`, newest first.
    ///
    /// Also returns the floor: older entries are in the store.
    pub(crate) fn newest(&self, cut: EntryId, filter: &Filter, count: usize) -> (Vec<EntryId>, EntryId) {
        // Not under the lock: a filter may read payloads, which takes time.
        let (batches, floor) = {
            let state = self.read();
            (state.batches.clone(), state.floor)
        };
        let found = batches.iter().rev().flat_map(|slot| slot.batch.newest(cut, filter)).take(count).collect();
        (found, floor)
    }

    fn read(&self) -> RwLockReadGuard<'_, RingState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, RingState> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::Entry;
    use crate::relay::log::frame_batch::testing::entry;

    fn ring(entries: usize) -> Ring {
        Ring::new("s".parse().expect("a name"), RingLimits { bytes: usize::MAX, entries })
    }

    fn batch(entries: &[Entry]) -> FrameBatch {
        let (stream, epoch) = ("s".parse().expect("a name"), "e".parse().expect("an epoch"));
        FrameBatch::frame(&stream, &epoch, entries, usize::MAX).batch
    }

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn begin(ring: &Ring, start: u64) {
        ring.begin("e".parse().expect("an epoch"), id(start), Preload::default());
    }

    #[test]
    fn ring_without_generation_has_no_snapshot() {
        let ring = ring(10);
        assert!(ring.snapshot().is_none());
        begin(&ring, 5);
        assert_eq!(ring.snapshot().map(|snapshot| (snapshot.floor, snapshot.last)), Some((id(5), id(5))));
    }

    #[test]
    fn new_generation_restarts_readers_of_the_old_one() {
        let ring = ring(10);
        begin(&ring, 5);
        ring.push(batch(&[entry(6, &[("data", "{}")])]));
        assert!(matches!(ring.after(1, id(5)), Lookup::Batch(..)));
        begin(&ring, 0);
        assert!(matches!(ring.after(1, id(5)), Lookup::Restarted));
        assert!(matches!(ring.after(2, id(0)), Lookup::Head));
    }

    #[test]
    fn byte_limit_spares_only_the_newest_batch() {
        let ring = Ring::new("s".parse().expect("a name"), RingLimits { bytes: 250, entries: 100 });
        begin(&ring, 0);
        let big = "x".repeat(100);
        for ms in 1..=10 {
            ring.push(batch(&[entry(ms, &[("data", &big)])]));
        }
        let snapshot = ring.snapshot().expect("begun");
        assert_eq!((snapshot.entries, snapshot.bytes, snapshot.floor), (2, 204, id(8)));
        ring.push(batch(&[entry(11, &[("data", &big.repeat(10))])]));
        let snapshot = ring.snapshot().expect("begun");
        assert_eq!((snapshot.entries, snapshot.floor), (1, id(10)));
        assert_eq!(snapshot.total_bytes, 10 * 102 + 1004);
    }

    #[test]
    fn newest_entries_are_found_up_to_the_cut() {
        let ring = ring(100);
        begin(&ring, 0);
        for first in [1, 4, 7] {
            ring.push(batch(&[first, first + 1, first + 2].map(|ms| entry(ms, &[("data", "{}")]))));
        }
        let (found, floor) = ring.newest(id(8), &Filter::default(), 4);
        assert_eq!((found, floor), ([8, 7, 6, 5].map(id).to_vec(), id(0)));
    }

    #[derive(Debug, Clone)]
    enum RingStep {
        Push(Vec<bool>),
        Read(usize),
    }

    fn step() -> impl Strategy<Value = RingStep> {
        prop_oneof![
            proptest::collection::vec(any::<bool>(), 1..6).prop_map(RingStep::Push),
            (0_usize..4).prop_map(RingStep::Read),
        ]
    }

    proptest! {
        /// Readers at any pace see every sendable entry once and in order, or learn the exact bounds of the gap.
        #[test]
        fn readers_miss_no_entry_without_a_reported_gap(
            limit in 1_usize..20,
            steps in proptest::collection::vec(step(), 1..120),
        ) {
            let ring = ring(limit);
            begin(&ring, 100);
            let mut model: Vec<EntryId> = Vec::new();
            let mut next_ms = 101;
            let mut readers = [id(100); 4];
            for step in steps {
                match step {
                    RingStep::Push(kinds) => {
                        let entries: Vec<Entry> = kinds
                            .iter()
                            .map(|is_text| {
                                next_ms += 1;
                                entry(next_ms, &[(if *is_text { "data" } else { "other" }, "{}")])
                            })
                            .collect();
                        model.extend(entries.iter().zip(&kinds).filter(|(_, is_text)| **is_text).map(|(e, _)| e.id));
                        ring.push(batch(&entries));
                    }
                    RingStep::Read(reader) => {
                        let after = &mut readers[reader];
                        let expected = model.iter().find(|id| **id > *after);
                        match ring.after(1, *after) {
                            Lookup::Head => prop_assert_eq!(expected, None),
                            Lookup::Batch(batch, ..) => {
                                let first = batch.first_after(*after);
                                prop_assert_eq!(expected, Some(&batch.id(first)));
                                *after = batch.last();
                            }
                            Lookup::Behind => {
                                let floor = ring.snapshot().expect("begun").floor;
                                prop_assert!(*after < floor);
                                *after = floor;
                            }
                            Lookup::Restarted => prop_assert!(false, "no restart happened"),
                        }
                    }
                }
                let snapshot = ring.snapshot().expect("begun");
                let slot = model.iter().filter(|id| **id > snapshot.floor).count();
                prop_assert_eq!(slot, snapshot.entries);
            }
        }
    }
}
