//! The guard of a group whose consumers live outside the daemon.
//!
//! Keeps the group declared, so that nothing is missed while no consumer runs. Hands on what consumers left half done:
//! most of them read new entries only, so the entry is appended again for this group. What was delivered too often goes
//! to the dead letters. Any number of daemons may guard one group; the store lets one of them act on each entry.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use prometheus::IntCounter;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::patience::{Trouble, jittered};
use super::pump::{Floor, ensure, floor};
use super::{GroupSpec, GroupStart};
use crate::event::{ConsumerName, DeadLetter, DeadLetterReason, Delivery, EntryId};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::store::{Cursor, Outcome, Redelivered, Redelivery, Settlement, Start, Store, StoreError, StoreErrorKind};

/// How often a group is made sure of: it may vanish with its stream.
const ENSURE_EVERY: Duration = Duration::from_secs(5);
/// The same after a failure.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// The most entries that one step of the search acts on.
const STEP: usize = 100;
/// Between steps of a search that found nothing, so that a long one does not keep the store busy.
const STEP_PAUSE: Duration = Duration::from_millis(100);
/// Between searches that the bell asks for: whoever rings may ring often.
const BELL_PAUSE: Duration = Duration::from_millis(50);
/// Ids that a log line names; there may be many.
const NAMED_IDS: usize = 5;
/// How long giving up the guard's own consumer may take at the end.
const LEAVE_TIME: Duration = Duration::from_secs(5);

/// Guards one group without a sink.
#[derive(Debug)]
pub struct Guard {
    store: Arc<dyn Store>,
    cursor: Cursor,
    spec: GroupSpec,
    part: Part,
    redelivered: IntCounter,
    dead: IntCounter,
    lost: IntCounter,
    filtered: IntCounter,
    recreated: IntCounter,
    trouble: Trouble,
    dead_letter_trouble: Trouble,
    was_ensured: bool,
    floor: Option<Floor>,
    ensure_at: Instant,
    search_at: Instant,
    search_from: EntryId,
    bell: Arc<Notify>,
    /// Whether the bell rang during a search, which may have passed by what it rang for.
    was_rung: bool,
}

impl Guard {
    /// A guard that is not running yet.
    ///
    /// `consumer` is the name under which it holds entries while it gives them up.
    pub fn new(store: Arc<dyn Store>, spec: GroupSpec, consumer: ConsumerName, metrics: &Metrics, part: Part) -> Self {
        let labels = [spec.stream.as_str(), spec.config.name.as_str()];
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
            part,
            redelivered: metrics.redelivered.with_label_values(&labels),
            dead: metrics.dead_letters.with_label_values(&with_reason(crashed)),
            lost: metrics.lost.with_label_values(&with_reason("trimmed_pending")),
            filtered: metrics.filtered.with_label_values(&labels),
            recreated: metrics.groups_recreated.with_label_values(&labels),
            trouble: Trouble::default(),
            dead_letter_trouble: Trouble::default(),
            was_ensured: false,
            floor: None,
            ensure_at: now,
            search_at: now,
            search_from: EntryId::MIN,
            bell: Arc::default(),
            was_rung: false,
            spec,
        }
    }

    /// The same with a bell: when it rings, there is something to hand on.
    #[must_use]
    pub fn with_bell(mut self, bell: Arc<Notify>) -> Self {
        self.bell = bell;
        self
    }

    /// Guards until `stop`; what it is about to do then, it finishes.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            self.step().await;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = tokio::time::sleep_until(self.ensure_at.min(self.search_at)) => {}
                () = self.bell.notified() => self.hear_bell(),
            }
        }
        // Where anything is pending on it, it stays for the next life or for another guard.
        match timeout(LEAVE_TIME, self.store.remove_consumer(&self.cursor)).await {
            Ok(Ok(is_removed)) => debug!(is_removed, "the guard has ended"),
            Ok(Err(error)) => debug!(error = %error, "the guard's consumer stays in its group"),
            Err(_elapsed) => debug!("the guard's consumer stays in its group: the store does not answer"),
        }
    }

    async fn step(&mut self) {
        if Instant::now() >= self.ensure_at {
            let result = self.ensure().await;
            let pause = if result.is_ok() { ENSURE_EVERY } else { TRY_AGAIN_AFTER };
            self.ensure_at = Instant::now() + pause;
            self.report(result);
        }
        if Instant::now() >= self.search_at {
            let result = self.search().await;
            self.report(result);
        }
    }

    fn hear_bell(&mut self) {
        if self.search_from == EntryId::MIN {
            self.search_at = self.search_at.min(Instant::now() + BELL_PAUSE);
        } else {
            self.was_rung = true;
        }
    }

    fn report(&mut self, result: Result<(), StoreError>) {
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        match result {
            Ok(()) => {
                self.part.ready();
                if let Some(after) = self.trouble.ended() {
                    info!(%stream, %group, ?after, "guards the group again");
                }
            }
            Err(error) => {
                if let Some(times) = self.trouble.occurred() {
                    let kind = error.kind().as_str();
                    warn!(%stream, %group, error = %error, kind, times, "cannot guard the group");
                }
                self.part.not_ready(error.to_string());
            }
        }
    }

    /// Makes sure that the group is there. One that is gone begins again where it had handled everything: agents should
    /// not get all their tasks once more.
    async fn ensure(&mut self) -> Result<(), StoreError> {
        let start = match (self.was_ensured, self.spec.config.start) {
            (false, GroupStart::New) => Start::New,
            _ => Start::Oldest,
        };
        let (is_new, floor) = ensure(&*self.store, &self.cursor, start, self.floor.clone()).await?;
        let (stream, group) = (&self.cursor.stream, &self.cursor.group);
        if is_new && self.was_ensured {
            self.recreated.inc();
            let from = self.floor.as_ref().map(|floor| floor.id.to_string());
            warn!(%stream, %group, ?from, "the group was gone: made again");
        } else if is_new {
            info!(%stream, %group, "made a group for consumers outside");
        }
        self.was_ensured = true;
        self.floor = floor.or(self.floor.take());
        Ok(())
    }

    /// Makes one step of the search for entries that were left.
    async fn search(&mut self) -> Result<(), StoreError> {
        let tick = jittered(self.cursor.claim_idle / 4);
        let config = &self.spec.config;
        let redelivery = Redelivery { idle: config.claim_idle, max_deliveries: config.max_deliveries };
        let found = match self.store.redeliver(&self.cursor, redelivery, self.search_from, STEP).await {
            Ok(found) => found,
            Err(error) => {
                self.search_from = EntryId::MIN;
                self.search_at = Instant::now() + tick;
                if error.kind() == StoreErrorKind::NoGroup {
                    self.ensure_at = Instant::now();
                    return Ok(());
                }
                return Err(error);
            }
        };
        self.search_from = found.next;
        let has_found = found.handed_on + found.foreign + found.exhausted.len() + found.lost.len() > 0;
        let is_over = found.next == EntryId::MIN;
        self.search_at = match (is_over, has_found) {
            (true, _) if std::mem::take(&mut self.was_rung) => Instant::now() + BELL_PAUSE,
            (true, _) => Instant::now() + tick,
            (false, false) => Instant::now() + STEP_PAUSE,
            (false, true) => Instant::now(),
        };
        self.tell(&found);
        self.give_up(found.exhausted).await?;
        if found.next == EntryId::MIN {
            self.floor = floor(&*self.store, &self.cursor).await?.or(self.floor.take());
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
