//! The folder of audit files: their names, their lines, and the lock on all of them.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

const LOCK: &str = ".lock";

/// One file of a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AuditFile {
    /// Files are numbered from 1 in the order in which they were begun.
    pub(super) number: u64,
    /// The day (UTC) on which it was begun, as `20260131`.
    pub(super) day: String,
    pub(super) path: PathBuf,
}

impl AuditFile {
    pub(super) fn new(folder: &Path, number: u64, day: &str) -> Self {
        let path = folder.join(format!("audit-{number:08}-{day}.jsonl"));
        Self { number, day: day.to_owned(), path }
    }

    fn of(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix("audit-")?.strip_suffix(".jsonl")?;
        let (number, day) = name.split_once('-')?;
        let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !is_digits(number) || !is_digits(day) {
            return None;
        }
        Some(Self { number: number.parse().ok()?, day: day.to_owned(), path })
    }
}

/// All audit files of a folder, in order.
pub(super) fn list(folder: &Path) -> io::Result<Vec<AuditFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.extend(AuditFile::of(entry?.path()));
    }
    files.sort();
    Ok(files)
}

/// Makes entries of the folder durable that were added or removed.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Holds the folder for this process until it is dropped.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing alone would not do: a child process that is just being started shares the lock with us.
        if let Err(error) = self.0.unlock() {
            tracing::warn!(error = %error, "cannot let go of the audit folder");
        }
    }
}

/// Takes the folder for this process; nothing where another one has it.
pub(super) fn lock(folder: &Path) -> io::Result<Option<FolderLock>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join(LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(FolderLock(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether a process is writing to the folder.
pub(super) fn is_locked(folder: &Path) -> io::Result<bool> {
    let file = match File::open(folder.join(LOCK)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Reads a file line by line into one buffer.
#[derive(Debug)]
pub(super) struct Lines {
    reader: BufReader<File>,
    buffer: Vec<u8>,
    next_offset: u64,
}

/// One line, without its newline.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub(super) bytes: &'a [u8],
    /// Where it begins in the file.
    pub(super) offset: u64,
    /// Whether it ends with a newline; if not, it is the last one.
    pub(super) is_complete: bool,
}

impl Lines {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let reader = BufReader::with_capacity(256 * 1024, File::open(path)?);
        Ok(Self { reader, buffer: Vec::new(), next_offset: 0 })
    }

    pub(super) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.buffer.clear();
        let bytes = self.reader.read_until(b'\n', &mut self.buffer)?;
        if bytes == 0 {
            return Ok(None);
        }
        let offset = self.next_offset;
        self.next_offset += bytes as u64;
        let (line, is_complete) = match self.buffer.strip_suffix(b"\n") {
            Some(line) => (line, true),
            None => (self.buffer.as_slice(), false),
        };
        Ok(Some(Line { bytes: line, offset, is_complete }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_free_at_once_though_a_child_process_inherited_the_lock() {
        let folder = tempfile::TempDir::new().expect("a temporary folder");
        let held = lock(folder.path()).expect("a readable folder").expect("a free folder");
        assert!(lock(folder.path()).expect("a readable folder").is_none());
        let inherited = held.0.try_clone().expect("a handle");
        drop(held);
        assert!(lock(folder.path()).expect("a readable folder").is_some());
        drop(inherited);
    }
}
