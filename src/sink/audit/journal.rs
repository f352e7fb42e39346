//! The writer of the audit files: recovery after a crash, durable appends, rotation.
//!
//! All functions block. They run on the thread of the sink.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracing::{info, warn};

use super::files::{self, AuditFile, AuditFolderLock, FileLines};
use super::index::{EntryIndex, FileIndex};
use super::record::{self, ChainHead, ChainRecord, RecordContent};
use crate::event::{EntryId, StreamName};

/// Maximum size of a record without its body, in bytes.
const RECORD_OVERHEAD: u64 = 320;

/// Entries of one stream, encoded for the files.
#[derive(Debug)]
pub(super) struct PreparedBatch {
    pub(super) stream: StreamName,
    /// The bodies of all records, one after the other.
    pub(super) bodies: Vec<u8>,
    /// Each entry with the end of its body.
    pub(super) entries: Vec<(EntryId, usize)>,
}

impl PreparedBatch {
    /// Returns the maximum number of bytes that the records take.
    pub(super) fn file_bytes(&self) -> u64 {
        self.bodies.len() as u64 + self.entries.len() as u64 * RECORD_OVERHEAD
    }
}

/// A failure to open or write the files.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error("cannot {action} `{path}`")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("another process uses the audit folder `{0}`")]
    Locked(PathBuf),
    #[error(
        "the audit file `{file}` is damaged in line {line}: keep a copy for the investigation, then restore the \
         folder or configure another one"
    )]
    Damaged { file: PathBuf, line: u64 },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> JournalError + 'a {
    move |source| JournalError::Io { action, path: path.to_owned(), source }
}

/// The conditions for a new file.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileRotation {
    /// The maximum size of a file.
    pub(super) max_bytes: u64,
    /// Whether each day (UTC) begins a new file.
    pub(super) daily: bool,
}

/// The files of a folder, open for appending.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    rotation: FileRotation,
    files: Vec<AuditFile>,
    /// The last of `files`, after the first append to it.
    current: Option<CurrentFile>,
    head: ChainHead,
    index: EntryIndex,
    _lock: AuditFolderLock,
}

#[derive(Debug)]
struct CurrentFile {
    file: File,
    /// Size of its records, which are durable.
    bytes: u64,
}

/// The content of a scanned file.
struct ScannedFile {
    head: ChainHead,
    index: FileIndex,
    bytes: u64,
}

impl Journal {
    /// Opens or creates the folder, and repairs the last record after a crash.
    ///
    /// Reads the whole last file and checks its chain.
    pub(super) fn open(folder: &Path, rotation: FileRotation) -> Result<Self, JournalError> {
        fs::create_dir_all(folder).map_err(failed("create", folder))?;
        let lock = files::lock(folder).map_err(failed("lock", folder))?;
        let lock = lock.ok_or_else(|| JournalError::Locked(folder.to_owned()))?;
        let mut journal = Self {
            folder: folder.to_owned(),
            rotation,
            files: Vec::new(),
            current: None,
            head: ChainHead::default(),
            index: EntryIndex::new(FileIndex::default()),
            _lock: lock,
        };
        journal.load()?;
        Ok(journal)
    }

    /// Reads the end of the chain from disk, after opening and after a failed append.
    fn load(&mut self) -> Result<(), JournalError> {
        self.files = files::list(&self.folder).map_err(failed("read", &self.folder))?;
        let Some((last, earlier)) = self.files.split_last() else {
            self.head = ChainHead::default();
            self.index = EntryIndex::new(FileIndex::default());
            return Ok(());
        };
        let file = OpenOptions::new().append(true).open(&last.path).map_err(failed("open", &last.path))?;
        let mut scanned = scan(last, Some(&file))?;
        // Complete records of a process that was killed may not be on disk yet.
        file.sync_data().map_err(failed("sync", &last.path))?;
        if scanned.bytes == 0
            && let Some(previous) = earlier.last()
        {
            let previous = scan(previous, None)?;
            scanned.head = previous.head;
            scanned.index.before = previous.index.heads();
        }
        self.current = Some(CurrentFile { file, bytes: scanned.bytes });
        self.head = scanned.head;
        self.index = EntryIndex::new(scanned.index);
        Ok(())
    }

    /// Records the entries that are not recorded yet. Returns their number; they are durable.
    ///
    /// After an error none, some or all of them are recorded, and the last file ends with a whole record.
    pub(super) fn append(&mut self, batches: &[PreparedBatch], now: Timestamp) -> Result<usize, JournalError> {
        if self.current.is_none() {
            self.load()?;
        }
        let result = self.try_append(batches, now);
        if result.is_err() {
            self.remove_failed_write();
        }
        result
    }

    fn try_append(&mut self, batches: &[PreparedBatch], now: Timestamp) -> Result<usize, JournalError> {
        let recorded_at = record::recorded_at(now);
        let today = now.to_zoned(TimeZone::UTC).strftime("%Y%m%d").to_string();
        let mut appended = 0;
        let mut buffer = Vec::new();
        for batch in batches {
            let mut start = 0;
            for (id, end) in &batch.entries {
                let body = &batch.bodies[start..*end];
                start = *end;
                let is_known = self.index.contains(batch.stream.as_str(), *id, &self.files);
                if is_known.map_err(failed("read", &self.folder))? {
                    continue;
                }
                if self.is_file_due(buffer.len(), body.len(), &today) {
                    self.write(&mut buffer)?;
                    self.begin_file(&today)?;
                }
                let is_file_empty = buffer.is_empty() && self.current.as_ref().is_none_or(|c| c.bytes == 0);
                if is_file_empty {
                    let mut body = Vec::new();
                    record::file_body(self.index.current.number, &self.index.current.before, &mut body);
                    self.head.seal(&recorded_at, &body, &mut buffer);
                }
                self.head.seal(&recorded_at, body, &mut buffer);
                self.index.current.insert(batch.stream.as_str(), *id);
                appended += 1;
            }
        }
        self.write(&mut buffer)?;
        Ok(appended)
    }

    fn is_file_due(&self, buffered: usize, more: usize, today: &str) -> bool {
        let (Some(current), Some(file)) = (&self.current, self.files.last()) else { return true };
        let bytes = current.bytes + buffered as u64;
        // A file without records is never left behind, because the next file could not link to it.
        let has_records = bytes > 0;
        let is_full = bytes + more as u64 + RECORD_OVERHEAD > self.rotation.max_bytes;
        let is_of_another_day = self.rotation.daily && file.day != today;
        has_records && (is_full || is_of_another_day)
    }

    fn begin_file(&mut self, today: &str) -> Result<(), JournalError> {
        let number = self.files.last().map_or(1, |last| last.number + 1);
        let file = AuditFile::new(&self.folder, number, today);
        let created = OpenOptions::new().append(true).create_new(true).open(&file.path);
        let created = created.map_err(failed("create", &file.path))?;
        files::sync_folder(&self.folder).map_err(failed("sync", &self.folder))?;
        info!(file = %file.path.display(), "audit file created");
        self.files.push(file);
        self.current = Some(CurrentFile { file: created, bytes: 0 });
        self.index.rotate(number);
        Ok(())
    }

    /// Makes the buffered records durable.
    fn write(&mut self, buffer: &mut Vec<u8>) -> Result<(), JournalError> {
        let (Some(current), Some(file)) = (&mut self.current, self.files.last()) else { return Ok(()) };
        if buffer.is_empty() {
            return Ok(());
        }
        current.file.write_all(buffer).map_err(failed("write to", &file.path))?;
        current.file.sync_data().map_err(failed("sync", &file.path))?;
        current.bytes += buffer.len() as u64;
        buffer.clear();
        Ok(())
    }

    /// Removes the rest of a failed write from the file and from memory. The next append reads the file again.
    fn remove_failed_write(&mut self) {
        let Some(current) = self.current.take() else { return };
        let truncated = current.file.set_len(current.bytes).and_then(|()| current.file.sync_data());
        if let Err(error) = truncated {
            warn!(folder = %self.folder.display(), error = %error, "cannot remove an incomplete audit record");
        }
    }

    /// Checks whether this number of bytes can be written now. Leaves no trace.
    pub(super) fn probe(&self, bytes: u64) -> Result<(), JournalError> {
        let path = self.folder.join(".probe");
        let write = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            io::copy(&mut io::repeat(0).take(bytes), &mut file)?;
            file.sync_data()
        };
        let result = write().map_err(failed("write to", &path));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => result.and(Err(failed("remove", &path)(error))),
            _ => result,
        }
    }
}

/// Reads the records of a file and checks their chain. With `repair`, the same file open for appending, an incomplete
/// end is removed.
fn scan(file: &AuditFile, repair: Option<&File>) -> Result<ScannedFile, JournalError> {
    let mut scanned =
        ScannedFile { head: ChainHead::default(), index: FileIndex::new(file.number, BTreeMap::new()), bytes: 0 };
    let mut lines = FileLines::open(&file.path).map_err(failed("open", &file.path))?;
    let damaged = |line| JournalError::Damaged { file: file.path.clone(), line };
    let mut number = 0;
    while let Some(line) = lines.next().map_err(failed("read", &file.path))? {
        number += 1;
        let record = ChainRecord::parse(line.bytes).ok().filter(|record| match &record.content {
            RecordContent::File { number: named, .. } => number == 1 && *named == file.number,
            RecordContent::Entry { .. } => scanned.head.is_followed_by(record),
        });
        let Some(record) = record else {
            let Some(end) = repair else { return Err(damaged(number)) };
            if !line.is_complete {
                warn!(file = %file.path.display(), offset = line.offset, "incomplete audit record removed");
            } else if line.bytes.contains(&0) {
                // A power cut during a write can leave zeros, which no record has.
                let copy = set_aside(file, line.offset).map_err(failed("set aside the end of", &file.path))?;
                warn!(file = %file.path.display(), copy = %copy.display(), "trailing zeros moved to a copy");
            } else {
                return Err(damaged(number));
            }
            end.set_len(line.offset).map_err(failed("truncate", &file.path))?;
            return Ok(scanned);
        };
        scanned.head = record.head();
        match record.content {
            RecordContent::File { heads, .. } => scanned.index.before = heads,
            RecordContent::Entry { stream, id } => scanned.index.insert(&stream, id),
        }
        scanned.bytes = line.offset + line.bytes.len() as u64 + 1;
        if !line.is_complete {
            let mut end = repair.ok_or_else(|| damaged(number))?;
            end.write_all(b"\n").map_err(failed("write to", &file.path))?;
            break;
        }
    }
    Ok(scanned)
}

/// Copies the bytes after `offset` to a file beside it, for an investigation.
fn set_aside(file: &AuditFile, offset: u64) -> io::Result<PathBuf> {
    let copy = file.path.with_extension(format!("cut-at-{offset}"));
    let mut source = File::open(&file.path)?;
    source.seek(io::SeekFrom::Start(offset))?;
    let mut target = File::create(&copy)?;
    io::copy(&mut source, &mut target)?;
    target.sync_all()?;
    Ok(copy)
}
