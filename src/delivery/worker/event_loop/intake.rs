//! The steps of the loop: each is started as a task, and its end changes what is in hand.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::delivery::GroupStart;
use crate::delivery::ack_floor::{AckFloor, ensure_group};
use crate::delivery::worker::event_loop::claims::{ClaimReason, ClaimResult};
use crate::delivery::worker::event_loop::poison::SUSPECT_PAUSE;
use crate::delivery::worker::event_loop::{
    CLAIM_LIMIT, EXTEND_LIMIT, FETCH_BYTES, FETCH_WAIT, IntakePhase, WorkerLoop,
};
use crate::delivery::worker::settlements::SettlementBatch;
use crate::delivery::worker::sink_call::{Delivered, guarded};
use crate::event::{AlertView, DeadLetterReason, Delivery, EntryId, Severity, field};
use crate::store::{Outcome, Pending, Reclaimed, Settled, Start, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// Between fetches that don't wait, while the sink has still something and others wait for the room.
const CROWDED_PAUSE: Duration = Duration::from_millis(50);

/// How a task ended.
#[derive(Debug)]
pub(crate) enum TaskResult {
    Ensured(Result<(bool, Option<AckFloor>), StoreError>),
    Looked { limit: usize, result: Result<Vec<Pending>, StoreError> },
    Fetched { limit: usize, result: Result<Vec<Delivery>, StoreError> },
    TookOver { purpose: ClaimReason, ids: Vec<EntryId>, result: Result<ClaimResult, StoreError> },
    Searched { limit: usize, result: Result<(Reclaimed, Option<AckFloor>), StoreError> },
    Extended { was_in_doubt: bool, result: Result<Vec<EntryId>, StoreError> },
    Delivered { slot: u64, delivered: Delivered },
    Settled { is_dead_letters: bool, load: SettlementBatch, result: Result<Settled, StoreError> },
}

impl WorkerLoop {
    pub(crate) fn take(&mut self, done: TaskResult) {
        match done {
            TaskResult::Ensured(result) => self.ensured(result),
            TaskResult::Looked { limit, result } => self.looked(limit, result),
            TaskResult::Fetched { limit, result } => self.fetched(limit, result),
            TaskResult::TookOver { purpose, ids, result } => self.took_over(purpose, &ids, result),
            TaskResult::Searched { limit, result } => self.searched(limit, result),
            TaskResult::Extended { was_in_doubt, result } => self.extended(was_in_doubt, result),
            TaskResult::Delivered { slot, delivered } => self.delivered(slot, delivered),
            TaskResult::Settled { is_dead_letters, load, result } => self.settled(is_dead_letters, load, result),
        }
    }

    // Getting entries: the group, what is left over, what is new.

    pub(crate) fn start_intake(&mut self, now: Instant) {
        if !self.may_take_in() || now < self.intake_not_before {
            return;
        }
        let (store, cursor) = (self.store.clone(), self.cursor.clone());
        match self.intake {
            IntakePhase::EnsureGroup => {
                let floor = self.floor.clone();
                let start = match (self.was_ensured, self.group.config.start) {
                    (false, GroupStart::New) => Start::New,
                    _ => Start::Oldest,
                };
                self.tasks.spawn(async move {
                    TaskResult::Ensured(asked(ensure_group(&*store, &cursor, start, floor)).await)
                });
            }
            IntakePhase::RecoverPending(from) => {
                let limit = self.free_slots().min(CLAIM_LIMIT).max(self.probe_slots());
                if limit == 0 {
                    return;
                }
                self.expected += limit;
                let own_only = !self.is_ordered;
                self.tasks.spawn(async move {
                    let result = asked(store.pending(&cursor, own_only, from, limit)).await;
                    TaskResult::Looked { limit, result }
                });
            }
            IntakePhase::Fetch => {
                let fit = (FETCH_BYTES / self.entry_bytes).max(1);
                let limit = self.free_slots().min(self.group.config.batch).min(fit).max(self.probe_slots());
                if limit == 0 {
                    return;
                }
                self.expected += limit;
                self.fetch_began = Some(now);
                let wait = if self.is_crowded() { Duration::ZERO } else { FETCH_WAIT };
                self.tasks.spawn(async move {
                    let result = asked(store.fetch(&cursor, limit, wait)).await;
                    TaskResult::Fetched { limit, result }
                });
            }
        }
        self.intake_under_way = true;
    }

    fn ensured(&mut self, result: Result<(bool, Option<AckFloor>), StoreError>) {
        self.intake_under_way = false;
        match result {
            Err(error) => self.intake_failed(&error),
            Ok((is_new, floor)) => {
                if is_new && self.was_ensured {
                    self.meters.groups_recreated.inc();
                    let from = self.floor.as_ref().map(|floor| floor.id.to_string());
                    warn!(?from, "the group was gone: made again");
                } else if is_new {
                    info!("the group was made");
                }
                self.was_ensured = true;
                self.floor = floor.or(self.floor.take());
                self.intake = IntakePhase::RecoverPending(EntryId::MIN);
                self.sweep_due = false;
            }
        }
    }

    fn looked(&mut self, limit: usize, result: Result<Vec<Pending>, StoreError>) {
        self.expected -= limit;
        self.intake_under_way = false;
        let page = match result {
            Ok(page) => page,
            Err(error) => return self.intake_failed(&error),
        };
        let Some(last) = page.last() else {
            self.intake = IntakePhase::Fetch;
            return self.report(true);
        };
        self.intake = IntakePhase::RecoverPending(last.id.next());
        let in_hand = self.in_hand_ids();
        let waiting: std::collections::HashSet<EntryId> = self.retries.waiting().collect();
        let is_held = |id: &EntryId| in_hand.contains(id) || waiting.contains(id) || self.claiming.contains(id);
        let mut left: Vec<Pending> = page.into_iter().filter(|pending| !is_held(&pending.id)).collect();
        // One of these may be what the process dies of each time, and its neighbours must not share its fate: for
        // everything that is taken counts one more attempt.
        let fitting = self.fitting(left.iter().map(|pending| pending.attempts));
        if let Some(held_back) = left.get(fitting) {
            self.intake = IntakePhase::RecoverPending(held_back.id);
            if fitting == 0 {
                self.intake_not_before = Instant::now() + SUSPECT_PAUSE;
            }
            left.truncate(fitting);
        }
        let others = left.iter().filter(|pending| pending.consumer != self.cursor.consumer).count();
        self.meters.claimed.inc_by(others as u64);
        let ids: Vec<EntryId> = left.into_iter().map(|pending| pending.id).collect();
        if !ids.is_empty() && !self.is_stopping() {
            self.intake_under_way = true;
            self.start_taking_over(ClaimReason::Sweep, ids);
        }
    }

    fn fetched(&mut self, limit: usize, result: Result<Vec<Delivery>, StoreError>) {
        self.expected -= limit;
        self.intake_under_way = false;
        let began = self.fetch_began.take();
        match result {
            Err(error) => self.intake_failed(&error),
            Ok(deliveries) => {
                self.intake_succeeded();
                self.guess_entry_bytes(&deliveries);
                let has_come = !deliveries.is_empty();
                self.is_at_end = !has_come;
                // An answer that lay about for so long, as when this process stood still, may be of entries that
                // others have by now: the sweep finds those that they have not.
                let is_stale = began.is_some_and(|began| began.elapsed() > FETCH_WAIT + self.cursor.claim_idle / 2);
                if is_stale {
                    self.sweep_due = true;
                } else {
                    self.admit(deliveries);
                }
                if std::mem::take(&mut self.sweep_due) {
                    self.intake = IntakePhase::RecoverPending(EntryId::MIN);
                }
                self.report(true);
                if has_come {
                    self.busy_at = Instant::now();
                } else {
                    self.leave_if_idle();
                    if self.is_crowded() {
                        self.intake_not_before = Instant::now() + CROWDED_PAUSE;
                    }
                }
            }
        }
    }

    fn intake_succeeded(&mut self) {
        self.intake_backoff.reset();
        self.intake_error = None;
        if let Some(after) = self.intake_trouble.ended() {
            info!(?after, "the worker reads its stream again");
        }
    }

    pub(crate) fn intake_failed(&mut self, error: &StoreError) {
        if self.loses_lease(error) {
            return;
        }
        let text = chain(error);
        if let Some(times) = self.intake_trouble.occurred() {
            warn!(error = text, kind = error.kind().as_str(), times, "the worker cannot read its stream");
        }
        self.part.not_ready(text.clone());
        self.intake_error = Some(text);
        // An answer that was lost may have made entries ours: they come before new ones.
        let is_group_gone = error.kind() == StoreErrorKind::NoGroup || self.intake == IntakePhase::EnsureGroup;
        self.intake = if is_group_gone { IntakePhase::EnsureGroup } else { IntakePhase::RecoverPending(EntryId::MIN) };
        let wait = self.intake_backoff.next_delay().max(error.retry_after().unwrap_or_default());
        self.intake_not_before = Instant::now() + wait;
    }

    /// Large entries are fetched in smaller batches, so that memory stays bounded.
    fn guess_entry_bytes(&mut self, deliveries: &[Delivery]) {
        if deliveries.is_empty() {
            return;
        }
        let bytes: usize = deliveries.iter().map(|delivery| delivery.entry.fields.size_bytes()).sum();
        let average = (bytes / deliveries.len()).max(1);
        // Up at once, down by and by.
        self.entry_bytes = average.max(usize::midpoint(self.entry_bytes, average));
    }

    /// Takes deliveries in hand: to the sink, or settled at once where the sink is not to see them.
    pub(crate) fn admit(&mut self, deliveries: Vec<Delivery>) {
        if self.is_stopping() {
            return self.hand_back(deliveries, &Outcome::Release);
        }
        let max_deliveries = self.group.config.max_deliveries;
        let min_severity = self.group.config.min_severity.filter(|severity| *severity > Severity::Info);
        for delivery in deliveries {
            if !delivery.entry.is_for(&self.group.config.name) {
                self.meters.filtered.inc();
                self.settlements.push(delivery, Outcome::Filter);
                continue;
            }
            let unfit = if delivery.attempt > max_deliveries {
                Some((DeadLetterReason::Crashed, format!("delivered {max_deliveries} times without a result")))
            } else {
                match passes(&delivery, min_severity) {
                    Ok(true) => None,
                    Ok(false) => {
                        self.meters.filtered.inc();
                        self.ready.done(delivery.entry.id);
                        self.settlements.push(delivery, Outcome::Filter);
                        continue;
                    }
                    Err(text) => Some((DeadLetterReason::Undecodable, text)),
                }
            };
            match unfit {
                None => self.ready.push(delivery),
                // The group stops there when its turn comes.
                Some(unfit) if self.group.config.halts() => {
                    self.unfit.insert(delivery.entry.id, unfit);
                    self.ready.push(delivery);
                }
                Some((reason, text)) => self.bury(delivery, reason, text),
            }
        }
    }

    // Signs of life.

    pub(crate) fn start_extending(&mut self) {
        let claim_idle = self.group.config.claim_idle;
        self.extend_at = Instant::now() + claim_idle / 3;
        let was_in_doubt = self.is_in_doubt;
        let age = if was_in_doubt { Duration::ZERO } else { claim_idle / 4 };
        let ready = self.ready.iter().filter(|delivery| delivery.delivered_at.elapsed() > age);
        let ready = ready.map(|delivery| delivery.entry.id);
        let running = self.running.iter().filter(|running| running.oldest.elapsed() > age);
        let running = running.flat_map(|running| running.ids.iter().copied());
        let outboxes = self.settlements.older_than(age).chain(self.dead_letters.older_than(age));
        let mut ids: Vec<EntryId> = ready.chain(running).chain(outboxes).collect();
        if self.breaker.is_open() {
            ids.extend(self.retries.waiting());
        } else {
            ids.extend(self.retries.waiting_long());
        }
        if ids.is_empty() {
            self.is_in_doubt = false;
            return;
        }
        self.is_extending = true;
        let (store, cursor) = (self.store.clone(), self.cursor.clone());
        self.tasks.spawn(async move {
            let extend = async {
                let mut gone = Vec::new();
                for page in ids.chunks(EXTEND_LIMIT) {
                    gone.extend(store.extend(&cursor, page).await?);
                }
                Ok(gone)
            };
            TaskResult::Extended { was_in_doubt, result: asked(extend).await }
        });
    }

    fn extended(&mut self, was_in_doubt: bool, result: Result<Vec<EntryId>, StoreError>) {
        self.is_extending = false;
        if self.is_in_doubt && (!was_in_doubt || result.is_err()) {
            self.extend_at = Instant::now();
        }
        if was_in_doubt && result.is_ok() {
            self.is_in_doubt = false;
        }
        match result {
            Err(error) => {
                // There is time for several more tries before anyone takes the entries over.
                self.extend_at = Instant::now() + self.group.config.claim_idle / 12;
                self.step_failed(&error, "the worker cannot keep the entries in its hands");
            }
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => {
                let waiting: Vec<EntryId> = gone.iter().copied().filter(|id| self.retries.forget(*id)).collect();
                for id in &waiting {
                    self.ready.done(*id);
                }
                let dropped = self.ready.remove(&gone) + waiting.len();
                // Those that the sink has now are counted when they are settled.
                self.meters.not_owned.inc_by(dropped as u64);
                warn!(entries = gone.len(), dropped, "others have taken over entries of this worker");
            }
        }
    }

    pub(crate) fn group_is_gone(&mut self) {
        if !self.intake_under_way {
            self.intake = IntakePhase::EnsureGroup;
        }
    }

    /// Another life of this name may have been there: what is pending on it is looked through again.
    pub(crate) fn doubt(&mut self) {
        match self.intake {
            IntakePhase::Fetch | IntakePhase::RecoverPending(_) if !self.intake_under_way => {
                self.intake = IntakePhase::RecoverPending(EntryId::MIN)
            }
            _ => self.sweep_due = true,
        }
    }

    /// Whether the error says that the group's lease is lost, and with it everything in hand.
    pub(crate) fn loses_lease(&mut self, error: &StoreError) -> bool {
        let is_lost = error.kind() == StoreErrorKind::LeaseLost;
        if is_lost {
            self.is_lease_lost = true;
        }
        is_lost
    }

    pub(crate) fn step_failed(&mut self, error: &StoreError, message: &'static str) {
        if self.loses_lease(error) {
            return;
        }
        if error.kind() == StoreErrorKind::NoGroup {
            self.group_is_gone();
        } else if let Some(times) = self.step_trouble.occurred() {
            warn!(error = chain(error), kind = error.kind().as_str(), times, "{message}");
        }
    }
}

/// Whether the sink is to have the entry; the error says why nobody can read it.
fn passes(delivery: &Delivery, min_severity: Option<Severity>) -> Result<bool, String> {
    let entry = &delivery.entry;
    let data = entry.data().ok_or("the entry has no field `data`")?;
    let Some(min_severity) = min_severity else { return Ok(true) };
    let named = entry.fields.text(field::SEVERITY).and_then(|text| text.parse::<Severity>().ok());
    let severity = match named {
        Some(severity) => Some(severity),
        None => AlertView::parse(data).map_err(|error| format!("`data` is not one JSON object: {error}"))?.severity,
    };
    Ok(severity.is_none_or(|severity| severity >= min_severity))
}

/// Asks the store. Should it panic, that fails this call only.
pub(crate) async fn asked<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let panicked = |panic| Err(StoreError::new(StoreErrorKind::Internal, format!("the store panicked: {panic}")));
    guarded(call).await.unwrap_or_else(panicked)
}
