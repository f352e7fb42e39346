//! Arrivals: entries that the store returned go to the sink, or are settled at once if the sink must not see them.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use crate::delivery::ack_floor::AckFloor;
use crate::delivery::worker::event_loop::WorkerLoop;
use crate::delivery::worker::poison::SUSPECT_PAUSE;
use crate::delivery::worker::tasks::{ClaimReason, ClaimResult, Task};
use crate::event::{AlertView, DeadLetterReason, Delivery, EntryId, Severity, field};
use crate::store::{Claimed, Outcome, Pending, Reclaimed, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// The most ids in a log line.
const LOGGED_IDS: usize = 5;

impl WorkerLoop {
    pub(crate) fn on_group_ensured(&mut self, result: Result<(bool, Option<AckFloor>), StoreError>, now: Instant) {
        self.intake.task_ended();
        match result {
            Err(error) => self.intake_failed(&error, now),
            Ok((is_new, ack_floor)) => self.intake.group_ensured(is_new, ack_floor, &self.context),
        }
    }

    pub(crate) fn on_pending_listed(&mut self, limit: usize, result: Result<Vec<Pending>, StoreError>, now: Instant) {
        self.in_flight.expectation_ended(limit);
        self.intake.task_ended();
        let page = match result {
            Ok(page) => page,
            Err(error) => return self.intake_failed(&error, now),
        };
        let Some(last) = page.last() else {
            self.intake.recovery_ended();
            return self.report(true, now);
        };
        self.intake.recover_from(last.id.next(), now, Duration::ZERO);
        let held = self.held_ids();
        let waiting: HashSet<EntryId> = self.claims.retries.waiting().collect();
        let is_held = |id: EntryId| held.contains(&id) || waiting.contains(&id) || self.claims.is_claiming(id);
        let mut left: Vec<Pending> = page.into_iter().filter(|pending| !is_held(pending.id)).collect();
        let fitting = self.fitting(left.iter().map(|pending| pending.attempts), now);
        if let Some(held_back) = left.get(fitting) {
            let pause = if fitting == 0 { SUSPECT_PAUSE } else { Duration::ZERO };
            self.intake.recover_from(held_back.id, now, pause);
            left.truncate(fitting);
        }
        let of_others = left.iter().filter(|pending| pending.consumer != self.context.cursor.consumer).count();
        self.context.metrics.claimed.inc_by(of_others as u64);
        let ids: Vec<EntryId> = left.into_iter().map(|pending| pending.id).collect();
        if !ids.is_empty() && !self.lifecycle.is_stopping() {
            self.intake.begin_claim();
            self.spawn(Task::claim(&self.context, ClaimReason::Recovery, ids));
        }
    }

    /// Returns how many entries with these attempts may be claimed now. Each one may be a poison entry.
    ///
    /// During an outage one entry is always claimed. The entries in flight were tried, and the process lives. If they
    /// kept all others away, a sink that refuses only these entries would look down for ever.
    fn fitting(&mut self, attempts: impl Iterator<Item = u32> + Clone, now: Instant) -> usize {
        if self.sink_health.is_down() {
            return 1;
        }
        let unsettled = self.unsettled();
        self.suspects.fitting(attempts, unsettled, now)
    }

    pub(crate) fn on_fetched(&mut self, limit: usize, result: Result<Vec<Delivery>, StoreError>, now: Instant) {
        self.in_flight.expectation_ended(limit);
        self.intake.task_ended();
        let deliveries = match result {
            Ok(deliveries) => deliveries,
            Err(error) => return self.intake_failed(&error, now),
        };
        let has_entries = !deliveries.is_empty();
        if let Some(deliveries) = self.intake.fetched(deliveries, now, &self.context) {
            self.admit(deliveries);
        }
        self.report(true, now);
        if has_entries {
            return self.lifecycle.stay_busy(now);
        }
        self.leave_if_idle(now);
        if self.lifecycle.is_crowded() {
            self.intake.pause_crowded(now);
        }
    }

    pub(crate) fn on_claimed(
        &mut self,
        reason: ClaimReason,
        ids: &[EntryId],
        result: Result<ClaimResult, StoreError>,
        now: Instant,
    ) {
        self.in_flight.expectation_ended(ids.len());
        match reason {
            ClaimReason::Retry => self.claims.task_ended(),
            ClaimReason::Recovery => self.intake.task_ended(),
        }
        match (result, reason) {
            (Ok(ClaimResult { claimed, not_owned }), reason) => {
                self.claims.succeeded();
                self.context.metrics.not_owned.inc_by(not_owned.len() as u64);
                let taken: HashSet<EntryId> = claimed.deliveries.iter().map(|delivery| delivery.entry.id).collect();
                for id in ids.iter().filter(|id| !taken.contains(id)) {
                    self.forget(*id);
                }
                if reason == ClaimReason::Recovery {
                    self.suspects.track(&claimed.deliveries, now);
                }
                self.take_claimed(claimed);
            }
            (Err(error), ClaimReason::Recovery) => self.intake_failed(&error, now),
            (Err(error), ClaimReason::Retry) if error.kind() == StoreErrorKind::NoGroup => {
                for id in ids {
                    self.forget(*id);
                }
                self.intake.group_missing();
            }
            (Err(error), ClaimReason::Retry) => {
                self.claims.failed(ids, now);
                self.step_failed(&error, "worker cannot claim entries for their next attempt, trying again");
            }
        }
    }

    pub(crate) fn on_searched(
        &mut self,
        limit: usize,
        result: Result<(Reclaimed, Option<AckFloor>), StoreError>,
        now: Instant,
    ) {
        self.in_flight.expectation_ended(limit);
        self.search.task_ended();
        match result {
            Ok((Reclaimed { mut claimed, next, held_back }, ack_floor)) => {
                self.intake.note_ack_floor(ack_floor);
                if self.context.is_ordered {
                    self.intake.request_recovery();
                }
                self.search.page_ended(next, !claimed.deliveries.is_empty(), now);
                self.context.metrics.claimed.inc_by(claimed.deliveries.len() as u64);
                // The claim that is under way brings these entries as well.
                claimed.deliveries.retain(|delivery| !self.claims.is_claiming(delivery.entry.id));
                self.suspects.track(&claimed.deliveries, now);
                self.take_claimed(claimed);
                self.suspects.await_suspect(held_back);
            }
            Err(error) => {
                self.search.restart(now);
                self.suspects.await_suspect(None);
                self.intake.request_recovery_after_fetch();
                self.step_failed(&error, "worker cannot search for abandoned entries, trying again");
            }
        }
    }

    pub(crate) fn on_extended(&mut self, was_uncertain: bool, result: Result<Vec<EntryId>, StoreError>, now: Instant) {
        self.ownership.extended(was_uncertain, result.is_ok(), now);
        match result {
            Err(error) => self.step_failed(&error, "worker cannot extend its entries, trying again"),
            Ok(lost) if lost.is_empty() => {}
            Ok(lost) => {
                let retries = &mut self.claims.retries;
                let waiting: Vec<EntryId> = lost.iter().copied().filter(|id| retries.forget(*id)).collect();
                for id in &waiting {
                    self.in_flight.queue.done(*id);
                }
                let dropped = self.in_flight.queue.remove(&lost) + waiting.len();
                // Entries that are with the sink are counted when they are settled.
                self.context.metrics.not_owned.inc_by(dropped as u64);
                warn!(entries = lost.len(), dropped, "entries claimed by other consumers, dropping them");
            }
        }
    }

    /// Takes claimed entries in, and reports lost ones.
    fn take_claimed(&mut self, claimed: Claimed) {
        if !claimed.lost.is_empty() {
            self.context.metrics.trimmed_pending.inc_by(claimed.lost.len() as u64);
            let first: Vec<String> = claimed.lost.iter().take(LOGGED_IDS).map(EntryId::to_string).collect();
            error!(entries = claimed.lost.len(), ?first, "entries lost, trimmed from the stream while pending");
            for id in &claimed.lost {
                self.claims.retries.forget(*id);
            }
        }
        let mut deliveries = claimed.deliveries;
        if deliveries.is_empty() {
            return;
        }
        let held = self.held_ids();
        // This consumer holds these entries already. The first delivery settles them.
        deliveries.retain(|delivery| !held.contains(&delivery.entry.id));
        for delivery in &deliveries {
            self.claims.retries.taken(delivery.entry.id);
        }
        self.admit(deliveries);
    }

    /// Queues deliveries for the sink. Entries that the sink must not see are settled at once.
    fn admit(&mut self, deliveries: Vec<Delivery>) {
        if self.lifecycle.is_stopping() {
            return self.settler.push_all(deliveries, &Outcome::Release);
        }
        let config = &self.context.group.config;
        let (max_deliveries, halts) = (config.max_deliveries, config.halts());
        let min_severity = config.min_severity.filter(|severity| *severity > Severity::Info);
        for delivery in deliveries {
            let undeliverable = if !delivery.entry.is_for(&self.context.group.config.name) {
                self.filter(delivery);
                continue;
            } else if delivery.attempt > max_deliveries {
                Some((DeadLetterReason::Crashed, format!("delivered {max_deliveries} times without a result")))
            } else {
                match passes(&delivery, min_severity) {
                    Ok(true) => None,
                    Ok(false) => {
                        self.in_flight.queue.done(delivery.entry.id);
                        self.filter(delivery);
                        continue;
                    }
                    Err(text) => Some((DeadLetterReason::Undecodable, text)),
                }
            };
            match undeliverable {
                None => self.in_flight.queue.push(delivery),
                Some((reason, error)) if halts => self.in_flight.push_undeliverable(delivery, reason, error),
                Some((reason, error)) => self.dead_letter(delivery, reason, error),
            }
        }
    }

    fn filter(&mut self, delivery: Delivery) {
        self.context.metrics.filtered.inc();
        self.settler.settlements.push(delivery, Outcome::Filter);
    }

    /// Takes note of a failed call of the intake. A lost group lease ends the worker.
    fn intake_failed(&mut self, error: &StoreError, now: Instant) {
        if !self.lifecycle.lose_lease(error) {
            self.intake.failed(error, now, &self.context);
        }
    }

    /// Takes note of any other failed call of the store. A lost group lease ends the worker.
    fn step_failed(&mut self, error: &StoreError, message: &'static str) {
        if self.lifecycle.lose_lease(error) {
            return;
        }
        if error.kind() == StoreErrorKind::NoGroup {
            self.intake.group_missing();
        } else if let Some(times) = self.step_warning.occurred() {
            warn!(error = chain(error), kind = error.kind().as_str(), times, "{message}");
        }
    }
}

/// Returns whether the sink should get the entry, or the reason why the entry cannot be read.
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
