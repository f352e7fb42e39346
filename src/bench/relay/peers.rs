//! The sides of a comparison: the daemon, a null relay, NATS.

use anyhow::Result;

use crate::bench::load::{Job, Pace, PublisherSpec, RelayAddress, ServeJob, SocketsJob, SocketsReport, Speech, Target};
use crate::bench::process::{Daemon, Process};
use crate::bench::report::{Figure, Goal};
use crate::bench::works::{PUBLISH_PATH, at, deliver, float, sockets_of, target};
use crate::bench::{Backend, Bench};

/// What events are published under in NATS.
const SUBJECT: &str = "aurora.alerts";

/// One of those that are measured in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Null,
    Nats,
    Daemon,
}

/// What all sides gave, round by round.
#[derive(Debug, Default)]
pub(super) struct Sides {
    null: Vec<SocketsReport>,
    nats: Vec<SocketsReport>,
    daemon: Vec<SocketsReport>,
}

/// A process that is measured; it ends with this.
enum Running {
    Daemon(Daemon),
    Peer(Process),
}

/// What a figure is read from.
pub(super) type Value = fn(&SocketsReport) -> f64;

impl Sides {
    /// Measures all sides in turn, round by round.
    pub(super) fn measure(bench: &Bench, backend: &Backend, what: &str, clients: usize, pace: Pace) -> Result<Self> {
        let mut sides = Self::default();
        for round in 1..=bench.args.rounds {
            for side in [Side::Null, Side::Nats, Side::Daemon] {
                if side == Side::Nats && bench.args.relay.nats_server.is_none() {
                    continue;
                }
                bench.step(format!("{what}, {}, round {round}: {}", backend.name(), side.name()))?;
                let report = run(bench, backend, side, clients, pace, &[])?;
                match side {
                    Side::Null => &mut sides.null,
                    Side::Nats => &mut sides.nats,
                    Side::Daemon => &mut sides.daemon,
                }
                .push(report);
            }
        }
        Ok(sides)
    }

    /// The daemon's figure beside that of a peer, with the goal for the ratio.
    pub(super) fn beside(&self, peer: Side, figure: (&'static str, &Backend, String, &'static str, Value)) -> Figure {
        let (measurement, backend, name, unit, value) = figure;
        let of = |reports: &[SocketsReport]| reports.iter().map(value).collect::<Vec<_>>();
        let figure = Figure::new(measurement, backend.name(), name, unit, &of(&self.daemon));
        match peer {
            Side::Null => figure.beside(Side::Null.name(), &of(&self.null)),
            _ if self.nats.is_empty() => figure.not_beside("not measured: --nats-server"),
            _ => figure.beside(Side::Nats.name(), &of(&self.nats)),
        }
    }
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Null => "null relay",
            Self::Nats => "NATS",
            Self::Daemon => "aurora-bus",
        }
    }
}

/// One run of one side; of the daemon's clients each has one of the `queries` in turn.
pub(super) fn run(
    bench: &Bench,
    backend: &Backend,
    side: Side,
    clients: usize,
    pace: Pace,
    queries: &[String],
) -> Result<SocketsReport> {
    bench.reset(backend)?;
    let (mut running, mut relay, target) = start(bench, backend, side)?;
    relay.queries = queries.to_vec();
    let relay_pid = match &running {
        Running::Daemon(daemon) => daemon.pid(),
        Running::Peer(process) => process.pid(),
    };
    let report = deliver(
        bench,
        SocketsJob {
            relay,
            clients,
            publisher: PublisherSpec { target, size: bench.args.size },
            pace,
            warmup_seconds: 1.0,
            seconds: float(bench.args.seconds),
            relay_pid,
        },
    );
    if let Running::Daemon(daemon) = &mut running {
        daemon.must_run()?;
    }
    report
}

fn start(bench: &Bench, backend: &Backend, side: Side) -> Result<(Running, RelayAddress, Target)> {
    let over_http = |address| Target::Http { address, path: PUBLISH_PATH.to_owned() };
    Ok(match side {
        Side::Daemon => {
            let daemon = bench.dashboards_daemon(backend, "", None)?;
            let (relay, target) = (sockets_of(daemon.address), target(backend, daemon.address));
            (Running::Daemon(daemon), relay, target)
        }
        Side::Null => {
            let source = match backend {
                Backend::Redis(url) => ServeJob::Redis(at(url)),
                Backend::Embedded => ServeJob::Http,
            };
            let (process, address) = bench.site.start_server(&Job::NullRelay(source))?;
            let target = match backend {
                Backend::Redis(url) => Target::Redis(at(url)),
                Backend::Embedded => over_http(address),
            };
            (Running::Peer(process), RelayAddress::new(address, "/"), target)
        }
        Side::Nats => {
            let program = bench.args.relay.nats_server.as_deref().unwrap_or(std::path::Path::new("nats-server"));
            let (process, clients, sockets) = bench.site.start_nats(program)?;
            let speech = Speech::Nats { subject: SUBJECT.to_owned() };
            let relay = RelayAddress { speech, ..RelayAddress::new(sockets, "/") };
            (Running::Peer(process), relay, Target::Nats { address: clients, subject: SUBJECT.to_owned() })
        }
    })
}

/// Each peer with the goal beside it.
pub(super) type Goals = [(Side, Option<Goal>); 2];

/// A goal beside the null relay, and one beside NATS.
pub(super) fn goals(null: Option<Goal>, nats: Option<Goal>) -> Goals {
    [(Side::Null, null), (Side::Nats, nats)]
}
