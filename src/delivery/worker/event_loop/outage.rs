//! What the worker does while its sink is down: it keeps what it has, lets go of nothing and asks for nothing, but one
//! entry at a time to try the sink with.
//!
//! Attempts are not used up meanwhile: entries in hand stay there, those that wait for their next attempt wait on while
//! there is anything else to try the sink with, and all of them count as being handled, so that no one else takes them
//! over.

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::random_fraction;
use crate::delivery::worker::event_loop::{HELD_BYTES, WorkerLoop};
use crate::event::Delivery;
use crate::store::Outcome;

/// Since when the sink is down, and what it said last.
#[derive(Debug)]
pub(crate) struct Outage {
    pub(crate) since: Timestamp,
    pub(crate) reason: String,
}

impl WorkerLoop {
    /// The sink took something, or said no for good: it is there.
    pub(crate) fn sink_answered(&mut self) {
        self.gave_up_in_vain = false;
        if let Some(after) = self.breaker.succeeded(Instant::now()) {
            self.outage = None;
            self.sink_trouble.ended();
            self.ready.sort();
            self.meters.breaker_open.set(0);
            info!(sink = self.caller.name, ?after, "the sink is up again");
        }
    }

    /// A call failed for a reason that may pass; `is_certain` where the sink itself says that it is down. Says whether it
    /// is taken for down now.
    pub(crate) fn sink_failed(&mut self, reason: &str, is_certain: bool) -> bool {
        let now = Instant::now();
        let has_opened = if is_certain {
            self.breaker.trip(now, random_fraction())
        } else {
            self.breaker.failed(now, random_fraction())
        };
        if !self.breaker.is_open() {
            return false;
        }
        if has_opened {
            self.meters.breaker_opened.inc();
            self.meters.breaker_open.set(1);
            // What waits for its next attempt is to stay ours although that does not come.
            self.extend_at = now;
        }
        let since = self.outage.as_ref().map_or_else(Timestamp::now, |outage| outage.since);
        self.outage = Some(Outage { since, reason: reason.to_owned() });
        if let Some(times) = self.sink_trouble.occurred() {
            warn!(sink = self.caller.name, error = reason, times, "the sink is down: its entries wait");
        }
        true
    }

    /// Keeps deliveries in hand, to be made again when the sink is up.
    pub(crate) fn keep(&mut self, deliveries: Vec<Delivery>) {
        if self.is_stopping() {
            return self.hand_back(deliveries, &Outcome::Release);
        }
        self.ready.put_back(deliveries);
    }

    /// Puts the entry in front that the sink is tried with: the oldest that it was not tried with yet, so that an entry
    /// that always fails does not make the sink look down.
    pub(crate) fn choose_probe(&mut self) {
        if self.ready.may_go().all(|delivery| self.breaker.was_tried(delivery.entry.id)) {
            self.breaker.try_all_again();
        }
        let untried = self.ready.may_go().map(|delivery| delivery.entry.id).filter(|id| !self.breaker.was_tried(*id));
        if let Some(oldest) = untried.min() {
            self.ready.prefer(oldest);
        }
    }

    /// Whether the sink can't be tried with anything in hand: all of it waits for what is to be taken again.
    pub(crate) fn is_without_probe(&self) -> bool {
        self.ready.first().is_none() && self.running.is_empty()
    }

    /// How many entries may come in while the sink is down: one, if it was tried with all that are in hand.
    pub(crate) fn probe_slots(&self) -> usize {
        let fit = (HELD_BYTES / self.entry_bytes).max(1);
        let has_room = self.in_hand() < self.group.config.max_in_flight.min(fit);
        let has_probe = self.expected > 0 || self.ready.iter().any(|d| !self.breaker.was_tried(d.entry.id));
        usize::from(self.breaker.is_open() && has_room && !has_probe)
    }

    /// How many of those that wait for their next attempt may come in while the sink is down: one, if nothing else is
    /// left to try it with.
    pub(crate) fn retry_slots(&self) -> usize {
        match (self.is_ordered, self.ready.len() == 0 || self.is_at_end) {
            (true, _) => usize::from(self.is_without_probe()),
            (false, true) => self.probe_slots(),
            (false, false) => 0,
        }
    }

    /// When something is due while the sink is down.
    pub(crate) fn next_wake_in_outage(&mut self) -> Option<Instant> {
        let mut wake = None;
        let mut at = |due: Instant| wake = Some(wake.map_or(due, |wake: Instant| wake.min(due)));
        if self.ready.first().is_some() && self.running.len() < self.group.config.concurrency {
            self.breaker.due().into_iter().for_each(&mut at);
        }
        if self.retry_slots() > 0
            && self.claiming.is_empty()
            && let Some(due) = self.retries.next_due()
        {
            at(due.max(self.claim_not_before));
        }
        if self.probe_slots() > 0 && self.may_take_in() {
            at(self.intake_not_before);
        }
        wake
    }
}
