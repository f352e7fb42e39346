//! What is known in memory of one stream's committed entries: a reference per chunk, and the newest chunks themselves.
//!
//! Only the writer changes it, after each commit; readers look at it for as long as it takes to copy references out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::event::{EntryId, StreamName};
use crate::store::embedded::disk::chunk::{Chunk, Head};
use crate::store::{Order, Range};

/// Where a chunk is, and what it must say of itself when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRef {
    /// Its row.
    pub(crate) row: i64,
    pub(crate) head: Head,
    /// How many entries were discarded from it and, since the chunk before, wholly in front of it.
    pub(crate) holes: u64,
    /// Its size.
    pub(crate) bytes: u32,
    /// Whether it is known to be missing or unreadable.
    pub(crate) is_damaged: bool,
}

/// The part of a stream that its readers share.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) name: StreamName,
    /// The greatest id that readers may see; changes wake them.
    pub(crate) newest: watch::Sender<EntryId>,
    log: Mutex<Log>,
}

impl Published {
    pub(crate) fn new(name: StreamName, newest: EntryId, chunks: VecDeque<ChunkRef>) -> Self {
        let log = Log { chunks, recent: VecDeque::new(), recent_after: newest };
        Self { name, newest: watch::Sender::new(newest), log: Mutex::new(log) }
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Published`].
#[derive(Debug)]
pub(crate) struct Log {
    /// Oldest first; their ranges of ids do not overlap.
    pub(crate) chunks: VecDeque<ChunkRef>,
    /// The newest chunks as they were appended, oldest first.
    recent: VecDeque<Chunk>,
    /// Every entry after this one is in `recent`.
    recent_after: EntryId,
}

/// Where the entries of a range are to be found.
#[derive(Debug)]
pub(crate) enum Found {
    /// In memory, in the order of the range.
    Recent(Vec<Chunk>),
    /// In these rows, in the order of the range; more may follow where `is_all` is false.
    Rows { chunks: Vec<ChunkRef>, is_all: bool },
}

/// The most chunks that one search names, so that a reader takes a large range in steps.
const MAX_CHUNKS: usize = 256;

impl Log {
    /// The chunks that hold the first `limit` entries of a range.
    pub(crate) fn find(&self, range: Range, limit: usize) -> Found {
        match self.find_recent(range, limit) {
            Some(chunks) => Found::Recent(chunks),
            None => self.find_rows(range, limit),
        }
    }

    fn find_recent(&self, range: Range, limit: usize) -> Option<Vec<Chunk>> {
        let is_recent = range.from > self.recent_after;
        let start = self.recent.partition_point(|chunk| chunk.head.last < range.from);
        let end = self.recent.partition_point(|chunk| chunk.head.first <= range.to).max(start);
        let chunks = self.recent.range(start..end);
        match range.order {
            Order::Forward => is_recent.then(|| enough(chunks, |chunk| chunk.head, limit).0),
            Order::Backward => {
                let (chunks, is_enough) = enough(chunks.rev(), |chunk| chunk.head, limit);
                (is_recent || is_enough).then_some(chunks)
            }
        }
    }

    fn find_rows(&self, range: Range, limit: usize) -> Found {
        let start = self.chunks.partition_point(|chunk| chunk.head.last < range.from);
        let end = self.chunks.partition_point(|chunk| chunk.head.first <= range.to).max(start);
        let found = end - start;
        let chunks = self.chunks.range(start..end);
        let (mut chunks, is_enough) = match range.order {
            Order::Forward => enough(chunks, |chunk| chunk.head, limit),
            Order::Backward => enough(chunks.rev(), |chunk| chunk.head, limit),
        };
        chunks.truncate(MAX_CHUNKS);
        let is_all = chunks.len() == found || (is_enough && chunks.len() < MAX_CHUNKS);
        Found::Rows { chunks, is_all }
    }

    /// The place of the chunk whose range holds this id.
    pub(crate) fn place_of(&self, id: EntryId) -> Option<usize> {
        let place = self.chunks.partition_point(|chunk| chunk.head.last < id);
        self.chunks.get(place).filter(|chunk| chunk.head.first <= id).map(|_chunk| place)
    }

    /// The chunk whose range holds this id.
    pub(crate) fn chunk_of(&self, id: EntryId) -> Option<ChunkRef> {
        self.place_of(id).map(|place| self.chunks[place])
    }

    /// The chunk in memory that holds this id, if the id is recent.
    pub(crate) fn recent_of(&self, id: EntryId) -> Option<&Chunk> {
        let place = self.recent.partition_point(|chunk| chunk.head.last < id);
        self.recent.get(place).filter(|chunk| chunk.head.first <= id)
    }

    /// Adds a chunk at the end.
    pub(crate) fn push(&mut self, row: i64, chunk: Chunk, holes: u64) {
        let bytes = u32::try_from(chunk.body().len()).unwrap_or(u32::MAX);
        self.chunks.push_back(ChunkRef { row, head: chunk.head, holes, bytes, is_damaged: false });
        self.recent.push_back(chunk);
    }

    /// The oldest entry in memory, if there is one.
    pub(crate) fn first_recent(&self) -> Option<EntryId> {
        self.recent.front().map(|chunk| chunk.head.first)
    }

    /// Lets go of the oldest chunk in memory; says how many bytes that frees.
    pub(crate) fn forget_oldest(&mut self) -> usize {
        let Some(chunk) = self.recent.pop_front() else { return 0 };
        self.recent_after = self.recent_after.max(chunk.head.last);
        chunk.body().len()
    }

    /// Removes the oldest `count` chunks; says how many bytes of memory that frees.
    pub(crate) fn remove_oldest(&mut self, count: usize) -> usize {
        self.chunks.drain(..count);
        let oldest = self.chunks.front().map(|chunk| chunk.head.first);
        let mut freed = 0;
        while self.recent.front().is_some_and(|chunk| oldest.is_none_or(|oldest| chunk.head.last < oldest)) {
            freed += self.forget_oldest();
        }
        freed
    }

    /// Puts other chunks in the place of some that follow each other; the entries in memory stay.
    pub(crate) fn replace(&mut self, places: std::ops::Range<usize>, with: Vec<ChunkRef>) {
        let behind = self.chunks.split_off(places.end);
        self.chunks.truncate(places.start);
        self.chunks.extend(with);
        self.chunks.extend(behind);
    }

    /// Removes entries from the chunks in memory; says how many bytes that frees.
    pub(crate) fn forget(&mut self, is_gone: impl Fn(EntryId) -> bool + Copy) -> usize {
        let mut freed = 0;
        let recent = std::mem::take(&mut self.recent);
        for chunk in recent {
            if !chunk.slots().any(|slot| slot.is_ok_and(|slot| is_gone(slot.id))) {
                self.recent.push_back(chunk);
                continue;
            }
            freed += chunk.body().len();
            if let Some(left) = chunk.without(is_gone).expect("chunks in memory were built here") {
                freed -= left.body().len();
                self.recent.push_back(left);
            }
        }
        freed
    }

    /// How many entries come after this one, and the chunk that has to be looked into for those that are not counted:
    /// the one that holds the id.
    pub(crate) fn count_after(&self, id: EntryId) -> (u64, Option<ChunkRef>) {
        let place = self.chunks.partition_point(|chunk| chunk.head.first <= id);
        let behind = self.chunks.range(place..).map(|chunk| u64::from(chunk.head.count)).sum();
        let holding = place.checked_sub(1).and_then(|place| self.chunks.get(place)).copied();
        (behind, holding.filter(|chunk| id < chunk.head.last))
    }
}

/// The first chunks that have `limit` entries whatever part of the first one counts, and whether that many were found.
fn enough<'a, C: Clone + 'a>(
    chunks: impl Iterator<Item = &'a C>,
    head: impl Fn(&C) -> Head,
    limit: usize,
) -> (Vec<C>, bool) {
    let (mut taken, mut entries) = (Vec::new(), 0);
    for chunk in chunks {
        if entries >= limit {
            return (taken, true);
        }
        // Of the first chunk, all but one entry may be outside of the range.
        entries += if taken.is_empty() { 1 } else { head(chunk).count as usize };
        taken.push(chunk.clone());
    }
    (taken, entries >= limit)
}

/// Which streams have chunks in memory, in the order in which they came, to let go of the oldest first.
#[derive(Debug)]
pub(crate) struct Recent {
    max_bytes: usize,
    bytes: usize,
    /// Each chunk's stream and last entry. Those that a trim let go of are left here until there are too many.
    order: VecDeque<(Arc<Published>, EntryId)>,
    compact_at: usize,
}

/// Chunks below which it is not worth looking for those that a trim let go of.
const COMPACT_AT_LEAST: usize = 1024;

impl Recent {
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, bytes: 0, order: VecDeque::new(), compact_at: COMPACT_AT_LEAST }
    }

    pub(crate) fn add(&mut self, published: &Arc<Published>, last: EntryId, bytes: usize) {
        let is_kept = |(stream, last): &(Arc<Published>, EntryId)| {
            stream.log().first_recent().is_some_and(|first| first <= *last)
        };
        self.bytes += bytes;
        self.order.push_back((published.clone(), last));
        while self.bytes > self.max_bytes {
            let Some(oldest) = self.order.pop_front() else { return };
            if is_kept(&oldest) {
                let freed = oldest.0.log().forget_oldest();
                self.bytes = self.bytes.saturating_sub(freed);
            }
        }
        if self.order.len() >= self.compact_at {
            self.order.retain(is_kept);
            self.compact_at = (self.order.len() * 2).max(COMPACT_AT_LEAST);
        }
    }

    /// Accounts for chunks that a trim let go of.
    pub(crate) fn freed(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_trims_let_go_of_is_not_remembered_for_ever() {
        let stream = "aurora:alerts".parse().expect("a name");
        let published = Arc::new(Published::new(stream, EntryId::MIN, VecDeque::new()));
        let mut recent = Recent::new(usize::MAX);
        for n in 1..10_000 {
            recent.add(&published, EntryId::new(n, 0), 1);
            recent.freed(1);
        }
        assert!(recent.order.len() <= COMPACT_AT_LEAST, "{} chunks", recent.order.len());
    }
}
