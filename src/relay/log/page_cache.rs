//! Pages of one stream that were read from the store for some client, kept for the others.
//!
//! After a restart, or an outage of the network, thousands of clients miss the same entries, and stand at about the
//! same places. Whoever comes to a place first reads a page around it; who asks for the same meanwhile waits for that
//! read, and who comes later finds the page. At its end they all stand at the same place, so that from there on one
//! read serves all of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use tokio::time::Instant;

use crate::event::EntryId;
use crate::relay::log::frame_batch::Batch;
use crate::relay::log::page_reader::PageSize;
use crate::store::StoreError;

/// A page that nobody has asked for in this time is let go.
const KEPT_FOR: Duration = Duration::from_secs(30);

/// What an entry costs beside its frame, about, in bytes.
const ENTRY_BYTES: usize = 256;

/// A run of entries as the store had them.
#[derive(Debug)]
pub(crate) struct Page {
    /// It has every entry after this one, up to the last of its batch.
    pub(crate) after: EntryId,
    /// The entries, those left out that can't be sent.
    pub(crate) batch: Arc<Batch>,
    /// The oldest end of the stream, where reading the page has come upon it.
    pub(crate) front: Option<Front>,
}

/// The oldest end of a stream when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Front {
    /// The oldest entry that was left; nothing where there was none up to the end of the page.
    pub(crate) oldest: Option<EntryId>,
    /// Whether entries were removed ever, or lost. Only looked at in pages that go back to [`EntryId::MIN`].
    pub(crate) is_worn: bool,
}

impl Page {
    /// Whether entries after `id` are gone: trimming takes the oldest, so it is enough to see whether anything as old
    /// is left. Where `id` is the last one that was trimmed, this says yes without need.
    pub(crate) fn is_trimmed_after(&self, id: EntryId) -> bool {
        let is_gone =
            |front: Front| front.oldest.is_none_or(|oldest| id < oldest) && (id > EntryId::MIN || front.is_worn);
        self.front.is_some_and(is_gone)
    }

    fn cost(&self) -> usize {
        self.batch.size_bytes() + (self.batch.len() + 1) * ENTRY_BYTES
    }
}

/// What a reader needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Ask {
    /// The entries after this one.
    After(EntryId),
    /// The entries up to this one.
    UpTo(EntryId),
}

/// What came of a read, for all who wait for it: no page where the stream has begun a new life meanwhile.
pub(crate) type Outcome = Result<Option<Arc<Page>>, Arc<StoreError>>;

type Reading = BoxFuture<'static, Outcome>;

/// What a shelf has for a reader.
#[derive(Debug)]
pub(crate) enum Asked {
    /// A page.
    Page(Arc<Page>),
    /// A read under way that others wait for too. It ends when nobody waits any more.
    UnderWay(Shared<Reading>),
    /// A read that has just been begun.
    Begun(Shared<Reading>),
}

/// Pages, the least recently used of which go when there are too many, and reads under way.
#[derive(Debug)]
pub(crate) struct Shelf {
    max_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The life of the stream that all of it belongs to.
    generation: u64,
    /// By `after`. Two that were read at a time may overlap, which costs room and nothing else.
    pages: BTreeMap<EntryId, Kept>,
    bytes: usize,
    readings: HashMap<Ask, WeakShared<Reading>>,
    size: PageSize,
}

#[derive(Debug)]
struct Kept {
    page: Arc<Page>,
    used: Instant,
}

impl Shelf {
    /// An empty one that keeps about so many bytes, or one page.
    pub(crate) fn new(max_bytes: usize) -> Self {
        Self { max_bytes, state: Mutex::default() }
    }

    /// The page that a reader in that life of the stream needs, or the read that brings it.
    pub(crate) fn ask(&self, generation: u64, ask: Ask, read: impl FnOnce() -> Reading) -> Asked {
        let mut state = self.lock();
        state.enter(generation);
        if let Some(page) = state.find(generation, ask) {
            return Asked::Page(page);
        }
        if state.generation == generation
            && let Some(reading) = state.readings.get(&ask).and_then(WeakShared::upgrade)
        {
            return Asked::UnderWay(reading);
        }
        let reading = read().shared();
        state.readings.retain(|_, reading| reading.upgrade().is_some());
        if let Some(weak) = reading.downgrade().filter(|_| state.generation == generation) {
            state.readings.insert(ask, weak);
        }
        Asked::Begun(reading)
    }

    /// The page that a reader in that life of the stream needs, if it is there.
    pub(crate) fn find(&self, generation: u64, ask: Ask) -> Option<Arc<Page>> {
        self.lock().find(generation, ask)
    }

    /// Where the page before `id` ends, and where the one behind it begins; `id` itself is in none.
    pub(crate) fn around(&self, generation: u64, id: EntryId) -> (EntryId, EntryId) {
        let state = self.lock();
        if state.generation != generation {
            return (EntryId::MIN, EntryId::MAX);
        }
        let before = state.pages.range(..=id).next_back().map(|(_, kept)| kept.page.batch.last());
        let behind = state.pages.range(id..).map(|(after, _)| *after).find(|after| *after > id);
        (before.filter(|last| *last <= id).unwrap_or(EntryId::MIN), behind.unwrap_or(EntryId::MAX))
    }

    /// Keeps a page that was read in that life of the stream.
    pub(crate) fn keep(&self, generation: u64, page: &Arc<Page>) {
        let mut state = self.lock();
        if state.generation != generation || page.batch.last() <= page.after {
            return;
        }
        let is_shorter = |kept: &Kept| kept.page.batch.last() < page.batch.last();
        if state.pages.get(&page.after).is_none_or(is_shorter) {
            state.bytes += page.cost();
            let kept = Kept { page: page.clone(), used: Instant::now() };
            if let Some(replaced) = state.pages.insert(page.after, kept) {
                state.bytes -= replaced.page.cost();
            }
        }
        while state.bytes > self.max_bytes && state.pages.len() > 1 {
            let oldest = state.pages.iter().min_by_key(|(_, kept)| kept.used).map(|(after, _)| *after);
            state.remove(oldest);
        }
    }

    /// Lets go of what nobody has asked for in a while.
    pub(crate) fn tidy(&self) {
        let mut state = self.lock();
        let is_stale = |kept: &Kept| kept.used.elapsed() > KEPT_FOR;
        let stale: Vec<EntryId> =
            state.pages.iter().filter(|(_, kept)| is_stale(kept)).map(|(after, _)| *after).collect();
        for after in stale {
            state.remove(Some(after));
        }
    }

    /// How much to read at once.
    pub(crate) fn page_size(&self) -> PageSize {
        self.lock().size
    }

    /// Learns from what came how much to read at once.
    pub(crate) fn learn(&self, size: PageSize) {
        self.lock().size = size;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A newer life of the stream leaves nothing of those before.
    fn enter(&mut self, generation: u64) {
        if generation > self.generation {
            *self = Self { generation, ..Self::default() };
        }
    }

    fn find(&mut self, generation: u64, ask: Ask) -> Option<Arc<Page>> {
        if self.generation != generation {
            return None;
        }
        let (_, kept) = match ask {
            Ask::After(id) => self.pages.range_mut(..=id).next_back().filter(|(_, kept)| kept.page.batch.last() > id),
            Ask::UpTo(id) => self.pages.range_mut(..id).next_back().filter(|(_, kept)| kept.page.batch.last() >= id),
        }?;
        kept.used = Instant::now();
        Some(kept.page.clone())
    }

    fn remove(&mut self, after: Option<EntryId>) {
        if let Some(kept) = after.and_then(|after| self.pages.remove(&after)) {
            self.bytes -= kept.page.cost();
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

    /// The entries after one number up to another.
    fn page(after: u64, last: u64) -> Arc<Page> {
        let entries: Vec<Entry> = (after + 1..=last).map(|ms| entry(ms, &[("data", "{}")])).collect();
        let (stream, epoch) = ("s".parse().expect("a name"), "e".parse().expect("an epoch"));
        let mut batch = Batch::frame(&stream, &epoch, &entries, usize::MAX).batch;
        batch.extend_to(id(last));
        Arc::new(Page { after: id(after), batch: Arc::new(batch), front: None })
    }

    fn shelf(pages: &[(u64, u64)], max_bytes: usize) -> Shelf {
        let shelf = Shelf::new(max_bytes);
        shelf.lock().enter(1);
        for (after, last) in pages {
            shelf.keep(1, &page(*after, *last));
        }
        shelf
    }

    fn found(shelf: &Shelf, ask: Ask) -> Option<(u64, u64)> {
        shelf.find(1, ask).map(|page| (page.after.ms, page.batch.last().ms))
    }

    #[test]
    fn a_page_serves_every_place_within_it() {
        let shelf = shelf(&[(10, 20), (20, 30), (40, 50)], usize::MAX);
        let cases = [(9, None), (10, Some((10, 20))), (19, Some((10, 20))), (20, Some((20, 30))), (30, None)];
        for (after, expected) in cases {
            assert_eq!(found(&shelf, Ask::After(id(after))), expected, "after {after}");
        }
        let cases = [(10, None), (11, Some((10, 20))), (20, Some((10, 20))), (31, None), (50, Some((40, 50)))];
        for (up_to, expected) in cases {
            assert_eq!(found(&shelf, Ask::UpTo(id(up_to))), expected, "up to {up_to}");
        }
        assert_eq!(shelf.around(1, id(30)), (id(30), id(40)));
        assert_eq!(shelf.around(1, id(35)), (id(30), id(40)));
        assert_eq!(shelf.around(1, id(60)), (id(50), EntryId::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_used_for_longest_goes_first() {
        let cost = page(0, 10).cost();
        let shelf = shelf(&[(0, 10)], 2 * cost);
        tokio::time::advance(Duration::from_secs(1)).await;
        shelf.keep(1, &page(10, 20));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(found(&shelf, Ask::After(id(5))).is_some());
        shelf.keep(1, &page(20, 30));
        assert_eq!(found(&shelf, Ask::After(id(15))), None);
        assert!(found(&shelf, Ask::After(id(5))).is_some() && found(&shelf, Ask::After(id(25))).is_some());
        assert_eq!(shelf.lock().bytes, 2 * cost);
        tokio::time::advance(KEPT_FOR + Duration::from_secs(1)).await;
        shelf.tidy();
        assert_eq!(shelf.lock().pages.len(), 0);
        assert_eq!(shelf.lock().bytes, 0);
    }

    #[test]
    fn a_new_life_begins_with_nothing() {
        let shelf = shelf(&[(0, 10)], usize::MAX);
        shelf.lock().enter(2);
        assert!(shelf.find(1, Ask::After(id(5))).is_none() && shelf.find(2, Ask::After(id(5))).is_none());
        shelf.keep(1, &page(0, 10));
        assert_eq!(shelf.lock().bytes, 0, "a read of the old life comes too late");
    }

    #[tokio::test]
    async fn a_read_under_way_is_shared_and_ends_with_those_who_wait() {
        let shelf = shelf(&[], usize::MAX);
        let ask = Ask::After(id(5));
        let read = || async { Ok(Some(page(5, 9))) }.boxed();
        let Asked::Begun(first) = shelf.ask(1, ask, read) else { panic!("nobody reads") };
        let Asked::UnderWay(second) = shelf.ask(1, ask, || panic!("it is read")) else { panic!("one reads") };
        assert!(matches!(shelf.ask(1, Ask::UpTo(id(5)), read), Asked::Begun(_)), "something else");
        drop(first);
        let page = second.await.expect("read").expect("of this life");
        assert_eq!(page.batch.last(), id(9), "who began it has gone, others go on");
        assert!(matches!(shelf.ask(1, ask, read), Asked::Begun(_)), "nobody waits for the old one");
    }

    #[test]
    fn what_is_older_than_the_oldest_is_gone() {
        let at_front = |oldest, is_worn| {
            let Page { after, batch, .. } = Arc::into_inner(page(10, 20)).expect("the only one");
            Page { after, batch, front: Some(Front { oldest, is_worn }) }
        };
        assert!(!page(10, 20).is_trimmed_after(id(12)), "the oldest end is not in it");
        let cases = [(Some(15), 14, true), (Some(15), 15, false), (Some(15), 16, false), (None, 14, true)];
        for (oldest, after, expected) in cases {
            assert_eq!(at_front(oldest.map(id), false).is_trimmed_after(id(after)), expected, "{oldest:?} {after}");
        }
        let cases = [(false, false), (true, true)];
        for (is_worn, expected) in cases {
            assert_eq!(at_front(Some(id(15)), is_worn).is_trimmed_after(EntryId::MIN), expected, "worn: {is_worn}");
        }
    }
}
