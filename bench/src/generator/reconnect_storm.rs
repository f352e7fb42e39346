//! A reconnect storm: the server is killed, and all dashboards come back at once with missed events to recover.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::dashboard_fleet::DashboardFleet;
use super::endpoint::FleetEndpoint;
use super::publisher::PublisherSpec;
use crate::clock::{StampClock, sleep_until};
use crate::http::HttpClient;
use crate::process::send_signal;
use crate::procfs::{cpu_seconds, private_bytes};

/// The time limit of connecting, and of the restart of the server.
const LIMIT: Duration = Duration::from_mins(2);
/// The time to wait for duplicates after the last event.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// The number of events that are in flight when the server is killed.
const IN_FLIGHT: u64 = 32;

/// Connects, publishes, kills the server, waits for its restart, and resumes.
///
/// The process that gives the job restarts the server at the same address, after it has published `missed` events
/// numbered from `before` on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReconnectStormJob {
    pub(crate) endpoint: FleetEndpoint,
    /// The page that returns 200 when the server is ready.
    pub(crate) ready_path: String,
    pub(crate) clients: usize,
    pub(crate) publisher: PublisherSpec,
    /// Events published while the dashboards are connected.
    pub(crate) before: u64,
    /// Events published while the dashboards are disconnected.
    pub(crate) missed: u64,
    /// The process of the server.
    pub(crate) relay_pid: u32,
    /// The time limit of all dashboards to catch up, in seconds.
    pub(crate) limit_seconds: f64,
    /// The file for the process number of the restarted server.
    pub(crate) new_pid_file: PathBuf,
}

/// The result of a reconnect storm.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReconnectStormReport {
    /// The time from the restarted server's readiness until the last dashboard had all events.
    pub(crate) seconds: f64,
    /// The time from the same moment until all dashboards were subscribed.
    pub(crate) connected_seconds: f64,
    /// Events received after the restart, in total.
    pub(crate) resumed: u64,
    pub(crate) duplicates: u64,
    /// Events that a dashboard did not receive.
    pub(crate) missing: u64,
    /// Gaps that the server reported.
    pub(crate) gaps: u64,
    /// Ended connections by close code.
    pub(crate) closes: BTreeMap<String, u64>,
    /// CPU time of the server from its start until the last dashboard had all events, in seconds.
    pub(crate) relay_cpu_seconds: f64,
    /// Private memory of the server when the last dashboard had all events, in bytes.
    pub(crate) relay_bytes: u64,
}

impl ReconnectStormJob {
    pub(crate) fn run(&self) -> Result<ReconnectStormReport> {
        let clock = StampClock::start();
        let mut fleet = DashboardFleet::new(self.endpoint.clone(), self.clients, 0, clock)?;
        fleet.connect();
        fleet.require("all connected", LIMIT, DashboardFleet::are_live)?;
        let mut publisher = self.publisher.open(clock)?;
        let settled = self.before.saturating_sub(IN_FLIGHT).max(1);
        publisher.publish(0, settled)?;
        fleet.require("events before the kill received", LIMIT, |fleet| fleet.have_received(settled))?;
        if self.before > settled {
            publisher.publish(settled, self.before - settled)?;
        }
        drop(publisher);
        send_signal(self.relay_pid, "KILL")?;
        fleet.require("all disconnected", LIMIT, DashboardFleet::are_disconnected)?;

        let relay_pid = self.wait_for_restart()?;
        let start = Instant::now();
        let events_before = fleet.counters.events;
        let next = self.before + self.missed;
        fleet.reconnects = true;
        fleet.connect();
        let limit = Duration::from_secs_f64(self.limit_seconds);
        let mut connected = None;
        // Not required: the report counts events that are missing at the limit.
        fleet.run_until(limit, |fleet| {
            if connected.is_none() && fleet.are_live() {
                connected = Some(start.elapsed());
            }
            fleet.have_received(next)
        })?;
        let took = start.elapsed();
        let (relay_cpu_seconds, relay_bytes) = (cpu_seconds(relay_pid)?, private_bytes(relay_pid)?);
        fleet.run_for(AFTERWARDS)?;
        let counters = &fleet.counters;
        Ok(ReconnectStormReport {
            seconds: took.as_secs_f64(),
            connected_seconds: connected.unwrap_or(took).as_secs_f64(),
            resumed: counters.events - events_before,
            duplicates: counters.duplicates,
            missing: counters.missing + fleet.lag(next),
            gaps: counters.gaps,
            closes: counters.closes.clone(),
            relay_cpu_seconds,
            relay_bytes,
        })
    }

    /// Waits until a restarted server is ready; returns its process number.
    fn wait_for_restart(&self) -> Result<u32> {
        let end = Instant::now() + LIMIT;
        loop {
            if let Ok(pid) = fs::read_to_string(&self.new_pid_file)
                && let Ok(mut client) = HttpClient::open(self.endpoint.address)
                && let Ok((200, _)) = client.get(&self.ready_path)
            {
                return pid.trim().parse().context("the file for the process number holds no number");
            }
            ensure!(Instant::now() < end, "the server was not restarted within {} s", LIMIT.as_secs());
            sleep_until(Instant::now() + Duration::from_millis(2));
        }
    }
}
