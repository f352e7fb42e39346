//! Retention: old entries go, but never one that a group has still to handle.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::event::{EntryId, StreamName};
use crate::store::{Store, StoreError, StoreErrorKind, Trim};

/// How often streams are trimmed.
const TRIM_EVERY: Duration = Duration::from_secs(5);

/// What a stream keeps. Entries that a declared group has not acknowledged are kept beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Entries kept, the newest.
    pub max_len: u64,
    /// How long entries are kept.
    #[serde(with = "humantime_serde")]
    pub max_age: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { max_len: 10_000, max_age: Duration::from_hours(7 * 24) }
    }
}

/// Trims every stream to its retention, again and again.
#[derive(Debug)]
pub struct Janitor {
    store: Arc<dyn Store>,
    streams: Vec<(StreamName, Retention)>,
}

impl Janitor {
    /// For these streams.
    pub fn new(store: Arc<dyn Store>, streams: Vec<(StreamName, Retention)>) -> Self {
        Self { store, streams }
    }

    /// Runs until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        // Told once each: what is wrong with a stream stays wrong for a while.
        let mut failing = BTreeSet::new();
        loop {
            tokio::select! {
                () = tokio::time::sleep(TRIM_EVERY) => {}
                () = stop.cancelled() => return,
            }
            for (stream, retention) in &self.streams {
                match self.trim(stream, *retention).await {
                    Ok(removed) => {
                        if failing.remove(stream) {
                            tracing::info!(stream = %stream, "trims the stream again");
                        }
                        if removed > 0 {
                            tracing::debug!(stream = %stream, removed, "trimmed to its retention");
                        }
                    }
                    // The store's own watch tells when it is away.
                    Err(error) if error.kind() == StoreErrorKind::Unavailable => {}
                    Err(error) => {
                        if failing.insert(stream) {
                            tracing::warn!(stream = %stream, error = %error, "cannot trim; trying again");
                        }
                    }
                }
            }
        }
    }

    async fn trim(&self, stream: &StreamName, retention: Retention) -> Result<u64, StoreError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let oldest = now.saturating_sub(retention.max_age).as_millis();
        let oldest = EntryId::new(u64::try_from(oldest).unwrap_or(u64::MAX), 0);
        let by_age = self.store.trim(stream, Trim::Before(oldest)).await?;
        Ok(by_age + self.store.trim(stream, Trim::ToLength(retention.max_len)).await?)
    }
}
