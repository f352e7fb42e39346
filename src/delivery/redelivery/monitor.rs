//! One group of one stream that is guarded: that it is there, and that what its consumers left is handed on.

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
use crate::store::{Cursor, Outcome, Redelivered, Redelivery, Settlement, Start, Store, StoreError, StoreErrorKind};

/// How often a group is made sure of: it may vanish with its stream.
const ENSURE_EVERY: Duration = Duration::from_secs(5);
/// The same after a failure.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// After how long, or about that, a search that failed is tried again at the latest: until then it counts as failing.
const SEARCH_AGAIN_WITHIN: Duration = Duration::from_secs(5);
/// Between two searches of a member of a family, at least, while nothing is pending there.
const LEAST_SEARCH_EVERY: Duration = Duration::from_secs(1);
/// The most entries that one step of the search acts on.
const STEP: usize = 100;
/// Between steps of a search that found nothing, so that a long one does not keep the store busy.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// Between searches that the bell asks for: whoever rings may ring often.
const BELL_PAUSE: Duration = Duration::from_millis(50);
/// Ids that a log line names; there may be many.
const NAMED_IDS: usize = 5;

/// How often a group is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// How often it is made sure of. If never, the next search shows that it is gone.
    ensure_every: Option<Duration>,
    /// How often it is searched while nothing is pending; else more often.
    search_every: Duration,
}

impl Pace {
    /// For the group of a stream.
    pub(crate) fn of_stream(claim_idle: Duration) -> Self {
        Self { ensure_every: Some(ENSURE_EVERY), search_every: claim_idle / 4 }
    }

    /// For the group of a member of a family, of which there may be thousands.
    pub(crate) fn of_member(claim_idle: Duration) -> Self {
        Self { ensure_every: None, search_every: claim_idle.max(LEAST_SEARCH_EVERY) }
    }
}

/// A group without a sink, and what is known of it.
#[derive(Debug)]
pub(crate) struct Ward {
    store: Arc<dyn Store>,
    cursor: Cursor,
    spec: GroupSpec,
    pace: Pace,
    redelivered: IntCounter,
    dead: IntCounter,
    lost: IntCounter,
    filtered: IntCounter,
    recreated: IntCounter,
    dead_letter_trouble: ThrottledWarning,
    was_there: bool,
    floor: Option<AckFloor>,
    ensure_at: Option<Instant>,
    search_at: Instant,
    search_from: EntryId,
    /// Whether the bell rang during a search, which may have passed by what it rang for.
    was_rung: bool,
    /// Whether the guard's consumer may be in the group.
    may_have_joined: bool,
}

impl Ward {
    /// A group to be looked at now. It is counted under `label`, and `consumer` holds its entries while they are given up.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        spec: GroupSpec,
        consumer: ConsumerName,
        metrics: &Metrics,
        label: &str,
        pace: Pace,
    ) -> Self {
        let labels = [label, spec.config.name.as_str()];
        let with_reason = |reason| [labels[0], labels[1], reason];
        let crashed = DeadLetterReason::Crashed.as_str();
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
            pace,
            redelivered: metrics.redelivered.with_label_values(&labels),
            dead: metrics.dead_letters.with_label_values(&with_reason(crashed)),
            lost: metrics.lost.with_label_values(&with_reason("trimmed_pending")),
            filtered: metrics.filtered.with_label_values(&labels),
            recreated: metrics.groups_recreated.with_label_values(&labels),
            dead_letter_trouble: ThrottledWarning::default(),
            was_there: false,
            floor: None,
            ensure_at: pace.ensure_every.map(|_| now),
            search_at: now,
            search_from: EntryId::MIN,
            was_rung: false,
            may_have_joined: pace.ensure_every.is_some(),
            spec,
        }
    }

    /// Whose group it is, and its name.
    pub(crate) fn name(&self) -> (&StreamName, &GroupName) {
        (&self.cursor.stream, &self.cursor.group)
    }

    /// When the next step is due.
    pub(crate) fn next_at(&self) -> Instant {
        self.ensure_at.map_or(self.search_at, |ensure_at| ensure_at.min(self.search_at))
    }

    /// Does what is due.
    pub(crate) async fn step(&mut self) -> Result<(), StoreError> {
        let mut ensured = Ok(());
        if self.ensure_at.is_some_and(|at| at <= Instant::now()) {
            ensured = self.ensure().await;
            let pause = if ensured.is_ok() { self.pace.ensure_every } else { Some(TRY_AGAIN_AFTER) };
            self.ensure_at = pause.map(|pause| Instant::now() + pause);
        }
        if Instant::now() >= self.search_at {
            let searched = self.search().await;
            if searched.is_err() {
                self.search_at = self.search_at.min(Instant::now() + jittered(SEARCH_AGAIN_WITHIN));
            }
            return ensured.and(searched);
        }
        ensured
    }

    /// There is something to hand on.
    pub(crate) fn hear_bell(&mut self) {
        if self.search_from == EntryId::MIN {
            self.search_at = self.search_at.min(Instant::now() + BELL_PAUSE);
        } else {
            self.was_rung = true;
        }
    }

    /// There are new entries: the stream may be a new one, in which the group has still to be made.
    pub(crate) fn hear_news(&mut self) {
        self.search_at = self.search_at.min(Instant::now() + ENSURE_EVERY);
    }

    /// Gives up the guard's own consumer. Where anything is pending on it, it stays for the next life or for another guard.
    pub(crate) async fn leave(&self) {
        if !self.may_have_joined {
            return;
        }
        match self.store.remove_consumer(&self.cursor).await {
            Ok(is_removed) => debug!(is_removed, "the guard has ended"),
            Err(error) => debug!(error = %error, "the guard's consumer stays in its group"),
        }
    }

    /// Makes sure that the group is there. One that is gone begins again where it had handled everything: agents should
    /// not get all their tasks once more.
    async fn ensure(&mut self) -> Result<(), StoreError> {
        let start = match (self.was_there, self.spec.config.start) {
            (false, GroupStart::New) => Start::New,
            _ => Start::Oldest,
        };
        let (is_new, floor) = ensure_group(&*self.store, &self.cursor, start, self.floor.clone()).await?;
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        if is_new && self.was_there {
            self.recreated.inc();
            let from = self.floor.as_ref().map(|floor| floor.id.to_string());
            warn!(%stream, %group, ?from, "the group was gone: made again");
        } else if is_new {
            info!(%stream, %group, "made a group for consumers outside");
        }
        self.was_there = true;
        self.floor = floor.or(self.floor.take());
        Ok(())
    }

    /// Makes one step of the search for entries that were left.
    async fn search(&mut self) -> Result<(), StoreError> {
        let config = &self.spec.config;
        let redelivery = Redelivery { idle: config.claim_idle, max_deliveries: config.max_deliveries };
        let found = match self.store.redeliver(&self.cursor, redelivery, self.search_from, STEP).await {
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
        self.was_there = true;
        self.search_from = found.next;
        let has_found = found.handed_on + found.foreign + found.exhausted.len() + found.lost.len() > 0;
        if has_found {
            self.may_have_joined = true;
        }
        let is_over = found.next == EntryId::MIN;
        let is_rung_for = is_over && std::mem::take(&mut self.was_rung);
        self.search_at = match (is_over, has_found) {
            (true, _) if is_rung_for => Instant::now() + BELL_PAUSE,
            (true, _) => Instant::now() + jittered(self.cursor.claim_idle / 4),
            (false, false) => Instant::now() + STEP_PAUSE,
            (false, true) => Instant::now(),
        };
        self.tell(&found);
        self.give_up(found.exhausted).await?;
        if is_over {
            self.floor = read_ack_floor(&*self.store, &self.cursor).await?.or(self.floor.take());
            let has_pending = self.floor.as_ref().is_some_and(|floor| floor.has_pending);
            if !has_pending && !is_rung_for {
                self.search_at = Instant::now() + jittered(self.pace.search_every);
            }
        }
        Ok(())
    }

    fn tell(&self, found: &Redelivered) {
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        self.redelivered.inc_by(found.handed_on as u64);
        self.filtered.inc_by(found.foreign as u64);
        if found.handed_on > 0 {
            let entries = found.handed_on;
            warn!(%stream, %group, entries, "consumers left entries half done: appended again for others");
        }
        if !found.lost.is_empty() {
            self.lost.inc_by(found.lost.len() as u64);
            let first: Vec<String> = found.lost.iter().take(NAMED_IDS).map(EntryId::to_string).collect();
            let entries = found.lost.len();
            error!(%stream, %group, entries, ?first, "entries are lost: trimmed by others before they were handled");
        }
    }

    /// Moves entries to the dead letters. Those that can't be moved stay pending on the guard, and are found again.
    async fn give_up(&mut self, exhausted: Vec<Delivery>) -> Result<(), StoreError> {
        if exhausted.is_empty() {
            return Ok(());
        }
        let mut settlements = Vec::with_capacity(exhausted.len());
        for delivery in exhausted {
            let letter = self.letter(&delivery);
            if let Some(times) = self.dead_letter_trouble.occurred() {
                let (stream, group, attempts) = (&self.cursor.stream, &self.cursor.group, letter.attempts);
                warn!(
                    %stream, %group, entry.id = %letter.id, reason = %letter.reason, attempts, times,
                    "an entry goes to the dead letters"
                );
            }
            let outcome = Outcome::DeadLetter { to: self.spec.dead_letter.clone(), fields: letter.to_fields() };
            settlements.push(Settlement { delivery, outcome });
        }
        let settled = self.store.settle(&self.cursor, &settlements).await?;
        self.dead.inc_by(settled.settled as u64);
        Ok(())
    }

    /// The record of an entry, as it was before it was appended again.
    fn letter(&self, delivery: &Delivery) -> DeadLetter {
        let (stream, group, attempts) = (&self.cursor.stream, &self.cursor.group, delivery.attempt);
        let error = format!("delivered {attempts} times to consumers outside and never acknowledged");
        let reason = DeadLetterReason::Crashed;
        DeadLetter::of_first_life(&delivery.entry, stream, group, reason, error, attempts, Timestamp::now())
    }
}
