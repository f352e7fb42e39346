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
use super::load::{Job, RedisStream, RelayAddress, Request, RequestsJob, RequestsReport};
use super::process::{Daemon, available_bytes};
use super::{Backend, Bench, What};

/// The folder of the embedded store within a measurement's folder.
pub(super) const EMBEDDED_FOLDER: &str = "embedded";
/// The stream that everything goes through.
const STREAM: &str = "aurora:alerts";
/// The group that consumes it.
const GROUP: &str = "bench";
const PUBLISH_PATH: &str = "/api/v1/streams/aurora:alerts/events";
const SOCKET_PATH: &str = "/api/v1/ws/alerts";
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
        self.site.start_daemon(|address| self.config(backend, readers, address))
    }

    /// The daemon's configuration: as shipped, but with limits that a measurement does not run into.
    fn config(&self, backend: &Backend, readers: Readers, address: SocketAddr) -> String {
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
             [relay]\nmax_connections_per_address = 0\n\
             [sinks.log]\ntype = \"log\"\nlevel = \"trace\"\n\
             [log]\nlevel = \"warn\"\n"
        )
    }
}

fn at(url: &url::Url) -> RedisStream {
    RedisStream { url: url.to_string(), stream: STREAM.to_owned() }
}

fn sockets_of(address: SocketAddr) -> RelayAddress {
    RelayAddress { address, path: SOCKET_PATH.to_owned() }
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
fn counted(client: &mut HttpClient, name: &str) -> Result<u64> {
    let (status, text) = client.get("/metrics")?;
    ensure!(status == 200, "/metrics was answered with {status}");
    Ok(metric_sum(&text, name) as u64)
}

#[expect(clippy::cast_precision_loss, reason = "counts and sizes of one run are far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}
