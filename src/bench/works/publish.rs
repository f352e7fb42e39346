//! Publishing: batches beside the store's own appends, single events beside the cheapest request there is.

use anyhow::{Result, ensure};

use super::{EMBEDDED_FOLDER, PUBLISH_PATH, Readers, STREAM, at, counted, float, requests};
use crate::bench::http::HttpClient;
use crate::bench::load::{EngineAppendJob, Job, RawPublishJob, Request, Throughput};
use crate::bench::process::Daemon;
use crate::bench::report::{Figure, Goal};
use crate::bench::{Backend, Bench, redis_benchmark};

/// Events per request where they go in batches.
const BATCH: u64 = 500;
/// Connections that send batches.
const BATCH_CONNECTIONS: usize = 8;
/// Connections that send single events.
const SINGLE_CONNECTIONS: usize = 64;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    batched(bench, backend)?;
    single(bench, backend)
}

fn batched(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut daemon_runs, mut raw_runs, mut other_runs) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("publish in batches, {}, round {round}: the store itself", backend.name()))?;
        bench.reset(backend)?;
        raw_runs.push(raw_rate(bench, backend)?);
        bench.reset(backend)?;
        other_runs.extend(other_rate(bench, backend)?);

        bench.step(format!("publish in batches, {}, round {round}: aurora-bus", backend.name()))?;
        bench.reset(backend)?;
        let request = Request::Publish { path: PUBLISH_PATH.to_owned(), events: BATCH, size: bench.args.size };
        let mut daemon = bench.daemon(backend, Readers::Nobody)?;
        let report = requests(bench, &mut daemon, request, BATCH_CONNECTIONS, bench.max_events() / BATCH)?;
        check_published(&daemon, report.requests * BATCH)?;
        daemon_runs.push(rate(report.requests * BATCH, report.seconds));
    }
    let (raw_name, other_name) = match backend {
        Backend::Redis(_) => {
            ("raw XADD of the payload alone, windows of 128", "redis-benchmark -P 128 -c 50, the same entry")
        }
        Backend::Embedded => ("engine alone, a batch per synced commit", "engine alone, 8 batches per synced commit"),
    };
    let figure = Figure::new("publish", backend.name(), format!("batches of {BATCH}"), "events/s", &daemon_runs);
    let figure = figure.with_goal(Goal::RatioAtLeast(0.5));
    bench.figures.push(figure.clone().beside(raw_name, &raw_runs));
    if !other_runs.is_empty() {
        bench.figures.push(figure.beside(other_name, &other_runs));
    }
    Ok(())
}

fn single(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut publish_runs, mut health_runs, mut median, mut tail) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.reset(backend)?;
        let mut daemon = bench.daemon(backend, Readers::Nobody)?;
        bench.step(format!("publish one by one, {}, round {round}: /health", backend.name()))?;
        let request = Request::Get { path: "/health".to_owned() };
        let report = requests(bench, &mut daemon, request, SINGLE_CONNECTIONS, u64::MAX)?;
        health_runs.push(rate(report.requests, report.seconds));

        bench.step(format!("publish one by one, {}, round {round}: aurora-bus", backend.name()))?;
        let request = Request::Publish { path: PUBLISH_PATH.to_owned(), events: 1, size: bench.args.size };
        let report = requests(bench, &mut daemon, request, SINGLE_CONNECTIONS, bench.max_events())?;
        check_published(&daemon, report.requests)?;
        publish_runs.push(rate(report.requests, report.seconds));
        median.push(report.latency.p50_ms);
        tail.push(report.latency.p99_ms);
    }
    let name = format!("one per request, {SINGLE_CONNECTIONS} connections");
    let figure = Figure::new("publish", backend.name(), name, "requests/s", &publish_runs);
    let figure = figure.beside("GET /health", &health_runs);
    bench.figures.push(match backend {
        Backend::Redis(_) => figure.with_goal(Goal::RatioAtLeast(0.5)),
        Backend::Embedded => figure,
    });
    bench.figures.push(Figure::new("publish", backend.name(), "one per request, p50", "ms", &median));
    bench.figures.push(Figure::new("publish", backend.name(), "one per request, p99", "ms", &tail));
    Ok(())
}

/// What the store takes without the daemon, in events per second.
fn raw_rate(bench: &Bench, backend: &Backend) -> Result<f64> {
    let seconds = bench.args.seconds;
    let job = match backend {
        Backend::Redis(url) => Job::RawPublish(RawPublishJob {
            at: at(url),
            connections: 4,
            window: 128,
            size: bench.args.size,
            seconds,
            max_events: bench.max_events(),
        }),
        Backend::Embedded => return engine_rate(bench, BATCH),
    };
    Ok(bench.site.generate::<Throughput>(&job, float(seconds))?.per_second())
}

/// The same by other means: a program that everybody has; as many events per commit as can be waiting at once.
fn other_rate(bench: &Bench, backend: &Backend) -> Result<Option<f64>> {
    match backend {
        Backend::Redis(url) => redis_benchmark(bench, url, STREAM, bench.max_events() / 2),
        Backend::Embedded => engine_rate(bench, BATCH * BATCH_CONNECTIONS as u64).map(Some),
    }
}

fn engine_rate(bench: &Bench, batch: u64) -> Result<f64> {
    let (size, seconds) = (bench.args.size, bench.args.seconds);
    let folder = bench.site.path(EMBEDDED_FOLDER);
    let job = Job::EngineAppend(EngineAppendJob { folder, batch: usize::try_from(batch)?, size, seconds });
    Ok(bench.site.generate::<Throughput>(&job, float(seconds))?.per_second())
}

/// Compares what was answered with what the daemon counts.
fn check_published(daemon: &Daemon, expected: u64) -> Result<()> {
    let published = counted(&mut HttpClient::open(daemon.address)?, "aurora_bus_published_total")?;
    ensure!(published == expected, "{expected} events were accepted, but {published} counted");
    Ok(())
}

fn rate(events: u64, seconds: f64) -> f64 {
    Throughput { events, seconds }.per_second()
}
