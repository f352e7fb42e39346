//! Publishing: every event enters the store through the bus.
//!
//! Owns the catalog of declared streams and the rules for events: size, idempotency and chunks. Promises that each
//! accepted event is stored with the promised durability, and that a batch keeps its order. Knows nothing of HTTP, groups
//! or dashboards.

mod catalog;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

pub use crate::bus::catalog::{StreamCatalog, StreamSettings};

use crate::event::{Fields, IdempotencyKey, NewEntry, NewEvent, StreamName, field};
use crate::metrics::Metrics;
use crate::sink::{Forward, SinkError, SinkErrorClass};
use crate::store::{Appended, Durability, HardLimits, MAX_APPEND, JoinError, Store, StoreError, StoreErrorKind};
use crate::validate::{Problems, Validate};

/// The limits for producers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The maximum size of an event.
    pub max_event: ByteSize,
    /// The time for which idempotency keys are remembered. A producer may request a shorter one.
    #[serde(with = "humantime_serde")]
    pub dedup_window: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_event: ByteSize::mib(1), dedup_window: Duration::from_hours(24) }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let sizes = 1..=ByteSize::mib(64).as_u64();
        problems.require(sizes.contains(&self.max_event.as_u64()), "max_event", "must be from 1B to 64MiB");
        problems.require(self.dedup_window >= Duration::from_secs(1), "dedup_window", "must be at least 1s");
    }
}

/// Why an event was not accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    /// The event is larger than the limit.
    #[error("the event has {size} bytes; at most {max} are allowed (publish.max_event)")]
    TooLarge {
        /// Size of the event in bytes.
        size: usize,
        /// The limit in bytes.
        max: u64,
    },
    /// The idempotency key is empty or too long.
    #[error("an idempotency key must have 1 to 256 bytes, not {0}")]
    Key(usize),
    /// The event has no `id`, which should be its idempotency key.
    #[error("the event has no text `id` to use as its idempotency key")]
    NoId,
    /// The family of the stream has no room for another key.
    #[error("{0}")]
    TooManyKeys(String),
    /// The store failed or refused the event.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

impl From<JoinError> for PublishError {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Full { .. } => Self::TooManyKeys(error.to_string()),
            JoinError::Store(error) => Self::Store(Arc::new(error)),
        }
    }
}

impl PublishError {
    /// Returns the reason as a short code, for metrics and clients.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "event_too_large",
            Self::Key(_) => "invalid_idempotency_key",
            Self::NoId => "event_without_id",
            Self::TooManyKeys(_) => "too_many_keys",
            Self::Store(_) => "store",
        }
    }
}

/// The idempotency key of an event, if it has one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Dedup {
    /// No key: the event is always stored.
    #[default]
    Off,
    /// This key.
    Key(String),
    /// The event's own `id`.
    OwnId,
}

/// Options of a publish request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PublishOptions {
    /// The time for which idempotency keys are remembered, if shorter than [`Config::dedup_window`].
    pub window: Option<Duration>,
    /// The durability of accepted events, if it exceeds that of their stream.
    pub durability: Durability,
}

/// Appends events to declared streams.
#[derive(Debug, Clone)]
pub struct Bus {
    store: Arc<dyn Store>,
    config: Arc<Config>,
    catalog: Arc<StreamCatalog>,
    limits: HardLimits,
    metrics: Metrics,
}

impl Bus {
    /// Creates a bus over a store, the declared streams and their hard limits.
    pub fn new(
        store: Arc<dyn Store>,
        config: Config,
        catalog: StreamCatalog,
        limits: HardLimits,
        metrics: Metrics,
    ) -> Self {
        Self { store, config: Arc::new(config), catalog: Arc::new(catalog), limits, metrics }
    }

    /// Returns the declared streams.
    pub fn catalog(&self) -> &StreamCatalog {
        &self.catalog
    }

    /// Returns the limits for producers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Appends events in order. Returns one result per event, in the same order.
    ///
    /// Skips events that break a rule. After a failure of the store the remaining events are not tried, so that the
    /// order holds. Every event with the result `Ok` is stored.
    pub async fn publish(
        &self,
        stream: &StreamName,
        events: Vec<(Dedup, NewEvent)>,
        options: PublishOptions,
    ) -> Vec<Result<Appended, PublishError>> {
        let timestamp = NewEntry::timestamp_now();
        let durability = options.durability.and(self.catalog.durability(stream));
        let window = options.window.unwrap_or(self.config.dedup_window).min(self.config.dedup_window);
        let mut results: Vec<Option<Result<Appended, PublishError>>> = Vec::with_capacity(events.len());
        let mut chunk = Vec::with_capacity(events.len().min(MAX_APPEND));
        let mut indexes = Vec::with_capacity(chunk.capacity());
        let mut failed: Option<PublishError> = None;
        let mut events = events.into_iter().enumerate().peekable();
        while let Some((index, (dedup, event))) = events.next() {
            match self.entry(event, dedup, window, &timestamp) {
                Ok(entry) if failed.is_none() => {
                    indexes.push(index);
                    chunk.push(entry);
                    results.push(None);
                }
                Ok(_) => results.push(failed.clone().map(Err)),
                Err(error) => results.push(Some(Err(error))),
            }
            let is_due = chunk.len() == MAX_APPEND || events.peek().is_none();
            if !is_due || chunk.is_empty() {
                continue;
            }
            match self.append_durably(stream, std::mem::take(&mut chunk), durability).await {
                Ok(appended) => {
                    for (index, appended) in indexes.drain(..).zip(appended) {
                        results[index] = Some(Ok(appended));
                    }
                }
                Err(error) => {
                    for index in indexes.drain(..) {
                        results[index] = Some(Err(error.clone()));
                    }
                    failed = Some(error_of_untried(error));
                }
            }
        }
        results.into_iter().flatten().collect()
    }

    fn entry(
        &self,
        event: NewEvent,
        dedup: Dedup,
        window: Duration,
        timestamp: &Bytes,
    ) -> Result<NewEntry, PublishError> {
        let max = self.config.max_event.as_u64();
        if event.data.len() as u64 > max {
            return Err(PublishError::TooLarge { size: event.data.len(), max });
        }
        let key = match dedup {
            Dedup::Off => None,
            Dedup::Key(key) => Some(key),
            Dedup::OwnId => Some(event.own_id.clone().ok_or(PublishError::NoId)?),
        };
        if let Some(key) = key.as_ref().filter(|key| !(1..=256).contains(&key.len())) {
            return Err(PublishError::Key(key.len()));
        }
        let idempotency = key.map(|key| IdempotencyKey { key: key.into(), window });
        Ok(event.into_entry(timestamp, idempotency))
    }

    /// Appends up to [`MAX_APPEND`] entries of other streams unchanged, all or none.
    pub async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, PublishError> {
        self.append_durably(stream, entries, self.catalog.durability(stream)).await
    }

    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, PublishError> {
        let families = self.catalog.families();
        if let Some(family_members) = families.of(stream) {
            family_members.join(&*self.store, stream).await?;
        }
        let started = Instant::now();
        let result = self.limits.append(&*self.store, stream, entries, durability).await;
        let labels = [families.label(stream)];
        self.metrics.publish_seconds.with_label_values(&labels).observe(started.elapsed().as_secs_f64());
        // Stored entries count as published, even if their durability was not confirmed.
        let stored = result.as_ref().map_or_else(StoreError::stored, |_| 0);
        self.metrics.published.with_label_values(&labels).inc_by(stored);
        let appended = result.map_err(|error| PublishError::Store(Arc::new(error)))?;
        let duplicates = appended.iter().filter(|appended| appended.duplicate).count() as u64;
        self.metrics.published.with_label_values(&labels).inc_by(appended.len() as u64 - duplicates);
        self.metrics.duplicates.with_label_values(&labels).inc_by(duplicates);
        Ok(appended)
    }
}

/// Returns the error of events that were not tried because an earlier event failed.
fn error_of_untried(error: PublishError) -> PublishError {
    match &error {
        PublishError::Store(cause) if cause.kind() == StoreErrorKind::NotDurable => {
            let message =
                "the event was not stored because the durability of earlier events of the request was not confirmed";
            PublishError::Store(Arc::new(StoreError::new(StoreErrorKind::Unavailable, message)))
        }
        _ => error,
    }
}

/// Forwarded entries obey the same rules as published events.
#[async_trait]
impl Forward for Bus {
    async fn check(&self, stream: &StreamName) -> Result<(), SinkError> {
        if !self.catalog.contains(stream) {
            let message = format!("the stream `{stream}` is not declared");
            return Err(SinkError::new(SinkErrorClass::Transient, message));
        }
        let checked = self.store.check().await.and_then(|_| self.limits.check(stream));
        checked.map_err(|error| forward_error(stream, Arc::new(error)))
    }

    async fn forward(&self, stream: &StreamName, entries: Vec<(String, Fields)>) -> Result<(), SinkError> {
        let max = self.config.max_event.as_u64();
        let window = self.config.dedup_window;
        let size = |fields: &Fields| fields.get(field::DATA).map_or(0, Bytes::len);
        if let Some(size) = entries.iter().map(|(_, fields)| size(fields)).find(|size| *size as u64 > max) {
            let error = PublishError::TooLarge { size, max };
            return Err(SinkError::new(SinkErrorClass::Permanent, error.to_string()));
        }
        // The prefix is not UTF-8, so no producer's key can begin with it. Otherwise a producer could use the key of a
        // later entry, which would then count as a duplicate and not be forwarded.
        let own = |key: String| [&b"\xffforwarded:"[..], key.as_bytes()].concat().into();
        let mut entries = entries
            .into_iter()
            .map(|(key, fields)| NewEntry { fields, idempotency: Some(IdempotencyKey { key: own(key), window }) })
            .peekable();
        while entries.peek().is_some() {
            let chunk = entries.by_ref().take(MAX_APPEND).collect();
            match self.append(stream, chunk).await {
                Ok(_) => {}
                Err(PublishError::Store(error)) => return Err(forward_error(stream, error)),
                Err(error) => return Err(SinkError::new(SinkErrorClass::Transient, error.to_string())),
            }
        }
        Ok(())
    }
}

/// Converts a failure to append. Only an internal error is the fault of the entries; every other one is an outage.
fn forward_error(stream: &StreamName, error: Arc<StoreError>) -> SinkError {
    let (retry_after, is_outage) = (error.retry_after(), error.kind() != StoreErrorKind::Internal);
    let failure = SinkError::new(SinkErrorClass::Transient, format!("cannot forward to `{stream}`")).with_source(error);
    let failure = if is_outage { failure.as_outage() } else { failure };
    match retry_after {
        Some(after) => failure.with_retry_after(after),
        None => failure,
    }
}
