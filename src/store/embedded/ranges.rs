//! Reads ranges: the newest chunks from memory, older ones from their rows on a reader thread.
//!
//! Readers block no other work. Chunks may be trimmed, rewritten or merged meanwhile, and are then looked up again.

use std::sync::Arc;

use rusqlite::Connection;

use super::EmbeddedStore;
use crate::event::{Entry, EntryId, StreamName};
use crate::store::embedded::disk::schema;
use crate::store::embedded::disk::schema::{ReadFailure, is_closed_error};
use crate::store::embedded::memory::index::{ChunkLocation, ChunkRef, Published};
use crate::store::{Order, Range, StoreError};

/// The result of reading rows on a reader thread.
struct RowsRead {
    entries: Vec<Entry>,
    /// The number of rows that were read completely.
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
        let read = schema::read_chunk(connection, stream, chunk_ref).and_then(|chunk| {
            let collected = chunk.collect(range, limit, &mut entries);
            collected.map_err(|damage| ReadFailure::Failed(schema::damaged_chunk(stream, chunk_ref, &damage)))
        });
        if let Err(failure) = read {
            return RowsRead { entries, rows, failure: Some(failure) };
        }
    }
    RowsRead { entries, rows: chunks.len(), failure: None }
}

impl EmbeddedStore {
    /// Returns the entries of a range.
    ///
    /// Fails if any of them is damaged. With `allow_part`, returns the entries before the damage, if there are any.
    pub(super) async fn read(
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
                ChunkLocation::Recent(chunks) => {
                    for chunk in chunks {
                        chunk.collect(range, limit, &mut entries).map_err(|damage| {
                            schema::corrupt(format!("recent entries of stream `{}` are damaged: {damage}", stream.name))
                        })?;
                    }
                    break;
                }
                ChunkLocation::Rows { chunks, .. } if chunks.is_empty() => break,
                ChunkLocation::Rows { chunks, is_all } => (chunks, is_all),
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
                        // The writer commits before it publishes moved chunks: give it time to publish.
                        self.call(0, |_writer| Ok(())).await?;
                    }
                    let reason = "the row is missing or has other content";
                    failed.filter(|_| is_again).map(|chunk| schema::damaged_chunk(&stream.name, &chunk, &reason))
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
