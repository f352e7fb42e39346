//! What is in hand together: an entry that was delivered before without a result may be what the process dies of, and
//! all that is in hand with it is then delivered once more.
//!
//! With each delivery an entry has less company, until it is alone; and of those that must be alone a process has one
//! at a time, whichever worker it is. So only the entry that kills is ever delivered as often as is allowed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::delivery::GroupConfig;
use crate::delivery::worker::event_loop::WorkerLoop;
use crate::event::{Delivery, EntryId};
use crate::store::Care;

/// The most in hand with an entry that was delivered once, and twice.
const MOST: [usize; 2] = [100, 10];

/// How soon to look again whether all is done that was begun before a suspicious entry.
pub(crate) const SUSPECT_PAUSE: Duration = Duration::from_millis(20);

/// How long an entry that must be alone is the only one. What kills a process mostly does so at once.
const TURN: Duration = Duration::from_secs(5);

/// Whose turn it is to have an entry in hand that must be alone. All workers of a process share one, for what kills a
/// process kills it for all of them.
///
/// A turn is for one entry. It ends when the sink has dealt with that, or after 5 s: a sink that is slow must not hold
/// up what the workers of other groups have to recover.
#[derive(Debug, Clone)]
pub struct Quarantine {
    place: Arc<Semaphore>,
    turn: Duration,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self::with_max_hold(TURN)
    }
}

impl Quarantine {
    /// One whose turns last so long at most, instead of 5 s.
    pub fn with_max_hold(turn: Duration) -> Self {
        Self { place: Arc::new(Semaphore::new(1)), turn }
    }
}

/// Entries in hand that others must be kept away from.
#[derive(Debug)]
pub(crate) struct SuspectTracker {
    most: [usize; 3],
    /// The most in hand with each of them.
    in_hand: HashMap<EntryId, usize>,
    /// The most in hand until an entry can be taken that waits for it.
    awaited: Option<usize>,
    quarantine: Quarantine,
    turn: Option<OwnedSemaphorePermit>,
    /// When the turn is over for the entry that was taken.
    turn_ends_at: Instant,
    /// When this worker may have its next turn: other workers may wait for one as well.
    turn_not_before: Instant,
}

impl SuspectTracker {
    pub(crate) fn new(config: &GroupConfig, quarantine: Quarantine, now: Instant) -> Self {
        // An entry must not fail for the first time with all its attempts used up.
        let alone_from = config.retry.max_attempts.min(config.max_deliveries).saturating_sub(1).clamp(1, 3);
        let most = [1, 2, 3].map(|attempts: u32| match attempts {
            1 if attempts < alone_from => MOST[0],
            2 if attempts < alone_from => MOST[1],
            _ => 1,
        });
        Self {
            most,
            in_hand: HashMap::new(),
            awaited: None,
            quarantine,
            turn: None,
            turn_ends_at: now,
            turn_not_before: now,
        }
    }

    /// The most that may be in hand now.
    pub(crate) fn most_in_hand(&self) -> usize {
        self.in_hand.values().copied().chain(self.awaited).min().unwrap_or(usize::MAX)
    }

    /// Whether an entry waits for all others to be gone, and for this worker's turn.
    pub(crate) fn awaits_turn(&self) -> bool {
        self.awaited == Some(1)
    }

    /// These were taken, which were delivered before.
    pub(crate) fn taken(&mut self, deliveries: &[Delivery]) {
        let care = Care { in_hand: 0, most: self.most };
        self.turn_ends_at = Instant::now() + self.quarantine.turn;
        for delivery in deliveries {
            let most = care.most(delivery.attempt.saturating_sub(1));
            if most < usize::MAX {
                self.in_hand.insert(delivery.entry.id, most);
            }
        }
    }

    fn has_turn(&mut self, now: Instant) -> bool {
        if self.turn.is_none() && now >= self.turn_not_before {
            self.turn = Arc::clone(&self.quarantine.place).try_acquire_owned().ok();
        }
        self.turn.is_some()
    }
}

impl WorkerLoop {
    /// Forgets entries that the sink has dealt with.
    pub(crate) fn review_suspects(&mut self, now: Instant) {
        let suspects = &mut self.suspects;
        if !suspects.in_hand.is_empty() {
            let ready = self.ready.iter().map(|delivery| delivery.entry.id);
            let running = self.running.iter().flat_map(|running| running.ids.iter().copied());
            let at_risk: HashSet<EntryId> = ready.chain(running).collect();
            suspects.in_hand.retain(|id, _| at_risk.contains(id));
        }
        let is_taking = self.is_searching || self.intake_under_way;
        let has_one = suspects.in_hand.values().any(|most| *most == 1) && now < suspects.turn_ends_at;
        // A sink that is down may stay so for long, and is tried with one entry at a time.
        if suspects.turn.is_some() && (self.breaker.is_open() || !(is_taking || has_one)) {
            suspects.turn = None;
            suspects.turn_not_before = now + SUSPECT_PAUSE * 2;
        }
    }

    /// What may be taken over beside what is in hand.
    pub(crate) fn care(&self) -> Care {
        let mut most = self.suspects.most;
        if self.suspects.turn.is_none() {
            for most in most.iter_mut().filter(|most| **most == 1) {
                *most = 0;
            }
        }
        Care { in_hand: self.at_risk(), most }
    }

    /// What would be delivered once more if the process died now. Dead letters are given up already.
    pub(crate) fn at_risk(&self) -> usize {
        self.in_hand() - self.dead_letters.len() + self.expected
    }

    /// Whether an entry may be taken that must be alone. A turn is not spent on waiting for others to end.
    pub(crate) fn may_be_alone(&mut self, now: Instant) -> bool {
        self.at_risk() == 0 && self.suspects.has_turn(now)
    }

    /// The search came to an entry that has to wait, delivered so often, or to none.
    pub(crate) fn held_back(&mut self, attempts: Option<u32>) {
        let care = Care { in_hand: 0, most: self.suspects.most };
        self.suspects.awaited = attempts.map(|attempts| care.most(attempts));
    }

    /// How many of these, by how often they were delivered, may be taken over now.
    pub(crate) fn fitting(&mut self, attempts: impl Iterator<Item = u32> + Clone) -> usize {
        // What is in hand while the sink is down was tried, and nobody died of it. If that kept all others away, a sink
        // that only refuses what is in hand would look down for ever.
        if self.breaker.is_open() {
            return 1;
        }
        if attempts.clone().next().is_some_and(|first| self.care().most(first) == 0) {
            self.may_be_alone(Instant::now());
        }
        self.care().fitting(attempts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn company_gets_smaller_until_an_entry_is_alone_before_its_last_attempt() {
        let most = |max_attempts: u32, max_deliveries: u32| {
            let mut config = GroupConfig::new("g".parse().expect("a name"));
            config.retry.max_attempts = max_attempts;
            config.max_deliveries = max_deliveries;
            let now = Instant::now();
            SuspectTracker::new(&config, Quarantine::default(), now).most
        };
        assert_eq!(most(5, 15), [100, 10, 1]);
        assert_eq!(most(3, 15), [100, 1, 1]);
        assert_eq!(most(3, 3), [100, 1, 1]);
        assert_eq!(most(1, 2), [1, 1, 1]);
    }

    #[test]
    fn what_fits_is_bounded_by_the_most_suspicious_of_all() {
        let care = |in_hand| Care { in_hand, most: [100, 10, 1] };
        assert_eq!(care(0).fitting([1, 1, 1, 2, 2]), 5);
        assert_eq!(care(9).fitting([1, 1, 1, 2, 2]), 3);
        assert_eq!(care(0).fitting([1, 3]), 1);
        assert_eq!(care(0).fitting([3, 1]), 1);
        assert_eq!(care(1).fitting([3, 1]), 0);
        assert_eq!(care(5_000).fitting([0, 0]), 2);
        assert_eq!(Care::NONE.fitting([9; 500]), 500);
    }
}
