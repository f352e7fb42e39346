//! How far each stream had come, in a small file beside the database.
//!
//! The engine takes a write-ahead log that is damaged in the middle for one that ends there, and says nothing. So what
//! was accepted is noted here as well, after it was synced, and compared at the next start. Notes are not synced: a
//! note that is too old hides a loss, it never invents one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::event::EntryId;
use crate::store::embedded::disk::schema::StreamRow;

/// `crc u32, stream u32, last ms, last seq, added`, at the place of the stream's number.
const SLOT_BYTES: usize = 32;

/// See the module.
#[derive(Debug)]
pub(crate) struct Marks {
    file: Option<File>,
}

/// How far a stream had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) last_id: EntryId,
    pub(crate) added: u64,
}

impl Marks {
    /// Without the file nothing is noted and nothing compared.
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path);
        let file = file.inspect_err(|error| {
            tracing::warn!(error = %error, "the embedded store can't note how far it came; a damaged log may go unseen");
        });
        Self { file: file.ok() }
    }

    /// What was noted last of a stream, if the note is whole.
    pub(crate) fn read(&self, stream: u32) -> Option<Mark> {
        let mut slot = [0; SLOT_BYTES];
        self.file.as_ref()?.read_exact_at(&mut slot, place(stream)).ok()?;
        let number = |at: usize| slot.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let mark = Mark { last_id: EntryId::new(number(8)?, number(16)?), added: number(24)? };
        (slot == encode(stream, mark)).then_some(mark)
    }

    /// What was noted of streams after these many, which the database does not know any more; forgets them.
    pub(crate) fn take_orphans(&self, streams: u32) -> Vec<Mark> {
        let noted = self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |file| file.len());
        let noted = u32::try_from(noted / SLOT_BYTES as u64).unwrap_or(u32::MAX);
        let orphans = (streams..noted).filter_map(|before| self.read(before + 1)).collect();
        if let Some(file) = self.file.as_ref().filter(|_| noted > streams)
            && let Err(error) = file.set_len(place(streams + 1))
        {
            tracing::debug!(error = %error, "could not forget how far lost streams came");
        }
        orphans
    }

    pub(crate) fn write(&self, row: &StreamRow) {
        let Some(file) = &self.file else { return };
        let mark = Mark { last_id: row.last_id, added: row.added };
        if let Err(error) = file.write_all_at(&encode(row.number, mark), place(row.number)) {
            tracing::debug!(stream = %row.name, error = %error, "could not note how far the stream came");
        }
    }
}

fn place(stream: u32) -> u64 {
    u64::from(stream.saturating_sub(1)) * SLOT_BYTES as u64
}

fn encode(stream: u32, mark: Mark) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    slot[4..8].copy_from_slice(&stream.to_le_bytes());
    slot[8..16].copy_from_slice(&mark.last_id.ms.to_le_bytes());
    slot[16..24].copy_from_slice(&mark.last_id.seq.to_le_bytes());
    slot[24..].copy_from_slice(&mark.added.to_le_bytes());
    let crc = crc32c::crc32c(&slot[4..]);
    slot[..4].copy_from_slice(&crc.to_le_bytes());
    slot
}
