//! Outcomes of deliveries: the result of the sink, the verdict on it, and the settlement in the store.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::random_fraction;
use crate::delivery::policy::Verdict;
use crate::delivery::worker::event_loop::WorkerLoop;
use crate::delivery::worker::settlements::SettlementBatch;
use crate::delivery::worker::sink_call::{CallFailure, SinkCallResult};
use crate::event::{DeadLetter, DeadLetterReason, Delivery, EntryId};
use crate::sink::{SinkError, SinkErrorClass};
use crate::store::{Outcome, Settled, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// The longest pause that a sink can request during an outage.
const MAX_POSTPONEMENT: Duration = Duration::from_mins(10);

impl WorkerLoop {
    pub(crate) fn on_sink_called(&mut self, number: u64, result: SinkCallResult, now: Instant) {
        let call = self.in_flight.call_ended(number);
        if result.shows_sink_up() && self.sink_health.succeeded(now, &self.context) {
            self.in_flight.queue.sort();
        }
        let SinkCallResult { deliveries, failures } = result;
        let mut deliveries = deliveries.into_iter();
        let mut index = 0;
        for (part, failure) in failures {
            self.acknowledge(deliveries.by_ref().take(part.start - index).collect());
            index = part.end;
            let failed: Vec<Delivery> = deliveries.by_ref().take(part.len()).collect();
            match failure {
                CallFailure::Refused(error) => self.refused(failed, error, call.is_probe, now),
                CallFailure::Outage(error, reason) => {
                    self.sink_failed(&reason, true, now);
                    self.refused(failed, error, call.is_probe, now);
                }
                CallFailure::SinkUnavailable(error) => self.sink_unavailable(failed, error, call.is_probe, now),
                CallFailure::NotStarted(reason) => {
                    self.sink_failed(&reason, true, now);
                    self.requeue(failed);
                }
                CallFailure::Aborted => self.settler.push_all(failed, &Outcome::Retry(Duration::ZERO)),
                CallFailure::SkippedAfterFailure => self.requeue(failed),
            }
        }
        self.acknowledge(deliveries.collect());
        self.in_flight.queue.call_ended(&call.keys);
        if call.is_probe {
            self.sink_health.breaker.end_probe();
        }
    }

    /// Acknowledges deliveries that the sink took.
    fn acknowledge(&mut self, deliveries: Vec<Delivery>) {
        let retries = &mut self.claims.retries;
        let breaker = &mut self.sink_health.breaker;
        if !retries.is_empty() || breaker.has_failed_entries() || self.context.is_ordered {
            for delivery in &deliveries {
                retries.forget(delivery.entry.id);
                breaker.forget_failed_entry(delivery.entry.id);
                self.in_flight.queue.done(delivery.entry.id);
            }
        }
        self.settler.settlements.acknowledge(deliveries);
    }

    /// Takes note of a failed call. Returns whether there is an outage now.
    fn sink_failed(&mut self, error: &str, is_certain: bool, now: Instant) -> bool {
        if self.sink_health.failed(error, is_certain, now, &self.context) {
            // The entries that wait for their next attempt need extensions from now on.
            self.ownership.extend_now(now);
        }
        self.sink_health.is_down()
    }

    /// Queues deliveries again that were no attempt. A worker that stops releases them.
    fn requeue(&mut self, deliveries: Vec<Delivery>) {
        if self.lifecycle.is_stopping() {
            return self.settler.push_all(deliveries, &Outcome::Release);
        }
        self.in_flight.queue.requeue(deliveries);
    }

    /// Queues deliveries again that the sink cannot take now, because of its own state.
    ///
    /// If the breaker is off (`breaker.failures = 0`), outages use up attempts, and so does this.
    fn sink_unavailable(&mut self, failed: Vec<Delivery>, error: SinkError, was_probe: bool, now: Instant) {
        if !self.sink_failed(&chain(&error), true, now) {
            return self.refused(failed, error, was_probe, now);
        }
        self.context.metrics.sink_errors(error.class()).inc_by(failed.len() as u64);
        self.requeue_probe(failed, was_probe);
        self.postpone(error.retry_after(), now);
    }

    fn requeue_probe(&mut self, deliveries: Vec<Delivery>, was_probe: bool) {
        for delivery in deliveries.iter().filter(|_| was_probe) {
            self.sink_health.breaker.record_tried(delivery.entry.id);
        }
        self.requeue(deliveries);
    }

    fn postpone(&mut self, retry_after: Option<Duration>, now: Instant) {
        if let Some(retry_after) = retry_after {
            self.sink_health.breaker.postpone(now + retry_after.min(MAX_POSTPONEMENT));
        }
    }

    /// Decides about deliveries that the sink refused. Failures of an outage are no attempts.
    fn refused(&mut self, failed: Vec<Delivery>, error: SinkError, was_probe: bool, now: Instant) {
        self.context.metrics.sink_errors(error.class()).inc_by(failed.len() as u64);
        let text = chain(&error);
        let is_transient = error.class() == SinkErrorClass::Transient;
        if is_transient {
            self.sink_health.log_failure(failed.len(), failed.first().map(|delivery| delivery.entry.id), &text);
        }
        let retry_after = error.retry_after();
        // A sink that requests a pause is up. But if it does so for a probe, the outage goes on.
        let may_be_outage = retry_after.is_none() && !self.context.is_ordered;
        if is_transient && (may_be_outage || self.sink_health.is_down()) {
            self.sink_failed(&text, false, now);
        }
        let outcome = Err(error);
        let mut kept = Vec::new();
        for delivery in failed {
            let is_blocked = self.in_flight.queue.is_blocked(delivery.entry.id);
            let is_at_fault = !is_blocked && (!is_transient || self.is_entry_at_fault(delivery.entry.id));
            if is_blocked || (!is_at_fault && self.sink_health.is_down()) {
                kept.push(delivery);
                continue;
            }
            match self.context.group.config.retry.judge(delivery.attempt, &outcome, random_fraction()) {
                Verdict::Acknowledge => self.settler.settlements.push(delivery, Outcome::Acknowledge),
                Verdict::RetryIn(wait) => self.retry(delivery, wait),
                // The sink took no other entry either in all these attempts.
                Verdict::DeadLetter(DeadLetterReason::Exhausted)
                    if (!is_at_fault || self.sink_health.has_given_up_since_success())
                        && self.sink_failed(&text, true, now) =>
                {
                    kept.push(delivery);
                }
                Verdict::DeadLetter(reason) => self.give_up(delivery, reason, &text),
            }
        }
        self.requeue_probe(kept, was_probe);
        self.postpone(retry_after, now);
    }

    /// Returns whether the entry itself causes its failure, as far as that is known.
    ///
    /// In an ordered group no other entry can show that the sink works. So the entry is at fault unless the sink itself
    /// reports that it is down.
    fn is_entry_at_fault(&mut self, id: EntryId) -> bool {
        if self.context.is_ordered {
            !self.sink_health.is_down()
        } else {
            self.sink_health.breaker.record_failed_entry(id)
        }
    }

    fn retry(&mut self, delivery: Delivery, wait: Duration) {
        self.context.metrics.retries.inc();
        self.claims.retries.failed(delivery.entry.id, Timestamp::now());
        self.in_flight.queue.block(delivery.entry.id);
        self.settler.settlements.push(delivery, Outcome::Retry(wait));
    }

    fn give_up(&mut self, delivery: Delivery, reason: DeadLetterReason, error: &str) {
        if self.context.is_ordered && reason == DeadLetterReason::Exhausted {
            self.sink_health.gave_up();
        }
        if self.context.group.config.halts() {
            self.halt(delivery, error);
        } else {
            self.dead_letter(delivery, reason, error.to_owned());
        }
    }

    /// Halts the group at this entry: the entry stays pending, and no later one is delivered.
    pub(crate) fn halt(&mut self, delivery: Delivery, error: &str) {
        let (id, attempts) = (delivery.entry.id, delivery.attempt);
        self.in_flight.queue.block(id);
        self.claims.retries.forget(id);
        let reason = format!(
            "stopped at entry {id}, given up after delivery {attempts}: {error}; repair the cause and restart, or \
             restart with on_poison = \"dead_letter\" to send the entry to the dead letters"
        );
        tracing::error!(entry.id = %id, attempts, error, "group stopped at an entry, delivering no later ones");
        self.context.part.not_ready(reason.clone());
        self.lifecycle.halt(reason);
        self.settler.settlements.push(delivery, Outcome::Retry(Duration::ZERO));
    }

    /// Gives the entry up. Later entries of its key wait until the dead letter is written, to keep the order.
    pub(crate) fn dead_letter(&mut self, delivery: Delivery, reason: DeadLetterReason, error: String) {
        let (id, now) = (delivery.entry.id, Timestamp::now());
        let letter = DeadLetter {
            stream: self.context.group.stream.clone(),
            id,
            group: self.context.group.config.name.clone(),
            reason,
            error,
            attempts: delivery.attempt,
            first_failure: self.claims.retries.failed(id, now),
            last_failure: now,
            replays: delivery.entry.replays(),
            fields: delivery.entry.fields.clone(),
        };
        self.claims.retries.forget(id);
        self.sink_health.breaker.forget_failed_entry(id);
        self.in_flight.queue.block(id);
        self.settler.dead_letter(delivery, &letter, &self.context);
    }

    pub(crate) fn on_settled(
        &mut self,
        is_dead_letters: bool,
        batch: SettlementBatch,
        result: Result<Settled, StoreError>,
        now: Instant,
    ) {
        if result.as_ref().is_err_and(|error| self.lifecycle.lose_lease(error)) {
            return;
        }
        let queue = self.settler.queue(is_dead_letters);
        let metrics = &self.context.metrics;
        match result {
            Ok(settled) => {
                queue.succeeded();
                if let Some(after) = queue.warning.ended() {
                    info!(?after, "worker settles deliveries again");
                }
                metrics.not_owned.inc_by(settled.not_owned as u64);
                metrics.acknowledged.inc_by(batch.taken_by_sink.saturating_sub(settled.not_owned) as u64);
                self.schedule_retries(&batch, now);
                if is_dead_letters {
                    for settlement in &batch.settlements {
                        self.in_flight.queue.done(settlement.delivery.entry.id);
                    }
                    self.settler.count_dead_letters(&batch, settled.not_owned, &self.context);
                }
            }
            Err(error) if error.kind() == StoreErrorKind::NoGroup => {
                // Nothing is pending any more. The entries that the stream still holds are delivered again.
                queue.succeeded();
                metrics.not_owned.inc_by(batch.settlements.len() as u64);
                for settlement in &batch.settlements {
                    self.forget(settlement.delivery.entry.id);
                    self.settler.forget_reason(settlement.delivery.entry.id);
                }
                self.intake.group_missing();
            }
            Err(error) => {
                let text = chain(&error);
                if let Some(times) = queue.warning.occurred() {
                    let (entries, kind) = (batch.settlements.len(), error.kind().as_str());
                    warn!(
                        error = text,
                        kind, entries, is_dead_letters, times, "worker cannot settle deliveries, trying again"
                    );
                }
                queue.failed(batch, text, now, error.retry_after());
            }
        }
    }

    fn schedule_retries(&mut self, batch: &SettlementBatch, now: Instant) {
        if self.claims.retries.is_empty() {
            return;
        }
        let claim_idle = self.context.group.config.claim_idle;
        for settlement in &batch.settlements {
            if let Outcome::Retry(wait) = settlement.outcome {
                self.claims.retries.schedule(settlement.delivery.entry.id, now + wait, wait > claim_idle);
            }
        }
    }

    /// Drops an entry that this worker no longer holds. Later entries of its key go on.
    pub(crate) fn forget(&mut self, id: EntryId) {
        self.claims.retries.forget(id);
        self.in_flight.queue.done(id);
    }
}
