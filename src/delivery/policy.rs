//! What becomes of a delivery. Pure: chance is an argument.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::DeadLetterReason;
use crate::sink::{SinkError, SinkErrorClass};

/// The longest wait that a receiver can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);

/// When and how often a failed delivery is tried again: exponential back-off with full jitter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    /// How often an entry is tried in all before it goes to the dead letters.
    pub max_attempts: u32,
    /// The longest wait before the second attempt; doubled for each one after it.
    #[serde(with = "humantime_serde")]
    pub base: Duration,
    /// The longest wait before any attempt.
    #[serde(with = "humantime_serde")]
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { max_attempts: 5, base: Duration::from_secs(1), cap: Duration::from_mins(5) }
    }
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It had its effect.
    Acknowledge,
    /// It is tried again after this time.
    RetryIn(Duration),
    /// It is given up.
    DeadLetter(DeadLetterReason),
}

impl RetryPolicy {
    /// Judges the outcome of the `attempt`-th delivery (1 is the first). `draw` is a random number from 0 up to,
    /// but not including, 1.
    pub fn judge(&self, attempt: u32, outcome: &Result<(), SinkError>, draw: f64) -> Verdict {
        let error = match outcome {
            Ok(()) => return Verdict::Acknowledge,
            Err(error) => error,
        };
        match error.class() {
            SinkErrorClass::Permanent => Verdict::DeadLetter(DeadLetterReason::Rejected),
            SinkErrorClass::Undecodable => Verdict::DeadLetter(DeadLetterReason::Undecodable),
            SinkErrorClass::Transient if attempt >= self.max_attempts => {
                Verdict::DeadLetter(DeadLetterReason::Exhausted)
            }
            SinkErrorClass::Transient => Verdict::RetryIn(self.wait(attempt, error.retry_after(), draw)),
        }
    }

    fn wait(&self, attempt: u32, retry_after: Option<Duration>, draw: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        let longest = self.base.saturating_mul(1 << doublings).min(self.cap);
        let wait = longest.mul_f64(draw);
        // Whoever was turned away at the same time should not come back at the same time.
        let asked = retry_after.map(|asked| asked.min(MAX_RETRY_AFTER) + self.base.min(self.cap).mul_f64(draw));
        asked.map_or(wait, |asked| asked.max(wait))
    }

    /// How many entries one call of the sink may carry at this attempt, of the `max_batch` that it takes.
    ///
    /// What failed as a batch comes back in smaller ones, at the last attempt alone, so that no entry is given up
    /// for what its neighbours did.
    pub(super) fn batch_limit(&self, attempt: u32, max_batch: usize) -> usize {
        if attempt >= self.max_attempts {
            return 1;
        }
        let halvings = attempt.saturating_sub(1).saturating_mul(2).min(usize::BITS - 1);
        (max_batch >> halvings).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn policy() -> RetryPolicy {
        RetryPolicy { max_attempts: 5, base: SECOND, cap: SECOND * 6 }
    }

    fn failure(class: SinkErrorClass) -> Result<(), SinkError> {
        Err(SinkError::new(class, "no"))
    }

    #[test]
    fn every_outcome_has_its_verdict() {
        use DeadLetterReason::{Exhausted, Rejected, Undecodable};
        use SinkErrorClass as Class;
        let cases = [
            (1, Ok(()), Verdict::Acknowledge),
            (9, Ok(()), Verdict::Acknowledge),
            (1, failure(Class::Permanent), Verdict::DeadLetter(Rejected)),
            (1, failure(Class::Undecodable), Verdict::DeadLetter(Undecodable)),
            (1, failure(Class::Transient), Verdict::RetryIn(SECOND / 2)),
            (2, failure(Class::Transient), Verdict::RetryIn(SECOND)),
            (3, failure(Class::Transient), Verdict::RetryIn(SECOND * 2)),
            (4, failure(Class::Transient), Verdict::RetryIn(SECOND * 3)),
            (5, failure(Class::Transient), Verdict::DeadLetter(Exhausted)),
            (6, failure(Class::Transient), Verdict::DeadLetter(Exhausted)),
        ];
        for (attempt, outcome, verdict) in cases {
            assert_eq!(policy().judge(attempt, &outcome, 0.5), verdict, "attempt {attempt}, {outcome:?}");
        }
    }

    #[test]
    fn jitter_spreads_over_the_whole_wait() {
        let waits = [0.0, 0.25, 0.75].map(|draw| policy().judge(3, &failure(SinkErrorClass::Transient), draw));
        assert_eq!(waits, [0, 1, 3].map(|s| Verdict::RetryIn(SECOND * s)));
    }

    #[test]
    fn a_receiver_that_asks_for_time_gets_it_within_reason() {
        let throttled = |after| Err(SinkError::new(SinkErrorClass::Transient, "HTTP 429").with_retry_after(after));
        let judge = |after, draw| policy().judge(1, &throttled(after), draw);
        assert_eq!(judge(SECOND * 30, 0.0), Verdict::RetryIn(SECOND * 30));
        assert_eq!(judge(SECOND * 30, 0.5), Verdict::RetryIn(SECOND * 30 + SECOND / 2));
        assert_eq!(judge(SECOND * 86_400, 0.0), Verdict::RetryIn(MAX_RETRY_AFTER));
    }

    #[test]
    fn no_number_of_attempts_overflows() {
        let patient = RetryPolicy { max_attempts: u32::MAX, base: SECOND, cap: Duration::MAX };
        assert!(matches!(patient.judge(u32::MAX - 1, &failure(SinkErrorClass::Transient), 0.5), Verdict::RetryIn(_)));
        assert_eq!(patient.batch_limit(u32::MAX - 1, 500), 1);
    }

    #[test]
    fn batches_shrink_with_each_attempt_until_entries_go_alone() {
        let limits: Vec<_> = (1..=6).map(|attempt| policy().batch_limit(attempt, 500)).collect();
        assert_eq!(limits, [500, 125, 31, 7, 1, 1]);
    }
}
