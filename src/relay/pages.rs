//! What has left the ring, read from the store in pages.

use std::future::Future;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::Filter;
use super::backoff::Backoff;
use super::batch::Batch;
use super::filter::{Tags, relayable};
use super::ring::Ring;
use crate::event::{Entry, EntryId, Epoch};
use crate::store::{Order, Range, Store, StoreError, StoreErrorKind};

/// The most entries of one page.
const MAX_PAGE: usize = 256;

/// What the next page should have about, in bytes: each connection that catches up holds one.
const PAGE_BYTES: usize = 64 * 1024;

/// How many entries a snapshot looks at in the store for those that match, per stream.
const MAX_SCAN: usize = 50_000;

/// How long one read of the store may take.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// How many entries to ask for, so that about so many bytes come, learnt from what came before.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageSize {
    limit: usize,
    max: usize,
    target_bytes: usize,
}

impl PageSize {
    /// For reads of at most `max` entries and about `target_bytes`.
    pub(super) fn new(max: usize, target_bytes: usize) -> Self {
        Self { limit: max.min(32), max, target_bytes }
    }

    /// How many entries to ask for next.
    pub(super) fn limit(self) -> usize {
        self.limit
    }

    /// Learns from what came.
    pub(super) fn learn(&mut self, entries: &[Entry]) {
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

/// Where a page begins.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// The life of the stream that `after` belongs to.
    pub(super) generation: u64,
    /// Its name.
    pub(super) epoch: Epoch,
    /// The last entry passed.
    pub(super) after: EntryId,
    /// Whether `after` is an entry that was there: then its absence tells that something was trimmed.
    pub(super) is_entry: bool,
    /// How much to read.
    pub(super) size: PageSize,
}

/// A page of the store, up to where the ring takes over.
#[derive(Debug)]
pub(super) struct Page {
    /// From the request.
    pub(super) generation: u64,
    /// The entries, if there were any that can be sent. Its last entry is where the reader stands after it.
    pub(super) batch: Batch,
    /// Whether entries before the page were trimmed away and can't be given any more.
    pub(super) is_trimmed: bool,
    /// The oldest entry in it.
    pub(super) oldest: Option<EntryId>,
    /// How much to read next.
    pub(super) size: PageSize,
}

/// Reads the page after `request.after`, up to the ring's floor. Waits while the store is away; fails where waiting
/// won't help. Cancel-safe.
pub(super) async fn read(
    store: &dyn Store,
    permits: &Semaphore,
    ring: &Ring,
    request: Request,
) -> Result<Page, StoreError> {
    patiently(permits, || read_once(store, ring, request.clone())).await
}

async fn read_once(store: &dyn Store, ring: &Ring, request: Request) -> Result<Page, StoreError> {
    let Request { generation, epoch, after, is_entry, mut size } = request;
    let floor = ring.mark().map_or(after, |mark| mark.floor).max(after);
    // Reading begins with the entry passed last: while it is there, nothing between it and the next was trimmed.
    let range = Range { from: if is_entry { after } else { after.next() }, to: floor, order: Order::Forward };
    let limit = size.limit() + usize::from(is_entry);
    let entries = store.range(ring.stream(), range, limit).await?;
    size.learn(&entries);
    let is_anchored = entries.first().is_some_and(|entry| entry.id == after);
    let news = if is_anchored { &entries[1..] } else { &entries[..] };
    let is_trimmed = is_entry && !is_anchored && was_trimmed(store, ring, after).await?;
    let mut batch = Batch::frame(ring.stream(), &epoch, news, usize::MAX).batch;
    let is_complete = entries.len() < limit;
    batch.extend_to(if is_complete { floor } else { after });
    Ok(Page { generation, batch, is_trimmed, oldest: news.first().map(|entry| entry.id), size })
}

/// Whether entries after `id` are gone, given that `id` itself is: trimming takes the oldest, so it is enough to see
/// whether anything as old is left. If `id` was the last one trimmed, this says yes without need.
pub(super) async fn was_trimmed(store: &dyn Store, ring: &Ring, id: EntryId) -> Result<bool, StoreError> {
    let status = store.describe(ring.stream()).await?;
    Ok(status.is_some_and(|status| status.last_id > id && status.first_id.is_none_or(|first| first > id)))
}

/// The ids of the newest entries at or before `cut` that pass and can be sent, newest first, at most `count`: from the
/// ring as far as it goes, then from the store. Waits while the store is away. Cancel-safe.
pub(super) async fn newest(
    store: &dyn Store,
    permits: &Semaphore,
    ring: &Ring,
    filter: &Filter,
    count: usize,
    cut: EntryId,
) -> Result<Vec<EntryId>, StoreError> {
    let (mut found, floor) = ring.newest(cut, filter, count);
    let mut to = floor.min(cut);
    let mut size = PageSize::default();
    let mut scanned = 0;
    while found.len() < count && scanned < MAX_SCAN && to > EntryId::MIN {
        let range = Range { from: EntryId::MIN, to, order: Order::Backward };
        let entries = patiently(permits, || store.range(ring.stream(), range, size.limit())).await?;
        let Some(oldest) = entries.last().filter(|oldest| oldest.id > EntryId::MIN) else { break };
        (to, scanned) = (oldest.id.previous(), scanned + entries.len());
        let passes = |entry: &&Entry| {
            relayable(entry).is_some_and(|payload| {
                filter.is_empty() || filter.matches(&Tags::declared(&entry.fields).completed(payload))
            })
        };
        found.extend(entries.iter().filter(passes).map(|entry| entry.id).take(count - found.len()));
        size.learn(&entries);
    }
    Ok(found)
}

/// Repeats a read until the store answers, one of a few at a time.
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
            Err(error) if error.kind() == StoreErrorKind::Unavailable => tokio::time::sleep(backoff.next()).await,
            outcome => return outcome,
        }
    }
}

/// A store operation with a bound on its time.
pub(super) async fn bounded<T>(
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
    use super::super::batch::testing::entry;
    use super::*;

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
