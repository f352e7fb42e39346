//! What is in hand together: an entry that was delivered before without a result may be what the process dies of, and
//! all that is in hand with it is then delivered once more.
//!
//! With each delivery an entry has less company, until it is alone; and of those that must be alone a process has one
//! at a time, whichever worker it is. So only the entry that kills is ever delivered as often as is allowed.

use std::collections::{HashMap, HashSet};

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::Pump;
use super::steps::SUSPECT_PAUSE;
use crate::delivery::GroupConfig;
use crate::event::{Delivery, EntryId};
use crate::store::Care;

/// The most in hand with an entry that was delivered once, and twice.
const MOST: [usize; 2] = [100, 10];

/// The one entry of the process that must be alone. What kills a process kills it for all workers.
static ALONE: Semaphore = Semaphore::const_new(1);

/// Entries in hand that others must be kept away from.
#[derive(Debug)]
pub(super) struct Suspects {
    most: [usize; 3],
    /// The most in hand with each of them.
    in_hand: HashMap<EntryId, usize>,
    /// The most in hand until an entry can be taken that waits for it.
    awaited: Option<usize>,
    alone: Option<SemaphorePermit<'static>>,
    /// When this worker may have the next one that must be alone: other workers may have some as well.
    alone_not_before: Instant,
}

impl Suspects {
    pub(super) fn new(config: &GroupConfig, now: Instant) -> Self {
        // An entry must not fail for the first time with all its attempts used up.
        let alone_from = config.retry.max_attempts.min(config.max_deliveries).saturating_sub(1).clamp(1, 3);
        let most = [1, 2, 3].map(|attempts: u32| match attempts {
            1 if attempts < alone_from => MOST[0],
            2 if attempts < alone_from => MOST[1],
            _ => 1,
        });
        Self { most, in_hand: HashMap::new(), awaited: None, alone: None, alone_not_before: now }
    }

    /// The most that may be in hand now.
    pub(super) fn most_in_hand(&self) -> usize {
        self.in_hand.values().copied().chain(self.awaited).min().unwrap_or(usize::MAX)
    }

    /// These were taken, which were delivered before.
    pub(super) fn taken(&mut self, deliveries: &[Delivery]) {
        let care = Care { in_hand: 0, most: self.most };
        for delivery in deliveries {
            let most = care.most(delivery.attempt.saturating_sub(1));
            if most < usize::MAX {
                self.in_hand.insert(delivery.entry.id, most);
            }
        }
    }

    /// An entry can't be taken because of what is in hand: room is made for it.
    fn await_room(&mut self, attempts: u32) {
        let most = Care { in_hand: 0, most: self.most }.most(attempts);
        if most > 1 || self.may_be_alone() {
            self.awaited = Some(most);
        }
    }

    fn may_be_alone(&mut self) -> bool {
        if self.alone.is_none() && Instant::now() >= self.alone_not_before {
            self.alone = ALONE.try_acquire().ok();
        }
        self.alone.is_some()
    }
}

impl Pump {
    /// Forgets entries that the sink has dealt with.
    pub(super) fn review_suspects(&mut self, now: Instant) {
        let suspects = &mut self.suspects;
        if !suspects.in_hand.is_empty() {
            let ready = self.ready.iter().map(|delivery| delivery.entry.id);
            let running = self.running.iter().flat_map(|running| running.ids.iter().copied());
            let at_risk: HashSet<EntryId> = ready.chain(running).collect();
            suspects.in_hand.retain(|id, _| at_risk.contains(id));
        }
        let is_needed = self.is_searching || self.intake_under_way || suspects.awaited.is_some();
        let has_one = suspects.in_hand.values().any(|most| *most == 1);
        // A sink that is down may stay so for long, and is tried with one entry at a time.
        if suspects.alone.is_some() && (self.breaker.is_open() || !(is_needed || has_one)) {
            suspects.alone = None;
            suspects.alone_not_before = now + SUSPECT_PAUSE * 2;
        }
    }

    /// What may be taken over beside what is in hand.
    pub(super) fn care(&self) -> Care {
        let mut most = self.suspects.most;
        if self.suspects.alone.is_none() {
            for most in most.iter_mut().filter(|most| **most == 1) {
                *most = 0;
            }
        }
        Care { in_hand: self.at_risk(), most }
    }

    /// What would be delivered once more if the process died now. Dead letters are given up already.
    pub(super) fn at_risk(&self) -> usize {
        self.in_hand() - self.dead_letters.len() + self.expected
    }

    /// The search came to an entry that has to wait, delivered so often, or to none.
    pub(super) fn held_back(&mut self, attempts: Option<u32>) {
        self.suspects.awaited = None;
        if let Some(attempts) = attempts {
            self.suspects.await_room(attempts);
        }
    }

    /// How many of these, by how often they were delivered, may be taken over now.
    pub(super) fn fitting(&mut self, attempts: impl Iterator<Item = u32> + Clone) -> usize {
        if attempts.clone().next().is_some_and(|first| self.care().most(first) == 0) {
            self.suspects.may_be_alone();
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
            Suspects::new(&config, now).most
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
