//! A storm: the daemon is killed under its dashboards, and all come back at once with what they have missed.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::dashboards::{Board, Dashboards};
use super::publisher::PublisherSpec;
use super::{send_signal, wait_until};
use crate::bench::http::HttpClient;
use crate::bench::payload::Clock;
use crate::bench::process::{cpu_seconds, private_bytes};

/// How long connecting, or the daemon's start, may take.
const LIMIT: Duration = Duration::from_mins(2);
/// How long to look for events that come once too often.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// The last so many of the events before are on their way when the daemon is killed.
const UNDER_WAY: u64 = 32;

/// Connect, publish, kill the daemon, wait until someone has started it again, and resume.
///
/// Whoever gave the job starts the daemon again, at the same address, once it has published `missed` events that go on
/// with the numbers from `before` on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StormJob {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    pub(crate) stream: String,
    pub(crate) clients: usize,
    pub(crate) publisher: PublisherSpec,
    /// Events while they are connected.
    pub(crate) before: u64,
    /// Events while they are away.
    pub(crate) missed: u64,
    /// The daemon's process.
    pub(crate) relay_pid: u32,
    /// How long all may take to catch up, in seconds.
    pub(crate) limit_seconds: f64,
    /// Where the process number of the daemon is written once it was started again and is ready.
    pub(crate) new_pid_file: PathBuf,
}

/// What became of the dashboards.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StormReport {
    /// From the moment when the daemon was ready until the last one had everything.
    pub(crate) seconds: f64,
    /// From the same moment until all were connected and had subscribed, at the latest.
    pub(crate) connected_seconds: f64,
    /// Events that were given after the restart, in all.
    pub(crate) resumed: u64,
    pub(crate) duplicates: u64,
    /// Events passed over, or never given.
    pub(crate) missing: u64,
    /// Gaps that the relay told.
    pub(crate) gaps: u64,
    /// Connections that ended, by close code.
    pub(crate) closes: BTreeMap<String, u64>,
    /// CPU time of the daemon from its start until the last one had everything, in seconds.
    pub(crate) relay_cpu_seconds: f64,
    /// Private memory of the daemon when the last one had everything, in bytes.
    pub(crate) relay_bytes: u64,
}

impl StormJob {
    pub(crate) fn run(&self) -> Result<StormReport> {
        let clock = Clock::start();
        let board = Board { address: self.address, path: self.path.clone(), stream: self.stream.clone() };
        let mut dashboards = Dashboards::new(board, self.clients, 0, clock)?;
        dashboards.connect();
        dashboards.must("the connections", LIMIT, Dashboards::are_live)?;
        let mut publisher = self.publisher.open(clock)?;
        let known = self.before.saturating_sub(UNDER_WAY).max(1);
        publisher.publish(0, known)?;
        dashboards.must("the events before the kill", LIMIT, |all| all.have(known))?;
        if self.before > known {
            publisher.publish(known, self.before - known)?;
        }
        drop(publisher);
        send_signal(self.relay_pid, "KILL")?;
        dashboards.must("the end of all connections", LIMIT, Dashboards::are_away)?;

        let relay_pid = self.wait_for_daemon()?;
        let start = Instant::now();
        let before = dashboards.tally.events;
        let everything = self.before + self.missed;
        dashboards.do_return = true;
        dashboards.connect();
        let limit = Duration::from_secs_f64(self.limit_seconds);
        let mut connected = None;
        // Where this takes too long, what is missing then is told.
        dashboards.until(limit, |all| {
            if connected.is_none() && all.are_live() {
                connected = Some(start.elapsed());
            }
            all.have(everything)
        })?;
        let took = start.elapsed();
        let (relay_cpu_seconds, relay_bytes) = (cpu_seconds(relay_pid)?, private_bytes(relay_pid)?);
        dashboards.run_for(AFTERWARDS)?;
        let tally = &dashboards.tally;
        Ok(StormReport {
            seconds: took.as_secs_f64(),
            connected_seconds: connected.unwrap_or(took).as_secs_f64(),
            resumed: tally.events - before,
            duplicates: tally.duplicates,
            missing: tally.missing + dashboards.behind(everything),
            gaps: tally.gaps,
            closes: tally.closes.clone(),
            relay_cpu_seconds,
            relay_bytes,
        })
    }

    /// Waits until a daemon is ready at the address; returns its process number.
    fn wait_for_daemon(&self) -> Result<u32> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Ok(pid) = fs::read_to_string(&self.new_pid_file)
                && let Ok(mut client) = HttpClient::open(self.address)
                && let Ok((200, _)) = client.get("/ready")
            {
                return pid.trim().parse().context("what was started is no process");
            }
            ensure!(Instant::now() < end, "the daemon did not come back within {} s", LIMIT.as_secs());
            wait_until(Instant::now() + Duration::from_millis(2));
        }
    }
}
