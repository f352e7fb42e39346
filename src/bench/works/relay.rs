//! The relay: how fast one dashboard hears of an event, and how many dashboards can.
//!
//! With Redis the generator publishes straight into the stream, so that only the relay's way counts. With the
//! embedded store it publishes over HTTP, to the daemon and to the null relay alike.

use std::net::SocketAddr;

use anyhow::Result;

use super::{Readers, at, deliver, float, sockets_of, target};
use crate::bench::load::{Job, Pace, PublisherSpec, ServeJob, SocketsJob, SocketsReport};
use crate::bench::report::{Figure, Goal};
use crate::bench::{Backend, Bench, What};

const NULL_RELAY: &str = "null relay";
/// Events per second where latency is measured.
const LATENCY_RATE: u32 = 1000;
/// Events per second to all clients where the cost of a calm fan-out is measured.
const CALM_RATE: u32 = 100;

/// The same measurement of the daemon and of the null relay, round by round.
#[derive(Debug, Default)]
struct Pair {
    daemon: Vec<SocketsReport>,
    null: Vec<SocketsReport>,
}

type Value = fn(&SocketsReport) -> f64;

impl Pair {
    fn figure(
        &self,
        measurement: &'static str,
        backend: &Backend,
        name: String,
        unit: &'static str,
        of: Value,
    ) -> Figure {
        let values = |reports: &[SocketsReport]| reports.iter().map(of).collect::<Vec<_>>();
        Figure::new(measurement, backend.name(), name, unit, &values(&self.daemon))
            .beside(NULL_RELAY, &values(&self.null))
    }
}

/// From publishing to one WebSocket client.
pub(super) fn latency(bench: &mut Bench, backend: &Backend) -> Result<()> {
    // Over HTTP one connection waits for each answer, which a disk may take milliseconds for.
    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 16,
    };
    let pair = both(bench, backend, "latency", 1, Pace::PerSecond { rate: LATENCY_RATE, connections })?;
    let figures: [(&str, Value, f64); 3] = [
        ("p50", |report| report.latency.p50_ms, 1.5),
        ("p99", |report| report.latency.p99_ms, 2.0),
        ("p99.9", |report| report.latency.p999_ms, f64::INFINITY),
    ];
    for (name, value, bound) in figures {
        let figure = pair.figure("latency", backend, format!("{LATENCY_RATE}/s to 1 client, {name}"), "ms", value);
        let has_goal = matches!(backend, Backend::Redis(_)) && bound.is_finite();
        bench.figures.push(if has_goal { figure.with_goal(Goal::RatioAtMost(bound)) } else { figure });
    }
    Ok(())
}

/// From one publisher to many WebSocket clients.
pub(super) fn fanout(bench: &mut Bench, backend: &Backend) -> Result<()> {
    bench.args.clients_of(What::Fanout).into_iter().try_for_each(|clients| fanout_to(bench, backend, clients))
}

fn fanout_to(bench: &mut Bench, backend: &Backend, clients: usize) -> Result<()> {
    let pair = both(bench, backend, "fan-out", clients, Pace::Saturate { window: 2048, burst: 64 })?;
    let figure = pair.figure("fan-out", backend, format!("saturated, {clients} clients"), "frames/s", |report| {
        per(float(report.in_window), report.seconds)
    });
    bench.figures.push(if clients == 500 { figure.with_goal(Goal::AtLeast(1.2e6)) } else { figure });
    let name = format!("saturated, {clients} clients, relay CPU");
    bench.figures.push(pair.figure("fan-out", backend, name, "µs/frame", |report| {
        per(report.relay_cpu_seconds * 1e6, float(report.in_window))
    }));

    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 4,
    };
    let pair = both(bench, backend, "calm fan-out", clients, Pace::PerSecond { rate: CALM_RATE, connections })?;
    let figures: [(&str, &str, Value); 3] = [
        ("p50", "ms", |report| report.latency.p50_ms),
        ("p99", "ms", |report| report.latency.p99_ms),
        ("relay CPU", "cores", |report| per(report.relay_cpu_seconds, report.seconds)),
    ];
    for (name, unit, value) in figures {
        let name = format!("{CALM_RATE}/s to {clients} clients, {name}");
        bench.figures.push(pair.figure("fan-out", backend, name, unit, value));
    }
    Ok(())
}

fn both(bench: &Bench, backend: &Backend, what: &str, clients: usize, pace: Pace) -> Result<Pair> {
    let mut pair = Pair::default();
    for round in 1..=bench.args.rounds {
        bench.step(format!("{what}, {}, round {round}: null relay", backend.name()))?;
        bench.reset(backend)?;
        let source = match backend {
            Backend::Redis(url) => ServeJob::Redis(at(url)),
            Backend::Embedded => ServeJob::Http,
        };
        let (process, address) = bench.site.start_server(&Job::NullRelay(source))?;
        pair.null.push(run(bench, backend, address, process.pid(), clients, pace)?);
        drop(process);

        bench.step(format!("{what}, {}, round {round}: aurora-bus", backend.name()))?;
        bench.reset(backend)?;
        let mut daemon = bench.daemon(backend, Readers::Dashboards)?;
        let report = run(bench, backend, daemon.address, daemon.pid(), clients, pace);
        daemon.must_run()?;
        pair.daemon.push(report?);
    }
    Ok(pair)
}

fn run(
    bench: &Bench,
    backend: &Backend,
    address: SocketAddr,
    relay_pid: u32,
    clients: usize,
    pace: Pace,
) -> Result<SocketsReport> {
    deliver(
        bench,
        SocketsJob {
            relay: sockets_of(address),
            clients,
            publisher: PublisherSpec { target: target(backend, address), size: bench.args.size },
            pace,
            warmup_seconds: 1.0,
            seconds: float(bench.args.seconds),
            relay_pid,
        },
    )
}

fn per(value: f64, of: f64) -> f64 {
    if of > 0.0 { value / of } else { 0.0 }
}
