//! What has left the ring, read from the store in pages that clients share.

use std::future::Future;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::event::Filter;
use crate::event::{Entry, EntryId};
use crate::relay::Hub;
use crate::relay::log::frame_batch::Batch;
use crate::relay::log::page_cache::{Ask, Asked, Front, Outcome, Page};
use crate::relay::log::ring::{Mark, Ring};
use crate::store::{Order, Range, Store, StoreError, StoreErrorKind};

/// The most entries of one page, beside those before the place that it is read for.
const MAX_PAGE: usize = 256;

/// What a page should have about, in bytes: each connection that catches up holds one.
const PAGE_BYTES: usize = 64 * 1024;

/// How many entries a snapshot looks at in the store for those that match, per stream.
const MAX_SCAN: usize = 50_000;

/// How long one read of the store may take.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// How many entries to ask for, so that about so many bytes come, learnt from what came before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageSize {
    limit: usize,
    max: usize,
    target_bytes: usize,
}

impl PageSize {
    /// For reads of at most `max` entries and about `target_bytes`.
    pub(crate) fn new(max: usize, target_bytes: usize) -> Self {
        Self { limit: max.min(32), max, target_bytes }
    }

    /// How many entries to ask for next.
    pub(crate) fn limit(self) -> usize {
        self.limit
    }

    /// Learns from what came.
    pub(crate) fn learn(&mut self, entries: &[Entry]) {
        let bytes: usize = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        if let Some(average) = bytes.checked_div(entries.len()) {
            let fitting = self.target_bytes / average.max(1);
            self.limit = fitting.clamp(1, self.max).min(self.limit * 4);
        }
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self::new(MAX_PAGE, PAGE_BYTES)
    }
}

/// The newest entries that a client wants, newest first.
pub(crate) type Newest = Result<Vec<EntryId>, Arc<StoreError>>;

/// The page with the entries after `id`, up to the ring's floor at most; nothing where that life of the stream is over.
/// Waits while the store is away; fails where waiting won't help. Cancel-safe.
pub(crate) async fn after(hub: Arc<Hub>, ring: Arc<Ring>, generation: u64, id: EntryId) -> Outcome {
    get(&hub, &ring, generation, Ask::After(id)).await
}

/// The ids of the newest entries at or before `cut` that pass and can be sent, newest first, at most `count`: from the
/// ring as far as it goes, then from the store. Waits while the store is away. Cancel-safe.
pub(crate) async fn newest(
    hub: &Arc<Hub>,
    ring: &Arc<Ring>,
    generation: u64,
    filter: &Filter,
    count: usize,
    cut: EntryId,
) -> Newest {
    let (mut found, floor) = ring.newest(cut, filter, count);
    let mut to = floor.min(cut);
    let mut scanned = 0;
    while found.len() < count && scanned < MAX_SCAN && to > EntryId::MIN {
        let Some(page) = get(hub, ring, generation, Ask::UpTo(to)).await? else { break };
        found.extend(page.batch.newest(to, filter).take(count - found.len()));
        (to, scanned) = (page.after, scanned + page.batch.len().max(1));
    }
    Ok(found)
}

async fn get(hub: &Arc<Hub>, ring: &Arc<Ring>, generation: u64, ask: Ask) -> Outcome {
    let begin = || {
        let (of_hub, of_ring) = (hub.clone(), ring.clone());
        // A task of its own: a client that waits is not always driven, because whoever reads from it is slow, and would
        // keep its turn at the store from the others.
        let task = AbortOnDropHandle::new(hub.reads.spawn(async move {
            let read = || read(&of_hub, &of_ring, generation, ask);
            patiently(&of_hub.pages, read).await.map_err(Arc::new)
        }));
        task.map(|ended| match ended.map_err(JoinError::try_into_panic) {
            Ok(outcome) => outcome,
            Err(Ok(panic)) => resume_unwind(panic),
            // The runtime ends, and all who wait with it.
            Err(Err(_cancelled)) => Ok(None),
        })
        .boxed()
    };
    let (is_shared, reading) = match ring.shelf().ask(generation, ask, begin) {
        Asked::Page(page) => {
            hub.metrics.relay_shared_pages.inc();
            return Ok(Some(page));
        }
        Asked::UnderWay(reading) => (true, reading),
        Asked::Begun(reading) => (false, reading),
    };
    let outcome = reading.await;
    if is_shared {
        hub.metrics.relay_shared_pages.inc();
    }
    outcome
}

async fn read(hub: &Hub, ring: &Ring, generation: u64, ask: Ask) -> Result<Option<Arc<Page>>, StoreError> {
    let shelf = ring.shelf();
    // While this one waited for its turn, another may have brought it.
    if let Some(page) = shelf.find(generation, ask) {
        return Ok(Some(page));
    }
    let of_this_life = || ring.mark().filter(|mark| mark.generation == generation);
    let Some(mark) = of_this_life() else { return Ok(None) };
    hub.metrics.relay_store_reads.inc();
    let page = match ask {
        Ask::After(id) => read_after(&*hub.store, ring, &mark, id).await?,
        Ask::UpTo(id) => read_up_to(&*hub.store, ring, &mark, id).await?,
    };
    if of_this_life().is_none() {
        return Ok(None);
    }
    let page = Arc::new(page);
    shelf.keep(generation, &page);
    Ok(Some(page))
}

/// A page around `id`, up to where others begin. What is before `id` is for those who come from a little farther back.
async fn read_after(store: &dyn Store, ring: &Ring, mark: &Mark, id: EntryId) -> Result<Page, StoreError> {
    let (before, behind) = ring.shelf().around(mark.generation, id);
    let to = mark.floor.min(behind).max(id);
    let mut size = ring.shelf().page_size();
    let limit = size.limit() + 1;
    let forward = store.range(ring.stream(), Range { from: id, to, order: Order::Forward }, limit).await?;
    size.learn(&forward);
    ring.shelf().learn(size);
    // While an entry is there, nothing between it and the next was trimmed.
    let is_anchored = forward.first().is_some_and(|entry| entry.id == id);
    let is_joined = before == id && id > EntryId::MIN;
    let wanted = match (is_joined, is_anchored) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => size.limit().div_ceil(2),
    };
    let is_at_front = id == EntryId::MIN;
    let backward = if wanted == 0 || is_at_front {
        Vec::new()
    } else {
        let range = Range { from: EntryId::MIN, to: id.previous(), order: Order::Backward };
        store.range(ring.stream(), range, wanted).await?
    };
    let is_at_front = is_at_front || backward.len() < wanted;
    let oldest = backward.last().or(forward.first()).map(|entry| entry.id);
    let after = match (is_joined, oldest) {
        (true, _) => id,
        (false, Some(oldest)) if !is_at_front => before.max(oldest.previous()),
        (false, _) => before,
    };
    let last = if forward.len() < limit { to } else { forward.last().map_or(to, |entry| entry.id) };
    let entries: Vec<Entry> = backward.into_iter().rev().chain(forward).filter(|entry| entry.id > after).collect();
    let front = if is_at_front { Some(look_at_front(store, ring, after, oldest).await?) } else { None };
    Ok(page(ring, mark, &entries, after, last, front))
}

/// A page that ends with `id`, as far back as where another ends.
async fn read_up_to(store: &dyn Store, ring: &Ring, mark: &Mark, id: EntryId) -> Result<Page, StoreError> {
    let (before, _) = ring.shelf().around(mark.generation, id.previous());
    let mut size = ring.shelf().page_size();
    let range = Range { from: before.next(), to: id, order: Order::Backward };
    let mut entries = store.range(ring.stream(), range, size.limit()).await?;
    let is_complete = entries.len() < size.limit();
    size.learn(&entries);
    ring.shelf().learn(size);
    entries.reverse();
    let oldest = entries.first().map(|entry| entry.id);
    let after = if is_complete { before } else { oldest.map_or(before, EntryId::previous) };
    let is_at_front = is_complete && before == EntryId::MIN;
    let front = if is_at_front { Some(look_at_front(store, ring, after, oldest).await?) } else { None };
    Ok(page(ring, mark, &entries, after, id, front))
}

fn page(ring: &Ring, mark: &Mark, entries: &[Entry], after: EntryId, last: EntryId, front: Option<Front>) -> Page {
    let mut batch = Batch::frame(ring.stream(), &mark.epoch, entries, usize::MAX).batch;
    batch.extend_to(last);
    Page { after, batch: Arc::new(batch), front }
}

async fn look_at_front(
    store: &dyn Store,
    ring: &Ring,
    after: EntryId,
    oldest: Option<EntryId>,
) -> Result<Front, StoreError> {
    // Who has seen nothing yet can't see by an id whether anything is gone. Something was there, or the ring would have
    // begun with the stream.
    let is_worn = after == EntryId::MIN
        && (oldest.is_none()
            || store.describe(ring.stream()).await?.is_none_or(|status| status.entries_added > status.length));
    Ok(Front { oldest, is_worn })
}

/// Repeats a read until the store answers, one of a few at a time: those that are live come first.
async fn patiently<T, F, R>(permits: &Semaphore, mut read: F) -> Result<T, StoreError>
where
    F: FnMut() -> R,
    R: Future<Output = Result<T, StoreError>>,
{
    let mut backoff = Backoff::default();
    loop {
        let outcome = {
            let _permit = permits.acquire().await.expect("the semaphore is never closed");
            bounded(READ_TIMEOUT, read()).await
        };
        match outcome {
            Err(error) if error.kind() == StoreErrorKind::Unavailable => tokio::time::sleep(backoff.next_delay()).await,
            outcome => return outcome,
        }
    }
}

/// A store operation with a bound on its time.
pub(crate) async fn bounded<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(limit, operation).await.unwrap_or_else(|_elapsed| {
        let message = format!("the store did not answer within {} s", limit.as_secs());
        Err(StoreError::new(StoreErrorKind::Unavailable, message))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::log::frame_batch::testing::entry;

    #[test]
    fn page_sizes_follow_the_size_of_entries() {
        let mut size = PageSize::default();
        assert_eq!(size.limit(), 32);
        let entries_of = |bytes: usize| vec![entry(1, &[("data", "x".repeat(bytes - 4).as_str())]); 32];
        size.learn(&entries_of(100));
        assert_eq!(size.limit(), 128);
        size.learn(&entries_of(100));
        assert_eq!(size.limit(), 256);
        size.learn(&entries_of(1 << 20));
        assert_eq!(size.limit(), 1);
        size.learn(&[]);
        assert_eq!(size.limit(), 1);
        size.learn(&entries_of(500));
        assert_eq!(size.limit(), 4, "growth is careful");
    }
}
