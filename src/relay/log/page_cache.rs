//! A cache of pages of one stream, which clients that catch up share.
//!
//! After a restart or a network outage, thousands of clients miss the same entries and resume from about the same
//! positions. The first client at a position reads a page around it. Clients that need the same page meanwhile wait
//! for that read, and later clients find the page. At its end all of them have the same position, so that from there
//! on one read serves all.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::time::Instant;

use crate::event::EntryId;
use crate::relay::log::frame_batch::FrameBatch;
use crate::relay::log::page_size::PageSize;
use crate::store::StoreError;

/// A page that was not used for this time is removed.
const IDLE_LIMIT: Duration = Duration::from_secs(30);

/// The approximate memory of an entry besides its frame, in bytes.
const ENTRY_BYTES: usize = 256;

/// A run of entries as they were in the store.
#[derive(Debug)]
pub(crate) struct EntryPage {
    /// The page has all entries after this one, up to the last of its batch.
    pub(crate) after: EntryId,
    /// The entries, without those that cannot be sent.
    pub(crate) batch: Arc<FrameBatch>,
    /// The start of the stream, if the read of the page has reached it.
    pub(crate) stream_start: Option<StreamStart>,
}

/// The start of a stream at the time of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamStart {
    /// The oldest entry, or `None` if there was none up to the end of the page.
    pub(crate) oldest: Option<EntryId>,
    /// Whether entries were ever removed or lost. Known only in pages that go back to [`EntryId::MIN`].
    pub(crate) has_lost_entries: bool,
}

impl EntryPage {
    /// Returns whether entries after `id` are gone.
    ///
    /// Trimming removes the oldest entries, so the oldest one that is left decides. If `id` itself was the last one
    /// trimmed, the result is true although no entry after it is gone.
    pub(crate) fn is_trimmed_after(&self, id: EntryId) -> bool {
        let is_gone = |stream_start: StreamStart| {
            stream_start.oldest.is_none_or(|oldest| id < oldest) && (id > EntryId::MIN || stream_start.has_lost_entries)
        };
        self.stream_start.is_some_and(is_gone)
    }

    fn cost(&self) -> usize {
        self.batch.size_bytes() + (self.batch.len() + 1) * ENTRY_BYTES
    }
}

/// The entries that a reader needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum PageRequest {
    /// The entries after this one.
    After(EntryId),
    /// The entries up to this one.
    UpTo(EntryId),
}

/// The result of a read, for all that wait for it: no page if the stream has a new generation meanwhile.
pub(crate) type PageResult = Result<Option<Arc<EntryPage>>, Arc<StoreError>>;

type PageRead = BoxFuture<'static, PageResult>;

/// The result of a lookup in the cache.
#[derive(Debug)]
pub(crate) enum CacheLookup {
    /// A page.
    Hit(Arc<EntryPage>),
    /// A read in progress that other clients wait for too. It ends when no client waits any more.
    InProgress(Shared<PageRead>),
    /// A read that has just started.
    Started(Shared<PageRead>),
}

/// Pages, of which the least recently used are removed first, and reads in progress.
#[derive(Debug)]
pub(crate) struct PageCache {
    max_bytes: usize,
    state: Mutex<PageCacheState>,
}

#[derive(Debug, Default)]
struct PageCacheState {
    /// The generation of the ring that all pages belong to.
    generation: u64,
    /// By `after`. Two pages of concurrent reads may overlap, which costs only memory.
    pages: BTreeMap<EntryId, CachedPage>,
    bytes: usize,
    reads: HashMap<PageRequest, WeakShared<PageRead>>,
    size: PageSize,
}

#[derive(Debug)]
struct CachedPage {
    page: Arc<EntryPage>,
    used: Instant,
}

impl PageCache {
    /// Creates an empty cache for about this many bytes, or one page.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: Mutex::default() }
    }

    /// Returns the page that a reader in this generation needs, or the read that brings it.
    pub(crate) fn lookup(
        &self,
        generation: u64,
        request: PageRequest,
        start_read: impl FnOnce() -> PageRead,
    ) -> CacheLookup {
        let mut state = self.lock();
        state.start_generation(generation);
        if let Some(page) = state.find(generation, request) {
            return CacheLookup::Hit(page);
        }
        if state.generation == generation
            && let Some(read) = state.reads.get(&request).and_then(WeakShared::upgrade)
        {
            return CacheLookup::InProgress(read);
        }
        let read = start_read().shared();
        state.reads.retain(|_, read| read.upgrade().is_some());
        if let Some(weak) = read.downgrade().filter(|_| state.generation == generation) {
            state.reads.insert(request, weak);
        }
        CacheLookup::Started(read)
    }

    /// Returns the page that a reader in this generation needs, if it is in the cache.
    pub(crate) fn find(&self, generation: u64, request: PageRequest) -> Option<Arc<EntryPage>> {
        self.lock().find(generation, request)
    }

    /// Returns the end of the page before `id` and the start of the page behind it. No page has `id` itself.
    pub(crate) fn neighbors(&self, generation: u64, id: EntryId) -> (EntryId, EntryId) {
        let state = self.lock();
        if state.generation != generation {
            return (EntryId::MIN, EntryId::MAX);
        }
        let before = state.pages.range(..=id).next_back().map(|(_, cached)| cached.page.batch.last());
        let behind = state.pages.range(id..).map(|(after, _)| *after).find(|after| *after > id);
        (before.filter(|last| *last <= id).unwrap_or(EntryId::MIN), behind.unwrap_or(EntryId::MAX))
    }

    /// Adds a page that was read in this generation.
    pub(crate) fn insert(&self, generation: u64, page: &Arc<EntryPage>) {
        let mut state = self.lock();
        if state.generation != generation || page.batch.last() <= page.after {
            return;
        }
        let is_shorter = |cached: &CachedPage| cached.page.batch.last() < page.batch.last();
        if state.pages.get(&page.after).is_none_or(is_shorter) {
            state.bytes += page.cost();
            let cached = CachedPage { page: page.clone(), used: Instant::now() };
            if let Some(replaced) = state.pages.insert(page.after, cached) {
                state.bytes -= replaced.page.cost();
            }
        }
        while state.bytes > self.max_bytes && state.pages.len() > 1 {
            let oldest = state.pages.iter().min_by_key(|(_, cached)| cached.used).map(|(after, _)| *after);
            state.remove(oldest);
        }
    }

    /// Removes pages that were not used for a while.
    pub(crate) fn evict_idle(&self) {
        let mut state = self.lock();
        let is_stale = |cached: &CachedPage| cached.used.elapsed() > IDLE_LIMIT;
        let stale: Vec<EntryId> =
            state.pages.iter().filter(|(_, cached)| is_stale(cached)).map(|(after, _)| *after).collect();
        for after in stale {
            state.remove(Some(after));
        }
    }

    /// Returns the number of entries to read at a time.
    pub(crate) fn page_size(&self) -> PageSize {
        self.lock().size
    }

    /// Sets the number of entries to read at a time.
    pub(crate) fn set_page_size(&self, size: PageSize) {
        self.lock().size = size;
    }

    fn lock(&self) -> MutexGuard<'_, PageCacheState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageCacheState {
    /// Removes the pages of earlier generations.
    fn start_generation(&mut self, generation: u64) {
        if generation > self.generation {
            *self = Self { generation, ..Self::default() };
        }
    }

    fn find(&mut self, generation: u64, request: PageRequest) -> Option<Arc<EntryPage>> {
        if self.generation != generation {
            return None;
        }
        let (_, cached) = match request {
            PageRequest::After(id) => {
                self.pages.range_mut(..=id).next_back().filter(|(_, cached)| cached.page.batch.last() > id)
            }
            PageRequest::UpTo(id) => {
                self.pages.range_mut(..id).next_back().filter(|(_, cached)| cached.page.batch.last() >= id)
            }
        }?;
        cached.used = Instant::now();
        Some(cached.page.clone())
    }

    fn remove(&mut self, after: Option<EntryId>) {
        if let Some(cached) = after.and_then(|after| self.pages.remove(&after)) {
            self.bytes -= cached.page.cost();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Entry;
    use crate::relay::log::frame_batch::testing::entry;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    /// Creates a page with the entries after one number up to another.
    fn page(after: u64, last: u64) -> Arc<EntryPage> {
        let entries: Vec<Entry> = (after + 1..=last).map(|ms| entry(ms, &[("data", "{}")])).collect();
        let (stream, epoch) = ("s".parse().expect("a name"), "e".parse().expect("an epoch"));
        let mut batch = FrameBatch::frame(&stream, &epoch, &entries, usize::MAX).batch;
        batch.extend_to(id(last));
        Arc::new(EntryPage { after: id(after), batch: Arc::new(batch), stream_start: None })
    }

    fn page_cache(pages: &[(u64, u64)], max_bytes: usize) -> PageCache {
        let page_cache = PageCache::new(max_bytes);
        page_cache.lock().start_generation(1);
        for (after, last) in pages {
            page_cache.insert(1, &page(*after, *last));
        }
        page_cache
    }

    fn found(page_cache: &PageCache, request: PageRequest) -> Option<(u64, u64)> {
        page_cache.find(1, request).map(|page| (page.after.ms, page.batch.last().ms))
    }

    #[test]
    fn page_serves_every_position_within_it() {
        let page_cache = page_cache(&[(10, 20), (20, 30), (40, 50)], usize::MAX);
        let cases = [(9, None), (10, Some((10, 20))), (19, Some((10, 20))), (20, Some((20, 30))), (30, None)];
        for (after, expected) in cases {
            assert_eq!(found(&page_cache, PageRequest::After(id(after))), expected, "after {after}");
        }
        let cases = [(10, None), (11, Some((10, 20))), (20, Some((10, 20))), (31, None), (50, Some((40, 50)))];
        for (up_to, expected) in cases {
            assert_eq!(found(&page_cache, PageRequest::UpTo(id(up_to))), expected, "up to {up_to}");
        }
        assert_eq!(page_cache.neighbors(1, id(30)), (id(30), id(40)));
        assert_eq!(page_cache.neighbors(1, id(35)), (id(30), id(40)));
        assert_eq!(page_cache.neighbors(1, id(60)), (id(50), EntryId::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn least_recently_used_page_is_removed_first() {
        let cost = page(0, 10).cost();
        let page_cache = page_cache(&[(0, 10)], 2 * cost);
        tokio::time::advance(Duration::from_secs(1)).await;
        page_cache.insert(1, &page(10, 20));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(found(&page_cache, PageRequest::After(id(5))).is_some());
        page_cache.insert(1, &page(20, 30));
        assert_eq!(found(&page_cache, PageRequest::After(id(15))), None);
        assert!(
            found(&page_cache, PageRequest::After(id(5))).is_some()
                && found(&page_cache, PageRequest::After(id(25))).is_some()
        );
        assert_eq!(page_cache.lock().bytes, 2 * cost);
        tokio::time::advance(IDLE_LIMIT + Duration::from_secs(1)).await;
        page_cache.evict_idle();
        assert_eq!(page_cache.lock().pages.len(), 0);
        assert_eq!(page_cache.lock().bytes, 0);
    }

    #[test]
    fn new_generation_starts_empty() {
        let page_cache = page_cache(&[(0, 10)], usize::MAX);
        page_cache.lock().start_generation(2);
        assert!(
            page_cache.find(1, PageRequest::After(id(5))).is_none()
                && page_cache.find(2, PageRequest::After(id(5))).is_none()
        );
        page_cache.insert(1, &page(0, 10));
        assert_eq!(page_cache.lock().bytes, 0, "a read of the old generation comes too late");
    }

    #[tokio::test]
    async fn read_in_progress_is_shared_until_no_client_waits() {
        let page_cache = page_cache(&[], usize::MAX);
        let request = PageRequest::After(id(5));
        let read = || async { Ok(Some(page(5, 9))) }.boxed();
        let CacheLookup::Started(first) = page_cache.lookup(1, request, read) else { panic!("there is no read") };
        let CacheLookup::InProgress(second) = page_cache.lookup(1, request, || panic!("it is being read")) else {
            panic!("there is a read")
        };
        assert!(
            matches!(page_cache.lookup(1, PageRequest::UpTo(id(5)), read), CacheLookup::Started(_)),
            "another request"
        );
        drop(first);
        let page = second.await.expect("read").expect("of this generation");
        assert_eq!(page.batch.last(), id(9), "others continue the read of a client that left");
        assert!(
            matches!(page_cache.lookup(1, request, read), CacheLookup::Started(_)),
            "no client waits for the old read"
        );
    }

    #[test]
    fn entries_before_the_oldest_are_trimmed() {
        let at_front = |oldest, has_lost_entries| {
            let EntryPage { after, batch, .. } = Arc::into_inner(page(10, 20)).expect("the only one");
            EntryPage { after, batch, stream_start: Some(StreamStart { oldest, has_lost_entries }) }
        };
        assert!(!page(10, 20).is_trimmed_after(id(12)), "the page does not reach the start");
        let cases = [(Some(15), 14, true), (Some(15), 15, false), (Some(15), 16, false), (None, 14, true)];
        for (oldest, after, expected) in cases {
            assert_eq!(at_front(oldest.map(id), false).is_trimmed_after(id(after)), expected, "{oldest:?} {after}");
        }
        let cases = [(false, false), (true, true)];
        for (has_lost_entries, expected) in cases {
            assert_eq!(
                at_front(Some(id(15)), has_lost_entries).is_trimmed_after(EntryId::MIN),
                expected,
                "lost: {has_lost_entries}"
            );
        }
    }
}
