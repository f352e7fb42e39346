//! The embedded store: streams, groups and deliveries on one machine, in one `SQLite` file.
//!
//! One thread writes (see `writer`). Calls that arrive while a commit is being synced go into the next commit together.
//! Up to 64 entries form a chunk, which is one row; entries that were delivered together are one row as well. Memory
//! holds an index of the chunks, the newest chunks themselves and the pending entries, so that readers and consumers at
//! the head of a stream never wait for the disk.
//!
//! Promises: accepted entries survive a crash (and, with [`SyncMode::Commit`], a power cut); damaged data causes an
//! error that names the entries, and is never returned as entries; one process at a time. Memory is bounded by
//! [`Config::recent`], about 100 bytes per 32 or more stored entries, and about 60 bytes per pending entry.

mod disk;
mod memory;
mod open;
mod ranges;
mod raw;
mod readers;
mod writer;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[cfg(any(test, fuzzing))]
pub use crate::store::embedded::disk::chunk::fuzz as fuzz_chunk;
pub use crate::store::embedded::open::{Config, SyncMode};
pub use raw::{RawRate, raw_append_rate};

use self::readers::Readers;
use self::writer::Writer;
use super::{
    Appended, Claimed, Cursor, Dropped, IsolationLimits, Lease, Leased, MAX_APPEND, Outcome, Pending, Range, Receipt,
    ReceiptAction, Reclaimed, Redelivered, Redelivery, Settled, Settlement, Start, Store, StoreError, StoreErrorKind,
    StoreStatus, StreamStatus, Trim,
};
use crate::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName, field};
use crate::store::embedded::disk::corruption::FileDamage;
use crate::store::embedded::disk::schema::is_closed_error;
use crate::store::embedded::memory::index::Published;
use crate::store::embedded::memory::leases::Leases;
use crate::store::embedded::writer::operations::{NewEntries, PendingBatch, Settle, SettleAction, millis};
use crate::store::embedded::writer::queue::WriteQueue;

/// The maximum size of an entry, which must fit into memory several times.
const MAX_ENTRY_BYTES: usize = 64 * 1024 * 1024;

/// State shared by the writer, the readers and the callers.
#[derive(Debug)]
struct Shared {
    streams: RwLock<HashMap<StreamName, Arc<Published>>>,
    /// Changes when a stream is created.
    made: watch::Sender<()>,
    /// Changes when any stream has a newer entry.
    news: watch::Sender<()>,
    queue: WriteQueue,
    damage: FileDamage,
    readers: OnceLock<Readers>,
    /// Whether the checkpointer has finished, so that the writer may reset the write-ahead log.
    is_checkpointed: AtomicBool,
    checkpoints: RwLock<Option<SyncSender<()>>>,
    closed: CancellationToken,
}

impl Shared {
    fn find(&self, stream: &StreamName) -> Option<Arc<Published>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).get(stream).cloned()
    }

    /// Makes a stream visible to readers.
    fn publish(&self, stream: &Arc<Published>) {
        if self.find(&stream.name).is_some_and(|known| Arc::ptr_eq(&known, stream)) {
            return;
        }
        self.streams.write().unwrap_or_else(PoisonError::into_inner).insert(stream.name.clone(), stream.clone());
        self.made.send_replace(());
    }

    fn request_checkpoint(&self) {
        if let Some(checkpoints) = &*self.checkpoints.read().unwrap_or_else(PoisonError::into_inner) {
            // A request that is already queued covers this one.
            checkpoints.try_send(()).ok();
        }
    }

    fn close(&self) {
        self.closed.cancel();
        self.queue.close();
        if let Some(readers) = self.readers.get() {
            readers.close();
        }
        self.checkpoints.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The store on the local disk. Created by [`Config::open`].
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    leases: Leases,
    /// Cancelled when the writer's thread has released all files.
    ended: CancellationToken,
    /// Whether accepted entries are on the disk.
    is_synced_each: bool,
}

impl fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedStore").field("is_closed", &self.shared.closed.is_cancelled()).finish_non_exhaustive()
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl EmbeddedStore {
    /// Runs `work` on the writer's thread, in one commit with other queued work.
    async fn call<R: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnMut(&mut Writer) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.shared.queue.call(bytes, false, work).await.inspect_err(|error| self.shared.damage.note(error))
    }

    /// Runs `work` on the writer's thread in a transaction of its own, after all earlier work is committed.
    async fn call_alone<R: Send + 'static>(
        &self,
        work: impl FnMut(&mut Writer) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.shared.queue.call(0, true, work).await.inspect_err(|error| self.shared.damage.note(error))
    }

    fn fail_if_closed(&self) -> Result<(), StoreError> {
        if self.shared.closed.is_cancelled() { Err(is_closed_error()) } else { Ok(()) }
    }
}

fn encode(entries: Vec<NewEntry>) -> Result<NewEntries, StoreError> {
    let mut new = NewEntries { bytes: Vec::new(), entries: Vec::with_capacity(entries.len()) };
    for entry in entries {
        let size = entry.fields.size_bytes();
        if size > MAX_ENTRY_BYTES {
            let message = format!("cannot append an entry of {size} bytes: the maximum is {MAX_ENTRY_BYTES}");
            return Err(StoreError::new(StoreErrorKind::Internal, message));
        }
        let start = new.bytes.len();
        disk::chunk::encode(&entry.fields, &mut new.bytes);
        new.entries.push(writer::operations::EncodedEntry {
            fields: start..new.bytes.len(),
            event_id: entry.fields.get(field::ID).cloned().unwrap_or_default(),
            key: entry.idempotency.map(|key| (key.key, millis(key.window))),
        });
    }
    Ok(new)
}

/// Decodes the entries that the writer made pending.
fn deliver(stream: &StreamName, taken: PendingBatch, delivered_at: Instant) -> Result<Reclaimed, StoreError> {
    let deliveries = taken.entries.into_iter().map(|(chunk, slot, attempt)| {
        let entry = chunk.entry(slot).map_err(|damage| {
            disk::schema::corrupt(format!("entry {} of stream `{stream}` cannot be read: {damage}", slot.id))
        })?;
        Ok(Delivery { entry, attempt, delivered_at })
    });
    let deliveries = deliveries.collect::<Result<_, StoreError>>()?;
    Ok(Reclaimed { claimed: Claimed { deliveries, lost: taken.lost }, next: taken.next, held_back: taken.held_back })
}

/// Waits for a change until the deadline. Returns whether there was one.
async fn changed<T>(receiver: &mut watch::Receiver<T>, deadline: Instant, closed: &CancellationToken) -> bool {
    tokio::select! {
        result = receiver.changed() => result.is_ok(),
        () = closed.cancelled() => true,
        () = tokio::time::sleep_until(deadline.into()) => false,
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        if entries.len() > MAX_APPEND {
            let message = format!("cannot append {} entries at once: the maximum is {MAX_APPEND}", entries.len());
            return Err(StoreError::new(StoreErrorKind::Internal, message));
        }
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        self.shared.damage.fail_if_any()?;
        let (stream, new) = (stream.clone(), encode(entries)?);
        self.call(new.bytes.len(), move |writer| writer.append(&stream, &new)).await
    }

    async fn check_durability(&self, durability: super::Durability) -> Result<(), StoreError> {
        if durability.replicated {
            let message = "the embedded store has no replicas (durability replicated)";
            return Err(StoreError::new(StoreErrorKind::Unsupported, message));
        }
        if durability.fsync && !self.is_synced_each {
            let message = "the embedded store syncs at intervals only (store.embedded.durability must be \"commit\")";
            return Err(StoreError::new(StoreErrorKind::Unsupported, message));
        }
        Ok(())
    }

    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.fail_if_closed()?;
        match self.shared.find(stream) {
            Some(stream) => self.read(&stream, range, limit, false).await,
            None => Ok(Vec::new()),
        }
    }

    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError> {
        let deadline = Instant::now() + wait;
        let found = loop {
            let mut made = self.shared.made.subscribe();
            self.fail_if_closed()?;
            if let Some(found) = self.shared.find(stream) {
                break found;
            }
            if !changed(&mut made, deadline, &self.shared.closed).await {
                return Ok(Vec::new());
            }
        };
        let mut newest = found.newest.subscribe();
        if after == EntryId::MAX {
            // No id can follow this one.
            changed(&mut watch::Sender::new(()).subscribe(), deadline, &self.shared.closed).await;
            return Ok(Vec::new());
        }
        loop {
            self.fail_if_closed()?;
            newest.mark_unchanged();
            let entries = self.read(&found, Range::after(after), limit, true).await?;
            if !entries.is_empty() || limit == 0 || !changed(&mut newest, deadline, &self.shared.closed).await {
                return Ok(entries);
            }
        }
    }

    async fn wait_any(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        self.wait_for_any(positions, wait).await
    }

    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError> {
        let (stream, group) = (stream.clone(), group.clone());
        self.call_alone(move |writer| writer.ensure_group(&stream, &group, start)).await
    }

    async fn fetch(&self, cursor: &Cursor, limit: usize, wait: Duration) -> Result<Vec<Delivery>, StoreError> {
        let deadline = Instant::now() + wait;
        let stream = self.shared.find(&cursor.stream);
        let mut newest = stream.map(|stream| stream.newest.subscribe());
        loop {
            if let Some(newest) = &mut newest {
                newest.mark_unchanged();
            }
            let (fetching, check_lease) = (cursor.clone(), self.leases.lease_check(cursor));
            let delivered_at = Instant::now();
            let taken = self.call(0, move |writer| check_lease().and_then(|()| writer.fetch(&fetching, limit))).await?;
            let is_done = !taken.entries.is_empty() || limit == 0;
            let Some(newest) = newest.as_mut().filter(|_| !is_done) else {
                return Ok(deliver(&cursor.stream, taken, delivered_at)?.claimed.deliveries);
            };
            if !changed(newest, deadline, &self.shared.closed).await {
                return Ok(Vec::new());
            }
        }
    }

    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError> {
        let (asked, ids, delivered_at) = (cursor.clone(), ids.to_vec(), Instant::now());
        let check_lease = self.leases.lease_check(cursor);
        let claim = move |writer: &mut Writer| check_lease().and_then(|()| writer.claim(&asked, &ids, millis(idle)));
        let taken = self.call(0, claim).await?;
        Ok(deliver(&cursor.stream, taken, delivered_at)?.claimed)
    }

    async fn reclaim_isolated(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<Reclaimed, StoreError> {
        let (asked, delivered_at) = (cursor.clone(), Instant::now());
        let check_lease = self.leases.lease_check(cursor);
        let reclaim = move |writer: &mut Writer| {
            check_lease().and_then(|()| writer.reclaim(&asked, millis(idle), from, limit, isolation))
        };
        let taken = self.call(0, reclaim).await?;
        deliver(&cursor.stream, taken, delivered_at)
    }

    async fn redeliver(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, StoreError> {
        let (asked, delivered_at) = (cursor.clone(), Instant::now());
        let done = self.call(0, move |writer| writer.redeliver(&asked, redelivery, from, limit)).await?;
        let exhausted = done.exhausted.into_iter();
        Ok(Redelivered {
            redelivered: done.redelivered,
            foreign: done.foreign,
            exhausted: exhausted.map(|(entry, attempt)| Delivery { entry, attempt, delivered_at }).collect(),
            lost: done.lost,
            next: done.next,
        })
    }

    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let mut bytes = 0;
        let endings = settlements.iter().map(|settlement| {
            let how = match &settlement.outcome {
                Outcome::Acknowledge => SettleAction::Acknowledge,
                Outcome::Filter => SettleAction::Filter,
                Outcome::Retry(due) => SettleAction::Retry(millis(*due)),
                Outcome::Release => SettleAction::Release,
                Outcome::DeadLetter { to, fields } => {
                    let mut encoded = Vec::new();
                    disk::chunk::encode(fields, &mut encoded);
                    bytes += encoded.len();
                    SettleAction::DeadLetter { to: to.clone(), fields: encoded }
                }
            };
            Settle { id: settlement.delivery.entry.id, how }
        });
        let (cursor, endings, check_lease) =
            (cursor.clone(), endings.collect::<Vec<_>>(), self.leases.lease_check(cursor));
        self.call(bytes, move |writer| check_lease().map(|()| writer.settle(&cursor, &endings))).await
    }

    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let (cursor, ids, check_lease) = (cursor.clone(), ids.to_vec(), self.leases.lease_check(cursor));
        self.call(0, move |writer| check_lease().map(|()| writer.extend(&cursor, &ids))).await
    }

    async fn settle_by_receipt(
        &self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, StoreError> {
        let (cursor, actions) = (cursor.clone(), actions.to_vec());
        let check_lease = self.leases.lease_check(&cursor);
        self.call(0, move |writer| check_lease().and_then(|()| writer.settle_by_receipt(&cursor, &actions))).await
    }

    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError> {
        let cursor = cursor.clone();
        self.call(0, move |writer| writer.pending(&cursor, own_only, from, limit)).await
    }

    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError> {
        let stream = stream.clone();
        self.call(0, move |writer| Ok(writer.describe(&stream))).await
    }

    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError> {
        let stream = stream.clone();
        self.call(0, move |writer| Ok(writer.epoch(&stream))).await
    }

    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let (stream, ignored) = (stream.clone(), ignored.to_vec());
            let (more, goes_on) = self.call_alone(move |writer| writer.trim(&stream, trim, &ignored)).await?;
            removed += more;
            if !goes_on {
                return Ok(removed);
            }
        }
    }

    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError> {
        let stream = stream.clone();
        self.call_alone(move |writer| writer.drop_oldest(&stream, keep)).await
    }

    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError> {
        let (stream, group) = (stream.clone(), group.clone());
        self.call(0, move |writer| Ok(writer.write_off(&stream, &group, known, missing))).await
    }

    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError> {
        let (stream, ids) = (stream.clone(), ids.to_vec());
        self.call_alone(move |writer| writer.discard(&stream, &ids)).await
    }

    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError> {
        let cursor = cursor.clone();
        self.call(0, move |writer| writer.remove_consumer(&cursor)).await
    }

    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        self.fail_if_closed()?;
        Ok(self.leases.lease(stream, name, holder, ttl))
    }

    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError> {
        self.fail_if_closed()?;
        Ok(self.leases.release(stream, lease))
    }

    async fn check(&self) -> Result<StoreStatus, StoreError> {
        self.shared.damage.fail_if_any()?;
        self.call(0, Writer::check).await
    }

    async fn close(&self) {
        self.shared.close();
        self.ended.cancelled().await;
    }
}

impl fmt::Debug for WriteQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteQueue").finish_non_exhaustive()
    }
}
