//! The retry policy: decides about the outcome of a delivery. Pure: random numbers are arguments.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::DeadLetterReason;
use crate::sink::{SinkError, SinkErrorClass};

/// The longest pause that a receiver can request.
const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);

/// When and how often a failed delivery is retried: exponential backoff with full jitter.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetryPolicy {
    /// Attempts in all before an entry becomes a dead letter.
    pub max_attempts: u32,
    /// The longest wait before the second attempt. It doubles for each later attempt.
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

/// The decision about a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The sink took it.
    Acknowledge,
    /// It is retried after this time.
    RetryIn(Duration),
    /// It is given up.
    DeadLetter(DeadLetterReason),
}

impl RetryPolicy {
    /// Decides about the outcome of the `attempt`-th delivery (1 is the first).
    ///
    /// `random` is a random number from 0 up to, but not including, 1.
    pub fn judge(&self, attempt: u32, outcome: &Result<(), SinkError>, random: f64) -> Verdict {
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
            SinkErrorClass::Transient => Verdict::RetryIn(self.wait(attempt, error.retry_after(), random)),
        }
    }

    fn wait(&self, attempt: u32, retry_after: Option<Duration>, random: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        let longest = self.base.saturating_mul(1 << doublings).min(self.cap);
        let wait = longest.mul_f64(random);
        // The jitter spreads the retries of clients that were refused at the same time.
        let jitter = self.base.min(self.cap).mul_f64(random);
        let requested = retry_after.map(|requested| requested.min(MAX_RETRY_AFTER) + jitter);
        requested.map_or(wait, |requested| requested.max(wait))
    }

    /// Returns how many entries one call of the sink may carry at this attempt.
    ///
    /// Entries that failed as a batch are retried in smaller ones, and alone at the last attempt. So no entry is given
    /// up because of another entry in its batch.
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
    fn each_outcome_has_its_verdict() {
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
    fn jitter_covers_the_whole_wait() {
        let waits = [0.0, 0.25, 0.75].map(|random| policy().judge(3, &failure(SinkErrorClass::Transient), random));
        assert_eq!(waits, [0, 1, 3].map(|s| Verdict::RetryIn(SECOND * s)));
    }

    #[test]
    fn requested_pause_is_kept_up_to_the_limit() {
        let throttled = |after| Err(SinkError::new(SinkErrorClass::Transient, "HTTP 429").with_retry_after(after));
        let judge = |after, random| policy().judge(1, &throttled(after), random);
        assert_eq!(judge(SECOND * 30, 0.0), Verdict::RetryIn(SECOND * 30));
        assert_eq!(judge(SECOND * 30, 0.5), Verdict::RetryIn(SECOND * 30 + SECOND / 2));
        assert_eq!(judge(SECOND * 86_400, 0.0), Verdict::RetryIn(MAX_RETRY_AFTER));
    }

    #[test]
    fn many_attempts_do_not_overflow() {
        let patient = RetryPolicy { max_attempts: u32::MAX, base: SECOND, cap: Duration::MAX };
        assert!(matches!(patient.judge(u32::MAX - 1, &failure(SinkErrorClass::Transient), 0.5), Verdict::RetryIn(_)));
        assert_eq!(patient.batch_limit(u32::MAX - 1, 500), 1);
    }

    #[test]
    fn batches_shrink_with_each_attempt_to_one_entry() {
        let limits: Vec<_> = (1..=6).map(|attempt| policy().batch_limit(attempt, 500)).collect();
        assert_eq!(limits, [500, 125, 31, 7, 1, 1]);
    }
}
