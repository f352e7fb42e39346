//! The load generator: a process of its own, so that what it costs is not counted as the daemon's.
//!
//! It is given one [`Job`] as JSON, does it within a bounded time and writes one line of JSON. It speaks to the
//! daemon as any client does, over HTTP and WebSocket, and to the store as the cheapest client would.

mod crowd;
mod dashboards;
mod drain;
mod embedded;
mod matching;
mod nats;
mod null_relay;
mod publisher;
mod receiver;
mod redis;
mod requests;
mod slow;
mod sockets;
mod storm;

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use url::Url;

use super::resp::Connection;

pub(crate) use drain::{DrainJob, DrainReport};
pub(crate) use embedded::{EngineAppendJob, StoreMixedJob};
pub(crate) use matching::{MatchJob, MatchReport};
pub(crate) use null_relay::ServeJob;
pub(crate) use publisher::{PublisherSpec, Target};
pub(crate) use redis::{RawConsumeJob, RawPublishJob, fill};
pub(crate) use requests::{Request, RequestsJob, RequestsReport};
pub(crate) use slow::{SlowJob, SlowReport};
pub(crate) use sockets::{HoldJob, HoldReport, Pace, SocketsJob, SocketsReport};
pub(crate) use storm::{StormJob, StormReport};

/// What the hidden sub-command takes.
#[derive(Debug, Clone, clap::Args)]
pub struct LoadArgs {
    /// The job, as JSON
    #[arg(value_name = "JOB")]
    job: String,
}

/// One thing for a generator process to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Job {
    /// HTTP requests, one after the other on each of many connections.
    Requests(RequestsJob),
    /// XADD through pipelines: what publishing to Redis could reach at most.
    RawPublish(RawPublishJob),
    /// XREADGROUP and XACK in a loop: what consuming from Redis could reach at most.
    RawConsume(RawConsumeJob),
    /// Synced commits of the embedded store's engine: what publishing to it could reach at most.
    EngineAppend(EngineAppendJob),
    /// The embedded store without a daemon: what publishing and consuming at once could reach at most.
    StoreMixed(StoreMixedJob),
    /// Publishes, and counts what arrives at WebSocket clients.
    Sockets(SocketsJob),
    /// Opens connections on which nothing happens.
    Hold(HoldJob),
    /// Dashboards that come back after the daemon was killed.
    Storm(StormJob),
    /// Dashboards of which some stop reading for a while.
    Slow(SlowJob),
    /// Dashboards that are closed by a daemon that stops.
    Drain(DrainJob),
    /// Filters, matched in a loop.
    Match(MatchJob),
    /// Serves as a null relay until it is ended: what any relay could reach at most.
    NullRelay(ServeJob),
    /// Answers requests until it is ended: where webhooks are posted to.
    Receive,
}

/// How many events went how fast.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Throughput {
    pub(crate) events: u64,
    pub(crate) seconds: f64,
}

impl Throughput {
    pub(crate) fn since(start: Instant, events: u64) -> Self {
        Self { events, seconds: start.elapsed().as_secs_f64() }
    }

    #[expect(clippy::cast_precision_loss, reason = "a count of events in a run is far below 2^52")]
    pub(crate) fn per_second(self) -> f64 {
        if self.seconds > 0.0 { self.events as f64 / self.seconds } else { 0.0 }
    }
}

/// Percentiles of durations, in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Percentiles {
    pub(crate) count: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
}

impl Percentiles {
    /// Of durations in nanoseconds, in any order.
    pub(crate) fn of(mut nanos: Vec<u64>) -> Self {
        nanos.sort_unstable();
        let at = |per_mille: usize| {
            let rank = (nanos.len() * per_mille).div_ceil(1000).max(1);
            nanos.get(rank - 1).map_or(0.0, |nanos| Duration::from_nanos(*nanos).as_secs_f64() * 1e3)
        };
        Self { count: nanos.len(), p50_ms: at(500), p99_ms: at(990), p999_ms: at(999), max_ms: at(1000) }
    }
}

/// Does one job and writes its report as a line of JSON to the standard output.
pub(super) fn run(args: &LoadArgs) -> Result<()> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not one this generator knows")?;
    match job {
        Job::Requests(job) => report(&job.run()?),
        Job::RawPublish(job) => report(&job.run()?),
        Job::RawConsume(job) => report(&job.run()?),
        Job::EngineAppend(job) => report(&job.run()?),
        Job::StoreMixed(job) => report(&job.run()?),
        Job::Sockets(job) => report(&job.run()?),
        Job::Hold(job) => report(&job.run()?),
        Job::Storm(job) => report(&job.run()?),
        Job::Slow(job) => report(&job.run()?),
        Job::Drain(job) => report(&job.run()?),
        Job::Match(job) => report(&job.run()?),
        Job::NullRelay(job) => job.run(|address| report(&address)),
        Job::Receive => receiver::receive(|address| report(&address)),
    }
}

fn report(report: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut output = std::io::stdout().lock();
    output.write_all(&line).and_then(|()| output.flush()).context("cannot write the report")
}

/// Waits until `time`.
#[expect(clippy::disallowed_methods, reason = "keeping a pace is what a generator is for")]
pub(crate) fn wait_until(time: Instant) {
    let left = time.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

/// Where WebSocket clients connect to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RelayAddress {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    /// Queries of the URL that clients have in turn; none has one where there is none.
    pub(crate) queries: Vec<String>,
    pub(crate) speech: Speech,
}

/// What is spoken within the WebSocket.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Speech {
    /// An alert in each message, and the client only listens.
    Alerts,
    /// NATS's protocol.
    Nats { subject: String },
}

impl RelayAddress {
    /// Of a relay whose clients only listen.
    pub(crate) fn new(address: SocketAddr, path: &str) -> Self {
        Self { address, path: path.to_owned(), queries: Vec::new(), speech: Speech::Alerts }
    }

    /// The path and the query of the client with this number.
    fn path_of(&self, client: usize) -> String {
        match client.checked_rem(self.queries.len()) {
            Some(turn) => format!("{}?{}", self.path, self.queries[turn]),
            None => self.path.clone(),
        }
    }
}

/// Sends a signal to a process that this measurement has started.
fn send_signal(pid: u32, signal: &str) -> Result<()> {
    let status = Command::new("/bin/sh").args(["-c", r#"kill -s "$0" "$1""#, signal, &pid.to_string()]).status();
    ensure!(status.context("cannot start a shell")?.success(), "no process {pid} takes {signal}");
    Ok(())
}

/// A stream in Redis.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RedisStream {
    /// Where the server is, as a URL.
    pub(crate) url: String,
    pub(crate) stream: String,
}

impl RedisStream {
    fn connect(&self) -> Result<Connection> {
        Connection::open(&Url::parse(&self.url).context("not a URL of a Redis")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let millis = |value: u64| value * 1_000_000;
        let percentiles = Percentiles::of((1..=1000).rev().map(millis).collect());
        assert_eq!(percentiles.count, 1000);
        for (value, expected) in [
            (percentiles.p50_ms, 500.0),
            (percentiles.p99_ms, 990.0),
            (percentiles.p999_ms, 999.0),
            (percentiles.max_ms, 1000.0),
        ] {
            assert!((value - expected).abs() < 1e-9, "{value} instead of {expected}");
        }
        assert_eq!(Percentiles::of(Vec::new()).count, 0);
        assert!((Percentiles::of(vec![millis(3)]).p999_ms - 3.0).abs() < 1e-9);
    }
}
