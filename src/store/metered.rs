//! A decorator that measures every store operation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use prometheus::Histogram;

use super::{
    Appended, Claimed, Cursor, Dropped, Durability, Families, IsolationLimits, Lease, Leased, Pending, Range, Receipt,
    ReceiptAction, Reclaimed, Redelivered, Redelivery, Settled, Settlement, Start, Store, StoreError, StoreStatus,
    StreamStatus, Trim,
};
use crate::event::{Entry, EntryId, Epoch, GroupName, NewEntry, StreamName};
use crate::metrics::Metrics;

/// Passes every call to another store, and measures it.
///
/// Time spent waiting for entries does not count. Readers of a family's members share one wait, see [`Families`].
#[derive(Debug)]
pub struct MeteredStore {
    inner: Arc<dyn Store>,
    metrics: Metrics,
    families: Families,
    seconds: Seconds,
}

#[derive(Debug)]
struct Seconds {
    append: Histogram,
    range: Histogram,
    claim: Histogram,
    reclaim: Histogram,
    redeliver: Histogram,
    settle: Histogram,
    redeem: Histogram,
    describe: Histogram,
    trim: Histogram,
}

impl MeteredStore {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Store>, metrics: Metrics) -> Self {
        let of = |operation: &str| metrics.store_seconds.with_label_values(&[operation]);
        let seconds = Seconds {
            append: of("append"),
            range: of("range"),
            claim: of("claim"),
            reclaim: of("reclaim"),
            redeliver: of("redeliver"),
            settle: of("settle"),
            redeem: of("redeem"),
            describe: of("describe"),
            trim: of("trim"),
        };
        Self { inner, metrics, families: Families::default(), seconds }
    }

    /// Adds the declared families.
    #[must_use]
    pub fn with_families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    fn counted<T>(&self, operation: &str, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.inspect_err(|error| {
            self.metrics.store_errors.with_label_values(&[operation, error.kind().as_str()]).inc();
        })
    }

    fn timed<T>(
        &self,
        operation: &str,
        seconds: &Histogram,
        started: Instant,
        result: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        seconds.observe(started.elapsed().as_secs_f64());
        self.counted(operation, result)
    }
}

#[async_trait]
impl Store for MeteredStore {
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        self.append_durably(stream, entries, Durability::MEMORY).await
    }

    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, StoreError> {
        let started = Instant::now();
        let result = self.inner.append_durably(stream, entries, durability).await;
        self.timed("append", &self.seconds.append, started, result)
    }

    async fn check_durability(&self, durability: Durability) -> Result<(), StoreError> {
        self.inner.check_durability(durability).await
    }

    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError> {
        let started = Instant::now();
        let result = self.inner.range(stream, range, limit).await;
        self.timed("range", &self.seconds.range, started, result)
    }

    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError> {
        let entries = match self.families.of(stream) {
            Some(family_members) => family_members.tail(&*self.inner, stream, after, limit, wait).await,
            None => self.inner.tail(stream, after, limit, wait).await,
        };
        self.counted("tail", entries)
    }

    async fn wait_any(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        self.counted("news", self.inner.wait_any(positions, wait).await)
    }

    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError> {
        self.counted("ensure_group", self.inner.ensure_group(stream, group, start).await)
    }

    async fn fetch(
        &self,
        cursor: &Cursor,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<crate::event::Delivery>, StoreError> {
        let deliveries = match self.families.of(&cursor.stream) {
            Some(family_members) => family_members.fetch(&*self.inner, cursor, limit, wait).await,
            None => self.inner.fetch(cursor, limit, wait).await,
        };
        self.counted("fetch", deliveries)
    }

    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError> {
        let started = Instant::now();
        let result = self.inner.claim(cursor, ids, idle).await;
        self.timed("claim", &self.seconds.claim, started, result)
    }

    async fn reclaim_isolated(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<Reclaimed, StoreError> {
        let started = Instant::now();
        let result = self.inner.reclaim_isolated(cursor, idle, from, limit, isolation).await;
        self.timed("reclaim", &self.seconds.reclaim, started, result)
    }

    async fn redeliver(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, StoreError> {
        let started = Instant::now();
        let result = self.inner.redeliver(cursor, redelivery, from, limit).await;
        self.timed("redeliver", &self.seconds.redeliver, started, result)
    }

    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let started = Instant::now();
        let result = self.inner.settle(cursor, settlements).await;
        self.timed("settle", &self.seconds.settle, started, result)
    }

    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        self.counted("extend", self.inner.extend(cursor, ids).await)
    }

    async fn settle_by_receipt(
        &self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, StoreError> {
        let started = Instant::now();
        let result = self.inner.settle_by_receipt(cursor, actions).await;
        self.timed("redeem", &self.seconds.redeem, started, result)
    }

    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError> {
        self.counted("pending", self.inner.pending(cursor, own_only, from, limit).await)
    }

    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError> {
        let started = Instant::now();
        let result = self.inner.describe(stream).await;
        self.timed("describe", &self.seconds.describe, started, result)
    }

    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError> {
        self.counted("epoch", self.inner.epoch(stream).await)
    }

    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError> {
        let started = Instant::now();
        let result = self.inner.trim_past(stream, trim, ignored).await;
        self.timed("trim", &self.seconds.trim, started, result)
    }

    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError> {
        self.counted("drop_oldest", self.inner.drop_oldest(stream, keep).await)
    }

    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError> {
        self.counted("write_off", self.inner.write_off(stream, group, known, missing).await)
    }

    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError> {
        self.counted("discard", self.inner.discard(stream, ids).await)
    }

    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError> {
        self.counted("remove_consumer", self.inner.remove_consumer(cursor).await)
    }

    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        self.counted("lease", self.inner.lease(stream, name, holder, ttl).await)
    }

    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError> {
        self.counted("release_lease", self.inner.release_lease(stream, lease).await)
    }

    async fn check(&self) -> Result<StoreStatus, StoreError> {
        let status = self.counted("check", self.inner.check().await)?;
        if let Some(ahead_ms) = status.clock_ahead_ms {
            #[expect(clippy::cast_precision_loss, reason = "a clock error needs no more than 53 bits")]
            self.metrics.store_clock_ahead_seconds.set(ahead_ms as f64 / 1000.0);
        }
        if let Some(keys) = status.evicted_keys {
            self.metrics.store_evicted_keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
        }
        Ok(status)
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
