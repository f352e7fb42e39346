//! The circuit breaker: decides whether the sink is worth calling. Pure: time and random numbers are arguments.
//!
//! The breaker is closed at first, and every call may be made. After a number of failed calls in a row it opens. Then
//! no call is made for a pause, and after it one entry is tried, as a probe. The pause grows until a probe succeeds.
//!
//! The breaker also remembers, for each entry that failed, whether the sink has taken other entries since. Only then is
//! the entry itself at fault.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::event::EntryId;

/// Failed entries that are remembered. Beyond the limit all are forgotten, and found at fault a little later.
const REMEMBERED: usize = 10_000;

/// When a worker stops calling a sink that is down, and how often it probes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerPolicy {
    /// Failed calls in a row after which the worker pauses. 0 turns the breaker off: outages then use up attempts.
    pub failures: u32,
    /// The first pause before one entry is tried. It doubles each time that fails.
    #[serde(with = "humantime_serde")]
    pub pause: Duration,
    /// The longest pause.
    #[serde(with = "humantime_serde")]
    pub max_pause: Duration,
}

impl Default for BreakerPolicy {
    fn default() -> Self {
        Self { failures: 5, pause: Duration::from_secs(1), max_pause: Duration::from_mins(1) }
    }
}

/// The calls that may be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowance {
    /// Any call.
    All,
    /// One call with one entry.
    One,
    /// No call.
    Nothing,
}

/// The state of one sink, as one worker sees it.
#[derive(Debug)]
pub(crate) struct Breaker {
    policy: BreakerPolicy,
    /// Failed calls in a row.
    failures: u32,
    /// Successful calls.
    successes: u64,
    open: Option<OpenBreaker>,
    /// Entries that failed, each with the number of successes before.
    failed_entries: HashMap<EntryId, u64>,
}

#[derive(Debug)]
struct OpenBreaker {
    since: Instant,
    /// When the next probe may begin.
    until: Instant,
    pauses: u32,
    is_probing: bool,
    /// Entries with which a probe failed.
    tried: HashSet<EntryId>,
}

impl Breaker {
    pub(crate) fn new(policy: BreakerPolicy) -> Self {
        Self { policy, failures: 0, successes: 0, open: None, failed_entries: HashMap::new() }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    pub(crate) fn allows(&self, now: Instant) -> Allowance {
        match &self.open {
            None => Allowance::All,
            Some(open) if open.is_probing || now < open.until => Allowance::Nothing,
            Some(_) => Allowance::One,
        }
    }

    /// Returns when the next call may be made: `now` if the breaker is closed, `None` during a probe.
    pub(crate) fn next_call(&self, now: Instant) -> Option<Instant> {
        match &self.open {
            None => Some(now),
            Some(open) => (!open.is_probing).then_some(open.until),
        }
    }

    /// Begins a probe.
    pub(crate) fn begin_probe(&mut self) {
        if let Some(open) = &mut self.open {
            open.is_probing = true;
        }
    }

    /// Ends a probe. If its call showed nothing, another one may begin at once.
    pub(crate) fn end_probe(&mut self) {
        if let Some(open) = &mut self.open {
            open.is_probing = false;
        }
    }

    /// Closes the breaker: the sink took an entry, or refused one for good. Returns how long it was open, if it was.
    pub(crate) fn succeeded(&mut self, now: Instant) -> Option<Duration> {
        self.failures = 0;
        self.successes += 1;
        self.open.take().map(|open| now.duration_since(open.since))
    }

    /// Counts a call that failed, though another may succeed. Returns whether that opened the breaker.
    pub(crate) fn failed(&mut self, now: Instant, random: f64) -> bool {
        self.failures = self.failures.saturating_add(1);
        if self.open.is_none() && self.failures < self.policy.failures {
            return false;
        }
        self.trip(now, random)
    }

    /// Opens the breaker, because the sink is known to be down. Returns whether it was closed.
    pub(crate) fn trip(&mut self, now: Instant, random: f64) -> bool {
        if self.policy.failures == 0 {
            return false;
        }
        let has_opened = self.open.is_none();
        let fresh = OpenBreaker { since: now, until: now, pauses: 0, is_probing: false, tried: HashSet::new() };
        let open = self.open.get_or_insert(fresh);
        if !has_opened {
            if !open.is_probing {
                // The call began before the breaker opened, so it shows nothing new.
                return false;
            }
            open.is_probing = false;
            open.pauses = open.pauses.saturating_add(1);
        }
        let longest = self.policy.pause.saturating_mul(1 << open.pauses.min(31)).min(self.policy.max_pause);
        open.until = now + longest.mul_f64(0.5 + 0.5 * random);
        has_opened
    }

    /// Makes no probe before `until`, if the breaker is open. The sink requested that pause.
    pub(crate) fn postpone(&mut self, until: Instant) {
        if let Some(open) = &mut self.open {
            open.until = open.until.max(until);
        }
    }

    /// Remembers a failed entry. Returns whether the entry itself is at fault, as far as that is known.
    ///
    /// It is at fault if the sink took others after its first failure. An entry that fails for the first time is at
    /// fault if the sink worked right before. [`Breaker::failed`] must be called first.
    pub(crate) fn record_failed_entry(&mut self, id: EntryId) -> bool {
        if let Some(before) = self.failed_entries.get(&id) {
            return self.successes > *before;
        }
        if self.failed_entries.len() >= REMEMBERED {
            self.failed_entries.clear();
        }
        self.failed_entries.insert(id, self.successes);
        self.open.is_none() && self.successes > 0 && self.failures <= 1
    }

    /// Remembers that a probe with the entry failed.
    pub(crate) fn record_tried(&mut self, id: EntryId) {
        if let Some(open) = &mut self.open {
            open.tried.insert(id);
        }
    }

    /// Returns whether a probe with the entry has failed since the breaker opened.
    pub(crate) fn was_tried(&self, id: EntryId) -> bool {
        self.open.as_ref().is_some_and(|open| open.tried.contains(&id))
    }

    /// Allows probes with all entries again, after each one was tried.
    pub(crate) fn clear_tried(&mut self) {
        if let Some(open) = &mut self.open {
            open.tried.clear();
        }
    }

    /// Returns whether any failed entry is remembered.
    pub(crate) fn has_failed_entries(&self) -> bool {
        !self.failed_entries.is_empty()
    }

    /// Forgets an entry that was settled for good.
    pub(crate) fn forget_failed_entry(&mut self, id: EntryId) {
        self.failed_entries.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn breaker(failures: u32) -> Breaker {
        Breaker::new(BreakerPolicy { failures, pause: SECOND, max_pause: SECOND * 5 })
    }

    fn id(n: u64) -> EntryId {
        EntryId::new(n, 0)
    }

    #[test]
    fn breaker_opens_only_after_failures_in_a_row() {
        let (mut breaker, now) = (breaker(3), Instant::now());
        for _ in 0..10 {
            assert_eq!([breaker.failed(now, 0.5), breaker.failed(now, 0.5)], [false, false]);
            assert_eq!(breaker.succeeded(now), None);
        }
        assert_eq!(breaker.allows(now), Allowance::All);
        let opened: Vec<_> = (0..4).map(|_| breaker.failed(now, 0.5)).collect();
        assert_eq!(opened, [false, false, true, false], "calls that began before it opened show nothing new");
        assert_eq!(breaker.allows(now), Allowance::Nothing);
    }

    #[test]
    fn probes_follow_pauses_that_grow_to_a_limit() {
        let (mut breaker, mut now) = (breaker(1), Instant::now());
        let opened_at = now;
        assert!(breaker.failed(now, 1.0));
        for pause in [1, 2, 4, 5, 5].map(|factor| SECOND * factor) {
            assert_eq!(breaker.next_call(now), Some(now + pause));
            assert_eq!(breaker.allows(now + pause - Duration::from_millis(1)), Allowance::Nothing);
            now += pause;
            assert_eq!(breaker.allows(now), Allowance::One);
            breaker.begin_probe();
            assert_eq!((breaker.allows(now), breaker.next_call(now)), (Allowance::Nothing, None));
            assert!(!breaker.failed(now, 1.0), "it was open already");
        }
        now += SECOND * 5;
        breaker.begin_probe();
        assert_eq!(breaker.succeeded(now), Some(now - opened_at));
        assert_eq!((breaker.allows(now), breaker.next_call(now)), (Allowance::All, Some(now)));
        assert!(breaker.failed(now, 0.0));
        assert_eq!(
            breaker.next_call(now),
            Some(now + SECOND / 2),
            "half of the pause is random, and the growth starts again"
        );
    }

    #[test]
    fn postponed_probe_waits_for_the_requested_pause() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.postpone(now + SECOND);
        assert_eq!(breaker.allows(now), Allowance::All);
        breaker.trip(now, 0.0);
        breaker.postpone(now + SECOND * 9);
        breaker.postpone(now + SECOND);
        assert_eq!(breaker.next_call(now), Some(now + SECOND * 9));
    }

    #[test]
    fn inconclusive_probe_is_repeated() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.trip(now, 0.0);
        breaker.begin_probe();
        breaker.end_probe();
        assert_eq!(breaker.allows(now + SECOND), Allowance::One);
    }

    #[test]
    fn zero_failures_turn_the_breaker_off() {
        let (mut breaker, now) = (breaker(0), Instant::now());
        assert!((0..100).all(|_| !breaker.failed(now, 0.5)));
        assert!(!breaker.trip(now, 0.5));
        assert_eq!(breaker.allows(now), Allowance::All);
    }

    #[test]
    fn entry_is_at_fault_only_if_the_sink_took_others_since() {
        let (mut breaker, now) = (breaker(5), Instant::now());
        breaker.failed(now, 0.5);
        assert!(!breaker.record_failed_entry(id(1)), "nothing is known of this sink yet");
        breaker.failed(now, 0.5);
        assert!(!breaker.record_failed_entry(id(1)));
        breaker.succeeded(now);
        breaker.failed(now, 0.5);
        assert!(breaker.record_failed_entry(id(1)), "the sink took another entry");
        assert!(breaker.record_failed_entry(id(2)), "the sink worked right before");
        breaker.failed(now, 0.5);
        assert!(!breaker.record_failed_entry(id(3)), "two in a row may be an outage");
        breaker.forget_failed_entry(id(1));
        breaker.trip(now, 0.5);
        assert!(!breaker.record_failed_entry(id(1)), "the entry is forgotten, and the sink is down");
    }

    #[test]
    fn tried_entries_are_known_until_they_are_cleared() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.trip(now, 0.5);
        breaker.begin_probe();
        breaker.record_tried(id(1));
        breaker.failed(now, 0.5);
        assert!(breaker.was_tried(id(1)) && !breaker.was_tried(id(2)));
        breaker.clear_tried();
        assert!(!breaker.was_tried(id(1)));
        breaker.record_tried(id(2));
        breaker.succeeded(now);
        breaker.trip(now, 0.5);
        assert!(!breaker.was_tried(id(2)));
    }

    proptest! {
        /// In any order of events an open breaker allows one call at a time, after a pause within the limit.
        #[test]
        fn open_breaker_allows_one_probe_within_the_longest_pause(steps in prop::collection::vec((0_u8..5, 0_u64..3000), 1..200)) {
            let (mut breaker, mut now) = (breaker(3), Instant::now());
            let mut probes = 0;
            for (step, ms) in steps {
                now += Duration::from_millis(ms);
                let was_open = breaker.is_open();
                match step {
                    0 => { breaker.succeeded(now); probes = 0; }
                    1 | 2 => { breaker.failed(now, 0.5); probes = 0; }
                    3 => { breaker.trip(now, 0.9); probes = 0; }
                    _ if breaker.allows(now) == Allowance::One => { breaker.begin_probe(); probes += 1; }
                    _ => {}
                }
                prop_assert!(probes <= 1);
                prop_assert!(!(step == 0 && breaker.is_open()));
                prop_assert!(was_open || step != 4 || !breaker.is_open());
                if let Some(due) = breaker.next_call(now) {
                    prop_assert!(due <= now + SECOND * 5);
                }
                if breaker.is_open() && breaker.next_call(now).is_none() {
                    prop_assert_eq!(probes, 1, "a probe is under way");
                }
            }
        }
    }
}
