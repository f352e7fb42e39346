//! Scans of dead letters, page by page, limited in time and memory.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;

use crate::dead_letters::selection::{DeadLetterEntry, DeadLetterScope, Selection};
use crate::event::{Entry, EntryId, StreamName};
use crate::store::{Order, Range, Store, StoreError};

/// Maximum number of entries of one read, and its approximate size in bytes. Each read is one step of a bulk action,
/// which occupies a server for some milliseconds.
const MAX_READ: usize = 250;
const READ_BYTES: usize = 2 * 1024 * 1024;
/// Number of entries of the first read, before their size is known.
const FIRST_READ: usize = 32;
/// Maximum number of entries that one scan reads.
const MAX_ENTRIES: usize = 50_000;
/// Maximum time that one scan takes.
const MAX_TIME: Duration = Duration::from_secs(2);
/// Size in bytes from which a page takes no further entry.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// The position of a scan. Text form: `<id>`, or `<id>..<id>` if it has an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeadLetterCursor {
    /// The first id to read.
    pub from: EntryId,
    /// The last id to read. A replayed entry that fails again is after it, so that no scan meets it twice.
    pub until: Option<EntryId>,
}

impl fmt::Display for DeadLetterCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.until {
            Some(until) => write!(f, "{}..{until}", self.from),
            None => write!(f, "{}", self.from),
        }
    }
}

impl FromStr for DeadLetterCursor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, until) = match text.split_once("..") {
            Some((from, until)) => (from, Some(until)),
            None => (text, None),
        };
        let id = |text: &str| text.parse().map_err(|_error| "must be the `next` of a response".to_owned());
        Ok(Self { from: id(from)?, until: until.map(id).transpose()? })
    }
}

/// One page of matching dead letters.
#[derive(Debug)]
pub struct DeadLetterPage {
    /// The dead letters, oldest first.
    pub found: Vec<DeadLetterEntry>,
    /// The position of the next page. `None` at the end.
    pub next: Option<DeadLetterCursor>,
}

/// Reads batches of entries until the end or until a limit is reached.
#[derive(Debug)]
pub(super) struct PageScan {
    at: EntryId,
    until: EntryId,
    limit: usize,
    read: usize,
    deadline: Instant,
    is_at_end: bool,
}

impl PageScan {
    pub(super) fn new(cursor: DeadLetterCursor, selection: &Selection) -> Self {
        Self {
            at: cursor.from.max(selection.after.next()),
            until: cursor.until.unwrap_or(EntryId::MAX),
            limit: FIRST_READ,
            read: 0,
            deadline: Instant::now() + MAX_TIME,
            is_at_end: false,
        }
    }

    /// Returns the next batch. `None` at the end or at a limit.
    pub(super) async fn next(
        &mut self,
        store: &dyn Store,
        dead_letter: &StreamName,
    ) -> Result<Option<Vec<Entry>>, StoreError> {
        if self.at > self.until {
            self.is_at_end = true;
        }
        let is_at_limit = self.read >= MAX_ENTRIES || self.read > 0 && Instant::now() >= self.deadline;
        if self.is_at_end || is_at_limit {
            return Ok(None);
        }
        let range = Range { from: self.at, to: self.until, order: Order::Forward };
        let entries = store.range(dead_letter, range, self.limit).await?;
        let Some(last) = entries.last() else {
            self.is_at_end = true;
            return Ok(None);
        };
        self.is_at_end = entries.len() < self.limit || last.id == EntryId::MAX;
        self.at = last.id.next();
        self.read += entries.len();
        let bytes: usize = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        let fitting = READ_BYTES / (bytes / entries.len()).max(1);
        self.limit = fitting.clamp(1, MAX_READ).min(self.limit * 4);
        Ok(Some(entries))
    }

    /// Returns the position for the next scan. `None` at the end.
    pub(super) fn rest(&self, until: Option<EntryId>) -> Option<DeadLetterCursor> {
        (!self.is_at_end).then_some(DeadLetterCursor { from: self.at, until })
    }
}

/// Returns one page of matching dead letters.
pub(super) async fn page(
    store: &dyn Store,
    scope: &DeadLetterScope,
    selection: &Selection,
    cursor: DeadLetterCursor,
    limit: usize,
) -> Result<DeadLetterPage, StoreError> {
    let mut scan = PageScan::new(cursor, selection);
    let mut found: Vec<DeadLetterEntry> = Vec::new();
    let mut bytes = 0;
    while let Some(entries) = scan.next(store, &scope.dead_letter).await? {
        for entry in entries {
            let candidate = DeadLetterEntry::new(entry);
            if !selection.matches(scope, &candidate) {
                continue;
            }
            if found.len() == limit || bytes >= PAGE_BYTES {
                let next = DeadLetterCursor { from: candidate.entry.id, until: cursor.until };
                return Ok(DeadLetterPage { found, next: Some(next) });
            }
            bytes += candidate.entry.fields.size_bytes();
            found.push(candidate);
        }
    }
    Ok(DeadLetterPage { found, next: scan.rest(cursor.until) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_round_trip_through_text() {
        for text in ["5-1", "5-1..9-0"] {
            assert_eq!(text.parse::<DeadLetterCursor>().map(|cursor| cursor.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "5", "5-1..", "..9-0", "5-1..9-0..10-0"] {
            assert!(text.parse::<DeadLetterCursor>().is_err(), "{text:?} was accepted");
        }
    }
}
