//! Settler: sends acknowledgements, retries, releases and dead letters to the store.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use crate::delivery::worker::context::WorkerContext;
use crate::delivery::worker::settlements::{SettlementBatch, SettlementQueue};
use crate::delivery::worker::tasks::{Task, TaskResult, call_store};
use crate::event::{DeadLetter, DeadLetterReason, Delivery, EntryId};
use crate::log_throttle::ThrottledWarning;
use crate::store::Outcome;

/// Two queues, so that acknowledgements go on while dead letters cannot be written.
#[derive(Debug)]
pub(crate) struct Settler {
    pub(crate) settlements: SettlementQueue,
    pub(crate) dead_letters: SettlementQueue,
    /// The reasons of the entries in `dead_letters`, for the counter.
    reasons: HashMap<EntryId, DeadLetterReason>,
    warning: ThrottledWarning,
}

impl Settler {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            settlements: SettlementQueue::new(now),
            dead_letters: SettlementQueue::new(now),
            reasons: HashMap::new(),
            warning: ThrottledWarning::default(),
        }
    }

    /// Starts the next call of the store if one is due.
    pub(crate) fn start(&mut self, now: Instant, context: &WorkerContext) -> Option<Task> {
        let (batch, is_dead_letters) = match self.settlements.start(now) {
            Some(batch) => (batch, false),
            None => (self.dead_letters.start(now)?, true),
        };
        let (store, cursor) = (context.store.clone(), context.cursor.clone());
        Some(Task::new(0, async move {
            let result = call_store(store.settle(&cursor, &batch.settlements)).await;
            TaskResult::Settled { is_dead_letters, batch, result }
        }))
    }

    /// Returns when the next call is due, or `None` while there is nothing to send.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        [self.settlements.next_due(), self.dead_letters.next_due()].into_iter().flatten().min()
    }

    /// Settles deliveries that did not reach the sink.
    pub(crate) fn push_all(&mut self, deliveries: Vec<Delivery>, outcome: &Outcome) {
        for delivery in deliveries {
            self.settlements.push(delivery, outcome.clone());
        }
    }

    /// Writes an entry to the dead letters and acknowledges it.
    pub(crate) fn dead_letter(&mut self, delivery: Delivery, letter: &DeadLetter, context: &WorkerContext) {
        if let Some(times) = self.warning.occurred() {
            let (id, reason, error, attempts) = (letter.id, letter.reason, &letter.error, letter.attempts);
            warn!(entry.id = %id, %reason, error, attempts, times, "entry given up, writing it to the dead letters");
        }
        self.reasons.insert(letter.id, letter.reason);
        let outcome = Outcome::DeadLetter { to: context.group.dead_letter.clone(), fields: letter.to_fields() };
        self.dead_letters.push(delivery, outcome);
    }

    /// Returns the queue that a batch came from.
    pub(crate) fn queue(&mut self, is_dead_letters: bool) -> &mut SettlementQueue {
        if is_dead_letters { &mut self.dead_letters } else { &mut self.settlements }
    }

    /// Counts dead letters that were written.
    pub(crate) fn count_dead_letters(&mut self, batch: &SettlementBatch, not_owned: usize, context: &WorkerContext) {
        let ids = batch.settlements.iter().map(|settlement| settlement.delivery.entry.id);
        let reasons: Vec<DeadLetterReason> = ids.filter_map(|id| self.reasons.remove(&id)).collect();
        // The store does not return which of them were not owned. That is rare.
        for reason in reasons.into_iter().skip(not_owned) {
            context.metrics.dead_letters(reason).inc();
        }
    }

    /// Drops the reason of an entry that became no dead letter.
    pub(crate) fn forget_reason(&mut self, id: EntryId) {
        self.reasons.remove(&id);
    }

    /// Returns the number of entries that are not settled yet.
    pub(crate) fn len(&self) -> usize {
        self.settlements.len() + self.dead_letters.len()
    }

    /// Returns all entries that are not settled yet.
    pub(crate) fn ids(&self) -> impl Iterator<Item = EntryId> {
        self.settlements.ids().chain(self.dead_letters.ids())
    }

    /// Returns the waiting entries that were delivered at least `age` ago.
    pub(crate) fn older_than(&self, age: Duration) -> impl Iterator<Item = EntryId> {
        self.settlements.older_than(age).chain(self.dead_letters.older_than(age))
    }

    /// Returns the error of the last call, if it failed.
    pub(crate) fn error(&self) -> Option<&str> {
        self.settlements.error.as_deref().or(self.dead_letters.error.as_deref())
    }
}
