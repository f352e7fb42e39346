//! Throttled warnings: one line when a problem begins, one now and then while it lasts, one when it ends.

use std::time::Duration;

use tokio::time::Instant;

const INTERVAL: Duration = Duration::from_secs(30);

/// A problem that may last, with the state that keeps it from flooding the log.
#[derive(Debug, Default)]
pub(crate) struct ThrottledWarning {
    since: Option<Instant>,
    last_line: Option<Instant>,
    suppressed: u64,
}

impl ThrottledWarning {
    /// Counts an occurrence. Returns the number of occurrences since the last line if a line is due, else `None`.
    pub(crate) fn occurred(&mut self) -> Option<u64> {
        let now = Instant::now();
        self.since.get_or_insert(now);
        if self.last_line.is_some_and(|last| now.duration_since(last) < INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last_line = Some(now);
        Some(std::mem::take(&mut self.suppressed) + 1)
    }

    /// Ends the problem. Returns how long it lasted, or `None` if there was none.
    pub(crate) fn ended(&mut self) -> Option<Duration> {
        let since = self.since.take()?;
        *self = Self::default();
        Some(since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn warning_is_due_at_the_start_per_interval_and_after_the_end() {
        let mut warning = ThrottledWarning::default();
        assert_eq!(warning.ended(), None);
        assert_eq!(warning.occurred(), Some(1));
        assert_eq!([warning.occurred(), warning.occurred()], [None, None]);
        tokio::time::advance(INTERVAL).await;
        assert_eq!(warning.occurred(), Some(3));
        assert_eq!(warning.ended(), Some(INTERVAL));
        assert_eq!(warning.occurred(), Some(1));
    }
}
