//! Dashboards of which some stop reading for a while, and the effect on the others.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::dashboard_fleet::DashboardFleet;
use super::endpoint::FleetEndpoint;
use super::pacing::{FlowControl, Pace};
use super::publisher::PublisherSpec;
use crate::clock::StampClock;
use crate::procfs::private_bytes;
use crate::stats::Percentiles;

/// The time limit of connecting.
const CONNECT_LIMIT: Duration = Duration::from_mins(1);
/// The time limit of paused dashboards to catch up.
const CATCH_UP_LIMIT: Duration = Duration::from_mins(1);
/// The time of publishing before the first half, and after catching up.
const MARGIN: Duration = Duration::from_secs(1);
/// The interval of memory samples.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Connects and publishes at a pace; some dashboards do not read during the second half.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SlowClientsJob {
    pub(crate) endpoint: FleetEndpoint,
    pub(crate) clients: usize,
    /// The number of dashboards that stop reading.
    pub(crate) slow: usize,
    pub(crate) publisher: PublisherSpec,
    /// Events per second.
    pub(crate) rate: u32,
    /// The length of each half.
    pub(crate) seconds: f64,
    pub(crate) relay_pid: u32,
}

/// The result of both halves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SlowClientsReport {
    pub(crate) published: u64,
    /// Latency at the reading dashboards during the first half.
    pub(crate) before: Percentiles,
    /// Latency at the same dashboards during the second half.
    pub(crate) during: Percentiles,
    /// The highest private memory of the relay during the first half, in bytes.
    pub(crate) before_bytes: u64,
    /// The highest private memory of the relay during the second half, in bytes.
    pub(crate) during_bytes: u64,
    /// The time until the paused dashboards had all events published before they resumed, in seconds.
    pub(crate) catch_up_seconds: f64,
    /// Events that a client received twice.
    pub(crate) duplicates: u64,
    /// Events that a client did not receive.
    pub(crate) missing: u64,
    /// Gaps that the relay reported.
    pub(crate) gaps: u64,
    /// Ended connections by close code.
    pub(crate) closes: BTreeMap<String, u64>,
}

impl SlowClientsJob {
    pub(crate) fn run(&self) -> Result<SlowClientsReport> {
        let clock = StampClock::start();
        let mut fleet = DashboardFleet::new(self.endpoint.clone(), self.clients, self.slow, clock)?;
        fleet.reconnects = true;
        fleet.connect();
        fleet.require("all connected", CONNECT_LIMIT, DashboardFleet::are_live)?;

        let (stop, published, delivered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let flow =
            FlowControl { stop: &stop, published: &published, delivered: &delivered, clients: self.clients as u64 };
        let pace = Pace::PerSecond { rate: self.rate, connections: 1 };
        std::thread::scope(|scope| {
            let publishers: Vec<_> = pace
                .publishers(&self.publisher, clock)?
                .into_iter()
                .map(|(publisher, schedule)| scope.spawn(move || schedule.run(publisher, flow)))
                .collect();
            let measured = self.measure(&mut fleet, &published);
            stop.store(true, Ordering::Release);
            while publishers.iter().any(|publisher| !publisher.is_finished()) {
                fleet.poll_once(Duration::from_millis(5))?;
            }
            for publisher in publishers {
                publisher.join().expect("a publisher does not panic")?;
            }
            let mut report = measured?;
            let next = published.load(Ordering::Acquire);
            // Not required: the report counts events that are missing at the limit.
            fleet.run_until(CATCH_UP_LIMIT, |fleet| fleet.have_received(next))?;
            let counters = &fleet.counters;
            report.published = next;
            (report.duplicates, report.gaps, report.closes) =
                (counters.duplicates, counters.gaps, counters.closes.clone());
            report.missing = counters.missing + fleet.lag(next);
            Ok(report)
        })
    }

    fn measure(&self, fleet: &mut DashboardFleet, published: &AtomicU64) -> Result<SlowClientsReport> {
        fleet.run_for(MARGIN)?;
        fleet.start_sampling(self.slow);
        let before_bytes = self.max_memory(fleet)?;
        let before = fleet.end_sampling();
        fleet.pause(self.slow)?;
        fleet.start_sampling(self.slow);
        let during_bytes = self.max_memory(fleet)?;
        let during = fleet.end_sampling();
        fleet.resume()?;
        let (start, next) = (Instant::now(), published.load(Ordering::Acquire));
        fleet.require("all caught up", CATCH_UP_LIMIT, |fleet| fleet.have_received(next))?;
        let catch_up_seconds = start.elapsed().as_secs_f64();
        fleet.run_for(MARGIN)?;
        Ok(SlowClientsReport {
            published: 0,
            before,
            during,
            before_bytes,
            during_bytes,
            catch_up_seconds,
            duplicates: 0,
            missing: 0,
            gaps: 0,
            closes: BTreeMap::new(),
        })
    }

    /// Receives for one half; returns the highest private memory of the relay.
    fn max_memory(&self, fleet: &mut DashboardFleet) -> Result<u64> {
        let end = Instant::now() + Duration::from_secs_f64(self.seconds);
        let mut max_bytes = 0;
        while Instant::now() < end {
            fleet.run_for(end.saturating_duration_since(Instant::now()).min(SAMPLE_INTERVAL))?;
            max_bytes = max_bytes.max(private_bytes(self.relay_pid)?);
        }
        Ok(max_bytes)
    }
}
