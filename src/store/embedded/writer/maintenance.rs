//! Maintenance on the writer thread: interval syncs, checkpoints, merging of small chunks, pruning of old idempotency
//! keys, freeing space on a full disk, and closing.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::store::embedded::disk::chunk::{Chunk, ChunkBuilder};
use crate::store::embedded::disk::schema;
use crate::store::embedded::disk::schema::engine_error;
use crate::store::embedded::memory::index::ChunkRef;
use crate::store::embedded::writer::{Syncing, Writer};
use crate::store::{StoreError, StoreErrorKind};

/// The number of idempotency keys pruned in one step.
const PRUNE_KEYS: u32 = 500;
const PRUNE_EVERY: Duration = Duration::from_secs(1);
/// A chunk with at most this many entries and bytes is small. `MERGE_CHUNKS` small ones in a row are merged.
const SMALL_ENTRIES: u32 = 16;
const SMALL_BYTES: u32 = 8 * 1024;
const MERGE_CHUNKS: usize = 16;

impl Writer {
    /// Frees space on a full disk: removes the reserve and checkpoints the log, so that the log is reset.
    pub(crate) fn make_room(&mut self) {
        self.reserve.release();
        if let Err(error) = checkpoint(&self.connection) {
            tracing::debug!(error = %error, "checkpoint on the full disk failed");
        }
    }

    /// Refuses operations that need space while the disk is full.
    pub(crate) fn fail_if_full(&mut self) -> Result<(), StoreError> {
        let connection = &self.connection;
        let has_room = |bytes: u64| {
            let number = |pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0));
            let free = number("PRAGMA freelist_count").and_then(|pages| Ok(pages * number("PRAGMA page_size")?));
            free.is_ok_and(|free| bytes > 0 && free.cast_unsigned() >= bytes)
        };
        if self.reserve.is_released(has_room) {
            let message = format!("cannot write to `{}`: the disk is full", self.path().display());
            return Err(StoreError::new(StoreErrorKind::Full, message));
        }
        Ok(())
    }

    /// Runs the work that no caller waits for.
    pub(crate) fn run_maintenance(&mut self) {
        self.sync_if_due(false);
        if self.pruning.has_keys && self.pruning.pruned_at.elapsed() >= PRUNE_EVERY {
            self.prune_keys();
        }
        if self.shared.is_checkpointed.swap(false, Ordering::AcqRel) {
            // The checkpointer has left few pages. With everything in the database, the log is reset.
            if let Err(error) = checkpoint(&self.connection) {
                tracing::warn!(error = %error, "checkpoint of the embedded store failed, its write-ahead log grows");
            }
        }
        if self.wal.bytes >= self.wal.checkpoint_bytes {
            self.wal.bytes = 0;
            self.shared.request_checkpoint();
        }
    }

    pub(crate) fn sync_if_due(&mut self, is_last: bool) {
        let Syncing::Every(interval) = self.syncing else { return };
        if self.wal.unsynced_since.is_none_or(|since| !is_last && since.elapsed() < interval) {
            return;
        }
        let synced = self.trust_log().and_then(|()| {
            let sync = |connection: &Connection| {
                connection.prepare_cached("UPDATE meta SET value = value + 1 WHERE key = 'writes'")?.execute([])
            };
            self.try_transaction(true, |connection| sync(connection).map(|_rows| ()))
                .map_err(|error| engine_error("sync", error))
        });
        match synced {
            Ok(()) => {
                self.wal.unsynced_since = None;
                self.mark();
            }
            Err(error) => {
                self.wal.is_uncertain = true;
                self.wal.unsynced_since = Some(Instant::now());
                tracing::error!(error = %error, "the embedded store could not sync accepted entries");
            }
        }
    }

    fn prune_keys(&mut self) {
        // Uses the clock of the lookups: a step of another clock would prune keys too early.
        let now_ms = self.now_ms();
        let pruned = Cell::new(0);
        let result = self.transaction(false, |connection| {
            pruned.set(schema::prune_keys(connection, now_ms, PRUNE_KEYS)?);
            Ok(())
        });
        match result {
            // There may be more keys: continue after the next batch.
            Ok(()) if pruned.get() == PRUNE_KEYS as usize => {}
            Ok(()) => self.pruning.pruned_at = Instant::now(),
            Err(error) => {
                self.pruning.pruned_at = Instant::now();
                tracing::debug!(error = %error, "pruning of idempotency keys failed");
            }
        }
    }

    /// Merges the newest chunks of a stream if they are many and small. Single appends leave such chunks.
    pub(crate) fn merge(&mut self, place: usize) {
        let stream = &self.streams[place];
        let run: Vec<ChunkRef> = {
            let log = stream.published.log();
            let is_small = |chunk: &&ChunkRef| {
                chunk.head.count <= SMALL_ENTRIES && chunk.bytes <= SMALL_BYTES && !chunk.is_damaged
            };
            let mut run: Vec<ChunkRef> = log.chunks.iter().rev().take_while(is_small).copied().collect();
            run.reverse();
            run
        };
        if run.len() < MERGE_CHUNKS {
            return;
        }
        let name = stream.row.name.clone();
        if let Err(error) = self.merge_run(place, &run) {
            tracing::debug!(stream = %name, error = %error, "merging of small chunks failed");
        }
    }

    fn merge_run(&mut self, place: usize, run: &[ChunkRef]) -> Result<(), StoreError> {
        let stream = &self.streams[place];
        let number = stream.row.number;
        let mut merged: Vec<(Chunk, u64)> = Vec::new();
        let mut builder = ChunkBuilder::new(number);
        let first = run[0];
        let mut added = first.head.added.saturating_sub(u64::from(first.head.count) + first.holes);
        let mut holes = 0;
        for chunk_ref in run {
            let damaged = |reason: &dyn std::fmt::Display| schema::damaged_chunk(&stream.row.name, chunk_ref, reason);
            let chunk =
                schema::read_chunk(&self.connection, &stream.row.name, chunk_ref).map_err(|failure| match failure {
                    schema::ReadFailure::Changed => damaged(&"the row has other content"),
                    schema::ReadFailure::Failed(error) => error,
                })?;
            holes += chunk_ref.holes;
            added += chunk_ref.holes;
            for slot in chunk.slots() {
                if builder.is_full() {
                    let full = std::mem::replace(&mut builder, ChunkBuilder::new(number));
                    merged.push((full.seal(added), std::mem::take(&mut holes)));
                }
                builder.push_slot(&chunk, slot.map_err(|damage| damaged(&damage))?);
                added += 1;
            }
        }
        merged.push((builder.seal(added), holes));
        let refs: Vec<ChunkRef> = merged
            .iter()
            .zip(run)
            .map(|((chunk, holes), old)| {
                let bytes = u32::try_from(chunk.body().len()).unwrap_or(u32::MAX);
                ChunkRef { row: old.row, head: chunk.head, holes: *holes, bytes, is_damaged: false }
            })
            .collect();
        self.transaction(false, |connection| {
            for (chunk_ref, (chunk, _)) in refs.iter().zip(&merged) {
                schema::insert_chunk(connection, chunk_ref.row, chunk)?;
                schema::save_ref(connection, chunk_ref)?;
            }
            run.iter().skip(refs.len()).try_for_each(|chunk| schema::delete_chunk(connection, chunk))
        })?;
        self.wal.bytes += refs.iter().map(|chunk| chunk.bytes as usize).sum::<usize>();
        let mut log = self.streams[place].published.log();
        let all = log.chunks.len();
        log.replace(all - run.len()..all, refs);
        Ok(())
    }

    pub(crate) fn finish(mut self) {
        self.sync_if_due(true);
        if let Err(error) = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_row| Ok(())) {
            tracing::warn!(error = %error, "final checkpoint of the embedded store failed, its write-ahead log is kept for the next start");
        }
        if let Err((_connection, error)) = self.connection.close() {
            tracing::warn!(error = %error, "closing the embedded store failed");
        }
    }
}

/// Checkpoints the write-ahead log without waiting for readers. Returns the number of pages left.
pub(crate) fn checkpoint(connection: &Connection) -> rusqlite::Result<i64> {
    connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
        let (pages, done): (i64, i64) = (row.get(1)?, row.get(2)?);
        Ok(pages - done)
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::clock::now_ms;
    use crate::event::EntryId;
    use crate::store::embedded::open::new_shared;
    use crate::store::embedded::writer::WriterOptions;

    fn open(folder: &Path) -> Writer {
        let (shared, _asked) = new_shared(folder);
        let options = WriterOptions { syncing: Syncing::Each, recent_bytes: 0, reserve_bytes: 0 };
        Writer::open(folder, &options, shared).expect("opened")
    }

    #[test]
    fn ids_grow_after_clock_steps_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let ahead = EntryId::new(now_ms() + 3_600_000, 7);
        let mut writer = open(folder.path());
        let place = writer.place_or_new(&"s".parse().expect("a valid name"));
        writer.change(place).row.last_id = ahead;
        let first = writer.stage(place, b"\0");
        assert_eq!(first, EntryId::new(ahead.ms, 8));
        writer.commit_now().expect("committed");
        drop(writer);
        let mut writer = open(folder.path());
        assert_eq!(writer.stage(place, b"\0"), EntryId::new(ahead.ms, 9));
    }

    #[test]
    fn uncommitted_entries_are_gone_after_read_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = open(folder.path());
        let (old, new) = ("old".parse().expect("a valid name"), "new".parse().expect("a valid name"));
        let place = writer.place_or_new(&old);
        let first = writer.stage(place, b"\0");
        writer.commit_now().expect("committed");
        writer.stage(place, b"\0");
        let other = writer.place_or_new(&new);
        writer.stage(other, b"\0");
        writer.read_back().expect("read back");
        assert_eq!(writer.place(&new), None);
        let stream = writer.change(place);
        assert_eq!((stream.row.last_id, stream.row.added, stream.length), (first, 1, 1));
        assert_eq!(writer.place_or_new(&new), other);
        writer.commit_now().expect("committed");
        assert_eq!(writer.change(place).published.log().chunks.len(), 1);
    }
}
