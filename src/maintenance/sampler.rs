//! Figures of streams and groups, asked of the store now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::backoff::jittered;
use crate::event::StreamName;
use crate::log_throttle::ThrottledWarning;
use crate::maintenance::FamilySpec;
use crate::maintenance::loss_detector::Ledger;
use crate::maintenance::retention::StreamSpec;
use crate::maintenance::round_robin::Rounds;
use crate::maintenance::stream_gauges::Figures;
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::store::{Store, StoreError};

const INTERVAL: Duration = Duration::from_secs(5);
/// How long one stream may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Keeps the gauges of streams and groups up to date, and finds what is lost.
#[derive(Debug)]
pub struct Sampler {
    store: Arc<dyn Store>,
    streams: Vec<Sampled>,
    families: Vec<SampledFamily>,
    metrics: Metrics,
    trouble: ThrottledWarning,
}

#[derive(Debug)]
struct Sampled {
    spec: StreamSpec,
    ledger: Ledger,
    part: Part,
}

/// A family: the figures of its members as they were when each was looked at last.
#[derive(Debug)]
struct SampledFamily {
    spec: FamilySpec,
    rounds: Rounds,
    members: BTreeMap<StreamName, Member>,
    part: Part,
}

#[derive(Debug, Default)]
struct Member {
    ledger: Ledger,
    figures: Figures,
    warning: Option<String>,
}

impl Sampler {
    /// A sampler of these streams. Each is a part of `readiness` that is always ready, and warns of losses.
    pub fn new(store: Arc<dyn Store>, streams: Vec<StreamSpec>, metrics: Metrics, readiness: &Readiness) -> Self {
        let sampled = |spec: StreamSpec| {
            let part = readiness.part(&format!("stream {}", spec.name), None);
            part.ready();
            Sampled { spec, ledger: Ledger::default(), part }
        };
        let streams = streams.into_iter().map(sampled).collect();
        Self { store, streams, families: Vec::new(), metrics, trouble: ThrottledWarning::default() }
    }

    /// The same also of these families: the figures of their members are shown together, under the family's name.
    #[must_use]
    pub fn with_families(mut self, families: impl IntoIterator<Item = FamilySpec>, readiness: &Readiness) -> Self {
        let sampled = |spec: FamilySpec| {
            let part = readiness.part(&format!("streams {}", spec.label()), None);
            part.ready();
            SampledFamily { spec, rounds: Rounds::default(), members: BTreeMap::new(), part }
        };
        self.families = families.into_iter().map(sampled).collect();
        self
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
        let mut failures = Vec::new();
        for sampled in &mut self.streams {
            let stream = sampled.spec.name.clone();
            let result = in_time(sample_stream(&*self.store, &self.metrics, sampled)).await;
            failures.extend(result.err().map(|error| (stream, error)));
        }
        for family in &mut self.families {
            failures.extend(sample_family(&*self.store, &self.metrics, family).await);
        }
        if failures.is_empty() {
            self.trouble.ended();
        }
        for (stream, error) in failures {
            if let Some(times) = self.trouble.occurred() {
                warn!(%stream, error, times, "cannot sample a stream");
            }
        }
    }
}

async fn in_time<T>(sample: impl Future<Output = Result<T, StoreError>>) -> Result<T, String> {
    match timeout(TIMEOUT, sample).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_elapsed) => Err("the store does not answer".to_owned()),
    }
}

async fn sample_stream(store: &dyn Store, metrics: &Metrics, sampled: &mut Sampled) -> Result<(), StoreError> {
    let Sampled { spec, ledger, part } = sampled;
    let label = spec.name.as_str();
    let Some(status) = store.describe(&spec.name).await? else {
        metrics.stream_length.with_label_values(&[label]).set(0);
        return Ok(());
    };
    Figures::of(spec, &status).show(metrics, label);
    ledger.look(store, metrics, label, spec, &status).await?;
    match ledger.warning(spec, &status) {
        Some(warning) => part.ready_but(warning),
        None => part.ready(),
    }
    Ok(())
}

/// Looks at the members that are due, and shows the figures of all. Says which could not be looked at.
async fn sample_family(store: &dyn Store, metrics: &Metrics, family: &mut SampledFamily) -> Vec<(StreamName, String)> {
    let SampledFamily { spec, rounds, members, part } = family;
    let label = spec.label();
    let mut due: BTreeSet<StreamName> = rounds.next(spec).into_iter().collect();
    due.extend(members.iter().filter(|(_, member)| member.figures.is_busy()).map(|(stream, _)| stream.clone()));
    let mut failures = Vec::new();
    for stream in due {
        let member = members.entry(stream.clone()).or_default();
        let sampled = in_time(sample_member(store, metrics, spec, stream.clone(), member)).await;
        failures.extend(sampled.err().map(|error| (stream, error)));
    }
    let mut sum = Figures::default();
    for member in members.values() {
        sum.add(&member.figures);
    }
    sum.show(metrics, label);
    metrics.family_members.with_label_values(&[label]).set(i64::try_from(spec.roster.len()).unwrap_or(i64::MAX));
    let warned = members.iter().filter_map(|(stream, member)| Some((stream, member.warning.as_ref()?)));
    let warnings: Vec<String> = warned.map(|(stream, warning)| format!("{stream}: {warning}")).collect();
    match warnings.first() {
        Some(first) => part.ready_but(format!("{first} (and {} more)", warnings.len() - 1)),
        None => part.ready(),
    }
    failures
}

async fn sample_member(
    store: &dyn Store,
    metrics: &Metrics,
    spec: &FamilySpec,
    stream: StreamName,
    member: &mut Member,
) -> Result<(), StoreError> {
    let spec_of_member = spec.member(stream);
    let Some(status) = store.describe(&spec_of_member.name).await? else {
        member.figures = Figures::default();
        return Ok(());
    };
    member.figures = Figures::of(&spec_of_member, &status);
    member.ledger.look(store, metrics, spec.label(), &spec_of_member, &status).await?;
    member.warning = member.ledger.warning(&spec_of_member, &status);
    Ok(())
}
