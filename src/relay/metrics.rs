//! The counters of deliveries to clients.

use std::time::Duration;

use prometheus::local::{LocalHistogram, LocalIntCounter};
use prometheus::{Histogram, IntCounter};

use crate::clock::now_ms;
use crate::metrics::Metrics;

/// The numbers of one or more writes to one client.
#[derive(Debug, Default)]
pub(super) struct WriteStats {
    pub(super) writes: u64,
    pub(super) alerts: u64,
    /// The oldest entry that was appended while the client was connected, in ms since 1970.
    pub(super) oldest_ms: Option<u64>,
}

/// The metrics of a channel. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct ChannelMetrics {
    writes: IntCounter,
    deliveries: IntCounter,
    latency: Histogram,
}

impl ChannelMetrics {
    pub(super) fn new(metrics: &Metrics, channel: &str) -> Self {
        Self {
            writes: metrics.relay_writes.with_label_values(&[channel]),
            deliveries: metrics.relay_deliveries.with_label_values(&[channel]),
            latency: metrics.relay_latency_seconds.with_label_values(&[channel]),
        }
    }

    /// Counts writes to one client.
    pub(super) fn count(&self, stats: &WriteStats) {
        self.writes.inc_by(stats.writes);
        if stats.alerts > 0 {
            self.deliveries.inc_by(stats.alerts);
        }
        if let Some(ms) = stats.oldest_ms {
            self.latency.observe(seconds_since(ms, now_ms()));
        }
    }

    /// Creates a local copy for a task that writes to many clients.
    pub(super) fn local(&self) -> LocalMetrics {
        LocalMetrics {
            writes: self.writes.local(),
            deliveries: self.deliveries.local(),
            latency: self.latency.local(),
            oldest_ms: Vec::new(),
        }
    }
}

/// Collects the numbers of many writes and adds them to the shared counters at once.
///
/// Each access to a shared counter takes its cache line from another thread.
pub(super) struct LocalMetrics {
    writes: LocalIntCounter,
    deliveries: LocalIntCounter,
    latency: LocalHistogram,
    oldest_ms: Vec<u64>,
}

impl LocalMetrics {
    pub(super) fn add(&mut self, stats: &WriteStats) {
        self.writes.inc_by(stats.writes);
        self.deliveries.inc_by(stats.alerts);
        self.oldest_ms.extend(stats.oldest_ms);
    }

    /// Adds all numbers to the shared counters. Latencies end now, so call this soon after the writes.
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
