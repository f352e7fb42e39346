//! The daemon is killed under its dashboards, started again, and all of them come back at once.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{must_have_files, per};
use crate::bench::http::HttpClient;
use crate::bench::load::{Job, PublisherSpec, StormJob, StormReport};
use crate::bench::payload::Clock;
use crate::bench::report::{Figure, Goal};
use crate::bench::works::{RICH_PATH, STREAM, counted, float, target};
use crate::bench::{Backend, Bench};

/// Events while all are connected; the last are on their way when the daemon is killed.
const BEFORE: u64 = 96;
/// Events that each client has missed.
const MISSED: u64 = 300;
/// Events of one request.
const BURST: u64 = 100;
/// How long all may take to catch up, in seconds.
const LIMIT_SECONDS: f64 = 120.0;
/// The share of clients for which the store may be read once, at most: reads are shared.
const MAX_READS: f64 = 0.1;
/// Reads of ranges of a stream.
const READS: &str = "aurora_bus_store_seconds_count{operation=\"range\"}";

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let clients = bench.args.relay.crowd();
    must_have_files(clients)?;
    let mut rounds: Vec<(StormReport, f64)> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("storm of {clients}, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        rounds.push(once(bench, backend, clients)?);
    }
    let of = |value: fn(&StormReport) -> f64| rounds.iter().map(|(report, _)| value(report)).collect::<Vec<_>>();
    let figure = |what: &str, unit, values: &[f64]| {
        let name = format!("storm, {clients} clients × {MISSED} events, {what}");
        Figure::new("relay", backend.name(), name, unit, values)
    };
    let reads: Vec<f64> = rounds.iter().map(|(_, reads)| *reads).collect();
    let micros = of(|report| per(report.relay_cpu_seconds * 1e6, float(report.resumed)));
    let memory = of(|report| float(report.relay_bytes) / 1_048_576.0);
    bench.figures.extend([
        figure("all caught up", "s", &of(|report| report.seconds)),
        figure("duplicates", "events", &of(|report| float(report.duplicates))).with_goal(Goal::AtMost(0.0)),
        figure("holes", "events", &of(|report| float(report.missing + report.gaps))).with_goal(Goal::AtMost(0.0)),
        figure("reads of the store", "reads", &reads).with_goal(Goal::AtMost(MAX_READS * float(clients as u64))),
        figure("relay CPU", "µs/event", &micros),
        figure("relay memory", "MiB", &memory),
    ]);
    Ok(())
}

/// One storm, and how often the store was read in it.
fn once(bench: &Bench, backend: &Backend, clients: usize) -> Result<(StormReport, f64)> {
    let mut daemon = bench.dashboards_daemon(backend, "", None)?;
    let address = daemon.address;
    let size = bench.args.size;
    let new_pid_file = bench.site.path("storm.pid");
    let job = Job::Storm(StormJob {
        address,
        path: RICH_PATH.to_owned(),
        stream: STREAM.to_owned(),
        clients,
        publisher: PublisherSpec { target: target(backend, address), size },
        before: BEFORE,
        missed: MISSED,
        relay_pid: daemon.pid(),
        limit_seconds: LIMIT_SECONDS,
        new_pid_file: new_pid_file.clone(),
    });
    let mut generator = bench.site.start_generator(&job)?;
    bench.site.wait_for("the storm's beginning", Duration::from_mins(3), || {
        generator.must_go_on()?;
        Ok(daemon.has_ended()?.then_some(()))
    })?;
    drop(daemon);
    publish_missed(bench, backend)?;
    let mut daemon = bench.dashboards_daemon(backend, "", Some(address))?;
    let unfinished = new_pid_file.with_extension("new");
    fs::write(&unfinished, daemon.pid().to_string())
        .and_then(|()| fs::rename(&unfinished, &new_pid_file))
        .context("cannot tell the generator who was started")?;
    let report = bench.site.finish(generator, Duration::from_secs_f64(LIMIT_SECONDS) + Duration::from_mins(1));
    daemon.must_run()?;
    let report = report?;
    let reads = counted(&mut HttpClient::open(address)?, READS)?;
    fs::remove_file(&new_pid_file).context("cannot remove a file of the measurement")?;
    Ok((report, float(reads)))
}

/// Publishes what the clients miss: into Redis itself, or by a daemon on another address that is killed as well.
fn publish_missed(bench: &Bench, backend: &Backend) -> Result<()> {
    let other = match backend {
        Backend::Redis(_) => None,
        Backend::Embedded => Some(bench.dashboards_daemon(backend, "", None)?),
    };
    let address = other.as_ref().map_or_else(|| ([127, 0, 0, 1], 0).into(), |daemon| daemon.address);
    let spec = PublisherSpec { target: target(backend, address), size: bench.args.size };
    let mut publisher = spec.open(Clock::start())?;
    (0..MISSED / BURST).try_for_each(|burst| publisher.publish(BEFORE + burst * BURST, BURST))
}
