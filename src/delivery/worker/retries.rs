//! Failed entries: when each is due again, and when it failed first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use jiff::Timestamp;
use tokio::time::Instant;

use crate::event::EntryId;

/// Entries that failed and were not settled for good, up to a limit. One beyond it is found again by the search for
/// idle entries, only a little later.
#[derive(Debug)]
pub(crate) struct Retries {
    capacity: usize,
    entries: HashMap<EntryId, Failed>,
    /// May hold instants that `entries` does not have any more.
    due: BinaryHeap<Reverse<(Instant, EntryId)>>,
}

#[derive(Debug)]
struct Failed {
    first_failure: Timestamp,
    /// Nothing while it is being tried again.
    due: Option<Instant>,
    /// Whether it waits for longer than it stays ours without a sign of life.
    is_long: bool,
}

impl Retries {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, entries: HashMap::new(), due: BinaryHeap::new() }
    }

    /// The entry has failed just now; says when it failed first.
    pub(crate) fn failed(&mut self, id: EntryId, now: Timestamp) -> Timestamp {
        if let Some(failed) = self.entries.get(&id) {
            return failed.first_failure;
        }
        if self.entries.len() < self.capacity {
            self.entries.insert(id, Failed { first_failure: now, due: None, is_long: false });
        }
        now
    }

    /// The entry is to be tried again at `due`.
    pub(crate) fn wait(&mut self, id: EntryId, due: Instant, is_long: bool) {
        if let Some(failed) = self.entries.get_mut(&id) {
            failed.due = Some(due);
            failed.is_long = is_long;
            self.due.push(Reverse((due, id)));
        }
    }

    /// The entry is in hand again.
    pub(crate) fn taken(&mut self, id: EntryId) {
        if let Some(failed) = self.entries.get_mut(&id) {
            failed.due = None;
        }
    }

    /// The entry is settled for good, or not ours any more; says whether it was waiting.
    pub(crate) fn forget(&mut self, id: EntryId) -> bool {
        self.entries.remove(&id).is_some_and(|failed| failed.due.is_some())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When the next one is due.
    pub(crate) fn next_due(&mut self) -> Option<Instant> {
        while let Some(Reverse((due, id))) = self.due.peek().copied() {
            if self.entries.get(&id).is_some_and(|failed| failed.due == Some(due)) {
                return Some(due);
            }
            self.due.pop();
        }
        None
    }

    /// Takes those that are due, at most `limit`.
    pub(crate) fn take_due(&mut self, now: Instant, limit: usize) -> Vec<EntryId> {
        let mut ids = Vec::new();
        while ids.len() < limit && self.next_due().is_some_and(|due| due <= now) {
            if let Some(Reverse((_, id))) = self.due.pop() {
                self.taken(id);
                ids.push(id);
            }
        }
        ids
    }

    /// Those that wait.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = EntryId> {
        self.entries.iter().filter(|(_, failed)| failed.due.is_some()).map(|(id, _)| *id)
    }

    /// Those that wait for so long that others would take them over meanwhile.
    pub(crate) fn waiting_long(&self) -> impl Iterator<Item = EntryId> {
        self.entries.iter().filter(|(_, failed)| failed.due.is_some() && failed.is_long).map(|(id, _)| *id)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn entries_come_back_when_due_and_remember_their_first_failure() {
        let mut retries = Retries::new(2);
        let now = Instant::now();
        let at = |ms| Timestamp::from_millisecond(ms).expect("in range");
        let [a, b, c] = [1, 2, 3].map(|ms| EntryId::new(ms, 0));
        assert_eq!(retries.failed(a, at(10)), at(10));
        retries.wait(a, now + Duration::from_secs(2), false);
        retries.failed(b, at(20));
        retries.wait(b, now + Duration::from_secs(1), true);
        assert_eq!(retries.failed(c, at(30)), at(30));
        retries.wait(c, now, false);
        assert_eq!(retries.next_due(), Some(now + Duration::from_secs(1)), "the third is beyond the limit");
        assert_eq!(retries.waiting_long().collect::<Vec<_>>(), [b]);
        assert_eq!(retries.take_due(now + Duration::from_secs(1), 10), [b]);
        assert_eq!(retries.take_due(now + Duration::from_secs(1), 10), []);
        assert_eq!(retries.failed(a, at(40)), at(10));
        assert!(retries.forget(a) && !retries.forget(b));
        assert_eq!(retries.next_due(), None);
        assert!(retries.is_empty());
    }
}
