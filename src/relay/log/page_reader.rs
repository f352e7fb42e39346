//! Reads entries that have left the ring from the store, in pages that clients share.

use std::future::Future;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::Semaphore;
use tokio::task::JoinError;
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::event::{Entry, EntryId, Filter};
use crate::relay::hub::Hub;
use crate::relay::log::frame_batch::FrameBatch;
use crate::relay::log::page_cache::{CacheLookup, EntryPage, PageRequest, PageResult, StreamStart};
use crate::relay::log::ring::{Ring, RingSnapshot};
use crate::store::{Order, Range, Store, StoreError, StoreErrorKind};

/// The number of entries per stream that a snapshot may scan in the store for matches.
const MAX_SCAN: usize = 50_000;

/// The maximum time of one read of the store.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// The ids of the newest matching entries, newest first.
pub(crate) type NewestResult = Result<Vec<EntryId>, Arc<StoreError>>;

/// Returns the page with the entries after `id`, up to the ring's floor at most, or `None` if that generation is over.
///
/// Waits while the store is unavailable, and fails with other errors. Cancel-safe: yes.
pub(crate) async fn page_after(hub: Arc<Hub>, ring: Arc<Ring>, generation: u64, id: EntryId) -> PageResult {
    get_page(&hub, &ring, generation, PageRequest::After(id)).await
}

/// Returns the ids of the newest entries at or before `cut` that pass and can be sent, newest first, at most `count`.
///
/// Takes them from the ring first, then from the store. Waits while the store is unavailable. Cancel-safe: yes.
pub(crate) async fn newest_matching(
    hub: &Arc<Hub>,
    ring: &Arc<Ring>,
    generation: u64,
    filter: &Filter,
    count: usize,
    cut: EntryId,
) -> NewestResult {
    let (mut found, floor) = ring.newest(cut, filter, count);
    let mut to = floor.min(cut);
    let mut scanned = 0;
    while found.len() < count && scanned < MAX_SCAN && to > EntryId::MIN {
        let Some(page) = get_page(hub, ring, generation, PageRequest::UpTo(to)).await? else { break };
        found.extend(page.batch.newest(to, filter).take(count - found.len()));
        (to, scanned) = (page.after, scanned + page.batch.len().max(1));
    }
    Ok(found)
}

async fn get_page(hub: &Arc<Hub>, ring: &Arc<Ring>, generation: u64, request: PageRequest) -> PageResult {
    let start_read = || {
        let (of_hub, of_ring) = (hub.clone(), ring.clone());
        // A task of its own: the future of a slow client is not always polled, and would keep its permit from the
        // others.
        let task = AbortOnDropHandle::new(hub.page_reads.spawn(async move {
            let read = || read(&of_hub, &of_ring, generation, request);
            retry_while_unavailable(&of_hub.page_permits, read).await.map_err(Arc::new)
        }));
        task.map(|ended| match ended.map_err(JoinError::try_into_panic) {
            Ok(outcome) => outcome,
            Err(Ok(panic)) => resume_unwind(panic),
            // The runtime ends, and all waiting clients with it.
            Err(Err(_cancelled)) => Ok(None),
        })
        .boxed()
    };
    let (is_shared, read) = match ring.page_cache().lookup(generation, request, start_read) {
        CacheLookup::Hit(page) => {
            hub.metrics.relay_shared_pages.inc();
            return Ok(Some(page));
        }
        CacheLookup::InProgress(read) => (true, read),
        CacheLookup::Started(read) => (false, read),
    };
    let outcome = read.await;
    if is_shared {
        hub.metrics.relay_shared_pages.inc();
    }
    outcome
}

async fn read(
    hub: &Hub,
    ring: &Ring,
    generation: u64,
    request: PageRequest,
) -> Result<Option<Arc<EntryPage>>, StoreError> {
    let page_cache = ring.page_cache();
    // Another read may have brought the page while this one waited for its permit.
    if let Some(page) = page_cache.find(generation, request) {
        return Ok(Some(page));
    }
    let snapshot_if_current = || ring.snapshot().filter(|snapshot| snapshot.generation == generation);
    let Some(snapshot) = snapshot_if_current() else { return Ok(None) };
    hub.metrics.relay_store_reads.inc();
    let page = match request {
        PageRequest::After(id) => read_after(&*hub.store, ring, &snapshot, id).await?,
        PageRequest::UpTo(id) => read_up_to(&*hub.store, ring, &snapshot, id).await?,
    };
    if snapshot_if_current().is_none() {
        return Ok(None);
    }
    let page = Arc::new(page);
    page_cache.insert(generation, &page);
    Ok(Some(page))
}

/// Reads a page around `id`, up to the neighboring pages. The entries before `id` are for clients that are a little
/// farther back.
async fn read_after(
    store: &dyn Store,
    ring: &Ring,
    snapshot: &RingSnapshot,
    id: EntryId,
) -> Result<EntryPage, StoreError> {
    let (previous_end, next_start) = ring.page_cache().neighbors(snapshot.generation, id);
    let to = snapshot.floor.min(next_start).max(id);
    let mut size = ring.page_cache().page_size();
    let limit = size.limit() + 1;
    let forward = store.range(ring.stream(), Range { from: id, to, order: Order::Forward }, limit).await?;
    size.adapt(&forward);
    ring.page_cache().set_page_size(size);
    // While an entry exists, nothing between it and the next one was trimmed.
    let is_anchored = forward.first().is_some_and(|entry| entry.id == id);
    let is_joined = previous_end == id && id > EntryId::MIN;
    let wanted = match (is_joined, is_anchored) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => size.limit().div_ceil(2),
    };
    let reaches_start = id == EntryId::MIN;
    let backward = if wanted == 0 || reaches_start {
        Vec::new()
    } else {
        let range = Range { from: EntryId::MIN, to: id.previous(), order: Order::Backward };
        store.range(ring.stream(), range, wanted).await?
    };
    let reaches_start = reaches_start || backward.len() < wanted;
    let oldest = backward.last().or(forward.first()).map(|entry| entry.id);
    let after = match (is_joined, oldest) {
        (true, _) => id,
        (false, Some(oldest)) if !reaches_start => previous_end.max(oldest.previous()),
        (false, _) => previous_end,
    };
    let last = if forward.len() < limit { to } else { forward.last().map_or(to, |entry| entry.id) };
    let entries: Vec<Entry> = backward.into_iter().rev().chain(forward).filter(|entry| entry.id > after).collect();
    let stream_start = if reaches_start { Some(find_stream_start(store, ring, after, oldest).await?) } else { None };
    Ok(build_page(ring, snapshot, &entries, after, last, stream_start))
}

/// Reads a page that ends with `id`, back to the end of the page before.
async fn read_up_to(
    store: &dyn Store,
    ring: &Ring,
    snapshot: &RingSnapshot,
    id: EntryId,
) -> Result<EntryPage, StoreError> {
    let (previous_end, _) = ring.page_cache().neighbors(snapshot.generation, id.previous());
    let mut size = ring.page_cache().page_size();
    let range = Range { from: previous_end.next(), to: id, order: Order::Backward };
    let mut entries = store.range(ring.stream(), range, size.limit()).await?;
    let is_complete = entries.len() < size.limit();
    size.adapt(&entries);
    ring.page_cache().set_page_size(size);
    entries.reverse();
    let oldest = entries.first().map(|entry| entry.id);
    let after = if is_complete { previous_end } else { oldest.map_or(previous_end, EntryId::previous) };
    let reaches_start = is_complete && previous_end == EntryId::MIN;
    let stream_start = if reaches_start { Some(find_stream_start(store, ring, after, oldest).await?) } else { None };
    Ok(build_page(ring, snapshot, &entries, after, id, stream_start))
}

fn build_page(
    ring: &Ring,
    snapshot: &RingSnapshot,
    entries: &[Entry],
    after: EntryId,
    last: EntryId,
    stream_start: Option<StreamStart>,
) -> EntryPage {
    let mut batch = FrameBatch::frame(ring.stream(), &snapshot.epoch, entries, usize::MAX).batch;
    batch.extend_to(last);
    EntryPage { after, batch: Arc::new(batch), stream_start }
}

async fn find_stream_start(
    store: &dyn Store,
    ring: &Ring,
    after: EntryId,
    oldest: Option<EntryId>,
) -> Result<StreamStart, StoreError> {
    // At the minimal id only the counters show whether entries are gone. The stream had entries: otherwise the ring
    // would have begun with the stream.
    let has_lost_entries = after == EntryId::MIN
        && (oldest.is_none()
            || store.describe(ring.stream()).await?.is_none_or(|status| status.entries_added > status.length));
    Ok(StreamStart { oldest, has_lost_entries })
}

/// Repeats a read until the store is available. Few reads run at a time: live clients come first.
async fn retry_while_unavailable<T, F, R>(permits: &Semaphore, mut read: F) -> Result<T, StoreError>
where
    F: FnMut() -> R,
    R: Future<Output = Result<T, StoreError>>,
{
    let mut backoff = Backoff::default();
    loop {
        let outcome = {
            let _permit = permits.acquire().await.expect("the semaphore is never closed");
            with_timeout(READ_TIMEOUT, read()).await
        };
        match outcome {
            Err(error) if error.kind() == StoreErrorKind::Unavailable => tokio::time::sleep(backoff.next_delay()).await,
            outcome => return outcome,
        }
    }
}

/// Limits the time of a store operation.
pub(crate) async fn with_timeout<T>(
    limit: Duration,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(limit, operation).await.unwrap_or_else(|_elapsed| {
        let message = format!("the store did not answer within {} s", limit.as_secs());
        Err(StoreError::new(StoreErrorKind::Unavailable, message))
    })
}
