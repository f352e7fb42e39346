//! What is counted of every delivery.

use std::time::Duration;

use prometheus::local::{LocalHistogram, LocalIntCounter};
use prometheus::{Histogram, IntCounter};

use crate::clock::now_ms;
use crate::metrics::Metrics;

/// What was written to one client.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) writes: u64,
    pub(super) alerts: u64,
    /// The oldest entry in it that was appended while the client was connected, in ms since 1970.
    pub(super) oldest_ms: Option<u64>,
}

/// The counters of a channel. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    writes: IntCounter,
    deliveries: IntCounter,
    latency: Histogram,
}

impl Meter {
    pub(super) fn new(metrics: &Metrics, channel: &str) -> Self {
        Self {
            writes: metrics.relay_writes.with_label_values(&[channel]),
            deliveries: metrics.relay_deliveries.with_label_values(&[channel]),
            latency: metrics.relay_latency_seconds.with_label_values(&[channel]),
        }
    }

    /// Counts what one client was given.
    pub(super) fn count(&self, written: &Written) {
        self.writes.inc_by(written.writes);
        if written.alerts > 0 {
            self.deliveries.inc_by(written.alerts);
        }
        if let Some(ms) = written.oldest_ms {
            self.latency.observe(seconds_since(ms, now_ms()));
        }
    }

    /// For whoever counts what many are given.
    pub(super) fn tally(&self) -> Tally {
        Tally {
            writes: self.writes.local(),
            deliveries: self.deliveries.local(),
            latency: self.latency.local(),
            oldest_ms: Vec::new(),
        }
    }
}

/// What many clients were given, which is added to the counters at once: they are everybody's, and each touch of them
/// takes them from another thread.
pub(super) struct Tally {
    writes: LocalIntCounter,
    deliveries: LocalIntCounter,
    latency: LocalHistogram,
    oldest_ms: Vec<u64>,
}

impl Tally {
    pub(super) fn add(&mut self, written: &Written) {
        self.writes.inc_by(written.writes);
        self.deliveries.inc_by(written.alerts);
        self.oldest_ms.extend(written.oldest_ms);
    }

    /// Adds all of it to the counters. Latencies are those until now: this belongs soon after what it counts.
    pub(super) fn flush(&mut self) {
        let now = now_ms();
        for ms in self.oldest_ms.drain(..) {
            self.latency.observe(seconds_since(ms, now));
        }
        self.writes.flush();
        self.deliveries.flush();
        self.latency.flush();
    }
}

fn seconds_since(ms: u64, now_ms: u64) -> f64 {
    Duration::from_millis(now_ms.saturating_sub(ms)).as_secs_f64()
}
