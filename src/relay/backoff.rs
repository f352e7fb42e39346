//! Waiting before the next attempt, and spreading what should not happen at once.

use std::time::Duration;

use uuid::Uuid;

const BASE: Duration = Duration::from_millis(100);
const CAP: Duration = Duration::from_secs(5);

/// Growing waits between attempts that fail.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait after one more failure: doubling from 100 ms up to 5 s, between half and all of it.
    pub(super) fn next(&mut self) -> Duration {
        let wait = BASE.saturating_mul(1 << self.failures.min(6)).min(CAP);
        self.failures = self.failures.saturating_add(1);
        wait / 2 + jitter(wait / 2)
    }

    /// Whether nothing has failed since the last success.
    pub(super) fn is_fresh(&self) -> bool {
        self.failures == 0
    }

    /// Something succeeded; says whether something had failed before.
    pub(super) fn reset(&mut self) -> bool {
        std::mem::take(&mut self.failures) > 0
    }
}

/// A random time below `limit`.
pub(super) fn jitter(limit: Duration) -> Duration {
    // The low half of a version 4 UUID is random but for its two topmost bits.
    let (_, low) = Uuid::new_v4().as_u64_pair();
    #[expect(clippy::cast_precision_loss, reason = "a fraction needs no more than 53 bits")]
    let fraction = (low << 2 >> 2) as f64 / (1_u64 << 62) as f64;
    limit.mul_f64(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_cap_and_begin_again() {
        let mut backoff = Backoff::default();
        let first = backoff.next();
        assert!((BASE / 2..=BASE).contains(&first), "{first:?}");
        let late = (0..50).map(|_| backoff.next()).last().expect("fifty waits");
        assert!((CAP / 2..=CAP).contains(&late), "{late:?}");
        assert!(backoff.reset() && backoff.is_fresh());
        assert!(backoff.next() <= BASE);
    }

    #[test]
    fn jitter_covers_its_range() {
        let limit = Duration::from_secs(1);
        let waits: Vec<Duration> = (0..200).map(|_| jitter(limit)).collect();
        assert!(waits.iter().all(|wait| *wait < limit));
        assert!(waits.iter().any(|wait| *wait < limit / 4) && waits.iter().any(|wait| *wait > limit / 4 * 3));
    }
}
