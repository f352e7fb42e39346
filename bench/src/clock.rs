//! Time: stamps that publisher and receiver share, and waiting at a pace.

use std::time::Instant;

/// A clock that publisher and receiver share, in nanoseconds since its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StampClock(Instant);

impl StampClock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn nanos(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Blocks the thread until `time`.
#[expect(clippy::disallowed_methods, reason = "a load generator keeps a pace, on threads of its own")]
pub(crate) fn sleep_until(time: Instant) {
    let left = time.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}
