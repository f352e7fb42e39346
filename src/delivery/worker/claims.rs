//! Claims: entries that failed are claimed for their next attempt when it is due.

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::delivery::worker::context::{Conditions, WorkerContext};
use crate::delivery::worker::retries::Retries;
use crate::delivery::worker::tasks::{CLAIM_LIMIT, ClaimReason, Task};
use crate::event::EntryId;

/// Failed entries that a worker remembers.
const REMEMBERED_FAILURES: usize = 10_000;

/// Claims entries whose next attempt is due, one call of the store at a time.
#[derive(Debug)]
pub(crate) struct Claims {
    pub(crate) retries: Retries,
    claiming: Vec<EntryId>,
    not_before: Instant,
    backoff: Backoff,
}

impl Claims {
    pub(crate) fn new(context: &WorkerContext, now: Instant) -> Self {
        let max_in_flight = context.group.config.max_in_flight;
        // In an ordered group no search finds a forgotten entry again.
        let remembered = if context.is_ordered { max_in_flight.max(REMEMBERED_FAILURES) } else { REMEMBERED_FAILURES };
        Self { retries: Retries::new(remembered), claiming: Vec::new(), not_before: now, backoff: Backoff::default() }
    }

    /// Claims the entries that are due, if any.
    pub(crate) fn start(&mut self, now: Instant, facts: &Conditions, context: &WorkerContext) -> Option<Task> {
        if self.next_due(facts, context)? > now {
            return None;
        }
        let ids = self.retries.take_due(now, limit(facts, context));
        self.claiming.clone_from(&ids);
        Some(Task::claim(context, ClaimReason::Retry, ids))
    }

    /// Returns when the next claim is due, or `None` until an event changes the conditions.
    pub(crate) fn next_due(&self, facts: &Conditions, context: &WorkerContext) -> Option<Instant> {
        let may_start = facts.is_open && self.claiming.is_empty() && limit(facts, context) > 0;
        may_start.then(|| self.retries.next_due()).flatten().map(|due| due.max(self.not_before))
    }

    /// Returns whether the entry is being claimed now.
    pub(crate) fn is_claiming(&self, id: EntryId) -> bool {
        self.claiming.contains(&id)
    }

    /// Returns whether no claim is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.claiming.is_empty()
    }

    /// Ends the claim under way.
    pub(crate) fn task_ended(&mut self) {
        self.claiming.clear();
    }

    /// Takes note of a claim that worked.
    pub(crate) fn succeeded(&mut self) {
        self.backoff.reset();
    }

    /// Repeats a claim that failed, after a pause.
    pub(crate) fn failed(&mut self, ids: &[EntryId], now: Instant) {
        self.not_before = now + self.backoff.next_delay();
        for id in ids {
            self.retries.schedule(*id, self.not_before, false);
        }
    }
}

/// Returns the most entries that one claim may take.
fn limit(facts: &Conditions, context: &WorkerContext) -> usize {
    match (facts.is_sink_down, context.is_ordered) {
        (true, _) => facts.retry_slots,
        // In an ordered group other entries wait for them, so there is always room.
        (false, true) => CLAIM_LIMIT,
        (false, false) => facts.free_slots.min(CLAIM_LIMIT),
    }
}
