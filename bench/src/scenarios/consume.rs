//! The scenario `consume`: a backlog delivered to a sink that does nothing, and acknowledged.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use url::Url;

use crate::bench::{Backend, Bench, EMBEDDED_FOLDER, GROUP, PUBLISH_PATH, Readers, STREAM, read_counter, redis_stream};
use crate::generator::{Job, RedisConsumeJob, Request, StoreMixedJob, fill_stream};
use crate::http::HttpClient;
use crate::report::{Figure, Goal};
use crate::resp::{RespConnection, RespToken};
use crate::stats::{Throughput, to_f64};

/// The time limit of a backlog.
const LIMIT: Duration = Duration::from_mins(5);
/// Events per request while publishing and consuming.
const MIXED_BATCH: u64 = 100;
/// Connections that publish while consuming.
const MIXED_CONNECTIONS: usize = 8;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    match backend {
        Backend::Redis(url) => from_redis(bench, backend, url),
        Backend::Embedded => from_embedded(bench, backend),
    }
}

fn from_redis(bench: &mut Bench, backend: &Backend, url: &Url) -> Result<()> {
    let (mut daemon_runs, mut raw_runs) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("consume, redis, round {round}: raw loop"))?;
        bench.reset(backend)?;
        fill_stream(url, STREAM, bench.args.backlog, bench.args.size)?;
        let mut control = RespConnection::open(url)?;
        recreate_group(&mut control)?;
        let job = Job::RedisConsume(RedisConsumeJob { stream: redis_stream(url), group: GROUP.to_owned(), count: 500 });
        let throughput: Throughput = bench.workspace.generate(&job, 60.0)?;
        raw_runs.push(throughput.per_second());

        bench.step(format!("consume, redis, round {round}: aurora-bus"))?;
        recreate_group(&mut control)?;
        let mut daemon = bench.start_daemon(backend, Readers::Group)?;
        let rate = consumed_rate(bench, &mut control);
        daemon.ensure_running()?;
        daemon_runs.push(rate?);
    }
    let figure =
        Figure::new("consume", backend.name(), format!("backlog of {}", bench.args.backlog), "events/s", &daemon_runs)
            .beside("raw loop, COUNT 500, one XACK per read", &raw_runs)
            .with_goal(Goal::RatioAtLeast(0.5));
    bench.figures.push(figure);
    Ok(())
}

fn recreate_group(control: &mut RespConnection) -> Result<()> {
    control.call(&[b"XGROUP", b"DESTROY", STREAM.as_bytes(), GROUP.as_bytes()])?;
    control.call(&[b"XGROUP", b"CREATE", STREAM.as_bytes(), GROUP.as_bytes(), b"0"])?;
    Ok(())
}

/// Publishes, delivers and acknowledges concurrently, until all events are acknowledged.
fn from_embedded(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut daemon_runs, mut store_runs) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("consume beside publishing, embedded, round {round}: the store itself"))?;
        bench.reset(backend)?;
        let job = Job::StoreMixed(StoreMixedJob {
            folder: bench.workspace.path(EMBEDDED_FOLDER),
            publishers: MIXED_CONNECTIONS,
            batch: usize::try_from(MIXED_BATCH)?,
            size: bench.args.size,
            seconds: bench.args.seconds,
            max_events: bench.max_events(),
        });
        store_runs.push(bench.workspace.generate::<Throughput>(&job, to_f64(bench.args.seconds) + 60.0)?.per_second());

        bench.step(format!("consume beside publishing, embedded, round {round}: aurora-bus"))?;
        bench.reset(backend)?;
        let mut daemon = bench.start_daemon(backend, Readers::Group)?;
        let request = Request::Publish { path: PUBLISH_PATH.to_owned(), events: MIXED_BATCH, size: bench.args.size };
        let max_requests = bench.max_events() / MIXED_BATCH;
        let report = bench.send_requests(&mut daemon, request, MIXED_CONNECTIONS, max_requests)?;
        let published = report.requests * MIXED_BATCH;
        let ended = Instant::now();
        let mut client = HttpClient::open(daemon.address)?;
        bench.workspace.wait_for("last acknowledgement", LIMIT, || {
            Ok((read_counter(&mut client, "aurora_bus_acknowledged_total")? >= published).then_some(()))
        })?;
        let seconds = report.seconds + ended.elapsed().as_secs_f64();
        daemon_runs.push(Throughput { events: published, seconds }.per_second());
    }
    let figure = Figure::new("consume", backend.name(), "delivered beside publishing", "events/s", &daemon_runs)
        .beside("the store itself, in one process", &store_runs)
        .with_goal(Goal::RatioAtLeast(0.5));
    bench.figures.push(figure);
    Ok(())
}

/// Returns the rate of the group from its first delivery to its last acknowledgement.
///
/// Entries acknowledged before the first poll do not count, and neither does their time.
fn consumed_rate(bench: &Bench, control: &mut RespConnection) -> Result<f64> {
    let last = control.call(&[b"XREVRANGE", STREAM.as_bytes(), b"+", b"-", b"COUNT", b"1"])?;
    let Some(RespToken::Text(last)) = last.tokens().nth(2) else { bail!("the stream is empty") };
    let last = last.to_vec();
    let (start, first) = bench.workspace.wait_for("first delivery", LIMIT, || {
        let group = GroupProgress::of(control)?;
        Ok((group.delivered != b"0-0").then(|| (Instant::now(), group.acknowledged)))
    })?;
    let end = bench.workspace.wait_for("last acknowledgement", LIMIT, || {
        let group = GroupProgress::of(control)?;
        Ok((group.delivered == last && group.pending == 0).then(Instant::now))
    })?;
    Ok(Throughput { events: bench.args.backlog - first, seconds: (end - start).as_secs_f64() }.per_second())
}

/// The progress of the group.
#[derive(Debug)]
struct GroupProgress {
    delivered: Vec<u8>,
    pending: u64,
    /// Zero if the server does not count it, before version 7.
    acknowledged: u64,
}

impl GroupProgress {
    fn of(control: &mut RespConnection) -> Result<Self> {
        let groups = control.call(&[b"XINFO", b"GROUPS", STREAM.as_bytes()])?;
        let number = |name: &[u8]| match groups.after(name) {
            Some(RespToken::Integer(number)) => u64::try_from(number).unwrap_or_default(),
            _ => 0,
        };
        let Some(RespToken::Text(delivered)) = groups.after(b"last-delivered-id") else {
            bail!("the reply to XINFO GROUPS has no last-delivered-id")
        };
        let pending = number(b"pending");
        let acknowledged = number(b"entries-read").saturating_sub(pending);
        Ok(Self { delivered: delivered.to_vec(), pending, acknowledged })
    }
}
