//! Wall-clock time in milliseconds since 1970, the unit of entry ids.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the time since 1970 by this machine's clock; zero if the clock is before 1970.
pub(crate) fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Returns the milliseconds since 1970 by this machine's clock; zero if the clock is before 1970.
pub(crate) fn now_ms() -> u64 {
    u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
}
