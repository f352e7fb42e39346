//! Failed entries: when the next attempt of each is due, and when it failed first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use jiff::Timestamp;
use tokio::time::Instant;

use crate::event::EntryId;

/// Entries that failed and are not settled for good, up to a limit.
///
/// The search finds entries beyond the limit when they are idle for long enough, only a little later.
#[derive(Debug)]
pub(crate) struct Retries {
    capacity: usize,
    entries: HashMap<EntryId, FailedEntry>,
    /// By time. The first one is always in `entries`; later ones may be outdated.
    due: BinaryHeap<Reverse<(Instant, EntryId)>>,
}

#[derive(Debug)]
struct FailedEntry {
    first_failure: Timestamp,
    /// `None` while the entry is in flight.
    due: Option<Instant>,
    /// Whether the wait is longer than `claim_idle`, so that the entry needs extensions.
    is_long: bool,
}

impl Retries {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, entries: HashMap::new(), due: BinaryHeap::new() }
    }

    /// Remembers that the entry failed now. Returns when it failed first.
    pub(crate) fn failed(&mut self, id: EntryId, now: Timestamp) -> Timestamp {
        if let Some(failed) = self.entries.get(&id) {
            return failed.first_failure;
        }
        if self.entries.len() < self.capacity {
            self.entries.insert(id, FailedEntry { first_failure: now, due: None, is_long: false });
        }
        now
    }

    /// Schedules the next attempt of a remembered entry.
    pub(crate) fn schedule(&mut self, id: EntryId, due: Instant, is_long: bool) {
        if let Some(failed) = self.entries.get_mut(&id) {
            failed.due = Some(due);
            failed.is_long = is_long;
            self.due.push(Reverse((due, id)));
            self.drop_outdated();
        }
    }

    /// Takes note that the entry is in flight again.
    pub(crate) fn taken(&mut self, id: EntryId) {
        if let Some(failed) = self.entries.get_mut(&id) {
            failed.due = None;
            self.drop_outdated();
        }
    }

    /// Forgets an entry that is settled or belongs to another consumer. Returns whether it was waiting.
    pub(crate) fn forget(&mut self, id: EntryId) -> bool {
        let was_waiting = self.entries.remove(&id).is_some_and(|failed| failed.due.is_some());
        if was_waiting {
            self.drop_outdated();
        }
        was_waiting
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns when the next attempt is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.peek().map(|Reverse((due, _))| *due)
    }

    /// Takes up to `limit` entries that are due.
    pub(crate) fn take_due(&mut self, now: Instant, limit: usize) -> Vec<EntryId> {
        let mut ids = Vec::new();
        while ids.len() < limit
            && let Some(Reverse((due, id))) = self.due.peek().copied()
            && due <= now
        {
            self.taken(id);
            ids.push(id);
        }
        ids
    }

    /// Returns the entries that wait for their next attempt.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = EntryId> {
        self.entries.iter().filter(|(_, failed)| failed.due.is_some()).map(|(id, _)| *id)
    }

    /// Returns the entries that wait for longer than `claim_idle`.
    pub(crate) fn waiting_long(&self) -> impl Iterator<Item = EntryId> {
        self.entries.iter().filter(|(_, failed)| failed.due.is_some() && failed.is_long).map(|(id, _)| *id)
    }

    fn drop_outdated(&mut self) {
        while let Some(Reverse((due, id))) = self.due.peek()
            && self.entries.get(id).is_none_or(|failed| failed.due != Some(*due))
        {
            self.due.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn entries_are_due_in_order_and_keep_their_first_failure() {
        let mut retries = Retries::new(2);
        let now = Instant::now();
        let at = |ms| Timestamp::from_millisecond(ms).expect("in range");
        let [a, b, c] = [1, 2, 3].map(|ms| EntryId::new(ms, 0));
        assert_eq!(retries.failed(a, at(10)), at(10));
        retries.schedule(a, now + Duration::from_secs(2), false);
        retries.failed(b, at(20));
        retries.schedule(b, now + Duration::from_secs(1), true);
        assert_eq!(retries.failed(c, at(30)), at(30));
        retries.schedule(c, now, false);
        assert_eq!(retries.next_due(), Some(now + Duration::from_secs(1)), "the third is beyond the limit");
        assert_eq!(retries.waiting_long().collect::<Vec<_>>(), [b]);
        assert_eq!(retries.take_due(now + Duration::from_secs(1), 10), [b]);
        assert_eq!(retries.take_due(now + Duration::from_secs(1), 10), []);
        assert_eq!(retries.failed(a, at(40)), at(10));
        assert!(retries.forget(a) && !retries.forget(b));
        assert_eq!(retries.next_due(), None);
        assert!(retries.is_empty());
    }

    #[test]
    fn next_due_skips_entries_that_were_rescheduled_or_forgotten() {
        let mut retries = Retries::new(9);
        let now = Instant::now();
        let [a, b] = [1, 2].map(|ms| EntryId::new(ms, 0));
        for id in [a, b] {
            retries.failed(id, Timestamp::UNIX_EPOCH);
        }
        retries.schedule(a, now, false);
        retries.schedule(b, now + Duration::from_secs(1), false);
        retries.schedule(a, now + Duration::from_secs(2), false);
        assert_eq!(retries.next_due(), Some(now + Duration::from_secs(1)));
        retries.forget(b);
        assert_eq!(retries.next_due(), Some(now + Duration::from_secs(2)));
        assert_eq!(retries.take_due(now + Duration::from_secs(2), 9), [a]);
        assert_eq!(retries.next_due(), None);
    }
}
