//! Sink health: the circuit breaker, and the outage while it is open.
//!
//! During an outage the worker keeps its entries, and fetches none but one at a time, as a probe. No attempts are used
//! up: queued entries stay queued, and waiting retries go on waiting unless nothing else is left for a probe. All of
//! them are extended, so that no other consumer claims them.

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::random_fraction;
use crate::delivery::worker::breaker::Breaker;
use crate::delivery::worker::context::WorkerContext;
use crate::delivery::worker::metrics::GaugeShare;
use crate::event::EntryId;
use crate::log_throttle::ThrottledWarning;

/// The health of the sink, as its calls show it.
#[derive(Debug)]
pub(crate) struct SinkHealth {
    pub(crate) breaker: Breaker,
    outage: Option<Outage>,
    /// Whether an entry was given up and the sink has taken nothing since.
    ///
    /// In an ordered group no other entry can show that the sink works.
    gave_up_since_success: bool,
    outage_warning: ThrottledWarning,
    failure_warning: ThrottledWarning,
    gauge: GaugeShare,
}

/// The start of an outage, and the last error of the sink.
#[derive(Debug)]
struct Outage {
    since: Timestamp,
    error: String,
}

impl SinkHealth {
    pub(crate) fn new(context: &WorkerContext) -> Self {
        Self {
            breaker: Breaker::new(context.group.config.breaker.clone()),
            outage: None,
            gave_up_since_success: false,
            outage_warning: ThrottledWarning::default(),
            failure_warning: ThrottledWarning::default(),
            gauge: GaugeShare::new(&context.metrics.breaker_open),
        }
    }

    pub(crate) fn is_down(&self) -> bool {
        self.breaker.is_open()
    }

    /// Takes note that the sink took an entry, or refused one for good. Returns whether that ended an outage.
    pub(crate) fn succeeded(&mut self, now: Instant, context: &WorkerContext) -> bool {
        self.gave_up_since_success = false;
        let Some(after) = self.breaker.succeeded(now) else { return false };
        self.outage = None;
        self.outage_warning.ended();
        self.gauge.set(0);
        info!(sink = context.caller.name, ?after, "sink available again");
        true
    }

    /// Takes note of a call that failed, though another may succeed. Returns whether that began an outage.
    ///
    /// `is_certain` is true if the sink itself reports that it is down.
    pub(crate) fn failed(&mut self, error: &str, is_certain: bool, now: Instant, context: &WorkerContext) -> bool {
        let has_opened = if is_certain {
            self.breaker.trip(now, random_fraction())
        } else {
            self.breaker.failed(now, random_fraction())
        };
        if !self.is_down() {
            return false;
        }
        if has_opened {
            context.metrics.breaker_opened.inc();
            self.gauge.set(1);
        }
        let since = self.outage.as_ref().map_or_else(Timestamp::now, |outage| outage.since);
        self.outage = Some(Outage { since, error: error.to_owned() });
        if let Some(times) = self.outage_warning.occurred() {
            warn!(sink = context.caller.name, error, times, "sink unavailable, pausing deliveries");
        }
        has_opened
    }

    /// Logs deliveries that failed and may succeed later.
    pub(crate) fn log_failure(&mut self, entries: usize, first: Option<EntryId>, error: &str) {
        if let Some(times) = self.failure_warning.occurred() {
            let first = first.map(tracing::field::display);
            warn!(entries, first, error, times, "delivery failed, trying again");
        }
    }

    /// Takes note that an entry of an ordered group has used up its attempts.
    pub(crate) fn gave_up(&mut self) {
        self.gave_up_since_success = true;
    }

    pub(crate) fn has_given_up_since_success(&self) -> bool {
        self.gave_up_since_success
    }

    /// Returns the note for `/ready` during an outage.
    pub(crate) fn note(&self, context: &WorkerContext) -> Option<String> {
        let Outage { since, error } = self.outage.as_ref()?;
        Some(format!("the sink `{}` is down since {since:.0}: {error}", context.caller.name))
    }
}
