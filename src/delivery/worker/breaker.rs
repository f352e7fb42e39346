//! The circuit breaker: whether a sink is worth calling. Pure: time and chance are arguments.
//!
//! Closed, every call may be made. After so many calls in a row that failed it opens: no calls for a while, then one
//! entry at a time is tried, after longer and longer pauses, until one is taken. It also knows of each entry that
//! failed whether the sink has taken others since: only then is the failure the entry's own.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::event::EntryId;

/// Failed entries that are remembered. Beyond it all are forgotten: they are then blamed a little later.
const REMEMBERED: usize = 10_000;

/// When a worker stops calling a sink that is down, and how often it tries again.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerPolicy {
    /// After how many calls in a row that failed. 0: never, and entries are given up during an outage.
    pub failures: u32,
    /// The first pause before one entry is tried; doubled each time it fails.
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

/// Which calls may be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowance {
    /// Any.
    All,
    /// One, with one entry.
    One,
    /// None.
    Nothing,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Breaker {
    policy: BreakerPolicy,
    /// Calls in a row that failed.
    failures: u32,
    /// Calls that succeeded.
    successes: u64,
    open: Option<Open>,
    /// Entries that failed, with the successes there were before.
    accused: HashMap<EntryId, u64>,
}

#[derive(Debug)]
struct Open {
    since: Instant,
    /// When the next call may be made.
    until: Instant,
    pauses: u32,
    is_probing: bool,
    /// Entries that the sink was tried with, in vain.
    tried: HashSet<EntryId>,
}

impl Breaker {
    pub(crate) fn new(policy: BreakerPolicy) -> Self {
        Self { policy, failures: 0, successes: 0, open: None, accused: HashMap::new() }
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

    /// When one call may be made again, if none may be made now.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.open.as_ref().filter(|open| !open.is_probing).map(|open| open.until)
    }

    /// The one call is being made.
    pub(crate) fn probe(&mut self) {
        if let Some(open) = &mut self.open {
            open.is_probing = true;
        }
    }

    /// The one call has ended without telling anything: another one may be made at once.
    pub(crate) fn told_nothing(&mut self) {
        if let Some(open) = &mut self.open {
            open.is_probing = false;
        }
    }

    /// The sink took something, or said no for good. If it was taken for down, says for how long.
    pub(crate) fn succeeded(&mut self, now: Instant) -> Option<Duration> {
        self.failures = 0;
        self.successes += 1;
        self.open.take().map(|open| now.duration_since(open.since))
    }

    /// A call failed for a reason that may pass. Says whether that has opened the breaker.
    pub(crate) fn failed(&mut self, now: Instant, draw: f64) -> bool {
        self.failures = self.failures.saturating_add(1);
        if self.open.is_none() && self.failures < self.policy.failures {
            return false;
        }
        self.trip(now, draw)
    }

    /// The sink is known to be down. Says whether that has opened the breaker.
    pub(crate) fn trip(&mut self, now: Instant, draw: f64) -> bool {
        if self.policy.failures == 0 {
            return false;
        }
        let has_opened = self.open.is_none();
        let fresh = Open { since: now, until: now, pauses: 0, is_probing: false, tried: HashSet::new() };
        let open = self.open.get_or_insert(fresh);
        if !has_opened {
            if !open.is_probing {
                // What ends now began before it opened, and tells nothing new.
                return false;
            }
            open.is_probing = false;
            open.pauses = open.pauses.saturating_add(1);
        }
        let longest = self.policy.pause.saturating_mul(1 << open.pauses.min(31)).min(self.policy.max_pause);
        open.until = now + longest.mul_f64(0.5 + 0.5 * draw);
        has_opened
    }

    /// The sink asked to be left alone until then, if it is taken for down.
    pub(crate) fn postpone(&mut self, until: Instant) {
        if let Some(open) = &mut self.open {
            open.until = open.until.max(until);
        }
    }

    /// The entry failed. Says whether that is its own fault, as far as can be told: the sink took others after it had
    /// failed first; or it worked right before, where the entry has not failed here yet.
    ///
    /// Is to be asked after [`Breaker::failed`].
    pub(crate) fn accuse(&mut self, id: EntryId) -> bool {
        if let Some(before) = self.accused.get(&id) {
            return self.successes > *before;
        }
        if self.accused.len() >= REMEMBERED {
            self.accused.clear();
        }
        self.accused.insert(id, self.successes);
        self.open.is_none() && self.successes > 0 && self.failures <= 1
    }

    /// The sink was tried with the entry, in vain.
    pub(crate) fn tried(&mut self, id: EntryId) {
        if let Some(open) = &mut self.open {
            open.tried.insert(id);
        }
    }

    /// Whether the sink was tried with the entry since the breaker opened, in vain.
    pub(crate) fn was_tried(&self, id: EntryId) -> bool {
        self.open.as_ref().is_some_and(|open| open.tried.contains(&id))
    }

    /// The sink was tried with every entry there is: another round begins.
    pub(crate) fn try_all_again(&mut self) {
        if let Some(open) = &mut self.open {
            open.tried.clear();
        }
    }

    /// Whether any entry has failed here that is not settled.
    pub(crate) fn has_accused(&self) -> bool {
        !self.accused.is_empty()
    }

    /// The entry was settled for good.
    pub(crate) fn acquit(&mut self, id: EntryId) {
        self.accused.remove(&id);
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
    fn it_opens_after_failures_in_a_row_only() {
        let (mut breaker, now) = (breaker(3), Instant::now());
        for _ in 0..10 {
            assert_eq!([breaker.failed(now, 0.5), breaker.failed(now, 0.5)], [false, false]);
            assert_eq!(breaker.succeeded(now), None);
        }
        assert_eq!(breaker.allows(now), Allowance::All);
        let opened: Vec<_> = (0..4).map(|_| breaker.failed(now, 0.5)).collect();
        assert_eq!(opened, [false, false, true, false], "what began before it opened tells nothing new");
        assert_eq!(breaker.allows(now), Allowance::Nothing);
    }

    #[test]
    fn one_entry_is_tried_after_pauses_that_grow_to_a_limit() {
        let (mut breaker, mut now) = (breaker(1), Instant::now());
        let opened_at = now;
        assert!(breaker.failed(now, 1.0));
        for pause in [1, 2, 4, 5, 5].map(|factor| SECOND * factor) {
            assert_eq!(breaker.due(), Some(now + pause));
            assert_eq!(breaker.allows(now + pause - Duration::from_millis(1)), Allowance::Nothing);
            now += pause;
            assert_eq!(breaker.allows(now), Allowance::One);
            breaker.probe();
            assert_eq!((breaker.allows(now), breaker.due()), (Allowance::Nothing, None));
            assert!(!breaker.failed(now, 1.0), "it was open");
        }
        now += SECOND * 5;
        breaker.probe();
        assert_eq!(breaker.succeeded(now), Some(now - opened_at));
        assert_eq!((breaker.allows(now), breaker.due()), (Allowance::All, None));
        assert!(breaker.failed(now, 0.0));
        assert_eq!(breaker.due(), Some(now + SECOND / 2), "half of a pause is by chance; it begins anew");
    }

    #[test]
    fn a_sink_that_asks_for_time_gets_it() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.postpone(now + SECOND);
        assert_eq!(breaker.allows(now), Allowance::All);
        breaker.trip(now, 0.0);
        breaker.postpone(now + SECOND * 9);
        breaker.postpone(now + SECOND);
        assert_eq!(breaker.due(), Some(now + SECOND * 9));
    }

    #[test]
    fn a_probe_that_tells_nothing_is_made_again() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.trip(now, 0.0);
        breaker.probe();
        breaker.told_nothing();
        assert_eq!(breaker.allows(now + SECOND), Allowance::One);
    }

    #[test]
    fn zero_failures_switch_it_off() {
        let (mut breaker, now) = (breaker(0), Instant::now());
        assert!((0..100).all(|_| !breaker.failed(now, 0.5)));
        assert!(!breaker.trip(now, 0.5));
        assert_eq!(breaker.allows(now), Allowance::All);
    }

    #[test]
    fn an_entry_is_to_blame_only_if_the_sink_took_others_since() {
        let (mut breaker, now) = (breaker(5), Instant::now());
        breaker.failed(now, 0.5);
        assert!(!breaker.accuse(id(1)), "nothing is known of this sink yet");
        breaker.failed(now, 0.5);
        assert!(!breaker.accuse(id(1)));
        breaker.succeeded(now);
        breaker.failed(now, 0.5);
        assert!(breaker.accuse(id(1)), "the sink took another one");
        assert!(breaker.accuse(id(2)), "the sink worked right before");
        breaker.failed(now, 0.5);
        assert!(!breaker.accuse(id(3)), "two in a row may be an outage");
        breaker.acquit(id(1));
        breaker.trip(now, 0.5);
        assert!(!breaker.accuse(id(1)), "it is forgotten, and the sink is down");
    }

    #[test]
    fn entries_tried_in_vain_are_known_until_the_next_round() {
        let (mut breaker, now) = (breaker(1), Instant::now());
        breaker.trip(now, 0.5);
        breaker.probe();
        breaker.tried(id(1));
        breaker.failed(now, 0.5);
        assert!(breaker.was_tried(id(1)) && !breaker.was_tried(id(2)));
        breaker.try_all_again();
        assert!(!breaker.was_tried(id(1)));
        breaker.tried(id(2));
        breaker.succeeded(now);
        breaker.trip(now, 0.5);
        assert!(!breaker.was_tried(id(2)));
    }

    proptest! {
        /// Whatever happens in whatever order: one call at most while it is open, and never a pause beyond the limit.
        #[test]
        fn it_never_gets_stuck_and_never_lets_two_through(steps in prop::collection::vec((0_u8..5, 0_u64..3000), 1..200)) {
            let (mut breaker, mut now) = (breaker(3), Instant::now());
            let mut probes = 0;
            for (step, ms) in steps {
                now += Duration::from_millis(ms);
                let was_open = breaker.is_open();
                match step {
                    0 => { breaker.succeeded(now); probes = 0; }
                    1 | 2 => { breaker.failed(now, 0.5); probes = 0; }
                    3 => { breaker.trip(now, 0.9); probes = 0; }
                    _ if breaker.allows(now) == Allowance::One => { breaker.probe(); probes += 1; }
                    _ => {}
                }
                prop_assert!(probes <= 1);
                prop_assert!(!(step == 0 && breaker.is_open()));
                prop_assert!(was_open || step != 4 || !breaker.is_open());
                if let Some(due) = breaker.due() {
                    prop_assert!(due <= now + SECOND * 5);
                }
                if breaker.is_open() && breaker.due().is_none() {
                    prop_assert_eq!(probes, 1, "it waits for a probe that is under way");
                }
            }
        }
    }
}
