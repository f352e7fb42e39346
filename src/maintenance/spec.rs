//! Declarations of streams and families: retention and groups.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock;
use crate::delivery::GroupConfig;
use crate::event::{GroupName, StreamName};
use crate::store::{Consumption, FamilyMembers, StreamStatus};
use crate::validate::{Problems, Validate};

/// The part of the hard limit, in percent, from which a stream is near full.
const NEAR_FULL_PERCENT: u64 = 80;

/// The limits of a stream. Unsettled entries exceed `max_len` and `max_age`, up to the hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// The number of entries to keep, the newest.
    pub max_len: u64,
    /// The age up to which entries are kept.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    /// The maximum number of entries, settled or not.
    pub hard_max_len: u64,
    /// The behaviour at `hard_max_len`.
    pub when_full: WhenFull,
    /// The time without activity of its consumers after which an undeclared group counts as abandoned, if it keeps entries
    /// from being trimmed.
    #[serde(with = "humantime_serde")]
    pub abandoned_after: Duration,
    /// Whether trims remove entries that only abandoned groups have not settled. If not, the groups are only reported.
    pub ignore_abandoned: bool,
}

/// The behaviour of a stream at its hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Rejects new events until there is room. No accepted event is lost.
    #[default]
    Reject,
    /// Drops the oldest entries, and counts them as lost for each group that has not settled them.
    DropOldest,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            max_len: 10_000,
            max_age: Duration::from_hours(7 * 24),
            hard_max_len: 1_000_000,
            when_full: WhenFull::default(),
            abandoned_after: Duration::from_hours(7 * 24),
            ignore_abandoned: false,
        }
    }
}

impl Validate for Retention {
    fn validate(&self, problems: &mut Problems) {
        problems.require(self.hard_max_len > 0, "hard_max_len", "must be at least 1");
        let message = format_args!("must be at least max_len ({}), not {}", self.max_len, self.hard_max_len);
        problems.require(self.hard_max_len >= self.max_len, "hard_max_len", message);
        let is_valid = self.abandoned_after >= Duration::from_mins(1);
        problems.require(is_valid, "abandoned_after", "must be at least 1m");
    }
}

impl Retention {
    /// Returns the length at which new events are rejected, or `None` if they never are.
    pub fn publish_limit(&self) -> Option<u64> {
        (self.when_full == WhenFull::Reject).then_some(self.hard_max_len)
    }

    /// Returns whether a stream of this length is near its hard limit.
    pub(super) fn is_near_full(&self, length: u64) -> bool {
        length.saturating_mul(100) >= self.hard_max_len.saturating_mul(NEAR_FULL_PERCENT)
    }
}

/// A declared stream with its retention and groups.
#[derive(Debug, Clone)]
pub struct StreamSpec {
    /// The name of the stream.
    pub name: StreamName,
    /// The limits of the stream.
    pub retention: Retention,
    /// The declared groups.
    pub groups: Vec<GroupConfig>,
}

impl StreamSpec {
    /// Returns the undeclared groups without activity that keep entries from being trimmed.
    pub(super) fn abandoned(&self, status: &StreamStatus) -> Vec<GroupName> {
        let now_ms = clock::now_ms();
        let groups = status.groups.iter().filter(|group| {
            let is_declared = self.groups.iter().any(|declared| declared.name == group.name);
            !is_declared && group.is_abandoned(status, self.retention.abandoned_after, now_ms)
        });
        groups.map(|group| group.name.clone()).collect()
    }
}

/// A declared family with the retention and the groups of its members.
#[derive(Debug, Clone)]
pub struct FamilySpec {
    /// The family and its members.
    pub family_members: Arc<FamilyMembers>,
    /// The limits of each member.
    pub retention: Retention,
    /// The declared groups of each member.
    pub groups: Vec<GroupConfig>,
}

impl FamilySpec {
    /// Returns the declaration of a member.
    pub(super) fn member(&self, stream: StreamName) -> StreamSpec {
        StreamSpec { name: stream, retention: self.retention, groups: self.groups.clone() }
    }
}

impl GroupConfig {
    /// Returns which consumers settle the entries of the group.
    pub fn consumption(&self) -> Consumption {
        if self.sink.is_some() { Consumption::Inside } else { Consumption::Outside }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_limit_below_max_len_is_rejected() {
        assert_eq!(Retention::default().problems(), []);
        let narrow = Retention { max_len: 11, hard_max_len: 10, ..Retention::default() };
        assert_eq!(narrow.problems().len(), 1);
        assert!(narrow.problems()[0].message.contains("at least max_len (11)"));
    }

    #[test]
    fn retention_reads_every_key() {
        let text = "max_len = 5\nmax_age = '1h'\nhard_max_len = 50\nwhen_full = 'drop_oldest'\n\
                    abandoned_after = '2days'\nignore_abandoned = true";
        let retention: Retention = toml::from_str(text).expect("well formed");
        assert_eq!(retention.when_full, WhenFull::DropOldest);
        assert_eq!((retention.publish_limit(), retention.hard_max_len), (None, 50));
        assert!(retention.is_near_full(40) && !retention.is_near_full(39));
    }
}
