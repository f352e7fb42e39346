//! The parameters and results of store operations.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Account;
use crate::event::{ConsumerName, Delivery, EntryId, Fields, GroupName, StreamName};

/// One consumer of one group of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// The stream.
    pub stream: StreamName,
    /// The group.
    pub group: GroupName,
    /// The consumer.
    pub consumer: ConsumerName,
    /// The idle time after which other consumers may claim a delivery. A store may acknowledge an entry without an
    /// ownership check while its delivery is younger than half of this.
    pub claim_idle: Duration,
    /// The group lease, if only one consumer of the group may work at a time. After the lease is lost, fetches, claims,
    /// extensions and settlements have no effect and fail with
    /// [`StoreErrorKind::LeaseLost`](super::StoreErrorKind::LeaseLost).
    pub lease: Option<Lease>,
}

/// A lease that a holder has taken.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The leased name within its stream, such as `group/siem`.
    pub name: String,
    /// The holder.
    pub holder: String,
    /// The fencing number: grows each time the lease is taken, and stays the same while it is renewed.
    pub fence: u64,
}

/// The result of [`crate::store::Store::lease`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leased {
    /// The caller holds the lease, from now on for the requested time.
    Held(Lease),
    /// Another holder has the lease.
    Taken {
        /// That holder.
        by: String,
        /// The time until the lease is free, unless it is renewed.
        expires_in: Duration,
    },
}

/// The result of appending one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// Its id in the stream; for a duplicate, the id of the first entry.
    pub id: EntryId,
    /// Its `id` field, empty if it has none; for a duplicate, the field of the first entry.
    pub event_id: Bytes,
    /// Whether its idempotency key was known, so that it was not stored again.
    pub duplicate: bool,
}

/// The least durability of an append when it returns, beyond the store's own promise.
///
/// As text it is `memory`, `fsync`, `replicated` or `fsync+replicated`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "&'static str")]
pub struct Durability {
    /// On disk: survives a power cut.
    pub fsync: bool,
    /// On as many replicas as the store is configured to wait for: survives the loss of the server.
    pub replicated: bool,
}

impl Durability {
    /// The store's own durability.
    pub const MEMORY: Self = Self { fsync: false, replicated: false };
    /// On disk.
    pub const FSYNC: Self = Self { fsync: true, replicated: false };
    /// On replicas.
    pub const REPLICATED: Self = Self { fsync: false, replicated: true };
    /// All values.
    pub const ALL: [Self; 4] = [Self::MEMORY, Self::FSYNC, Self::REPLICATED, Self { fsync: true, replicated: true }];

    /// Returns the durability that satisfies both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { fsync: self.fsync || other.fsync, replicated: self.replicated || other.replicated }
    }

    /// Returns the text form.
    pub const fn as_str(self) -> &'static str {
        match (self.fsync, self.replicated) {
            (false, false) => "memory",
            (true, false) => "fsync",
            (false, true) => "replicated",
            (true, true) => "fsync+replicated",
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|durability| durability.as_str() == text);
        found.ok_or_else(|| format!("must be memory, fsync, replicated or fsync+replicated, not `{text}`"))
    }
}

impl TryFrom<String> for Durability {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Durability> for &'static str {
    fn from(durability: Durability) -> Self {
        durability.as_str()
    }
}

/// A range of entry ids, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The smallest id.
    pub from: EntryId,
    /// The greatest id.
    pub to: EntryId,
    /// The reading direction.
    pub order: Order,
}

impl Range {
    /// Returns the range of everything after `id`, oldest first.
    pub fn after(id: EntryId) -> Self {
        Self { from: id.next(), to: EntryId::MAX, order: Order::Forward }
    }
}

/// The reading direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// The start position of a new group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The oldest entry of the stream.
    Oldest,
    /// The next entry to be appended.
    New,
    /// The first entry after this one.
    After(EntryId),
}

/// The result of a claim.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The claimed entries, now pending on the cursor's consumer.
    pub deliveries: Vec<Delivery>,
    /// Entries whose bodies were trimmed away; they are no longer pending.
    pub lost: Vec<EntryId>,
}

/// The result of one step of [`crate::store::Store::reclaim`].
#[derive(Debug, Default)]
pub struct Reclaimed {
    /// The claimed and the lost entries.
    pub claimed: Claimed,
    /// The id to continue from; [`EntryId::MIN`] at the end of the pending entries.
    pub next: EntryId,
    /// The deliveries of the entry at `next`, if the search stopped there because of [`IsolationLimits`].
    pub held_back: Option<u32>,
}

/// Limits the entries in flight beside an entry that was delivered before without a result.
///
/// Such an entry may have crashed its consumers. A crash costs every entry in flight one more delivery, so with each
/// delivery of the suspect fewer other entries are in flight beside it, until it is alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IsolationLimits {
    /// The number of entries that the consumer has in flight already.
    pub in_hand: usize,
    /// The maximum in flight, the entry included, for an entry that was delivered once, twice, or more often.
    pub most: [usize; 3],
}

impl IsolationLimits {
    /// No limits.
    pub const NONE: Self = Self { in_hand: 0, most: [usize::MAX; 3] };

    /// Returns the maximum in flight beside an entry with `attempts` deliveries.
    pub fn most(&self, attempts: u32) -> usize {
        match attempts {
            0 => usize::MAX,
            1 => self.most[0],
            2 => self.most[1],
            _ => self.most[2],
        }
    }

    /// Returns how many entries may be claimed from the first one on, given the deliveries of each.
    pub fn fitting(&self, attempts: impl IntoIterator<Item = u32>) -> usize {
        let (mut most, mut taken) = (usize::MAX, 0);
        for attempts in attempts {
            most = most.min(self.most(attempts));
            if self.in_hand.saturating_add(taken) >= most {
                break;
            }
            taken += 1;
        }
        taken
    }
}

/// The pending entries that are redelivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redelivery {
    /// The minimum idle time.
    pub idle: Duration,
    /// The number of deliveries from which on an entry is given up instead.
    pub max_deliveries: u32,
}

/// The result of one step of [`crate::store::Store::redeliver`].
#[derive(Debug, Default)]
pub struct Redelivered {
    /// The number of entries that were appended again and acknowledged.
    pub redelivered: usize,
    /// The number of entries that were acknowledged because they are for another group.
    pub foreign: usize,
    /// Entries with too many deliveries, now pending on the cursor's consumer.
    pub exhausted: Vec<Delivery>,
    /// Entries whose bodies were trimmed away; they are no longer pending.
    pub lost: Vec<EntryId>,
    /// The id to continue from; [`EntryId::MIN`] at the end of the pending entries.
    pub next: EntryId,
}

/// One delivery and its outcome.
#[derive(Debug)]
pub struct Settlement {
    /// The delivery to settle.
    pub delivery: Delivery,
    /// The outcome.
    pub outcome: Outcome,
}

/// The outcome of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Handled: acknowledge it.
    Acknowledge,
    /// Not for this group: acknowledge it, and count it as filtered.
    Filter,
    /// Failed, to be retried: the entry stays pending on this consumer, and any consumer may claim it after this time,
    /// or after [`Cursor::claim_idle`] if that is shorter. Its attempts stay counted.
    Retry(Duration),
    /// Given up: appended to `to` with these fields and acknowledged, in one step.
    DeadLetter {
        /// The dead-letter stream.
        to: StreamName,
        /// The fields of the [`crate::event::DeadLetter`].
        fields: Fields,
    },
    /// Not begun: other consumers may claim it at once, and this delivery does not count as an attempt.
    Release,
}

/// The content of a lease token: identifies one delivery.
///
/// It is valid while the entry is pending on that consumer with that attempt, and has been idle for less than
/// [`Cursor::claim_idle`]: until the lease ends, if no other consumer was given the entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The entry.
    pub id: EntryId,
    /// The consumer that holds it.
    pub consumer: ConsumerName,
    /// The number of this delivery.
    pub attempt: u32,
}

/// The action on a delivery that a receipt identifies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceiptAction {
    /// Handled: acknowledge it.
    Acknowledge,
    /// Held by that consumer for this time from now on, or for [`Cursor::claim_idle`] if that is shorter. Counts no
    /// attempt.
    Hold {
        /// The holder from now on. Another consumer than before invalidates the receipt.
        by: ConsumerName,
        /// The time of the lease.
        lease: Duration,
    },
}

/// The result of [`crate::store::Store::settle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settled {
    /// Deliveries that were settled.
    pub settled: usize,
    /// Deliveries that this consumer no longer owned; they were skipped.
    pub not_owned: usize,
}

/// One pending entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// The entry.
    pub id: EntryId,
    /// The consumer that holds it.
    pub consumer: ConsumerName,
    /// The time since it was delivered or extended.
    pub idle: Duration,
    /// The number of its deliveries.
    pub attempts: u32,
}

/// The entries to trim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trim {
    /// All but this many of the newest.
    ToLength(u64),
    /// All older than this id.
    Before(EntryId),
}

/// The result of one step of [`crate::store::Store::drop_oldest`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dropped {
    /// The number of removed entries.
    pub removed: u64,
    /// The first and the last of them.
    pub range: Option<(EntryId, EntryId)>,
    /// The groups that had not settled all of them.
    pub losses: Vec<GroupLoss>,
    /// Whether more entries are to be removed.
    pub is_more: bool,
}

/// The entries that one group lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLoss {
    /// The group.
    pub group: GroupName,
    /// The number of lost entries that were pending.
    pub pending: u64,
    /// The number of lost entries that were undelivered.
    pub undelivered: u64,
}

/// The current state of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStatus {
    /// The number of entries that it holds.
    pub length: u64,
    /// The id of the oldest entry, if it holds any.
    pub first_id: Option<EntryId>,
    /// The greatest id ever assigned, even if that entry is gone.
    pub last_id: EntryId,
    /// The number of entries ever appended.
    pub entries_added: u64,
    /// Entries that other programs removed since the store began to count; `None` if it does not count them.
    pub removed_by_others: Option<u64>,
    /// The number of entries ever appended before the oldest one that it holds; `None` if entries in the middle were
    /// removed, so that the number is unknown.
    pub before_first: Option<u64>,
    /// Its groups, by name.
    pub groups: Vec<GroupStatus>,
}

/// The current state of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Its name.
    pub name: GroupName,
    /// The last entry delivered to any of its consumers.
    pub last_delivered: EntryId,
    /// The number of entries ever delivered to it, if known.
    pub entries_read: Option<u64>,
    /// Entries not delivered yet; `None` if the server does not know.
    pub lag: Option<u64>,
    /// Entries after `last_delivered` that the stream holds now; `None` if the server does not know.
    pub undelivered: Option<u64>,
    /// Entries delivered and not settled.
    pub pending: u64,
    /// The oldest pending entry.
    pub oldest_pending: Option<EntryId>,
    /// Its account; `None` if no store created or ensured the group.
    pub account: Option<Account>,
    /// Its consumers, by name.
    pub consumers: Vec<ConsumerStatus>,
}

/// The current state of a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Its name.
    pub name: ConsumerName,
    /// Entries pending on it.
    pub pending: u64,
    /// The time since its last request that the store knows of.
    pub idle: Duration,
}

/// The result of [`crate::store::Store::check`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreStatus {
    /// Product and version, such as `redis 7.0.15` or `embedded`.
    pub description: String,
    /// Warnings for the operator, such as disabled persistence.
    pub warnings: Vec<String>,
    /// The milliseconds by which the store's clock is ahead of this machine's, if it has a clock of its own.
    pub clock_ahead_ms: Option<i64>,
    /// The number of keys that the server has evicted since it started, if it evicts.
    pub evicted_keys: Option<u64>,
}

impl StoreStatus {
    /// Returns a status with this description and no warnings.
    pub fn new(description: impl Into<String>) -> Self {
        Self { description: description.into(), ..Self::default() }
    }
}
