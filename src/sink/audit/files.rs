//! The folder of the audit files: names, lines, and the lock.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

const LOCK: &str = ".lock";

/// One file of the folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AuditFile {
    /// Its number, from 1, in the order of creation.
    pub(super) number: u64,
    /// The day (UTC) of its creation, as `20260131`.
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

/// Returns all audit files of a folder, in order.
pub(super) fn list(folder: &Path) -> io::Result<Vec<AuditFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        files.extend(AuditFile::of(entry?.path()));
    }
    files.sort();
    Ok(files)
}

/// Makes added and removed files of the folder durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Locks the folder for this process until dropped.
#[derive(Debug)]
pub(super) struct AuditFolderLock(File);

impl Drop for AuditFolderLock {
    fn drop(&mut self) {
        // Closing is not enough: a child process that is being started shares the lock.
        if let Err(error) = self.0.unlock() {
            tracing::warn!(error = %error, "cannot unlock the audit folder");
        }
    }
}

/// Locks the folder for this process. Returns `None` if another process has it.
pub(super) fn lock(folder: &Path) -> io::Result<Option<AuditFolderLock>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join(LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(AuditFolderLock(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Returns whether a process writes to the folder.
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
pub(super) struct FileLines {
    reader: BufReader<File>,
    buffer: Vec<u8>,
    next_offset: u64,
}

/// One line, without its newline.
#[derive(Debug)]
pub(super) struct FileLine<'a> {
    pub(super) bytes: &'a [u8],
    /// The position of its first byte in the file.
    pub(super) offset: u64,
    /// Whether it ends with a newline. Only the last line may lack it.
    pub(super) is_complete: bool,
}

impl FileLines {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let reader = BufReader::with_capacity(256 * 1024, File::open(path)?);
        Ok(Self { reader, buffer: Vec::new(), next_offset: 0 })
    }

    pub(super) fn next(&mut self) -> io::Result<Option<FileLine<'_>>> {
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
        Ok(Some(FileLine { bytes: line, offset, is_complete }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_free_although_a_child_inherited_the_lock() {
        let folder = tempfile::TempDir::new().expect("a temporary folder");
        let held = lock(folder.path()).expect("a readable folder").expect("a free folder");
        assert!(lock(folder.path()).expect("a readable folder").is_none());
        let inherited = held.0.try_clone().expect("a handle");
        drop(held);
        assert!(lock(folder.path()).expect("a readable folder").is_some());
        drop(inherited);
    }
}
