//! A store that can be made unavailable, or emptied, while the relay uses it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aurora_bus::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName};
use aurora_bus::store::embedded::Config;
use aurora_bus::store::{
    Appended, Claimed, Cursor, Dropped, IsolationLimits, Lease, Leased, Pending, Range, Receipt, ReceiptAction,
    Reclaimed, Redelivered, Redelivery, Settled, Settlement, Start, Store, StoreError, StoreErrorKind, StoreStatus,
    StreamStatus, Trim,
};
use tempfile::TempDir;

#[derive(Debug)]
pub(crate) struct FaultyStore {
    inner: Mutex<(Arc<dyn Store>, Option<TempDir>)>,
    is_unavailable: AtomicBool,
    unreadable: Mutex<Option<StreamName>>,
}

impl FaultyStore {
    pub(crate) async fn open() -> Arc<Self> {
        Self::new(open_empty().await)
    }

    /// The same around another store.
    pub(crate) fn around(store: Arc<dyn Store>) -> Arc<Self> {
        Self::new((store, None))
    }

    fn new(inner: (Arc<dyn Store>, Option<TempDir>)) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(inner),
            is_unavailable: AtomicBool::new(false),
            unreadable: Mutex::default(),
        })
    }

    /// Makes every call fail, or succeed again.
    pub(crate) fn set_unavailable(&self, is_unavailable: bool) {
        self.is_unavailable.store(is_unavailable, Ordering::SeqCst);
    }

    /// Makes this stream unreadable, as if its name were taken by another type.
    pub(crate) fn set_unreadable(&self, stream: Option<StreamName>) {
        *self.unreadable.lock().unwrap_or_else(PoisonError::into_inner) = stream;
    }

    /// Loses all data, as after a flush.
    pub(crate) async fn lose_all_data(&self) {
        let empty = open_empty().await;
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = empty;
    }

    /// Returns the store itself, which others can still reach.
    pub(crate) fn inner_store(&self) -> Arc<dyn Store> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    fn inner_for(&self, stream: &StreamName) -> Result<Arc<dyn Store>, StoreError> {
        if self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(stream) {
            return Err(StoreError::new(StoreErrorKind::WrongType, "the name is taken by a list"));
        }
        self.inner()
    }

    fn inner(&self) -> Result<Arc<dyn Store>, StoreError> {
        if self.is_unavailable.load(Ordering::SeqCst) {
            return Err(StoreError::new(StoreErrorKind::Unavailable, "the store is away"));
        }
        Ok(self.inner_store())
    }
}

async fn open_empty() -> (Arc<dyn Store>, Option<TempDir>) {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config { path: folder.path().join("data"), ..Config::default() };
    (Arc::new(config.open().await.expect("opened")), Some(folder))
}

#[async_trait]
impl Store for FaultyStore {
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        self.inner_for(stream)?.append(stream, entries).await
    }

    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError> {
        // Remote stores never answer at once.
        tokio::task::yield_now().await;
        self.inner_for(stream)?.range(stream, range, limit).await
    }

    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError> {
        let inner = self.inner_for(stream)?;
        // Short waits, so that an unavailable or replaced store is noticed soon.
        let entries = inner.tail(stream, after, limit, wait.min(Duration::from_millis(100))).await;
        self.inner_for(stream)?;
        entries
    }

    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError> {
        self.inner_for(stream)?.ensure_group(stream, group, start).await
    }

    async fn fetch(&self, cursor: &Cursor, limit: usize, wait: Duration) -> Result<Vec<Delivery>, StoreError> {
        self.inner()?.fetch(cursor, limit, wait).await
    }

    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError> {
        self.inner()?.claim(cursor, ids, idle).await
    }

    async fn reclaim_isolated(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<Reclaimed, StoreError> {
        self.inner()?.reclaim_isolated(cursor, idle, from, limit, care).await
    }

    async fn redeliver(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, StoreError> {
        self.inner()?.redeliver(cursor, redelivery, from, limit).await
    }

    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.inner()?.settle(cursor, settlements).await
    }

    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.inner()?.extend(cursor, ids).await
    }

    async fn settle_by_receipt(
        &self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, StoreError> {
        self.inner()?.settle_by_receipt(cursor, actions).await
    }

    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError> {
        self.inner()?.pending(cursor, own_only, from, limit).await
    }

    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError> {
        self.inner_for(stream)?.describe(stream).await
    }

    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError> {
        self.inner_for(stream)?.epoch(stream).await
    }

    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError> {
        self.inner_for(stream)?.trim_past(stream, trim, ignored).await
    }

    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError> {
        self.inner_for(stream)?.drop_oldest(stream, keep).await
    }

    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError> {
        self.inner_for(stream)?.write_off(stream, group, known, missing).await
    }

    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError> {
        self.inner_for(stream)?.discard(stream, ids).await
    }

    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError> {
        self.inner()?.remove_consumer(cursor).await
    }

    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        self.inner()?.lease(stream, name, holder, ttl).await
    }

    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError> {
        self.inner()?.release_lease(stream, lease).await
    }

    async fn check(&self) -> Result<StoreStatus, StoreError> {
        self.inner()?.check().await
    }

    async fn close(&self) {
        if let Ok(inner) = self.inner() {
            inner.close().await;
        }
    }
}
