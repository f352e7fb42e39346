//! Clients that do not read for a while: the effect on the relay, on the other clients, and on themselves.

use anyhow::Result;

use crate::args::Scenario;
use crate::bench::{Backend, Bench, fleet_endpoint, read_counter};
use crate::generator::{Job, PublisherSpec, SlowClientsJob, SlowClientsReport};
use crate::http::HttpClient;
use crate::report::{Figure, Goal};
use crate::stats::to_f64;

/// Events per second.
const RATE: u32 = 100;
/// Bytes of an event: large enough that paused clients fall behind the ring, although the kernel buffers megabytes
/// for each of them.
const SIZE: usize = 8192;
/// The size of the ring, which then holds at most a second.
const RING: &str = "ring_bytes = \"256KiB\"\n";
/// The number of clients per client that does not read.
const CLIENTS_PER_SLOW: usize = 20;
/// The highest p99 of reading clients, relative to the p99 while all clients read.
const MAX_RATIO: f64 = 1.2;
/// The highest memory of the relay per client that does not read, in KiB: only bytes in flight, at any duration.
const MAX_KIB: f64 = 192.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let numbers = bench.args.clients_of(Scenario::Relay);
    let clients = if numbers.contains(&500) { 500 } else { numbers.last().copied().unwrap_or(1) };
    let slow = clients.div_ceil(CLIENTS_PER_SLOW);
    let mut rounds: Vec<(SlowClientsReport, f64)> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("slow clients, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        rounds.push(run(bench, backend, clients, slow)?);
    }
    let of = |value: fn(&SlowClientsReport) -> f64| rounds.iter().map(|(report, _)| value(report)).collect::<Vec<_>>();
    let figure = |name: &str, unit, values: &[f64]| {
        let name = format!("{slow} of {clients} do not read, {name}");
        Figure::new("relay", backend.name(), name, unit, values)
    };
    let memory = |value: fn(&SlowClientsReport) -> u64| {
        rounds.iter().map(|(report, _)| to_f64(value(report)) / 1_048_576.0).collect::<Vec<_>>()
    };
    let growth: Vec<f64> = rounds
        .iter()
        .map(|(report, _)| {
            to_f64(report.during_bytes.saturating_sub(report.before_bytes)) / 1024.0 / to_f64(slow as u64)
        })
        .collect();
    let catch_ups: Vec<f64> = rounds.iter().map(|(_, catch_ups)| *catch_ups).collect();
    bench.figures.extend([
        figure("p99 of the others", "ms", &of(|report| report.during.p99_ms))
            .beside("before", &of(|report| report.before.p99_ms))
            .with_goal(Goal::RatioAtMost(MAX_RATIO)),
        figure("relay memory", "MiB", &memory(|report| report.during_bytes))
            .beside("before", &memory(|report| report.before_bytes)),
        figure("relay memory for each of them", "KiB", &growth).with_goal(Goal::AtMost(MAX_KIB)),
        figure("served from the store", "times", &catch_ups).with_goal(Goal::AtLeast(1.0)),
        figure("closed meanwhile", "clients", &of(|report| to_f64(report.closes.values().sum()))),
        figure("caught up after", "s", &of(|report| report.catch_up_seconds)),
        figure("duplicates", "events", &of(|report| to_f64(report.duplicates))).with_goal(Goal::AtMost(0.0)),
        figure("holes", "events", &of(|report| to_f64(report.missing + report.gaps))).with_goal(Goal::AtMost(0.0)),
    ]);
    Ok(())
}

/// Runs once; returns the report and how often a client was served from the store.
fn run(bench: &Bench, backend: &Backend, clients: usize, slow: usize) -> Result<(SlowClientsReport, f64)> {
    let mut daemon = bench.start_relay(backend, RING, None)?;
    let seconds = to_f64(bench.args.seconds);
    let job = Job::SlowClients(SlowClientsJob {
        endpoint: fleet_endpoint(daemon.address),
        clients,
        slow,
        publisher: PublisherSpec { target: backend.target(daemon.address), size: bench.args.size.max(SIZE) },
        rate: RATE,
        seconds,
        relay_pid: daemon.pid(),
    });
    let report = bench.workspace.generate(&job, seconds * 2.0 + 180.0);
    daemon.ensure_running()?;
    let catch_ups = read_counter(&mut HttpClient::open(daemon.address)?, "aurora_bus_relay_catchups_total")?;
    Ok((report?, to_f64(catch_ups)))
}
