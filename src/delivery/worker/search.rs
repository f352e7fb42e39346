//! Search: claims entries that other consumers left pending for longer than `claim_idle`.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::jittered;
use crate::delivery::ack_floor::read_ack_floor;
use crate::delivery::worker::context::{Conditions, WorkerContext};
use crate::delivery::worker::poison::{SUSPECT_PAUSE, SuspectTracker};
use crate::delivery::worker::tasks::{CLAIM_LIMIT, Task, TaskResult, call_store};
use crate::event::EntryId;
use crate::store::Reclaimed;

/// Between pages of a search that found nothing, so that a long one does not keep the store busy.
const SEARCH_PAUSE: Duration = Duration::from_millis(100);

/// Searches the pending entries of the group page by page, about four times per `claim_idle`.
#[derive(Debug)]
pub(crate) struct Search {
    from: EntryId,
    at: Instant,
    is_busy: bool,
    claim_idle: Duration,
}

impl Search {
    pub(crate) fn new(claim_idle: Duration, now: Instant) -> Self {
        Self { from: EntryId::MIN, at: now, is_busy: false, claim_idle }
    }

    /// Searches the next page if it is due.
    ///
    /// If an entry waits for isolation, the search continues when all other entries are settled and this worker has
    /// the quarantine.
    pub(crate) fn start(
        &mut self,
        now: Instant,
        facts: &Conditions,
        suspects: &mut SuspectTracker,
        context: &WorkerContext,
    ) -> Option<Task> {
        if self.next_due(facts)? > now {
            return None;
        }
        if facts.awaits_isolation && !suspects.try_isolate(facts.unsettled, now) {
            self.at = now + SUSPECT_PAUSE;
            return None;
        }
        self.is_busy = true;
        let limit = facts.free_slots.min(CLAIM_LIMIT);
        let isolation = suspects.limits(facts.unsettled);
        let (store, cursor, from) = (context.store.clone(), context.cursor.clone(), self.from);
        let is_ordered = context.is_ordered;
        Some(Task::new(limit, async move {
            let search = async {
                // In an ordered group the recovery claims all pending entries.
                let found = if is_ordered {
                    Reclaimed::default()
                } else {
                    store.reclaim_isolated(&cursor, cursor.claim_idle, from, limit, isolation).await?
                };
                // Once per search is enough. An error here must not drop the entries just claimed.
                let is_last_page = found.next == EntryId::MIN;
                let ack_floor = if is_last_page { read_ack_floor(&*store, &cursor).await.ok().flatten() } else { None };
                Ok((found, ack_floor))
            };
            let result = call_store(search).await;
            TaskResult::Searched { limit, result }
        }))
    }

    /// Returns when the next page is due, or `None` until an event changes the conditions.
    pub(crate) fn next_due(&self, facts: &Conditions) -> Option<Instant> {
        let may_start = facts.is_open && facts.is_fetching && !self.is_busy && facts.free_slots > 0;
        may_start.then_some(self.at)
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// Ends the call under way.
    pub(crate) fn task_ended(&mut self) {
        self.is_busy = false;
    }

    /// Continues at `next` after a page, or later if that was the last one.
    pub(crate) fn page_ended(&mut self, next: EntryId, has_found: bool, now: Instant) {
        if next == EntryId::MIN {
            return self.restart(now);
        }
        self.from = next;
        self.at = if has_found { now } else { now + SEARCH_PAUSE };
    }

    /// Begins a new search after a pause.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.from = EntryId::MIN;
        self.at = now + jittered(self.claim_idle / 4);
    }
}
