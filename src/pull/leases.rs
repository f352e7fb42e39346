//! Which leases this instance has given, and when they end. No truth is here: the store has it.

use std::collections::{BTreeSet, HashMap};

use tokio::time::Instant;

use crate::event::{ConsumerName, EntryId};

/// Leases by entry, by consumer and by their end.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    held: HashMap<EntryId, Held>,
    ends: BTreeSet<(Instant, EntryId)>,
    by_consumer: HashMap<ConsumerName, usize>,
    leases: usize,
}

#[derive(Debug)]
struct Held {
    /// Nobody where it was given back and waits to be due.
    consumer: Option<ConsumerName>,
    until: Instant,
}

impl Ledger {
    /// Notes a lease, or, for nobody, something that is due then; in place of what was noted of the entry before. Says
    /// whether it is the next to end.
    pub(super) fn put(&mut self, id: EntryId, consumer: Option<ConsumerName>, until: Instant) -> bool {
        self.remove(id);
        if let Some(consumer) = &consumer {
            *self.by_consumer.entry(consumer.clone()).or_default() += 1;
            self.leases += 1;
        }
        self.held.insert(id, Held { consumer, until });
        self.ends.insert((until, id));
        self.next_end() == Some(until)
    }

    /// Forgets an entry.
    pub(super) fn remove(&mut self, id: EntryId) -> Option<ConsumerName> {
        let Held { consumer, until } = self.held.remove(&id)?;
        self.ends.remove(&(until, id));
        if let Some(consumer) = &consumer
            && let Some(count) = self.by_consumer.get_mut(consumer)
        {
            *count -= 1;
            self.leases -= 1;
            if *count == 0 {
                self.by_consumer.remove(consumer);
            }
        }
        consumer
    }

    /// How many leases a consumer has.
    pub(super) fn held_by(&self, consumer: &ConsumerName) -> usize {
        self.by_consumer.get(consumer).copied().unwrap_or_default()
    }

    /// How many leases there are.
    pub(super) fn leases(&self) -> usize {
        self.leases
    }

    /// When the next one ends.
    pub(super) fn next_end(&self) -> Option<Instant> {
        self.ends.first().map(|(until, _)| *until)
    }

    /// Takes out what has ended, with whose it was.
    pub(super) fn take_ended(&mut self, now: Instant) -> Vec<(EntryId, Option<ConsumerName>)> {
        let mut ended = Vec::new();
        while let Some((_, id)) = self.ends.first().copied().filter(|(until, _)| *until <= now) {
            ended.push((id, self.remove(id)));
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn leases_are_counted_by_consumer_and_end_in_their_order() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let name = |text: &str| text.parse::<ConsumerName>().expect("a valid name");
        let id = |ms| EntryId::new(ms, 0);
        let mut ledger = Ledger::default();
        assert!(ledger.put(id(1), Some(name("a")), now + second * 2));
        assert!(ledger.put(id(2), Some(name("a")), now + second));
        assert!(!ledger.put(id(3), None, now + second * 3));
        assert_eq!((ledger.held_by(&name("a")), ledger.leases()), (2, 2));
        ledger.put(id(1), Some(name("b")), now + second * 2);
        assert_eq!((ledger.held_by(&name("a")), ledger.held_by(&name("b"))), (1, 1));
        assert_eq!(ledger.take_ended(now), []);
        assert_eq!(ledger.take_ended(now + second * 2), [(id(2), Some(name("a"))), (id(1), Some(name("b")))]);
        assert_eq!((ledger.leases(), ledger.next_end()), (0, Some(now + second * 3)));
        assert_eq!(ledger.remove(id(3)), None);
        assert_eq!((ledger.next_end(), ledger.by_consumer.len()), (None, 0));
    }
}
