//! The configuration: its sections, the built-in default, and the checks across sections.
//!
//! Each module owns its own section. [`load`] reads the layers: built-in default, file, environment, flags. Only this
//! module and `main` read the environment.

mod family_checks;
mod forwarding_checks;
mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

pub use load::{DEFAULT_FILE, Layers, load};

use crate::event::{ConsumerName, GroupName, StreamName, StreamPattern};
use crate::sink::SinkConfig;
use crate::validate::{ConfigProblem, Problems, Validate};
use crate::{auth, bus, dead_letters, delivery, http, maintenance, pull, relay, store, telemetry};

/// The whole configuration.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of this daemon. Its consumers are `<instance>-0`, `<instance>-1` and so on. Must be unique among the
    /// daemons that share a store, and should stay the same across restarts.
    pub instance: String,
    /// The listener and its limits.
    pub http: http::Config,
    /// Credentials and permissions.
    pub auth: auth::AuthConfig,
    /// The store of streams and groups.
    pub store: StoreConfig,
    /// Limits of publishers.
    pub publish: bus::Config,
    /// Limits of pull consumers.
    pub pull: pull::Config,
    /// Limits and channels of dashboards.
    pub relay: relay::Config,
    /// Limits of dead letters.
    pub dead_letters: dead_letters::Config,
    /// Level and format of the logs.
    pub log: telemetry::Config,
    /// The shutdown of the daemon.
    pub shutdown: ShutdownConfig,
    /// The streams and their groups.
    pub streams: Vec<StreamConfig>,
    /// The sinks by name. `log` and `audit` exist unless they are declared differently.
    pub sinks: BTreeMap<String, SinkConfig>,
}

/// The selected store, and the settings of both.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// The selected store.
    pub backend: Backend,
    /// Settings of the embedded store.
    pub embedded: store::embedded::Config,
    /// Settings of the Redis store.
    pub redis: store::redis::Config,
}

/// The kinds of stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// A folder on the disk of this machine, for one daemon at a time.
    #[default]
    Embedded,
    /// Redis or Valkey, shared by any number of daemons.
    Redis,
}

/// The shutdown of the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// Time that pending work gets after a request to stop.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { grace: Duration::from_secs(25) }
    }
}

/// A declared stream, or family of streams.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StreamConfig {
    /// Name of the stream, which is also its key in Redis. With a placeholder for one part, such as
    /// `aurora:tenant:{tenant}:alerts`, it declares a family of streams. Members of a family are created at their first
    /// use.
    pub name: StreamPattern,
    /// Maximum number of keys, and so of members, of a family; 1000 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_keys: Option<usize>,
    /// Whether dashboards may watch the stream.
    #[serde(default)]
    pub relay: bool,
    /// The limits of kept entries.
    #[serde(default)]
    pub retention: maintenance::Retention,
    /// Stream for the dead letters, by default `<name>:dead_letter`. Of a family: a name with the same placeholder, or
    /// without, to share one stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<StreamPattern>,
    /// Minimum durability of accepted events: `memory`, `fsync`, `replicated` or `fsync+replicated`.
    #[serde(default)]
    pub durability: store::Durability,
    /// The groups of the stream.
    #[serde(default)]
    pub groups: Vec<delivery::GroupConfig>,
}

impl StreamConfig {
    /// Returns the stream for the dead letters.
    pub fn dead_letter(&self) -> StreamPattern {
        self.dead_letter.clone().unwrap_or_else(|| match &self.name {
            StreamPattern::One(stream) => stream.default_dead_letter().into(),
            StreamPattern::Family(family) => StreamPattern::Family(family.default_dead_letter()),
        })
    }

    /// Returns the maximum number of keys of a family.
    pub fn max_keys(&self) -> usize {
        self.max_keys.unwrap_or(DEFAULT_MAX_KEYS)
    }
}

/// Default of `max_keys`.
const DEFAULT_MAX_KEYS: usize = 1_000;

/// An invalid configuration, with all problems.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has {} problem{}:\n{}", .0.len(), if .0.len() == 1 { "" } else { "s" }, lines(.0))]
pub struct InvalidConfig(pub Vec<ConfigProblem>);

fn lines(problems: &[ConfigProblem]) -> String {
    problems.iter().map(|problem| format!("  {problem}")).collect::<Vec<_>>().join("\n")
}

impl Default for Config {
    /// Returns the configuration without any file: the five streams of a SOC on the embedded store.
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

/// Returns the sinks that exist without a declaration.
fn default_sinks() -> BTreeMap<String, SinkConfig> {
    BTreeMap::from([
        ("log".to_owned(), SinkConfig::Log(crate::sink::LogConfig::default())),
        ("audit".to_owned(), SinkConfig::Audit(crate::sink::AuditConfig::default())),
    ])
}

/// Returns the characters of the host name that are allowed in consumer names.
fn default_instance() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let name: String = host.trim().chars().filter(is_allowed).take(64).collect();
    if name.is_empty() { "aurora-bus".to_owned() } else { name }
}

impl Validate for StoreConfig {
    fn validate(&self, problems: &mut Problems) {
        let is_valid = self.embedded.reserve <= ByteSize::tib(1);
        problems.require(is_valid, "embedded.reserve", "must be at most 1TiB");
        if self.backend == Backend::Redis {
            problems.check("redis", &self.redis);
        }
    }
}

impl Validate for Config {
    /// Checks every section, and the rules across sections.
    fn validate(&self, problems: &mut Problems) {
        problems.check("http", &self.http);
        problems.check("auth", &self.auth);
        problems.check("store", &self.store);
        problems.check("publish", &self.publish);
        problems.check("pull", &self.pull);
        problems.check("relay", &self.relay);
        problems.check("dead_letters", &self.dead_letters);
        problems.check("log", &self.log);
        for (name, sink) in &self.sinks {
            problems.check(&format!("sinks.{name}"), sink);
        }
        self.check_instance(problems);
        self.check_exposure(problems);
        self.check_streams(problems);
        family_checks::validate(self, problems);
        forwarding_checks::validate(self, problems);
        self.check_channels(problems);
        let audit = self.dead_letters.audit.as_ref();
        if let Some(audit) = audit.filter(|audit| !self.streams.iter().any(|s| s.name.stream() == Some(*audit))) {
            problems.add("dead_letters.audit", format_args!("stream `{audit}` is not declared"));
        }
    }
}

impl Config {
    fn check_instance(&self, problems: &mut Problems) {
        let is_consumer_name = format!("{}-0", self.instance).parse::<ConsumerName>().is_ok();
        let is_valid = is_consumer_name && self.instance.len() <= 100;
        problems.require(is_valid, "instance", "must be 1 to 100 letters, digits and `_.-`");
    }

    /// Refuses to serve other machines without credentials unless the configuration asks for it.
    fn check_exposure(&self, problems: &mut Problems) {
        let is_open = self.auth.mode == auth::AuthMode::Loopback && !self.auth.is_required();
        let message = format_args!(
            "{} can be reached from other machines, and no credentials are required: listen on 127.0.0.1, declare \
             auth.keys or auth.issuers, or set auth.mode = \"none\" to let every client do everything",
            self.http.listen
        );
        problems.require(!is_open || self.http.listen.ip().is_loopback(), "http.listen", message);
    }

    fn check_channels(&self, problems: &mut Problems) {
        let is_free = !self.relay.channels.contains_key("ticket");
        problems.require(is_free, "relay.channels.ticket", "the name is reserved for /api/v1/ws/ticket");
        let message = "must be shorter than shutdown.grace, so that every dashboard is closed in order";
        problems.require(self.relay.drain_window < self.shutdown.grace, "relay.drain_window", message);
        let relayed = self.relayed();
        for (name, streams) in &self.relay.channels {
            for stream in streams.iter().filter(|stream| !relayed.contains(stream)) {
                let message = format_args!("stream `{stream}` is not declared with `relay = true`");
                problems.add(&format!("relay.channels.{name}"), message);
            }
        }
    }

    fn check_streams(&self, problems: &mut Problems) {
        problems.require(!self.streams.is_empty(), "streams", "no stream is declared");
        let mut names = BTreeSet::new();
        for (index, stream) in self.streams.iter().enumerate() {
            let path = format!("streams[{index}]");
            let is_new = names.insert(&stream.name);
            problems.require(is_new, &format!("{path}.name"), format_args!("`{}` is declared twice", stream.name));
            let is_other = stream.dead_letter() != stream.name;
            let message = "must not be the stream itself";
            problems.require(is_other, &format!("{path}.dead_letter"), message);
            let is_embedded = self.store.backend == Backend::Embedded;
            let is_synced = self.store.embedded.durability == store::embedded::SyncMode::Commit;
            if is_embedded && stream.durability.replicated {
                problems.add(&format!("{path}.durability"), "the embedded store has no replicas");
            } else if is_embedded && stream.durability.fsync && !is_synced {
                let message = "must be `memory` if store.embedded.durability is `interval`";
                problems.add(&format!("{path}.durability"), message);
            }
            problems.check(&format!("{path}.retention"), &stream.retention);
            self.check_groups(&path, stream, problems);
        }
        for (index, stream) in self.streams.iter().enumerate() {
            if stream.dead_letter() != stream.name && names.contains(&stream.dead_letter()) {
                let message = format_args!("`{}` is itself a declared stream", stream.dead_letter());
                problems.add(&format!("streams[{index}].dead_letter"), message);
            }
        }
    }

    fn check_groups(&self, stream_path: &str, stream: &StreamConfig, problems: &mut Problems) {
        let mut names = BTreeSet::new();
        for (index, group) in stream.groups.iter().enumerate() {
            let path = format!("{stream_path}.groups[{index}]");
            let is_new = names.insert(&group.name);
            problems.require(is_new, &format!("{path}.name"), format_args!("`{}` is declared twice", group.name));
            if let Some(sink) = group.sink.as_ref().filter(|sink| !self.sinks.contains_key(*sink)) {
                let hint = nearest(sink, self.sinks.keys().map(String::as_str));
                problems.add(&format!("{path}.sink"), format_args!("there is no sink `{sink}`{hint}"));
            }
            problems.check(&path, group);
        }
    }

    /// Returns the streams that dashboards may watch.
    pub fn relayed(&self) -> Vec<StreamPattern> {
        self.streams.iter().filter(|stream| stream.relay).map(|stream| stream.name.clone()).collect()
    }

    /// Restricts the built-in channels to declared streams, if no channels are configured.
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
    /// Returns the configuration as TOML. It can be read back, except for masked secrets.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every part of the configuration is a TOML value")
    }
}

/// Returns ", did you mean `x`?" if a known word is similar.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let slips = |candidate: &str| strsim::damerau_levenshtein(word, candidate);
    match known.map(|candidate| (slips(candidate), candidate)).min() {
        Some((slips, candidate)) if slips <= (word.len() / 3).max(1) => format!(", did you mean `{candidate}`?"),
        _ => String::new(),
    }
}
