//! Some clients do not read for a while: what that means to the relay, to the others, and to themselves.

use anyhow::Result;

use crate::bench::http::HttpClient;
use crate::bench::load::{Job, PublisherSpec, SlowJob, SlowReport};
use crate::bench::report::{Figure, Goal};
use crate::bench::works::{RICH_PATH, STREAM, counted, float, target};
use crate::bench::{Backend, Bench, What};

/// Events per second.
const RATE: u32 = 100;
/// Bytes of an event: enough for those that do not read to fall behind the ring, though the kernel keeps megabytes for
/// each of them.
const SIZE: usize = 8192;
/// What the ring holds, which is a second or less.
const RING: &str = "ring_bytes = \"256KiB\"\n";
/// Of so many clients one does not read.
const ONE_OF: usize = 20;
/// The p99 of those that read, beside what it was while all did.
const MAX_RATIO: f64 = 1.2;
/// Memory of the relay for each client that does not read, in KiB, however long that takes: what is on its way to it.
const MAX_KIB: f64 = 192.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let numbers = bench.args.clients_of(What::Relay);
    let clients = if numbers.contains(&500) { 500 } else { numbers.last().copied().unwrap_or(1) };
    let slow = clients.div_ceil(ONE_OF);
    let mut rounds: Vec<(SlowReport, f64)> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("slow clients, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        rounds.push(once(bench, backend, clients, slow)?);
    }
    let of = |value: fn(&SlowReport) -> f64| rounds.iter().map(|(report, _)| value(report)).collect::<Vec<_>>();
    let figure = |what: &str, unit, values: &[f64]| {
        let name = format!("{slow} of {clients} do not read, {what}");
        Figure::new("relay", backend.name(), name, unit, values)
    };
    let memory = |value: fn(&SlowReport) -> u64| {
        rounds.iter().map(|(report, _)| float(value(report)) / 1_048_576.0).collect::<Vec<_>>()
    };
    let growth: Vec<f64> = rounds
        .iter()
        .map(|(report, _)| float(report.during_bytes.saturating_sub(report.before_bytes)) / 1024.0 / float(slow as u64))
        .collect();
    let behind: Vec<f64> = rounds.iter().map(|(_, behind)| *behind).collect();
    bench.figures.extend([
        figure("p99 of the others", "ms", &of(|report| report.during.p99_ms))
            .beside("before", &of(|report| report.before.p99_ms))
            .with_goal(Goal::RatioAtMost(MAX_RATIO)),
        figure("relay memory", "MiB", &memory(|report| report.during_bytes))
            .beside("before", &memory(|report| report.before_bytes)),
        figure("relay memory for each of them", "KiB", &growth).with_goal(Goal::AtMost(MAX_KIB)),
        figure("served from the store", "times", &behind).with_goal(Goal::AtLeast(1.0)),
        figure("closed meanwhile", "clients", &of(|report| float(report.closes.values().sum()))),
        figure("caught up after", "s", &of(|report| report.catch_up_seconds)),
        figure("duplicates", "events", &of(|report| float(report.duplicates))).with_goal(Goal::AtMost(0.0)),
        figure("holes", "events", &of(|report| float(report.missing + report.gaps))).with_goal(Goal::AtMost(0.0)),
    ]);
    Ok(())
}

/// One run, and how often a client was served from the store in it.
fn once(bench: &Bench, backend: &Backend, clients: usize, slow: usize) -> Result<(SlowReport, f64)> {
    let mut daemon = bench.dashboards_daemon(backend, RING, None)?;
    let seconds = float(bench.args.seconds);
    let job = Job::Slow(SlowJob {
        address: daemon.address,
        path: RICH_PATH.to_owned(),
        stream: STREAM.to_owned(),
        clients,
        slow,
        publisher: PublisherSpec { target: target(backend, daemon.address), size: bench.args.size.max(SIZE) },
        rate: RATE,
        seconds,
        relay_pid: daemon.pid(),
    });
    let report = bench.site.generate(&job, seconds * 2.0 + 180.0);
    daemon.must_run()?;
    let behind = counted(&mut HttpClient::open(daemon.address)?, "aurora_bus_relay_catchups_total")?;
    Ok((report?, float(behind)))
}
