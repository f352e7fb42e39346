//! Settlements on their way to the store. A settlement that the store did not take is sent again.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::event::{Delivery, EntryId};
use crate::log_throttle::ThrottledWarning;
use crate::store::{Outcome, Settlement};

/// A queue of settlements. One call of the store at a time takes all of them.
#[derive(Debug)]
pub(crate) struct SettlementQueue {
    waiting: Vec<Settlement>,
    /// Entries among `waiting` that are acknowledged because the sink took them.
    taken_by_sink: usize,
    under_way: Vec<EntryId>,
    not_before: Instant,
    backoff: Backoff,
    pub(crate) warning: ThrottledWarning,
    /// The error of the last call, if it failed.
    pub(crate) error: Option<String>,
}

/// The settlements of one call of the store.
#[derive(Debug)]
pub(crate) struct SettlementBatch {
    pub(crate) settlements: Vec<Settlement>,
    pub(crate) taken_by_sink: usize,
}

impl SettlementQueue {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            waiting: Vec::new(),
            taken_by_sink: 0,
            under_way: Vec::new(),
            not_before: now,
            backoff: Backoff::default(),
            warning: ThrottledWarning::default(),
            error: None,
        }
    }

    pub(crate) fn push(&mut self, delivery: Delivery, outcome: Outcome) {
        self.waiting.push(Settlement { delivery, outcome });
    }

    /// Acknowledges deliveries that the sink took.
    pub(crate) fn acknowledge(&mut self, deliveries: Vec<Delivery>) {
        self.taken_by_sink += deliveries.len();
        let acknowledge = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
        self.waiting.extend(deliveries.into_iter().map(acknowledge));
    }

    /// Returns the number of entries that are not settled yet.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len() + self.under_way.len()
    }

    /// Takes all settlements for one call if it is due.
    pub(crate) fn start(&mut self, now: Instant) -> Option<SettlementBatch> {
        if self.next_due()? > now {
            return None;
        }
        let settlements = std::mem::take(&mut self.waiting);
        self.under_way.extend(settlements.iter().map(|settlement| settlement.delivery.entry.id));
        Some(SettlementBatch { settlements, taken_by_sink: std::mem::take(&mut self.taken_by_sink) })
    }

    /// Returns when the next call is due, or `None` while one is under way or nothing waits.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        (self.under_way.is_empty() && !self.waiting.is_empty()).then_some(self.not_before)
    }

    /// Ends a call that has settled its batch.
    pub(crate) fn succeeded(&mut self) {
        self.under_way.clear();
        self.backoff.reset();
        self.error = None;
    }

    /// Ends a call that failed. Its batch is sent again, after `at_least`.
    pub(crate) fn failed(&mut self, batch: SettlementBatch, error: String, now: Instant, at_least: Option<Duration>) {
        self.under_way.clear();
        let newer = std::mem::replace(&mut self.waiting, batch.settlements);
        self.waiting.extend(newer);
        self.taken_by_sink += batch.taken_by_sink;
        self.not_before = now + self.backoff.next_delay().max(at_least.unwrap_or_default());
        self.error = Some(error);
    }

    /// Returns all entries that are not settled yet.
    pub(crate) fn ids(&self) -> impl Iterator<Item = EntryId> {
        let waiting = self.waiting.iter().map(|settlement| settlement.delivery.entry.id);
        waiting.chain(self.under_way.iter().copied())
    }

    /// Returns the waiting entries that were delivered at least `age` ago.
    pub(crate) fn older_than(&self, age: Duration) -> impl Iterator<Item = EntryId> {
        let old = self.waiting.iter().filter(move |settlement| settlement.delivery.delivered_at.elapsed() >= age);
        old.map(|settlement| settlement.delivery.entry.id)
    }
}
