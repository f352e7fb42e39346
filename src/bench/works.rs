//! The measurements: which processes run in which order, and which figures come of it.

mod consume;
mod postgres;
mod publish;
mod relay;
mod rest;
mod webhook;

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::http::{HttpClient, metric_sum};
use super::load::{
    Job, RedisStream, RelayAddress, Request, RequestsJob, RequestsReport, SocketsJob, SocketsReport, Target,
};
use super::process::{Daemon, available_bytes};
use super::{Backend, Bench, What};

/// The folder of the embedded store within a measurement's folder.
pub(super) const EMBEDDED_FOLDER: &str = "embedded";
/// The stream that everything goes through.
pub(super) const STREAM: &str = "aurora:alerts";
/// The group that consumes it.
const GROUP: &str = "bench";
pub(super) const PUBLISH_PATH: &str = "/api/v1/streams/aurora:alerts/events";
const SOCKET_PATH: &str = "/api/v1/ws/alerts";
/// The same for clients that resume.
pub(super) const RICH_PATH: &str = "/api/v1/ws/alerts?v=1";
/// Events of one run at most.
const MAX_EVENTS: u64 = 2_000_000;

/// Does one measurement with one store and adds its figures.
pub(super) fn measure(bench: &mut Bench, what: What, backend: &Backend) -> Result<()> {
    match what {
        What::All => What::EACH.into_iter().try_for_each(|what| measure(bench, what, backend)),
        What::Publish => publish::measure(bench, backend),
        What::Consume => consume::measure(bench, backend),
        What::Latency => relay::latency(bench, backend),
        What::Fanout => relay::fanout(bench, backend),
        What::Idle => rest::idle(bench, backend),
        What::Start => rest::start(bench, backend),
        What::Webhook => webhook::measure(bench, backend),
        What::Postgres => postgres::measure(bench),
        What::Relay => super::relay::measure(bench, backend),
    }
}

/// Who reads what is published, since reading takes its share of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readers {
    Nobody,
    Group,
    Dashboards,
}

impl Bench {
    /// Events of one run at most: a stream takes no more than a quarter of the memory there is.
    fn max_events(&self) -> u64 {
        let per_event = self.args.size as u64 + 300;
        MAX_EVENTS.min(available_bytes() / 4 / per_event).max(10_000)
    }

    /// Starts a daemon on the store, with those who read what is published.
    fn daemon(&self, backend: &Backend, readers: Readers) -> Result<Daemon> {
        self.site.start_daemon(|address| self.config(backend, readers, "", address))
    }

    /// Starts a daemon for dashboards, with these lines in its table `relay`, at an address of its own if none is given.
    pub(super) fn dashboards_daemon(
        &self,
        backend: &Backend,
        relay: &str,
        address: Option<SocketAddr>,
    ) -> Result<Daemon> {
        let config = |address| self.config(backend, Readers::Dashboards, relay, address);
        match address {
            Some(address) => self.site.start_daemon_at(address, config),
            None => self.site.start_daemon(config),
        }
    }

    /// The daemon's configuration: as shipped, but with limits that a measurement does not run into.
    fn config(&self, backend: &Backend, readers: Readers, relay_lines: &str, address: SocketAddr) -> String {
        let store = match backend {
            Backend::Redis(url) => format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{url}\"\n"),
            Backend::Embedded => {
                let path = toml::Value::from(self.site.path(EMBEDDED_FOLDER).to_string_lossy().into_owned());
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
}

/// Where to publish so that only the relay's way counts, if there is such a place, or else over HTTP.
pub(super) fn target(backend: &Backend, address: SocketAddr) -> Target {
    match backend {
        Backend::Redis(url) => Target::Redis(at(url)),
        Backend::Embedded => Target::Http { address, path: PUBLISH_PATH.to_owned() },
    }
}

pub(super) fn at(url: &url::Url) -> RedisStream {
    RedisStream { url: url.to_string(), stream: STREAM.to_owned() }
}

pub(super) fn sockets_of(address: SocketAddr) -> RelayAddress {
    RelayAddress::new(address, SOCKET_PATH)
}

/// Has events published, and counts what arrives; fails if anything is missing.
pub(super) fn deliver(bench: &Bench, job: SocketsJob) -> Result<SocketsReport> {
    let (clients, seconds) = (job.clients, job.seconds);
    let report: SocketsReport = bench.site.generate(&Job::Sockets(job), seconds + 30.0)?;
    let SocketsReport { published, missing, out_of_order, closed, .. } = report;
    ensure!(
        missing == 0 && out_of_order == 0 && closed == 0,
        "of {published} events to {clients} clients {missing} frames are missing, {out_of_order} came out of order, \
         and {closed} clients were disconnected"
    );
    Ok(report)
}

/// Has requests made for as long as a run takes; fails if the daemon does not live through it.
fn requests(
    bench: &Bench,
    daemon: &mut Daemon,
    request: Request,
    connections: usize,
    max_requests: u64,
) -> Result<RequestsReport> {
    let seconds = bench.args.seconds;
    let job = Job::Requests(RequestsJob { address: daemon.address, connections, request, seconds, max_requests });
    let report = bench.site.generate(&job, float(seconds));
    daemon.must_run()?;
    report
}

/// What the daemon has counted under that name, summed over its labels.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counters are whole and positive")]
pub(super) fn counted(client: &mut HttpClient, name: &str) -> Result<u64> {
    let (status, text) = client.get("/metrics")?;
    ensure!(status == 200, "/metrics was answered with {status}");
    Ok(metric_sum(&text, name) as u64)
}

#[expect(clippy::cast_precision_loss, reason = "counts and sizes of one run are far below 2^52")]
pub(super) fn float(count: u64) -> f64 {
    count as f64
}
