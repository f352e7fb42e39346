//! Gauges of a stream and its groups, or their sums for all members of a family.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::now_ms;
use crate::event::{EntryId, GroupName};
use crate::maintenance::StreamSpec;
use crate::metrics::Metrics;
use crate::store::{Account, Balance, Consumption, GroupStatus, LostReason, StreamStatus};

/// Gauge values of one stream, or sums for many.
#[derive(Debug, Clone, Default)]
pub(super) struct StreamGauges {
    length: u64,
    removed_by_others: Option<u64>,
    groups: BTreeMap<GroupName, GroupGauges>,
}

#[derive(Debug, Clone)]
struct GroupGauges {
    lag: Option<u64>,
    pending: u64,
    oldest_pending: Option<EntryId>,
    account: Account,
    balance: Balance,
    /// Whether the group is declared. Accounts of other groups are not shown.
    is_declared: bool,
}

impl StreamGauges {
    pub(super) fn new(spec: &StreamSpec, status: &StreamStatus) -> Self {
        let group = |group: &GroupStatus| {
            let declared = spec.groups.iter().find(|config| config.name == group.name);
            let consumption = declared.map_or(Consumption::Outside, crate::delivery::GroupConfig::consumption);
            let gauges = GroupGauges {
                lag: group.undelivered.or(group.lag),
                pending: group.pending,
                oldest_pending: group.oldest_pending,
                account: group.account.unwrap_or_default(),
                balance: Balance::of(status, group, consumption),
                is_declared: declared.is_some(),
            };
            (group.name.clone(), gauges)
        };
        let groups = status.groups.iter().map(group).collect();
        Self { length: status.length, removed_by_others: status.removed_by_others, groups }
    }

    /// Returns whether any group has undelivered or pending entries.
    pub(super) fn has_unsettled(&self) -> bool {
        self.groups.values().any(|group| group.pending > 0 || group.lag.is_none_or(|lag| lag > 0))
    }

    /// Adds the values of another stream.
    pub(super) fn add(&mut self, other: &Self) {
        self.length += other.length;
        self.removed_by_others = match (self.removed_by_others, other.removed_by_others) {
            (Some(sum), Some(value)) => Some(sum + value),
            (sum, value) => sum.or(value),
        };
        for (name, group) in &other.groups {
            match self.groups.get_mut(name) {
                Some(sum) => sum.add(group),
                None => drop(self.groups.insert(name.clone(), group.clone())),
            }
        }
    }

    /// Sets the metrics under a label.
    pub(super) fn show(&self, metrics: &Metrics, label: &str) {
        metrics.stream_length.with_label_values(&[label]).set(gauge(self.length));
        if let Some(removed) = self.removed_by_others {
            metrics.removed_by_others.with_label_values(&[label]).set(gauge(removed));
        }
        for (name, group) in &self.groups {
            group.show(metrics, [label, name.as_str()]);
        }
    }
}

impl GroupGauges {
    fn add(&mut self, other: &Self) {
        let both = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
        self.lag = both(self.lag, other.lag);
        self.pending += other.pending;
        self.oldest_pending = [self.oldest_pending, other.oldest_pending].into_iter().flatten().min();
        self.account.acknowledged += other.account.acknowledged;
        self.account.filtered += other.account.filtered;
        self.account.dead += other.account.dead;
        for reason in LostReason::ALL {
            *self.account.lost_mut(reason) += other.account.lost(reason);
        }
        let (sum, added) = (&mut self.balance, &other.balance);
        sum.published = both(sum.published, added.published);
        sum.acknowledged += added.acknowledged;
        sum.undelivered = both(sum.undelivered, added.undelivered);
        // Differences with opposite signs must not cancel each other.
        sum.difference = sum
            .difference
            .zip(added.difference)
            .map(|(a, b)| if a.signum() * b.signum() < 0 { a.abs() + b.abs() } else { a + b });
    }

    fn show(&self, metrics: &Metrics, labels: [&str; 2]) {
        match self.lag {
            Some(lag) => metrics.group_lag.with_label_values(&labels).set(gauge(lag)),
            // Fails if the gauge does not exist, which is as good.
            None => drop(metrics.group_lag.remove_label_values(&labels)),
        }
        metrics.group_pending.with_label_values(&labels).set(gauge(self.pending));
        let age = self.oldest_pending.map_or(0.0, age_seconds);
        metrics.group_oldest_pending_seconds.with_label_values(&labels).set(age);
        if self.is_declared {
            self.show_account(metrics, labels);
        }
    }

    fn show_account(&self, metrics: &Metrics, labels: [&str; 2]) {
        let Self { account, balance, .. } = self;
        let set = |term: &str, value: Option<u64>| {
            let labels = [labels[0], labels[1], term];
            match value {
                Some(value) => metrics.account_entries.with_label_values(&labels).set(gauge(value)),
                // Fails if the gauge does not exist, which is as good.
                None => drop(metrics.account_entries.remove_label_values(&labels)),
            }
        };
        set("published", balance.published);
        set("acknowledged", Some(balance.acknowledged));
        set("filtered", Some(account.filtered));
        set("dead", Some(account.dead));
        set("pending", Some(self.pending));
        set("undelivered", balance.undelivered);
        for reason in LostReason::ALL {
            set(&format!("lost_{}", reason.as_str()), Some(account.lost(reason)));
        }
        match balance.difference {
            Some(difference) => metrics.account_difference.with_label_values(&labels).set(difference),
            None => drop(metrics.account_difference.remove_label_values(&labels)),
        }
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Returns the age of an entry.
fn age_seconds(id: EntryId) -> f64 {
    Duration::from_millis(now_ms().saturating_sub(id.ms)).as_secs_f64()
}
