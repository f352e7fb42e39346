//! Retention: old entries go, but never one that a group has still to handle, unless the hard limit says so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::clock;
use crate::delivery::GroupConfig;
use crate::event::{EntryId, GroupName, StreamName};
use crate::maintenance::FamilySpec;
use crate::maintenance::round_robin::Rounds;
use crate::metrics::Metrics;
use crate::store::{Dropped, Limits, LostReason, Store, StoreError, StoreErrorKind, StreamStatus, Trim};
use crate::validate::{Problems, Validate};

/// How often streams are trimmed.
const TRIM_EVERY: Duration = Duration::from_secs(5);
/// The same while one of them is near its hard limit.
const TRIM_OFTEN: Duration = Duration::from_millis(500);
/// How long looking at one stream may go on dropping entries.
const DROP_TIME: Duration = Duration::from_secs(2);
/// A stream is near its hard limit with so much of it, in per cent.
const NEAR_PERCENT: u64 = 80;

/// What a stream keeps. Entries that a group has still to handle are kept beyond it, up to the hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Entries kept, the newest.
    pub max_len: u64,
    /// How long entries are kept.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    /// Entries kept at most, whoever has still to handle them.
    pub hard_max_len: u64,
    /// What happens at `hard_max_len`.
    pub when_full: WhenFull,
    /// After how long without a sign of life from any consumer a group counts as abandoned that is not declared here
    /// and keeps entries from being trimmed.
    #[serde(with = "humantime_serde")]
    pub abandoned_after: Duration,
    /// Whether trims pass what abandoned groups have still to handle. If not, they are told of only.
    pub ignore_abandoned: bool,
}

/// What happens when a stream has reached its hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenFull {
    /// Publishers are refused until there is room: nothing accepted is lost.
    #[default]
    Reject,
    /// The oldest entries go, counted as lost for each group that had still to handle them.
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
    /// The most entries that publishers may bring a stream to, if they are ever refused.
    pub fn publish_limit(&self) -> Option<u64> {
        (self.when_full == WhenFull::Reject).then_some(self.hard_max_len)
    }

    /// Whether so many entries are near the hard limit.
    pub(crate) fn is_near_full(&self, length: u64) -> bool {
        length.saturating_mul(100) >= self.hard_max_len.saturating_mul(NEAR_PERCENT)
    }
}

/// A declared stream: what it keeps, and the groups that it keeps it for.
#[derive(Debug, Clone)]
pub struct StreamSpec {
    /// Its name.
    pub name: StreamName,
    /// What it keeps.
    pub retention: Retention,
    /// Its declared groups.
    pub groups: Vec<GroupConfig>,
}

impl StreamSpec {
    /// The groups of others that hold entries back though no one has worked for them in a long time.
    pub(crate) fn abandoned(&self, status: &StreamStatus) -> Vec<GroupName> {
        let now_ms = clock::now_ms();
        let groups = status.groups.iter().filter(|group| {
            let is_declared = self.groups.iter().any(|declared| declared.name == group.name);
            !is_declared && group.is_abandoned(status, self.retention.abandoned_after, now_ms)
        });
        groups.map(|group| group.name.clone()).collect()
    }
}

/// Trims every stream to its retention, again and again, and tells publishers how full each is.
///
/// Any number of them may work on the same streams: every step is the store's, and finds nothing where another was
/// before.
#[derive(Debug)]
pub struct Janitor {
    store: Arc<dyn Store>,
    streams: Vec<StreamSpec>,
    families: Vec<(FamilySpec, Rounds)>,
    limits: Limits,
    metrics: Metrics,
    /// Told once each: what is wrong with a stream stays wrong for a while.
    failing: BTreeSet<StreamName>,
    full: BTreeSet<StreamName>,
    abandoned: BTreeMap<StreamName, Vec<GroupName>>,
}

impl Janitor {
    /// For these streams.
    pub fn new(store: Arc<dyn Store>, streams: Vec<StreamSpec>, limits: Limits, metrics: Metrics) -> Self {
        let (failing, full, abandoned) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        Self { store, streams, families: Vec::new(), limits, metrics, failing, full, abandoned }
    }

    /// The same also for the members of these families.
    #[must_use]
    pub fn with_families(mut self, families: impl IntoIterator<Item = FamilySpec>) -> Self {
        self.families = families.into_iter().map(|spec| (spec, Rounds::default())).collect();
        self
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let streams = std::mem::take(&mut self.streams);
        let mut families = std::mem::take(&mut self.families);
        loop {
            let mut is_near_full = false;
            for spec in &streams {
                let kept = tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    kept = self.keep(spec, spec.name.as_str()) => kept,
                };
                if kept.is_ok_and(|length| spec.retention.is_near_full(length)) {
                    is_near_full = true;
                }
            }
            for (spec, rounds) in &mut families {
                for stream in rounds.next(spec) {
                    let member = spec.member(stream);
                    let kept = tokio::select! {
                        biased;
                        () = stop.cancelled() => return,
                        kept = self.keep(&member, spec.label()) => kept,
                    };
                    if kept.is_ok_and(|length| spec.retention.is_near_full(length)) {
                        is_near_full = true;
                    }
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(if is_near_full { TRIM_OFTEN } else { TRIM_EVERY }) => {}
            }
        }
    }

    /// Brings one stream to its retention; says how many entries it holds then. It is counted under `label`.
    async fn keep(&mut self, spec: &StreamSpec, label: &str) -> Result<u64, StoreError> {
        let stream = &spec.name;
        let result = self.trim(spec, label).await;
        match &result {
            Ok(_) if self.failing.remove(stream) => info!(stream = %stream, "trims the stream again"),
            Ok(_) => {}
            // The store's own watch tells when it is away.
            Err(error) if error.kind() == StoreErrorKind::Unavailable => {}
            Err(error) => {
                if self.failing.insert(stream.clone()) {
                    warn!(stream = %stream, error = %error, "cannot trim; trying again");
                }
            }
        }
        result
    }

    async fn trim(&mut self, spec: &StreamSpec, label: &str) -> Result<u64, StoreError> {
        let StreamSpec { name: stream, retention, .. } = spec;
        let known = self.limits.known(stream);
        let Some(status) = self.store.describe(stream).await? else {
            self.limits.tell(stream, known, 0, None);
            return Ok(0);
        };
        // Who works for a group makes it first of all: what it is to be given must not go before.
        let is_made = |group: &GroupConfig| status.groups.iter().any(|made| made.name == group.name);
        if let Some(group) = spec.groups.iter().find(|group| !is_made(group)) {
            self.limits.tell(stream, known, status.length, Some(group.name.clone()));
            return Ok(status.length);
        }
        let abandoned = spec.abandoned(&status);
        self.tell_abandoned(spec, label, &abandoned);
        let ignored = if retention.ignore_abandoned { abandoned } else { Vec::new() };
        let oldest_ms = u128::from(clock::now_ms()).saturating_sub(retention.max_age.as_millis());
        let oldest = EntryId::new(u64::try_from(oldest_ms).unwrap_or(u64::MAX), 0);
        let mut removed = self.store.trim_past(stream, Trim::Before(oldest), &ignored).await?;
        removed += self.store.trim_past(stream, Trim::ToLength(retention.max_len), &ignored).await?;
        if removed > 0 {
            debug!(stream = %stream, removed, "trimmed to its retention");
        }
        let is_over = status.length.saturating_sub(removed) > retention.hard_max_len;
        if is_over && retention.when_full == WhenFull::DropOldest {
            removed += self.drop_oldest(spec, label).await?;
        }
        let length = status.length.saturating_sub(removed);
        let holder = status.floor_holder(&ignored).map(|group| group.name.clone());
        self.tell_full(spec, length, holder.as_ref());
        self.limits.tell(stream, known, length, holder);
        Ok(length)
    }

    /// Removes what is over the hard limit, step by step.
    async fn drop_oldest(&self, spec: &StreamSpec, label: &str) -> Result<u64, StoreError> {
        let started = std::time::Instant::now();
        let mut total = Dropped::default();
        let outcome = loop {
            match self.store.drop_oldest(&spec.name, spec.retention.hard_max_len).await {
                Ok(step) => {
                    let is_more = step.is_more;
                    add(&mut total, step);
                    if !is_more || started.elapsed() > DROP_TIME {
                        break Ok(total.removed);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        if let Some((first, last)) = total.range {
            let (stream, removed) = (&spec.name, total.removed);
            warn!(stream = %stream, removed, %first, %last, "the stream is full: its oldest entries were dropped");
        }
        for loser in &total.losers {
            let labels = [label, loser.group.as_str(), LostReason::Dropped.as_str()];
            self.metrics.lost.with_label_values(&labels).inc_by(loser.pending + loser.undelivered);
            error!(
                stream = %spec.name,
                group = %loser.group,
                pending = loser.pending,
                undelivered = loser.undelivered,
                "entries are lost: dropped from a full stream before the group had handled them"
            );
        }
        outcome
    }

    fn tell_full(&mut self, spec: &StreamSpec, length: u64, holder: Option<&GroupName>) {
        let StreamSpec { name: stream, retention, .. } = spec;
        let limit = retention.hard_max_len;
        if retention.publish_limit().is_none() || length < limit {
            if !retention.is_near_full(length) && self.full.remove(stream) {
                info!(stream = %stream, length, "the stream takes entries again");
            }
        } else if self.full.insert(stream.clone()) {
            let group = holder.map(GroupName::as_str);
            error!(stream = %stream, length, limit, group, "the stream is full: publishers are refused");
        }
    }

    fn tell_abandoned(&mut self, spec: &StreamSpec, label: &str, abandoned: &[GroupName]) {
        let stream = &spec.name;
        let known = self.abandoned.insert(stream.clone(), abandoned.to_vec()).unwrap_or_default();
        for group in abandoned {
            self.metrics.group_abandoned.with_label_values(&[label, group.as_str()]).set(1);
            if !known.contains(group) {
                let (after, ignored) = (spec.retention.abandoned_after, spec.retention.ignore_abandoned);
                warn!(
                    stream = %stream, group = %group, ?after, ignored,
                    "a group that is not declared keeps entries from being trimmed, and no one works for it: destroy \
                     it, declare it, or set retention.ignore_abandoned"
                );
            }
        }
        for group in known.iter().filter(|group| !abandoned.contains(group)) {
            // Where there is no such gauge, it is absent already.
            drop(self.metrics.group_abandoned.remove_label_values(&[label, group.as_str()]));
        }
    }
}

fn add(total: &mut Dropped, step: Dropped) {
    total.removed += step.removed;
    total.range = match (total.range, step.range) {
        (Some((first, _)), Some((_, last))) => Some((first, last)),
        (known, new) => known.or(new),
    };
    for loser in step.losers {
        match total.losers.iter_mut().find(|known| known.group == loser.group) {
            Some(known) => {
                known.pending += loser.pending;
                known.undelivered += loser.undelivered;
            }
            None => total.losers.push(loser),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_limit_is_never_below_what_is_kept() {
        assert_eq!(Retention::default().problems(), []);
        let narrow = Retention { max_len: 11, hard_max_len: 10, ..Retention::default() };
        assert_eq!(narrow.problems().len(), 1);
        assert!(narrow.problems()[0].message.contains("at least max_len (11)"));
    }

    #[test]
    fn every_key_is_read() {
        let text = "max_len = 5\nmax_age = '1h'\nhard_max_len = 50\nwhen_full = 'drop_oldest'\n\
                    abandoned_after = '2days'\nignore_abandoned = true";
        let retention: Retention = toml::from_str(text).expect("well formed");
        assert_eq!(retention.when_full, WhenFull::DropOldest);
        assert_eq!((retention.publish_limit(), retention.hard_max_len), (None, 50));
        assert!(retention.is_near_full(40) && !retention.is_near_full(39));
    }
}
