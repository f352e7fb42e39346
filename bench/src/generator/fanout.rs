//! Publishes at a pace and counts every event at thousands of WebSocket clients.
//!
//! The number of an event shows whether one is missing or out of order, and its stamp how long it took.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::client_pool::ClientPool;
use super::endpoint::RelayEndpoint;
use super::pacing::{FlowControl, Pace};
use super::publisher::PublisherSpec;
use crate::clock::StampClock;
use crate::procfs::{cpu_seconds, own_cpu_seconds};
use crate::stats::Percentiles;

/// The pause between connecting and publishing or measuring.
pub(super) const SETTLE: Duration = Duration::from_millis(500);
/// The time limit of the last events after the end of publishing.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);
/// The longest time without any event while some are missing.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);

/// Connects clients, publishes, and counts the events at the clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FanoutJob {
    pub(crate) relay: RelayEndpoint,
    pub(crate) clients: usize,
    pub(crate) publisher: PublisherSpec,
    pub(crate) pace: Pace,
    /// The time of publishing before the window.
    pub(crate) warmup_seconds: f64,
    /// The length of the measured window.
    pub(crate) seconds: f64,
    /// The process whose CPU time is measured.
    pub(crate) relay_pid: u32,
}

/// The result of a fan-out.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct FanoutReport {
    pub(crate) published: u64,
    /// Events of all clients together, from first to last.
    pub(crate) delivered: u64,
    /// Events that a client did not receive.
    pub(crate) missing: u64,
    /// Events received twice or before an earlier one. Zero if several connections publish.
    pub(crate) out_of_order: u64,
    /// Clients that the relay disconnected.
    pub(crate) closed: u64,
    /// The length of the window as measured, in seconds.
    pub(crate) seconds: f64,
    /// Events within the window, of all clients together.
    pub(crate) in_window: u64,
    /// The time from just before publishing to the client, of events within the window.
    pub(crate) latency: Percentiles,
    /// CPU time of the relay within the window, in seconds.
    pub(crate) relay_cpu_seconds: f64,
    /// CPU time of the generator within the window, in seconds.
    pub(crate) generator_cpu_seconds: f64,
}

impl FanoutJob {
    pub(crate) fn run(&self) -> Result<FanoutReport> {
        let clock = StampClock::start();
        let mut pool = ClientPool::new(clock)?;
        pool.grow(&self.relay, self.clients)?;
        pool.receive_until(Instant::now() + SETTLE, None)?;

        let (stop, published, delivered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let flow =
            FlowControl { stop: &stop, published: &published, delivered: &delivered, clients: self.clients as u64 };
        std::thread::scope(|scope| {
            let publishers: Vec<_> = self
                .pace
                .publishers(&self.publisher, clock)?
                .into_iter()
                .map(|(publisher, schedule)| scope.spawn(move || schedule.run(publisher, flow)))
                .collect();
            let measured = self.measure(&mut pool, clock, &delivered);
            stop.store(true, Ordering::Release);
            // A publisher may wait for the relay, and the relay for these clients.
            while publishers.iter().any(|publisher| !publisher.is_finished()) {
                pool.receive_until(Instant::now() + Duration::from_millis(5), Some(&delivered))?;
            }
            for publisher in publishers {
                publisher.join().expect("a publisher does not panic")?;
            }
            let mut report = measured?;
            report.published = published.load(Ordering::Acquire);
            let expected = report.published * self.clients as u64;
            receive_rest(&mut pool, expected)?;
            let counters = &mut pool.counters;
            report.delivered = counters.delivered;
            report.missing = expected.saturating_sub(counters.delivered);
            let has_one_publisher = !matches!(self.pace, Pace::PerSecond { connections: 2.., .. });
            report.out_of_order = if has_one_publisher { counters.out_of_order } else { 0 };
            report.closed = counters.closed;
            report.latency = Percentiles::of(std::mem::take(&mut counters.latencies));
            Ok(report)
        })
    }

    fn measure(&self, pool: &mut ClientPool, clock: StampClock, delivered: &AtomicU64) -> Result<FanoutReport> {
        pool.receive_until(Instant::now() + Duration::from_secs_f64(self.warmup_seconds), Some(delivered))?;
        pool.counters.window_start = clock.nanos();
        pool.counters.sampled_clients = match self.pace {
            Pace::PerSecond { .. } => self.clients,
            // All clients would give hundreds of millions of samples.
            Pace::Saturate { .. } => 1,
        };
        let (start, before) = (Instant::now(), pool.counters.delivered);
        let (relay_cpu, own_cpu) = (cpu_seconds(self.relay_pid)?, own_cpu_seconds());
        pool.receive_until(start + Duration::from_secs_f64(self.seconds), Some(delivered))?;
        Ok(FanoutReport {
            published: 0,
            delivered: 0,
            missing: 0,
            out_of_order: 0,
            closed: 0,
            seconds: start.elapsed().as_secs_f64(),
            in_window: pool.counters.delivered - before,
            latency: Percentiles::default(),
            relay_cpu_seconds: cpu_seconds(self.relay_pid)? - relay_cpu,
            generator_cpu_seconds: own_cpu_seconds() - own_cpu,
        })
    }
}

/// Receives until the clients have all `expected` events, or until none arrives any more.
fn receive_rest(pool: &mut ClientPool, expected: u64) -> Result<()> {
    let (limit, mut silent_since) = (Instant::now() + DRAIN_LIMIT, Instant::now());
    while pool.counters.delivered < expected
        && pool.has_open_clients()
        && Instant::now() < limit
        && silent_since.elapsed() < SILENCE_LIMIT
    {
        let before = pool.counters.delivered;
        pool.receive(Duration::from_millis(50))?;
        if pool.counters.delivered > before {
            silent_since = Instant::now();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};
    use std::thread;

    use super::*;
    use crate::generator::baseline_relay::tests::start_relay;
    use crate::generator::publisher::Target;
    use crate::http::read_head;
    use crate::payload::EventTemplate;
    use crate::websocket::write_server_text;

    /// Accepts one client, sends it events with these numbers and closes the connection.
    fn start_faulty_relay(sequences: &'static [u64]) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_head(&mut stream).unwrap();
            let mut response = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
            for sequence in sequences {
                write_server_text(&EventTemplate::new(400).bytes(*sequence, 0), &mut response);
            }
            stream.write_all(&response).unwrap();
        });
        address
    }

    fn job(relay: SocketAddr, publish_to: SocketAddr, clients: usize, pace: Pace) -> FanoutJob {
        FanoutJob {
            relay: RelayEndpoint::new(relay, "/"),
            clients,
            publisher: PublisherSpec { target: Target::Http { address: publish_to, path: "/".to_owned() }, size: 400 },
            pace,
            warmup_seconds: 0.1,
            seconds: 0.3,
            relay_pid: std::process::id(),
        }
    }

    #[test]
    fn saturated_fanout_counts_every_event() {
        let relay = start_relay();
        let report = job(relay, relay, 20, Pace::Saturate { window: 256, burst: 32 }).run().unwrap();
        assert!(report.published > 100, "{report:?}");
        assert_eq!(report.delivered, report.published * 20);
        assert_eq!((report.missing, report.out_of_order, report.closed), (0, 0, 0));
        assert!(report.in_window > 0 && report.latency.count > 0, "{report:?}");
    }

    #[test]
    fn several_publishers_keep_the_pace() {
        let relay = start_relay();
        let report = job(relay, relay, 3, Pace::PerSecond { rate: 200, connections: 4 }).run().unwrap();
        assert!((40..=120).contains(&report.published), "{report:?}");
        assert_eq!((report.delivered, report.missing), (report.published * 3, 0));
    }

    #[test]
    fn faulty_relay_is_detected() {
        let faulty = start_faulty_relay(&[0, 2, 2, 3]);
        let report = job(faulty, start_relay(), 1, Pace::Saturate { window: 64, burst: 8 }).run().unwrap();
        assert_eq!((report.delivered, report.out_of_order, report.closed), (4, 2, 1));
        assert!(report.missing > 0, "{report:?}");
    }
}
