//! Whether the accounts of a stream's groups add up, and what is lost where they do not.
//!
//! What a claim finds lost, or a drop takes away, is counted where it happens. What others remove before a group was
//! given it happens nowhere: it shows only in that the account does not add up, and is counted here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::delivery::GroupConfig;
use crate::event::{EntryId, GroupName};
use crate::maintenance::retention::StreamSpec;
use crate::metrics::Metrics;
use crate::store::{Account, Balance, Consumption, GroupStatus, LostReason, Store, StoreError, StreamStatus};

/// How long a loss is news to operators.
const NEWS: Duration = Duration::from_hours(1);

impl GroupConfig {
    /// Who settles the group's entries.
    pub fn consumption(&self) -> Consumption {
        if self.sink.is_some() { Consumption::Inside } else { Consumption::Outside }
    }
}

/// What is remembered of one stream between two looks at it.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    groups: BTreeMap<GroupName, Seen>,
    removed_by_others: Option<u64>,
    /// Until when it is news that others remove entries.
    others_until: Option<Instant>,
}

/// A group as it was at the last look.
#[derive(Debug)]
struct Seen {
    account: Account,
    last_delivered: EntryId,
    entries_read: Option<u64>,
    published: u64,
    unhandled: u64,
    /// Entries lost since they became news, and until when they are.
    news: Option<(u64, Instant)>,
    /// The difference at the last look: one that stays is no slip.
    difference: Option<i64>,
}

/// How many entries a group misses that were removed by others before it was given them.
///
/// Where the daemon alone settles, they are what the account lacks, as far as others removed anything at all. Where
/// others settle too, the account can't lack anything, and only the server's own count tells: it still counts the
/// entries that are gone.
fn missing(stream: &StreamStatus, group: &GroupStatus, consumption: Consumption, read_before: Option<u64>) -> u64 {
    let (Some(account), Some(removed)) = (group.account, stream.removed_by_others) else { return 0 };
    let found = account.lost(LostReason::TrimmedPending) + account.lost(LostReason::TrimmedUndelivered);
    let at_most = removed.saturating_sub(found);
    let missing = match consumption {
        Consumption::Inside => {
            Balance::of(stream, group, consumption).difference.map_or(0, |missing| missing.max(0).cast_unsigned())
        }
        // A count that went back was forgotten when the server was restarted.
        Consumption::Outside if group.entries_read < read_before => 0,
        Consumption::Outside => {
            group.lag.zip(group.undelivered).map_or(0, |(lag, undelivered)| lag.saturating_sub(undelivered))
        }
    };
    missing.min(at_most)
}

impl Ledger {
    /// Looks at the accounts: counts what is missing under `label`, and tells of losses.
    pub(crate) async fn look(
        &mut self,
        store: &dyn Store,
        metrics: &Metrics,
        label: &str,
        spec: &StreamSpec,
        status: &StreamStatus,
    ) -> Result<(), StoreError> {
        self.look_at_others(spec, status);
        for config in &spec.groups {
            let Some(group) = status.groups.iter().find(|group| group.name == config.name) else { continue };
            if group.account.is_none_or(|account| account.base.is_none()) {
                // The group was made by others, or where its account begins was not known yet.
                store.ensure_group(&spec.name, &group.name, config.start.into()).await?;
            }
            let seen = self.groups.get(&group.name).and_then(|seen| seen.entries_read);
            let missing = missing(status, group, config.consumption(), seen);
            let is_miscounted = group.undelivered.zip(group.lag).is_some_and(|(there, lag)| lag != there);
            // Where nothing is missing, the server counts from what it remembers of before its restart.
            if missing > 0 || is_miscounted {
                self.write_off(store, metrics, label, spec, status, group, missing).await?;
            }
            self.look_at_group(spec, status, group, config.consumption());
        }
        self.groups.retain(|name, _| status.groups.iter().any(|group| group.name == *name));
        Ok(())
    }

    fn look_at_others(&mut self, spec: &StreamSpec, status: &StreamStatus) {
        let Some(removed) = status.removed_by_others else { return };
        let stream = &spec.name;
        let known = self.removed_by_others.replace(removed).unwrap_or(removed);
        let now = Instant::now();
        if removed > known {
            if self.others_until.is_none_or(|until| until < now) {
                warn!(
                    stream = %stream,
                    entries = removed - known,
                    "others remove entries from this stream (XTRIM, XADD with MAXLEN, or XDEL): what a group has still \
                     to handle may get lost; leave trimming to the retention of this bus"
                );
            }
            self.others_until = Some(now + NEWS);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the places where it is counted, and what")]
    async fn write_off(
        &self,
        store: &dyn Store,
        metrics: &Metrics,
        label: &str,
        spec: &StreamSpec,
        status: &StreamStatus,
        group: &GroupStatus,
        missing: u64,
    ) -> Result<(), StoreError> {
        let (stream, name) = (&spec.name, &group.name);
        let known = group.account.unwrap_or_default().lost(LostReason::TrimmedUndelivered);
        if !store.write_off(stream, name, known, missing).await? {
            // Another instance was faster, and tells.
            return Ok(());
        }
        if missing == 0 {
            return Ok(());
        }
        let reason = LostReason::TrimmedUndelivered.as_str();
        metrics.lost.with_label_values(&[label, name.as_str(), reason]).inc_by(missing);
        let after = self.groups.get(name).map_or(group.last_delivered, |seen| seen.last_delivered);
        let before = status.first_id.unwrap_or(status.last_id.next());
        error!(
            %stream, group = %name, entries = missing, %after, %before,
            "entries are lost: removed by others before the group was given them"
        );
        Ok(())
    }

    fn look_at_group(
        &mut self,
        spec: &StreamSpec,
        status: &StreamStatus,
        group: &GroupStatus,
        consumption: Consumption,
    ) {
        let balance = Balance::of(status, group, consumption);
        let account = group.account.unwrap_or_default();
        let before = self.groups.remove(&group.name);
        let lost = |account: &Account| account.lost.iter().sum::<u64>();
        let now = Instant::now();
        let mut news = before.as_ref().and_then(|seen| seen.news).filter(|(_, until)| *until > now);
        if let Some(seen) = &before {
            let is_less_published = balance.published.is_some_and(|published| published < seen.published);
            if is_less_published || account.done() < seen.account.done() {
                let (published, unhandled) = (seen.published, seen.unhandled);
                error!(
                    stream = %spec.name, group = %group.name, published, unhandled,
                    "the group's account began anew: its stream or the group itself was lost, with what it had still to handle"
                );
                news = Some((unhandled, now + NEWS)).filter(|(unhandled, _)| *unhandled > 0);
            }
            let more = lost(&account).saturating_sub(lost(&seen.account));
            if more > 0 {
                news = Some((news.map_or(0, |(known, _)| known) + more, now + NEWS));
            }
            let was_unbalanced = seen.difference.is_some_and(|difference| difference != 0);
            if was_unbalanced && balance.difference == Some(0) {
                info!(stream = %spec.name, group = %group.name, "the group's account adds up again");
            }
            let is_new = seen.difference != balance.difference;
            if let Some(difference) = balance.difference.filter(|difference| *difference != 0 && is_new) {
                warn!(
                    stream = %spec.name, group = %group.name, difference,
                    "the group's account does not add up: {}", why(difference)
                );
            }
        }
        let seen = Seen {
            account,
            last_delivered: group.last_delivered,
            entries_read: group.entries_read,
            published: balance.published.unwrap_or_default(),
            unhandled: group.pending + group.undelivered.unwrap_or_default(),
            news,
            difference: balance.difference,
        };
        self.groups.insert(group.name.clone(), seen);
    }

    /// What an operator should know of this stream, in words; nothing when all is as it should be.
    pub(crate) fn warning(&self, spec: &StreamSpec, status: &StreamStatus) -> Option<String> {
        let mut text = String::new();
        let mut say = |line: std::fmt::Arguments<'_>| {
            let comma = if text.is_empty() { "" } else { "; " };
            write!(text, "{comma}{line}").expect("a string takes everything");
        };
        for (name, seen) in &self.groups {
            if let Some((entries, _)) = seen.news {
                say(format_args!("group `{name}` lost {entries} entries within the last hour"));
            }
            if let Some(difference) = seen.difference.filter(|difference| *difference != 0) {
                say(format_args!("the account of group `{name}` is off by {difference}: {}", why(difference)));
            }
        }
        for group in &status.groups {
            let is_declared = spec.groups.iter().any(|config| config.name == group.name);
            let is_bodiless = group.oldest_pending.zip(status.first_id).is_some_and(|(oldest, first)| oldest < first);
            let is_emptied = group.pending > 0 && status.first_id.is_none();
            if is_declared && (is_bodiless || is_emptied) {
                say(format_args!("group `{}` has pending entries that others removed", group.name));
            }
        }
        for group in spec.abandoned(status) {
            say(format_args!("group `{group}` is abandoned and keeps entries from being trimmed"));
        }
        if self.others_until.is_some_and(|until| until > Instant::now()) {
            say(format_args!("others remove entries from this stream"));
        }
        if spec.retention.is_near_full(status.length) {
            let (length, limit) = (status.length, spec.retention.hard_max_len);
            say(format_args!("the stream holds {length} entries of {limit} (retention.hard_max_len)"));
        }
        (!text.is_empty()).then_some(text)
    }
}

/// What a difference may come from.
fn why(difference: i64) -> &'static str {
    if difference > 0 {
        "entries were acknowledged outside of the daemon, or taken away with their consumer"
    } else {
        "entries were delivered again after the group was set back, or counted before the stream was restored"
    }
}
