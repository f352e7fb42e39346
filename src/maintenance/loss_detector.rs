//! Loss detector: finds lost entries of a stream's groups from their accounts.
//!
//! Entries that a claim finds lost, or that retention drops, are counted in that step. Entries that other programs remove
//! before delivery are counted nowhere: only the account of the group shows them, and the detector counts them then.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::event::{EntryId, GroupName};
use crate::maintenance::StreamSpec;
use crate::metrics::Metrics;
use crate::store::{Account, Balance, Consumption, GroupStatus, LostReason, Store, StoreError, StreamStatus};

/// The time for which a loss stays a warning for operators.
const WARNING_TIME: Duration = Duration::from_hours(1);

/// The status of a stream with the context of the check.
#[derive(Debug, Clone, Copy)]
pub(super) struct Observation<'a> {
    pub(super) store: &'a dyn Store,
    pub(super) metrics: &'a Metrics,
    pub(super) label: &'a str,
    pub(super) spec: &'a StreamSpec,
    pub(super) status: &'a StreamStatus,
}

/// The state of one stream between two checks.
#[derive(Debug, Default)]
pub(super) struct LossDetector {
    groups: BTreeMap<GroupName, GroupSnapshot>,
    removed_by_others: Option<u64>,
    /// The end of the warning that other programs remove entries.
    removal_warning_until: Option<Instant>,
}

/// A group at the last check.
#[derive(Debug)]
struct GroupSnapshot {
    account: Account,
    last_delivered: EntryId,
    entries_read: Option<u64>,
    published: u64,
    unsettled: u64,
    /// The number of recently lost entries, and the end of their warning.
    recent_loss: Option<(u64, Instant)>,
    difference: Option<i64>,
}

/// Returns the number of entries that other programs removed before their delivery to the group.
///
/// If only the daemon settles entries, it is the part that the account lacks, up to the number of removed entries. If
/// external consumers settle too, the account cannot lack entries. Then the server's lag shows the loss, because it still
/// counts removed entries.
fn missing(stream: &StreamStatus, group: &GroupStatus, consumption: Consumption, read_before: Option<u64>) -> u64 {
    let (Some(account), Some(removed)) = (group.account, stream.removed_by_others) else { return 0 };
    let found = account.lost(LostReason::TrimmedPending) + account.lost(LostReason::TrimmedUndelivered);
    let max = removed.saturating_sub(found);
    let missing = match consumption {
        Consumption::Inside => {
            Balance::of(stream, group, consumption).difference.map_or(0, |missing| missing.max(0).cast_unsigned())
        }
        // A counter that decreased was reset by a restart of the server.
        Consumption::Outside if group.entries_read < read_before => 0,
        Consumption::Outside => {
            group.lag.zip(group.undelivered).map_or(0, |(lag, undelivered)| lag.saturating_sub(undelivered))
        }
    };
    missing.min(max)
}

impl LossDetector {
    /// Compares the accounts with the last check, counts missing entries, and logs losses.
    pub(super) async fn check(&mut self, observation: Observation<'_>) -> Result<(), StoreError> {
        let Observation { store, spec, status, .. } = observation;
        self.check_removals(spec, status);
        for config in &spec.groups {
            let Some(group) = status.groups.iter().find(|group| group.name == config.name) else { continue };
            if group.account.is_none_or(|account| account.base.is_none()) {
                // Another program created the group, or the start of its account was unknown.
                store.ensure_group(&spec.name, &group.name, config.start.into()).await?;
            }
            let read_before = self.groups.get(&group.name).and_then(|before| before.entries_read);
            let missing = missing(status, group, config.consumption(), read_before);
            // If nothing is missing, the server counts from its state before a restart, and must be corrected.
            let is_miscounted = group.undelivered.zip(group.lag).is_some_and(|(undelivered, lag)| lag != undelivered);
            if missing > 0 || is_miscounted {
                self.write_off(observation, group, missing).await?;
            }
            self.check_group(spec, status, group, config.consumption());
        }
        self.groups.retain(|name, _| status.groups.iter().any(|group| group.name == *name));
        Ok(())
    }

    fn check_removals(&mut self, spec: &StreamSpec, status: &StreamStatus) {
        let Some(removed) = status.removed_by_others else { return };
        let known = self.removed_by_others.replace(removed).unwrap_or(removed);
        let now = Instant::now();
        if removed > known {
            if self.removal_warning_until.is_none_or(|until| until < now) {
                warn!(
                    stream = %spec.name,
                    entries = removed - known,
                    "another program removes entries of this stream (XTRIM, XADD with MAXLEN, or XDEL), so groups may \
                     lose unsettled entries; leave trimming to the retention of this bus"
                );
            }
            self.removal_warning_until = Some(now + WARNING_TIME);
        }
    }

    /// Adds the missing entries to the account of the group as lost. Only one of several instances succeeds.
    async fn write_off(
        &self,
        observation: Observation<'_>,
        group: &GroupStatus,
        missing: u64,
    ) -> Result<(), StoreError> {
        let Observation { store, metrics, label, spec, status } = observation;
        let (stream, name) = (&spec.name, &group.name);
        let known = group.account.unwrap_or_default().lost(LostReason::TrimmedUndelivered);
        if !store.write_off(stream, name, known, missing).await? || missing == 0 {
            return Ok(());
        }
        let reason = LostReason::TrimmedUndelivered.as_str();
        metrics.lost.with_label_values(&[label, name.as_str(), reason]).inc_by(missing);
        let after = self.groups.get(name).map_or(group.last_delivered, |before| before.last_delivered);
        let before = status.first_id.unwrap_or(status.last_id.next());
        error!(
            %stream, group = %name, entries = missing, %after, %before,
            "entries lost: another program removed them before their delivery to the group"
        );
        Ok(())
    }

    fn check_group(&mut self, spec: &StreamSpec, status: &StreamStatus, group: &GroupStatus, consumption: Consumption) {
        let balance = Balance::of(status, group, consumption);
        let account = group.account.unwrap_or_default();
        let before = self.groups.remove(&group.name);
        let lost = |account: &Account| account.lost.iter().sum::<u64>();
        let now = Instant::now();
        let recent = before.as_ref().and_then(|before| before.recent_loss);
        let mut recent_loss = recent.filter(|(_, until)| *until > now);
        if let Some(before) = &before {
            let is_less_published = balance.published.is_some_and(|published| published < before.published);
            if is_less_published || account.done() < before.account.done() {
                let (published, unsettled) = (before.published, before.unsettled);
                error!(
                    stream = %spec.name, group = %group.name, published, unhandled = unsettled,
                    "account restarted: the stream or the group was lost with its unsettled entries"
                );
                recent_loss = Some((unsettled, now + WARNING_TIME)).filter(|(unsettled, _)| *unsettled > 0);
            }
            let more = lost(&account).saturating_sub(lost(&before.account));
            if more > 0 {
                recent_loss = Some((recent_loss.map_or(0, |(known, _)| known) + more, now + WARNING_TIME));
            }
            let was_unbalanced = before.difference.is_some_and(|difference| difference != 0);
            if was_unbalanced && balance.difference == Some(0) {
                info!(stream = %spec.name, group = %group.name, "account adds up again");
            }
            let has_changed = before.difference != balance.difference;
            if let Some(difference) = balance.difference.filter(|difference| *difference != 0 && has_changed) {
                warn!(
                    stream = %spec.name, group = %group.name, difference,
                    "account does not add up: {}", possible_cause(difference)
                );
            }
        }
        let snapshot = GroupSnapshot {
            account,
            last_delivered: group.last_delivered,
            entries_read: group.entries_read,
            published: balance.published.unwrap_or_default(),
            unsettled: group.pending + group.undelivered.unwrap_or_default(),
            recent_loss,
            difference: balance.difference,
        };
        self.groups.insert(group.name.clone(), snapshot);
    }

    /// Returns a warning about this stream for operators, or `None` if there is no problem.
    pub(super) fn warning(&self, spec: &StreamSpec, status: &StreamStatus) -> Option<String> {
        let mut text = String::new();
        let mut add = |problem: std::fmt::Arguments<'_>| {
            let separator = if text.is_empty() { "" } else { "; " };
            write!(text, "{separator}{problem}").expect("writing to a string cannot fail");
        };
        for (name, group) in &self.groups {
            if let Some((entries, _)) = group.recent_loss {
                add(format_args!("group `{name}` lost {entries} entries within the last hour"));
            }
            if let Some(difference) = group.difference.filter(|difference| *difference != 0) {
                let cause = possible_cause(difference);
                add(format_args!("the account of group `{name}` is off by {difference}: {cause}"));
            }
        }
        for group in &status.groups {
            let is_declared = spec.groups.iter().any(|config| config.name == group.name);
            let is_removed = group.oldest_pending.zip(status.first_id).is_some_and(|(oldest, first)| oldest < first);
            let is_emptied = group.pending > 0 && status.first_id.is_none();
            if is_declared && (is_removed || is_emptied) {
                add(format_args!("group `{}` has pending entries that another program removed", group.name));
            }
        }
        for group in spec.abandoned(status) {
            add(format_args!("group `{group}` is abandoned and keeps entries from being trimmed"));
        }
        if self.removal_warning_until.is_some_and(|until| until > Instant::now()) {
            add(format_args!("another program removes entries of this stream"));
        }
        if spec.retention.is_near_full(status.length) {
            let (length, limit) = (status.length, spec.retention.hard_max_len);
            add(format_args!("the stream holds {length} entries of {limit} (retention.hard_max_len)"));
        }
        (!text.is_empty()).then_some(text)
    }
}

/// Returns a possible cause of a difference in an account.
fn possible_cause(difference: i64) -> &'static str {
    if difference > 0 {
        "another program acknowledged entries, or removed them with their consumer"
    } else {
        "the group was reset and received entries again, or the stream was restored from an older state"
    }
}
