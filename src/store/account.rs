//! Accounts: the store counts the outcome of every entry of a group.
//!
//! A group's account begins when the group is created, with the entries that the stream holds then. From then on:
//!
//! ```text
//! published = acknowledged + filtered + dead + lost + pending + undelivered
//! ```
//!
//! The first four are counters; the store changes them in the step that they count. The last two are the current state
//! of the group. `published` counts the entries added since the account began, plus those that it began with.

use std::time::Duration;

use super::{GroupStatus, StreamStatus};
use crate::event::{EntryId, GroupName};

/// How entries were lost, that is, gone from the stream before the group settled them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LostReason {
    /// Removed by another program while pending; found by a claim.
    TrimmedPending,
    /// Removed by another program before its delivery.
    TrimmedUndelivered,
    /// Dropped because the stream had reached its hard limit.
    Dropped,
    /// Accepted, and lost to damage on the disk.
    Damaged,
}

impl LostReason {
    /// Every reason, in the order of [`Account::lost`].
    pub const ALL: [Self; 4] = [Self::TrimmedPending, Self::TrimmedUndelivered, Self::Dropped, Self::Damaged];

    /// Returns the reason as one word, for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TrimmedPending => "trimmed_pending",
            Self::TrimmedUndelivered => "trimmed_undelivered",
            Self::Dropped => "dropped",
            Self::Damaged => "damaged",
        }
    }
}

/// A group's counters since its account began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// The number of entries appended to the stream before this account began; `None` while unknown.
    pub base: Option<u64>,
    /// Entries that were handled and acknowledged through the store.
    pub acknowledged: u64,
    /// Entries that were acknowledged through the store because they were not for the group.
    pub filtered: u64,
    /// Entries moved to the dead letters.
    pub dead: u64,
    /// Entries lost, by [`LostReason`].
    pub lost: [u64; LostReason::ALL.len()],
}

impl Account {
    /// Returns the number of entries lost for this reason.
    pub fn lost(&self, reason: LostReason) -> u64 {
        self.lost[reason as usize]
    }

    /// Returns the counter of entries lost for this reason.
    pub fn lost_mut(&mut self, reason: LostReason) -> &mut u64 {
        &mut self.lost[reason as usize]
    }

    /// Returns the number of settled and lost entries.
    pub fn done(&self) -> u64 {
        self.acknowledged + self.filtered + self.dead + self.lost.iter().sum::<u64>()
    }
}

/// The consumers that settle a group's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consumption {
    /// Only the daemon: every settlement is counted.
    Inside,
    /// External consumers too: they may acknowledge on the server itself, which is not counted.
    Outside,
}

/// A group's account at one instant, and its balance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balance {
    /// Entries that were published for the group; `None` while unknown.
    pub published: Option<u64>,
    /// Acknowledged entries. With [`Consumption::Outside`] also those that have gone without being counted.
    pub acknowledged: u64,
    /// Undelivered entries; `None` if the server does not know.
    pub undelivered: Option<u64>,
    /// Published entries that no counter and no state accounts for; negative if more are found than were published.
    /// `None` while unknown.
    pub difference: Option<i64>,
}

impl Balance {
    /// Computes the balance of a group from its status.
    pub fn of(stream: &StreamStatus, group: &GroupStatus, consumption: Consumption) -> Self {
        let account = group.account.unwrap_or_default();
        let published = account.base.and_then(|base| stream.entries_added.checked_sub(base));
        let known = published.zip(group.undelivered).map(|(published, undelivered)| {
            let found = account.done() + group.pending + undelivered;
            i64::try_from(i128::from(published) - i128::from(found)).unwrap_or(i64::MAX)
        });
        let by_others = match consumption {
            Consumption::Inside => 0,
            Consumption::Outside => known.map_or(0, |difference| difference.max(0)),
        };
        Self {
            published,
            acknowledged: account.acknowledged + by_others.cast_unsigned(),
            undelivered: group.undelivered,
            difference: known.map(|difference| difference - by_others),
        }
    }

    /// Returns whether every published entry is accounted for, or `None` while that is unknown.
    pub fn is_balanced(&self) -> Option<bool> {
        self.difference.map(|difference| difference == 0)
    }
}

impl GroupStatus {
    /// Returns the first entry that the group has not settled, if any.
    pub fn floor(&self, stream: &StreamStatus) -> Option<EntryId> {
        let unread = self.last_delivered.next();
        let next = (unread <= stream.last_id).then(|| stream.first_id.map_or(unread, |first| unread.max(first)));
        self.oldest_pending.into_iter().chain(next).min()
    }

    /// Returns whether the group blocks the trimming of entries older than `after` while all its consumers have been
    /// idle for longer than that.
    pub fn is_abandoned(&self, stream: &StreamStatus, after: Duration, now_ms: u64) -> bool {
        let is_silent = self.consumers.iter().all(|consumer| consumer.idle > after);
        let age = |floor: EntryId| Duration::from_millis(now_ms.saturating_sub(floor.ms));
        is_silent && self.floor(stream).is_some_and(|floor| age(floor) > after)
    }
}

impl StreamStatus {
    /// Returns the group with the oldest entry not settled, except for the `ignored` groups.
    pub fn floor_holder(&self, ignored: &[GroupName]) -> Option<&GroupStatus> {
        let counted = self.groups.iter().filter(|group| !ignored.contains(&group.name));
        let holding = counted.filter_map(|group| Some((group.floor(self)?, group)));
        holding.min_by_key(|(floor, _)| *floor).map(|(_, group)| group)
    }
}
