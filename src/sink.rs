//! Sinks: the destinations of a group's entries.
//!
//! Owns the [`Sink`] trait, the classes of its errors, and the sinks themselves. Knows nothing of groups, attempts or
//! acknowledgements: a sink takes a batch or returns an error.

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

pub use audit::{AuditConfig, AuditFlaw, AuditProblem, AuditSink, VerifyReport, verify};
pub use checks::StartCheck;
pub use log::{LogConfig, LogSink};
pub use metered::MeteredSink;
pub use postgres::{InvalidTableName, PostgresConfig, PostgresSink, TableName};
pub use stream::{ForwardAs, StreamSink, StreamSinkConfig};
pub use webhook::{WebhookConfig, WebhookSink};

use crate::event::{Delivery, Fields, GroupName, StreamName};
use crate::validate::{Problems, Validate};

/// The source of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The stream of the entries.
    pub stream: StreamName,
    /// The group that they are delivered for.
    pub group: GroupName,
}

/// A destination of entries.
#[async_trait]
pub trait Sink: fmt::Debug + Send + Sync + 'static {
    /// Returns the maximum number of entries per batch.
    fn max_batch(&self) -> usize {
        1
    }

    /// Checks whether the sink can take entries now. Called at start and for readiness; has no effect.
    async fn check(&self) -> Result<(), SinkError>;

    /// Delivers a batch of one stream. `Ok` means that every entry has had its effect durably.
    ///
    /// After an error any part of the batch may have had its effect. Deliveries are repeated, so effects need the entry
    /// id as a key if repetitions matter. The future may be dropped at any time.
    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError>;

    /// Finishes pending work before the process ends.
    async fn close(&self) {}
}

/// Publishes to other streams of the same store, on behalf of a sink.
#[async_trait]
pub trait Forward: fmt::Debug + Send + Sync + 'static {
    /// Checks whether an entry could be appended to the stream now. Has no effect.
    async fn check(&self, stream: &StreamName) -> Result<(), SinkError>;

    /// Appends entries in order, each under a key of 1 to 256 bytes.
    ///
    /// An entry is not appended again if its key was used within `publish.dedup_window`. `Ok` means that all entries
    /// are stored. After an error any of them may be stored.
    async fn forward(&self, stream: &StreamName, entries: Vec<(String, Fields)>) -> Result<(), SinkError>;
}

/// The class of a sink error. It decides whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SinkErrorClass {
    /// Temporary: a timeout, a lost connection, a full disk, a server error.
    Transient,
    /// Lasting: the receiver refuses this entry.
    Permanent,
    /// The sink cannot read the entry.
    Undecodable,
}

impl SinkErrorClass {
    /// Returns the class in one word, for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Permanent => "permanent",
            Self::Undecodable => "undecodable",
        }
    }
}

/// A failed delivery of a batch.
#[derive(Debug)]
pub struct SinkError {
    class: SinkErrorClass,
    message: String,
    retry_after: Option<Duration>,
    is_outage: bool,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl SinkError {
    /// Creates an error with a message in lower case, without a full stop.
    pub fn new(class: SinkErrorClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), retry_after: None, is_outage: false, source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds the time that the receiver requested us to wait.
    #[must_use]
    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    /// Marks the error as an outage: the sink can take no entry now, and the try does not count as an attempt.
    #[must_use]
    pub fn as_outage(mut self) -> Self {
        self.is_outage = true;
        self
    }

    /// Returns whether the sink can take no entry now.
    pub fn is_outage(&self) -> bool {
        self.is_outage
    }

    /// Returns the class.
    pub fn class(&self) -> SinkErrorClass {
        self.class
    }

    /// Returns the time that the receiver requested us to wait.
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

/// The configuration of one sink.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum SinkConfig {
    /// Writes one line per entry to the log of the daemon.
    Log(LogConfig),
    /// Appends tamper-evident records to files.
    Audit(AuditConfig),
    /// Posts entries to an HTTP receiver.
    Webhook(WebhookConfig),
    /// Inserts rows into a table of `PostgreSQL`.
    Postgres(PostgresConfig),
    /// Appends entries to another stream of the same store.
    Stream(StreamSinkConfig),
}

impl SinkConfig {
    /// The values of `type`.
    pub const TYPES: [&str; 5] = ["log", "audit", "webhook", "postgres", "stream"];

    /// Returns the stream that the sink forwards to, if it forwards.
    pub fn forwards_to(&self) -> Option<&StreamName> {
        match self {
            Self::Stream(config) => Some(&config.stream),
            _ => None,
        }
    }

    /// Creates the sink. Opens files and takes their locks, and waits for no other machine. Sinks that forward use
    /// `forward`.
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
