//! Publishing: the one way in.
//!
//! Owns the catalogue of declared streams and the rules for what may be appended to them: size, idempotency, chunks.
//! Promises that an event it answers for is stored as durably as the store promises, and that a batch keeps its
//! order. Knows nothing of HTTP, groups or dashboards.

mod catalog;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

pub use crate::bus::catalog::{Catalogue, Terms};

use crate::event::{Fields, IdempotencyKey, NewEntry, NewEvent, StreamName, field};
use crate::metrics::Metrics;
use crate::sink::{Forward, SinkError, SinkErrorClass};
use crate::store::{Appended, Durability, Limits, MAX_APPEND, NotJoined, Store, StoreError, StoreErrorKind};
use crate::validate::{Problems, Validate};

/// What publishers may do.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The largest event.
    pub max_event: ByteSize,
    /// How long idempotency keys are remembered, and the longest time a publisher may ask for.
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
    /// It is larger than allowed.
    #[error("the event has {size} bytes, more than the {max} allowed (publish.max_event)")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
        /// The largest size in bytes.
        max: u64,
    },
    /// The idempotency key is empty or too long.
    #[error("an idempotency key has 1 to 256 bytes, this one has {0}")]
    Key(usize),
    /// It has no `id` of its own to recognise it by.
    #[error("the event has no text `id` to recognise it by")]
    NoId,
    /// Its stream would be one more of a family than there may be.
    #[error("{0}")]
    TooManyKeys(String),
    /// The store did not take it.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

impl From<NotJoined> for PublishError {
    fn from(error: NotJoined) -> Self {
        match error {
            NotJoined::Full { .. } => Self::TooManyKeys(error.to_string()),
            NotJoined::Store(error) => Self::Store(Arc::new(error)),
        }
    }
}

impl PublishError {
    /// The reason in one word, for metrics and clients.
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

/// How to recognise an event that comes twice.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Dedup {
    /// Not at all.
    #[default]
    Off,
    /// By this key.
    Key(String),
    /// By its own `id`.
    OwnId,
}

/// What a publisher wants beside the storing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Promise {
    /// For how long idempotency keys are remembered, if that is shorter than [`Config::dedup_window`].
    pub window: Option<Duration>,
    /// How durable the events are when they are accepted, if that is more than their stream's.
    pub durability: Durability,
}

/// The only writer.
#[derive(Debug, Clone)]
pub struct Bus {
    store: Arc<dyn Store>,
    config: Arc<Config>,
    catalogue: Arc<Catalogue>,
    limits: Limits,
    metrics: Metrics,
}

impl Bus {
    /// A bus over a store, the declared streams and their hard limits.
    pub fn new(store: Arc<dyn Store>, config: Config, catalogue: Catalogue, limits: Limits, metrics: Metrics) -> Self {
        Self { store, config: Arc::new(config), catalogue: Arc::new(catalogue), limits, metrics }
    }

    /// The declared streams.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The rules for publishers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Appends events in order; one result per event, in order.
    ///
    /// Events that break a rule are left out. When the store fails, what comes after is not tried, so that the order
    /// holds; every event answered with `Ok` is stored.
    pub async fn publish(
        &self,
        stream: &StreamName,
        events: Vec<(Dedup, NewEvent)>,
        promise: Promise,
    ) -> Vec<Result<Appended, PublishError>> {
        let timestamp = NewEntry::timestamp_now();
        let durability = promise.durability.and(self.catalogue.durability(stream));
        let window = promise.window.unwrap_or(self.config.dedup_window).min(self.config.dedup_window);
        let mut results: Vec<Option<Result<Appended, PublishError>>> = Vec::with_capacity(events.len());
        let mut chunk = Vec::with_capacity(events.len().min(MAX_APPEND));
        let mut places = Vec::with_capacity(chunk.capacity());
        let mut failed: Option<PublishError> = None;
        let mut events = events.into_iter().enumerate().peekable();
        while let Some((index, (dedup, event))) = events.next() {
            match self.entry(event, dedup, window, &timestamp) {
                Ok(entry) if failed.is_none() => {
                    places.push(index);
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
                    for (place, appended) in places.drain(..).zip(appended) {
                        results[place] = Some(Ok(appended));
                    }
                }
                Err(error) => {
                    for place in places.drain(..) {
                        results[place] = Some(Err(error.clone()));
                    }
                    failed = Some(not_tried_after(error));
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

    /// Appends up to [`MAX_APPEND`] entries as they are, all or none: those that were in a stream before.
    pub async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, PublishError> {
        self.append_durably(stream, entries, self.catalogue.durability(stream)).await
    }

    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, PublishError> {
        let families = self.catalogue.families();
        if let Some(roster) = families.of(stream) {
            roster.join(&*self.store, stream).await?;
        }
        let started = Instant::now();
        let result = self.limits.append(&*self.store, stream, entries, durability).await;
        let labels = [families.label(stream)];
        self.metrics.publish_seconds.with_label_values(&labels).observe(started.elapsed().as_secs_f64());
        // What is stored is published, also where it is not as durable as asked.
        let stored = result.as_ref().map_or_else(StoreError::stored, |_| 0);
        self.metrics.published.with_label_values(&labels).inc_by(stored);
        let appended = result.map_err(|error| PublishError::Store(Arc::new(error)))?;
        let duplicates = appended.iter().filter(|appended| appended.duplicate).count() as u64;
        self.metrics.published.with_label_values(&labels).inc_by(appended.len() as u64 - duplicates);
        self.metrics.duplicates.with_label_values(&labels).inc_by(duplicates);
        Ok(appended)
    }
}

/// What is said of events that were not tried because earlier ones failed.
fn not_tried_after(error: PublishError) -> PublishError {
    match &error {
        PublishError::Store(cause) if cause.kind() == StoreErrorKind::NotDurable => {
            let message = "the event was not stored, because earlier events of the request are not as durable as asked";
            PublishError::Store(Arc::new(StoreError::new(StoreErrorKind::Unavailable, message)))
        }
        _ => error,
    }
}

/// What groups forward goes the way of everything that is published.
#[async_trait]
impl Forward for Bus {
    async fn check(&self, stream: &StreamName) -> Result<(), SinkError> {
        if !self.catalogue.contains(stream) {
            let message = format!("the stream `{stream}` is not declared");
            return Err(SinkError::new(SinkErrorClass::Transient, message));
        }
        let checked = self.store.check().await.and_then(|_| self.limits.check(stream));
        checked.map_err(|error| refused(stream, Arc::new(error)))
    }

    async fn forward(&self, stream: &StreamName, entries: Vec<(String, Fields)>) -> Result<(), SinkError> {
        let max = self.config.max_event.as_u64();
        let window = self.config.dedup_window;
        let size = |fields: &Fields| fields.get(field::DATA).map_or(0, Bytes::len);
        if let Some(size) = entries.iter().map(|(_, fields)| size(fields)).find(|size| *size as u64 > max) {
            let error = PublishError::TooLarge { size, max };
            return Err(SinkError::new(SinkErrorClass::Permanent, error.to_string()));
        }
        // No publisher's key begins so: theirs are UTF-8. Else whoever may publish to this stream could take up the keys of
        // entries to come, which would then count as forwarded.
        let own = |key: String| [&b"\xffforwarded:"[..], key.as_bytes()].concat().into();
        let mut entries = entries
            .into_iter()
            .map(|(key, fields)| NewEntry { fields, idempotency: Some(IdempotencyKey { key: own(key), window }) })
            .peekable();
        while entries.peek().is_some() {
            let chunk = entries.by_ref().take(MAX_APPEND).collect();
            match self.append(stream, chunk).await {
                Ok(_) => {}
                Err(PublishError::Store(error)) => return Err(refused(stream, error)),
                Err(error) => return Err(SinkError::new(SinkErrorClass::Transient, error.to_string())),
            }
        }
        Ok(())
    }
}

/// None of these but a call that is wrong is the fault of an entry: the store heals, or someone makes room.
fn refused(stream: &StreamName, error: Arc<StoreError>) -> SinkError {
    let (retry_after, is_outage) = (error.retry_after(), error.kind() != StoreErrorKind::Internal);
    let refusal = SinkError::new(SinkErrorClass::Transient, format!("cannot forward to `{stream}`")).with_source(error);
    let refusal = if is_outage { refusal.as_outage() } else { refusal };
    match retry_after {
        Some(after) => refusal.with_retry_after(after),
        None => refusal,
    }
}
