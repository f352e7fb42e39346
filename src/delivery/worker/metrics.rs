//! The metrics of one group, looked up once.

use prometheus::{Histogram, IntCounter, IntGauge};

use crate::event::{DeadLetterReason, GroupName};
use crate::metrics::Metrics;
use crate::sink::SinkErrorClass;

/// Counters of one group, shared by its workers.
#[derive(Debug)]
pub(crate) struct GroupMetrics {
    pub(crate) deliveries: IntCounter,
    pub(crate) acknowledged: IntCounter,
    pub(crate) filtered: IntCounter,
    pub(crate) retries: IntCounter,
    pub(crate) claimed: IntCounter,
    pub(crate) not_owned: IntCounter,
    pub(crate) groups_recreated: IntCounter,
    pub(crate) trimmed_pending: IntCounter,
    pub(crate) handler_seconds: Histogram,
    pub(crate) in_flight: IntGauge,
    pub(crate) breaker_open: IntGauge,
    pub(crate) breaker_opened: IntCounter,
    dead_letters: [IntCounter; DeadLetterReason::ALL.len()],
    sink_errors: [IntCounter; SINK_ERRORS.len()],
}

const SINK_ERRORS: [SinkErrorClass; 3] =
    [SinkErrorClass::Transient, SinkErrorClass::Permanent, SinkErrorClass::Undecodable];

impl GroupMetrics {
    pub(crate) fn new(metrics: &Metrics, stream: &str, group: &GroupName, sink: &str) -> Self {
        let labels = [stream, group.as_str()];
        let of_group = |counters: &prometheus::IntCounterVec| counters.with_label_values(&labels);
        let with_reason = |counters: &prometheus::IntCounterVec, reason: &str| {
            counters.with_label_values(&[stream, group.as_str(), reason])
        };
        Self {
            deliveries: of_group(&metrics.deliveries),
            acknowledged: of_group(&metrics.acknowledged),
            filtered: of_group(&metrics.filtered),
            retries: of_group(&metrics.retries),
            claimed: of_group(&metrics.claimed),
            not_owned: of_group(&metrics.not_owned),
            groups_recreated: of_group(&metrics.groups_recreated),
            trimmed_pending: with_reason(&metrics.lost, "trimmed_pending"),
            handler_seconds: metrics.handler_seconds.with_label_values(&labels),
            in_flight: metrics.in_flight.with_label_values(&labels),
            breaker_open: metrics.breaker_open.with_label_values(&labels),
            breaker_opened: of_group(&metrics.breaker_opened),
            dead_letters: DeadLetterReason::ALL.map(|reason| with_reason(&metrics.dead_letters, reason.as_str())),
            sink_errors: SINK_ERRORS.map(|class| metrics.sink_errors.with_label_values(&[sink, class.as_str()])),
        }
    }

    /// Returns the counter of dead letters with this reason.
    pub(crate) fn dead_letters(&self, reason: DeadLetterReason) -> &IntCounter {
        let index = DeadLetterReason::ALL.iter().position(|known| *known == reason);
        &self.dead_letters[index.expect("ALL has every reason")]
    }

    /// Returns the counter of sink errors of this class.
    pub(crate) fn sink_errors(&self, class: SinkErrorClass) -> &IntCounter {
        let index = SINK_ERRORS.iter().position(|known| *known == class);
        &self.sink_errors[index.expect("the list has every class")]
    }
}

/// One worker's share of a gauge that all workers of the group add to. It ends with the worker.
#[derive(Debug)]
pub(crate) struct GaugeShare {
    gauge: IntGauge,
    share: i64,
}

impl GaugeShare {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        Self { gauge: gauge.clone(), share: 0 }
    }

    /// Changes the share to `value`.
    pub(crate) fn set(&mut self, value: usize) {
        let value = i64::try_from(value).unwrap_or(i64::MAX);
        self.gauge.add(value - self.share);
        self.share = value;
    }
}

impl Drop for GaugeShare {
    fn drop(&mut self) {
        self.gauge.sub(self.share);
    }
}
