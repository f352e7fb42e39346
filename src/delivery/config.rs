//! The configuration of a group.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ordering::{OnPoison, OrderBy, Ordering};
use super::policy::RetryPolicy;
use crate::delivery::worker::breaker::BreakerPolicy;
use crate::event::{GroupName, Severity};
use crate::store::Start;
use crate::validate::{Problems, Validate};

/// One consumer group of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The name of the group in its stream.
    pub name: GroupName,
    /// The name of the sink that takes its entries. Without a sink the group is for external consumers. Then only
    /// `start`, `claim_idle`, `max_deliveries` and `reap_after` have an effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// Workers of this instance, 1 to 64. With more than one, entries are not in order.
    #[serde(default = "default::workers")]
    pub workers: usize,
    /// Entries of lower severity are acknowledged without delivery. Entries of unknown severity are delivered, because
    /// a superfluous alert is better than a missed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_severity: Option<Severity>,
    /// The entries that keep the order of the stream, also when deliveries fail or several daemons run. In an ordered
    /// group one worker works at a time.
    #[serde(default)]
    pub ordering: Ordering,
    /// The ordering key with `ordering = "key"`: a field such as `source`, or `data.<name>` for a property of the
    /// payload. Entries without it have no order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_by: Option<OrderBy>,
    /// The reaction when an entry is given up, with `ordering = "stream"`.
    #[serde(default)]
    pub on_poison: OnPoison,
    /// When and how often a failed delivery is retried.
    #[serde(default)]
    pub retry: RetryPolicy,
    /// The most deliveries of an entry, including those that ended in a crash and those to external consumers. After
    /// them the entry becomes a dead letter.
    #[serde(default = "default::max_deliveries")]
    pub max_deliveries: u32,
    /// The time without progress after which other workers may claim a delivery. An entry that an external consumer
    /// left pending for this time is redelivered.
    #[serde(default = "default::claim_idle", with = "humantime_serde")]
    pub claim_idle: Duration,
    /// The start of the group when it is made.
    #[serde(default)]
    pub start: GroupStart,
    /// The most entries of one fetch, 1 to 1000.
    #[serde(default = "default::batch")]
    pub batch: usize,
    /// The most entries that a worker holds.
    #[serde(default = "default::max_in_flight")]
    pub max_in_flight: usize,
    /// Calls of the sink that a worker makes at the same time, 1 to 256. With more than one, entries are not in order.
    #[serde(default = "default::concurrency")]
    pub concurrency: usize,
    /// The timeout of one call of the sink. Shorter than `claim_idle`.
    #[serde(default = "default::handler_timeout", with = "humantime_serde")]
    pub handler_timeout: Duration,
    /// When a worker pauses because its sink is down.
    #[serde(default)]
    pub breaker: BreakerPolicy,
    /// The idle time after which a consumer with nothing pending is removed.
    #[serde(default = "default::reap_after", with = "humantime_serde")]
    pub reap_after: Duration,
}

/// The start of a new group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupStart {
    /// The oldest entry of the stream.
    #[default]
    Oldest,
    /// The next entry.
    New,
}

impl From<GroupStart> for Start {
    fn from(start: GroupStart) -> Self {
        match start {
            GroupStart::Oldest => Self::Oldest,
            GroupStart::New => Self::New,
        }
    }
}

mod default {
    use std::time::Duration;

    pub(super) const fn workers() -> usize {
        1
    }

    pub(super) const fn max_deliveries() -> u32 {
        15
    }

    pub(super) const fn claim_idle() -> Duration {
        Duration::from_mins(1)
    }

    pub(super) const fn batch() -> usize {
        500
    }

    pub(super) const fn max_in_flight() -> usize {
        2000
    }

    pub(super) const fn concurrency() -> usize {
        1
    }

    pub(super) const fn handler_timeout() -> Duration {
        Duration::from_secs(30)
    }

    pub(super) const fn reap_after() -> Duration {
        Duration::from_hours(1)
    }
}

impl GroupConfig {
    /// Returns a group with this name and default values.
    pub fn new(name: GroupName) -> Self {
        Self {
            name,
            sink: None,
            workers: default::workers(),
            min_severity: None,
            ordering: Ordering::default(),
            order_by: None,
            on_poison: OnPoison::default(),
            retry: RetryPolicy::default(),
            max_deliveries: default::max_deliveries(),
            claim_idle: default::claim_idle(),
            start: GroupStart::default(),
            batch: default::batch(),
            max_in_flight: default::max_in_flight(),
            concurrency: default::concurrency(),
            handler_timeout: default::handler_timeout(),
            breaker: BreakerPolicy::default(),
            reap_after: default::reap_after(),
        }
    }

    /// Returns whether the group stops when an entry is given up.
    pub(super) fn halts(&self) -> bool {
        self.ordering == Ordering::Stream && self.on_poison == OnPoison::Halt
    }
}

impl Validate for GroupConfig {
    fn validate(&self, problems: &mut Problems) {
        const SECOND: Duration = Duration::from_secs(1);
        const DAY: Duration = Duration::from_hours(24);
        let text = humantime_serde::re::humantime::format_duration;
        let (retry, breaker) = (&self.retry, &self.breaker);
        // Without a sink there are no attempts.
        let least_deliveries = if self.sink.is_some() { retry.max_attempts } else { 1 };
        let rules = [
            ("workers", !(1..=64).contains(&self.workers), format!("must be from 1 to 64, not {}", self.workers)),
            (
                "workers",
                self.ordering != Ordering::None && self.workers > 1,
                "must be 1 with an ordering: only one worker at a time keeps the order".to_owned(),
            ),
            (
                "concurrency",
                self.ordering == Ordering::Stream && self.concurrency > 1,
                "must be 1 with ordering = \"stream\": one delivery at a time keeps the order".to_owned(),
            ),
            (
                "order_by",
                self.ordering == Ordering::Key && self.order_by.is_none(),
                "is missing: ordering = \"key\" needs a key, such as \"source\" or \"data.host\"".to_owned(),
            ),
            (
                "order_by",
                self.ordering != Ordering::Key && self.order_by.is_some(),
                "has an effect only with ordering = \"key\"".to_owned(),
            ),
            (
                "on_poison",
                self.ordering != Ordering::Stream && self.on_poison == OnPoison::Halt,
                "must not be \"halt\" without ordering = \"stream\"".to_owned(),
            ),
            ("retry.max_attempts", retry.max_attempts == 0, "must be at least 1".to_owned()),
            ("retry.base", retry.base.is_zero(), "must be longer than 0s".to_owned()),
            (
                "retry.cap",
                retry.cap < retry.base || retry.cap > DAY,
                format!("must be from retry.base ({}) to 1day, not {}", text(retry.base), text(retry.cap)),
            ),
            (
                "max_deliveries",
                self.max_deliveries < least_deliveries,
                match self.sink {
                    Some(_) => {
                        format!("must be at least retry.max_attempts ({least_deliveries}), not {}", self.max_deliveries)
                    }
                    None => "must be at least 1".to_owned(),
                },
            ),
            (
                "claim_idle",
                self.claim_idle < SECOND || self.claim_idle > DAY,
                format!("must be from 1s to 1day, not {}", text(self.claim_idle)),
            ),
            ("batch", !(1..=1000).contains(&self.batch), format!("must be from 1 to 1000, not {}", self.batch)),
            (
                "max_in_flight",
                !(1..=100_000).contains(&self.max_in_flight),
                format!("must be from 1 to 100000, not {}", self.max_in_flight),
            ),
            (
                "concurrency",
                !(1..=256).contains(&self.concurrency),
                format!("must be from 1 to 256, not {}", self.concurrency),
            ),
            (
                "handler_timeout",
                self.sink.is_some() && (self.handler_timeout.is_zero() || self.handler_timeout >= self.claim_idle),
                format!(
                    "must be longer than 0s and shorter than claim_idle ({}), not {}",
                    text(self.claim_idle),
                    text(self.handler_timeout)
                ),
            ),
            ("breaker.pause", breaker.pause.is_zero(), "must be longer than 0s".to_owned()),
            (
                "breaker.max_pause",
                breaker.max_pause < breaker.pause || breaker.max_pause > DAY,
                format!(
                    "must be from breaker.pause ({}) to 1day, not {}",
                    text(breaker.pause),
                    text(breaker.max_pause)
                ),
            ),
            ("reap_after", self.reap_after < SECOND, format!("must be at least 1s, not {}", text(self.reap_after))),
        ];
        for (key, is_invalid, message) in rules {
            problems.require(!is_invalid, key, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GroupConfig, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn name_alone_is_a_valid_group() {
        let config = parse("name = 'siem'").unwrap();
        assert_eq!(config, GroupConfig::new("siem".parse().unwrap()));
        assert_eq!(config.problems(), []);
        assert!(parse("sink = 'log'").is_err());
        assert!(parse("name = 'siem'\nworker = 2").is_err());
    }

    #[test]
    fn all_keys_are_read() {
        let config = parse(
            "name = 'siem'\nsink = 'log'\nworkers = 1\nmin_severity = 'high'\nmax_deliveries = 20\nclaim_idle = '2m'\n\
             start = 'new'\nbatch = 10\nmax_in_flight = 20\nconcurrency = 4\nhandler_timeout = '5s'\n\
             retry = { max_attempts = 3, base = '250ms', cap = '10s' }\nreap_after = '2h'\n\
             ordering = 'key'\norder_by = 'data.host'\non_poison = 'dead_letter'\n\
             breaker = { failures = 3, pause = '2s', max_pause = '30s' }",
        )
        .unwrap();
        assert_eq!(config.ordering, Ordering::Key);
        assert_eq!(config.order_by, Some(OrderBy::Data("host".to_owned())));
        assert_eq!(config.min_severity, Some(Severity::High));
        assert_eq!(config.claim_idle, Duration::from_mins(2));
        assert_eq!(config.retry.base, Duration::from_millis(250));
        assert_eq!(config.problems(), []);
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn invalid_values_are_reported_with_their_keys() {
        let config = parse(
            "name = 'siem'\nsink = 'log'\nworkers = 0\nmax_deliveries = 1\nclaim_idle = '500ms'\nbatch = 0\nmax_in_flight = 0\n\
             concurrency = 0\nhandler_timeout = '1s'\nretry = { max_attempts = 5, base = '1m', cap = '10s' }\n\
             breaker = { pause = '1m', max_pause = '1s' }\nreap_after = '10ms'",
        )
        .unwrap();
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        let expected = [
            "workers",
            "retry.cap",
            "max_deliveries",
            "claim_idle",
            "batch",
            "max_in_flight",
            "concurrency",
            "handler_timeout",
            "breaker.max_pause",
            "reap_after",
        ];
        assert_eq!(keys, expected);
    }

    #[test]
    fn worker_settings_of_a_pull_group_are_not_checked() {
        let config = parse("name = 'agents'\nclaim_idle = '10s'\nmax_deliveries = 2").unwrap();
        assert_eq!(config.problems(), []);
    }

    #[test]
    fn ordered_group_needs_one_worker_and_a_key() {
        let keys = |text: &str| -> Vec<String> {
            let config = parse(&format!("name = 'siem'\n{text}")).unwrap();
            config.problems().into_iter().map(|problem| problem.path).collect()
        };
        assert_eq!(keys("ordering = 'stream'\non_poison = 'halt'"), [""; 0]);
        assert_eq!(keys("ordering = 'key'\norder_by = 'source'\nconcurrency = 8"), [""; 0]);
        assert_eq!(keys("ordering = 'stream'\nworkers = 2\nconcurrency = 2"), ["workers", "concurrency"]);
        assert_eq!(keys("ordering = 'key'\nworkers = 2\non_poison = 'halt'"), ["workers", "order_by", "on_poison"]);
        assert_eq!(keys("order_by = 'source'"), ["order_by"]);
        assert!(parse("name = 'siem'\norder_by = 'data.'").is_err());
    }
}
