//! The `SQLite` tables: creates, opens and loads them, and classifies the errors of the engine.
//!
//! Small rows that decide about deliveries carry a CRC-32C of their own, as chunks do, because the engine's pages have
//! no checksums. Unsigned numbers are stored as signed integers with the same bits.

mod groups;

use std::collections::VecDeque;
use std::path::Path;

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row, ffi, params};

use crate::event::{EntryId, Epoch, StreamName};
use crate::store::embedded::disk::chunk::{Chunk, ChunkDamage, ChunkHead};
pub(crate) use crate::store::embedded::disk::schema::groups::{
    delete_consumer, delete_lease, load_groups, save_account, save_consumer, save_group, save_lease,
};
use crate::store::embedded::memory::index::ChunkRef;
use crate::store::{StoreError, StoreErrorKind};

/// The layout of the tables. An older program refuses a newer one.
const FORMAT: i64 = 2;

/// Watermarks the file as ours: `PRAGMA application_id`, "aBus".
const APPLICATION_ID: i64 = 0x6142_7573;

/// Older releases can lose committed transactions if a checkpoint and a write overlap in the write-ahead log.
const OLDEST_ENGINE: i32 = 3_051_003;

const SCHEMA: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE streams (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL, is_made INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, last_seq INTEGER NOT NULL, added INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE chunk_index (
    stream INTEGER NOT NULL, chunk INTEGER NOT NULL, first_ms INTEGER NOT NULL, first_seq INTEGER NOT NULL,
    last_ms INTEGER NOT NULL, last_seq INTEGER NOT NULL, count INTEGER NOT NULL, holes INTEGER NOT NULL,
    added INTEGER NOT NULL, bytes INTEGER NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (stream, chunk)) WITHOUT ROWID;
CREATE TABLE chunks (chunk INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE groups (
    number INTEGER PRIMARY KEY, stream INTEGER NOT NULL, name TEXT NOT NULL, cursor_ms INTEGER NOT NULL,
    cursor_seq INTEGER NOT NULL, passed INTEGER NOT NULL, read INTEGER NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (stream, name));
CREATE TABLE consumers (
    number INTEGER PRIMARY KEY, grp INTEGER NOT NULL, name TEXT NOT NULL, seen_ms INTEGER NOT NULL, UNIQUE (grp, name));
CREATE TABLE leases (
    number INTEGER PRIMARY KEY, grp INTEGER NOT NULL, consumer INTEGER NOT NULL, delivered_ms INTEGER NOT NULL,
    attempts INTEGER NOT NULL, ids BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE idempotency (
    stream INTEGER NOT NULL, key BLOB NOT NULL, ms INTEGER NOT NULL, seq INTEGER NOT NULL, event_id BLOB NOT NULL,
    expires_ms INTEGER NOT NULL, PRIMARY KEY (stream, key)) WITHOUT ROWID;
CREATE INDEX idempotency_expiry ON idempotency (expires_ms);
";

/// The tables that format 2 added.
const ACCOUNTS: &str = "
CREATE TABLE accounts (
    grp INTEGER PRIMARY KEY, base INTEGER NOT NULL, acknowledged INTEGER NOT NULL, filtered INTEGER NOT NULL,
    dead INTEGER NOT NULL, trimmed_pending INTEGER NOT NULL, trimmed_undelivered INTEGER NOT NULL,
    dropped INTEGER NOT NULL, damaged INTEGER NOT NULL, crc INTEGER NOT NULL);
";

/// Classifies an error of the engine.
pub(crate) fn engine_error(what: &str, error: rusqlite::Error) -> StoreError {
    use StoreErrorKind::{Corrupt, Denied, Full, Internal, Unavailable};
    let (kind, reason) = match &error {
        rusqlite::Error::SqliteFailure(failure, _) => match (failure.code, failure.extended_code) {
            (ErrorCode::DiskFull, _) | (_, ffi::SQLITE_IOERR_SHMSIZE) => (Full, "the disk is full"),
            (ErrorCode::SystemIoFailure, _) => (Unavailable, "reading or writing the disk failed"),
            (ErrorCode::CannotOpen, _) => (Unavailable, "the file cannot be opened"),
            (ErrorCode::ReadOnly, _) => (Unavailable, "the file or its disk is read-only"),
            (ErrorCode::PermissionDenied, _) => (Denied, "permission to the file is missing"),
            (ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked, _) => (Unavailable, "another program holds the file"),
            (ErrorCode::DatabaseCorrupt, _) => (Corrupt, "the file is damaged"),
            (ErrorCode::NotADatabase, _) => (Corrupt, "the file is not a database"),
            (ErrorCode::OutOfMemory, _) => (Unavailable, "out of memory"),
            _ => (Internal, "the engine refused the operation"),
        },
        _ => (Internal, "unexpected result of the engine"),
    };
    StoreError::new(kind, format!("cannot {what}: {reason}")).with_source(error)
}

/// Returns the error of calls after the store was closed.
pub(crate) fn is_closed_error() -> StoreError {
    StoreError::new(StoreErrorKind::Unavailable, "the embedded store is closed")
}

pub(crate) fn corrupt(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Corrupt, message)
}

/// Returns the error of a read that finds a damaged chunk.
pub(crate) fn damaged_chunk(stream: &StreamName, chunk: &ChunkRef, reason: &dyn std::fmt::Display) -> StoreError {
    let ChunkHead { first, last, count, .. } = chunk.head;
    corrupt(format!(
        "{count} entries of stream `{stream}`, from {first} to {last}, cannot be read: {reason}; to continue without \
         them, discard {first} and {last}"
    ))
}

/// Opens a connection to the database file.
pub(crate) fn connect(path: &Path, is_new: bool) -> Result<Connection, StoreError> {
    let what = format!("open `{}`", path.display());
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    if is_new {
        flags |= OpenFlags::SQLITE_OPEN_CREATE;
    }
    let open = || {
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.set_prepared_statement_cache_capacity(64);
        connection.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; PRAGMA journal_size_limit = 67108864;
             PRAGMA cache_size = -4096; PRAGMA temp_store = MEMORY; PRAGMA foreign_keys = OFF;",
        )?;
        Ok(connection)
    };
    open().map_err(|error| engine_error(&what, error))
}

/// Creates the tables in a new file, or checks that an existing file is ours and of a known format.
pub(crate) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    if rusqlite::version_number() < OLDEST_ENGINE {
        let version = rusqlite::version();
        return Err(StoreError::new(
            StoreErrorKind::Internal,
            format!("SQLite {version} may lose data; build with a newer one"),
        ));
    }
    let name = path.display();
    let what = format!("open `{name}`");
    let failed = |error| engine_error(&what, error);
    let number = |connection: &Connection, pragma: &str| {
        connection.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get::<_, i64>(0))
    };
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(failed)?;
    if tables == 0 {
        connection.execute_batch("PRAGMA synchronous = FULL").map_err(failed)?;
        let transaction = connection.transaction().map_err(failed)?;
        transaction.execute_batch(SCHEMA).map_err(failed)?;
        transaction.execute_batch(ACCOUNTS).map_err(failed)?;
        transaction.execute("INSERT INTO meta VALUES ('format', ?1), ('writes', 0)", [FORMAT]).map_err(failed)?;
        transaction.execute_batch(&format!("PRAGMA application_id = {APPLICATION_ID}")).map_err(failed)?;
        return transaction.commit().map_err(failed);
    }
    if number(connection, "application_id").map_err(failed)? != APPLICATION_ID {
        return Err(corrupt(format!(
            "`{name}` was not written by aurora-bus; set store.embedded.path to another folder"
        )));
    }
    let format: Option<i64> = connection
        .query_row("SELECT value FROM meta WHERE key = 'format'", [], |row| row.get(0))
        .optional()
        .map_err(failed)?;
    match format {
        Some(FORMAT) => Ok(()),
        Some(1) => {
            let transaction = connection.transaction().map_err(failed)?;
            transaction.execute_batch(ACCOUNTS).map_err(failed)?;
            transaction.execute("UPDATE meta SET value = ?1 WHERE key = 'format'", [FORMAT]).map_err(failed)?;
            transaction.commit().map_err(failed)
        }
        Some(newer) if newer > FORMAT => Err(StoreError::new(
            StoreErrorKind::Internal,
            format!(
                "`{name}` has format {newer}, but this aurora-bus reads formats up to {FORMAT}; use a newer release"
            ),
        )),
        _ => Err(corrupt(format!("`{name}` has no format number"))),
    }
}

/// Returns the checksum of a row: over its numbers and bytes, in order.
fn checksum(numbers: &[i64], bytes: &[u8]) -> i64 {
    let crc = numbers.iter().fold(0, |crc, number| crc32c::crc32c_append(crc, &number.to_le_bytes()));
    i64::from(crc32c::crc32c_append(crc, bytes))
}

/// The row of a stream.
#[derive(Debug, Clone)]
pub(crate) struct StreamRow {
    pub(crate) number: u32,
    pub(crate) name: StreamName,
    pub(crate) epoch: Epoch,
    pub(crate) is_made: bool,
    pub(crate) last_id: EntryId,
    pub(crate) added: u64,
}

pub(crate) fn save_stream(connection: &Connection, stream: &StreamRow) -> rusqlite::Result<()> {
    let last = [stream.last_id.ms.cast_signed(), stream.last_id.seq.cast_signed()];
    let numbers = [i64::from(stream.number), i64::from(stream.is_made), last[0], last[1], stream.added.cast_signed()];
    let text = format!("{}\n{}", stream.name, stream.epoch);
    connection
        .prepare_cached(
            "INSERT INTO streams VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (number) DO UPDATE SET
             epoch = ?3, is_made = ?4, last_ms = ?5, last_seq = ?6, added = ?7, crc = ?8",
        )?
        .execute(params![
            numbers[0],
            stream.name.as_str(),
            stream.epoch.as_str(),
            numbers[1],
            last[0],
            last[1],
            numbers[4],
            checksum(&numbers, text.as_bytes())
        ])
        .map(|_rows| ())
}

pub(crate) fn load_streams(connection: &Connection) -> Result<Vec<StreamRow>, StoreError> {
    let failed = |error| engine_error("read the list of streams", error);
    let mut statement = connection.prepare("SELECT * FROM streams ORDER BY number").map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    let mut streams = Vec::new();
    while let Some(row) = rows.next().map_err(failed)? {
        let read = || -> rusqlite::Result<_> {
            let names: (String, String) = (row.get(1)?, row.get(2)?);
            Ok((names, [row.get(0)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?], row.get::<_, i64>(7)?))
        };
        let ((name, epoch), numbers, crc) = read().map_err(failed)?;
        let is_right = crc == checksum(&numbers, format!("{name}\n{epoch}").as_bytes());
        let stream = is_right.then(|| {
            Some(StreamRow {
                number: u32::try_from(numbers[0]).ok()?,
                name: name.parse().ok()?,
                epoch: epoch.parse().ok()?,
                is_made: numbers[1] != 0,
                last_id: EntryId::new(numbers[2].cast_unsigned(), numbers[3].cast_unsigned()),
                added: numbers[4].cast_unsigned(),
            })
        });
        let name = name.chars().filter(|c| !c.is_control()).take(200).collect::<String>();
        streams.push(stream.flatten().ok_or_else(|| corrupt(format!("the row of stream `{name}` is damaged")))?);
    }
    Ok(streams)
}

pub(crate) fn insert_chunk(connection: &Connection, row: i64, chunk: &Chunk) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO chunks VALUES (?1, ?2)")?
        .execute(params![row, &chunk.body()[..]])
        .map(|_rows| ())
}

pub(crate) fn save_ref(connection: &Connection, chunk: &ChunkRef) -> rusqlite::Result<()> {
    let numbers = ref_numbers(chunk);
    let [stream, row, first_ms, first_seq, last_ms, last_seq, count, holes, added, bytes] = numbers;
    connection
        .prepare_cached("INSERT OR REPLACE INTO chunk_index VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)")?
        .execute(params![
            stream,
            row,
            first_ms,
            first_seq,
            last_ms,
            last_seq,
            count,
            holes,
            added,
            bytes,
            checksum(&numbers, &[])
        ])
        .map(|_rows| ())
}

fn ref_numbers(chunk: &ChunkRef) -> [i64; 10] {
    let ChunkHead { stream, count, added, first, last } = chunk.head;
    [
        i64::from(stream),
        chunk.row,
        first.ms.cast_signed(),
        first.seq.cast_signed(),
        last.ms.cast_signed(),
        last.seq.cast_signed(),
        i64::from(count),
        chunk.holes.cast_signed(),
        added.cast_signed(),
        i64::from(chunk.bytes),
    ]
}

pub(crate) fn delete_chunk(connection: &Connection, chunk: &ChunkRef) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM chunks WHERE chunk = ?1")?.execute([chunk.row])?;
    connection
        .prepare_cached("DELETE FROM chunk_index WHERE stream = ?1 AND chunk = ?2")?
        .execute([i64::from(chunk.head.stream), chunk.row])
        .map(|_rows| ())
}

/// Loads the chunk references of a stream, oldest first. Missing chunks are represented by a damaged reference.
pub(crate) fn load_chunks(connection: &Connection, stream: &StreamRow) -> Result<VecDeque<ChunkRef>, StoreError> {
    let what = format!("read the index of stream `{}`", stream.name);
    let failed = |error| engine_error(&what, error);
    let mut statement =
        connection.prepare_cached("SELECT * FROM chunk_index WHERE stream = ?1 ORDER BY chunk").map_err(failed)?;
    let mut rows = statement.query([stream.number]).map_err(failed)?;
    let mut chunks: VecDeque<ChunkRef> = VecDeque::new();
    while let Some(row) = rows.next().map_err(failed)? {
        let Some(chunk) = read_ref(row).map_err(failed)?.or_else(|| rebuild_ref(connection, row, stream)) else {
            // The counters of the next chunk show the gap.
            continue;
        };
        if let Some(gap) = chunks.back().and_then(|before| missing_between(before, &chunk)) {
            let error = damaged_chunk(&stream.name, &gap, &"their rows are missing");
            tracing::error!(stream = %stream.name, error = %error, "entries are missing in the embedded store");
            chunks.push_back(gap);
        }
        chunks.push_back(chunk);
    }
    Ok(chunks)
}

fn read_ref(row: &Row<'_>) -> rusqlite::Result<Option<ChunkRef>> {
    let mut numbers = [0_i64; 10];
    for (place, number) in numbers.iter_mut().enumerate() {
        *number = row.get(place)?;
    }
    let is_right = row.get::<_, i64>(10)? == checksum(&numbers, &[]);
    let [stream, row, first_ms, first_seq, last_ms, last_seq, count, holes, added, bytes] = numbers;
    let chunk = || {
        Some(ChunkRef {
            row,
            head: ChunkHead {
                stream: u32::try_from(stream).ok()?,
                count: u32::try_from(count).ok()?,
                added: added.cast_unsigned(),
                first: EntryId::new(first_ms.cast_unsigned(), first_seq.cast_unsigned()),
                last: EntryId::new(last_ms.cast_unsigned(), last_seq.cast_unsigned()),
            },
            holes: holes.cast_unsigned(),
            bytes: u32::try_from(bytes).ok()?,
            is_damaged: false,
        })
    };
    Ok(is_right.then(chunk).flatten())
}

/// Rebuilds a reference with a damaged row from the chunk itself.
fn rebuild_ref(connection: &Connection, row: &Row<'_>, stream: &StreamRow) -> Option<ChunkRef> {
    let row: i64 = row.get(1).ok()?;
    let chunk = read_body(connection, row).ok().flatten().and_then(|body| Chunk::open(body).ok())?;
    let bytes = u32::try_from(chunk.body().len()).ok()?;
    (chunk.head.stream == stream.number).then_some(ChunkRef {
        row,
        head: chunk.head,
        holes: 0,
        bytes,
        is_damaged: false,
    })
}

/// Returns a damaged reference for the chunks that are missing between two others by their counters.
fn missing_between(before: &ChunkRef, after: &ChunkRef) -> Option<ChunkRef> {
    let begun_at = after.head.added.saturating_sub(u64::from(after.head.count) + after.holes);
    let missing = begun_at.saturating_sub(before.head.added);
    let (first, last) = (before.head.last.next(), after.head.first.previous());
    (missing > 0 && first <= last).then(|| ChunkRef {
        row: 0,
        head: ChunkHead {
            count: u32::try_from(missing).unwrap_or(u32::MAX),
            added: begun_at,
            first,
            last,
            ..after.head
        },
        holes: 0,
        bytes: 0,
        is_damaged: true,
    })
}

fn read_body(connection: &Connection, row: i64) -> rusqlite::Result<Option<Bytes>> {
    let mut statement = connection.prepare_cached("SELECT body FROM chunks WHERE chunk = ?1")?;
    statement.query_row([row], |row| row.get::<_, Vec<u8>>(0).map(Bytes::from)).optional()
}

/// Why a chunk could not be read.
#[derive(Debug)]
pub(crate) enum ReadFailure {
    /// The row is gone or holds another chunk. It was trimmed, rewritten or merged since the reference was read; if the
    /// reference is still current, the row is damaged.
    Changed,
    Failed(StoreError),
}

/// Reads a chunk and checks that it matches the reference.
pub(crate) fn read_chunk(connection: &Connection, stream: &StreamName, chunk: &ChunkRef) -> Result<Chunk, ReadFailure> {
    let damaged = |reason: ChunkDamage| ReadFailure::Failed(damaged_chunk(stream, chunk, &reason));
    if chunk.is_damaged {
        return Err(ReadFailure::Failed(damaged_chunk(stream, chunk, &"their rows are missing")));
    }
    let body = read_body(connection, chunk.row).map_err(|error| {
        let error = engine_error(&format!("read stream `{stream}`"), error);
        if error.kind() == StoreErrorKind::Corrupt {
            return ReadFailure::Failed(damaged_chunk(stream, chunk, &error).with_source(error));
        }
        ReadFailure::Failed(error)
    })?;
    let read = Chunk::open(body.ok_or(ReadFailure::Changed)?).map_err(damaged)?;
    if read.head == chunk.head { Ok(read) } else { Err(ReadFailure::Changed) }
}

/// The first entry that was stored under an idempotency key.
#[derive(Debug, Clone)]
pub(crate) struct FirstEntry {
    pub(crate) id: EntryId,
    pub(crate) event_id: Bytes,
    pub(crate) expires_ms: u64,
}

pub(crate) fn find_key(connection: &Connection, stream: u32, key: &[u8]) -> rusqlite::Result<Option<FirstEntry>> {
    connection
        .prepare_cached("SELECT ms, seq, event_id, expires_ms FROM idempotency WHERE stream = ?1 AND key = ?2")?
        .query_row(params![stream, key], |row| {
            let id = EntryId::new(row.get::<_, i64>(0)?.cast_unsigned(), row.get::<_, i64>(1)?.cast_unsigned());
            let event_id = row.get::<_, Vec<u8>>(2)?.into();
            Ok(FirstEntry { id, event_id, expires_ms: row.get::<_, i64>(3)?.cast_unsigned() })
        })
        .optional()
}

pub(crate) fn save_key(connection: &Connection, stream: u32, key: &[u8], first: &FirstEntry) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO idempotency VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
        .execute(params![
            stream,
            key,
            first.id.ms.cast_signed(),
            first.id.seq.cast_signed(),
            &first.event_id[..],
            first.expires_ms.cast_signed()
        ])
        .map(|_rows| ())
}

/// Removes at most `limit` keys whose window has passed. Returns how many.
pub(crate) fn prune_keys(connection: &Connection, now_ms: u64, limit: u32) -> rusqlite::Result<usize> {
    connection
        .prepare_cached(
            "DELETE FROM idempotency WHERE (stream, key) IN
             (SELECT stream, key FROM idempotency INDEXED BY idempotency_expiry WHERE expires_ms <= ?1 LIMIT ?2)",
        )?
        .execute(params![now_ms.cast_signed(), limit])
}

/// Returns the greatest number in a table, or 0 if it is empty.
pub(crate) fn greatest(connection: &Connection, table: &str, column: &str) -> rusqlite::Result<i64> {
    connection.query_row(&format!("SELECT coalesce(max({column}), 0) FROM {table}"), [], |row| row.get(0))
}
