//! Removing consumers that are gone for good: programs that take a new name with each start leave one behind each time.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::GroupSpec;
use super::patience::{Trouble, jittered};
use crate::event::{ConsumerName, StreamName};
use crate::metrics::Metrics;
use crate::store::{Cursor, Store, StoreError};

/// How often groups are looked through at most, and at least.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_mins(1));
/// The most consumers of one group that are removed at a time.
const STEP: usize = 100;

/// Removes consumers of the configured groups that have nothing pending and have asked for nothing for long.
///
/// Nothing is lost by it: the store looks again whether anything is pending in the same step, and a consumer that is
/// alive after all comes back with the next entry it is given. Some servers don't count a read that brought nothing as a
/// sign of life, so a consumer of a quiet stream may be removed and come back.
#[derive(Debug)]
pub struct Reaper {
    store: Arc<dyn Store>,
    groups: Vec<GroupSpec>,
    own: HashSet<ConsumerName>,
    metrics: Metrics,
    trouble: Trouble,
}

impl Reaper {
    /// For these groups. Consumers of the names in `own` are this daemon's, and are never removed.
    pub fn new(store: Arc<dyn Store>, groups: Vec<GroupSpec>, own: HashSet<ConsumerName>, metrics: Metrics) -> Self {
        Self { store, groups, own, metrics, trouble: Trouble::default() }
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let shortest = self.groups.iter().map(|group| group.config.reap_after).min().unwrap_or(PAUSES.1);
        let pause = (shortest / 4).clamp(PAUSES.0, PAUSES.1);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered(pause)) => {}
            }
            let streams: HashSet<StreamName> = self.groups.iter().map(|group| group.stream.clone()).collect();
            let mut has_failed = false;
            for stream in &streams {
                if let Err(error) = self.reap(stream).await {
                    has_failed = true;
                    if let Some(times) = self.trouble.occurred() {
                        warn!(%stream, error = %error, times, "cannot look for consumers that are gone");
                    }
                }
            }
            if !has_failed {
                self.trouble.ended();
            }
        }
    }

    async fn reap(&self, stream: &StreamName) -> Result<(), StoreError> {
        let Some(status) = self.store.describe(stream).await? else { return Ok(()) };
        for spec in self.groups.iter().filter(|spec| spec.stream == *stream) {
            let config = &spec.config;
            let Some(group) = status.groups.iter().find(|group| group.name == config.name) else { continue };
            let gone = group.consumers.iter().filter(|consumer| {
                consumer.pending == 0 && consumer.idle >= config.reap_after && !self.own.contains(&consumer.name)
            });
            let labels = [stream.as_str(), config.name.as_str()];
            for consumer in gone.take(STEP) {
                let cursor = Cursor {
                    stream: stream.clone(),
                    group: config.name.clone(),
                    consumer: consumer.name.clone(),
                    claim_idle: config.claim_idle,
                    lease: None,
                };
                if self.store.remove_consumer(&cursor).await? {
                    self.metrics.consumers_reaped.with_label_values(&labels).inc();
                    info!(%stream, group = %config.name, consumer = %consumer.name, "removed a consumer that is gone");
                }
            }
        }
        Ok(())
    }
}
