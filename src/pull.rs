//! Pulling: external consumers lease entries of groups without a sink, settle them, or let the lease expire.
//!
//! Owns the pending pulls, the leases given by this instance, and the lease tokens that settle an entry. Promises that an
//! entry is with one consumer at a time, and that a consumer cannot settle an entry after its lease has expired. A lease
//! is the idle time of a pending entry in the store. So leases survive a restart, tokens are valid at every instance, and
//! consumers that read the group directly from Redis are treated alike.
//!
//! Knows nothing of HTTP. The redeliverer of the group redelivers abandoned entries and dead-letters exhausted ones. It is
//! notified when a lease expires, so that other consumers need not wait for its next search.

mod consumer;
mod leases;
mod reader;
mod token;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use crate::pull::consumer::{LeasedEntry, Nack, PullConsumer, PullError, PullRequest, SettleError};
pub use token::{InvalidToken, Token};

use crate::event::{ConsumerName, GroupName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::store::{FamilyMembers, Store};
use crate::validate::{Problems, Validate};

/// The minimum lease. A shorter one could expire before the response has arrived.
pub const MIN_LEASE: Duration = Duration::from_millis(100);

/// The limits for external consumers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The maximum number of entries per pull.
    pub max_batch: usize,
    /// The maximum number of leases of one consumer at a time, counted per instance.
    pub max_leases: usize,
    /// The maximum time that a pull waits for entries.
    #[serde(with = "humantime_serde")]
    pub max_wait: Duration,
    /// The maximum number of waiting pulls of one principal.
    pub max_waiting: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_batch: 100, max_leases: 1_000, max_wait: Duration::from_secs(30), max_waiting: 64 }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let counts = [
            ("max_batch", self.max_batch, 500),
            ("max_leases", self.max_leases, 100_000),
            ("max_waiting", self.max_waiting, 100_000),
        ];
        for (key, count, max) in counts {
            problems.require((1..=max).contains(&count), key, format_args!("must be from 1 to {max}"));
        }
        let is_valid = !self.max_wait.is_zero() && self.max_wait <= Duration::from_mins(5);
        problems.require(is_valid, "max_wait", "must be longer than 0s and at most 5m");
    }
}

/// A group without a sink.
#[derive(Debug, Clone)]
pub struct PullGroup {
    /// The stream of the group.
    pub stream: StreamName,
    /// The label of the stream in metrics.
    pub label: String,
    /// The name of the group.
    pub group: GroupName,
    /// The stream for dead letters.
    pub dead_letter: StreamName,
    /// The maximum and default lease: entries that are idle for longer are redelivered.
    pub claim_idle: Duration,
    /// The number of deliveries after which an entry is dead-lettered.
    pub max_deliveries: u32,
    /// Notifies the redeliverer of the group of streams with entries to redeliver.
    pub redeliver: mpsc::Sender<StreamName>,
}

/// A group without a sink of every member of a family.
#[derive(Debug, Clone)]
pub struct PullFamily {
    /// The family.
    pub family_members: Arc<FamilyMembers>,
    /// The name of the group.
    pub group: GroupName,
    /// The streams for dead letters.
    pub dead_letter: StreamPattern,
    /// See [`PullGroup::claim_idle`].
    pub claim_idle: Duration,
    /// See [`PullGroup::max_deliveries`].
    pub max_deliveries: u32,
    /// See [`PullGroup::redeliver`].
    pub redeliver: mpsc::Sender<StreamName>,
}

impl PullGroup {
    /// Notifies the redeliverer. It would find the entries by itself, but later.
    fn notify_redeliverer(&self) {
        // If the channel is full, many notifications are pending already and this one adds nothing.
        drop(self.redeliver.try_send(self.stream.clone()));
    }
}

impl PullFamily {
    /// Returns whether the stream's name belongs to the family, even if the member does not exist.
    fn covers(&self, stream: &StreamName) -> bool {
        self.family_members.family().key_of(stream).is_some()
    }

    /// Returns the group of a member.
    fn member(&self, stream: &StreamName) -> Option<PullGroup> {
        let family = self.family_members.family();
        let dead_letter = self.dead_letter.of_key(family.key_of(stream)?).ok()?;
        Some(PullGroup {
            stream: stream.clone(),
            label: family.to_string(),
            group: self.group.clone(),
            dead_letter,
            claim_idle: self.claim_idle,
            max_deliveries: self.max_deliveries,
            redeliver: self.redeliver.clone(),
        })
    }
}

/// The pull consumers of all groups without a sink. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PullConsumers(Arc<SharedConsumers>);

#[derive(Debug)]
struct SharedConsumers {
    store: Arc<dyn Store>,
    fixed: BTreeMap<(StreamName, GroupName), Arc<PullConsumer>>,
    families: Vec<PullFamily>,
    members: Mutex<MemberConsumers>,
    /// Notified when the consumer of a member must be started.
    added: Notify,
    config: Config,
    reader: ConsumerName,
    redeliverer: ConsumerName,
    metrics: Metrics,
}

/// The pull consumers of family members, made by the first pull. They stay, as members do.
#[derive(Debug, Default)]
struct MemberConsumers {
    all: BTreeMap<(StreamName, GroupName), Arc<PullConsumer>>,
    not_started: Vec<Arc<PullConsumer>>,
    is_closed: bool,
}

impl PullConsumers {
    /// Creates the pull consumers of these groups and families. They serve when [`PullConsumers::run`] is called.
    ///
    /// `reader` is the consumer name that fetches entries for pending pulls. `redeliverer` is the consumer name that
    /// holds nacked entries until they are due.
    pub fn new(
        store: &Arc<dyn Store>,
        config: Config,
        groups: impl IntoIterator<Item = PullGroup>,
        families: Vec<PullFamily>,
        reader: &ConsumerName,
        redeliverer: &ConsumerName,
        metrics: &Metrics,
    ) -> Self {
        let consumer = |group: PullGroup| {
            let key = (group.stream.clone(), group.group.clone());
            let (reader, redeliverer) = (reader.clone(), redeliverer.clone());
            (key, Arc::new(PullConsumer::new(Arc::clone(store), group, &config, reader, redeliverer, metrics)))
        };
        let fixed = groups.into_iter().map(consumer).collect();
        Self(Arc::new(SharedConsumers {
            store: Arc::clone(store),
            fixed,
            families,
            members: Mutex::default(),
            added: Notify::new(),
            config,
            reader: reader.clone(),
            redeliverer: redeliverer.clone(),
            metrics: metrics.clone(),
        }))
    }

    /// Returns the limits for external consumers.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Returns the consumer of a group, or `None` if the group is not declared, has a sink, or its stream does not exist.
    pub fn consumer(&self, stream: &StreamName, group: &GroupName) -> Option<Arc<PullConsumer>> {
        let key = (stream.clone(), group.clone());
        if let Some(consumer) = self.0.fixed.get(&key) {
            return Some(Arc::clone(consumer));
        }
        let family = self.0.families.iter().find(|family| family.group == *group && family.covers(stream))?;
        if !family.family_members.has(stream) {
            return None;
        }
        let mut members = self.0.members();
        if let Some(consumer) = members.all.get(&key) {
            return Some(Arc::clone(consumer));
        }
        let SharedConsumers { store, config, reader, redeliverer, metrics, .. } = &*self.0;
        let group = family.member(stream)?;
        let (reader, redeliverer) = (reader.clone(), redeliverer.clone());
        let consumer = Arc::new(PullConsumer::new(Arc::clone(store), group, config, reader, redeliverer, metrics));
        members.all.insert(key, Arc::clone(&consumer));
        if members.is_closed {
            consumer.close();
        } else {
            members.not_started.push(Arc::clone(&consumer));
            self.0.added.notify_one();
        }
        Some(consumer)
    }

    /// Returns the consumer that issued a token. Skips family members, because there may be too many to search.
    pub fn consumer_of(&self, token: &Token) -> Option<Arc<PullConsumer>> {
        self.0.fixed.values().find(|consumer| consumer.has_issued(token)).cloned()
    }

    /// Returns the groups of a stream that can be pulled from, by name.
    pub fn groups<'a>(&'a self, stream: &'a StreamName) -> impl Iterator<Item = &'a GroupName> {
        let fixed = self.0.fixed.keys().filter(move |(of, _)| of == stream).map(|(_, group)| group);
        let of_family = self.0.families.iter().filter(move |family| family.covers(stream)).map(|family| &family.group);
        fixed.chain(of_family)
    }

    /// Serves until `stop`; pending pulls then end at once with no entries. Must be called once.
    pub async fn run(&self, stop: CancellationToken) {
        let mut tasks = JoinSet::new();
        for consumer in self.0.fixed.values() {
            tasks.spawn(Arc::clone(consumer).run(stop.clone()));
        }
        while !stop.is_cancelled() {
            let added = std::mem::take(&mut self.0.members().not_started);
            for consumer in added {
                tasks.spawn(consumer.run(stop.clone()));
            }
            stop.run_until_cancelled(self.0.added.notified()).await;
        }
        let not_started = {
            let mut members = self.0.members();
            members.is_closed = true;
            std::mem::take(&mut members.not_started)
        };
        for consumer in not_started {
            consumer.close();
        }
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "pull consumer failed");
            }
        }
    }
}

impl SharedConsumers {
    fn members(&self) -> MutexGuard<'_, MemberConsumers> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_limits_are_reported_with_their_keys() {
        assert_eq!(Config::default().problems(), []);
        let config = Config { max_batch: 0, max_leases: 0, max_wait: Duration::ZERO, max_waiting: 0 };
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        assert_eq!(keys, ["max_batch", "max_leases", "max_waiting", "max_wait"]);
        let config = Config { max_wait: Duration::from_hours(1), max_batch: 501, ..Config::default() };
        assert_eq!(config.problems().len(), 2);
    }
}
