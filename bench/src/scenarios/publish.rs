//! The scenario `publish`: batches beside appends of the store alone, single events beside the cheapest request.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aurora_bus::event::{NewEntry, NewEvent};
use url::Url;

use crate::bench::{Backend, Bench, EMBEDDED_FOLDER, PUBLISH_PATH, Readers, STREAM, read_counter, redis_stream};
use crate::generator::{EngineAppendJob, Job, RedisPublishJob, Request};
use crate::http::HttpClient;
use crate::payload::EventTemplate;
use crate::report::{Figure, Goal};
use crate::servers::Server;
use crate::stats::{Throughput, to_f64};

/// The time limit of `redis-benchmark`.
const REDIS_BENCHMARK_LIMIT: Duration = Duration::from_mins(2);
/// Events per batch.
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
        let mut daemon = bench.start_daemon(backend, Readers::Nobody)?;
        let max_requests = bench.max_events() / BATCH;
        let report = bench.send_requests(&mut daemon, request, BATCH_CONNECTIONS, max_requests)?;
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
        let mut daemon = bench.start_daemon(backend, Readers::Nobody)?;
        bench.step(format!("publish one by one, {}, round {round}: /health", backend.name()))?;
        let request = Request::Get { path: "/health".to_owned() };
        let report = bench.send_requests(&mut daemon, request, SINGLE_CONNECTIONS, u64::MAX)?;
        health_runs.push(rate(report.requests, report.seconds));

        bench.step(format!("publish one by one, {}, round {round}: aurora-bus", backend.name()))?;
        let request = Request::Publish { path: PUBLISH_PATH.to_owned(), events: 1, size: bench.args.size };
        let report = bench.send_requests(&mut daemon, request, SINGLE_CONNECTIONS, bench.max_events())?;
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

/// Returns the events per second that the store accepts without the daemon.
fn raw_rate(bench: &Bench, backend: &Backend) -> Result<f64> {
    let seconds = bench.args.seconds;
    let job = match backend {
        Backend::Redis(url) => Job::RedisPublish(RedisPublishJob {
            stream: redis_stream(url),
            connections: 4,
            window: 128,
            size: bench.args.size,
            seconds,
            max_events: bench.max_events(),
        }),
        Backend::Embedded => return engine_rate(bench, BATCH),
    };
    Ok(bench.workspace.generate::<Throughput>(&job, to_f64(seconds))?.per_second())
}

/// Returns the same rate by another measure: with `redis-benchmark`, or with larger commits.
///
/// A larger commit holds as many events as can wait at once.
fn other_rate(bench: &Bench, backend: &Backend) -> Result<Option<f64>> {
    match backend {
        Backend::Redis(url) => redis_benchmark(bench, url, bench.max_events() / 2),
        Backend::Embedded => engine_rate(bench, BATCH * BATCH_CONNECTIONS as u64).map(Some),
    }
}

fn engine_rate(bench: &Bench, batch: u64) -> Result<f64> {
    let (size, seconds) = (bench.args.size, bench.args.seconds);
    let folder = bench.workspace.path(EMBEDDED_FOLDER);
    let job = Job::EngineAppend(EngineAppendJob { folder, batch: usize::try_from(batch)?, size, seconds });
    Ok(bench.workspace.generate::<Throughput>(&job, to_f64(seconds))?.per_second())
}

/// Returns the events per second of XADD by `redis-benchmark`, with 50 connections of 128 commands each.
///
/// It appends the entry that the daemon makes of an event. Returns `None` if the program is not beside the server.
fn redis_benchmark(bench: &Bench, url: &Url, events: u64) -> Result<Option<f64>> {
    let program = bench.args.redis_server.with_file_name("redis-benchmark");
    if bench.args.redis_url.is_some() || Command::new(&program).arg("--version").output().is_err() {
        return Ok(None);
    }
    let payload = EventTemplate::new(bench.args.size).bytes(0, 0);
    let entry = NewEvent::parse(payload.into())?.into_entry(&NewEntry::timestamp_now(), None);
    let mut command = Command::new(&program);
    command.args(["-h", url.host_str().unwrap_or_default(), "-p", &url.port().unwrap_or(6379).to_string()]);
    command.args(["-q", "-P", "128", "-c", "50", "-n", &events.to_string(), "XADD", STREAM, "*"]);
    for (name, value) in entry.fields.iter() {
        command.args([std::str::from_utf8(name)?, std::str::from_utf8(value)?]);
    }
    let output = bench.workspace.run(&mut command, REDIS_BENCHMARK_LIMIT)?;
    let (before, _) = output.rsplit_once(" requests per second").context("redis-benchmark printed no result")?;
    let rate = before.rsplit([' ', ':']).next().unwrap_or_default();
    Ok(Some(rate.parse().with_context(|| format!("redis-benchmark printed {rate:?} as its result"))?))
}

/// Compares the accepted events with the counter of the daemon.
fn check_published(daemon: &Server, expected: u64) -> Result<()> {
    let published = read_counter(&mut HttpClient::open(daemon.address)?, "aurora_bus_published_total")?;
    ensure!(published == expected, "{expected} events were accepted, but the daemon counted {published}");
    Ok(())
}

fn rate(events: u64, seconds: f64) -> f64 {
    Throughput { events, seconds }.per_second()
}
