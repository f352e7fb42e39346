//! The pace of publishing, and the threads that keep it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::publisher::{Publisher, PublisherSpec};
use crate::clock::{StampClock, sleep_until};

/// The pause of a publisher that is ahead of the clients.
const AHEAD_PAUSE: Duration = Duration::from_micros(200);

/// The pace of publishing.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Pace {
    /// A fixed number of single events per second. Several connections take turns, since each waits for its response.
    PerSecond { rate: u32, connections: u32 },
    /// Bursts, as fast as the clients receive: at most `window` events ahead of their average.
    Saturate { window: u64, burst: u64 },
}

impl Pace {
    /// Opens the connections that publish at this pace.
    pub(super) fn publishers(self, spec: &PublisherSpec, clock: StampClock) -> Result<Vec<(Publisher, Schedule)>> {
        let start = Instant::now();
        let schedules = match self {
            Self::Saturate { window, burst } => vec![Schedule::Saturate { window, burst }],
            Self::PerSecond { rate, connections } => (0..connections)
                .map(|number| Schedule::PerSecond {
                    start,
                    interval: Duration::from_secs(1) / rate,
                    number,
                    of: connections,
                })
                .collect(),
        };
        schedules.into_iter().map(|schedule| Ok((spec.open(clock)?, schedule))).collect()
    }
}

/// The counters that publishers and receiver share.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlowControl<'a> {
    pub(super) stop: &'a AtomicBool,
    pub(super) published: &'a AtomicU64,
    pub(super) delivered: &'a AtomicU64,
    pub(super) clients: u64,
}

/// The schedule of one publishing connection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Schedule {
    Saturate { window: u64, burst: u64 },
    PerSecond { start: Instant, interval: Duration, number: u32, of: u32 },
}

impl Schedule {
    /// Publishes until `flow.stop` is set.
    pub(super) fn run(self, mut publisher: Publisher, flow: FlowControl<'_>) -> Result<()> {
        let mut turn = 0_u32;
        let mut sequence = match self {
            Self::Saturate { .. } => 0,
            Self::PerSecond { number, .. } => u64::from(number),
        };
        while !flow.stop.load(Ordering::Acquire) {
            match self {
                Self::Saturate { window, burst } => {
                    let received = flow.delivered.load(Ordering::Acquire) / flow.clients;
                    if sequence + burst > received + window {
                        sleep_until(Instant::now() + AHEAD_PAUSE);
                        continue;
                    }
                    publisher.publish(sequence, burst)?;
                    sequence += burst;
                    flow.published.fetch_add(burst, Ordering::AcqRel);
                }
                Self::PerSecond { start, interval, number, of } => {
                    sleep_until(start + interval * (number + turn * of));
                    publisher.publish(sequence, 1)?;
                    sequence += u64::from(of);
                    turn += 1;
                    flow.published.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
        Ok(())
    }
}
