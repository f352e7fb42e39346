//! What operators do with dead letters: find them, look at them, replay them, discard them.
//!
//! Owns the rules of replay and the loop guard, the audit entry of every action, and the dead letters' own retention.
//! Promises that a replayed dead letter is appended exactly once and is never gone before it was, whatever crashes in
//! between and however often the replay is repeated: the copy goes in under an idempotency key made of the dead
//! letter's place, which is remembered for as long as dead letters are kept, and only then is the dead letter removed.
//! That needs no step over two streams, so that they may be in different slots of a cluster. Knows nothing of HTTP or
//! of how entries die.

mod actions;
mod audit;
mod retention;
mod scan;
mod selection;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::dead_letters::retention::Keeper;
pub use crate::dead_letters::scan::{Cursor, Page};
pub use actions::{Bulk, Done, Refusal, Replay, Target};
pub use audit::DEFAULT_AUDIT_STREAM;
pub use selection::{Alerts, FOREIGN, Found, Reason, Scope, Selection, Sight};

use crate::bus::{Bus, PublishError};
use crate::event::{EntryId, Family, GroupName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::store::{Order, Range, Store, StoreError, StoreErrorKind, StreamStatus};
use crate::validate::{Problems, Validate};

/// What is kept of dead letters, and what may be done with them.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The most dead letters that a stream of them keeps; the oldest go first.
    pub max_len: u64,
    /// How long dead letters are kept.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    /// From which part of `max_len` on a stream of dead letters is told of as filling up, more than 0 and at most 1.
    pub alarm_at: f64,
    /// How often one entry may be replayed unless a replay is forced.
    pub max_replays: u32,
    /// The stream that every action is written to; `aurora:audit` where that is declared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<StreamName>,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_len: 100_000, max_age: Duration::from_hours(30 * 24), alarm_at: 0.8, max_replays: 3, audit: None }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        problems.require(self.max_len > 0, "max_len", "must be at least 1");
        let ages = Duration::from_secs(1)..=Duration::from_hours(3_650 * 24);
        problems.require(ages.contains(&self.max_age), "max_age", "must be from 1s to 10 years");
        let is_valid = self.alarm_at > 0.0 && self.alarm_at <= 1.0;
        let message = format_args!("must be more than 0 and at most 1, not {}", self.alarm_at);
        problems.require(is_valid, "alarm_at", message);
    }
}

/// A declared stream, or family of them, as far as its dead letters go.
#[derive(Debug, Clone)]
pub struct Source {
    /// The stream, or the family.
    pub stream: StreamPattern,
    /// Where its dead letters go.
    pub dead_letter: StreamPattern,
    /// Its groups.
    pub groups: BTreeSet<GroupName>,
}

/// The dead letters of all streams.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    bus: Bus,
    config: Config,
    sources: Vec<Source>,
    /// The stream that actions are written to, if there is one.
    audit: Option<StreamName>,
    instance: String,
    metrics: Metrics,
}

/// How full a stream of dead letters is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Level {
    /// How many dead letters it holds.
    pub length: u64,
    /// The most it keeps.
    pub max_len: u64,
    /// The oldest one.
    pub first_id: Option<EntryId>,
    /// The newest one, or the last there was.
    pub last_id: Option<EntryId>,
    /// In words, that it is filling up, if it is.
    pub alarm: Option<String>,
}

/// Why an action came to nothing: the store did not do its part.
pub type Failure = Arc<StoreError>;

impl DeadLetters {
    /// The dead letters of these streams. `instance` names this daemon in the audit entries.
    pub fn new(
        store: Arc<dyn Store>,
        bus: Bus,
        config: Config,
        sources: Vec<Source>,
        instance: String,
        metrics: Metrics,
    ) -> Self {
        let default: StreamName = DEFAULT_AUDIT_STREAM.parse().expect("a valid name");
        let audit = config.audit.clone().unwrap_or(default);
        let audit = Some(audit).filter(|audit| bus.catalogue().contains(audit));
        Self { inner: Arc::new(Inner { store, bus, config, sources, audit, instance, metrics }) }
    }

    /// The streams of dead letters, each with the streams whose dead letters it holds.
    pub fn streams(&self) -> Vec<(StreamName, Vec<StreamName>)> {
        let mut streams: BTreeMap<StreamName, Vec<StreamName>> = BTreeMap::new();
        for (stream, dead_letter) in self.inner.sources.iter().flat_map(|source| self.inner.streams_of(source)) {
            streams.entry(dead_letter).or_default().push(stream);
        }
        streams.into_iter().collect()
    }

    /// The dead letters that a name stands for: those of a stream, or all in a stream of dead letters.
    pub fn scope(&self, name: &str) -> Option<Scope> {
        let name: StreamName = name.parse().ok()?;
        if let Some((source, dead_letter)) = self.inner.source_of(&name) {
            let is_shared = source.dead_letter.stream().is_some() && source.stream.family().is_some();
            let sharing = self.inner.sources.iter().filter(|other| other.dead_letter == source.dead_letter).count();
            let has_foreign = sharing == 1 && !is_shared;
            return Some(Scope { dead_letter, of: Some(name), has_foreign, sight: Sight::default() });
        }
        let holds = |source: &Source| match &source.dead_letter {
            StreamPattern::One(dead_letter) => *dead_letter == name,
            StreamPattern::Family(family) => family.key_of(&name).is_some(),
        };
        self.inner.sources.iter().find(|source| holds(source))?;
        Some(Scope { dead_letter: name, of: None, has_foreign: true, sight: Sight::default() })
    }

    /// Where a declared stream's dead letters go.
    pub fn stream_of(&self, stream: &StreamName) -> Option<StreamName> {
        self.inner.source_of(stream).map(|(_, dead_letter)| dead_letter)
    }

    /// How full a stream of dead letters is.
    pub async fn level(&self, dead_letter: &StreamName) -> Result<Level, StoreError> {
        let status = self.inner.store.describe(dead_letter).await?;
        Ok(self.inner.level(dead_letter, status.as_ref()))
    }

    /// One page of the dead letters that match, oldest first, at most `limit`.
    ///
    /// Looks at a bounded number of them: there may be more although the page is not full, see [`Page::next`].
    pub async fn list(
        &self,
        scope: &Scope,
        selection: &Selection,
        cursor: Cursor,
        limit: usize,
    ) -> Result<Page, StoreError> {
        scan::page(&*self.inner.store, scope, selection, cursor, limit).await
    }

    /// One dead letter by its id in the stream of dead letters.
    pub async fn get(&self, scope: &Scope, id: EntryId) -> Result<Option<Found>, StoreError> {
        let range = Range { from: id, to: id, order: Order::Forward };
        let entries = self.inner.store.range(&scope.dead_letter, range, 1).await?;
        let found = entries.into_iter().next().map(Found::new);
        Ok(found.filter(|found| Selection::default().matches(scope, found)))
    }

    /// What keeps the dead letters within their limits and tells when they fill up.
    pub fn keeper(&self) -> Keeper {
        Keeper::new(Arc::clone(&self.inner))
    }
}

impl Inner {
    /// The declaration of a stream, and where its dead letters go.
    fn source_of(&self, stream: &StreamName) -> Option<(&Source, StreamName)> {
        self.sources.iter().find_map(|source| match &source.stream {
            StreamPattern::One(one) if one == stream => Some((source, source.dead_letter.stream()?.clone())),
            StreamPattern::One(_) => None,
            StreamPattern::Family(family) => {
                let key = family.key_of(stream)?;
                Some((source, source.dead_letter.of_key(key).ok()?))
            }
        })
    }

    /// The streams that are declared so, as they are now, each with where its dead letters go.
    fn streams_of(&self, source: &Source) -> Vec<(StreamName, StreamName)> {
        match &source.stream {
            StreamPattern::One(stream) => {
                source.dead_letter.stream().map(|dead| (stream.clone(), dead.clone())).into_iter().collect()
            }
            StreamPattern::Family(family) => {
                let roster = self.bus.catalogue().families().named(family.name());
                let members = roster.map(|roster| roster.members()).unwrap_or_default();
                let pair = |stream: StreamName| {
                    let dead_letter = source.dead_letter.of_key(family.key_of(&stream)?).ok()?;
                    Some((stream, dead_letter))
                };
                members.into_iter().filter_map(pair).collect()
            }
        }
    }

    /// What a stream of dead letters is counted under: one of many of a family under the family's.
    fn label<'a>(&'a self, dead_letter: &'a StreamName) -> &'a str {
        let families = self.sources.iter().filter_map(|source| source.dead_letter.family());
        let family = families.into_iter().find(|family| family.key_of(dead_letter).is_some());
        family.map_or(dead_letter.as_str(), Family::name)
    }

    fn level(&self, dead_letter: &StreamName, status: Option<&StreamStatus>) -> Level {
        let length = status.map_or(0, |status| status.length);
        let max_len = self.config.max_len;
        let is_high = self.part_full(length) >= self.config.alarm_at;
        let alarm = || format!("`{dead_letter}` holds {length} of at most {max_len} dead letters: then the oldest go");
        Level {
            length,
            max_len,
            first_id: status.and_then(|status| status.first_id),
            last_id: status.map(|status| status.last_id).filter(|id| *id > EntryId::MIN),
            alarm: is_high.then(alarm),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio of counts far below 2^52")]
    fn part_full(&self, length: u64) -> f64 {
        length as f64 / self.config.max_len as f64
    }
}

/// Appending entries as they are can fail in the store only.
fn store_failure(error: PublishError) -> Failure {
    match error {
        PublishError::Store(error) => error,
        other => Arc::new(StoreError::new(StoreErrorKind::Internal, other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_senseless_value_is_told_with_its_key() {
        assert_eq!(Config::default().problems(), []);
        let config = Config { max_len: 0, max_age: Duration::ZERO, alarm_at: f64::NAN, ..Config::default() };
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        assert_eq!(keys, ["max_len", "max_age", "alarm_at"]);
    }
}
