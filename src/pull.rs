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

mod desk;
mod ledger;
mod reader;
mod token;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use desk::{Desk, GiveBack, PullError, Refused, Task, Wanted};
pub use token::{InvalidToken, Token};

use crate::event::{ConsumerName, GroupName, StreamName};
use crate::metrics::Metrics;
use crate::store::Store;

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

impl Config {
    /// Every key that makes no sense, with the reason.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let counts = [
            ("max_batch", self.max_batch, 500),
            ("max_leases", self.max_leases, 100_000),
            ("max_waiting", self.max_waiting, 100_000),
        ];
        for (key, _, most) in counts.into_iter().filter(|(_, count, most)| !(1..=*most).contains(count)) {
            problems.push((key, format!("must be from 1 to {most}")));
        }
        if self.max_wait.is_zero() || self.max_wait > Duration::from_mins(5) {
            problems.push(("max_wait", "must be longer than nothing and at most 5m".to_owned()));
        }
        problems
    }
}

/// A group without a sink.
#[derive(Debug, Clone)]
pub struct PullGroup {
    /// Its stream.
    pub stream: StreamName,
    /// Its name.
    pub group: GroupName,
    /// Where its dead letters go.
    pub dead_letter: StreamName,
    /// How long a lease is unless it is shorter: others take over what is idle for as long.
    pub claim_idle: Duration,
    /// An entry delivered as often is given up instead of being delivered once more.
    pub max_deliveries: u32,
    /// Rung when there is something for the group's guard to hand on.
    pub bell: Arc<Notify>,
}

/// Every group that can be pulled from. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pull {
    desks: Arc<BTreeMap<(StreamName, GroupName), Arc<Desk>>>,
    config: Arc<Config>,
}

impl Pull {
    /// Desks for these groups, none of which serves before [`Pull::run`].
    ///
    /// `reader` is the name under which entries are fetched for those who wait; `guard` the one that holds what was
    /// given back until it is due.
    pub fn new(
        store: &Arc<dyn Store>,
        config: Config,
        groups: impl IntoIterator<Item = PullGroup>,
        reader: &ConsumerName,
        guard: &ConsumerName,
        metrics: &Metrics,
    ) -> Self {
        let desk = |group: PullGroup| {
            let key = (group.stream.clone(), group.group.clone());
            let desk = Desk::new(Arc::clone(store), group, &config, reader.clone(), guard.clone(), metrics);
            (key, Arc::new(desk))
        };
        Self { desks: Arc::new(groups.into_iter().map(desk).collect()), config: Arc::new(config) }
    }

    /// What those may do who pull.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The desk of a group; nothing where it is not declared, or has a sink.
    pub fn desk(&self, stream: &StreamName, group: &GroupName) -> Option<&Arc<Desk>> {
        self.desks.get(&(stream.clone(), group.clone()))
    }

    /// The desk that gave a token.
    pub fn desk_of(&self, token: &Token) -> Option<&Arc<Desk>> {
        self.desks.values().find(|desk| desk.is_of(token))
    }

    /// The groups of a stream that can be pulled from, by name.
    pub fn groups<'a>(&'a self, stream: &'a StreamName) -> impl Iterator<Item = &'a GroupName> {
        self.desks.keys().filter(move |(of, _)| of == stream).map(|(_, group)| group)
    }

    /// Serves until `stop`; those who wait then are given nothing, at once. To be called once.
    pub async fn run(&self, stop: CancellationToken) {
        let mut desks = JoinSet::new();
        for desk in self.desks.values() {
            desks.spawn(Arc::clone(desk).run(stop.clone()));
        }
        stop.cancelled().await;
        while let Some(ended) = desks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a desk has ended badly");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_senseless_limit_is_told_with_its_key() {
        assert_eq!(Config::default().problems(), []);
        let config = Config { max_batch: 0, max_leases: 0, max_wait: Duration::ZERO, max_waiting: 0 };
        let keys: Vec<_> = config.problems().into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["max_batch", "max_leases", "max_waiting", "max_wait"]);
        let config = Config { max_wait: Duration::from_hours(1), max_batch: 501, ..Config::default() };
        assert_eq!(config.problems().len(), 2);
    }
}
