//! Backoff between attempts that fail, and jitter for what must not happen at the same time.

use std::time::Duration;

const FIRST_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Returns a random number from 0 up to, but not including, 1.
pub(crate) fn random_fraction() -> f64 {
    fastrand::f64()
}

/// Returns a random duration below `limit`.
pub(crate) fn full_jitter(limit: Duration) -> Duration {
    limit.mul_f64(random_fraction())
}

/// Returns a random duration between half of `duration` and all of it.
pub(crate) fn equal_jitter(duration: Duration) -> Duration {
    duration / 2 + full_jitter(duration / 2)
}

/// Returns `duration`, up to a fifth longer or shorter.
pub(crate) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.8 + 0.4 * random_fraction())
}

/// Exponential backoff with jitter: doubles from 100 ms up to 5 s with each failure in a row.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Counts a failure and returns the delay before the next attempt: between half of the current step and all of it.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let step = FIRST_DELAY.saturating_mul(1 << self.failures.min(16)).min(MAX_DELAY);
        self.failures = self.failures.saturating_add(1);
        equal_jitter(step)
    }

    /// Returns whether nothing has failed since the last success.
    pub(crate) fn is_fresh(&self) -> bool {
        self.failures == 0
    }

    /// Starts again after a success. Returns whether anything had failed before.
    pub(crate) fn reset(&mut self) -> bool {
        std::mem::take(&mut self.failures) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_its_limit_and_restarts_after_reset() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..50).map(|_| backoff.next_delay()).collect();
        assert!((FIRST_DELAY / 2..=FIRST_DELAY).contains(&delays[0]), "{delays:?}");
        assert!((MAX_DELAY / 2..=MAX_DELAY).contains(&delays[49]), "{delays:?}");
        assert!(!backoff.is_fresh() && backoff.reset() && backoff.is_fresh() && !backoff.reset());
        assert!(backoff.next_delay() <= FIRST_DELAY);
    }

    #[test]
    fn full_jitter_covers_its_range() {
        let limit = Duration::from_secs(1);
        let delays: Vec<Duration> = (0..200).map(|_| full_jitter(limit)).collect();
        assert!(delays.iter().all(|delay| *delay < limit));
        assert!(delays.iter().any(|delay| *delay < limit / 4) && delays.iter().any(|delay| *delay > limit / 4 * 3));
    }
}
