//! What became of the entries that a group was to be given, counted by the store.
//!
//! A group's account begins when the group is made, with whatever the stream holds then. From then on, at any instant,
//!
//! ```text
//! published = acknowledged + filtered + dead + lost + pending + undelivered
//! ```
//!
//! The first four are counters, which the store changes in the same step as what they count. The last two are what
//! the group has now. `published` is how many entries were added since the account began, plus those it began with.

use std::time::Duration;

use super::{GroupStatus, StreamStatus};
use crate::event::{EntryId, GroupName};

/// How entries were lost: gone from the stream before the group had handled them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LostReason {
    /// Removed by others while pending; found by the claim that met it.
    TrimmedPending,
    /// Removed by others before any consumer was given it.
    TrimmedUndelivered,
    /// Dropped because the stream had reached its hard limit.
    Dropped,
    /// Accepted, and gone because what was on the disk is damaged.
    Damaged,
}

impl LostReason {
    /// Every reason, in the order of [`Account::lost`].
    pub const ALL: [Self; 4] = [Self::TrimmedPending, Self::TrimmedUndelivered, Self::Dropped, Self::Damaged];

    /// The reason in one word, for logs and metrics.
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
    /// How many of the stream's entries, counted from its first ever, are not of this account; absent while unknown.
    pub base: Option<u64>,
    /// Entries acknowledged through the store after they were handled.
    pub acknowledged: u64,
    /// Entries acknowledged through the store without being handled: they were not for the group.
    pub filtered: u64,
    /// Entries moved to the dead letters.
    pub dead: u64,
    /// Entries lost, by [`LostReason`].
    pub lost: [u64; LostReason::ALL.len()],
}

impl Account {
    /// Entries lost for this reason.
    pub fn lost(&self, reason: LostReason) -> u64 {
        self.lost[reason as usize]
    }

    /// The counter of entries lost for this reason.
    pub fn lost_mut(&mut self, reason: LostReason) -> &mut u64 {
        &mut self.lost[reason as usize]
    }

    /// Entries that the group has done with, in whatever way.
    pub fn done(&self) -> u64 {
        self.acknowledged + self.filtered + self.dead + self.lost.iter().sum::<u64>()
    }
}

/// Who settles a group's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consumption {
    /// The daemon alone: every settlement is counted.
    Inside,
    /// Consumers of their own as well, who acknowledge on the server itself, where no one counts.
    Outside,
}

/// A group's account at one instant, and whether it adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balance {
    /// Entries that the group was to be given; absent while that is unknown.
    pub published: Option<u64>,
    /// Entries acknowledged. With [`Consumption::Outside`] also those that are neither there nor counted otherwise.
    pub acknowledged: u64,
    /// Entries that the group has not been given yet; absent where the server can't tell.
    pub undelivered: Option<u64>,
    /// What is published and nowhere to be found; negative where more is found than was published. Absent while
    /// unknown.
    pub difference: Option<i64>,
}

impl Balance {
    /// Of a group as it was described.
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

    /// Whether every published entry is accounted for; absent while that is unknown.
    pub fn is_balanced(&self) -> Option<bool> {
        self.difference.map(|difference| difference == 0)
    }
}

impl GroupStatus {
    /// The first entry that the group has still to handle, if there is one.
    pub fn floor(&self, stream: &StreamStatus) -> Option<EntryId> {
        let unread = self.last_delivered.next();
        let next = (unread <= stream.last_id).then(|| stream.first_id.map_or(unread, |first| unread.max(first)));
        self.oldest_pending.into_iter().chain(next).min()
    }

    /// Whether the group holds back entries older than `after` while no consumer of it gave a sign of life for as long.
    pub fn is_abandoned(&self, stream: &StreamStatus, after: Duration, now_ms: u64) -> bool {
        let is_silent = self.consumers.iter().all(|consumer| consumer.idle > after);
        let age = |floor: EntryId| Duration::from_millis(now_ms.saturating_sub(floor.ms));
        is_silent && self.floor(stream).is_some_and(|floor| age(floor) > after)
    }
}

impl StreamStatus {
    /// The group that has still to handle the oldest entry, of all that are not `ignored`.
    pub fn floor_holder(&self, ignored: &[GroupName]) -> Option<&GroupStatus> {
        let counted = self.groups.iter().filter(|group| !ignored.contains(&group.name));
        let holding = counted.filter_map(|group| Some((group.floor(self)?, group)));
        holding.min_by_key(|(floor, _)| *floor).map(|(_, group)| group)
    }
}
