//! Reaper: removes idle consumers. Programs that use a new name at each start leave one behind each time.

use std::collections::HashSet;

use tracing::info;

use crate::event::ConsumerName;
use crate::maintenance::StreamSpec;
use crate::metrics::Metrics;
use crate::store::{Cursor, Store, StoreError, StreamStatus};

/// The maximum number of consumers of one group that a check removes.
const MAX_REMOVED: usize = 100;

/// Removes consumers of declared groups that have no pending entries and are idle for `reap_after`.
///
/// No entry is lost: the store checks for pending entries again in the same step, and a removed consumer returns with its
/// next entry. Some servers do not count an empty read as activity, so a live consumer of a quiet stream may be removed.
#[derive(Debug)]
pub(super) struct Reaper {
    own: HashSet<ConsumerName>,
    metrics: Metrics,
}

impl Reaper {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { own: HashSet::new(), metrics }
    }

    /// Sets the names of this daemon's consumers, which are never removed.
    pub(super) fn set_own_consumers(&mut self, own: HashSet<ConsumerName>) {
        self.own = own;
    }

    pub(super) async fn reap(
        &self,
        store: &dyn Store,
        spec: &StreamSpec,
        label: &str,
        status: Option<&StreamStatus>,
    ) -> Result<(), StoreError> {
        let Some(status) = status else { return Ok(()) };
        for config in &spec.groups {
            let Some(group) = status.groups.iter().find(|group| group.name == config.name) else { continue };
            let idle = group.consumers.iter().filter(|consumer| {
                consumer.pending == 0 && consumer.idle >= config.reap_after && !self.own.contains(&consumer.name)
            });
            let labels = [label, config.name.as_str()];
            for consumer in idle.take(MAX_REMOVED) {
                let cursor = Cursor {
                    stream: spec.name.clone(),
                    group: config.name.clone(),
                    consumer: consumer.name.clone(),
                    claim_idle: config.claim_idle,
                    lease: None,
                };
                if store.remove_consumer(&cursor).await? {
                    self.metrics.consumers_reaped.with_label_values(&labels).inc();
                    let (stream, group) = (&spec.name, &config.name);
                    info!(%stream, %group, consumer = %consumer.name, "idle consumer removed");
                }
            }
        }
        Ok(())
    }
}
