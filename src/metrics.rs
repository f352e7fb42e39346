//! The metrics of the daemon, in their own registry.
//!
//! One struct: the doc comment of a field is its help text. Labels come from the configuration or from enums, so
//! their number is bounded. The table in docs/operations.md is compared with this registry by a test.

use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Seconds from 100 microseconds to 30 seconds.
const SECONDS: [f64; 17] =
    [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// A kind of metric that is created from its name, help and labels.
trait Metric: Collector + Clone + 'static {
    fn make(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<Self>;
}

impl Metric for IntCounter {
    fn make(name: &str, help: &str, _: &[&str]) -> prometheus::Result<Self> {
        Self::new(name, help)
    }
}

impl Metric for IntCounterVec {
    fn make(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Metric for IntGaugeVec {
    fn make(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Metric for GaugeVec {
    fn make(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(Opts::new(name, help), labels)
    }
}

impl Metric for IntGauge {
    fn make(name: &str, help: &str, _: &[&str]) -> prometheus::Result<Self> {
        Self::new(name, help)
    }
}

impl Metric for Gauge {
    fn make(name: &str, help: &str, _: &[&str]) -> prometheus::Result<Self> {
        Self::new(name, help)
    }
}

impl Metric for HistogramVec {
    fn make(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<Self> {
        Self::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), labels)
    }
}

macro_rules! metrics {
    ($( #[doc = $help:literal] $field:ident: $kind:ty = $name:literal [$($label:literal),*]; )*) => {
        /// The metrics of the daemon.
        #[derive(Debug, Clone)]
        pub struct Metrics {
            registry: Registry,
            $( #[doc = $help] pub $field: $kind, )*
        }

        impl Metrics {
            /// Creates all metrics, at zero.
            pub fn new() -> Self {
                let registry = Registry::new();
                $(
                    let $field = <$kind as Metric>::make($name, $help.trim(), &[$($label),*])
                        .expect("names and labels are constants");
                    registry.register(Box::new($field.clone())).expect("names are unique");
                )*
                #[cfg(target_os = "linux")]
                registry
                    .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
                    .expect("no other metric is named process_*");
                Self { registry, $( $field, )* }
            }

            /// Returns name, labels and help of each metric, in the order of declaration.
            pub fn described() -> Vec<(&'static str, Vec<&'static str>, &'static str)> {
                vec![$( ($name, vec![$($label),*], $help.trim()), )*]
            }
        }
    };
}

metrics! {
    /// Entries accepted into a stream by this instance.
    published: IntCounterVec = "aurora_bus_published_total" ["stream"];
    /// Events refused as duplicates of an entry already stored.
    duplicates: IntCounterVec = "aurora_bus_duplicates_total" ["stream"];
    /// Events not accepted, by reason.
    rejected: IntCounterVec = "aurora_bus_rejected_total" ["reason"];
    /// Time until an append was accepted by the store, in seconds.
    publish_seconds: HistogramVec = "aurora_bus_publish_seconds" ["stream"];
    /// Entries delivered to a group's sink, retries included.
    deliveries: IntCounterVec = "aurora_bus_deliveries_total" ["stream", "group"];
    /// Entries acknowledged by a group after its sink took them.
    acknowledged: IntCounterVec = "aurora_bus_acknowledged_total" ["stream", "group"];
    /// Entries acknowledged without delivery because the group's filter does not match them.
    filtered: IntCounterVec = "aurora_bus_filtered_total" ["stream", "group"];
    /// Failed deliveries that will be tried again.
    retries: IntCounterVec = "aurora_bus_retries_total" ["stream", "group"];
    /// Entries moved to the dead letters, by reason.
    dead_letters: IntCounterVec = "aurora_bus_dead_letters_total" ["stream", "group", "reason"];
    /// Dead letters kept now.
    dead_letter_length: IntGaugeVec = "aurora_bus_dead_letter_length" ["stream"];
    /// Dead letters kept, as a fraction of the maximum.
    dead_letter_capacity_ratio: GaugeVec = "aurora_bus_dead_letter_capacity_ratio" ["stream"];
    /// Dead letters removed unhandled by their own limits.
    dead_letters_expired: IntCounterVec = "aurora_bus_dead_letters_expired_total" ["stream"];
    /// Dead letters replayed by operators.
    dead_letters_replayed: IntCounterVec = "aurora_bus_dead_letters_replayed_total" ["stream"];
    /// Dead letters discarded by operators.
    dead_letters_discarded: IntCounterVec = "aurora_bus_dead_letters_discarded_total" ["stream"];
    /// Entries found lost before they were handled, by reason.
    lost: IntCounterVec = "aurora_bus_lost_total" ["stream", "group", "reason"];
    /// Entries claimed from idle consumers.
    claimed: IntCounterVec = "aurora_bus_claimed_total" ["stream", "group"];
    /// Entries that external consumers left pending, appended again for other consumers.
    redelivered: IntCounterVec = "aurora_bus_redelivered_total" ["stream", "group"];
    /// Pull requests of external consumers.
    pulls: IntCounterVec = "aurora_bus_pulls_total" ["stream", "group"];
    /// Entries leased to external consumers by pull requests.
    pull_deliveries: IntCounterVec = "aurora_bus_pull_deliveries_total" ["stream", "group"];
    /// Pull requests that wait for entries now.
    pull_waiting: IntGaugeVec = "aurora_bus_pull_waiting" ["stream", "group"];
    /// Entries leased by this instance to external consumers now.
    pull_leases: IntGaugeVec = "aurora_bus_pull_leases" ["stream", "group"];
    /// Leases that expired with their entries unsettled.
    pull_expired: IntCounterVec = "aurora_bus_pull_expired_total" ["stream", "group"];
    /// Leased entries settled by external consumers, by result; `refused` if the lease had expired.
    pull_settled: IntCounterVec = "aurora_bus_pull_settled_total" ["stream", "group", "result"];
    /// Idle consumers removed from a group.
    consumers_reaped: IntCounterVec = "aurora_bus_consumers_reaped_total" ["stream", "group"];
    /// Results refused because another consumer had claimed the entry.
    not_owned: IntCounterVec = "aurora_bus_not_owned_total" ["stream", "group"];
    /// Number of times a missing group was created again.
    groups_recreated: IntCounterVec = "aurora_bus_groups_recreated_total" ["stream", "group"];
    /// Entries in flight in this instance now.
    in_flight: IntGaugeVec = "aurora_bus_in_flight" ["stream", "group"];
    /// Time a sink took for one batch, in seconds.
    handler_seconds: HistogramVec = "aurora_bus_handler_seconds" ["stream", "group"];
    /// Failed sink deliveries, by class.
    sink_errors: IntCounterVec = "aurora_bus_sink_errors_total" ["sink", "class"];
    /// Entries delivered to a sink, repeated ones included.
    sink_deliveries: IntCounterVec = "aurora_bus_sink_deliveries_total" ["sink"];
    /// Time of the calls of a sink, in seconds.
    sink_seconds: HistogramVec = "aurora_bus_sink_seconds" ["sink"];
    /// Workers of a group that are paused because their sink is down.
    breaker_open: IntGaugeVec = "aurora_bus_breaker_open" ["stream", "group"];
    /// Number of times a worker of a group paused because its sink was down.
    breaker_opened: IntCounterVec = "aurora_bus_breaker_opened_total" ["stream", "group"];
    /// Entries not yet delivered to a group; absent while unknown.
    group_lag: IntGaugeVec = "aurora_bus_group_lag" ["stream", "group"];
    /// Entries delivered to a group and not settled.
    group_pending: IntGaugeVec = "aurora_bus_group_pending" ["stream", "group"];
    /// Age of the oldest pending entry of a group, in seconds.
    group_oldest_pending_seconds: GaugeVec = "aurora_bus_group_oldest_pending_seconds" ["stream", "group"];
    /// Counters of a group's account in the store, by term: published, and each way in which an entry ends.
    account_entries: IntGaugeVec = "aurora_bus_account_entries" ["stream", "group", "term"];
    /// Published entries that the account of a group does not explain, or surplus entries if negative; 0 if the account adds up, absent while unknown.
    account_difference: IntGaugeVec = "aurora_bus_account_difference" ["stream", "group"];
    /// 1 for a group that is not declared, holds entries back and has had no consumer for a long time.
    group_abandoned: IntGaugeVec = "aurora_bus_group_abandoned" ["stream", "group"];
    /// Entries of a stream that other programs removed.
    removed_by_others: IntGaugeVec = "aurora_bus_removed_by_others" ["stream"];
    /// Entries a stream holds.
    stream_length: IntGaugeVec = "aurora_bus_stream_length" ["stream"];
    /// Members of a family.
    family_members: IntGaugeVec = "aurora_bus_family_members" ["stream"];
    /// Time of store operations, in seconds.
    store_seconds: HistogramVec = "aurora_bus_store_seconds" ["operation"];
    /// Failed store operations, by kind.
    store_errors: IntCounterVec = "aurora_bus_store_errors_total" ["operation", "kind"];
    /// Offset of a Redis server's clock to this machine's clock, in seconds; positive if it is ahead.
    store_clock_ahead_seconds: Gauge = "aurora_bus_store_clock_ahead_seconds" [];
    /// Keys that the Redis servers have evicted since their start; any value above 0 means loss.
    store_evicted_keys: IntGauge = "aurora_bus_store_evicted_keys" [];
    /// Dashboards connected to the relay.
    relay_connections: IntGaugeVec = "aurora_bus_relay_connections" ["channel"];
    /// Alerts written to dashboards.
    relay_deliveries: IntCounterVec = "aurora_bus_relay_deliveries_total" ["channel"];
    /// Writes to dashboard sockets; one write can carry many alerts.
    relay_writes: IntCounterVec = "aurora_bus_relay_writes_total" ["channel"];
    /// Number of times a dashboard fell behind the ring and was served from the store.
    relay_catchups: IntCounterVec = "aurora_bus_relay_catchups_total" ["channel"];
    /// Reads of the store for dashboards behind the ring, and for snapshots.
    relay_store_reads: IntCounter = "aurora_bus_relay_store_reads_total" [];
    /// Pages that dashboards got from the page cache, without a read of the store.
    relay_shared_pages: IntCounter = "aurora_bus_relay_shared_pages_total" [];
    /// Critical alerts sent ahead of their order to dashboards that were far behind.
    relay_early: IntCounterVec = "aurora_bus_relay_early_total" ["channel"];
    /// Gaps reported to dashboards, by reason.
    relay_gaps: IntCounterVec = "aurora_bus_relay_gaps_total" ["channel", "reason"];
    /// Dashboard sockets closed, by close code.
    relay_closes: IntCounterVec = "aurora_bus_relay_closes_total" ["code"];
    /// Time from an entry's id to its write to a dashboard, in seconds, one sample per write.
    relay_latency_seconds: HistogramVec = "aurora_bus_relay_latency_seconds" ["channel"];
    /// Time from an entry's id to the dashboard's report that the alert was seen, in seconds.
    relay_seen_seconds: HistogramVec = "aurora_bus_relay_seen_seconds" ["channel"];
    /// HTTP requests answered, by route and status.
    http_requests: IntCounterVec = "aurora_bus_http_requests_total" ["route", "status"];
    /// Time of HTTP requests, in seconds.
    http_seconds: HistogramVec = "aurora_bus_http_seconds" ["route"];
    /// HTTP connections open.
    http_connections: IntGauge = "aurora_bus_http_connections" [];
    /// TLS handshakes, by outcome.
    tls_handshakes: IntCounterVec = "aurora_bus_http_tls_handshakes_total" ["outcome"];
    /// Reloads of changed certificate files, by outcome.
    tls_reloads: IntCounterVec = "aurora_bus_http_tls_reloads_total" ["outcome"];
    /// Days until the served certificate expires, negative after that; absent without TLS.
    tls_certificate_days: GaugeVec = "aurora_bus_http_tls_certificate_days" [];
    /// Always 1; the version is in the label.
    build_info: IntGaugeVec = "aurora_bus_build_info" ["version"];
}

impl Metrics {
    /// Returns all metrics in the Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        let mut text = Vec::with_capacity(16 * 1024);
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to a Vec succeeds");
        String::from_utf8(text).expect("the text format is UTF-8")
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
