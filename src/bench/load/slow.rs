//! Dashboards of which some stop reading for a while, and what that means to the others.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Percentiles;
use super::dashboards::{Board, Dashboards};
use super::publisher::PublisherSpec;
use super::sockets::{Flow, Pace};
use crate::bench::payload::Clock;
use crate::bench::process::private_bytes;

/// How long connecting may take.
const CONNECT_LIMIT: Duration = Duration::from_mins(1);
/// How long those that read again may take to have everything.
const CATCH_UP_LIMIT: Duration = Duration::from_mins(1);
/// How long to publish before anything is measured, and after those that had stopped read again.
const MARGIN: Duration = Duration::from_secs(1);
/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Connect, publish at a pace, let some stop reading in the second half, and let them read again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SlowJob {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    pub(crate) stream: String,
    pub(crate) clients: usize,
    /// How many of them stop reading.
    pub(crate) slow: usize,
    pub(crate) publisher: PublisherSpec,
    /// Events per second.
    pub(crate) rate: u32,
    /// How long each half takes.
    pub(crate) seconds: f64,
    pub(crate) relay_pid: u32,
}

/// What the halves were like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SlowReport {
    pub(crate) published: u64,
    /// To those that read all the time, while all read.
    pub(crate) before: Percentiles,
    /// To the same, while the others did not read.
    pub(crate) during: Percentiles,
    /// The most private memory of the relay while all read, in bytes.
    pub(crate) before_bytes: u64,
    /// The most while some did not.
    pub(crate) during_bytes: u64,
    /// From the moment when they read again until they had everything that there was, in seconds.
    pub(crate) catch_up_seconds: f64,
    /// Events of any client that came twice.
    pub(crate) duplicates: u64,
    /// Events of any client that never came.
    pub(crate) missing: u64,
    /// Gaps that the relay told.
    pub(crate) gaps: u64,
    /// Connections that ended, by close code.
    pub(crate) closes: BTreeMap<String, u64>,
}

impl SlowJob {
    pub(crate) fn run(&self) -> Result<SlowReport> {
        let clock = Clock::start();
        let board = Board { address: self.address, path: self.path.clone(), stream: self.stream.clone() };
        let mut dashboards = Dashboards::new(board, self.clients, self.slow, clock)?;
        dashboards.do_return = true;
        dashboards.connect();
        dashboards.must("the connections", CONNECT_LIMIT, Dashboards::are_live)?;

        let (stop, published, delivered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let flow = Flow { stop: &stop, published: &published, delivered: &delivered, clients: self.clients as u64 };
        let pace = Pace::PerSecond { rate: self.rate, connections: 1 };
        std::thread::scope(|scope| {
            let publishers: Vec<_> = pace
                .publishers(&self.publisher, clock)?
                .into_iter()
                .map(|(publisher, lane)| scope.spawn(move || lane.run(publisher, flow)))
                .collect();
            let measured = self.measure(&mut dashboards, &published);
            stop.store(true, Ordering::Release);
            while publishers.iter().any(|publisher| !publisher.is_finished()) {
                dashboards.turn(Duration::from_millis(5))?;
            }
            for publisher in publishers {
                publisher.join().expect("a publisher does not panic")?;
            }
            let mut report = measured?;
            let everything = published.load(Ordering::Acquire);
            // Where this takes too long, what is missing then is told.
            dashboards.until(CATCH_UP_LIMIT, |all| all.have(everything))?;
            let tally = &dashboards.tally;
            report.published = everything;
            (report.duplicates, report.gaps, report.closes) = (tally.duplicates, tally.gaps, tally.closes.clone());
            report.missing = tally.missing + dashboards.behind(everything);
            Ok(report)
        })
    }

    fn measure(&self, dashboards: &mut Dashboards, published: &AtomicU64) -> Result<SlowReport> {
        dashboards.run_for(MARGIN)?;
        dashboards.sample(self.slow);
        let before_bytes = self.watch(dashboards)?;
        let before = dashboards.sampled();
        dashboards.pause(self.slow)?;
        dashboards.sample(self.slow);
        let during_bytes = self.watch(dashboards)?;
        let during = dashboards.sampled();
        dashboards.resume()?;
        let (start, have) = (Instant::now(), published.load(Ordering::Acquire));
        dashboards.must("the end of catching up", CATCH_UP_LIMIT, |all| all.have(have))?;
        let catch_up_seconds = start.elapsed().as_secs_f64();
        dashboards.run_for(MARGIN)?;
        Ok(SlowReport {
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

    /// Receives for one half; returns the most memory that the relay had.
    fn watch(&self, dashboards: &mut Dashboards) -> Result<u64> {
        let end = Instant::now() + Duration::from_secs_f64(self.seconds);
        let mut most = 0;
        while Instant::now() < end {
            dashboards.run_for(end.saturating_duration_since(Instant::now()).min(LOOK))?;
            most = most.max(private_bytes(self.relay_pid)?);
        }
        Ok(most)
    }
}
