//! Pulling: entries leased to workers outside, one group each, until they are acknowledged, given back, or the lease ends.
//!
//! Owns what groups without a sink are given through the daemon: who waits for entries, who has which leased, and what
//! a worker has to show to settle one. Promises that an entry is with one worker at a time, that a worker whose lease
//! has ended can't settle what others may have by now, and that a lease outlives neither its time nor needs this process
//! to end: it is the idle time of a pending entry in the store, which whoever guards the group looks at. So leases
//! survive a restart, tokens are good at any instance, and workers that read the group straight from Redis are treated
//! alike.
//!
//! Knows nothing of HTTP. Handing on what was left, and giving up what was left too often, is the guard's;
//! it is told by a bell when a lease ends, so that nobody has to wait for its next round.

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

pub use crate::pull::consumer::{Desk, GiveBack, PullError, Refused, Task, Wanted};
pub use token::{InvalidToken, Token};

use crate::event::{ConsumerName, GroupName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::store::{Roster, Store};
use crate::validate::{Problems, Validate};

/// The shortest lease: less than that is over before its answer has arrived.
pub const MIN_LEASE: Duration = Duration::from_millis(100);

/// What those may do who pull.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The most entries that one pull is given.
    pub max_batch: usize,
    /// The most entries that one consumer has leased at a time, as far as this instance has leased them.
    pub max_leases: usize,
    /// The longest that a pull waits for entries to come.
    #[serde(with = "humantime_serde")]
    pub max_wait: Duration,
    /// The most pulls of one principal that wait at a time.
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
    /// Its stream.
    pub stream: StreamName,
    /// What the stream is counted under.
    pub label: String,
    /// Its name.
    pub group: GroupName,
    /// Where its dead letters go.
    pub dead_letter: StreamName,
    /// How long a lease is unless it is shorter: others take over what is idle for as long.
    pub claim_idle: Duration,
    /// An entry delivered as often is given up instead of being delivered once more.
    pub max_deliveries: u32,
    /// Rung when there is something for the group's guard to hand on.
    pub bell: Bell,
}

/// A group without a sink of every member of a family.
#[derive(Debug, Clone)]
pub struct PullFamily {
    /// The family.
    pub roster: Arc<Roster>,
    /// The group's name.
    pub group: GroupName,
    /// Where dead letters go.
    pub dead_letter: StreamPattern,
    /// As of a [`PullGroup`].
    pub claim_idle: Duration,
    /// As of a [`PullGroup`].
    pub max_deliveries: u32,
    /// Told of members where there is something to hand on.
    pub bell: mpsc::Sender<StreamName>,
}

/// How the guard of a group is told that there is something to hand on. It would find that by itself, but later.
#[derive(Debug, Clone)]
pub enum Bell {
    /// It guards one stream.
    OfStream(Arc<Notify>),
    /// It guards all members of a family.
    OfFamily(mpsc::Sender<StreamName>),
}

impl Bell {
    fn ring(&self, stream: &StreamName) {
        match self {
            Self::OfStream(bell) => bell.notify_one(),
            // Where many rings are unheard, or no one is there to hear, this one adds nothing.
            Self::OfFamily(bell) => drop(bell.try_send(stream.clone())),
        }
    }
}

impl PullFamily {
    /// Whether the stream would be a member, whether it is one or not.
    fn is_of(&self, stream: &StreamName) -> bool {
        self.roster.family().key_of(stream).is_some()
    }

    /// The group of a member.
    fn member(&self, stream: &StreamName) -> Option<PullGroup> {
        let family = self.roster.family();
        let dead_letter = self.dead_letter.of_key(family.key_of(stream)?).ok()?;
        Some(PullGroup {
            stream: stream.clone(),
            label: family.to_string(),
            group: self.group.clone(),
            dead_letter,
            claim_idle: self.claim_idle,
            max_deliveries: self.max_deliveries,
            bell: Bell::OfFamily(self.bell.clone()),
        })
    }
}

/// Every group that can be pulled from. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pull(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<dyn Store>,
    desks: BTreeMap<(StreamName, GroupName), Arc<Desk>>,
    families: Vec<PullFamily>,
    members: Mutex<Members>,
    /// Told when a desk of a member is there to be begun.
    opened: Notify,
    config: Config,
    reader: ConsumerName,
    guard: ConsumerName,
    metrics: Metrics,
}

/// The desks of members that anyone has pulled from. They stay, as members do.
#[derive(Debug, Default)]
struct Members {
    desks: BTreeMap<(StreamName, GroupName), Arc<Desk>>,
    not_begun: Vec<Arc<Desk>>,
    is_closed: bool,
}

impl Pull {
    /// Desks for these groups, and for members of these families, none of which serves before [`Pull::run`].
    ///
    /// `reader` is the name under which entries are fetched for those who wait; `guard` the one that holds what was
    /// given back until it is due.
    pub fn new(
        store: &Arc<dyn Store>,
        config: Config,
        groups: impl IntoIterator<Item = PullGroup>,
        families: Vec<PullFamily>,
        reader: &ConsumerName,
        guard: &ConsumerName,
        metrics: &Metrics,
    ) -> Self {
        let desk = |group: PullGroup| {
            let key = (group.stream.clone(), group.group.clone());
            let desk = Desk::new(Arc::clone(store), group, &config, reader.clone(), guard.clone(), metrics);
            (key, Arc::new(desk))
        };
        let desks = groups.into_iter().map(desk).collect();
        Self(Arc::new(Inner {
            store: Arc::clone(store),
            desks,
            families,
            members: Mutex::default(),
            opened: Notify::new(),
            config,
            reader: reader.clone(),
            guard: guard.clone(),
            metrics: metrics.clone(),
        }))
    }

    /// What those may do who pull.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// The desk of a group; nothing where it is not declared, or has a sink, or the stream is not yet of its family.
    pub fn desk(&self, stream: &StreamName, group: &GroupName) -> Option<Arc<Desk>> {
        let key = (stream.clone(), group.clone());
        if let Some(desk) = self.0.desks.get(&key) {
            return Some(Arc::clone(desk));
        }
        let family = self.0.families.iter().find(|family| family.group == *group && family.is_of(stream))?;
        if !family.roster.has(stream) {
            return None;
        }
        let mut members = self.0.members();
        if let Some(desk) = members.desks.get(&key) {
            return Some(Arc::clone(desk));
        }
        let Inner { store, config, reader, guard, metrics, .. } = &*self.0;
        let group = family.member(stream)?;
        let desk = Arc::new(Desk::new(Arc::clone(store), group, config, reader.clone(), guard.clone(), metrics));
        members.desks.insert(key, Arc::clone(&desk));
        if members.is_closed {
            desk.close();
        } else {
            members.not_begun.push(Arc::clone(&desk));
            self.0.opened.notify_one();
        }
        Some(desk)
    }

    /// The desk that gave a token, if it is not of a member: of those there may be too many to look through.
    pub fn desk_of(&self, token: &Token) -> Option<Arc<Desk>> {
        self.0.desks.values().find(|desk| desk.is_of(token)).cloned()
    }

    /// The groups of a stream that can be pulled from, by name.
    pub fn groups<'a>(&'a self, stream: &'a StreamName) -> impl Iterator<Item = &'a GroupName> {
        let fixed = self.0.desks.keys().filter(move |(of, _)| of == stream).map(|(_, group)| group);
        let of_family = self.0.families.iter().filter(move |family| family.is_of(stream)).map(|family| &family.group);
        fixed.chain(of_family)
    }

    /// Serves until `stop`; those who wait then are given nothing, at once. To be called once.
    pub async fn run(&self, stop: CancellationToken) {
        let mut desks = JoinSet::new();
        for desk in self.0.desks.values() {
            desks.spawn(Arc::clone(desk).run(stop.clone()));
        }
        while !stop.is_cancelled() {
            let opened = std::mem::take(&mut self.0.members().not_begun);
            for desk in opened {
                desks.spawn(desk.run(stop.clone()));
            }
            stop.run_until_cancelled(self.0.opened.notified()).await;
        }
        let not_begun = {
            let mut members = self.0.members();
            members.is_closed = true;
            std::mem::take(&mut members.not_begun)
        };
        for desk in not_begun {
            desk.close();
        }
        while let Some(ended) = desks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a desk has ended badly");
            }
        }
    }
}

impl Inner {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_senseless_limit_is_told_with_its_key() {
        assert_eq!(Config::default().problems(), []);
        let config = Config { max_batch: 0, max_leases: 0, max_wait: Duration::ZERO, max_waiting: 0 };
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        assert_eq!(keys, ["max_batch", "max_leases", "max_waiting", "max_wait"]);
        let config = Config { max_wait: Duration::from_hours(1), max_batch: 501, ..Config::default() };
        assert_eq!(config.problems().len(), 2);
    }
}
