//! How long to wait after failures, and how often to speak of them.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
const BETWEEN_LINES: Duration = Duration::from_secs(30);

/// A random number from 0 up to, but not including, 1.
pub(super) fn draw() -> f64 {
    let (random, ..) = Uuid::new_v4().as_fields();
    f64::from(random) / (f64::from(u32::MAX) + 1.0)
}

/// `duration`, up to a fifth longer or shorter.
pub(super) fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.8 + 0.4 * draw())
}

/// Waits that double with each failure in a row.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// How long to wait after one more failure: half of it fixed, half by chance.
    pub(super) fn failed(&mut self) -> Duration {
        let longest = FIRST_WAIT.saturating_mul(1 << self.failures.min(16)).min(LONGEST_WAIT);
        self.failures = self.failures.saturating_add(1);
        longest.mul_f64(0.5 + 0.5 * draw())
    }

    pub(super) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

/// A trouble that lasts: told when it begins, now and then while it lasts, and when it ends.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    since: Option<Instant>,
    last_line: Option<Instant>,
    unsaid: u64,
}

impl Trouble {
    /// It is there. If a line is due, says how often it was there since the last one.
    pub(super) fn occurred(&mut self) -> Option<u64> {
        let now = Instant::now();
        self.since.get_or_insert(now);
        if self.last_line.is_some_and(|last| now.duration_since(last) < BETWEEN_LINES) {
            self.unsaid += 1;
            return None;
        }
        self.last_line = Some(now);
        Some(std::mem::take(&mut self.unsaid) + 1)
    }

    /// It is gone. If it was there, says for how long.
    pub(super) fn ended(&mut self) -> Option<Duration> {
        let since = self.since.take()?;
        *self = Self::default();
        Some(since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lasting_trouble_is_told_when_it_begins_now_and_then_and_when_it_ends() {
        let mut trouble = Trouble::default();
        assert_eq!(trouble.ended(), None);
        assert_eq!(trouble.occurred(), Some(1));
        assert_eq!([trouble.occurred(), trouble.occurred()], [None, None]);
        tokio::time::advance(BETWEEN_LINES).await;
        assert_eq!(trouble.occurred(), Some(3));
        assert_eq!(trouble.ended(), Some(BETWEEN_LINES));
        assert_eq!(trouble.occurred(), Some(1));
    }

    #[test]
    fn waits_grow_to_a_limit_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::default();
        let waits: Vec<_> = (0..40).map(|_| backoff.failed()).collect();
        assert!(waits[0] <= FIRST_WAIT && waits[0] >= FIRST_WAIT / 2);
        assert!(waits[39] <= LONGEST_WAIT && waits[39] >= LONGEST_WAIT / 2);
        backoff.succeeded();
        assert!(backoff.failed() <= FIRST_WAIT);
    }
}
