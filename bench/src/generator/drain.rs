//! Dashboards of a daemon that stops, and the time when each is closed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::dashboard_fleet::DashboardFleet;
use super::endpoint::FleetEndpoint;
use crate::clock::StampClock;
use crate::process::send_signal;

/// The time limit of connecting.
const CONNECT_LIMIT: Duration = Duration::from_mins(1);
/// The time that the last close may take beyond the window.
const GRACE: Duration = Duration::from_secs(20);

/// Connects dashboards, stops the daemon, and waits for the end of the connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DrainJob {
    pub(crate) endpoint: FleetEndpoint,
    pub(crate) clients: usize,
    /// The process of the daemon.
    pub(crate) relay_pid: u32,
    /// The window in which the daemon closes its connections, in seconds.
    pub(crate) window_seconds: f64,
}

/// The end of the connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DrainReport {
    /// The time when each connection ended, in seconds since the signal.
    pub(crate) ends: Vec<f64>,
    /// Ended connections by close code.
    pub(crate) closes: BTreeMap<String, u64>,
}

impl DrainJob {
    pub(crate) fn run(&self) -> Result<DrainReport> {
        let mut fleet = DashboardFleet::new(self.endpoint.clone(), self.clients, 0, StampClock::start())?;
        fleet.connect();
        fleet.require("all connected", CONNECT_LIMIT, DashboardFleet::are_live)?;
        let start = Instant::now();
        send_signal(self.relay_pid, "TERM")?;
        let limit = Duration::from_secs_f64(self.window_seconds) + GRACE;
        fleet.require("all disconnected", limit, DashboardFleet::are_disconnected)?;
        let counters = fleet.counters;
        let ends = counters.ended_at.iter().map(|at| at.saturating_duration_since(start).as_secs_f64()).collect();
        Ok(DrainReport { ends, closes: counters.closes })
    }
}
