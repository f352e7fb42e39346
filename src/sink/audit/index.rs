//! The index of recorded entries.
//!
//! Holds the ids of the current file, and reads those of earlier files on demand. Each file begins with the greatest id
//! of every stream in the files before it, so a greater id needs no earlier file. Entries arrive nearly in order. So
//! earlier files are read only for a very late entry, or if a group is replayed.

use std::collections::{BTreeMap, HashMap};
use std::io;

use tracing::warn;

use super::files::{AuditFile, FileLines};
use super::record::{ChainRecord, RecordContent};
use crate::event::EntryId;

/// Number of earlier files with ids in memory. A replay passes through the files in order.
const EARLIER_FILES: usize = 2;

/// The recorded entries of one file.
#[derive(Debug, Default)]
pub(super) struct FileIndex {
    pub(super) number: u64,
    /// The greatest id of each stream in the files before this one.
    pub(super) before: BTreeMap<String, EntryId>,
    /// The ids of each stream, ascending.
    ids: HashMap<String, Vec<EntryId>>,
}

impl FileIndex {
    pub(super) fn new(number: u64, before: BTreeMap<String, EntryId>) -> Self {
        Self { number, before, ids: HashMap::new() }
    }

    /// Adds an id that is not in the index yet.
    pub(super) fn insert(&mut self, stream: &str, id: EntryId) {
        if let Some(ids) = self.ids.get_mut(stream) {
            let place = ids.partition_point(|known| *known < id);
            ids.insert(place, id);
        } else {
            self.ids.insert(stream.to_owned(), vec![id]);
        }
    }

    fn contains(&self, stream: &str, id: EntryId) -> bool {
        self.ids.get(stream).is_some_and(|ids| ids.binary_search(&id).is_ok())
    }

    /// Returns whether a file before this one may have the id.
    fn may_be_before(&self, stream: &str, id: EntryId) -> bool {
        self.before.get(stream).is_some_and(|greatest| id <= *greatest)
    }

    /// Returns the greatest id of each stream in this file and the files before.
    pub(super) fn heads(&self) -> BTreeMap<String, EntryId> {
        let mut heads = self.before.clone();
        for (stream, ids) in &self.ids {
            if let Some(last) = ids.last() {
                let head = heads.entry(stream.clone()).or_default();
                *head = (*head).max(*last);
            }
        }
        heads
    }

    fn read(file: &AuditFile) -> io::Result<Self> {
        let mut index = Self::new(file.number, BTreeMap::new());
        let mut lines = FileLines::open(&file.path)?;
        while let Some(line) = lines.next()? {
            match ChainRecord::parse(line.bytes).map(|record| record.content) {
                Ok(RecordContent::File { heads, .. }) => index.before = heads,
                Ok(RecordContent::Entry { stream, id }) => index.insert(&stream, id),
                Err(_) => warn!(file = %file.path.display(), offset = line.offset, "audit record damaged, ignoring it"),
            }
        }
        Ok(index)
    }
}

/// The known facts of an earlier file.
#[derive(Debug)]
struct FileSummary {
    before: BTreeMap<String, EntryId>,
    smallest: HashMap<String, EntryId>,
}

/// The recorded entries of all files.
#[derive(Debug)]
pub(super) struct EntryIndex {
    pub(super) current: FileIndex,
    earlier: Vec<FileIndex>,
    summaries: HashMap<u64, FileSummary>,
}

impl EntryIndex {
    pub(super) fn new(current: FileIndex) -> Self {
        Self { current, earlier: Vec::new(), summaries: HashMap::new() }
    }

    /// Starts the next file.
    pub(super) fn rotate(&mut self, number: u64) {
        let next = FileIndex::new(number, self.current.heads());
        let finished = std::mem::replace(&mut self.current, next);
        self.keep(finished);
    }

    /// Returns whether the entry is recorded. `files` are all files, in order.
    pub(super) fn contains(&mut self, stream: &str, id: EntryId, files: &[AuditFile]) -> io::Result<bool> {
        if self.current.contains(stream, id) {
            return Ok(true);
        }
        let mut may_be_before = self.current.may_be_before(stream, id);
        let current = self.current.number;
        for file in files.iter().rev().filter(|file| file.number < current) {
            if !may_be_before {
                return Ok(false);
            }
            let is_out_of_range = |summary: &&FileSummary| summary.smallest.get(stream).is_none_or(|first| id < *first);
            if let Some(summary) = self.summaries.get(&file.number).filter(is_out_of_range) {
                may_be_before = summary.before.get(stream).is_some_and(|greatest| id <= *greatest);
                continue;
            }
            let index = self.load(file)?;
            if index.contains(stream, id) {
                return Ok(true);
            }
            may_be_before = index.may_be_before(stream, id);
        }
        Ok(false)
    }

    fn load(&mut self, file: &AuditFile) -> io::Result<&FileIndex> {
        if let Some(place) = self.earlier.iter().position(|index| index.number == file.number) {
            return Ok(&self.earlier[place]);
        }
        let index = FileIndex::read(file)?;
        Ok(self.keep(index))
    }

    fn keep(&mut self, index: FileIndex) -> &FileIndex {
        let smallest = index.ids.iter().filter_map(|(stream, ids)| Some((stream.clone(), *ids.first()?))).collect();
        self.summaries.insert(index.number, FileSummary { before: index.before.clone(), smallest });
        if self.earlier.len() == EARLIER_FILES {
            self.earlier.remove(0);
        }
        self.earlier.push(index);
        &self.earlier[self.earlier.len() - 1]
    }
}
