//! Consuming: a backlog delivered to a sink that does nothing, and acknowledged.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use url::Url;

use super::{EMBEDDED_FOLDER, GROUP, PUBLISH_PATH, Readers, STREAM, at, counted, float, requests};
use crate::bench::http::HttpClient;
use crate::bench::load::{Job, RawConsumeJob, Request, StoreMixedJob, Throughput, fill};
use crate::bench::report::{Figure, Goal};
use crate::bench::resp::{Connection, Token};
use crate::bench::{Backend, Bench};

/// How long a backlog may take.
const LIMIT: Duration = Duration::from_mins(5);
/// Events per request where publishing goes on beside consuming.
const MIXED_BATCH: u64 = 100;
/// Connections that publish beside consuming.
const MIXED_CONNECTIONS: usize = 8;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    match backend {
        Backend::Redis(url) => redis(bench, backend, url),
        Backend::Embedded => embedded(bench, backend),
    }
}

fn redis(bench: &mut Bench, backend: &Backend, url: &Url) -> Result<()> {
    let (mut daemon_runs, mut raw_runs) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("consume, redis, round {round}: raw loop"))?;
        bench.reset(backend)?;
        fill(url, STREAM, bench.args.backlog, bench.args.size)?;
        let mut control = Connection::open(url)?;
        renew_group(&mut control)?;
        let job = Job::RawConsume(RawConsumeJob { at: at(url), group: GROUP.to_owned(), count: 500 });
        let throughput: Throughput = bench.site.generate(&job, 60.0)?;
        raw_runs.push(throughput.per_second());

        bench.step(format!("consume, redis, round {round}: aurora-bus"))?;
        renew_group(&mut control)?;
        let mut daemon = bench.daemon(backend, Readers::Group)?;
        let rate = consumed_rate(bench, &mut control);
        daemon.must_run()?;
        daemon_runs.push(rate?);
    }
    let figure =
        Figure::new("consume", backend.name(), format!("backlog of {}", bench.args.backlog), "events/s", &daemon_runs)
            .beside("raw loop, COUNT 500, one XACK per read", &raw_runs)
            .with_goal(Goal::RatioAtLeast(0.5));
    bench.figures.push(figure);
    Ok(())
}

fn renew_group(control: &mut Connection) -> Result<()> {
    control.call(&[b"XGROUP", b"DESTROY", STREAM.as_bytes(), GROUP.as_bytes()])?;
    control.call(&[b"XGROUP", b"CREATE", STREAM.as_bytes(), GROUP.as_bytes(), b"0"])?;
    Ok(())
}

/// Events are published, delivered and acknowledged all at once, until all of them are.
fn embedded(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut daemon_runs, mut store_runs) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("consume beside publishing, embedded, round {round}: the store itself"))?;
        bench.reset(backend)?;
        let job = Job::StoreMixed(StoreMixedJob {
            folder: bench.site.path(EMBEDDED_FOLDER),
            publishers: MIXED_CONNECTIONS,
            batch: usize::try_from(MIXED_BATCH)?,
            size: bench.args.size,
            seconds: bench.args.seconds,
            max_events: bench.max_events(),
        });
        store_runs.push(bench.site.generate::<Throughput>(&job, float(bench.args.seconds) + 60.0)?.per_second());

        bench.step(format!("consume beside publishing, embedded, round {round}: aurora-bus"))?;
        bench.reset(backend)?;
        let mut daemon = bench.daemon(backend, Readers::Group)?;
        let request = Request::Publish { path: PUBLISH_PATH.to_owned(), events: MIXED_BATCH, size: bench.args.size };
        let report = requests(bench, &mut daemon, request, MIXED_CONNECTIONS, bench.max_events() / MIXED_BATCH)?;
        let published = report.requests * MIXED_BATCH;
        let ended = Instant::now();
        let mut client = HttpClient::open(daemon.address)?;
        bench.site.wait_for("the last acknowledgement", LIMIT, || {
            Ok((counted(&mut client, "aurora_bus_acknowledged_total")? >= published).then_some(()))
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

/// Watches the group from its first delivery to its last acknowledgement. What was acknowledged before the first
/// look does not count, nor does its time.
fn consumed_rate(bench: &Bench, control: &mut Connection) -> Result<f64> {
    let last = control.call(&[b"XREVRANGE", STREAM.as_bytes(), b"+", b"-", b"COUNT", b"1"])?;
    let Some(Token::Text(last)) = last.tokens().nth(2) else { bail!("the stream is empty") };
    let last = last.to_vec();
    let (begin, first) = bench.site.wait_for("the first delivery", LIMIT, || {
        let group = Progress::of(control)?;
        Ok((group.delivered != b"0-0").then(|| (Instant::now(), group.acknowledged)))
    })?;
    let end = bench.site.wait_for("the last acknowledgement", LIMIT, || {
        let group = Progress::of(control)?;
        Ok((group.delivered == last && group.pending == 0).then(Instant::now))
    })?;
    Ok(Throughput { events: bench.args.backlog - first, seconds: (end - begin).as_secs_f64() }.per_second())
}

/// How far the group is.
#[derive(Debug)]
struct Progress {
    delivered: Vec<u8>,
    pending: u64,
    /// Zero where the server does not count, which is before version 7.
    acknowledged: u64,
}

impl Progress {
    fn of(control: &mut Connection) -> Result<Self> {
        let groups = control.call(&[b"XINFO", b"GROUPS", STREAM.as_bytes()])?;
        let number = |name: &[u8]| match groups.after(name) {
            Some(Token::Integer(number)) => u64::try_from(number).unwrap_or_default(),
            _ => 0,
        };
        let Some(Token::Text(delivered)) = groups.after(b"last-delivered-id") else {
            bail!("XINFO GROUPS does not tell the last delivered entry")
        };
        let pending = number(b"pending");
        let acknowledged = number(b"entries-read").saturating_sub(pending);
        Ok(Self { delivered: delivered.to_vec(), pending, acknowledged })
    }
}
