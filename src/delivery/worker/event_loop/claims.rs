//! Taking over what is pending already: entries whose next attempt is due, what an earlier life of this worker left, and
//! what others left.

use std::time::Duration;

use tokio::time::Instant;
use tracing::error;

use crate::delivery::ack_floor::{AckFloor, read_ack_floor};
use crate::delivery::worker::event_loop::intake::{TaskResult, asked};
use crate::delivery::worker::event_loop::poison::SUSPECT_PAUSE;
use crate::delivery::worker::event_loop::{CLAIM_LIMIT, WorkerLoop};
use crate::event::EntryId;
use crate::store::{Care, Claimed, Cursor, Reclaimed, Store, StoreError, StoreErrorKind};

/// Ids that a log line names; there may be many.
const NAMED_IDS: usize = 5;
/// Between pages of a search that found nothing, so that a long one does not keep the store busy.
const SEARCH_PAUSE: Duration = Duration::from_millis(100);

/// Why entries are taken over by their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimReason {
    Retry,
    Sweep,
}

/// What taking over by ids brought.
#[derive(Debug, Default)]
pub(crate) struct ClaimResult {
    claimed: Claimed,
    not_owned: Vec<EntryId>,
}

impl WorkerLoop {
    pub(crate) fn start_retries(&mut self, now: Instant) {
        if self.retries.is_empty() || !self.claiming.is_empty() || now < self.claim_not_before {
            return;
        }
        let limit = match (self.breaker.is_open(), self.is_ordered) {
            (true, _) => self.retry_slots(),
            // Where an order is kept there is always room for those that others wait for.
            (false, true) => CLAIM_LIMIT,
            (false, false) => self.free_slots().min(CLAIM_LIMIT),
        };
        let ids = self.retries.take_due(now, limit);
        if !ids.is_empty() {
            self.claiming.clone_from(&ids);
            self.start_taking_over(ClaimReason::Retry, ids);
        }
    }

    pub(crate) fn start_taking_over(&mut self, purpose: ClaimReason, ids: Vec<EntryId>) {
        self.expected += ids.len();
        let (store, cursor) = (self.store.clone(), self.cursor.clone());
        let takes_from_others = self.is_ordered && purpose == ClaimReason::Sweep;
        self.tasks.spawn(async move {
            let take_over = async {
                if !takes_from_others {
                    return take_over(&*store, &cursor, &ids).await;
                }
                let claimed = store.claim(&cursor, &ids, Duration::ZERO).await?;
                Ok(ClaimResult { claimed, not_owned: Vec::new() })
            };
            let result = asked(take_over).await;
            TaskResult::TookOver { purpose, ids, result }
        });
    }

    pub(crate) fn took_over(&mut self, purpose: ClaimReason, ids: &[EntryId], result: Result<ClaimResult, StoreError>) {
        self.expected -= ids.len();
        match purpose {
            ClaimReason::Retry => self.claiming.clear(),
            ClaimReason::Sweep => self.intake_under_way = false,
        }
        match (result, purpose) {
            (Ok(ClaimResult { claimed, not_owned }), purpose) => {
                self.claim_backoff.reset();
                self.meters.not_owned.inc_by(not_owned.len() as u64);
                let taken: Vec<EntryId> = claimed.deliveries.iter().map(|delivery| delivery.entry.id).collect();
                for id in ids.iter().filter(|id| !taken.contains(id)) {
                    self.retries.forget(*id);
                    self.ready.done(*id);
                }
                if purpose == ClaimReason::Sweep {
                    self.suspects.taken(&claimed.deliveries);
                }
                self.claimed(claimed);
            }
            (Err(error), ClaimReason::Sweep) => self.intake_failed(&error),
            (Err(error), ClaimReason::Retry) if error.kind() == StoreErrorKind::NoGroup => {
                for id in ids {
                    self.retries.forget(*id);
                    self.ready.done(*id);
                }
                self.group_is_gone();
            }
            (Err(error), ClaimReason::Retry) => {
                self.claim_not_before = Instant::now() + self.claim_backoff.next_delay();
                for id in ids {
                    self.retries.wait(*id, self.claim_not_before, false);
                }
                self.step_failed(&error, "the worker cannot take entries for their next attempt");
            }
        }
    }

    /// Takes claimed entries in hand, and tells of those found lost.
    fn claimed(&mut self, claimed: Claimed) {
        if !claimed.lost.is_empty() {
            self.meters.trimmed_pending.inc_by(claimed.lost.len() as u64);
            let first: Vec<String> = claimed.lost.iter().take(NAMED_IDS).map(EntryId::to_string).collect();
            error!(
                entries = claimed.lost.len(),
                ?first,
                "entries are lost: trimmed by others before they were handled"
            );
            for id in &claimed.lost {
                self.retries.forget(*id);
            }
        }
        let mut deliveries = claimed.deliveries;
        if deliveries.is_empty() {
            return;
        }
        let in_hand = self.in_hand_ids();
        // What is in hand already is settled once: by the delivery in hand, which is this consumer's as well.
        deliveries.retain(|delivery| !in_hand.contains(&delivery.entry.id));
        for delivery in &deliveries {
            self.retries.taken(delivery.entry.id);
        }
        self.admit(deliveries);
    }

    pub(crate) fn start_search(&mut self, now: Instant) {
        let is_due = self.may_search() && now >= self.search_at;
        let limit = self.free_slots().min(CLAIM_LIMIT);
        if !is_due || limit == 0 {
            return;
        }
        if self.suspects.awaits_turn() && !self.may_be_alone(now) {
            self.search_at = now + SUSPECT_PAUSE;
            return;
        }
        self.is_searching = true;
        self.expected += limit;
        let care = Care { in_hand: self.at_risk() - limit, ..self.care() };
        let (store, cursor, from) = (self.store.clone(), self.cursor.clone(), self.search_from);
        let is_sweep_enough = self.is_ordered;
        self.tasks.spawn(async move {
            let search = async {
                let found = if is_sweep_enough {
                    Reclaimed::default()
                } else {
                    store.reclaim_with_care(&cursor, cursor.claim_idle, from, limit, care).await?
                };
                // Once per search is enough, and an answer about the floor is not worth the entries just claimed.
                let floor = if found.next == EntryId::MIN {
                    read_ack_floor(&*store, &cursor).await.ok().flatten()
                } else {
                    None
                };
                Ok((found, floor))
            };
            let result = asked(search).await;
            TaskResult::Searched { limit, result }
        });
    }

    pub(crate) fn searched(&mut self, limit: usize, result: Result<(Reclaimed, Option<AckFloor>), StoreError>) {
        self.expected -= limit;
        self.is_searching = false;
        match result {
            Ok((Reclaimed { claimed, next, held_back }, floor)) => {
                self.floor = floor.or(self.floor.take());
                if self.is_ordered {
                    self.doubt();
                }
                self.search_from = next;
                self.search_at = match (next == EntryId::MIN, claimed.deliveries.is_empty()) {
                    (true, _) => self.next_search(),
                    (false, true) => Instant::now() + SEARCH_PAUSE,
                    (false, false) => Instant::now(),
                };
                self.meters.claimed.inc_by(claimed.deliveries.len() as u64);
                // An entry that is just being taken for its next attempt comes with that claim.
                let (mut claimed, claiming) = (claimed, &self.claiming);
                claimed.deliveries.retain(|delivery| !claiming.contains(&delivery.entry.id));
                self.suspects.taken(&claimed.deliveries);
                self.claimed(claimed);
                self.held_back(held_back);
            }
            Err(error) => {
                self.search_from = EntryId::MIN;
                self.search_at = self.next_search();
                self.held_back(None);
                self.sweep_due = true;
                self.step_failed(&error, "the worker cannot search for entries that others left");
            }
        }
    }
}

/// Takes entries for one more attempt that are pending on this consumer, and leaves those that are not any more:
/// while they count as delivered just now, no one else takes them.
async fn take_over(store: &dyn Store, cursor: &Cursor, ids: &[EntryId]) -> Result<ClaimResult, StoreError> {
    let not_owned = store.extend(cursor, ids).await?;
    let owned: Vec<EntryId> = ids.iter().filter(|id| !not_owned.contains(id)).copied().collect();
    if owned.is_empty() {
        return Ok(ClaimResult { claimed: Claimed::default(), not_owned });
    }
    let claimed = store.claim(cursor, &owned, Duration::ZERO).await?;
    Ok(ClaimResult { claimed, not_owned })
}
