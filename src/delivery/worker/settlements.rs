//! Settlements on their way to the store. None is forgotten: what the store did not take is sent again.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::event::{Delivery, EntryId};
use crate::log_throttle::ThrottledWarning;
use crate::store::{Outcome, Settlement};

/// One queue of settlements; one call to the store at a time takes all there are.
#[derive(Debug)]
pub(crate) struct SettlementQueue {
    waiting: Vec<Settlement>,
    /// How many of `waiting` are acknowledged because the sink took them.
    taken_by_sink: usize,
    under_way: Vec<EntryId>,
    not_before: Instant,
    backoff: Backoff,
    pub(crate) trouble: ThrottledWarning,
    /// Why the last call failed, if it did.
    pub(crate) error: Option<String>,
}

/// What one call to the store settles.
#[derive(Debug)]
pub(crate) struct SettlementBatch {
    pub(crate) settlements: Vec<Settlement>,
    pub(crate) taken_by_sink: usize,
}

impl SettlementQueue {
    pub(crate) fn new() -> Self {
        Self {
            waiting: Vec::new(),
            taken_by_sink: 0,
            under_way: Vec::new(),
            not_before: Instant::now(),
            backoff: Backoff::default(),
            trouble: ThrottledWarning::default(),
            error: None,
        }
    }

    pub(crate) fn push(&mut self, delivery: Delivery, outcome: Outcome) {
        self.waiting.push(Settlement { delivery, outcome });
    }

    /// Acknowledges deliveries that the sink took.
    pub(crate) fn acknowledge(&mut self, batch: Vec<Delivery>) {
        self.taken_by_sink += batch.len();
        let acknowledge = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
        self.waiting.extend(batch.into_iter().map(acknowledge));
    }

    /// How many entries are not settled yet.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len() + self.under_way.len()
    }

    /// When the next call is due, if one is to be made and none is under way.
    pub(crate) fn due(&self) -> Option<Instant> {
        let is_idle = self.under_way.is_empty() && !self.waiting.is_empty();
        is_idle.then_some(self.not_before)
    }

    /// Takes all there is for one call.
    pub(crate) fn load(&mut self) -> SettlementBatch {
        let settlements = std::mem::take(&mut self.waiting);
        self.under_way.extend(settlements.iter().map(|settlement| settlement.delivery.entry.id));
        SettlementBatch { settlements, taken_by_sink: std::mem::take(&mut self.taken_by_sink) }
    }

    /// The call has settled its load.
    pub(crate) fn succeeded(&mut self) {
        self.under_way.clear();
        self.backoff.reset();
        self.error = None;
    }

    /// The call failed; its load is sent again.
    pub(crate) fn failed(&mut self, load: SettlementBatch, error: String, at_least: Option<Duration>) {
        self.under_way.clear();
        let newer = std::mem::replace(&mut self.waiting, load.settlements);
        self.waiting.extend(newer);
        self.taken_by_sink += load.taken_by_sink;
        self.not_before = Instant::now() + self.backoff.next_delay().max(at_least.unwrap_or_default());
        self.error = Some(error);
    }

    /// All entries that are not settled yet.
    pub(crate) fn ids(&self) -> impl Iterator<Item = EntryId> {
        let waiting = self.waiting.iter().map(|settlement| settlement.delivery.entry.id);
        waiting.chain(self.under_way.iter().copied())
    }

    /// Those that were delivered longer ago than `age`.
    pub(crate) fn older_than(&self, age: Duration) -> impl Iterator<Item = EntryId> {
        let old = self.waiting.iter().filter(move |settlement| settlement.delivery.delivered_at.elapsed() > age);
        old.map(|settlement| settlement.delivery.entry.id)
    }
}
