//! The competitors of the daemon, and a fan-out measured with all of them in turn.

use std::path::Path;

use anyhow::{Context, Result};

use crate::bench::{Backend, Bench, PUBLISH_PATH, redis_stream, relay_endpoint};
use crate::generator::{
    BaselineRelayJob, FanoutJob, FanoutReport, Job, Pace, Protocol, PublisherSpec, RelayEndpoint, Target,
};
use crate::process::Process;
use crate::report::{Figure, Goal};
use crate::servers::Server;
use crate::stats::{ratio, to_f64};

/// The subject or channel of events at the competitors.
pub(super) const CHANNEL: &str = "alerts";
/// The WebSocket path of Centrifugo.
pub(super) const CENTRIFUGO_WEBSOCKET_PATH: &str = "/connection/websocket";
/// The seconds of publishing before the measured window.
const WARMUP_SECONDS: f64 = 1.0;

/// A relay beside the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Competitor {
    /// Writes the bytes of the store to sockets and does nothing else.
    BaselineRelay,
    Nats,
    Centrifugo,
}

impl Competitor {
    pub(super) const ALL: [Self; 3] = [Self::BaselineRelay, Self::Nats, Self::Centrifugo];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::BaselineRelay => "baseline relay",
            Self::Nats => "NATS",
            Self::Centrifugo => "Centrifugo",
        }
    }

    /// Returns the program of the competitor, or `None` if it was not given.
    pub(super) fn program(self, bench: &Bench) -> Option<&Path> {
        match self {
            Self::BaselineRelay => None,
            Self::Nats => bench.args.relay.nats_server.as_deref(),
            Self::Centrifugo => bench.args.relay.centrifugo.as_deref(),
        }
    }

    const fn missing(self) -> &'static str {
        match self {
            Self::BaselineRelay => "not measured",
            Self::Nats => "not measured: --nats-server",
            Self::Centrifugo => "not measured: --centrifugo",
        }
    }
}

/// A measured relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Daemon,
    Competitor(Competitor),
}

/// The value of a figure.
pub(super) type Value = fn(&FanoutReport) -> f64;

/// The goals of a figure beside each competitor, in the order of [`Competitor::ALL`].
pub(super) type Goals = [Option<Goal>; 3];

/// The reports of all sides, one per round.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    daemon: Vec<FanoutReport>,
    competitors: Vec<(Competitor, Vec<FanoutReport>)>,
}

impl Comparison {
    /// Measures the competitors and the daemon in turn, in each round.
    pub(super) fn measure(
        bench: &Bench,
        backend: &Backend,
        title: &str,
        competitors: &[Competitor],
        clients: usize,
        pace: Pace,
    ) -> Result<Self> {
        let is_available =
            |competitor: &Competitor| *competitor == Competitor::BaselineRelay || competitor.program(bench).is_some();
        let available = competitors.iter().copied().filter(is_available);
        let mut comparison =
            Self { daemon: Vec::new(), competitors: available.map(|competitor| (competitor, Vec::new())).collect() };
        for round in 1..=bench.args.rounds {
            let step = |name: &str| bench.step(format!("{title}, {}, round {round}: {name}", backend.name()));
            for (competitor, reports) in &mut comparison.competitors {
                step(competitor.name())?;
                reports.push(run(bench, backend, Side::Competitor(*competitor), clients, pace, &[])?);
            }
            step("aurora-bus")?;
            comparison.daemon.push(run(bench, backend, Side::Daemon, clients, pace, &[])?);
        }
        Ok(comparison)
    }

    /// Returns the figure of the daemon beside that of a competitor.
    pub(super) fn beside(
        &self,
        competitor: Competitor,
        figure: (&'static str, &Backend, String, &'static str, Value),
    ) -> Figure {
        let (measurement, backend, name, unit, value) = figure;
        let values = |reports: &[FanoutReport]| reports.iter().map(value).collect::<Vec<_>>();
        let figure = Figure::new(measurement, backend.name(), name, unit, &values(&self.daemon));
        match self.competitors.iter().find(|(measured, _)| *measured == competitor) {
            Some((_, reports)) => figure.beside(competitor.name(), &values(reports)),
            None => figure.not_beside(competitor.missing()),
        }
    }
}

/// Runs the daemon once; its clients have one of the `queries` in turn.
pub(super) fn run_daemon(
    bench: &Bench,
    backend: &Backend,
    clients: usize,
    pace: Pace,
    queries: &[String],
) -> Result<FanoutReport> {
    run(bench, backend, Side::Daemon, clients, pace, queries)
}

fn run(
    bench: &Bench,
    backend: &Backend,
    side: Side,
    clients: usize,
    pace: Pace,
    queries: &[String],
) -> Result<FanoutReport> {
    bench.reset(backend)?;
    let (mut running, mut relay, target) = start(bench, backend, side)?;
    relay.queries = queries.to_vec();
    let report = bench.fan_out(FanoutJob {
        relay,
        clients,
        publisher: PublisherSpec { target, size: bench.args.size },
        pace,
        warmup_seconds: WARMUP_SECONDS,
        seconds: to_f64(bench.args.seconds),
        relay_pid: running.pid(),
    });
    running.ensure_running()?;
    report
}

/// A measured process; it ends with this value.
#[derive(Debug)]
enum Running {
    Server(Server),
    Service(Process),
}

impl Running {
    fn pid(&self) -> u32 {
        match self {
            Self::Server(server) => server.pid(),
            Self::Service(process) => process.pid(),
        }
    }

    fn ensure_running(&mut self) -> Result<()> {
        match self {
            Self::Server(server) => server.ensure_running(),
            Self::Service(process) => process.ensure_running(),
        }
    }
}

fn start(bench: &Bench, backend: &Backend, side: Side) -> Result<(Running, RelayEndpoint, Target)> {
    let program = |competitor: Competitor| competitor.program(bench).context(competitor.missing());
    Ok(match side {
        Side::Daemon => {
            let daemon = bench.start_relay(backend, "", None)?;
            let (relay, target) = (relay_endpoint(daemon.address), backend.target(daemon.address));
            (Running::Server(daemon), relay, target)
        }
        Side::Competitor(Competitor::BaselineRelay) => {
            let job = match backend {
                Backend::Redis(url) => BaselineRelayJob::Redis(redis_stream(url)),
                Backend::Embedded => BaselineRelayJob::Http,
            };
            let (process, address) = bench.workspace.start_service(&Job::BaselineRelay(job))?;
            let target = match backend {
                Backend::Redis(url) => Target::Redis(redis_stream(url)),
                Backend::Embedded => Target::Http { address, path: PUBLISH_PATH.to_owned() },
            };
            (Running::Service(process), RelayEndpoint::new(address, "/"), target)
        }
        Side::Competitor(competitor @ Competitor::Nats) => {
            let (server, publishers) = bench.workspace.start_nats(program(competitor)?)?;
            let protocol = Protocol::Nats { subject: CHANNEL.to_owned() };
            let relay = RelayEndpoint { protocol, ..RelayEndpoint::new(server.address, "/") };
            (Running::Server(server), relay, Target::Nats { address: publishers, subject: CHANNEL.to_owned() })
        }
        Side::Competitor(competitor @ Competitor::Centrifugo) => {
            let server = bench.workspace.start_centrifugo(program(competitor)?, None, None)?;
            let address = server.address;
            let protocol = Protocol::Centrifugo { channel: CHANNEL.to_owned() };
            let relay = RelayEndpoint { protocol, ..RelayEndpoint::new(address, CENTRIFUGO_WEBSOCKET_PATH) };
            (Running::Server(server), relay, Target::Centrifugo { address, channel: CHANNEL.to_owned() })
        }
    })
}

/// Returns delivered events per second.
pub(super) fn delivery_rate(report: &FanoutReport) -> f64 {
    ratio(to_f64(report.in_window), report.seconds)
}

/// Returns the CPU time of the relay per delivered event, in microseconds.
pub(super) fn cpu_micros_per_event(report: &FanoutReport) -> f64 {
    ratio(report.relay_cpu_seconds * 1e6, to_f64(report.in_window))
}

/// Returns the processors that the relay uses.
pub(super) fn cpu_cores(report: &FanoutReport) -> f64 {
    ratio(report.relay_cpu_seconds, report.seconds)
}
