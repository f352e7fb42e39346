//! One group in memory: its cursor, its consumers, and its pending entries in leases.
//!
//! A lease holds the entries that were delivered together to one consumer, in one row. Only the writer owns groups. It
//! changes them before the commit, and the commit writes the changes; after a failed commit they are loaded again.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::event::{ConsumerName, EntryId, GroupName};
use crate::store::Account;
use crate::store::embedded::disk::chunk::Chunk;

/// The maximum number of pending entries in one group, which bounds their memory (about 60 MiB).
pub(crate) const MAX_PENDING: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) number: i64,
    pub(crate) name: GroupName,
    /// The last entry delivered.
    pub(crate) cursor: EntryId,
    /// The number of entries, counted from the stream's first, that will not be delivered: all up to the cursor, and the
    /// discarded ones after it.
    pub(crate) passed: u64,
    /// The number of entries ever delivered.
    pub(crate) read: u64,
    /// Its account. Changed through [`Group::account`].
    pub(crate) counted: Account,
    /// The chunk of the last delivery, if it was read from disk.
    pub(crate) ahead: Option<Chunk>,
    /// The lease of each pending entry.
    pending: BTreeMap<EntryId, i64>,
    leases: HashMap<i64, DeliveredBatch>,
    consumers: BTreeMap<ConsumerName, Consumer>,
    pub(crate) changes: GroupChanges,
}

/// The changes of a group that the next commit writes.
#[derive(Debug, Default)]
pub(crate) struct GroupChanges {
    pub(crate) is_changed: bool,
    pub(crate) is_account_changed: bool,
    pub(crate) leases: BTreeSet<i64>,
    pub(crate) consumers: BTreeSet<ConsumerName>,
    pub(crate) removed_consumers: Vec<i64>,
}

/// Entries that are pending on one consumer since the same time with the same number of attempts.
#[derive(Debug, Clone)]
pub(crate) struct DeliveredBatch {
    /// The consumer's number.
    pub(crate) consumer: i64,
    pub(crate) delivered_ms: u64,
    pub(crate) attempts: u32,
    /// In ascending order between commits. May contain entries that left the lease since it was last written.
    pub(crate) ids: Vec<EntryId>,
}

#[derive(Debug, Clone)]
pub(crate) struct Consumer {
    pub(crate) number: i64,
    pub(crate) name: ConsumerName,
    /// The time of its last request; written at most once a minute.
    pub(crate) seen_ms: u64,
    saved_ms: u64,
    pub(crate) pending: u64,
}

impl Consumer {
    pub(crate) fn new(number: i64, name: ConsumerName, seen_ms: u64) -> Self {
        Self { number, name, seen_ms, saved_ms: seen_ms, pending: 0 }
    }
}

/// The number of entries scanned for one consumer before the leases are searched for its next entry.
const OWN_LOOKS: usize = 1024;
const SEEN_EVERY_MS: u64 = 60_000;

/// One pending entry with its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PendingEntry {
    pub(crate) id: EntryId,
    pub(crate) consumer: i64,
    pub(crate) delivered_ms: u64,
    pub(crate) attempts: u32,
}

/// The leases created by one operation: entries with equal consumer, time and attempts share one.
#[derive(Debug, Default)]
pub(crate) struct NewLeases(HashMap<(i64, u64, u32), i64>);

impl Group {
    pub(crate) fn new(number: i64, name: GroupName) -> Self {
        Self {
            number,
            name,
            cursor: EntryId::MIN,
            passed: 0,
            read: 0,
            counted: Account::default(),
            ahead: None,
            pending: BTreeMap::new(),
            leases: HashMap::new(),
            consumers: BTreeMap::new(),
            changes: GroupChanges::default(),
        }
    }

    /// Returns the account for changes. The next commit writes it.
    pub(crate) fn account(&mut self) -> &mut Account {
        self.changes.is_account_changed = true;
        &mut self.counted
    }

    /// Adds a loaded consumer.
    pub(crate) fn put_consumer(&mut self, consumer: Consumer) {
        self.consumers.insert(consumer.name.clone(), consumer);
    }

    /// Adds a loaded lease. Call it after all consumers were added.
    pub(crate) fn put_lease(&mut self, number: i64, lease: DeliveredBatch) {
        for id in &lease.ids {
            self.pending.insert(*id, number);
        }
        self.count(lease.consumer, lease.ids.len() as u64, 0);
        self.leases.insert(number, lease);
    }

    /// Returns the number of a consumer, creates it if it is new, and records that it is active now.
    pub(crate) fn consumer(&mut self, name: &ConsumerName, now_ms: u64, next_number: &mut i64) -> i64 {
        let consumer = self.consumers.entry(name.clone()).or_insert_with(|| {
            *next_number += 1;
            self.changes.consumers.insert(name.clone());
            Consumer::new(*next_number, name.clone(), now_ms)
        });
        consumer.seen_ms = consumer.seen_ms.max(now_ms);
        if consumer.seen_ms - consumer.saved_ms >= SEEN_EVERY_MS {
            consumer.saved_ms = consumer.seen_ms;
            self.changes.consumers.insert(name.clone());
        }
        consumer.number
    }

    /// Returns the number of a consumer, or `None` if it does not exist.
    pub(crate) fn number_of(&self, name: &ConsumerName) -> Option<i64> {
        self.consumers.get(name).map(|consumer| consumer.number)
    }

    pub(crate) fn consumers(&self) -> impl Iterator<Item = &Consumer> {
        self.consumers.values()
    }

    pub(crate) fn consumer_named(&self, name: &ConsumerName) -> Option<&Consumer> {
        self.consumers.get(name)
    }

    /// Removes a consumer if it has nothing pending. Returns whether it did.
    pub(crate) fn remove_consumer(&mut self, name: &ConsumerName) -> bool {
        let Some(consumer) = self.consumers.get(name).filter(|consumer| consumer.pending == 0) else { return false };
        self.changes.removed_consumers.push(consumer.number);
        self.changes.consumers.remove(name);
        self.consumers.remove(name);
        true
    }

    pub(crate) fn pending_count(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn oldest_pending(&self) -> Option<EntryId> {
        self.pending.first_key_value().map(|(id, _)| *id)
    }

    /// Returns the first entry that the group has not settled.
    pub(crate) fn floor(&self) -> EntryId {
        self.oldest_pending().unwrap_or(EntryId::MAX).min(self.cursor.next())
    }

    pub(crate) fn held(&self, id: EntryId) -> Option<PendingEntry> {
        self.pending.get(&id).map(|lease| self.held_in(id, *lease))
    }

    /// Returns the pending entries from `from` on, oldest first.
    pub(crate) fn held_from(&self, from: EntryId) -> impl Iterator<Item = PendingEntry> {
        self.pending.range(from..).map(|(id, lease)| self.held_in(*id, *lease))
    }

    /// Returns the pending entries of one consumer from `from` on, oldest first, at most `limit`.
    ///
    /// Returns fewer if finding more would take long, but an empty list only if there are none.
    pub(crate) fn held_by(&self, consumer: i64, mut from: EntryId, limit: usize) -> Vec<PendingEntry> {
        let mut found = Vec::new();
        let mut looks = 0;
        loop {
            let mut last = None;
            for held in self.held_from(from).take(OWN_LOOKS) {
                looks += 1;
                last = Some(held.id);
                if held.consumer == consumer {
                    found.push(held);
                    if found.len() >= limit {
                        return found;
                    }
                }
            }
            let is_enough = !found.is_empty() && looks >= 4 * OWN_LOOKS;
            let Some(last) = last.filter(|_| !is_enough) else { return found };
            // The next entry may be far behind entries of other consumers.
            let Some(next) = self.first_held_by(consumer, last.next()) else { return found };
            from = next;
        }
    }

    /// Returns the first pending entry of a consumer from `from` on, by searching its leases.
    fn first_held_by(&self, consumer: i64, from: EntryId) -> Option<EntryId> {
        let own = self.leases.iter().filter(|(_, lease)| lease.consumer == consumer);
        let first = own.filter_map(|(number, lease)| {
            let start = lease.ids.partition_point(|id| *id < from);
            lease.ids.iter().skip(start).copied().find(|id| self.pending.get(id) == Some(number))
        });
        first.min()
    }

    fn held_in(&self, id: EntryId, lease: i64) -> PendingEntry {
        let lease = self.leases.get(&lease).expect("a pending entry is in a lease");
        PendingEntry { id, consumer: lease.consumer, delivered_ms: lease.delivered_ms, attempts: lease.attempts }
    }

    /// Makes an entry pending with the consumer, time and attempts of `held`, and removes it from its current lease.
    pub(crate) fn hold(&mut self, held: PendingEntry, new: &mut NewLeases, next_lease: &mut i64) {
        self.release(held.id);
        let key = (held.consumer, held.delivered_ms, held.attempts);
        let number = *new.0.entry(key).or_insert_with(|| {
            *next_lease += 1;
            *next_lease
        });
        let lease = self.leases.entry(number).or_insert_with(|| {
            let (consumer, delivered_ms, attempts) = key;
            DeliveredBatch { consumer, delivered_ms, attempts, ids: Vec::new() }
        });
        lease.ids.push(held.id);
        self.pending.insert(held.id, number);
        self.changes.leases.insert(number);
        self.count(held.consumer, 1, 0);
    }

    /// Removes an entry from the pending entries.
    pub(crate) fn release(&mut self, id: EntryId) {
        let Some(number) = self.pending.remove(&id) else { return };
        self.changes.leases.insert(number);
        let consumer = self.leases.get(&number).expect("a pending entry is in a lease").consumer;
        self.count(consumer, 0, 1);
    }

    fn count(&mut self, consumer: i64, more: u64, less: u64) {
        if let Some(consumer) = self.consumers.values_mut().find(|one| one.number == consumer) {
            consumer.pending = (consumer.pending + more).saturating_sub(less);
        }
    }

    /// Removes settled entries from the changed leases before they are written, and drops empty leases.
    pub(crate) fn settle_changes(&mut self) {
        for number in &self.changes.leases {
            let Some(lease) = self.leases.get_mut(number) else { continue };
            lease.ids.retain(|id| self.pending.get(id) == Some(number));
            lease.ids.sort_unstable();
            lease.ids.dedup();
            if lease.ids.is_empty() {
                self.leases.remove(number);
            }
        }
    }

    pub(crate) fn lease(&self, number: i64) -> Option<&DeliveredBatch> {
        self.leases.get(&number)
    }
}
