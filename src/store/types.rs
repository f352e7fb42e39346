//! The values that go in and out of a store.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Account;
use crate::event::{ConsumerName, Delivery, EntryId, Fields, GroupName, StreamName};

/// One consumer's place in one group of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// The stream.
    pub stream: StreamName,
    /// The group.
    pub group: GroupName,
    /// The consumer.
    pub consumer: ConsumerName,
    /// How long a delivery stays this consumer's alone: others claim entries idle for longer. A store may
    /// acknowledge without asking who owns an entry while it is younger than half of this.
    pub claim_idle: Duration,
    /// Where only one consumer of the group may work at a time, its lease: fetches, claims, extensions and settlements
    /// then fail with [`StoreErrorKind::LeaseLost`](super::StoreErrorKind::LeaseLost), and do nothing, where the lease
    /// is not held any more.
    pub lease: Option<Lease>,
}

/// A lease as its holder has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lease {
    /// What is leased, a name within its stream, such as `group/siem`.
    pub name: String,
    /// Who holds it.
    pub holder: String,
    /// Greater each time the lease is taken anew, by whomever; the same for as long as it is renewed.
    pub fence: u64,
}

/// What became of asking for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leased {
    /// It is the asker's, for the time asked for from now on.
    Held(Lease),
    /// Another holds it.
    Taken {
        /// Who.
        by: String,
        /// After what time it is free, if that one does not renew it.
        expires_in: Duration,
    },
}

/// What became of one appended entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// Its id in the stream; the first entry's where it is a duplicate.
    pub id: EntryId,
    /// Its `id` field, empty where it has none; the first entry's where it is a duplicate.
    pub event_id: Bytes,
    /// Whether its idempotency key had been seen before, so that it was not stored again.
    pub duplicate: bool,
}

/// How durable an append is at least when it returns, beyond what a store always promises.
///
/// As text it is `memory`, `fsync`, `replicated` or `fsync+replicated`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Deserialize, Serialize)]
#[serde(try_from = "String", into = "&'static str")]
pub struct Durability {
    /// It is on the disk: it survives a power cut.
    pub fsync: bool,
    /// It is on as many replicas as the store is told to wait for: it survives the loss of the server.
    pub replicated: bool,
}

impl Durability {
    /// As durable as the store always is.
    pub const MEMORY: Self = Self { fsync: false, replicated: false };
    /// On the disk.
    pub const FSYNC: Self = Self { fsync: true, replicated: false };
    /// On replicas.
    pub const REPLICATED: Self = Self { fsync: false, replicated: true };
    /// Every kind there is.
    pub const ALL: [Self; 4] = [Self::MEMORY, Self::FSYNC, Self::REPLICATED, Self { fsync: true, replicated: true }];

    /// As durable as both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { fsync: self.fsync || other.fsync, replicated: self.replicated || other.replicated }
    }

    /// Its text.
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

/// A part of a stream, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The smallest id.
    pub from: EntryId,
    /// The greatest id.
    pub to: EntryId,
    /// From which end to read.
    pub order: Order,
}

impl Range {
    /// Everything after `id`, oldest first.
    pub fn after(id: EntryId) -> Self {
        Self { from: id.next(), to: EntryId::MAX, order: Order::Forward }
    }
}

/// The order of reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Oldest first.
    Forward,
    /// Newest first.
    Backward,
}

/// Where a new group begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the oldest entry there is.
    Oldest,
    /// With the next entry.
    New,
    /// With the first entry after this one.
    After(EntryId),
}

/// What a claim took, and what it found lost.
#[derive(Debug, Default)]
pub struct Claimed {
    /// The entries taken, now pending on the cursor's consumer.
    pub deliveries: Vec<Delivery>,
    /// Pending entries whose bodies were trimmed away; they are not pending any more.
    pub lost: Vec<EntryId>,
}

/// What a search for idle entries took, and where to go on.
#[derive(Debug, Default)]
pub struct Reclaimed {
    /// What was taken and lost.
    pub claimed: Claimed,
    /// Where to go on; [`EntryId::MIN`] when the search has come to the end.
    pub next: EntryId,
    /// How often the entry at `next` was delivered, where the search stopped there out of [`Care`].
    pub held_back: Option<u32>,
}

/// How many entries a consumer has in hand together with one that was delivered before without a result.
///
/// Such an entry may be what its consumers die of. Whatever they have in hand at that moment is delivered once more for
/// it, so the company of an entry gets smaller with each delivery, until it is alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Care {
    /// How many entries the consumer has in hand already.
    pub in_hand: usize,
    /// The most in hand, itself included, with an entry that was delivered once, twice, or more often.
    pub most: [usize; 3],
}

impl Care {
    /// Any number, whatever they are.
    pub const NONE: Self = Self { in_hand: 0, most: [usize::MAX; 3] };

    /// The most in hand together with an entry that was delivered so often.
    pub fn most(&self, attempts: u32) -> usize {
        match attempts {
            0 => usize::MAX,
            1 => self.most[0],
            2 => self.most[1],
            _ => self.most[2],
        }
    }

    /// How many of these, by how often each was delivered, may be taken from the first one on.
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

/// Which pending entries are handed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redelivery {
    /// Those idle for at least so long.
    pub idle: Duration,
    /// Those delivered as often are given up instead.
    pub max_deliveries: u32,
}

/// What was handed on, what is to be given up, and where to go on.
#[derive(Debug, Default)]
pub struct Redelivered {
    /// How many entries were appended again and acknowledged.
    pub handed_on: usize,
    /// How many were acknowledged because they are for another group.
    pub foreign: usize,
    /// Entries delivered too often, now pending on the cursor's consumer.
    pub exhausted: Vec<Delivery>,
    /// Pending entries whose bodies were trimmed away; they are not pending any more.
    pub lost: Vec<EntryId>,
    /// Where to go on; [`EntryId::MIN`] when the search has come to the end.
    pub next: EntryId,
}

/// One delivery and what becomes of it.
#[derive(Debug)]
pub struct Settlement {
    /// The delivery that ends here.
    pub delivery: Delivery,
    /// How it ends.
    pub outcome: Outcome,
}

/// How a delivery ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Handled: acknowledge it.
    Acknowledge,
    /// Not for this group: acknowledged as well, and counted apart.
    Filter,
    /// To be tried again: stays pending on this consumer and becomes claimable by anyone after this time, or after
    /// [`Cursor::claim_idle`] if that is shorter. The attempts so far stay counted.
    Retry(Duration),
    /// Given up: appended to `to` with these fields and acknowledged, in one step.
    DeadLetter {
        /// The stream of dead letters.
        to: StreamName,
        /// The record, see [`crate::event::DeadLetter`].
        fields: Fields,
    },
    /// Not begun: claimable by others at once, and this delivery does not count as an attempt.
    Release,
}

/// A delivery as whoever has it leased can name it.
///
/// It is good while the entry is pending on that consumer, was delivered that often, and has been idle for less than
/// [`Cursor::claim_idle`]: until the lease ends, and no one else was given the entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The entry.
    pub id: EntryId,
    /// Who holds it.
    pub consumer: ConsumerName,
    /// How many times the store had delivered it then.
    pub attempt: u32,
}

/// What becomes of a delivery that is named by its receipt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redemption {
    /// Handled: acknowledge it.
    Acknowledge,
    /// Held by that consumer for so long from now on, or for [`Cursor::claim_idle`] if that is shorter. No attempt is
    /// counted.
    Hold {
        /// Who holds it from now on; with another consumer the receipt is good no more.
        by: ConsumerName,
        /// For how long.
        lease: Duration,
    },
}

/// What a settle did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settled {
    /// Deliveries settled as asked.
    pub settled: usize,
    /// Deliveries that were not this consumer's any more; left alone.
    pub not_owned: usize,
}

/// One pending entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// The entry.
    pub id: EntryId,
    /// Who holds it.
    pub consumer: ConsumerName,
    /// How long ago it was delivered or extended.
    pub idle: Duration,
    /// How many times it was delivered.
    pub attempts: u32,
}

/// What to trim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trim {
    /// All but the newest so many.
    ToLength(u64),
    /// All that are older than this id.
    Before(EntryId),
}

/// What one step of [`crate::store::Store::drop_oldest`] removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dropped {
    /// How many entries.
    pub removed: u64,
    /// The first and the last of them.
    pub range: Option<(EntryId, EntryId)>,
    /// The groups that still had some of them to handle.
    pub losers: Vec<Loser>,
    /// Whether there is more to remove.
    pub is_more: bool,
}

/// A group that lost entries it had still to handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loser {
    /// The group.
    pub group: GroupName,
    /// How many were pending.
    pub pending: u64,
    /// How many it had not been given yet.
    pub undelivered: u64,
}

/// A stream as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStatus {
    /// How many entries it holds.
    pub length: u64,
    /// The oldest entry, if it holds any.
    pub first_id: Option<EntryId>,
    /// The greatest id ever given, also when that entry is gone.
    pub last_id: EntryId,
    /// How many entries were ever appended.
    pub entries_added: u64,
    /// Entries that were removed by others than the store, since it began to count; absent where it does not.
    pub removed_by_others: Option<u64>,
    /// How many entries were ever appended before the oldest that it holds; absent where others than the oldest were
    /// removed, so that no one can tell.
    pub before_first: Option<u64>,
    /// Its groups, by name.
    pub groups: Vec<GroupStatus>,
}

/// A group as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Its name.
    pub name: GroupName,
    /// The last entry delivered to any of its consumers.
    pub last_delivered: EntryId,
    /// How many entries it was ever delivered, where that is known.
    pub entries_read: Option<u64>,
    /// Entries not delivered yet; absent where the server can't tell.
    pub lag: Option<u64>,
    /// Entries after `last_delivered` that are there now; absent where the server can't tell.
    pub undelivered: Option<u64>,
    /// Entries delivered and not settled.
    pub pending: u64,
    /// The oldest of them.
    pub oldest_pending: Option<EntryId>,
    /// What became of its entries; absent where the group was not made or ensured by a store.
    pub account: Option<Account>,
    /// Its consumers, by name.
    pub consumers: Vec<ConsumerStatus>,
}

/// A consumer as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerStatus {
    /// Its name.
    pub name: ConsumerName,
    /// Entries pending on it.
    pub pending: u64,
    /// How long ago it last asked for anything, as far as the store knows.
    pub idle: Duration,
}

/// What a store says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreStatus {
    /// What it is, such as `redis 7.0.15` or `embedded`.
    pub description: String,
    /// What an operator should know, such as persistence that is off. Empty when all is as it should be.
    pub warnings: Vec<String>,
    /// By how many milliseconds the store's clock is ahead of ours, where it has one of its own.
    pub clock_ahead_ms: Option<i64>,
    /// How many keys the server has evicted since it started, where it can.
    pub evicted_keys: Option<u64>,
}

impl StoreStatus {
    /// A store of that description about which there is nothing else to say.
    pub fn new(description: impl Into<String>) -> Self {
        Self { description: description.into(), ..Self::default() }
    }
}
