//! The embedded store: streams, groups and deliveries on one machine, in one `SQLite` file.
//!
//! One thread writes (see `writer`): all that callers ask for while a commit is being synced goes into the next one.
//! Entries are kept in chunks, one row for up to 64 of them; what was delivered at once is one row as well. An index of
//! the chunks, the newest chunks themselves and the pending entries are in memory, so that who reads or consumes at the
//! head of a stream never waits for the disk. Promises: what was accepted survives a crash (and, with
//! [`Durability::Commit`], a power cut); damage is told by an error that names the entries, and never shown as
//! entries; one process at a time. Memory is bounded by [`Config::recent`], about 100 bytes per 32 or more entries
//! stored, and about 60 bytes per pending entry.

mod accounts;
mod chunk;
mod damage;
mod folder;
mod groups;
mod leases;
mod log;
mod marks;
mod news;
mod operations;
mod queue;
mod raw;
mod readers;
mod receipts;
mod redelivery;
mod removal;
mod reserve;
mod tables;
mod upkeep;
mod writer;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytesize::ByteSize;
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

#[cfg(any(test, fuzzing))]
pub use chunk::fuzz as fuzz_chunk;
pub use raw::{RawRate, raw_append_rate};

use self::damage::Damage;
use self::folder::FolderLock;
use self::leases::Leases;
use self::log::{ChunkRef, Found, Published};
use self::operations::{Ending, How, NewEntries, Taken, millis};
use self::queue::Queue;
use self::readers::Readers;
use self::tables::{ReadFailure, is_closed_error};
use self::writer::{DATABASE, Options, Syncing, Writer};
use super::{
    Appended, Care, Claimed, Cursor, Dropped, Lease, Leased, MAX_APPEND, Order, Outcome, Pending, Range, Receipt,
    Reclaimed, Redelivered, Redelivery, Redemption, Settled, Settlement, Start, Store, StoreError, StoreErrorKind,
    StoreStatus, StreamStatus, Trim,
};
use crate::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName, field};

/// Where the embedded store is and how durable it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder that the store keeps its files in; it is made where there is none.
    pub path: PathBuf,
    /// When an accepted entry is on the disk.
    pub durability: Durability,
    /// With `durability = "interval"`, how often what was accepted is written to the disk.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// Memory for the newest entries of all streams together, from which readers at the head are served.
    pub recent: ByteSize,
    /// Room kept on the disk by a file, for acknowledgements and trims to go on when the disk is full.
    pub reserve: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::from("data"),
            durability: Durability::Commit,
            interval: Duration::from_millis(50),
            recent: ByteSize::mib(16),
            reserve: ByteSize::mib(16),
        }
    }
}

/// When an accepted entry is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Before it is accepted: it survives a power cut.
    Commit,
    /// Within [`Config::interval`]: it survives a crash of the process, but a power cut takes the newest.
    Interval,
}

/// An entry may not be larger than this; it has to fit into memory several times.
const MAX_ENTRY_BYTES: usize = 64 * 1024 * 1024;

impl Config {
    /// Opens the store, and makes it where there is none. Blocking work is done on threads of its own.
    ///
    /// Fails where another process holds the folder, where it can't be written to, and where what is in it is damaged or
    /// of a newer format.
    pub async fn open(self) -> Result<EmbeddedStore, StoreError> {
        let (opened, when_opened) = oneshot::channel();
        readers::spawn("store-writer", move || match start(&self) {
            Ok((writer, store, files)) => {
                let end = End { shared: store.shared.clone(), ended: store.ended.clone() };
                // A store that no one takes closes itself.
                drop(opened.send(Ok(store)));
                writer.run(&end.shared.queue);
                files.close();
            }
            Err(error) => drop(opened.send(Err(error))),
        })?;
        when_opened.await.unwrap_or_else(|_panicked| Err(is_closed_error()))
    }
}

/// Tells everybody that the writer's thread has ended, also when it panicked.
struct End {
    shared: Arc<Shared>,
    ended: CancellationToken,
}

impl Drop for End {
    fn drop(&mut self) {
        self.shared.close();
        self.shared.queue.abandon();
        self.ended.cancel();
    }
}

/// What the writer's thread holds until it ends.
struct Files {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
    lock: FolderLock,
}

impl Files {
    fn close(self) {
        self.shared.close();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the embedded store had panicked");
            }
        }
        drop(self.lock);
    }
}

fn start(config: &Config) -> Result<(Writer, EmbeddedStore, Files), StoreError> {
    let lock = folder::lock(&config.path)?;
    let file = config.path.join(DATABASE);
    let syncing = match config.durability {
        Durability::Commit => Syncing::Each,
        Durability::Interval => Syncing::Every(config.interval),
    };
    let (shared, asked) = new_shared(&file);
    let recent_bytes = usize::try_from(config.recent.as_u64()).unwrap_or(usize::MAX);
    let options = Options { syncing, recent_bytes, reserve_bytes: config.reserve.as_u64() };
    let writer = Writer::open(&config.path, &options, shared.clone());
    let writer = writer.map_err(|error| damage::explained(error, &file))?;
    let (readers, mut threads) = Readers::start(&file)?;
    threads.push(readers::start_checkpointer(&file, &shared, asked)?);
    shared.readers.get_or_init(|| readers);
    let is_synced_each = config.durability == Durability::Commit;
    let store = EmbeddedStore {
        shared: shared.clone(),
        leases: Leases::default(),
        ended: CancellationToken::new(),
        is_synced_each,
    };
    Ok((writer, store, Files { shared, threads, lock }))
}

/// What is shared while nothing is open yet, and where requests to checkpoint come out.
fn new_shared(file: &Path) -> (Arc<Shared>, Receiver<()>) {
    let (checkpoints, asked) = readers::checkpoint_requests();
    let shared = Shared {
        streams: RwLock::default(),
        made: watch::Sender::new(()),
        news: watch::Sender::new(()),
        queue: Queue::new(),
        damage: Damage::new(file.to_owned()),
        readers: OnceLock::new(),
        is_checkpointed: AtomicBool::new(false),
        checkpoints: RwLock::new(Some(checkpoints)),
        closed: CancellationToken::new(),
    };
    (Arc::new(shared), asked)
}

/// What the writer, the readers and the callers share.
#[derive(Debug)]
struct Shared {
    streams: RwLock<HashMap<StreamName, Arc<Published>>>,
    /// Changes when a stream comes into being.
    made: watch::Sender<()>,
    /// Changes when any stream has a newer entry.
    news: watch::Sender<()>,
    queue: Queue,
    damage: Damage,
    readers: OnceLock<Readers>,
    /// Whether the checkpointer has finished and the writer may let the log begin anew.
    is_checkpointed: AtomicBool,
    checkpoints: RwLock<Option<SyncSender<()>>>,
    closed: CancellationToken,
}

impl Shared {
    fn find(&self, stream: &StreamName) -> Option<Arc<Published>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).get(stream).cloned()
    }

    /// Lets readers find a stream.
    fn publish(&self, stream: &Arc<Published>) {
        if self.find(&stream.name).is_some_and(|known| Arc::ptr_eq(&known, stream)) {
            return;
        }
        self.streams.write().unwrap_or_else(PoisonError::into_inner).insert(stream.name.clone(), stream.clone());
        self.made.send_replace(());
    }

    fn ask_for_checkpoint(&self) {
        if let Some(checkpoints) = &*self.checkpoints.read().unwrap_or_else(PoisonError::into_inner) {
            // One that waits already will see what this one was asked for.
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

/// The store on the local disk. See [`Config::open`].
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    leases: Leases,
    /// Cancelled when the writer's thread has let go of everything.
    ended: CancellationToken,
    /// Whether what is accepted is on the disk.
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

/// What a reader's thread found in the rows it was given.
struct RowsRead {
    entries: Vec<Entry>,
    /// How many of the rows were read to their end.
    rows: usize,
    failure: Option<ReadFailure>,
}

fn read_rows(
    connection: &Connection,
    stream: &StreamName,
    chunks: &[ChunkRef],
    range: Range,
    limit: usize,
) -> RowsRead {
    let mut entries = Vec::new();
    for (rows, chunk_ref) in chunks.iter().enumerate() {
        if entries.len() >= limit {
            return RowsRead { entries, rows, failure: None };
        }
        let read = tables::read_chunk(connection, stream, chunk_ref).and_then(|chunk| {
            let collected = chunk.collect(range, limit, &mut entries);
            collected.map_err(|damage| ReadFailure::Failed(tables::damaged_chunk(stream, chunk_ref, &damage)))
        });
        if let Err(failure) = read {
            return RowsRead { entries, rows, failure: Some(failure) };
        }
    }
    RowsRead { entries, rows: chunks.len(), failure: None }
}

impl EmbeddedStore {
    /// Has the writer do `work`, together with whatever else waits.
    async fn call<R: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnMut(&mut Writer) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.shared.queue.call(bytes, false, work).await.inspect_err(|error| self.shared.damage.note(error))
    }

    /// Has the writer do `work` when all before is committed, in a transaction of its own.
    async fn call_alone<R: Send + 'static>(
        &self,
        work: impl FnMut(&mut Writer) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.shared.queue.call(0, true, work).await.inspect_err(|error| self.shared.damage.note(error))
    }

    fn fail_if_closed(&self) -> Result<(), StoreError> {
        if self.shared.closed.is_cancelled() { Err(is_closed_error()) } else { Ok(()) }
    }

    /// The entries of a range. An error where any of them is damaged, unless `allow_part` and there are some before it.
    async fn read(
        &self,
        stream: &Arc<Published>,
        mut range: Range,
        limit: usize,
        allow_part: bool,
    ) -> Result<Vec<Entry>, StoreError> {
        let readers = self.shared.readers.get().ok_or_else(is_closed_error)?;
        let mut entries = Vec::new();
        let mut failed_at: Option<ChunkRef> = None;
        while entries.len() < limit && range.from <= range.to {
            let left = limit - entries.len();
            let found = stream.log().find(range, left);
            let (chunks, is_all) = match found {
                Found::Recent(chunks) => {
                    for chunk in chunks {
                        chunk.collect(range, limit, &mut entries).map_err(|damage| {
                            tables::corrupt(format!("recent entries of stream `{}` are damaged: {damage}", stream.name))
                        })?;
                    }
                    break;
                }
                Found::Rows { chunks, .. } if chunks.is_empty() => break,
                Found::Rows { chunks, is_all } => (chunks, is_all),
            };
            let (name, rows) = (stream.name.clone(), chunks.clone());
            let read = readers.read(move |connection| read_rows(connection, &name, &rows, range, left)).await?;
            entries.extend(read.entries);
            let passed = read.rows.checked_sub(1).and_then(|last| chunks.get(last));
            let error = match read.failure {
                None if is_all || read.rows < chunks.len() => break,
                None => None,
                Some(ReadFailure::Changed) => {
                    let failed = chunks.get(read.rows).copied();
                    let is_again = failed.is_some() && failed == failed_at;
                    failed_at = failed;
                    if !is_again {
                        // The writer commits first and tells afterwards what it moved: let it come to that.
                        self.call(0, |_writer| Ok(())).await?;
                    }
                    let reason = "their row is missing or holds something else";
                    failed.filter(|_| is_again).map(|chunk| tables::damaged_chunk(&stream.name, &chunk, &reason))
                }
                Some(ReadFailure::Failed(error)) => Some(error),
            };
            match error {
                Some(_) if allow_part && !entries.is_empty() => break,
                Some(error) => {
                    self.shared.damage.note(&error);
                    return Err(error);
                }
                None => {}
            }
            match (range.order, passed) {
                (_, None) => {}
                (Order::Forward, Some(chunk)) => range.from = range.from.max(chunk.head.last.next()),
                (Order::Backward, Some(chunk)) if chunk.head.first == EntryId::MIN => break,
                (Order::Backward, Some(chunk)) => range.to = range.to.min(chunk.head.first.previous()),
            }
        }
        Ok(entries)
    }
}

fn encode(entries: Vec<NewEntry>) -> Result<NewEntries, StoreError> {
    let mut new = NewEntries { bytes: Vec::new(), entries: Vec::with_capacity(entries.len()) };
    for entry in entries {
        let size = entry.fields.size_bytes();
        if size > MAX_ENTRY_BYTES {
            let message = format!("cannot append an entry of {size} bytes, the limit is {MAX_ENTRY_BYTES}");
            return Err(StoreError::new(StoreErrorKind::Internal, message));
        }
        let start = new.bytes.len();
        chunk::encode(&entry.fields, &mut new.bytes);
        new.entries.push(operations::NewEntry {
            fields: start..new.bytes.len(),
            event_id: entry.fields.get(field::ID).cloned().unwrap_or_default(),
            key: entry.idempotency.map(|key| (key.key, millis(key.window))),
        });
    }
    Ok(new)
}

/// Decodes what the writer made pending.
fn deliver(stream: &StreamName, taken: Taken, delivered_at: Instant) -> Result<Reclaimed, StoreError> {
    let deliveries = taken.entries.into_iter().map(|(chunk, slot, attempt)| {
        let entry = chunk.entry(slot).map_err(|damage| {
            tables::corrupt(format!("entry {} of stream `{stream}` can't be read: {damage}", slot.id))
        })?;
        Ok(Delivery { entry, attempt, delivered_at })
    });
    let deliveries = deliveries.collect::<Result<_, StoreError>>()?;
    Ok(Reclaimed { claimed: Claimed { deliveries, lost: taken.lost }, next: taken.next, held_back: taken.held_back })
}

/// Waits for a change, until the deadline; says whether there was one.
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
            let message = format!("cannot append {} entries at once, the limit is {MAX_APPEND}", entries.len());
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
            let message = "the embedded store writes to the disk at intervals only (store.embedded.durability)";
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
            // There is nothing after it, whatever comes.
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

    async fn news(
        &self,
        places: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        self.wait_for_news(places, wait).await
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
            let (asked, may_work) = (cursor.clone(), self.leases.guard(cursor));
            let delivered_at = Instant::now();
            let taken = self.call(0, move |writer| may_work().and_then(|()| writer.fetch(&asked, limit))).await?;
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
        let may_work = self.leases.guard(cursor);
        let claim = move |writer: &mut Writer| may_work().and_then(|()| writer.claim(&asked, &ids, millis(idle)));
        let taken = self.call(0, claim).await?;
        Ok(deliver(&cursor.stream, taken, delivered_at)?.claimed)
    }

    async fn reclaim_with_care(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        care: Care,
    ) -> Result<Reclaimed, StoreError> {
        let (asked, delivered_at) = (cursor.clone(), Instant::now());
        let may_work = self.leases.guard(cursor);
        let reclaim = move |writer: &mut Writer| {
            may_work().and_then(|()| writer.reclaim(&asked, millis(idle), from, limit, care))
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
            handed_on: done.handed_on,
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
                Outcome::Acknowledge => How::Acknowledge,
                Outcome::Filter => How::Filter,
                Outcome::Retry(due) => How::Retry(millis(*due)),
                Outcome::Release => How::Release,
                Outcome::DeadLetter { to, fields } => {
                    let mut encoded = Vec::new();
                    chunk::encode(fields, &mut encoded);
                    bytes += encoded.len();
                    How::DeadLetter { to: to.clone(), fields: encoded }
                }
            };
            Ending { id: settlement.delivery.entry.id, how }
        });
        let (cursor, endings, may_work) = (cursor.clone(), endings.collect::<Vec<_>>(), self.leases.guard(cursor));
        self.call(bytes, move |writer| may_work().map(|()| writer.settle(&cursor, &endings))).await
    }

    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let (cursor, ids, may_work) = (cursor.clone(), ids.to_vec(), self.leases.guard(cursor));
        self.call(0, move |writer| may_work().map(|()| writer.extend(&cursor, &ids))).await
    }

    async fn redeem(&self, cursor: &Cursor, redemptions: &[(Receipt, Redemption)]) -> Result<Vec<bool>, StoreError> {
        let (cursor, redemptions) = (cursor.clone(), redemptions.to_vec());
        let may_work = self.leases.guard(&cursor);
        self.call(0, move |writer| may_work().and_then(|()| writer.redeem(&cursor, &redemptions))).await
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

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}
