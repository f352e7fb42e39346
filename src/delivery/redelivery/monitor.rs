//! Monitor of one group: keeps the group in existence and redelivers the entries that its consumers abandoned.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use prometheus::IntCounter;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::backoff::jittered;
use crate::delivery::ack_floor::{AckFloor, ensure_group, read_ack_floor};
use crate::delivery::{GroupSpec, GroupStart};
use crate::event::{ConsumerName, DeadLetter, DeadLetterReason, Delivery, EntryId, GroupName, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::metrics::Metrics;
use crate::store::{
    Cursor, LostReason, Outcome, Redelivered, Redelivery, Settlement, Start, Store, StoreError, StoreErrorKind,
};

/// The interval at which a group is created if it is missing. It may vanish with its stream.
const ENSURE_INTERVAL: Duration = Duration::from_secs(5);
/// The pause after a failure to create the group.
const ENSURE_RETRY_DELAY: Duration = Duration::from_secs(1);
/// The approximate maximum pause after a failed search. The group counts as failing until the next search.
const MAX_SEARCH_RETRY_DELAY: Duration = Duration::from_secs(5);
/// The minimum interval between searches of a family member without pending entries.
const MIN_SEARCH_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum number of entries that one step of a search acts on.
const STEP_LIMIT: usize = 100;
/// The pause between steps that found nothing, so that a long search does not load the store.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// The delay of a search after a notification. Notifications may be frequent.
const NOTIFICATION_DELAY: Duration = Duration::from_millis(50);
/// The maximum number of ids in a log line.
const MAX_LOGGED_IDS: usize = 5;

/// The intervals at which a group is checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    /// The interval at which the group is created if it is missing. If `None`, the next search detects a missing group.
    ensure_interval: Option<Duration>,
    /// The interval between searches while no entries are pending. It is shorter otherwise.
    search_interval: Duration,
}

impl Schedule {
    /// Returns the schedule for the group of a stream.
    pub(super) fn of_stream(claim_idle: Duration) -> Self {
        Self { ensure_interval: Some(ENSURE_INTERVAL), search_interval: claim_idle / 4 }
    }

    /// Returns the schedule for the group of a family member. There may be thousands of members.
    pub(super) fn of_member(claim_idle: Duration) -> Self {
        Self { ensure_interval: None, search_interval: claim_idle.max(MIN_SEARCH_INTERVAL) }
    }
}

#[derive(Debug)]
struct RedeliveryCounters {
    redelivered: IntCounter,
    dead: IntCounter,
    lost: IntCounter,
    filtered: IntCounter,
    recreated: IntCounter,
}

impl RedeliveryCounters {
    fn new(metrics: &Metrics, labels: [&str; 2]) -> Self {
        let with_reason = |reason| [labels[0], labels[1], reason];
        let (crashed, trimmed) = (DeadLetterReason::Crashed.as_str(), LostReason::TrimmedPending.as_str());
        Self {
            redelivered: metrics.redelivered.with_label_values(&labels),
            dead: metrics.dead_letters.with_label_values(&with_reason(crashed)),
            lost: metrics.lost.with_label_values(&with_reason(trimmed)),
            filtered: metrics.filtered.with_label_values(&labels),
            recreated: metrics.groups_recreated.with_label_values(&labels),
        }
    }
}

/// Monitors a group without a sink.
#[derive(Debug)]
pub(super) struct GroupMonitor {
    store: Arc<dyn Store>,
    cursor: Cursor,
    spec: GroupSpec,
    schedule: Schedule,
    counters: RedeliveryCounters,
    dead_letter_warning: ThrottledWarning,
    /// Whether the group existed at an earlier check.
    has_existed: bool,
    floor: Option<AckFloor>,
    ensure_at: Option<Instant>,
    search_at: Instant,
    search_from: EntryId,
    /// Whether a notification came during a search, which may have passed its entry already.
    is_search_requested: bool,
    /// Whether the redeliverer's consumer may be in the group.
    may_have_joined: bool,
}

impl GroupMonitor {
    /// Creates a monitor that is due now. `consumer` holds entries of the group while they are dead-lettered.
    pub(super) fn new(
        store: Arc<dyn Store>,
        spec: GroupSpec,
        consumer: ConsumerName,
        metrics: &Metrics,
        label: &str,
        schedule: Schedule,
    ) -> Self {
        let cursor = Cursor {
            stream: spec.stream.clone(),
            group: spec.config.name.clone(),
            consumer,
            claim_idle: spec.config.claim_idle,
            lease: None,
        };
        let now = Instant::now();
        Self {
            store,
            cursor,
            schedule,
            counters: RedeliveryCounters::new(metrics, [label, spec.config.name.as_str()]),
            dead_letter_warning: ThrottledWarning::default(),
            has_existed: false,
            floor: None,
            ensure_at: schedule.ensure_interval.map(|_| now),
            search_at: now,
            search_from: EntryId::MIN,
            is_search_requested: false,
            may_have_joined: schedule.ensure_interval.is_some(),
            spec,
        }
    }

    /// Returns the stream and the name of the group.
    pub(super) fn name(&self) -> (&StreamName, &GroupName) {
        (&self.cursor.stream, &self.cursor.group)
    }

    /// Returns the time of the next check.
    pub(super) fn next_due(&self) -> Instant {
        self.ensure_at.map_or(self.search_at, |ensure_at| ensure_at.min(self.search_at))
    }

    /// Creates the group and searches for abandoned entries, as far as each is due.
    pub(super) async fn check(&mut self) -> Result<(), StoreError> {
        let mut ensured = Ok(());
        if self.ensure_at.is_some_and(|at| at <= Instant::now()) {
            ensured = self.ensure().await;
            let pause = if ensured.is_ok() { self.schedule.ensure_interval } else { Some(ENSURE_RETRY_DELAY) };
            self.ensure_at = pause.map(|pause| Instant::now() + pause);
        }
        if Instant::now() >= self.search_at {
            let searched = self.search().await;
            if searched.is_err() {
                self.search_at = self.search_at.min(Instant::now() + jittered(MAX_SEARCH_RETRY_DELAY));
            }
            return ensured.and(searched);
        }
        ensured
    }

    /// Requests a search: there are entries to redeliver.
    pub(super) fn on_notification(&mut self) {
        if self.search_from == EntryId::MIN {
            self.search_at = self.search_at.min(Instant::now() + NOTIFICATION_DELAY);
        } else {
            self.is_search_requested = true;
        }
    }

    /// Requests a search soon: the stream has new entries, and may be a new stream without the group.
    pub(super) fn on_new_entries(&mut self) {
        self.search_at = self.search_at.min(Instant::now() + ENSURE_INTERVAL);
    }

    /// Removes the redeliverer's consumer from the group. With pending entries it stays, and a later search finds them.
    pub(super) async fn leave(&self) {
        if !self.may_have_joined {
            return;
        }
        match self.store.remove_consumer(&self.cursor).await {
            Ok(is_removed) => debug!(is_removed, "redeliverer left the group"),
            Err(error) => debug!(error = %error, "redeliverer cannot leave the group"),
        }
    }

    /// Creates the group if it is missing. A lost group resumes at its ack floor, so that settled entries do not return.
    async fn ensure(&mut self) -> Result<(), StoreError> {
        let start = match (self.has_existed, self.spec.config.start) {
            (false, GroupStart::New) => Start::New,
            _ => Start::Oldest,
        };
        let (is_new, floor) = ensure_group(&*self.store, &self.cursor, start, self.floor.clone()).await?;
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        if is_new && self.has_existed {
            self.counters.recreated.inc();
            let from = self.floor.as_ref().map(|floor| floor.id.to_string());
            warn!(%stream, %group, ?from, "group was missing, created it again");
        } else if is_new {
            info!(%stream, %group, "group created for external consumers");
        }
        self.has_existed = true;
        self.floor = floor.or(self.floor.take());
        Ok(())
    }

    /// Makes one step of the search for abandoned entries.
    async fn search(&mut self) -> Result<(), StoreError> {
        let config = &self.spec.config;
        let redelivery = Redelivery { idle: config.claim_idle, max_deliveries: config.max_deliveries };
        let found = match self.store.redeliver(&self.cursor, redelivery, self.search_from, STEP_LIMIT).await {
            Ok(found) => found,
            Err(error) => {
                self.search_from = EntryId::MIN;
                self.search_at = Instant::now() + jittered(self.cursor.claim_idle / 4);
                if error.kind() == StoreErrorKind::NoGroup {
                    self.ensure_at = Some(Instant::now());
                    return Ok(());
                }
                return Err(error);
            }
        };
        self.has_existed = true;
        self.search_from = found.next;
        let has_found = found.redelivered + found.foreign + found.exhausted.len() + found.lost.len() > 0;
        if has_found {
            self.may_have_joined = true;
        }
        let is_over = found.next == EntryId::MIN;
        let is_requested = is_over && std::mem::take(&mut self.is_search_requested);
        self.search_at = match (is_over, has_found) {
            (true, _) if is_requested => Instant::now() + NOTIFICATION_DELAY,
            (true, _) => Instant::now() + jittered(self.cursor.claim_idle / 4),
            (false, false) => Instant::now() + STEP_PAUSE,
            (false, true) => Instant::now(),
        };
        self.report(&found);
        self.dead_letter(found.exhausted).await?;
        if is_over {
            self.floor = read_ack_floor(&*self.store, &self.cursor).await?.or(self.floor.take());
            let has_pending = self.floor.as_ref().is_some_and(|floor| floor.has_pending);
            if !has_pending && !is_requested {
                self.search_at = Instant::now() + jittered(self.schedule.search_interval);
            }
        }
        Ok(())
    }

    fn report(&self, found: &Redelivered) {
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        self.counters.redelivered.inc_by(found.redelivered as u64);
        self.counters.filtered.inc_by(found.foreign as u64);
        if found.redelivered > 0 {
            let entries = found.redelivered;
            warn!(%stream, %group, entries, "entries abandoned by their consumers, appended again for others");
        }
        if !found.lost.is_empty() {
            self.counters.lost.inc_by(found.lost.len() as u64);
            let first: Vec<String> = found.lost.iter().take(MAX_LOGGED_IDS).map(EntryId::to_string).collect();
            let entries = found.lost.len();
            error!(%stream, %group, entries, ?first, "entries lost: another program trimmed them before they were settled");
        }
    }

    /// Dead-letters entries. After a failure they stay pending on the redeliverer, and a later search finds them.
    async fn dead_letter(&mut self, exhausted: Vec<Delivery>) -> Result<(), StoreError> {
        if exhausted.is_empty() {
            return Ok(());
        }
        let mut settlements = Vec::with_capacity(exhausted.len());
        for delivery in exhausted {
            let letter = self.record(&delivery);
            if let Some(times) = self.dead_letter_warning.occurred() {
                let (stream, group, attempts) = (&self.cursor.stream, &self.cursor.group, letter.attempts);
                warn!(
                    %stream, %group, entry.id = %letter.id, reason = %letter.reason, attempts, times,
                    "entry has no deliveries left, dead-lettering it"
                );
            }
            let outcome = Outcome::DeadLetter { to: self.spec.dead_letter.clone(), fields: letter.to_fields() };
            settlements.push(Settlement { delivery, outcome });
        }
        let settled = self.store.settle(&self.cursor, &settlements).await?;
        self.counters.dead.inc_by(settled.settled as u64);
        Ok(())
    }

    /// Returns the dead letter of an entry, as it was before it was appended again.
    fn record(&self, delivery: &Delivery) -> DeadLetter {
        let (stream, group, attempts) = (&self.cursor.stream, &self.cursor.group, delivery.attempt);
        let error = format!("delivered {attempts} times to external consumers and never acknowledged");
        let reason = DeadLetterReason::Crashed;
        DeadLetter::of_original_entry(&delivery.entry, stream, group, reason, error, attempts, Timestamp::now())
    }
}
