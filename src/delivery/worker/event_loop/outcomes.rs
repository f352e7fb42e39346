//! How deliveries end: through the sink, by its verdict, and settled in the store.

use std::time::{Duration, Instant as WallInstant};

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::random_fraction;
use crate::delivery::policy::Verdict;
use crate::delivery::worker::breaker::Allowance;
use crate::delivery::worker::event_loop::intake::{TaskResult, asked};
use crate::delivery::worker::event_loop::{Running, WorkerLoop};
use crate::delivery::worker::settlements::SettlementBatch;
use crate::delivery::worker::sink_call::{CallFailure, Delivered};
use crate::event::{DeadLetter, DeadLetterReason, Delivery, EntryId};
use crate::sink::{SinkError, SinkErrorClass};
use crate::store::{Outcome, Settled, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// The longest that a sink that is down can ask to be left alone.
const MAX_POSTPONEMENT: Duration = Duration::from_mins(10);

impl WorkerLoop {
    /// Hands what is ready to the sink.
    pub(crate) fn start_sink_calls(&mut self, now: Instant) {
        let may_call = self.halted.is_none() && !self.is_in_doubt && self.permit.may_deliver();
        let allowance = if may_call { self.breaker.allows(now) } else { Allowance::Nothing };
        let is_probe = allowance == Allowance::One;
        if allowance == Allowance::Nothing {
            return;
        }
        if is_probe {
            self.choose_probe();
        }
        while self.running.len() < self.group.config.concurrency
            && let Some(first) = self.ready.first().map(|delivery| delivery.entry.id)
        {
            if let Some((_, text)) = self.unfit.remove(&first) {
                let mut left = 1..=1;
                let stopped_at = self.ready.take(|_| left.next().is_some());
                stopped_at.deliveries.into_iter().for_each(|delivery| self.halt(delivery, &text));
                return;
            }
            let (retry, unfit) = (&self.group.config.retry, &self.unfit);
            let (mut limit, mut entries) = (if is_probe { 1 } else { self.max_batch }, 0);
            // An entry that failed before makes the batch smaller that it goes with.
            let batch = self.ready.take(|delivery| {
                limit = limit.min(retry.batch_limit(delivery.attempt, self.max_batch));
                let fits = entries < limit && !unfit.contains_key(&delivery.entry.id);
                entries += usize::from(fits);
                fits
            });
            let slot = self.next_slot;
            self.next_slot += 1;
            let deliveries = &batch.deliveries;
            let oldest = deliveries.iter().map(|delivery| delivery.delivered_at).min().unwrap_or_else(WallInstant::now);
            let ids = deliveries.iter().map(|delivery| delivery.entry.id).collect();
            self.running.push(Running { slot, ids, lanes: batch.lanes.clone(), oldest, is_probe });
            let caller = self.caller.clone();
            self.tasks
                .spawn(async move { TaskResult::Delivered { slot, delivered: caller.deliver(batch, is_probe).await } });
            if is_probe {
                return self.breaker.probe();
            }
        }
    }

    pub(crate) fn delivered(&mut self, slot: u64, delivered: Delivered) {
        let place = self.running.iter().position(|running| running.slot == slot);
        let running = place.map(|place| self.running.swap_remove(place));
        let was_probe = running.as_ref().is_some_and(|running| running.is_probe);
        let lanes = running.map(|running| running.lanes).unwrap_or_default();
        if delivered.was_answered() {
            self.sink_answered();
        }
        let Delivered { batch, failures } = delivered;
        let mut batch = batch.into_iter();
        let mut place = 0;
        for (part, failure) in failures {
            self.taken_by_sink(batch.by_ref().take(part.start - place).collect());
            place = part.end;
            let failed: Vec<Delivery> = batch.by_ref().take(part.len()).collect();
            match failure {
                CallFailure::Refused(error) => self.refused(failed, error, was_probe),
                CallFailure::Outage(error, reason) => {
                    self.sink_failed(&reason, true);
                    self.refused(failed, error, was_probe);
                }
                CallFailure::SinkUnavailable(error) => self.unable(failed, error, was_probe),
                CallFailure::NotStarted(reason) => {
                    self.sink_failed(&reason, true);
                    self.keep(failed);
                }
                CallFailure::Aborted => self.hand_back(failed, &Outcome::Retry(Duration::ZERO)),
                CallFailure::SkippedAfterFailure => self.keep(failed),
            }
        }
        self.taken_by_sink(batch.collect());
        self.ready.returned(&lanes);
        if was_probe {
            self.breaker.told_nothing();
        }
    }

    fn taken_by_sink(&mut self, batch: Vec<Delivery>) {
        if !self.retries.is_empty() || self.breaker.has_accused() || self.is_ordered {
            for delivery in &batch {
                self.retries.forget(delivery.entry.id);
                self.breaker.acquit(delivery.entry.id);
                self.ready.done(delivery.entry.id);
            }
        }
        self.settlements.acknowledge(batch);
    }

    pub(crate) fn hand_back(&mut self, deliveries: Vec<Delivery>, outcome: &Outcome) {
        for delivery in deliveries {
            self.settlements.push(delivery, outcome.clone());
        }
    }

    /// Keeps what the sink can't take now, whichever entry it is. Where outages use up attempts, this does as well.
    fn unable(&mut self, failed: Vec<Delivery>, error: SinkError, was_probe: bool) {
        if !self.sink_failed(&chain(&error), true) {
            return self.refused(failed, error, was_probe);
        }
        self.meters.sink_errors(error.class()).inc_by(failed.len() as u64);
        for delivery in failed.iter().filter(|_| was_probe) {
            self.breaker.tried(delivery.entry.id);
        }
        self.keep(failed);
        if let Some(retry_after) = error.retry_after() {
            self.breaker.postpone(Instant::now() + retry_after.min(MAX_POSTPONEMENT));
        }
    }

    /// Judges what the sink refused. What failed because the sink is down is kept: that is no attempt.
    fn refused(&mut self, failed: Vec<Delivery>, error: SinkError, was_probe: bool) {
        self.meters.sink_errors(error.class()).inc_by(failed.len() as u64);
        let text = chain(&error);
        if error.class() == SinkErrorClass::Transient
            && let Some(times) = self.failure_trouble.occurred()
        {
            let first = failed.first().map(|delivery| tracing::field::display(delivery.entry.id));
            warn!(entries = failed.len(), first, error = text, times, "a delivery failed");
        }
        let is_transient = error.class() == SinkErrorClass::Transient;
        let retry_after = error.retry_after();
        // Being asked for time is no outage; but whoever asks for it when tried again is not up yet.
        let may_be_outage = retry_after.is_none() && !self.is_ordered;
        if is_transient && (may_be_outage || self.breaker.is_open()) {
            self.sink_failed(&text, false);
        }
        let outcome = Err(error);
        let mut kept = Vec::new();
        for delivery in failed {
            // It waits for the one before it, whatever becomes of that.
            if self.ready.is_held_back(delivery.entry.id) {
                kept.push(delivery);
                continue;
            }
            let is_to_blame = !is_transient || self.is_to_blame(delivery.entry.id);
            if !is_to_blame && self.breaker.is_open() {
                kept.push(delivery);
                continue;
            }
            match self.group.config.retry.judge(delivery.attempt, &outcome, random_fraction()) {
                Verdict::Acknowledge => self.settlements.push(delivery, Outcome::Acknowledge),
                Verdict::RetryIn(wait) => {
                    self.meters.retries.inc();
                    self.retries.failed(delivery.entry.id, Timestamp::now());
                    self.ready.hold(delivery.entry.id);
                    self.settlements.push(delivery, Outcome::Retry(wait));
                }
                // It failed as often as it may, but in all that time the sink took nothing else either.
                Verdict::DeadLetter(DeadLetterReason::Exhausted)
                    if (!is_to_blame || self.gave_up_in_vain) && self.sink_failed(&text, true) =>
                {
                    kept.push(delivery);
                }
                Verdict::DeadLetter(reason) => {
                    if self.is_ordered && reason == DeadLetterReason::Exhausted {
                        self.gave_up_in_vain = true;
                    }
                    if self.group.config.halts() {
                        self.halt(delivery, &text);
                    } else {
                        self.bury(delivery, reason, text.clone());
                    }
                }
            }
        }
        for delivery in kept.iter().filter(|_| was_probe) {
            self.breaker.tried(delivery.entry.id);
        }
        self.keep(kept);
        if let Some(retry_after) = retry_after {
            self.breaker.postpone(Instant::now() + retry_after.min(MAX_POSTPONEMENT));
        }
    }

    /// Whether it is the entry's own fault that it failed, as far as can be told. Where an order is kept, no other may
    /// pass it to show that the sink works: then it is, unless the sink itself says that it is down.
    fn is_to_blame(&mut self, id: EntryId) -> bool {
        if self.is_ordered { !self.breaker.is_open() } else { self.breaker.accuse(id) }
    }

    /// Stops the group at this entry: it stays pending, and nothing after it is delivered.
    fn halt(&mut self, delivery: Delivery, error: &str) {
        let (id, attempts) = (delivery.entry.id, delivery.attempt);
        self.ready.hold(id);
        self.retries.forget(id);
        let text = format!(
            "stopped at entry {id}, given up after delivery {attempts}: {error}; mend what refuses it and restart, or \
             restart with on_poison = \"dead_letter\" to send it to the dead letters"
        );
        tracing::error!(entry.id = %id, attempts, error, "the group has stopped at an entry that its sink does not take");
        self.part.not_ready(text.clone());
        self.halted = Some(text);
        self.settlements.push(delivery, Outcome::Retry(Duration::ZERO));
    }

    /// Gives an entry up. Those behind it wait until that is written down: if it came back, it would come too late.
    pub(crate) fn bury(&mut self, delivery: Delivery, reason: DeadLetterReason, error: String) {
        let id = delivery.entry.id;
        if let Some(times) = self.dead_letter_trouble.occurred() {
            let attempts = delivery.attempt;
            warn!(entry.id = %id, %reason, error, attempts, times, "an entry goes to the dead letters");
        }
        let now = Timestamp::now();
        let letter = DeadLetter {
            stream: self.group.stream.clone(),
            id,
            group: self.group.config.name.clone(),
            reason,
            error,
            attempts: delivery.attempt,
            first_failure: self.retries.failed(id, now),
            last_failure: now,
            replays: delivery.entry.replays(),
            fields: delivery.entry.fields.clone(),
        };
        self.retries.forget(id);
        self.breaker.acquit(id);
        self.ready.hold(id);
        self.burials.insert(id, reason);
        let outcome = Outcome::DeadLetter { to: self.group.dead_letter.clone(), fields: letter.to_fields() };
        self.dead_letters.push(delivery, outcome);
    }

    /// Sends settlements to the store. Dead letters go apart: while they can't be written, acknowledgements must go on.
    pub(crate) fn start_settling(&mut self, now: Instant) {
        for is_dead_letters in [false, true] {
            let outbox = if is_dead_letters { &mut self.dead_letters } else { &mut self.settlements };
            if outbox.due().is_none_or(|due| due > now) {
                continue;
            }
            let load = outbox.load();
            let (store, cursor) = (self.store.clone(), self.cursor.clone());
            self.tasks.spawn(async move {
                let result = asked(store.settle(&cursor, &load.settlements)).await;
                TaskResult::Settled { is_dead_letters, load, result }
            });
        }
    }

    pub(crate) fn settled(
        &mut self,
        is_dead_letters: bool,
        load: SettlementBatch,
        result: Result<Settled, StoreError>,
    ) {
        if result.as_ref().is_err_and(|error| self.loses_lease(error)) {
            return;
        }
        let outbox = if is_dead_letters { &mut self.dead_letters } else { &mut self.settlements };
        match result {
            Ok(settled) => {
                outbox.succeeded();
                if let Some(after) = outbox.trouble.ended() {
                    info!(?after, "the worker settles its deliveries again");
                }
                self.meters.not_owned.inc_by(settled.not_owned as u64);
                self.meters.acknowledged.inc_by(load.taken_by_sink.saturating_sub(settled.not_owned) as u64);
                self.wait_for_retries(&load);
                if is_dead_letters {
                    self.count_burials(&load, settled.not_owned);
                }
            }
            Err(error) if error.kind() == StoreErrorKind::NoGroup => {
                // Nothing is pending any more; whatever the stream still holds is delivered again.
                outbox.succeeded();
                self.meters.not_owned.inc_by(load.settlements.len() as u64);
                for settlement in &load.settlements {
                    self.retries.forget(settlement.delivery.entry.id);
                    self.ready.done(settlement.delivery.entry.id);
                    self.burials.remove(&settlement.delivery.entry.id);
                }
                self.group_is_gone();
            }
            Err(error) => {
                let text = chain(&error);
                if let Some(times) = outbox.trouble.occurred() {
                    let (entries, kind) = (load.settlements.len(), error.kind().as_str());
                    warn!(error = text, kind, entries, is_dead_letters, times, "the worker cannot settle deliveries");
                }
                outbox.failed(load, text, error.retry_after());
            }
        }
    }

    fn wait_for_retries(&mut self, load: &SettlementBatch) {
        if self.retries.is_empty() {
            return;
        }
        let (now, claim_idle) = (Instant::now(), self.group.config.claim_idle);
        for settlement in &load.settlements {
            if let Outcome::Retry(wait) = settlement.outcome {
                self.retries.wait(settlement.delivery.entry.id, now + wait, wait > claim_idle);
            }
        }
    }

    fn count_burials(&mut self, load: &SettlementBatch, not_owned: usize) {
        for settlement in &load.settlements {
            self.ready.done(settlement.delivery.entry.id);
        }
        let reasons =
            load.settlements.iter().filter_map(|settlement| self.burials.remove(&settlement.delivery.entry.id));
        let reasons: Vec<DeadLetterReason> = reasons.collect();
        // Which of them were not owned is unknown; it is rarely any.
        for reason in reasons.into_iter().skip(not_owned) {
            self.meters.dead_letters(reason).inc();
        }
    }
}
