//! The in-memory index of one stream's committed entries: a reference per chunk, and the newest chunks themselves.
//!
//! Only the writer changes it, after each commit. Readers lock it only while they copy references.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::event::{EntryId, StreamName};
use crate::store::embedded::disk::chunk::{Chunk, ChunkHead};
use crate::store::{Order, Range};

/// The row of a chunk, and the header that it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRef {
    /// Its row.
    pub(crate) row: i64,
    pub(crate) head: ChunkHead,
    /// The number of entries discarded from it, and from removed chunks between the previous chunk and this one.
    pub(crate) holes: u64,
    /// Its size.
    pub(crate) bytes: u32,
    /// Whether it is missing or unreadable.
    pub(crate) is_damaged: bool,
}

/// The state of a stream that is visible to readers.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) name: StreamName,
    /// The greatest id visible to readers. A change wakes them.
    pub(crate) newest: watch::Sender<EntryId>,
    log: Mutex<ChunkIndex>,
}

impl Published {
    pub(crate) fn new(name: StreamName, newest: EntryId, chunks: VecDeque<ChunkRef>) -> Self {
        let log = ChunkIndex { chunks, recent: VecDeque::new(), recent_after: newest };
        Self { name, newest: watch::Sender::new(newest), log: Mutex::new(log) }
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, ChunkIndex> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The chunks of a [`Published`] stream.
#[derive(Debug)]
pub(crate) struct ChunkIndex {
    /// Oldest first; their ranges of ids do not overlap.
    pub(crate) chunks: VecDeque<ChunkRef>,
    /// The newest chunks as they were appended, oldest first.
    recent: VecDeque<Chunk>,
    /// All entries after this id are in `recent`.
    recent_after: EntryId,
}

/// The location of the entries of a range.
#[derive(Debug)]
pub(crate) enum ChunkLocation {
    /// In memory, in the order of the range.
    Recent(Vec<Chunk>),
    /// In these rows, in the order of the range. More may follow if `is_all` is false.
    Rows { chunks: Vec<ChunkRef>, is_all: bool },
}

/// The maximum number of chunks returned by one search. A reader reads a large range in steps.
const MAX_CHUNKS: usize = 256;

impl ChunkIndex {
    /// Returns the chunks with the first `limit` entries of a range.
    pub(crate) fn find(&self, range: Range, limit: usize) -> ChunkLocation {
        match self.find_recent(range, limit) {
            Some(chunks) => ChunkLocation::Recent(chunks),
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

    fn find_rows(&self, range: Range, limit: usize) -> ChunkLocation {
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
        ChunkLocation::Rows { chunks, is_all }
    }

    /// Returns the position of the chunk whose range contains this id.
    pub(crate) fn place_of(&self, id: EntryId) -> Option<usize> {
        let place = self.chunks.partition_point(|chunk| chunk.head.last < id);
        self.chunks.get(place).filter(|chunk| chunk.head.first <= id).map(|_chunk| place)
    }

    /// Returns the chunk whose range contains this id.
    pub(crate) fn chunk_of(&self, id: EntryId) -> Option<ChunkRef> {
        self.place_of(id).map(|place| self.chunks[place])
    }

    /// Returns the chunk in memory that contains this id, if the id is recent.
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

    /// Returns the oldest entry in memory, if any.
    pub(crate) fn first_recent(&self) -> Option<EntryId> {
        self.recent.front().map(|chunk| chunk.head.first)
    }

    /// Removes the oldest chunk from memory. Returns the freed bytes.
    pub(crate) fn forget_oldest(&mut self) -> usize {
        let Some(chunk) = self.recent.pop_front() else { return 0 };
        self.recent_after = self.recent_after.max(chunk.head.last);
        chunk.body().len()
    }

    /// Removes the oldest `count` chunks. Returns the freed bytes of memory.
    pub(crate) fn remove_oldest(&mut self, count: usize) -> usize {
        self.chunks.drain(..count);
        let oldest = self.chunks.front().map(|chunk| chunk.head.first);
        let mut freed = 0;
        while self.recent.front().is_some_and(|chunk| oldest.is_none_or(|oldest| chunk.head.last < oldest)) {
            freed += self.forget_oldest();
        }
        freed
    }

    /// Replaces a run of chunks by others. The entries in memory stay.
    pub(crate) fn replace(&mut self, places: std::ops::Range<usize>, with: Vec<ChunkRef>) {
        let behind = self.chunks.split_off(places.end);
        self.chunks.truncate(places.start);
        self.chunks.extend(with);
        self.chunks.extend(behind);
    }

    /// Removes entries from the chunks in memory. Returns the freed bytes.
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

    /// Returns how many entries come after this one, and the chunk that contains the id, whose entries are not counted.
    pub(crate) fn count_after(&self, id: EntryId) -> (u64, Option<ChunkRef>) {
        let place = self.chunks.partition_point(|chunk| chunk.head.first <= id);
        let behind = self.chunks.range(place..).map(|chunk| u64::from(chunk.head.count)).sum();
        let holding = place.checked_sub(1).and_then(|place| self.chunks.get(place)).copied();
        (behind, holding.filter(|chunk| id < chunk.head.last))
    }
}

/// Returns the first chunks that are certain to hold `limit` entries of a range, and whether there were enough.
fn enough<'a, C: Clone + 'a>(
    chunks: impl Iterator<Item = &'a C>,
    head: impl Fn(&C) -> ChunkHead,
    limit: usize,
) -> (Vec<C>, bool) {
    let (mut taken, mut entries) = (Vec::new(), 0);
    for chunk in chunks {
        if entries >= limit {
            return (taken, true);
        }
        // All but one entry of the first chunk may be outside of the range.
        entries += if taken.is_empty() { 1 } else { head(chunk).count as usize };
        taken.push(chunk.clone());
    }
    (taken, entries >= limit)
}

/// The chunks in memory of all streams, in order of arrival, so that the oldest are removed first.
#[derive(Debug)]
pub(crate) struct RecentChunks {
    max_bytes: usize,
    bytes: usize,
    /// The stream and last entry of each chunk. Trimmed chunks stay here until there are too many.
    order: VecDeque<(Arc<Published>, EntryId)>,
    compact_at: usize,
}

/// The number of chunks below which trimmed ones are not searched for.
const COMPACT_AT_LEAST: usize = 1024;

impl RecentChunks {
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

    /// Subtracts the bytes of chunks that a trim removed.
    pub(crate) fn freed(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trimmed_chunks_are_forgotten_in_time() {
        let stream = "aurora:alerts".parse().expect("a name");
        let published = Arc::new(Published::new(stream, EntryId::MIN, VecDeque::new()));
        let mut recent = RecentChunks::new(usize::MAX);
        for n in 1..10_000 {
            recent.add(&published, EntryId::new(n, 0), 1);
            recent.freed(1);
        }
        assert!(recent.order.len() <= COMPACT_AT_LEAST, "{} chunks", recent.order.len());
    }
}
