//! A reconnect storm: the server is killed and restarted, and all dashboards come back at once.
//!
//! Centrifugo keeps its history in Redis here, since its memory does not survive a kill.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use url::Url;

use crate::bench::{Backend, Bench, Readers, ensure_open_files, fleet_endpoint, read_counter};
use crate::clock::StampClock;
use crate::generator::{
    FleetEndpoint, FleetProtocol, Job, PublisherSpec, ReconnectStormJob, ReconnectStormReport, Target,
};
use crate::http::HttpClient;
use crate::report::{Figure, Goal};
use crate::scenarios::competitors::{CENTRIFUGO_WEBSOCKET_PATH, CHANNEL, Competitor};
use crate::servers::{CENTRIFUGO_READY_PATH, READY_PATH, Server};
use crate::stats::{ratio, to_f64};

/// Events published while all dashboards are connected; the last are in flight when the server is killed.
const BEFORE: u64 = 96;
/// Events that each dashboard misses.
const MISSED: u64 = 300;
/// Events of one request.
const BURST: u64 = 100;
/// The time limit of all dashboards to catch up, in seconds.
const LIMIT_SECONDS: f64 = 120.0;
/// The highest number of reads of the store per dashboard: reads are shared.
const MAX_READS: f64 = 0.1;
/// The counter of range reads of a stream.
const READS: &str = "aurora_bus_store_seconds_count{operation=\"range\"}";

/// The server of a storm.
#[derive(Debug, Clone, Copy)]
enum StormServer<'a> {
    Daemon(&'a Backend),
    Centrifugo { program: &'a Path, redis: &'a Url },
}

/// The reports of the daemon, its numbers of reads of the store, and the reports of Centrifugo, one per round.
#[derive(Debug, Default)]
struct StormRounds {
    daemon: Vec<ReconnectStormReport>,
    reads: Vec<f64>,
    centrifugo: Vec<ReconnectStormReport>,
}

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let clients = bench.args.relay.crowd;
    ensure_open_files(clients)?;
    let mut rounds = StormRounds::default();
    for round in 1..=bench.args.rounds {
        let step = |name: &str| bench.step(format!("storm of {clients}, {}, round {round}: {name}", backend.name()));
        if let (Some(program), Backend::Redis(redis)) = (Competitor::Centrifugo.program(bench), backend) {
            step("Centrifugo")?;
            bench.reset(backend)?;
            let (report, _) = run(bench, StormServer::Centrifugo { program, redis }, clients)?;
            rounds.centrifugo.push(report);
        }
        step("aurora-bus")?;
        bench.reset(backend)?;
        let (report, daemon) = run(bench, StormServer::Daemon(backend), clients)?;
        rounds.daemon.push(report);
        rounds.reads.push(to_f64(read_counter(&mut HttpClient::open(daemon.address)?, READS)?));
    }
    bench.figures.extend(figures(backend, clients, &rounds));
    Ok(())
}

fn figures(backend: &Backend, clients: usize, rounds: &StormRounds) -> Vec<Figure> {
    let title = |name: &str| format!("storm, {clients} clients × {MISSED} events, {name}");
    let figure = |name: &str, unit, value: fn(&ReconnectStormReport) -> f64| {
        let values = |reports: &[ReconnectStormReport]| reports.iter().map(value).collect::<Vec<_>>();
        let figure = Figure::new("relay", backend.name(), title(name), unit, &values(&rounds.daemon));
        match (&*rounds.centrifugo, backend) {
            ([], Backend::Redis(_)) => figure.not_beside("not measured: --centrifugo"),
            // Needs Redis to keep its history.
            ([], Backend::Embedded) => figure,
            (reports, _) => figure.beside(Competitor::Centrifugo.name(), &values(reports)),
        }
    };
    let reads = Figure::new("relay", backend.name(), title("reads of the store"), "reads", &rounds.reads);
    vec![
        figure("all caught up", "s", |report| report.seconds),
        figure("all connected", "s", |report| report.connected_seconds),
        figure("duplicates", "events", |report| to_f64(report.duplicates)).with_goal(Goal::AtMost(0.0)),
        figure("holes", "events", |report| to_f64(report.missing + report.gaps)).with_goal(Goal::AtMost(0.0)),
        reads.with_goal(Goal::AtMost(MAX_READS * to_f64(clients as u64))),
        figure("relay CPU", "µs/event", |report| ratio(report.relay_cpu_seconds * 1e6, to_f64(report.resumed))),
        figure("relay memory", "MiB", |report| to_f64(report.relay_bytes) / 1_048_576.0),
    ]
}

/// Runs one storm; returns its report and the restarted server.
fn run(bench: &Bench, storm: StormServer<'_>, clients: usize) -> Result<(ReconnectStormReport, Server)> {
    let mut server = storm.start(bench, None)?;
    let address = server.address;
    let new_pid_file = bench.workspace.path("storm.pid");
    let job = Job::ReconnectStorm(ReconnectStormJob {
        endpoint: storm.endpoint(address),
        ready_path: storm.ready_path().to_owned(),
        clients,
        publisher: PublisherSpec { target: storm.target(address), size: bench.args.size },
        before: BEFORE,
        missed: MISSED,
        relay_pid: server.pid(),
        limit_seconds: LIMIT_SECONDS,
        new_pid_file: new_pid_file.clone(),
    });
    let mut generator = bench.workspace.start_generator(&job)?;
    bench.workspace.wait_for("start of the storm", Duration::from_mins(3), || {
        generator.ensure_not_failed()?;
        Ok(server.has_ended()?.then_some(()))
    })?;
    drop(server);
    storm.publish_missed(bench)?;
    let mut server = storm.start(bench, Some(address))?;
    let unfinished = new_pid_file.with_extension("new");
    fs::write(&unfinished, server.pid().to_string())
        .and_then(|()| fs::rename(&unfinished, &new_pid_file))
        .context("cannot write the process number of the restarted server")?;
    let report = bench.workspace.finish(generator, Duration::from_secs_f64(LIMIT_SECONDS) + Duration::from_mins(1));
    server.ensure_running()?;
    fs::remove_file(&new_pid_file).context("cannot remove a file of the measurement")?;
    Ok((report?, server))
}

impl StormServer<'_> {
    /// Starts the server, at a free address if none is given.
    fn start(self, bench: &Bench, address: Option<SocketAddr>) -> Result<Server> {
        match self {
            Self::Daemon(backend) => bench.start_relay(backend, "", address),
            Self::Centrifugo { program, redis } => bench.workspace.start_centrifugo(program, address, Some(redis)),
        }
    }

    fn endpoint(self, address: SocketAddr) -> FleetEndpoint {
        match self {
            Self::Daemon(_) => fleet_endpoint(address),
            Self::Centrifugo { .. } => FleetEndpoint {
                address,
                path: CENTRIFUGO_WEBSOCKET_PATH.to_owned(),
                protocol: FleetProtocol::Centrifugo { channel: CHANNEL.to_owned() },
            },
        }
    }

    fn ready_path(self) -> &'static str {
        match self {
            Self::Daemon(_) => READY_PATH,
            Self::Centrifugo { .. } => CENTRIFUGO_READY_PATH,
        }
    }

    fn target(self, address: SocketAddr) -> Target {
        match self {
            Self::Daemon(backend) => backend.target(address),
            Self::Centrifugo { .. } => Target::Centrifugo { address, channel: CHANNEL.to_owned() },
        }
    }

    /// Publishes the events that the dashboards miss: into Redis, or through a server at another address.
    fn publish_missed(self, bench: &Bench) -> Result<()> {
        let other = match self {
            Self::Daemon(Backend::Redis(_)) => None,
            Self::Daemon(backend) => Some(bench.start_daemon(backend, Readers::Dashboards)?),
            Self::Centrifugo { .. } => Some(self.start(bench, None)?),
        };
        let address = other.as_ref().map_or_else(|| ([127, 0, 0, 1], 0).into(), |server| server.address);
        let spec = PublisherSpec { target: self.target(address), size: bench.args.size };
        let mut publisher = spec.open(StampClock::start())?;
        (0..MISSED / BURST).try_for_each(|burst| publisher.publish(BEFORE + burst * BURST, BURST))
    }
}
