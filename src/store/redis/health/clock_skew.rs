//! Detects forward steps of the server's clock.
//!
//! Idle times use the server's clock. After a step forward, entries that are being handled seem to have been idle for
//! long, and a search for idle entries would claim all of them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::store::redis::net::reply::Reply;
use crate::store::redis::{Failure, StreamName};

/// The maximum number of remembered streams. Beyond it, all are forgotten.
const MAX_STREAMS: usize = 10_000;

/// The last readings of the server's clock, by stream: in a cluster each stream may be on another node.
#[derive(Debug, Default)]
pub(crate) struct ServerClock(Mutex<HashMap<StreamName, ClockReading>>);

#[derive(Debug, Clone, Copy)]
struct ClockReading {
    at: Instant,
    server_ms: u64,
    /// Idle times are not reliable before this time.
    doubted_until: Instant,
}

impl ServerClock {
    /// Records a reading of the server's clock. Returns whether idle times are reliable.
    ///
    /// They are not for half of `claim_idle` after a step forward of a quarter of it or more. Every worker extends its
    /// entries within a third of `claim_idle`, which resets their idle times.
    pub(crate) fn is_trusted(&self, stream: &StreamName, server_ms: u64, now: Instant, claim_idle: Duration) -> bool {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = looks.get(stream).copied();
        let mut look =
            ClockReading { at: now, server_ms, doubted_until: before.map_or(now, |before| before.doubted_until) };
        if let Some(before) = before {
            let passed = Duration::from_millis(server_ms.saturating_sub(before.server_ms));
            let step = passed.saturating_sub(now.duration_since(before.at));
            if step >= claim_idle / 4 {
                let step_ms = u64::try_from(step.as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(stream = %stream, step_ms, "clock of the server stepped forward, claiming no idle entries for a while");
                look.doubted_until = now + claim_idle / 2;
            }
        } else if looks.len() >= MAX_STREAMS {
            looks.clear();
        }
        looks.insert(stream.clone(), look);
        now >= look.doubted_until
    }
}

/// Parses the reply to `TIME`, seconds and microseconds since 1970, as milliseconds.
pub(crate) fn milliseconds(reply: Reply) -> Result<u64, Failure> {
    let [seconds, microseconds] = reply.tuple()?;
    let number = |reply: Reply| {
        let text = reply.text()?;
        text.parse::<u64>().map_err(|error| Failure::unexpected(&format!("the time {text:?}: {error}")))
    };
    Ok(number(seconds)?.saturating_mul(1000).saturating_add(number(microseconds)? / 1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_times_are_unreliable_after_a_step_forward() {
        let (clock, stream) = (ServerClock::default(), "s".parse().expect("a valid name"));
        let (start, idle) = (Instant::now(), Duration::from_mins(1));
        let trusts = |server_s: u64, our_s: u64| {
            clock.is_trusted(&stream, server_s * 1000, start + Duration::from_secs(our_s), idle)
        };
        assert!(trusts(1000, 0), "there is nothing to compare with");
        assert!(trusts(1025, 15), "a little faster, or an answer that took long");
        assert!(trusts(500, 30), "a step back makes nothing idle");
        assert!(!trusts(4115, 45), "an hour ahead");
        assert!(!trusts(4130, 60));
        assert!(trusts(4145, 75), "half of the limit later");
        assert!(!trusts(4175, 90), "a step of a quarter of the limit");
    }
}
