//! The recent entries of one stream, framed once and shared by every client.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::event::Filter;
use crate::event::{EntryId, Epoch, StreamName};
use crate::relay::log::frame_batch::Batch;
use crate::relay::log::page_cache::Shelf;

/// How much a ring keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of plain frames. The variant with positions, where a client asks for it, comes on top.
    pub(crate) bytes: usize,
    /// Entries.
    pub(crate) entries: usize,
}

/// A bounded log of batches. It has every entry after its `floor` up to its `last`, or knows that it can't be sent, or
/// that it was gone before it could be read.
#[derive(Debug)]
pub(crate) struct Ring {
    stream: StreamName,
    limits: Limits,
    state: RwLock<State>,
    /// What was read of the store before the floor.
    shelf: Shelf,
    /// Whether the stream can't be read, for a reason that concerns it alone.
    is_unreadable: AtomicBool,
    /// Grows with every change, so that readers see without the lock whether there is news.
    changes: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Which life of the stream this is; 0 until the first has begun.
    generation: u64,
    epoch: Option<Epoch>,
    start: EntryId,
    floor: EntryId,
    last: EntryId,
    batches: VecDeque<Held>,
    bytes: usize,
    entries: usize,
    total_bytes: u64,
    /// Whether entries between `last` and the next one are gone.
    is_torn: bool,
}

impl State {
    fn push(&mut self, mut batch: Batch) {
        self.last = self.last.max(batch.last());
        if batch.len() > 0 {
            if std::mem::take(&mut self.is_torn) {
                batch.tear_off();
            }
            self.bytes += batch.size_bytes();
            self.entries += batch.len();
            self.total_bytes += batch.size_bytes() as u64;
            self.batches.push_back(Held { batch: Arc::new(batch), total_bytes: self.total_bytes });
        }
    }
}

/// What a ring begins with: everything after the floor.
#[derive(Debug, Default)]
pub(crate) struct Past {
    /// Nothing where there are no batches.
    pub(crate) floor: Option<EntryId>,
    /// In the order of the stream.
    pub(crate) batches: VecDeque<Batch>,
}

/// One batch, and the total of bytes up to its end.
#[derive(Debug, Clone)]
struct Held {
    batch: Arc<Batch>,
    total_bytes: u64,
}

/// A ring as it was at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    /// Which life of the stream.
    pub(crate) generation: u64,
    /// The name of that life.
    pub(crate) epoch: Epoch,
    /// After which entry this life begins for readers of an earlier one.
    pub(crate) start: EntryId,
    /// Everything after this entry was in the ring.
    pub(crate) floor: EntryId,
    /// The newest entry passed.
    pub(crate) last: EntryId,
    /// Bytes of plain frames that ever went in.
    pub(crate) total_bytes: u64,
    /// Bytes of plain frames held.
    pub(crate) bytes: usize,
    /// Entries held.
    pub(crate) entries: usize,
}

/// What a ring has for a reader.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// The batch with the next entry, the total of bytes up to its end, and whether it is the newest.
    Batch(Arc<Batch>, u64, bool),
    /// Nothing yet.
    Head,
    /// The next entries have left the ring.
    Behind,
    /// The stream has begun a new life.
    Restarted,
}

impl Ring {
    /// An empty ring that has not begun.
    pub(crate) fn new(stream: StreamName, limits: Limits) -> Self {
        Self {
            stream,
            limits,
            state: RwLock::default(),
            shelf: Shelf::new(limits.bytes / 2),
            is_unreadable: AtomicBool::new(false),
            changes: AtomicU64::new(0),
        }
    }

    /// The stream.
    pub(crate) fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// How much it keeps.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Pages of what has left it.
    pub(crate) fn shelf(&self) -> &Shelf {
        &self.shelf
    }

    /// Begins a life of the stream: entries after `start` will come, and of those before it there are `past`.
    pub(crate) fn begin(&self, epoch: Epoch, start: EntryId, past: Past) {
        let mut state = self.write();
        let (generation, total_bytes) = (state.generation + 1, state.total_bytes);
        let floor = past.floor.unwrap_or(start);
        *state = State { generation, epoch: Some(epoch), start, floor, last: start, total_bytes, ..State::default() };
        for batch in past.batches {
            state.push(batch);
        }
        // Still under the lock: whoever has seen the change sees the number too.
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Tells that the stream can't be read, and that this may stay so.
    pub(crate) fn set_unreadable(&self) {
        self.is_unreadable.store(true, Ordering::Release);
    }

    /// Whether the ring has not begun, but will as soon as the store is there.
    pub(crate) fn is_starting(&self) -> bool {
        !self.is_unreadable.load(Ordering::Acquire) && self.read().epoch.is_none()
    }

    /// Tells that entries which come next in the stream are gone, and were never read.
    pub(crate) fn tear(&self) {
        self.write().is_torn = true;
    }

    /// Adds entries at the head, and lets go of the oldest ones that are too many now.
    pub(crate) fn push(&self, batch: Batch) {
        let mut state = self.write();
        state.push(batch);
        while state.batches.len() > 1 && (state.bytes > self.limits.bytes || state.entries > self.limits.entries) {
            let Some(Held { batch: oldest, .. }) = state.batches.pop_front() else { break };
            state.bytes -= oldest.size_bytes();
            state.entries -= oldest.len();
            state.floor = oldest.last();
        }
        // Still under the lock: whoever has seen the change sees the number too.
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// A number that is different after every change.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// How the ring is now; nothing before it has begun.
    pub(crate) fn mark(&self) -> Option<Mark> {
        let state = self.read();
        let epoch = state.epoch.clone()?;
        Some(Mark {
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

    /// The batch with the first entry after `id`.
    pub(crate) fn after(&self, generation: u64, id: EntryId) -> Lookup {
        let state = self.read();
        if state.generation != generation {
            return Lookup::Restarted;
        }
        if id < state.floor {
            return Lookup::Behind;
        }
        let newest = state.batches.len().wrapping_sub(1);
        let is_passed = |index: usize| state.batches.get(index).is_none_or(|held| held.batch.last() <= id);
        if is_passed(newest) {
            return Lookup::Head;
        }
        // Readers at the head are the rule: they need the newest batch and no search.
        let index = if is_passed(newest.wrapping_sub(1)) {
            newest
        } else {
            state.batches.partition_point(|held| held.batch.last() <= id)
        };
        let Held { batch, total_bytes } = &state.batches[index];
        Lookup::Batch(batch.clone(), *total_bytes, index == newest)
    }

    /// The ids of the newest entries at or before `cut` that pass, at most `count`, newest first, and the floor: older
    /// ones are in the store.
    pub(crate) fn newest(&self, cut: EntryId, filter: &Filter, count: usize) -> (Vec<EntryId>, EntryId) {
        // Reading payloads for a filter takes its time: not under the lock.
        let (batches, floor) = {
            let state = self.read();
            (state.batches.clone(), state.floor)
        };
        let found = batches.iter().rev().flat_map(|held| held.batch.newest(cut, filter)).take(count).collect();
        (found, floor)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
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
        Ring::new("s".parse().expect("a name"), Limits { bytes: usize::MAX, entries })
    }

    fn batch(entries: &[Entry]) -> Batch {
        let (stream, epoch) = ("s".parse().expect("a name"), "e".parse().expect("an epoch"));
        Batch::frame(&stream, &epoch, entries, usize::MAX).batch
    }

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn begin(ring: &Ring, start: u64) {
        ring.begin("e".parse().expect("an epoch"), id(start), Past::default());
    }

    #[test]
    fn a_ring_that_has_not_begun_has_no_mark() {
        let ring = ring(10);
        assert!(ring.mark().is_none());
        begin(&ring, 5);
        assert_eq!(ring.mark().map(|mark| (mark.floor, mark.last)), Some((id(5), id(5))));
    }

    #[test]
    fn a_new_life_is_told_to_readers_of_the_old_one() {
        let ring = ring(10);
        begin(&ring, 5);
        ring.push(batch(&[entry(6, &[("data", "{}")])]));
        assert!(matches!(ring.after(1, id(5)), Lookup::Batch(..)));
        begin(&ring, 0);
        assert!(matches!(ring.after(1, id(5)), Lookup::Restarted));
        assert!(matches!(ring.after(2, id(0)), Lookup::Head));
    }

    #[test]
    fn the_byte_limit_holds_but_for_the_newest_batch() {
        let ring = Ring::new("s".parse().expect("a name"), Limits { bytes: 250, entries: 100 });
        begin(&ring, 0);
        let big = "x".repeat(100);
        for ms in 1..=10 {
            ring.push(batch(&[entry(ms, &[("data", &big)])]));
        }
        let mark = ring.mark().expect("begun");
        assert_eq!((mark.entries, mark.bytes, mark.floor), (2, 204, id(8)));
        ring.push(batch(&[entry(11, &[("data", &big.repeat(10))])]));
        let mark = ring.mark().expect("begun");
        assert_eq!((mark.entries, mark.floor), (1, id(10)));
        assert_eq!(mark.total_bytes, 10 * 102 + 1004);
    }

    #[test]
    fn the_newest_are_found_up_to_the_cut() {
        let ring = ring(100);
        begin(&ring, 0);
        for first in [1, 4, 7] {
            ring.push(batch(&[first, first + 1, first + 2].map(|ms| entry(ms, &[("data", "{}")]))));
        }
        let (found, floor) = ring.newest(id(8), &Filter::default(), 4);
        assert_eq!((found, floor), ([8, 7, 6, 5].map(id).to_vec(), id(0)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(Vec<bool>),
        Read(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            proptest::collection::vec(any::<bool>(), 1..6).prop_map(Step::Push),
            (0_usize..4).prop_map(Step::Read),
        ]
    }

    proptest! {
        /// Readers at their own pace see every sendable entry once and in order, or are told exactly from where on.
        #[test]
        fn readers_miss_nothing_that_the_ring_does_not_name(
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
                    Step::Push(kinds) => {
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
                    Step::Read(reader) => {
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
                                let floor = ring.mark().expect("begun").floor;
                                prop_assert!(*after < floor);
                                *after = floor;
                            }
                            Lookup::Restarted => prop_assert!(false, "no restart happened"),
                        }
                    }
                }
                let mark = ring.mark().expect("begun");
                let held = model.iter().filter(|id| **id > mark.floor).count();
                prop_assert_eq!(held, mark.entries);
            }
        }
    }
}
