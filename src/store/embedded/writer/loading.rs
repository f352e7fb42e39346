//! Loads state from the tables: everything at the start, and changed state after a failed commit.

use std::sync::Arc;

use super::{RowNumbers, StagedCommit, Stream, Writer};
use crate::event::Epoch;
use crate::store::embedded::disk::schema;
use crate::store::embedded::disk::schema::{StreamRow, engine_error};
use crate::store::embedded::memory::index::{ChunkRef, Published};
use crate::store::{LostReason, StoreError};

impl Writer {
    pub(super) fn load(&mut self) -> Result<(), StoreError> {
        let greatest = |table, column| {
            schema::greatest(&self.connection, table, column).map_err(|e| engine_error("read the tables", e))
        };
        self.numbers = RowNumbers {
            chunk: greatest("chunks", "chunk")?,
            lease: greatest("leases", "number")?,
            group: greatest("groups", "number")?,
            consumer: greatest("consumers", "number")?,
        };
        self.clock.base_ms = self.clock.base_ms.max(greatest("leases", "delivered_ms")?.cast_unsigned());
        let mut groups = schema::load_groups(&self.connection, None)?;
        for (place, mut row) in schema::load_streams(&self.connection)?.into_iter().enumerate() {
            if row.number as usize != place + 1 {
                return Err(schema::corrupt(format!("the row of the stream before `{}` is missing", row.name)));
            }
            let chunks = schema::load_chunks(&self.connection, &row)?;
            advance(&mut row, chunks.back());
            let length = chunks.iter().map(|chunk| u64::from(chunk.head.count)).sum();
            let published = Arc::new(Published::new(row.name.clone(), row.last_id, chunks));
            self.shared.publish(&published);
            self.by_name.insert(row.name.clone(), place);
            let groups = groups.remove(&row.number).unwrap_or_default();
            let groups = groups.into_iter().map(|group| (group.name.clone(), group)).collect();
            self.streams.push(Stream { row, published, length, groups, is_changed: false, staged: Vec::new() });
            self.compare_mark(place);
        }
        self.report_lost_streams();
        // Missing entries are settled at once, so that they are reported once.
        self.commit()
    }

    /// Compares a stream with its watermark.
    ///
    /// If the stream ends before it, its last entries are lost. Their ids are not assigned again, groups do not wait for
    /// them, and readers get a new epoch.
    fn compare_mark(&mut self, place: usize) {
        let stream = &mut self.streams[place];
        let Some(mark) = self.marks.read(stream.row.number) else { return };
        let Some(lost) = mark.added.checked_sub(stream.row.added).filter(|lost| *lost > 0) else { return };
        let warning = format!(
            "{lost} accepted entries of stream `{}`, after {} up to {}, are lost: the write-ahead log was damaged, or an \
             older database was put in its place",
            stream.row.name, stream.row.last_id, mark.last_id
        );
        tracing::error!(stream = %stream.row.name, lost, "{warning}");
        self.warnings.push(warning);
        stream.row.last_id = stream.row.last_id.max(mark.last_id);
        stream.row.added = mark.added;
        stream.row.epoch = Epoch::random();
        stream.is_changed = true;
        for group in stream.groups.values_mut() {
            group.passed += lost;
            *group.account().lost_mut(LostReason::Damaged) += lost;
            group.changes.is_changed = true;
        }
        self.touched.insert(place);
        self.staged.must_sync = true;
    }

    /// Reports streams that have a watermark but no row.
    fn report_lost_streams(&mut self) {
        let known = u32::try_from(self.streams.len()).unwrap_or(u32::MAX);
        for mark in self.marks.take_orphans(known).into_iter().filter(|mark| mark.added > 0) {
            let warning = format!(
                "a stream with {} accepted entries up to {} is lost: the write-ahead log was damaged, or the database \
                 was removed or replaced by an older one",
                mark.added, mark.last_id
            );
            tracing::error!(lost = mark.added, "{warning}");
            self.warnings.push(warning);
        }
    }

    /// Resets changed state to the state of the tables.
    pub(super) fn reload(&mut self) {
        self.is_stale = true;
        if let Err(error) = self.read_back() {
            self.shared.damage.note(&error);
            tracing::error!(error = %error, "cannot read the tables of the embedded store");
        }
    }

    pub(in crate::store::embedded) fn read_back(&mut self) -> Result<(), StoreError> {
        self.staged = StagedCommit::default();
        let rows = schema::load_streams(&self.connection)?;
        for stream in self.streams.drain(rows.len().min(self.streams.len())..) {
            self.by_name.remove(&stream.row.name);
        }
        for (place, mut row) in rows.into_iter().enumerate() {
            if !self.touched.contains(&place) {
                continue;
            }
            let groups = schema::load_groups(&self.connection, Some(row.number))?.remove(&row.number);
            let stream = &mut self.streams[place];
            {
                let log = stream.published.log();
                advance(&mut row, log.chunks.back());
                stream.length = log.chunks.iter().map(|chunk| u64::from(chunk.head.count)).sum();
            }
            stream.row = row;
            stream.groups = groups.unwrap_or_default().into_iter().map(|group| (group.name.clone(), group)).collect();
            stream.staged.clear();
            stream.is_changed = false;
        }
        self.touched.clear();
        self.is_stale = false;
        Ok(())
    }
}

/// Updates a stream's row from its last chunk. The row is not written with every append.
fn advance(row: &mut StreamRow, last: Option<&ChunkRef>) {
    if let Some(last) = last {
        row.last_id = row.last_id.max(last.head.last);
        row.added = row.added.max(last.head.added);
    }
}
