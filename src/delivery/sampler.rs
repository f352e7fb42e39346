//! Figures of streams and groups, asked of the store now and then.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::ledger::Ledger;
use super::patience::{Trouble, jittered};
use super::retention::StreamSpec;
use crate::event::{EntryId, StreamName};
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::store::{GroupStatus, Store, StoreError};

const INTERVAL: Duration = Duration::from_secs(5);
/// How long one stream may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the gauges of streams and groups up to date, and finds what is lost.
#[derive(Debug)]
pub struct Sampler {
    store: Arc<dyn Store>,
    streams: Vec<Sampled>,
    metrics: Metrics,
    trouble: Trouble,
}

#[derive(Debug)]
struct Sampled {
    spec: StreamSpec,
    ledger: Ledger,
    part: Part,
}

impl Sampler {
    /// A sampler of these streams. Each is a part of `readiness` that is always ready, and warns of losses.
    pub fn new(store: Arc<dyn Store>, streams: Vec<StreamSpec>, metrics: Metrics, readiness: &Readiness) -> Self {
        let sampled = |spec: StreamSpec| {
            let part = readiness.part(&format!("stream {}", spec.name), None);
            part.ready();
            Sampled { spec, ledger: Ledger::default(), part }
        };
        Self { store, streams: streams.into_iter().map(sampled).collect(), metrics, trouble: Trouble::default() }
    }

    /// Samples every 5 s until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval_at(Instant::now() + jittered(Duration::from_secs(1)), INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.sample() => {}
            }
        }
    }

    async fn sample(&mut self) {
        let mut has_failed = false;
        for sampled in &mut self.streams {
            let stream = sampled.spec.name.clone();
            let result = timeout(TIMEOUT, sample_stream(&*self.store, &self.metrics, sampled)).await;
            let text = match result {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_elapsed) => "the store does not answer".to_owned(),
            };
            has_failed = true;
            if let Some(times) = self.trouble.occurred() {
                warn!(%stream, error = text, times, "cannot sample a stream");
            }
        }
        if !has_failed {
            self.trouble.ended();
        }
    }
}

async fn sample_stream(store: &dyn Store, metrics: &Metrics, sampled: &mut Sampled) -> Result<(), StoreError> {
    let Sampled { spec, ledger, part } = sampled;
    let stream = &spec.name;
    let length = metrics.stream_length.with_label_values(&[stream.as_str()]);
    let Some(status) = store.describe(stream).await? else {
        length.set(0);
        return Ok(());
    };
    length.set(gauge(status.length));
    for group in &status.groups {
        sample_group(metrics, stream, group);
    }
    ledger.look(store, metrics, spec, &status).await?;
    match ledger.warning(spec, &status) {
        Some(warning) => part.ready_but(warning),
        None => part.ready(),
    }
    Ok(())
}

fn sample_group(metrics: &Metrics, stream: &StreamName, group: &GroupStatus) {
    let labels = [stream.as_str(), group.name.as_str()];
    match group.undelivered.or(group.lag) {
        Some(lag) => metrics.group_lag.with_label_values(&labels).set(gauge(lag)),
        // Where there is no such gauge, it is absent already.
        None => drop(metrics.group_lag.remove_label_values(&labels)),
    }
    metrics.group_pending.with_label_values(&labels).set(gauge(group.pending));
    let age = group.oldest_pending.map_or(0.0, age_seconds);
    metrics.group_oldest_pending_seconds.with_label_values(&labels).set(age);
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// How long ago the entry was stored.
fn age_seconds(id: EntryId) -> f64 {
    let now = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default();
    Duration::from_millis(now.saturating_sub(id.ms)).as_secs_f64()
}
