//! Table of the leases that this instance has given, by expiry. Only the store decides whether a lease is valid.

use std::collections::{BTreeSet, HashMap};

use tokio::time::Instant;

use crate::event::{ConsumerName, EntryId};

/// Leases by entry, by consumer and by expiry.
#[derive(Debug, Default)]
pub(super) struct PullLeaseTable {
    leases: HashMap<EntryId, TableEntry>,
    expiries: BTreeSet<(Instant, EntryId)>,
    by_consumer: HashMap<ConsumerName, usize>,
    lease_count: usize,
}

#[derive(Debug)]
struct TableEntry {
    /// `None` for a nacked entry that waits until its delay is over.
    consumer: Option<ConsumerName>,
    until: Instant,
}

impl PullLeaseTable {
    /// Inserts or replaces the lease of an entry, or the delay of a nacked entry without a consumer. Returns whether it
    /// is the next one to expire.
    pub(super) fn insert(&mut self, id: EntryId, consumer: Option<ConsumerName>, until: Instant) -> bool {
        self.remove(id);
        if let Some(consumer) = &consumer {
            *self.by_consumer.entry(consumer.clone()).or_default() += 1;
            self.lease_count += 1;
        }
        self.leases.insert(id, TableEntry { consumer, until });
        self.expiries.insert((until, id));
        self.next_expiry() == Some(until)
    }

    /// Removes an entry. Returns the consumer that had the lease.
    pub(super) fn remove(&mut self, id: EntryId) -> Option<ConsumerName> {
        let TableEntry { consumer, until } = self.leases.remove(&id)?;
        self.expiries.remove(&(until, id));
        if let Some(consumer) = &consumer
            && let Some(count) = self.by_consumer.get_mut(consumer)
        {
            *count -= 1;
            self.lease_count -= 1;
            if *count == 0 {
                self.by_consumer.remove(consumer);
            }
        }
        consumer
    }

    /// Returns the number of leases of a consumer.
    pub(super) fn count_of(&self, consumer: &ConsumerName) -> usize {
        self.by_consumer.get(consumer).copied().unwrap_or_default()
    }

    /// Returns the number of leases.
    pub(super) fn count(&self) -> usize {
        self.lease_count
    }

    /// Returns the time at which the next lease or delay ends.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.expiries.first().map(|(until, _)| *until)
    }

    /// Removes and returns the expired entries with their consumers.
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<(EntryId, Option<ConsumerName>)> {
        let mut expired = Vec::new();
        while let Some((_, id)) = self.expiries.first().copied().filter(|(until, _)| *until <= now) {
            expired.push((id, self.remove(id)));
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn leases_are_counted_by_consumer_and_expire_in_order() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let name = |text: &str| text.parse::<ConsumerName>().expect("a valid name");
        let id = |ms| EntryId::new(ms, 0);
        let mut leases = PullLeaseTable::default();
        assert!(leases.insert(id(1), Some(name("a")), now + second * 2));
        assert!(leases.insert(id(2), Some(name("a")), now + second));
        assert!(!leases.insert(id(3), None, now + second * 3));
        assert_eq!((leases.count_of(&name("a")), leases.count()), (2, 2));
        leases.insert(id(1), Some(name("b")), now + second * 2);
        assert_eq!((leases.count_of(&name("a")), leases.count_of(&name("b"))), (1, 1));
        assert_eq!(leases.take_expired(now), []);
        assert_eq!(leases.take_expired(now + second * 2), [(id(2), Some(name("a"))), (id(1), Some(name("b")))]);
        assert_eq!((leases.count(), leases.next_expiry()), (0, Some(now + second * 3)));
        assert_eq!(leases.remove(id(3)), None);
        assert_eq!((leases.next_expiry(), leases.by_consumer.len()), (None, 0));
    }
}
