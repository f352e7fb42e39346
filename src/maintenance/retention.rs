//! Janitor: trims streams to their retention. Unsettled entries stay, unless the hard limit drops them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tracing::{debug, error, info, warn};

use crate::clock;
use crate::delivery::GroupConfig;
use crate::event::{EntryId, GroupName, StreamName};
use crate::maintenance::{StreamSpec, WhenFull};
use crate::metrics::Metrics;
use crate::store::{Dropped, HardLimits, LostReason, Store, StoreError, StreamStatus, Trim};

/// The maximum time for which one check drops entries of a stream.
const MAX_DROP_TIME: Duration = Duration::from_secs(2);

/// Trims streams to their retention, and keeps the known lengths for the limits of producers.
#[derive(Debug)]
pub(super) struct Janitor {
    limits: HardLimits,
    metrics: Metrics,
    /// The full streams that were logged.
    full: BTreeSet<StreamName>,
    /// The abandoned groups that were logged.
    abandoned: BTreeMap<StreamName, Vec<GroupName>>,
}

impl Janitor {
    pub(super) fn new(limits: HardLimits, metrics: Metrics) -> Self {
        Self { limits, metrics, full: BTreeSet::new(), abandoned: BTreeMap::new() }
    }

    /// Returns the known length of a stream. Must be read before the stream is described.
    pub(super) fn known_length(&self, stream: &StreamName) -> u64 {
        self.limits.known(stream)
    }

    /// Trims a stream to its retention. Returns its length after the trim.
    pub(super) async fn enforce(
        &mut self,
        store: &dyn Store,
        spec: &StreamSpec,
        label: &str,
        known_length: u64,
        status: Option<&StreamStatus>,
    ) -> Result<u64, StoreError> {
        let StreamSpec { name: stream, retention, .. } = spec;
        let Some(status) = status else {
            self.limits.report(stream, known_length, 0, None);
            return Ok(0);
        };
        // Nothing is trimmed before each declared group exists: a new group must receive the entries that are there.
        let exists = |group: &GroupConfig| status.groups.iter().any(|existing| existing.name == group.name);
        if let Some(group) = spec.groups.iter().find(|group| !exists(group)) {
            self.limits.report(stream, known_length, status.length, Some(group.name.clone()));
            return Ok(status.length);
        }
        let abandoned = spec.abandoned(status);
        self.report_abandoned(spec, label, &abandoned);
        let ignored = if retention.ignore_abandoned { abandoned } else { Vec::new() };
        let oldest_ms = u128::from(clock::now_ms()).saturating_sub(retention.max_age.as_millis());
        let oldest = EntryId::new(u64::try_from(oldest_ms).unwrap_or(u64::MAX), 0);
        let mut removed = 0;
        if status.first_id.is_some_and(|first| first < oldest) {
            removed += store.trim_past(stream, Trim::Before(oldest), &ignored).await?;
        }
        if status.length.saturating_sub(removed) > retention.max_len {
            removed += store.trim_past(stream, Trim::ToLength(retention.max_len), &ignored).await?;
        }
        if removed > 0 {
            debug!(stream = %stream, removed, "stream trimmed to its retention");
        }
        let is_over = status.length.saturating_sub(removed) > retention.hard_max_len;
        if is_over && retention.when_full == WhenFull::DropOldest {
            removed += self.drop_oldest(store, spec, label).await?;
        }
        let length = status.length.saturating_sub(removed);
        let holder = status.floor_holder(&ignored).map(|group| group.name.clone());
        self.report_full(spec, length, holder.as_ref());
        self.limits.report(stream, known_length, length, holder);
        Ok(length)
    }

    /// Drops the entries above the hard limit, step by step.
    async fn drop_oldest(&self, store: &dyn Store, spec: &StreamSpec, label: &str) -> Result<u64, StoreError> {
        let started = std::time::Instant::now();
        let mut total = Dropped::default();
        let outcome = loop {
            match store.drop_oldest(&spec.name, spec.retention.hard_max_len).await {
                Ok(step) => {
                    let is_more = step.is_more;
                    add(&mut total, step);
                    if !is_more || started.elapsed() > MAX_DROP_TIME {
                        break Ok(total.removed);
                    }
                }
                Err(error) => break Err(error),
            }
        };
        if let Some((first, last)) = total.range {
            let (stream, removed) = (&spec.name, total.removed);
            warn!(stream = %stream, removed, %first, %last, "stream full, oldest entries dropped");
        }
        for loser in &total.losses {
            let labels = [label, loser.group.as_str(), LostReason::Dropped.as_str()];
            self.metrics.lost.with_label_values(&labels).inc_by(loser.pending + loser.undelivered);
            error!(
                stream = %spec.name,
                group = %loser.group,
                pending = loser.pending,
                undelivered = loser.undelivered,
                "entries lost: dropped from a full stream before the group settled them"
            );
        }
        outcome
    }

    fn report_full(&mut self, spec: &StreamSpec, length: u64, holder: Option<&GroupName>) {
        let StreamSpec { name: stream, retention, .. } = spec;
        let limit = retention.hard_max_len;
        if retention.publish_limit().is_none() || length < limit {
            if !retention.is_near_full(length) && self.full.remove(stream) {
                info!(stream = %stream, length, "stream has room again, accepting events");
            }
        } else if self.full.insert(stream.clone()) {
            let group = holder.map(GroupName::as_str);
            error!(stream = %stream, length, limit, group, "stream full, rejecting events");
        }
    }

    fn report_abandoned(&mut self, spec: &StreamSpec, label: &str, abandoned: &[GroupName]) {
        let stream = &spec.name;
        let known = self.abandoned.insert(stream.clone(), abandoned.to_vec()).unwrap_or_default();
        for group in abandoned {
            self.metrics.group_abandoned.with_label_values(&[label, group.as_str()]).set(1);
            if !known.contains(group) {
                let (after, ignored) = (spec.retention.abandoned_after, spec.retention.ignore_abandoned);
                warn!(
                    stream = %stream, group = %group, ?after, ignored,
                    "undeclared group without activity keeps entries from being trimmed; destroy it, declare it, or set \
                     retention.ignore_abandoned"
                );
            }
        }
        for group in known.iter().filter(|group| !abandoned.contains(group)) {
            // Fails if the gauge does not exist, which is as good.
            drop(self.metrics.group_abandoned.remove_label_values(&[label, group.as_str()]));
        }
    }
}

fn add(total: &mut Dropped, step: Dropped) {
    total.removed += step.removed;
    total.range = match (total.range, step.range) {
        (Some((first, _)), Some((_, last))) => Some((first, last)),
        (known, new) => known.or(new),
    };
    for loser in step.losses {
        match total.losses.iter_mut().find(|known| known.group == loser.group) {
            Some(known) => {
                known.pending += loser.pending;
                known.undelivered += loser.undelivered;
            }
            None => total.losses.push(loser),
        }
    }
}
