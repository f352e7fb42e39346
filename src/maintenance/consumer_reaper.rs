//! Removing consumers that are gone for good: programs that take a new name with each start leave one behind each time.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::jittered;
use crate::delivery::{GroupConfig, GroupSpec};
use crate::event::{ConsumerName, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::maintenance::FamilySpec;
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
    families: Vec<FamilySpec>,
    own: HashSet<ConsumerName>,
    metrics: Metrics,
    trouble: ThrottledWarning,
}

impl Reaper {
    /// For these groups. Consumers of the names in `own` are this daemon's, and are never removed.
    pub fn new(store: Arc<dyn Store>, groups: Vec<GroupSpec>, own: HashSet<ConsumerName>, metrics: Metrics) -> Self {
        Self { store, groups, families: Vec::new(), own, metrics, trouble: ThrottledWarning::default() }
    }

    /// The same also for the members of these families.
    #[must_use]
    pub fn with_families(mut self, families: impl IntoIterator<Item = FamilySpec>) -> Self {
        self.families = families.into_iter().collect();
        self
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let of_families = self.families.iter().flat_map(|family| &family.groups);
        let configs = self.groups.iter().map(|group| &group.config).chain(of_families);
        let shortest = configs.map(|config| config.reap_after).min().unwrap_or(PAUSES.1);
        let pause = (shortest / 4).clamp(PAUSES.0, PAUSES.1);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered(pause)) => {}
            }
            let mut has_failed = false;
            for (stream, label, groups) in self.streams() {
                if let Err(error) = self.reap(&stream, &label, &groups).await {
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

    /// Every stream as it is now, what it is counted under, and its groups.
    fn streams(&self) -> Vec<(StreamName, String, Vec<GroupConfig>)> {
        let mut fixed: BTreeMap<StreamName, Vec<GroupConfig>> = BTreeMap::new();
        for group in &self.groups {
            fixed.entry(group.stream.clone()).or_default().push(group.config.clone());
        }
        let fixed = fixed.into_iter().map(|(stream, groups)| (stream.clone(), stream.to_string(), groups));
        let of_family = |family: &FamilySpec| {
            let member = |stream| (stream, family.label().to_owned(), family.groups.clone());
            family.roster.members().into_iter().map(member).collect::<Vec<_>>()
        };
        fixed.chain(self.families.iter().flat_map(of_family)).collect()
    }

    async fn reap(&self, stream: &StreamName, label: &str, groups: &[GroupConfig]) -> Result<(), StoreError> {
        let Some(status) = self.store.describe(stream).await? else { return Ok(()) };
        for config in groups {
            let Some(group) = status.groups.iter().find(|group| group.name == config.name) else { continue };
            let gone = group.consumers.iter().filter(|consumer| {
                consumer.pending == 0 && consumer.idle >= config.reap_after && !self.own.contains(&consumer.name)
            });
            let labels = [label, config.name.as_str()];
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
