//! The state of one run: options, workspace and figures, and the calls that scenarios share.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use url::Url;

use crate::args::BenchArgs;
use crate::generator::{
    FanoutJob, FanoutReport, FleetEndpoint, FleetProtocol, HttpRequestsJob, HttpRequestsReport, Job, RedisStream,
    RelayEndpoint, Request, Target,
};
use crate::http::{HttpClient, metric_sum};
use crate::procfs::{available_bytes, max_open_files};
use crate::report::Figure;
use crate::resp::RespConnection;
use crate::servers::{DaemonProgram, Server};
use crate::stats::to_f64;
use crate::workspace::Workspace;

/// The folder of the embedded store within the workspace.
pub(crate) const EMBEDDED_FOLDER: &str = "embedded";
/// The stream of every measurement.
pub(crate) const STREAM: &str = "aurora:alerts";
/// The group that consumes the stream.
pub(crate) const GROUP: &str = "bench";
pub(crate) const PUBLISH_PATH: &str = "/api/v1/streams/aurora:alerts/events";
const WEBSOCKET_PATH: &str = "/api/v1/ws/alerts";
/// The WebSocket path of the protocol aurora.v1.
const AURORA_V1_PATH: &str = "/api/v1/ws/alerts?v=1";
/// Open files of a process beside the sockets of its clients.
const OTHER_FILES: u64 = 200;
/// The highest number of events of one run.
const MAX_EVENTS: u64 = 2_000_000;

/// The store of the daemon in one measurement.
#[derive(Debug, Clone)]
pub(crate) enum Backend {
    Redis(Url),
    Embedded,
}

impl Backend {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Redis(_) => "redis",
            Self::Embedded => "embedded",
        }
    }

    /// Returns the target with the shortest way to the relay: the stream in Redis, or else the daemon at `address`.
    pub(crate) fn target(&self, address: SocketAddr) -> Target {
        match self {
            Self::Redis(url) => Target::Redis(redis_stream(url)),
            Self::Embedded => Target::Http { address, path: PUBLISH_PATH.to_owned() },
        }
    }
}

/// The readers of the stream, which take their share of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readers {
    Nobody,
    Group,
    Dashboards,
}

/// One run of the program.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) args: BenchArgs,
    pub(crate) daemon: DaemonProgram,
    pub(crate) workspace: Workspace,
    pub(crate) progress: ProgressBar,
    pub(crate) figures: Vec<Figure>,
}

impl Bench {
    /// Shows the current step; fails if the run was interrupted.
    pub(crate) fn step(&self, text: impl Into<String>) -> Result<()> {
        self.progress.set_message(text.into());
        self.progress.inc(1);
        self.workspace.check_interrupt()
    }

    /// Empties the store.
    pub(crate) fn reset(&self, backend: &Backend) -> Result<()> {
        match backend {
            Backend::Redis(url) => RespConnection::open(url)?.call(&[b"FLUSHDB"]).map(drop),
            Backend::Embedded => self.workspace.remove_folder(EMBEDDED_FOLDER),
        }
    }

    /// Returns the highest number of events of one run: a stream takes at most a quarter of the available memory.
    pub(crate) fn max_events(&self) -> u64 {
        let per_event = self.args.size as u64 + 300;
        MAX_EVENTS.min(available_bytes() / 4 / per_event).max(10_000)
    }

    /// Starts a daemon on the store, with these readers.
    pub(crate) fn start_daemon(&self, backend: &Backend, readers: Readers) -> Result<Server> {
        self.workspace.start_daemon(&self.daemon, None, |address| self.daemon_config(backend, readers, "", address))
    }

    /// Starts a daemon for dashboards, with these lines in its section `relay`, at a free address if none is given.
    pub(crate) fn start_relay(
        &self,
        backend: &Backend,
        relay_lines: &str,
        address: Option<SocketAddr>,
    ) -> Result<Server> {
        let config = |address| self.daemon_config(backend, Readers::Dashboards, relay_lines, address);
        self.workspace.start_daemon(&self.daemon, address, config)
    }

    /// Returns the configuration of the daemon: the default, but with limits that a measurement does not reach.
    pub(crate) fn daemon_config(
        &self,
        backend: &Backend,
        readers: Readers,
        relay_lines: &str,
        address: SocketAddr,
    ) -> String {
        let store = match backend {
            Backend::Redis(url) => format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{url}\"\n"),
            Backend::Embedded => {
                let path = toml::Value::from(self.workspace.path(EMBEDDED_FOLDER).to_string_lossy().into_owned());
                format!("[store]\nbackend = \"embedded\"\n[store.embedded]\npath = {path}\n")
            }
        };
        let group = if readers == Readers::Group {
            format!("[[streams.groups]]\nname = \"{GROUP}\"\nsink = \"log\"\n")
        } else {
            String::new()
        };
        let relay = readers == Readers::Dashboards;
        format!(
            "instance = \"bench\"\n\
             [http]\nlisten = \"{address}\"\nrate_limit = 1_000_000\n\
             {store}\
             [[streams]]\nname = \"{STREAM}\"\nrelay = {relay}\n\
             retention = {{ max_len = 100_000_000, hard_max_len = 100_000_000 }}\n\
             {group}\
             [relay]\nmax_connections_per_address = 0\n{relay_lines}\
             [sinks.log]\ntype = \"log\"\nlevel = \"trace\"\n\
             [log]\nlevel = \"warn\"\n"
        )
    }

    /// Runs a fan-out; fails if any event is missing or out of order, or if a client was disconnected.
    pub(crate) fn fan_out(&self, job: FanoutJob) -> Result<FanoutReport> {
        let (clients, seconds) = (job.clients, job.seconds);
        let report: FanoutReport = self.workspace.generate(&Job::Fanout(job), seconds + 30.0)?;
        let FanoutReport { published, missing, out_of_order, closed, .. } = report;
        ensure!(
            missing == 0 && out_of_order == 0 && closed == 0,
            "of {published} events to {clients} clients {missing} deliveries are missing, {out_of_order} are out of \
             order, and {closed} clients were disconnected"
        );
        Ok(report)
    }

    /// Sends requests for the length of one run; fails if the daemon ends meanwhile.
    pub(crate) fn send_requests(
        &self,
        daemon: &mut Server,
        request: Request,
        connections: usize,
        max_requests: u64,
    ) -> Result<HttpRequestsReport> {
        let seconds = self.args.seconds;
        let job = HttpRequestsJob { address: daemon.address, connections, request, seconds, max_requests };
        let report = self.workspace.generate(&Job::HttpRequests(job), to_f64(seconds));
        daemon.ensure_running()?;
        report
    }
}

pub(crate) fn redis_stream(url: &Url) -> RedisStream {
    RedisStream { url: url.to_string(), stream: STREAM.to_owned() }
}

/// Returns the endpoint of the daemon for clients that only receive.
pub(crate) fn relay_endpoint(address: SocketAddr) -> RelayEndpoint {
    RelayEndpoint::new(address, WEBSOCKET_PATH)
}

/// Returns the endpoint of the daemon for dashboards that resume.
pub(crate) fn fleet_endpoint(address: SocketAddr) -> FleetEndpoint {
    let protocol = FleetProtocol::Aurora { stream: STREAM.to_owned() };
    FleetEndpoint { address, path: AURORA_V1_PATH.to_owned(), protocol }
}

/// Fails if a process on this machine cannot have this many clients.
pub(crate) fn ensure_open_files(clients: usize) -> Result<()> {
    let needed = clients as u64 + OTHER_FILES;
    let allowed = max_open_files().context("cannot read the limit of open files")?;
    ensure!(
        needed <= allowed,
        "{clients} clients need {needed} open files, but the limit is {allowed}; raise it (ulimit -Hn)"
    );
    Ok(())
}

/// Returns a counter of the daemon, summed over its labels.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters are whole and positive")]
pub(crate) fn read_counter(client: &mut HttpClient, name: &str) -> Result<u64> {
    let (status, text) = client.get("/metrics")?;
    ensure!(status == 200, "/metrics failed with status {status}");
    Ok(metric_sum(&text, name) as u64)
}
