//! The figures of a stream and its groups, or of all streams of a family together, as they go into the metrics.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::now_ms;
use crate::event::{EntryId, GroupName};
use crate::maintenance::retention::StreamSpec;
use crate::metrics::Metrics;
use crate::store::{Account, Balance, Consumption, LostReason, StreamStatus};

/// The figures of one stream, or the sum of those of many.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    length: u64,
    removed_by_others: Option<u64>,
    groups: BTreeMap<GroupName, GroupFigures>,
}

#[derive(Debug, Clone)]
struct GroupFigures {
    lag: Option<u64>,
    pending: u64,
    oldest_pending: Option<EntryId>,
    account: Account,
    balance: Balance,
    /// Whether the group is declared here: the accounts of others are not shown.
    is_declared: bool,
}

impl Figures {
    pub(crate) fn of(spec: &StreamSpec, status: &StreamStatus) -> Self {
        let group = |group: &crate::store::GroupStatus| {
            let declared = spec.groups.iter().find(|config| config.name == group.name);
            let consumption = declared.map_or(Consumption::Outside, crate::delivery::GroupConfig::consumption);
            let figures = GroupFigures {
                lag: group.undelivered.or(group.lag),
                pending: group.pending,
                oldest_pending: group.oldest_pending,
                account: group.account.unwrap_or_default(),
                balance: Balance::of(status, group, consumption),
                is_declared: declared.is_some(),
            };
            (group.name.clone(), figures)
        };
        let groups = status.groups.iter().map(group).collect();
        Self { length: status.length, removed_by_others: status.removed_by_others, groups }
    }

    /// Whether any group has something to do, so that the figures will change.
    pub(crate) fn is_busy(&self) -> bool {
        self.groups.values().any(|group| group.pending > 0 || group.lag.is_none_or(|lag| lag > 0))
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.length += other.length;
        self.removed_by_others = match (self.removed_by_others, other.removed_by_others) {
            (Some(ours), Some(theirs)) => Some(ours + theirs),
            (ours, theirs) => ours.or(theirs),
        };
        for (name, theirs) in &other.groups {
            match self.groups.get_mut(name) {
                Some(ours) => ours.add(theirs),
                None => drop(self.groups.insert(name.clone(), theirs.clone())),
            }
        }
    }

    /// Shows the figures under that label.
    pub(crate) fn show(&self, metrics: &Metrics, label: &str) {
        metrics.stream_length.with_label_values(&[label]).set(gauge(self.length));
        if let Some(removed) = self.removed_by_others {
            metrics.removed_by_others.with_label_values(&[label]).set(gauge(removed));
        }
        for (name, group) in &self.groups {
            group.show(metrics, [label, name.as_str()]);
        }
    }
}

impl GroupFigures {
    fn add(&mut self, other: &Self) {
        let both = |ours: Option<u64>, theirs: Option<u64>| ours.zip(theirs).map(|(ours, theirs)| ours + theirs);
        self.lag = both(self.lag, other.lag);
        self.pending += other.pending;
        self.oldest_pending = [self.oldest_pending, other.oldest_pending].into_iter().flatten().min();
        self.account.acknowledged += other.account.acknowledged;
        self.account.filtered += other.account.filtered;
        self.account.dead += other.account.dead;
        for reason in LostReason::ALL {
            *self.account.lost_mut(reason) += other.account.lost(reason);
        }
        let (ours, theirs) = (&mut self.balance, &other.balance);
        ours.published = both(ours.published, theirs.published);
        ours.acknowledged += theirs.acknowledged;
        ours.undelivered = both(ours.undelivered, theirs.undelivered);
        // One that has too much does not make up for another that has too little.
        ours.difference = ours
            .difference
            .zip(theirs.difference)
            .map(|(a, b)| if a.signum() * b.signum() < 0 { a.abs() + b.abs() } else { a + b });
    }

    fn show(&self, metrics: &Metrics, labels: [&str; 2]) {
        match self.lag {
            Some(lag) => metrics.group_lag.with_label_values(&labels).set(gauge(lag)),
            // Where there is no such gauge, it is absent already.
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
                // Where there is no such gauge, it is absent already.
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

/// How long ago the entry was stored.
fn age_seconds(id: EntryId) -> f64 {
    Duration::from_millis(now_ms().saturating_sub(id.ms)).as_secs_f64()
}
