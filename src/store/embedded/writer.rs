//! The writer thread: drains the queue, applies the operations in memory, and commits them together.
//!
//! There is no timer: while one commit is being synced, the next batch collects in the queue. An operation (see
//! [`operations`]) changes state that only the writer owns, and marks it as changed. The commit writes the marked state.
//! Only then is it published to readers, and the callers get their results. After a failed commit the writer reads the
//! marked state back from the tables and repeats the operations one by one, so that a bad operation fails alone.

pub(super) mod accounts;
mod loading;
pub(super) mod maintenance;
pub(super) mod operations;
pub(super) mod queue;
pub(super) mod receipts;
pub(super) mod redeliver;
pub(super) mod remove;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rusqlite::Connection;

use super::Shared;
use crate::clock::now_ms;
use crate::event::{EntryId, Epoch, GroupName, StreamName};
use crate::store::embedded::disk::chunk::{Chunk, ChunkBuilder};
use crate::store::embedded::disk::reserve::Reserve;
use crate::store::embedded::disk::schema;
use crate::store::embedded::disk::schema::{FirstEntry, StreamRow, engine_error};
use crate::store::embedded::disk::watermarks::Watermarks;
use crate::store::embedded::memory::groups::Group;
use crate::store::embedded::memory::index::{ChunkRef, Published, RecentChunks};
use crate::store::embedded::writer::queue::{Dequeued, WriteOp, WriteQueue};
use crate::store::{StoreError, StoreErrorKind};

/// The files in the store's folder.
pub(super) const DATABASE: &str = "bus.sqlite3";
const MARKS: &str = "marks";
const RESERVE: &str = "reserve";

/// The maximum of appended bytes in one transaction, exceeded by one call at most.
const TRANSACTION_BYTES: usize = 4 * 1024 * 1024;
/// The growth of the write-ahead log after which it is checkpointed; half of the reserve if that is less.
const CHECKPOINT_BYTES: usize = 8 * 1024 * 1024;
/// The approximate bytes that a commit writes besides the chunks.
const COMMIT_BYTES: usize = 16 * 1024;

/// How the writer makes commits durable.
#[derive(Debug, Clone, Copy)]
pub(super) enum Syncing {
    /// Appends are synced before they are answered.
    Each,
    /// All commits are synced at this interval.
    Every(Duration),
}

/// The settings of a writer.
#[derive(Debug)]
pub(super) struct WriterOptions {
    pub(super) syncing: Syncing,
    /// Memory for the newest chunks.
    pub(super) recent_bytes: usize,
    /// The size of the reserve on the disk.
    pub(super) reserve_bytes: u64,
}

/// The writer's state of a stream, with the chunks staged for the next commit.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) row: StreamRow,
    pub(super) published: Arc<Published>,
    pub(super) length: u64,
    pub(super) groups: BTreeMap<GroupName, Group>,
    /// Whether the row itself must be written. Appends do not need it, because the last chunk holds the new counters.
    pub(super) is_changed: bool,
    staged: Vec<ChunkBuilder>,
}

/// The writer. It runs on one thread.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) connection: Connection,
    path: PathBuf,
    pub(super) syncing: Syncing,
    pub(super) shared: Arc<Shared>,
    /// The streams by index. A stream's number is its index plus one.
    pub(super) streams: Vec<Stream>,
    by_name: HashMap<StreamName, usize>,
    /// The indexes of streams that operations have changed since the last commit.
    touched: BTreeSet<usize>,
    pub(super) staged: StagedCommit,
    pub(super) numbers: RowNumbers,
    clock: SteadyClock,
    recent: RecentChunks,
    wal: WalState,
    pruning: KeyPruning,
    /// Whether memory may differ from the tables, because reading them back failed.
    is_stale: bool,
    marks: Watermarks,
    /// The indexes of streams with appends since the last sync.
    unmarked: BTreeSet<usize>,
    pub(super) reserve: Reserve,
    /// Warnings for the operator.
    pub(super) warnings: Vec<String>,
}

/// The state of the write-ahead log.
#[derive(Debug)]
struct WalState {
    /// The current `synchronous` setting of the connection.
    is_synchronous: Option<bool>,
    /// The time of the first commit that was not synced.
    unsynced_since: Option<Instant>,
    /// Whether a sync failed, so that only a completed checkpoint makes the log reliable again.
    is_uncertain: bool,
    /// The bytes written since the last checkpoint.
    bytes: usize,
    /// The bytes after which a checkpoint is due.
    checkpoint_bytes: usize,
}

/// The pruning of idempotency keys.
#[derive(Debug)]
struct KeyPruning {
    has_keys: bool,
    pruned_at: Instant,
}

/// The work of the next commit besides writing changed streams.
#[derive(Debug, Default)]
pub(super) struct StagedCommit {
    /// The idempotency keys to write.
    pub(super) keys: HashMap<(u32, Bytes), FirstEntry>,
    /// Whether it must be durable before the callers get their results.
    pub(super) must_sync: bool,
    /// Whether it must write something, for a check.
    pub(super) must_write: bool,
    /// Appended bytes.
    bytes: usize,
}

/// The last numbers assigned to new rows.
#[derive(Debug, Default)]
pub(super) struct RowNumbers {
    chunk: i64,
    pub(super) lease: i64,
    pub(super) group: i64,
    pub(super) consumer: i64,
}

/// Wall-clock milliseconds that never step back while the process runs, so that idle times are reliable.
#[derive(Debug)]
struct SteadyClock {
    base_ms: u64,
    base: Instant,
}

impl SteadyClock {
    fn now_ms(&self) -> u64 {
        self.base_ms.saturating_add(u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX))
    }
}

/// A sealed chunk for the next commit.
struct NewChunk {
    place: usize,
    row: i64,
    chunk: Chunk,
    holes: u64,
}

impl Writer {
    /// Opens or creates the database, and loads everything but the payloads.
    pub(super) fn open(folder: &Path, options: &WriterOptions, shared: Arc<Shared>) -> Result<Self, StoreError> {
        let path = folder.join(DATABASE);
        let reserve = Reserve::new(folder.join(RESERVE), options.reserve_bytes);
        let half = usize::try_from(reserve.bytes() / 2).unwrap_or(usize::MAX);
        let left_in_log = fs::metadata(folder.join(format!("{DATABASE}-wal"))).map_or(0, |log| log.len());
        let left_in_log = usize::try_from(left_in_log).unwrap_or(usize::MAX);
        let mut connection = schema::connect(&path, true)?;
        schema::prepare(&mut connection, &path)?;
        let mut writer = Self {
            connection,
            path,
            syncing: options.syncing,
            shared,
            streams: Vec::new(),
            by_name: HashMap::new(),
            touched: BTreeSet::new(),
            staged: StagedCommit::default(),
            numbers: RowNumbers::default(),
            clock: SteadyClock { base_ms: now_ms(), base: Instant::now() },
            recent: RecentChunks::new(options.recent_bytes),
            wal: WalState {
                is_synchronous: None,
                unsynced_since: None,
                is_uncertain: false,
                bytes: left_in_log,
                checkpoint_bytes: if half == 0 { CHECKPOINT_BYTES } else { half.min(CHECKPOINT_BYTES) },
            },
            pruning: KeyPruning { has_keys: true, pruned_at: Instant::now() },
            is_stale: false,
            marks: Watermarks::open(&folder.join(MARKS)),
            unmarked: BTreeSet::new(),
            reserve,
            warnings: Vec::new(),
        };
        writer.load()?;
        Ok(writer)
    }

    /// Runs until the queue is closed and empty.
    pub(super) fn run(mut self, queue: &WriteQueue) {
        loop {
            let deadline = match (self.syncing, self.wal.unsynced_since) {
                (Syncing::Every(interval), Some(since)) => Some(since + interval),
                _ => None,
            };
            match queue.take(deadline) {
                Dequeued::Work(work) => self.do_all(work),
                Dequeued::Nothing => {}
                Dequeued::Closed => break,
            }
            self.run_maintenance();
        }
        self.finish();
    }

    fn do_all(&mut self, mut work: VecDeque<Box<dyn WriteOp>>) {
        let mut together: Vec<Box<dyn WriteOp>> = Vec::with_capacity(work.len());
        while let Some(mut next) = work.pop_front() {
            if next.is_alone() {
                self.commit_all(std::mem::take(&mut together));
            }
            let is_alone = next.is_alone();
            if let Err(error) = self.refresh() {
                next.answer(Some(error));
                continue;
            }
            next.run(self);
            together.push(next);
            if is_alone || self.staged.bytes > TRANSACTION_BYTES {
                self.commit_all(std::mem::take(&mut together));
            }
        }
        self.commit_all(together);
    }

    /// Commits the changes of these calls and returns their results.
    fn commit_all(&mut self, work: Vec<Box<dyn WriteOp>>) {
        let Err(error) = self.commit() else {
            for one in work {
                one.answer(None);
            }
            return;
        };
        self.reload();
        if work.len() == 1 {
            work.into_iter().zip([error]).for_each(|(one, error)| one.answer(Some(error)));
            return;
        }
        for mut one in work {
            let done = self.refresh().and_then(|()| {
                one.run(self);
                self.commit().inspect_err(|_error| self.is_stale = true)
            });
            if done.is_err() {
                self.reload();
            }
            one.answer(done.err());
        }
    }

    /// Repeats a read-back that failed.
    fn refresh(&mut self) -> Result<(), StoreError> {
        if self.is_stale {
            self.read_back()?;
        }
        Ok(())
    }

    /// Writes all marked state in one transaction, then publishes it.
    fn commit(&mut self) -> Result<(), StoreError> {
        let is_needed = self.staged.must_write || !self.touched.is_empty() || !self.staged.keys.is_empty();
        if !is_needed {
            return Ok(());
        }
        let chunks = self.seal();
        let touched = std::mem::take(&mut self.touched);
        for place in &touched {
            self.streams[*place].groups.values_mut().for_each(Group::settle_changes);
        }
        let streams = std::mem::take(&mut self.streams);
        let staged = std::mem::take(&mut self.staged);
        let result = self.transaction(staged.must_sync, |connection| {
            for NewChunk { place, row, chunk, holes } in &chunks {
                schema::insert_chunk(connection, *row, chunk)?;
                let bytes = u32::try_from(chunk.body().len()).unwrap_or(u32::MAX);
                let chunk = ChunkRef { row: *row, head: chunk.head, holes: *holes, bytes, is_damaged: false };
                debug_assert_eq!(chunk.head.stream as usize, place + 1);
                schema::save_ref(connection, &chunk)?;
            }
            for stream in touched.iter().map(|place| &streams[*place]) {
                write_stream(connection, stream)?;
            }
            for ((stream, key), first) in &staged.keys {
                schema::save_key(connection, *stream, key, first)?;
            }
            if staged.must_write {
                connection.prepare_cached("UPDATE meta SET value = value + 1 WHERE key = 'writes'")?.execute([])?;
            }
            Ok(())
        });
        self.streams = streams;
        self.touched = touched;
        result?;
        if !staged.keys.is_empty() {
            self.pruning.has_keys = true;
        }
        self.wal.bytes += COMMIT_BYTES + staged.bytes;
        self.unmarked.extend(chunks.iter().map(|chunk| chunk.place));
        self.publish(chunks);
        if self.wal.unsynced_since.is_none() {
            self.mark();
        }
        Ok(())
    }

    /// Writes the watermarks of streams, after a sync.
    pub(super) fn mark(&mut self) {
        for place in std::mem::take(&mut self.unmarked) {
            self.marks.write(&self.streams[place].row);
        }
    }

    /// Commits and runs the maintenance, for callers without a queue.
    pub(super) fn commit_now(&mut self) -> Result<(), StoreError> {
        self.commit()?;
        self.run_maintenance();
        Ok(())
    }

    /// Seals the staged chunks.
    fn seal(&mut self) -> Vec<NewChunk> {
        let mut chunks = Vec::new();
        for place in &self.touched {
            let stream = &mut self.streams[*place];
            let staged: u64 = stream.staged.iter().map(|builder| u64::from(builder.count())).sum();
            let mut added = stream.row.added - staged;
            // Entries added since the last chunk that are in no chunk were discarded.
            let last = stream.published.log().chunks.back().map(|chunk| chunk.head.added);
            let mut holes = last.map_or(0, |last| added.saturating_sub(last));
            for builder in stream.staged.drain(..) {
                added += u64::from(builder.count());
                self.numbers.chunk += 1;
                chunks.push(NewChunk { place: *place, row: self.numbers.chunk, chunk: builder.seal(added), holes });
                holes = 0;
            }
        }
        chunks
    }

    fn publish(&mut self, chunks: Vec<NewChunk>) {
        for NewChunk { place, row, chunk, holes } in chunks {
            let published = &self.streams[place].published;
            let (last, bytes) = (chunk.head.last, chunk.body().len());
            published.log().push(row, chunk, holes);
            self.recent.add(published, last, bytes);
        }
        for place in std::mem::take(&mut self.touched) {
            let stream = &mut self.streams[place];
            stream.is_changed = false;
            for group in stream.groups.values_mut() {
                group.changes = crate::store::embedded::memory::groups::GroupChanges::default();
            }
            self.shared.publish(&stream.published);
            let last_id = stream.row.last_id;
            let is_newer = stream.published.newest.send_if_modified(|newest| {
                let is_newer = *newest != last_id;
                *newest = last_id;
                is_newer
            });
            if is_newer {
                self.shared.news.send_replace(());
            }
            self.merge(place);
        }
    }

    /// Runs `write` in one transaction, synced on return if `is_durable` and the configuration require it.
    ///
    /// A transaction that need not be durable adds no data; on a full disk it may use the space of the reserve.
    pub(super) fn transaction(
        &mut self,
        is_durable: bool,
        write: impl Fn(&Connection) -> rusqlite::Result<()>,
    ) -> Result<(), StoreError> {
        let result = self.transaction_once(is_durable, &write);
        let is_full = result.as_ref().is_err_and(|error| error.kind() == StoreErrorKind::Full);
        if is_full {
            self.make_room();
        }
        if is_full && !is_durable { self.transaction_once(is_durable, &write) } else { result }
    }

    fn transaction_once(
        &mut self,
        is_durable: bool,
        write: impl Fn(&Connection) -> rusqlite::Result<()>,
    ) -> Result<(), StoreError> {
        self.trust_log()?;
        let is_synchronous = is_durable && matches!(self.syncing, Syncing::Each);
        let result = self.try_transaction(is_synchronous, write);
        match &result {
            Ok(()) if is_synchronous => self.wal.unsynced_since = None,
            Ok(()) => {
                self.wal.unsynced_since.get_or_insert_with(Instant::now);
            }
            Err(error) => {
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::SystemIoFailure) {
                    self.wal.is_uncertain = true;
                }
                if !self.connection.is_autocommit()
                    && let Err(error) = self.connection.execute_batch("ROLLBACK")
                {
                    tracing::warn!(error = %error, "rollback of the embedded store failed");
                }
            }
        }
        let what = || format!("write to `{}`", self.path.display());
        result.map_err(|error| engine_error(&what(), error)).inspect_err(|error| self.shared.damage.note(error))
    }

    pub(super) fn try_transaction(
        &mut self,
        is_synchronous: bool,
        write: impl FnOnce(&Connection) -> rusqlite::Result<()>,
    ) -> rusqlite::Result<()> {
        if self.wal.is_synchronous != Some(is_synchronous) {
            self.wal.is_synchronous = None;
            let level = if is_synchronous { "FULL" } else { "NORMAL" };
            self.connection.execute_batch(&format!("PRAGMA synchronous = {level}"))?;
            self.wal.is_synchronous = Some(is_synchronous);
        }
        self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        write(&self.connection)?;
        self.connection.prepare_cached("COMMIT")?.execute([]).map(|_rows| ())
    }

    /// Checkpoints completely after a failed sync, so that later commits can be trusted.
    ///
    /// After a failed sync the kernel may have dropped pages that it still returns to readers. The log is reliable again
    /// when everything is in the database file and the file is synced.
    pub(super) fn trust_log(&mut self) -> Result<(), StoreError> {
        if self.wal.is_uncertain {
            if !self.connection.is_autocommit() {
                // The failed call may have left a transaction open. The checkpoint fails if the rollback did.
                self.connection.execute_batch("ROLLBACK").ok();
            }
            let is_busy: i64 = self
                .connection
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
                .map_err(|error| engine_error("checkpoint the write-ahead log", error))?;
            if is_busy != 0 {
                let message = "cannot write: readers still use the write-ahead log after a failed sync, retry later";
                return Err(StoreError::new(StoreErrorKind::Unavailable, message));
            }
            self.wal.is_uncertain = false;
        }
        Ok(())
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the index of a stream that has a row, created or not.
    pub(super) fn place(&self, name: &StreamName) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Returns the index of a stream that exists.
    pub(super) fn made(&self, name: &StreamName) -> Option<usize> {
        self.place(name).filter(|place| self.streams[*place].row.is_made)
    }

    /// Returns the index of a stream, and adds a row if it has none.
    pub(super) fn place_or_new(&mut self, name: &StreamName) -> usize {
        if let Some(place) = self.place(name) {
            return place;
        }
        let place = self.streams.len();
        let number = u32::try_from(place + 1).expect("fewer than 2^32 streams fit into memory");
        let row = StreamRow {
            number,
            name: name.clone(),
            epoch: Epoch::random(),
            is_made: false,
            last_id: EntryId::MIN,
            added: 0,
        };
        let published = Arc::new(Published::new(name.clone(), EntryId::MIN, VecDeque::new()));
        self.by_name.insert(name.clone(), place);
        self.streams.push(Stream {
            row,
            published,
            length: 0,
            groups: BTreeMap::new(),
            is_changed: true,
            staged: Vec::new(),
        });
        self.touched.insert(place);
        place
    }

    /// Returns a stream for changes. The next commit writes the marked ones.
    pub(super) fn change(&mut self, place: usize) -> &mut Stream {
        self.touched.insert(place);
        &mut self.streams[place]
    }

    /// Returns a group for changes, and the numbers for new rows.
    pub(super) fn change_group(&mut self, place: usize, group: &GroupName) -> Option<(&mut Group, &mut RowNumbers)> {
        self.touched.insert(place);
        let group = self.streams[place].groups.get_mut(group)?;
        Some((group, &mut self.numbers))
    }

    /// Assigns an id to an entry and adds it to the staged chunk.
    pub(super) fn stage(&mut self, place: usize, fields: &[u8]) -> EntryId {
        self.touched.insert(place);
        self.staged.must_sync = true;
        self.staged.bytes += fields.len();
        let stream = &mut self.streams[place];
        let last = stream.row.last_id;
        let now = now_ms();
        let id = if now > last.ms { EntryId::new(now, 0) } else { last.next() };
        if !stream.row.is_made {
            (stream.is_changed, stream.row.is_made) = (true, true);
        }
        stream.row.last_id = id;
        stream.row.added += 1;
        stream.length += 1;
        for group in stream.groups.values_mut().filter(|group| group.cursor >= id) {
            group.passed += 1;
            group.changes.is_changed = true;
            let base = &mut group.account().base;
            *base = base.map(|base| base + 1);
        }
        if stream.staged.last().is_none_or(ChunkBuilder::is_full) {
            stream.staged.push(ChunkBuilder::new(stream.row.number));
        }
        stream.staged.last_mut().expect("pushed just now").push(id, fields);
        id
    }

    /// Subtracts the bytes of chunks that were removed from memory.
    pub(super) fn freed(&mut self, bytes: usize) {
        self.recent.freed(bytes);
    }
}

pub(super) fn write_stream(connection: &Connection, stream: &Stream) -> rusqlite::Result<()> {
    if stream.is_changed {
        schema::save_stream(connection, &stream.row)?;
    }
    for group in stream.groups.values() {
        if group.changes.is_changed {
            schema::save_group(connection, stream.row.number, group)?;
        }
        if group.changes.is_account_changed {
            schema::save_account(connection, group)?;
        }
        for name in &group.changes.consumers {
            if let Some(consumer) = group.consumer_named(name) {
                schema::save_consumer(connection, group.number, consumer)?;
            }
        }
        for number in &group.changes.removed_consumers {
            schema::delete_consumer(connection, *number)?;
        }
        for number in &group.changes.leases {
            match group.lease(*number) {
                Some(lease) => schema::save_lease(connection, group.number, *number, lease)?,
                None => schema::delete_lease(connection, *number)?,
            }
        }
    }
    Ok(())
}
