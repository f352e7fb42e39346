//! The audit files as their only writer sees them: opening after a crash, appending durably, rotating.
//!
//! Everything here blocks; it runs on the sink's own thread.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tracing::{info, warn};

use super::files::{self, AuditFile, FolderLock, Lines};
use super::index::{FileIndex, Index};
use super::record::{self, Content, Head, Record};
use crate::event::{EntryId, StreamName};

/// Bytes of a record besides its body, at most.
const RECORD_OVERHEAD: u64 = 320;

/// Entries of one stream, made ready to be recorded.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) stream: StreamName,
    /// The bodies of all records, one after the other.
    pub(super) bodies: Vec<u8>,
    /// Each entry, and where its body ends.
    pub(super) entries: Vec<(EntryId, usize)>,
}

impl Prepared {
    /// Bytes that recording all of it takes, at most.
    pub(super) fn file_bytes(&self) -> u64 {
        self.bodies.len() as u64 + self.entries.len() as u64 * RECORD_OVERHEAD
    }
}

/// Why the files can't be opened or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error("cannot {action} `{path}`")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("another process has the audit folder `{0}`")]
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

/// When to begin a new file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotation {
    /// Before a file grows past so many bytes.
    pub(super) max_bytes: u64,
    /// With the first record of a day (UTC).
    pub(super) daily: bool,
}

/// The files of a folder, open for appending.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    rotation: Rotation,
    files: Vec<AuditFile>,
    /// The last of `files`, once something was appended to it.
    current: Option<Current>,
    head: Head,
    index: Index,
    _lock: FolderLock,
}

#[derive(Debug)]
struct Current {
    file: File,
    /// Bytes that are records, durable on disk.
    bytes: u64,
}

/// What a file was found to hold.
struct Scanned {
    head: Head,
    index: FileIndex,
    bytes: u64,
}

impl Journal {
    /// Opens the folder, makes it where there is none, and repairs what a crash left of the last record.
    ///
    /// Reads the last file as a whole and checks its chain.
    pub(super) fn open(folder: &Path, rotation: Rotation) -> Result<Self, JournalError> {
        fs::create_dir_all(folder).map_err(failed("create", folder))?;
        let lock = files::lock(folder).map_err(failed("lock", folder))?;
        let lock = lock.ok_or_else(|| JournalError::Locked(folder.to_owned()))?;
        let mut journal = Self {
            folder: folder.to_owned(),
            rotation,
            files: Vec::new(),
            current: None,
            head: Head::default(),
            index: Index::new(FileIndex::default()),
            _lock: lock,
        };
        journal.load()?;
        Ok(journal)
    }

    /// Reads the end of the chain from disk, after opening and after a failed append.
    fn load(&mut self) -> Result<(), JournalError> {
        self.files = files::list(&self.folder).map_err(failed("read", &self.folder))?;
        let Some((last, earlier)) = self.files.split_last() else {
            self.head = Head::default();
            self.index = Index::new(FileIndex::default());
            return Ok(());
        };
        let file = OpenOptions::new().append(true).open(&last.path).map_err(failed("open", &last.path))?;
        let mut scanned = scan(last, Some(&file))?;
        // Complete records of a process that died may still be in memory only.
        file.sync_data().map_err(failed("sync", &last.path))?;
        if scanned.bytes == 0
            && let Some(previous) = earlier.last()
        {
            let previous = scan(previous, None)?;
            scanned.head = previous.head;
            scanned.index.before = previous.index.heads();
        }
        self.current = Some(Current { file, bytes: scanned.bytes });
        self.head = scanned.head;
        self.index = Index::new(scanned.index);
        Ok(())
    }

    /// Records the entries that are not recorded yet, durable on return; says how many they were.
    ///
    /// After an error none, some or all are recorded, and the last file ends with a whole record.
    pub(super) fn append(&mut self, batches: &[Prepared], now: Timestamp) -> Result<usize, JournalError> {
        if self.current.is_none() {
            self.load()?;
        }
        let result = self.try_append(batches, now);
        if result.is_err() {
            self.retreat();
        }
        result
    }

    fn try_append(&mut self, batches: &[Prepared], now: Timestamp) -> Result<usize, JournalError> {
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
        // A file without records is never left behind: the next one would have nothing to link to.
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
        info!(file = %file.path.display(), "began an audit file");
        self.files.push(file);
        self.current = Some(Current { file: created, bytes: 0 });
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

    /// Cuts off what a failed write left, and forgets what is only in memory: the next append reads it anew.
    fn retreat(&mut self) {
        let Some(current) = self.current.take() else { return };
        let truncated = current.file.set_len(current.bytes).and_then(|()| current.file.sync_data());
        if let Err(error) = truncated {
            warn!(folder = %self.folder.display(), error = %error, "cannot cut off a failed audit record");
        }
    }

    /// Whether so many bytes could be written now; leaves nothing behind.
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

/// Reads a file's records and checks their chain. With `repair`, the same file open for appending, an incomplete
/// end is cut off.
fn scan(file: &AuditFile, repair: Option<&File>) -> Result<Scanned, JournalError> {
    let mut scanned = Scanned { head: Head::default(), index: FileIndex::new(file.number, BTreeMap::new()), bytes: 0 };
    let mut lines = Lines::open(&file.path).map_err(failed("open", &file.path))?;
    let damaged = |line| JournalError::Damaged { file: file.path.clone(), line };
    let mut number = 0;
    while let Some(line) = lines.next().map_err(failed("read", &file.path))? {
        number += 1;
        let record = Record::parse(line.bytes).ok().filter(|record| match &record.content {
            Content::File { number: named, .. } => number == 1 && *named == file.number,
            Content::Entry { .. } => scanned.head.is_followed_by(record),
        });
        let Some(record) = record else {
            let Some(end) = repair else { return Err(damaged(number)) };
            if !line.is_complete {
                warn!(file = %file.path.display(), offset = line.offset, "cut off an incomplete audit record");
            } else if line.bytes.contains(&0) {
                // Storage that lost power amid a write leaves zeros, which no record has.
                let copy = set_aside(file, line.offset).map_err(failed("set aside the end of", &file.path))?;
                warn!(file = %file.path.display(), copy = %copy.display(), "set aside an end full of zeros");
            } else {
                return Err(damaged(number));
            }
            end.set_len(line.offset).map_err(failed("truncate", &file.path))?;
            return Ok(scanned);
        };
        scanned.head = record.head();
        match record.content {
            Content::File { heads, .. } => scanned.index.before = heads,
            Content::Entry { stream, id } => scanned.index.insert(&stream, id),
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

/// Copies what follows `offset` to a file beside it, for whoever wants to know what was there.
fn set_aside(file: &AuditFile, offset: u64) -> io::Result<PathBuf> {
    let copy = file.path.with_extension(format!("cut-at-{offset}"));
    let mut source = File::open(&file.path)?;
    source.seek(io::SeekFrom::Start(offset))?;
    let mut target = File::create(&copy)?;
    io::copy(&mut source, &mut target)?;
    target.sync_all()?;
    Ok(copy)
}
