//! Dashboards of a daemon that is told to stop, and when each is closed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::dashboards::{Board, Dashboards};
use super::send_signal;
use crate::bench::payload::Clock;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_mins(1);
/// How much longer than the window the last close may take.
const GRACE: Duration = Duration::from_secs(20);

/// Connect, tell the daemon to stop, and see the connections end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DrainJob {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    pub(crate) stream: String,
    pub(crate) clients: usize,
    /// The daemon's process.
    pub(crate) relay_pid: u32,
    /// The window in which the daemon closes its connections, in seconds.
    pub(crate) window_seconds: f64,
}

/// How the connections ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DrainReport {
    /// When each connection ended, in seconds since the daemon was told.
    pub(crate) ends: Vec<f64>,
    /// Connections that ended, by close code.
    pub(crate) closes: BTreeMap<String, u64>,
}

impl DrainJob {
    pub(crate) fn run(&self) -> Result<DrainReport> {
        let board = Board { address: self.address, path: self.path.clone(), stream: self.stream.clone() };
        let mut dashboards = Dashboards::new(board, self.clients, 0, Clock::start())?;
        dashboards.connect();
        dashboards.must("the connections", CONNECT_LIMIT, Dashboards::are_live)?;
        let start = Instant::now();
        send_signal(self.relay_pid, "TERM")?;
        let limit = Duration::from_secs_f64(self.window_seconds) + GRACE;
        dashboards.must("the end of all connections", limit, Dashboards::are_away)?;
        let tally = dashboards.tally;
        let ends = tally.ended_at.iter().map(|at| at.saturating_duration_since(start).as_secs_f64()).collect();
        Ok(DrainReport { ends, closes: tally.closes })
    }
}
