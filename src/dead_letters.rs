//! Dead letters: list, show, replay and discard them.
//!
//! Owns the rules of replay and its loop guard, the audit entry of every action, and the retention of dead letters.
//! Promises that a replayed dead letter is appended exactly once, whatever crashes and however often the replay is
//! repeated. It is removed only after that. The copy is appended under an idempotency key made of the dead letter's
//! position. The key is remembered until dead letters expire. So no step spans two streams, and they may be
//! in different slots of a cluster. Knows nothing of HTTP, nor of how entries become dead letters.

mod actions;
mod audit;
mod retention;
mod scan;
mod selection;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::dead_letters::retention::DeadLetterRetention;
pub use crate::dead_letters::scan::{DeadLetterCursor, DeadLetterPage};
pub use actions::{BulkRequest, BulkResult, ReplayOptions, ReplayRefused, ReplayTarget};
pub use audit::DEFAULT_AUDIT_STREAM;
pub use selection::{DeadLetterEntry, DeadLetterScope, FOREIGN, ReasonFilter, RequestedFilter, Selection};

use crate::bus::{Bus, PublishError};
use crate::event::{EntryId, Family, Filter, GroupName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::store::{Order, Range, Store, StoreError, StoreErrorKind, StreamStatus};
use crate::validate::{Problems, Validate};

/// The limits of dead letters and of their replays.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Maximum number of dead letters per stream of dead letters. The oldest are removed first.
    pub max_len: u64,
    /// Time for which dead letters are kept.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
    /// Fraction of `max_len` from which a warning is given, more than 0 and at most 1.
    pub alarm_at: f64,
    /// Number of replays of one entry that need no force.
    pub max_replays: u32,
    /// The stream that receives an audit entry for every action. `aurora:audit` by default, if it is declared.
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

/// A declared stream, or family of streams, with its dead letters.
#[derive(Debug, Clone)]
pub struct DeadLetterSource {
    /// The stream, or the family.
    pub stream: StreamPattern,
    /// The stream, or family, that receives its dead letters.
    pub dead_letter: StreamPattern,
    /// The groups of the stream.
    pub groups: BTreeSet<GroupName>,
}

/// The dead letters of all streams. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DeadLetters {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    bus: Bus,
    config: Config,
    sources: Vec<DeadLetterSource>,
    /// The stream for audit entries, if it is declared.
    audit: Option<StreamName>,
    instance: String,
    metrics: Metrics,
}

/// The fill level of a stream of dead letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FillLevel {
    /// Current number of dead letters.
    pub length: u64,
    /// Maximum number of dead letters.
    pub max_len: u64,
    /// The oldest dead letter.
    pub first_id: Option<EntryId>,
    /// The newest dead letter, even if it was removed.
    pub last_id: Option<EntryId>,
    /// A warning that the stream fills up, or `None`.
    pub alarm: Option<String>,
}

/// The store failed, so the action failed. Shared between the entries of one batch.
pub type SharedStoreError = Arc<StoreError>;

impl DeadLetters {
    /// Creates the dead letters of these streams. `instance` names this daemon in audit entries.
    pub fn new(
        store: Arc<dyn Store>,
        bus: Bus,
        config: Config,
        sources: Vec<DeadLetterSource>,
        instance: String,
        metrics: Metrics,
    ) -> Self {
        let default: StreamName = DEFAULT_AUDIT_STREAM.parse().expect("a valid name");
        let audit = config.audit.clone().unwrap_or(default);
        let audit = Some(audit).filter(|audit| bus.catalog().contains(audit));
        Self { inner: Arc::new(Inner { store, bus, config, sources, audit, instance, metrics }) }
    }

    /// Returns each stream of dead letters with the streams that it serves.
    pub fn streams(&self) -> Vec<(StreamName, Vec<StreamName>)> {
        let mut streams: BTreeMap<StreamName, Vec<StreamName>> = BTreeMap::new();
        for (stream, dead_letter) in self.inner.sources.iter().flat_map(|source| self.inner.streams_of(source)) {
            streams.entry(dead_letter).or_default().push(stream);
        }
        streams.into_iter().collect()
    }

    /// Returns the dead letters of a stream, or all in a stream of dead letters. `None` if neither is declared.
    pub fn scope(&self, name: &str) -> Option<DeadLetterScope> {
        let name: StreamName = name.parse().ok()?;
        if let Some((source, dead_letter)) = self.inner.source_of(&name) {
            let is_shared = source.dead_letter.stream().is_some() && source.stream.family().is_some();
            let sharing = self.inner.sources.iter().filter(|other| other.dead_letter == source.dead_letter).count();
            let has_foreign = sharing == 1 && !is_shared;
            return Some(DeadLetterScope { dead_letter, of: Some(name), has_foreign, visible: Filter::default() });
        }
        let holds = |source: &DeadLetterSource| match &source.dead_letter {
            StreamPattern::One(dead_letter) => *dead_letter == name,
            StreamPattern::Family(family) => family.key_of(&name).is_some(),
        };
        self.inner.sources.iter().find(|source| holds(source))?;
        Some(DeadLetterScope { dead_letter: name, of: None, has_foreign: true, visible: Filter::default() })
    }

    /// Returns the stream that receives the dead letters of a declared stream.
    pub fn stream_of(&self, stream: &StreamName) -> Option<StreamName> {
        self.inner.source_of(stream).map(|(_, dead_letter)| dead_letter)
    }

    /// Returns the fill level of a stream of dead letters.
    pub async fn fill_level(&self, dead_letter: &StreamName) -> Result<FillLevel, StoreError> {
        let status = self.inner.store.describe(dead_letter).await?;
        Ok(self.inner.fill_level(dead_letter, status.as_ref()))
    }

    /// Returns one page of matching dead letters, oldest first, at most `limit`.
    ///
    /// Reads a bounded number of entries, so a short page is not always the last one: see [`DeadLetterPage::next`].
    pub async fn list(
        &self,
        scope: &DeadLetterScope,
        selection: &Selection,
        cursor: DeadLetterCursor,
        limit: usize,
    ) -> Result<DeadLetterPage, StoreError> {
        scan::page(&*self.inner.store, scope, selection, cursor, limit).await
    }

    /// Returns one dead letter by its id in the stream of dead letters.
    pub async fn get(&self, scope: &DeadLetterScope, id: EntryId) -> Result<Option<DeadLetterEntry>, StoreError> {
        let range = Range { from: id, to: id, order: Order::Forward };
        let entries = self.inner.store.range(&scope.dead_letter, range, 1).await?;
        let found = entries.into_iter().next().map(DeadLetterEntry::new);
        Ok(found.filter(|found| Selection::default().matches(scope, found)))
    }

    /// Creates the task that keeps dead letters within their limits.
    pub fn retention(&self) -> DeadLetterRetention {
        DeadLetterRetention::new(Arc::clone(&self.inner))
    }
}

impl Inner {
    /// Returns the declaration of a stream, and the stream that receives its dead letters.
    fn source_of(&self, stream: &StreamName) -> Option<(&DeadLetterSource, StreamName)> {
        self.sources.iter().find_map(|source| match &source.stream {
            StreamPattern::One(one) if one == stream => Some((source, source.dead_letter.stream()?.clone())),
            StreamPattern::One(_) => None,
            StreamPattern::Family(family) => {
                let key = family.key_of(stream)?;
                Some((source, source.dead_letter.of_key(key).ok()?))
            }
        })
    }

    /// Returns the current streams of a declaration, each with the stream that receives its dead letters.
    fn streams_of(&self, source: &DeadLetterSource) -> Vec<(StreamName, StreamName)> {
        match &source.stream {
            StreamPattern::One(stream) => {
                source.dead_letter.stream().map(|dead| (stream.clone(), dead.clone())).into_iter().collect()
            }
            StreamPattern::Family(family) => {
                let family_members = self.bus.catalog().families().named(family.name());
                let members = family_members.map(|family_members| family_members.members()).unwrap_or_default();
                let pair = |stream: StreamName| {
                    let dead_letter = source.dead_letter.of_key(family.key_of(&stream)?).ok()?;
                    Some((stream, dead_letter))
                };
                members.into_iter().filter_map(pair).collect()
            }
        }
    }

    /// Returns the metric label of a stream of dead letters: its own name, or the name of its family.
    fn label<'a>(&'a self, dead_letter: &'a StreamName) -> &'a str {
        let families = self.sources.iter().filter_map(|source| source.dead_letter.family());
        let family = families.into_iter().find(|family| family.key_of(dead_letter).is_some());
        family.map_or(dead_letter.as_str(), Family::name)
    }

    fn fill_level(&self, dead_letter: &StreamName, status: Option<&StreamStatus>) -> FillLevel {
        let length = status.map_or(0, |status| status.length);
        let max_len = self.config.max_len;
        let is_high = self.fill_ratio(length) >= self.config.alarm_at;
        let alarm = || {
            format!(
                "`{dead_letter}` holds {length} of at most {max_len} dead letters; at the limit the oldest are removed"
            )
        };
        FillLevel {
            length,
            max_len,
            first_id: status.and_then(|status| status.first_id),
            last_id: status.map(|status| status.last_id).filter(|id| *id > EntryId::MIN),
            alarm: is_high.then(alarm),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio of counts far below 2^52")]
    fn fill_ratio(&self, length: u64) -> f64 {
        length as f64 / self.config.max_len as f64
    }
}

/// Converts an error of an append. Unchanged entries can fail in the store only.
fn store_failure(error: PublishError) -> SharedStoreError {
    match error {
        PublishError::Store(error) => error,
        other => Arc::new(StoreError::new(StoreErrorKind::Internal, other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_values_are_reported_with_their_keys() {
        assert_eq!(Config::default().problems(), []);
        let config = Config { max_len: 0, max_age: Duration::ZERO, alarm_at: f64::NAN, ..Config::default() };
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        assert_eq!(keys, ["max_len", "max_age", "alarm_at"]);
    }
}
