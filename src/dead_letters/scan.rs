//! Going over dead letters page by page, within bounds of time and memory.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::time::Instant;

use crate::dead_letters::selection::{Found, Scope, Selection};
use crate::event::{Entry, EntryId, StreamName};
use crate::store::{Order, Range, Store, StoreError};

/// The most entries of one read, and about how many bytes it should have. Each read is one step of a bulk action, for
/// which a server is busy some milliseconds.
const MAX_READ: usize = 250;
const READ_BYTES: usize = 2 * 1024 * 1024;
/// How many entries are read at first, when their size is not known yet.
const FIRST_READ: usize = 32;
/// How many entries one walk looks at before it lets others have their turn.
const MAX_LOOKED_AT: usize = 50_000;
/// How long one walk goes on before it does so.
const MAX_TIME: Duration = Duration::from_secs(2);
/// Bytes of what one page holds after which nothing is added to it.
const PAGE_BYTES: usize = 8 * 1024 * 1024;

/// Where a walk over dead letters stands. Text form: `<id>`, or `<id>..<id>` where it ends somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    /// The first id to look at.
    pub from: EntryId,
    /// The last one. A replayed entry that dies again comes after it, so that no walk meets it twice.
    pub until: Option<EntryId>,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.until {
            Some(until) => write!(f, "{}..{until}", self.from),
            None => write!(f, "{}", self.from),
        }
    }
}

impl FromStr for Cursor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (from, until) = match text.split_once("..") {
            Some((from, until)) => (from, Some(until)),
            None => (text, None),
        };
        let id = |text: &str| text.parse().map_err(|_error| "must be the `next` of an answer".to_owned());
        Ok(Self { from: id(from)?, until: until.map(id).transpose()? })
    }
}

/// A part of the dead letters that match.
#[derive(Debug)]
pub struct Page {
    /// The dead letters, oldest first.
    pub found: Vec<Found>,
    /// Where to go on; nothing at the end.
    pub next: Option<Cursor>,
}

/// Reads run after run of entries until its end or its bounds.
#[derive(Debug)]
pub(super) struct Walk {
    at: EntryId,
    until: EntryId,
    limit: usize,
    looked_at: usize,
    deadline: Instant,
    is_at_end: bool,
}

impl Walk {
    pub(super) fn new(cursor: Cursor, selection: &Selection) -> Self {
        Self {
            at: cursor.from.max(selection.after.next()),
            until: cursor.until.unwrap_or(EntryId::MAX),
            limit: FIRST_READ,
            looked_at: 0,
            deadline: Instant::now() + MAX_TIME,
            is_at_end: false,
        }
    }

    /// The next entries; nothing when the walk has come to its end or its bounds.
    pub(super) async fn next(
        &mut self,
        store: &dyn Store,
        dead_letter: &StreamName,
    ) -> Result<Option<Vec<Entry>>, StoreError> {
        if self.at > self.until {
            self.is_at_end = true;
        }
        let is_spent = self.looked_at >= MAX_LOOKED_AT || self.looked_at > 0 && Instant::now() >= self.deadline;
        if self.is_at_end || is_spent {
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
        self.looked_at += entries.len();
        let bytes: usize = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        let fitting = READ_BYTES / (bytes / entries.len()).max(1);
        self.limit = fitting.clamp(1, MAX_READ).min(self.limit * 4);
        Ok(Some(entries))
    }

    /// Where another walk goes on; nothing at the end.
    pub(super) fn rest(&self, until: Option<EntryId>) -> Option<Cursor> {
        (!self.is_at_end).then_some(Cursor { from: self.at, until })
    }
}

/// One page of what matches.
pub(super) async fn page(
    store: &dyn Store,
    scope: &Scope,
    selection: &Selection,
    cursor: Cursor,
    limit: usize,
) -> Result<Page, StoreError> {
    let mut walk = Walk::new(cursor, selection);
    let mut found: Vec<Found> = Vec::new();
    let mut bytes = 0;
    while let Some(entries) = walk.next(store, &scope.dead_letter).await? {
        for entry in entries {
            let candidate = Found::new(entry);
            if !selection.matches(scope, &candidate) {
                continue;
            }
            if found.len() == limit || bytes >= PAGE_BYTES {
                let next = Cursor { from: candidate.entry.id, until: cursor.until };
                return Ok(Page { found, next: Some(next) });
            }
            bytes += candidate.entry.fields.size_bytes();
            found.push(candidate);
        }
    }
    Ok(Page { found, next: walk.rest(cursor.until) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_survive_their_text_form() {
        for text in ["5-1", "5-1..9-0"] {
            assert_eq!(text.parse::<Cursor>().map(|cursor| cursor.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "5", "5-1..", "..9-0", "5-1..9-0..10-0"] {
            assert!(text.parse::<Cursor>().is_err(), "{text:?} was accepted");
        }
    }
}
