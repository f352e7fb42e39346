//! Watermarks: the last accepted entry of each stream, in a small file beside the database.
//!
//! The engine treats a write-ahead log with damage in the middle as one that ends there, without an error. So each
//! stream's position is also written here after a sync, and compared at the next start. Watermarks are not synced: an
//! old watermark may hide a loss, but never reports a loss that did not happen.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::event::EntryId;
use crate::store::embedded::disk::schema::StreamRow;

/// `crc u32, stream u32, last ms, last seq, added`, at the offset of the stream's number.
const SLOT_BYTES: usize = 32;

/// The file of watermarks.
#[derive(Debug)]
pub(crate) struct Watermarks {
    file: Option<File>,
}

/// The position of one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watermark {
    pub(crate) last_id: EntryId,
    pub(crate) added: u64,
}

impl Watermarks {
    /// Opens the file. If that fails, watermarks are neither written nor compared.
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.inspect_err(|error| {
            tracing::warn!(error = %error, "cannot open the watermarks of the embedded store, a damaged log may stay undetected");
        });
        Self { file: file.ok() }
    }

    /// Returns the watermark of a stream, or `None` if there is none or it is damaged.
    pub(crate) fn read(&self, stream: u32) -> Option<Watermark> {
        let mut slot = [0; SLOT_BYTES];
        self.file.as_ref()?.read_exact_at(&mut slot, offset(stream)).ok()?;
        let number = |at: usize| slot.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let mark = Watermark { last_id: EntryId::new(number(8)?, number(16)?), added: number(24)? };
        (slot == encode(stream, mark)).then_some(mark)
    }

    /// Removes and returns the watermarks of streams beyond the first `streams`, which are missing in the database.
    pub(crate) fn take_orphans(&self, streams: u32) -> Vec<Watermark> {
        let slots = self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |file| file.len());
        let slots = u32::try_from(slots / SLOT_BYTES as u64).unwrap_or(u32::MAX);
        let orphans = (streams..slots).filter_map(|before| self.read(before + 1)).collect();
        if let Some(file) = self.file.as_ref().filter(|_| slots > streams)
            && let Err(error) = file.set_len(offset(streams + 1))
        {
            tracing::debug!(error = %error, "removing the watermarks of lost streams failed");
        }
        orphans
    }

    pub(crate) fn write(&self, row: &StreamRow) {
        let Some(file) = &self.file else { return };
        let mark = Watermark { last_id: row.last_id, added: row.added };
        if let Err(error) = file.write_all_at(&encode(row.number, mark), offset(row.number)) {
            tracing::debug!(stream = %row.name, error = %error, "writing a watermark failed");
        }
    }
}

fn offset(stream: u32) -> u64 {
    u64::from(stream.saturating_sub(1)) * SLOT_BYTES as u64
}

fn encode(stream: u32, mark: Watermark) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    slot[4..8].copy_from_slice(&stream.to_le_bytes());
    slot[8..16].copy_from_slice(&mark.last_id.ms.to_le_bytes());
    slot[16..24].copy_from_slice(&mark.last_id.seq.to_le_bytes());
    slot[24..].copy_from_slice(&mark.added.to_le_bytes());
    let crc = crc32c::crc32c(&slot[4..]);
    slot[..4].copy_from_slice(&crc.to_le_bytes());
    slot
}
