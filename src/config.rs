//! The configuration: what it holds, its built-in default, and the checks across its parts.
//!
//! Each module owns its own part; this one puts them together. [`load`] reads the layers: built-in default,
//! file, environment, flags. Reading the environment happens here and in `main` alone.

mod family_checks;
mod forwarding_checks;
mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

pub use load::{DEFAULT_FILE, Layers, load};

use crate::event::{GroupName, StreamName, StreamPattern};
use crate::sink::SinkConfig;
use crate::{auth, bus, dead_letters, delivery, http, maintenance, pull, relay, store, telemetry};

/// The whole configuration.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// This daemon's name; its consumers are `<instance>-0`, `<instance>-1` and so on. Must be unique among the
    /// daemons that share a store, and should stay the same across restarts.
    pub instance: String,
    /// The listener and its limits.
    pub http: http::Config,
    /// Who may do what.
    pub auth: auth::AuthConfig,
    /// Where streams are kept.
    pub store: StoreConfig,
    /// What publishers may do.
    pub publish: bus::Config,
    /// What workers may do that pull.
    pub pull: pull::Config,
    /// What dashboards are given.
    pub relay: relay::Config,
    /// What is kept of dead letters.
    pub dead_letters: dead_letters::Config,
    /// What is logged, and how.
    pub log: telemetry::Config,
    /// How the daemon ends.
    pub shutdown: ShutdownConfig,
    /// The streams and their groups.
    pub streams: Vec<StreamConfig>,
    /// Where groups deliver to, by name. `log` and `audit` are there unless they are declared otherwise.
    pub sinks: BTreeMap<String, SinkConfig>,
}

/// Which store, and its settings.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Which of the two.
    pub backend: Backend,
    /// The embedded store's settings.
    pub embedded: store::embedded::Config,
    /// The Redis store's settings.
    pub redis: store::redis::Config,
}

/// The two stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// On this machine's disk, one daemon at a time.
    #[default]
    Embedded,
    /// Redis or Valkey, shared by any number of daemons.
    Redis,
}

/// How the daemon ends.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// How long work under way may take after a request to stop.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { grace: Duration::from_secs(25) }
    }
}

/// One stream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Its name, which is also its key in Redis. With a placeholder for one part, such as
    /// `aurora:tenant:{tenant}:alerts`, it declares a family of streams, which come into being when they are used first.
    pub name: StreamPattern,
    /// Of a family: the most keys, and so streams, that it may have; 1000 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_keys: Option<usize>,
    /// Whether dashboards may watch it.
    #[serde(default)]
    pub relay: bool,
    /// What is kept.
    #[serde(default)]
    pub retention: maintenance::Retention,
    /// Where entries go that can't be handled; `<name>:dead_letter` by default. Of a family: with its placeholder, or
    /// without, where all of them share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<StreamPattern>,
    /// How durable an event is at least when it is accepted: `memory`, `fsync`, `replicated` or `fsync+replicated`.
    #[serde(default)]
    pub durability: store::Durability,
    /// Who handles its entries.
    #[serde(default)]
    pub groups: Vec<delivery::GroupConfig>,
}

impl StreamConfig {
    /// Where entries go that can't be handled.
    pub fn dead_letter(&self) -> StreamPattern {
        self.dead_letter.clone().unwrap_or_else(|| match &self.name {
            StreamPattern::One(stream) => stream.default_dead_letter().into(),
            StreamPattern::Family(family) => StreamPattern::Family(family.default_dead_letter()),
        })
    }

    /// The most keys that a family may have.
    pub fn max_keys(&self) -> usize {
        self.max_keys.unwrap_or(DEFAULT_MAX_KEYS)
    }
}

/// The most keys of a family that does not say how many it may have.
const DEFAULT_MAX_KEYS: usize = 1_000;

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, such as `streams[0].groups[1].retry.base`.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Problem {
    /// What is wrong at that key.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

/// A configuration that can't be used, with everything that is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has {} problem{}:\n{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, lines(.0))]
pub struct InvalidConfig(pub Vec<Problem>);

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("  {problem}")).collect::<Vec<_>>().join("\n")
}

impl Default for Config {
    /// What the daemon does with no configuration at all: the five streams of a SOC on the embedded store.
    fn default() -> Self {
        let stream = |name: &str, relay, group: &str, sink: Option<&str>| {
            let name: StreamName = name.parse().expect("a valid name");
            let group: GroupName = group.parse().expect("a valid name");
            StreamConfig {
                dead_letter: None,
                durability: store::Durability::MEMORY,
                name: name.into(),
                max_keys: None,
                relay,
                retention: maintenance::Retention::default(),
                groups: vec![delivery::GroupConfig {
                    sink: sink.map(str::to_owned),
                    ..delivery::GroupConfig::new(group)
                }],
            }
        };
        Self {
            instance: default_instance(),
            http: http::Config::default(),
            auth: auth::AuthConfig::default(),
            store: StoreConfig::default(),
            publish: bus::Config::default(),
            pull: pull::Config::default(),
            relay: relay::Config::default(),
            dead_letters: dead_letters::Config::default(),
            log: telemetry::Config::default(),
            shutdown: ShutdownConfig::default(),
            streams: vec![
                stream("aurora:alerts", true, "alert-processor", Some("log")),
                stream("aurora:cps:alerts", true, "cps-alert-handler", Some("log")),
                stream("aurora:agent:tasks", false, "aurora-agents", None),
                stream("aurora:agent:results", false, "api-agent-results", Some("log")),
                stream("aurora:audit", true, "audit-logger", Some("audit")),
            ],
            sinks: default_sinks(),
        }
    }
}

/// The sinks that are there without being declared.
fn default_sinks() -> BTreeMap<String, SinkConfig> {
    BTreeMap::from([
        ("log".to_owned(), SinkConfig::Log(crate::sink::LogConfig::default())),
        ("audit".to_owned(), SinkConfig::Audit(crate::sink::AuditConfig::default())),
    ])
}

/// The host's name, as far as it makes a consumer name.
fn default_instance() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let name: String = host.trim().chars().filter(is_allowed).take(64).collect();
    if name.is_empty() { "aurora-bus".to_owned() } else { name }
}

impl Config {
    /// Checks what no single part can see. Reports every problem.
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if format!("{}-0", self.instance).parse::<crate::event::ConsumerName>().is_err() || self.instance.len() > 100 {
            problems.push(Problem::new("instance", "must be 1 to 100 letters, digits and `_.-`"));
        }
        let is_open = self.auth.mode == auth::AuthMode::Loopback && !self.auth.is_required();
        if is_open && !self.http.listen.ip().is_loopback() {
            problems.push(Problem::new(
                "http.listen",
                format!(
                    "{} can be reached from other machines, and no credentials are asked for: listen on 127.0.0.1, \
                     declare auth.keys or auth.issuers, or write auth.mode = \"none\" if whoever reaches it may do \
                     everything",
                    self.http.listen
                ),
            ));
        }
        let auth = self.auth.problems().into_iter();
        problems.extend(auth.map(|(key, message)| Problem::new(format!("auth.{key}"), message)));
        if self.relay.channels.contains_key("ticket") {
            problems.push(Problem::new("relay.channels.ticket", "the name is taken by /api/v1/ws/ticket"));
        }
        if self.streams.is_empty() {
            problems.push(Problem::new("streams", "no stream is declared"));
        }
        problems.extend(
            self.http.problems().into_iter().map(|(key, message)| Problem::new(format!("http.{key}"), message)),
        );
        let tls = self.http.tls.iter().flat_map(http::TlsConfig::problems);
        problems.extend(tls.map(|(key, message)| Problem::new(format!("http.tls.{key}"), message)));
        problems.extend(
            self.publish.problems().into_iter().map(|(key, message)| Problem::new(format!("publish.{key}"), message)),
        );
        let pull = self.pull.problems().into_iter();
        problems.extend(pull.map(|(key, message)| Problem::new(format!("pull.{key}"), message)));
        let declared: Vec<StreamName> =
            self.streams.iter().filter_map(|stream| stream.name.stream().cloned()).collect();
        let dead_letters = self.dead_letters.problems(&declared).into_iter();
        problems.extend(dead_letters.map(|(key, message)| Problem::new(format!("dead_letters.{key}"), message)));
        let log = self.log.problems().into_iter();
        problems.extend(log.map(|(key, message)| Problem::new(format!("log.{key}"), message)));
        if self.store.embedded.reserve > ByteSize::tib(1) {
            problems.push(Problem::new("store.embedded.reserve", "must not be more than 1TiB"));
        }
        if self.store.backend == Backend::Redis
            && let Err(error) = self.store.redis.validate()
        {
            problems.push(Problem::new("store.redis", error.to_string()));
        }
        problems.extend(self.stream_problems());
        problems.extend(family_checks::problems(self));
        for (name, sink) in &self.sinks {
            let own = sink.problems().into_iter();
            problems.extend(own.map(|(key, message)| Problem::new(format!("sinks.{name}.{key}"), message)));
        }
        problems.extend(forwarding_checks::problems(self));
        if self.relay.drain_window >= self.shutdown.grace {
            let message = "must be shorter than shutdown.grace: dashboards would be broken off instead of closed";
            problems.push(Problem::new("relay.drain_window", message));
        }
        let relay = self.relay.problems(&self.relayed()).into_iter();
        problems.extend(relay.map(|(key, message)| Problem::new(format!("relay.{key}"), message)));
        problems
    }

    fn stream_problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut names = BTreeSet::new();
        for (index, stream) in self.streams.iter().enumerate() {
            let path = format!("streams[{index}]");
            if !names.insert(&stream.name) {
                problems.push(Problem::new(format!("{path}.name"), format!("`{}` is declared twice", stream.name)));
            }
            if stream.dead_letter() == stream.name {
                problems
                    .push(Problem::new(format!("{path}.dead_letter"), "a stream can't be its own dead-letter stream"));
            }
            let is_embedded = self.store.backend == Backend::Embedded;
            let is_synced = self.store.embedded.durability == store::embedded::Durability::Commit;
            if is_embedded && stream.durability.replicated {
                problems.push(Problem::new(format!("{path}.durability"), "the embedded store has no replicas"));
            } else if is_embedded && stream.durability.fsync && !is_synced {
                let message = "must be `memory` where store.embedded.durability is `interval`";
                problems.push(Problem::new(format!("{path}.durability"), message));
            }
            let own = stream.retention.validate().into_iter();
            problems.extend(own.map(|value| Problem::new(format!("{path}.retention.{}", value.key), value.problem)));
            let mut groups = BTreeSet::new();
            for (index, group) in stream.groups.iter().enumerate() {
                let path = format!("{path}.groups[{index}]");
                if !groups.insert(&group.name) {
                    problems.push(Problem::new(format!("{path}.name"), format!("`{}` is declared twice", group.name)));
                }
                if let Some(sink) = group.sink.as_ref().filter(|sink| !self.sinks.contains_key(*sink)) {
                    let known = self.sinks.keys().map(String::as_str);
                    let message = format!("there is no sink `{sink}`{}", nearest(sink, known));
                    problems.push(Problem::new(format!("{path}.sink"), message));
                }
                let own = group.validate().into_iter();
                problems.extend(own.map(|value| Problem::new(format!("{path}.{}", value.key), value.problem)));
            }
        }
        for (index, stream) in self.streams.iter().enumerate() {
            if stream.dead_letter() != stream.name && names.contains(&stream.dead_letter()) {
                let message = format!("`{}` is itself a declared stream", stream.dead_letter());
                problems.push(Problem::new(format!("streams[{index}].dead_letter"), message));
            }
        }
        problems
    }

    /// The streams that dashboards may watch.
    pub fn relayed(&self) -> Vec<StreamPattern> {
        self.streams.iter().filter(|stream| stream.relay).map(|stream| stream.name.clone()).collect()
    }

    /// Leaves of the built-in channels what is declared, where no channels are configured.
    fn fit_default_channels(&mut self) {
        if self.relay.channels != relay::Config::default().channels {
            return;
        }
        let relayed = self.relayed();
        self.relay.channels.values_mut().for_each(|streams| streams.retain(|stream| relayed.contains(stream)));
        self.relay.channels.retain(|_, streams| !streams.is_empty());
    }
}

impl Config {
    /// The configuration as TOML that can be read back, except that secrets are masked.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every part of the configuration is a TOML value")
    }
}

/// ", did you mean `x`?" where a known word is close.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let slips = |candidate: &str| strsim::damerau_levenshtein(word, candidate);
    match known.map(|candidate| (slips(candidate), candidate)).min() {
        Some((slips, candidate)) if slips <= (word.len() / 3).max(1) => format!(", did you mean `{candidate}`?"),
        _ => String::new(),
    }
}
