//! Isolation of poison entries: an entry that may end the process is retried beside fewer and fewer other entries.
//!
//! An entry is a suspect if it was delivered before without a result. If the process ends with it, each other entry in
//! flight uses up an attempt too. So with each delivery fewer entries may be in flight beside a suspect, until it is
//! alone. A process has one lone entry at a time, whichever worker holds it. So only the poison entry itself uses up
//! all its deliveries.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::delivery::GroupConfig;
use crate::event::{Delivery, EntryId};
use crate::store::IsolationLimits;

/// The most entries in flight with a suspect that was delivered once, and twice.
const MAX_WITH_SUSPECT: [usize; 2] = [100, 10];

/// Between two checks whether a suspect may be claimed.
pub(crate) const SUSPECT_PAUSE: Duration = Duration::from_millis(20);

/// How long a lone entry keeps the quarantine. An entry that ends the process mostly does so at once.
const MAX_HOLD: Duration = Duration::from_secs(5);

/// Lets one worker of the process at a time hold an entry that must be alone.
///
/// All workers of a process share one quarantine, because a poison entry ends the process for all of them. A worker
/// holds it for one entry, until the sink has handled that, or for 5 s. So a slow sink does not delay the recovery of
/// other groups.
#[derive(Debug, Clone)]
pub struct Quarantine {
    semaphore: Arc<Semaphore>,
    max_hold: Duration,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self::with_max_hold(MAX_HOLD)
    }
}

impl Quarantine {
    /// Returns a quarantine that a lone entry keeps for up to `max_hold`, instead of 5 s.
    pub fn with_max_hold(max_hold: Duration) -> Self {
        Self { semaphore: Arc::new(Semaphore::new(1)), max_hold }
    }
}

/// Tracks the suspects in flight, and limits the entries beside them.
#[derive(Debug)]
pub(crate) struct SuspectTracker {
    /// The most entries in flight with a suspect that was delivered once, twice, or more often.
    limits: [usize; 3],
    /// The suspects in flight, each with the most entries that may be in flight with it.
    in_flight: HashMap<EntryId, usize>,
    /// The most entries in flight until a suspect can be claimed that waits for that.
    awaited: Option<usize>,
    quarantine: Quarantine,
    permit: Option<OwnedSemaphorePermit>,
    /// When the lone entry loses the quarantine.
    hold_ends_at: Instant,
    /// When this worker may take the quarantine again: other workers may wait for it.
    permit_not_before: Instant,
}

impl SuspectTracker {
    pub(crate) fn new(config: &GroupConfig, quarantine: Quarantine, now: Instant) -> Self {
        // An entry must be alone before its last attempt.
        let alone_from = config.retry.max_attempts.min(config.max_deliveries).saturating_sub(1).clamp(1, 3);
        let limits = [1, 2, 3].map(|attempts: u32| match attempts {
            1 if attempts < alone_from => MAX_WITH_SUSPECT[0],
            2 if attempts < alone_from => MAX_WITH_SUSPECT[1],
            _ => 1,
        });
        Self {
            limits,
            in_flight: HashMap::new(),
            awaited: None,
            quarantine,
            permit: None,
            hold_ends_at: now,
            permit_not_before: now,
        }
    }

    /// Returns the most entries that may be in flight now.
    pub(crate) fn max_in_flight(&self) -> usize {
        self.in_flight.values().copied().chain(self.awaited).min().unwrap_or(usize::MAX)
    }

    /// Returns whether an entry waits that must be in flight alone.
    pub(crate) fn awaits_isolation(&self) -> bool {
        self.awaited == Some(1)
    }

    /// Forgets suspects that the sink has handled, and releases the quarantine if that is due.
    pub(crate) fn start(
        &mut self,
        now: Instant,
        is_claiming: bool,
        is_sink_down: bool,
        in_flight: impl FnOnce() -> HashSet<EntryId>,
    ) {
        if !self.in_flight.is_empty() {
            let in_flight = in_flight();
            self.in_flight.retain(|id, _| in_flight.contains(id));
        }
        if self.next_due(now, is_claiming, is_sink_down).is_some_and(|due| due <= now) {
            self.permit = None;
            self.permit_not_before = now + SUSPECT_PAUSE * 2;
        }
    }

    /// Returns when the quarantine is due to be released, or `None` while it is not held or still needed.
    ///
    /// An outage may last, and probes the sink with one entry at a time anyway.
    pub(crate) fn next_due(&self, now: Instant, is_claiming: bool, is_sink_down: bool) -> Option<Instant> {
        let has_lone_entry = || self.in_flight.values().any(|limit| *limit == 1);
        match (&self.permit, is_sink_down, is_claiming) {
            (None, ..) | (Some(_), false, true) => None,
            (Some(_), false, false) if has_lone_entry() => Some(self.hold_ends_at),
            (Some(_), ..) => Some(now),
        }
    }

    /// Tracks the suspects among claimed entries.
    pub(crate) fn track(&mut self, deliveries: &[Delivery], now: Instant) {
        let isolation = IsolationLimits { in_hand: 0, most: self.limits };
        self.hold_ends_at = now + self.quarantine.max_hold;
        for delivery in deliveries {
            let limit = isolation.most(delivery.attempt.saturating_sub(1));
            if limit < usize::MAX {
                self.in_flight.insert(delivery.entry.id, limit);
            }
        }
    }

    /// Takes note of the deliveries of the suspect at which a search stopped, if it stopped at one.
    pub(crate) fn await_suspect(&mut self, attempts: Option<u32>) {
        let isolation = IsolationLimits { in_hand: 0, most: self.limits };
        self.awaited = attempts.map(|attempts| isolation.most(attempts));
    }

    /// Returns the limits for entries that are claimed beside `unsettled` others.
    ///
    /// Without the quarantine, no entry may be claimed that must be alone.
    pub(crate) fn limits(&self, unsettled: usize) -> IsolationLimits {
        let mut most = self.limits;
        if self.permit.is_none() {
            for limit in most.iter_mut().filter(|limit| **limit == 1) {
                *limit = 0;
            }
        }
        IsolationLimits { in_hand: unsettled, most }
    }

    /// Takes the quarantine if no other entry is in flight. Returns whether this worker holds it.
    ///
    /// A worker does not hold the quarantine while it waits for its other entries.
    pub(crate) fn try_isolate(&mut self, unsettled: usize, now: Instant) -> bool {
        if unsettled > 0 {
            return false;
        }
        if self.permit.is_none() && now >= self.permit_not_before {
            self.permit = Arc::clone(&self.quarantine.semaphore).try_acquire_owned().ok();
        }
        self.permit.is_some()
    }

    /// Returns how many entries with these attempts may be claimed beside `unsettled` others, from the first one on.
    pub(crate) fn fitting(
        &mut self,
        attempts: impl Iterator<Item = u32> + Clone,
        unsettled: usize,
        now: Instant,
    ) -> usize {
        if attempts.clone().next().is_some_and(|first| self.limits(unsettled).most(first) == 0) {
            self.try_isolate(unsettled, now);
        }
        self.limits(unsettled).fitting(attempts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_shrink_to_one_before_the_last_attempt() {
        let limits = |max_attempts: u32, max_deliveries: u32| {
            let mut config = GroupConfig::new("g".parse().expect("a name"));
            config.retry.max_attempts = max_attempts;
            config.max_deliveries = max_deliveries;
            let now = Instant::now();
            SuspectTracker::new(&config, Quarantine::default(), now).limits
        };
        assert_eq!(limits(5, 15), [100, 10, 1]);
        assert_eq!(limits(3, 15), [100, 1, 1]);
        assert_eq!(limits(3, 3), [100, 1, 1]);
        assert_eq!(limits(1, 2), [1, 1, 1]);
    }

    #[test]
    fn fitting_entries_are_limited_by_the_strongest_suspect() {
        let isolation = |in_hand| IsolationLimits { in_hand, most: [100, 10, 1] };
        assert_eq!(isolation(0).fitting([1, 1, 1, 2, 2]), 5);
        assert_eq!(isolation(9).fitting([1, 1, 1, 2, 2]), 3);
        assert_eq!(isolation(0).fitting([1, 3]), 1);
        assert_eq!(isolation(0).fitting([3, 1]), 1);
        assert_eq!(isolation(1).fitting([3, 1]), 0);
        assert_eq!(isolation(5_000).fitting([0, 0]), 2);
        assert_eq!(IsolationLimits::NONE.fitting([9; 500]), 500);
    }

    #[test]
    fn quarantine_is_released_when_its_hold_ends() {
        let (config, now) = (GroupConfig::new("g".parse().expect("a name")), Instant::now());
        let quarantine = Quarantine::default();
        let mut first = SuspectTracker::new(&config, quarantine.clone(), now);
        let mut second = SuspectTracker::new(&config, quarantine, now);
        let id = EntryId::new(1, 0);
        assert!(first.try_isolate(0, now) && !second.try_isolate(0, now));
        first.in_flight.insert(id, 1);
        first.hold_ends_at = now + MAX_HOLD;
        first.start(now, false, false, || HashSet::from([id]));
        assert_eq!(first.next_due(now, false, false), Some(now + MAX_HOLD));
        assert_eq!(first.next_due(now, true, false), None, "a claim is under way");
        first.start(now + MAX_HOLD, false, false, || HashSet::from([id]));
        assert!(!first.try_isolate(0, now + MAX_HOLD) && second.try_isolate(0, now + MAX_HOLD));
    }
}
