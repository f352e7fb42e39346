//! Ownership: extends the entries in flight, so that no other consumer claims them.
//!
//! If the process stood still, other consumers may have claimed its entries. Then nothing goes to the sink until an
//! extension has shown which entries are still this worker's. A lost and regained name only leads to a recovery.

use std::time::Duration;

use tokio::time::Instant;

use crate::delivery::worker::context::WorkerContext;
use crate::delivery::worker::tasks::{Task, TaskResult, call_store};
use crate::event::EntryId;

/// The most ids in one extension.
const EXTEND_LIMIT: usize = 500;

/// Extends entries three times per `claim_idle`.
#[derive(Debug)]
pub(crate) struct Ownership {
    /// The last known generation of the name lease.
    lease_generation: u64,
    is_uncertain: bool,
    extend_at: Instant,
    is_busy: bool,
    /// The latest time at which the loop planned to run again.
    wake_at: Instant,
    claim_idle: Duration,
}

impl Ownership {
    pub(crate) fn new(lease_generation: u64, claim_idle: Duration, now: Instant) -> Self {
        let extend_at = now + claim_idle / 3;
        Self { lease_generation, is_uncertain: false, extend_at, is_busy: false, wake_at: now, claim_idle }
    }

    /// Plans the next run of the loop.
    pub(crate) fn sleep_until(&mut self, wake_at: Instant) {
        self.wake_at = wake_at;
    }

    /// Returns whether the name lease was lost and taken again since the last call.
    pub(crate) fn has_new_lease(&mut self, generation: u64) -> bool {
        std::mem::replace(&mut self.lease_generation, generation) != generation
    }

    /// Doubts the ownership of all entries if the loop runs much later than planned.
    pub(crate) fn check_clock(&mut self, now: Instant) {
        if now > self.wake_at + self.claim_idle / 2 {
            self.is_uncertain = true;
            self.extend_at = now;
        }
    }

    /// Extends entries if that is due. `old_entries` returns the entries that are at least as old as its argument.
    pub(crate) fn start(
        &mut self,
        now: Instant,
        old_entries: impl FnOnce(Duration) -> Vec<EntryId>,
        context: &WorkerContext,
    ) -> Option<Task> {
        if self.next_due()? > now {
            return None;
        }
        self.extend_at = now + self.claim_idle / 3;
        let was_uncertain = self.is_uncertain;
        let ids = old_entries(if was_uncertain { Duration::ZERO } else { self.claim_idle / 4 });
        if ids.is_empty() {
            self.is_uncertain = false;
            return None;
        }
        self.is_busy = true;
        let (store, cursor) = (context.store.clone(), context.cursor.clone());
        Some(Task::new(0, async move {
            let extend = async {
                let mut lost = Vec::new();
                for page in ids.chunks(EXTEND_LIMIT) {
                    lost.extend(store.extend(&cursor, page).await?);
                }
                Ok(lost)
            };
            TaskResult::Extended { was_uncertain, result: call_store(extend).await }
        }))
    }

    /// Returns when the next extension is due, or `None` while one is under way.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        (!self.is_busy).then_some(self.extend_at)
    }

    /// Returns whether this worker may have lost entries without knowing it.
    pub(crate) fn is_uncertain(&self) -> bool {
        self.is_uncertain
    }

    /// Extends all entries at the next run of the loop.
    pub(crate) fn extend_now(&mut self, now: Instant) {
        self.extend_at = now;
    }

    /// Takes note of an extension that has ended. `was_uncertain` is its state when it began.
    pub(crate) fn extended(&mut self, was_uncertain: bool, is_ok: bool, now: Instant) {
        self.is_busy = false;
        if self.is_uncertain && !was_uncertain {
            self.extend_at = now;
        }
        if is_ok && was_uncertain {
            self.is_uncertain = false;
        }
        if !is_ok {
            // There is time for several attempts before another consumer may claim the entries.
            self.extend_at = now + self.claim_idle / 12;
        }
    }
}
