//! Sinks: where a group's entries go.
//!
//! Owns the [`Sink`] trait, how its failures are classified, and the sinks themselves. Knows nothing of groups,
//! attempts or acknowledgements: a sink either took a batch, or says why not.

mod audit;
mod checks;
mod envelope;
mod log;
mod metered;
mod postgres;
mod stream;
mod webhook;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use audit::{AuditConfig, AuditSink, Flaw, Problem, VerifyReport, verify};
pub use checks::StartCheck;
pub use log::{LogConfig, LogSink};
pub use metered::Metered;
pub use postgres::{InvalidTableName, PostgresConfig, PostgresSink, TableName};
pub use stream::{ForwardAs, StreamSink, StreamSinkConfig};
pub use webhook::{WebhookConfig, WebhookSink};

use crate::event::{Delivery, Fields, GroupName, StreamName};
use crate::validate::{Problems, Validate};

/// Where a batch comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The stream the entries are in.
    pub stream: StreamName,
    /// The group they are delivered for.
    pub group: GroupName,
}

/// Takes batches of entries and makes them have their effect.
#[async_trait]
pub trait Sink: fmt::Debug + Send + Sync + 'static {
    /// The most deliveries it takes at once.
    fn max_batch(&self) -> usize {
        1
    }

    /// Whether it could take deliveries now. Called at start and for readiness; has no effect.
    async fn check(&self) -> Result<(), SinkError>;

    /// Delivers a batch of one stream, all or nothing: `Ok` means that every entry has had its effect durably.
    ///
    /// After an error any part of the batch may have had its effect: deliveries are repeated, so effects are keyed
    /// by entry id where that matters. Dropping the future is allowed at any time.
    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError>;

    /// Finishes what is under way before the process ends.
    async fn close(&self) {}
}

/// The way into other streams of the same store, as a sink sees it.
#[async_trait]
pub trait Forward: fmt::Debug + Send + Sync + 'static {
    /// Whether an entry could be appended to that stream now. Has no effect.
    async fn check(&self, stream: &StreamName) -> Result<(), SinkError>;

    /// Appends entries in order, each under a key of 1 to 256 bytes: an entry whose key was seen within the window of
    /// `publish.dedup_window` is there already. `Ok` means that all are stored; an error, that any of them may be.
    async fn forward(&self, stream: &StreamName, entries: Vec<(String, Fields)>) -> Result<(), SinkError>;
}

/// What kind of failure it is, and so whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SinkErrorClass {
    /// May pass: a time-out, a lost connection, a full disk, a server error.
    Transient,
    /// Won't pass: the receiver refuses this entry.
    Permanent,
    /// The entry is not what the sink can read.
    Undecodable,
}

impl SinkErrorClass {
    /// The class in one word, for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Permanent => "permanent",
            Self::Undecodable => "undecodable",
        }
    }
}

/// A batch that a sink did not take.
#[derive(Debug)]
pub struct SinkError {
    class: SinkErrorClass,
    message: String,
    retry_after: Option<Duration>,
    is_outage: bool,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl SinkError {
    /// An error of that class, told by `message` (lower case, no period).
    pub fn new(class: SinkErrorClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), retry_after: None, is_outage: false, source: None }
    }

    /// The same with what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same with the time that the receiver asked us to wait.
    #[must_use]
    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    /// The same, but no entry is to blame for it: the sink can take none now, and to have tried is no attempt.
    #[must_use]
    pub fn as_outage(mut self) -> Self {
        self.is_outage = true;
        self
    }

    /// Whether the sink can take no entry now, whichever it is.
    pub fn is_outage(&self) -> bool {
        self.is_outage
    }

    /// Whether trying again can help.
    pub fn class(&self) -> SinkErrorClass {
        self.class
    }

    /// How long the receiver asked us to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for SinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for SinkError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

/// One sink of the configuration.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum SinkConfig {
    /// Writes a line per entry to the daemon's own log.
    Log(LogConfig),
    /// Appends tamper-evident records to files.
    Audit(AuditConfig),
    /// Posts entries to an HTTP receiver.
    Webhook(WebhookConfig),
    /// Writes rows into a table of `PostgreSQL`.
    Postgres(PostgresConfig),
    /// Appends to another stream of the same store.
    Stream(StreamSinkConfig),
}

impl SinkConfig {
    /// What `type` may be.
    pub const TYPES: [&str; 5] = ["log", "audit", "webhook", "postgres", "stream"];

    /// The stream that it forwards to, if it does.
    pub fn forwards_to(&self) -> Option<&StreamName> {
        match self {
            Self::Stream(config) => Some(&config.stream),
            _ => None,
        }
    }

    /// Makes the sink; one that forwards does so by `forward`. Opens files and takes their locks, and waits for no other
    /// machine.
    pub async fn build(self, name: &str, forward: Arc<dyn Forward>) -> Result<Arc<dyn Sink>, SinkError> {
        Ok(match self {
            Self::Log(config) => Arc::new(LogSink::new(name, &config)),
            Self::Audit(config) => Arc::new(AuditSink::open(name, config).await?),
            Self::Webhook(config) => Arc::new(WebhookSink::open(name, &config)?),
            Self::Postgres(config) => Arc::new(PostgresSink::open(name, &config)?),
            Self::Stream(config) => Arc::new(StreamSink::new(config, forward)),
        })
    }
}

impl Validate for SinkConfig {
    fn validate(&self, problems: &mut Problems) {
        match self {
            Self::Log(_) | Self::Audit(_) => {}
            Self::Webhook(config) => config.validate(problems),
            Self::Postgres(config) => config.validate(problems),
            Self::Stream(config) => config.validate(problems),
        }
    }
}
