//! WebSocket clients by the thousand on one thread, and a publisher beside them.
//!
//! Every frame of every client is counted; its number tells whether one is missing or out of order, its stamp how
//! long it took.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::crowd::Crowd;
use super::publisher::{Publisher, PublisherSpec};
use super::{Percentiles, RelayAddress, wait_until};
use crate::bench::payload::Clock;
use crate::bench::process::{cpu_seconds, own_cpu_seconds, private_bytes};

/// How long a server has to get used to new clients before anything is published or measured.
const SETTLE: Duration = Duration::from_millis(500);
/// How long the last frames may take after publishing has ended.
const DRAIN: Duration = Duration::from_secs(20);
/// The longest time without any frame while some are still to come.
const SILENCE: Duration = Duration::from_secs(5);

/// How fast to publish.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Pace {
    /// So many events per second, each on its own; by several connections in turn, since one waits for each answer.
    PerSecond { rate: u32, connections: u32 },
    /// In bursts, as fast as the clients receive: never more than `window` events ahead of their average.
    Saturate { window: u64, burst: u64 },
}

impl Pace {
    /// The connections that publish at this pace.
    pub(super) fn publishers(self, spec: &PublisherSpec, clock: Clock) -> Result<Vec<(Publisher, Lane)>> {
        let start = Instant::now();
        let lanes = match self {
            Self::Saturate { window, burst } => vec![Lane::Saturate { window, burst }],
            Self::PerSecond { rate, connections } => (0..connections)
                .map(|number| Lane::PerSecond {
                    start,
                    interval: Duration::from_secs(1) / rate,
                    number,
                    of: connections,
                })
                .collect(),
        };
        lanes.into_iter().map(|lane| Ok((spec.open(clock)?, lane))).collect()
    }
}

/// Publish, and count what arrives.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SocketsJob {
    pub(crate) relay: RelayAddress,
    pub(crate) clients: usize,
    pub(crate) publisher: PublisherSpec,
    pub(crate) pace: Pace,
    /// Published but not measured before the window.
    pub(crate) warmup_seconds: f64,
    /// The measured window.
    pub(crate) seconds: f64,
    /// The relay's process, whose CPU time is measured.
    pub(crate) relay_pid: u32,
}

/// What arrived.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct SocketsReport {
    pub(crate) published: u64,
    /// Frames of all clients together, from first to last.
    pub(crate) delivered: u64,
    /// Frames that never came.
    pub(crate) missing: u64,
    /// Frames that came before an earlier one, or twice. Not told where several connections publish.
    pub(crate) out_of_order: u64,
    /// Clients whose connection was closed by the relay.
    pub(crate) closed: u64,
    /// The measured window in seconds, as it was.
    pub(crate) seconds: f64,
    /// Frames within the window, of all clients together.
    pub(crate) in_window: u64,
    /// From just before publishing to the client, of frames within the window.
    pub(crate) latency: Percentiles,
    /// CPU time of the relay within the window, in seconds.
    pub(crate) relay_cpu_seconds: f64,
    /// CPU time of the generator within the window, in seconds.
    pub(crate) generator_cpu_seconds: f64,
}

/// Clients that only wait.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HoldJob {
    pub(crate) relay: RelayAddress,
    /// How many clients to have, in rising order.
    pub(crate) steps: Vec<usize>,
    /// How long to watch each.
    pub(crate) seconds: f64,
    pub(crate) relay_pid: u32,
}

/// What one step of idle clients costs.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct HoldReport {
    pub(crate) clients: usize,
    /// Private memory of the relay before the first client came.
    pub(crate) before_bytes: u64,
    /// Private memory of the relay with these clients.
    pub(crate) with_bytes: u64,
    /// CPU seconds of the relay per second.
    pub(crate) cpu: f64,
    /// Clients whose connection was closed by the relay.
    pub(crate) closed: u64,
}

impl SocketsJob {
    pub(crate) fn run(&self) -> Result<SocketsReport> {
        let clock = Clock::start();
        let mut crowd = Crowd::new(clock)?;
        crowd.grow(&self.relay, self.clients)?;
        crowd.receive_until(Instant::now() + SETTLE, None)?;

        let (stop, published, delivered) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let flow = Flow { stop: &stop, published: &published, delivered: &delivered, clients: self.clients as u64 };
        std::thread::scope(|scope| {
            let publishers: Vec<_> = self
                .pace
                .publishers(&self.publisher, clock)?
                .into_iter()
                .map(|(publisher, lane)| scope.spawn(move || lane.run(publisher, flow)))
                .collect();
            let measured = self.measure(&mut crowd, clock, &delivered);
            stop.store(true, Ordering::Release);
            // The publishers may be waiting for the relay, which may be waiting for these clients.
            while publishers.iter().any(|publisher| !publisher.is_finished()) {
                crowd.receive_until(Instant::now() + Duration::from_millis(5), Some(&delivered))?;
            }
            for publisher in publishers {
                publisher.join().expect("a publisher does not panic")?;
            }
            let mut report = measured?;
            report.published = published.load(Ordering::Acquire);
            let expected = report.published * self.clients as u64;
            let (limit, mut silent_since) = (Instant::now() + DRAIN, Instant::now());
            while crowd.tally.delivered < expected
                && crowd.clients.iter().any(|client| client.open)
                && Instant::now() < limit
                && silent_since.elapsed() < SILENCE
            {
                let before = crowd.tally.delivered;
                crowd.receive(Duration::from_millis(50))?;
                if crowd.tally.delivered > before {
                    silent_since = Instant::now();
                }
            }
            report.delivered = crowd.tally.delivered;
            report.missing = expected.saturating_sub(crowd.tally.delivered);
            let one_publisher = !matches!(self.pace, Pace::PerSecond { connections: 2.., .. });
            report.out_of_order = if one_publisher { crowd.tally.out_of_order } else { 0 };
            report.closed = crowd.tally.closed;
            report.latency = Percentiles::of(std::mem::take(&mut crowd.tally.latencies));
            Ok(report)
        })
    }

    fn measure(&self, crowd: &mut Crowd, clock: Clock, delivered: &AtomicU64) -> Result<SocketsReport> {
        crowd.receive_until(Instant::now() + Duration::from_secs_f64(self.warmup_seconds), Some(delivered))?;
        crowd.tally.window_start = clock.nanos();
        crowd.tally.sampled_clients = match self.pace {
            Pace::PerSecond { .. } => self.clients,
            // All of them would be hundreds of millions of samples.
            Pace::Saturate { .. } => 1,
        };
        let (start, before) = (Instant::now(), crowd.tally.delivered);
        let (relay_cpu, own_cpu) = (cpu_seconds(self.relay_pid)?, own_cpu_seconds());
        crowd.receive_until(start + Duration::from_secs_f64(self.seconds), Some(delivered))?;
        Ok(SocketsReport {
            published: 0,
            delivered: 0,
            missing: 0,
            out_of_order: 0,
            closed: 0,
            seconds: start.elapsed().as_secs_f64(),
            in_window: crowd.tally.delivered - before,
            latency: Percentiles::default(),
            relay_cpu_seconds: cpu_seconds(self.relay_pid)? - relay_cpu,
            generator_cpu_seconds: own_cpu_seconds() - own_cpu,
        })
    }
}

/// What publishers and receiver tell each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow<'a> {
    pub(super) stop: &'a AtomicBool,
    pub(super) published: &'a AtomicU64,
    pub(super) delivered: &'a AtomicU64,
    pub(super) clients: u64,
}

/// What one publishing connection does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lane {
    Saturate { window: u64, burst: u64 },
    PerSecond { start: Instant, interval: Duration, number: u32, of: u32 },
}

impl Lane {
    pub(super) fn run(self, mut publisher: Publisher, flow: Flow<'_>) -> Result<()> {
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
                        wait_until(Instant::now() + Duration::from_micros(200));
                        continue;
                    }
                    publisher.publish(sequence, burst)?;
                    sequence += burst;
                    flow.published.fetch_add(burst, Ordering::AcqRel);
                }
                Self::PerSecond { start, interval, number, of } => {
                    wait_until(start + interval * (number + turn * of));
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

impl HoldJob {
    pub(crate) fn run(&self) -> Result<Vec<HoldReport>> {
        let before_bytes = private_bytes(self.relay_pid)?;
        let mut crowd = Crowd::new(Clock::start())?;
        let mut reports = Vec::new();
        for clients in &self.steps {
            crowd.grow(&self.relay, *clients)?;
            crowd.receive_until(Instant::now() + SETTLE, None)?;
            let (start, cpu) = (Instant::now(), cpu_seconds(self.relay_pid)?);
            crowd.receive_until(start + Duration::from_secs_f64(self.seconds), None)?;
            reports.push(HoldReport {
                clients: *clients,
                before_bytes,
                with_bytes: private_bytes(self.relay_pid)?,
                cpu: (cpu_seconds(self.relay_pid)? - cpu) / start.elapsed().as_secs_f64(),
                closed: crowd.tally.closed,
            });
            ensure!(crowd.tally.closed == 0, "{} of {clients} idle clients were disconnected", crowd.tally.closed);
        }
        Ok(reports)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::bench::frames::{read_head, write_server_text};
    use crate::bench::load::{ServeJob, Target};
    use crate::bench::payload::Template;

    fn start_server() -> SocketAddr {
        let (send, receive) = mpsc::channel();
        thread::spawn(move || ServeJob::Http.run(|address| Ok(send.send(address)?)));
        receive.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// Takes one client, sends it these numbers and hangs up.
    fn start_liar(sequences: &'static [u64]) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            read_head(&mut stream).unwrap();
            let mut answer = b"HTTP/1.1 101 Switching Protocols\r\n\r\n".to_vec();
            for sequence in sequences {
                write_server_text(&Template::new(400).bytes(*sequence, 0), &mut answer);
            }
            stream.write_all(&answer).unwrap();
        });
        address
    }

    fn job(relay: SocketAddr, publish_to: SocketAddr, clients: usize, pace: Pace) -> SocketsJob {
        SocketsJob {
            relay: RelayAddress::new(relay, "/"),
            clients,
            publisher: PublisherSpec { target: Target::Http { address: publish_to, path: "/".to_owned() }, size: 400 },
            pace,
            warmup_seconds: 0.1,
            seconds: 0.3,
            relay_pid: std::process::id(),
        }
    }

    #[test]
    fn every_frame_of_every_client_is_counted_at_full_speed() {
        let relay = start_server();
        let report = job(relay, relay, 20, Pace::Saturate { window: 256, burst: 32 }).run().unwrap();
        assert!(report.published > 100, "{report:?}");
        assert_eq!(report.delivered, report.published * 20);
        assert_eq!((report.missing, report.out_of_order, report.closed), (0, 0, 0));
        assert!(report.in_window > 0 && report.latency.count > 0, "{report:?}");
    }

    #[test]
    fn a_pace_is_kept_by_several_publishers() {
        let relay = start_server();
        let report = job(relay, relay, 3, Pace::PerSecond { rate: 200, connections: 4 }).run().unwrap();
        assert!((40..=120).contains(&report.published), "{report:?}");
        assert_eq!((report.delivered, report.missing), (report.published * 3, 0));
    }

    #[test]
    fn a_relay_that_skips_repeats_and_hangs_up_is_found_out() {
        let liar = start_liar(&[0, 2, 2, 3]);
        let report = job(liar, start_server(), 1, Pace::Saturate { window: 64, burst: 8 }).run().unwrap();
        assert_eq!((report.delivered, report.out_of_order, report.closed), (4, 2, 1));
        assert!(report.missing > 0, "{report:?}");
    }

    #[test]
    fn idle_clients_are_held_and_watched() {
        let relay = RelayAddress::new(start_server(), "/");
        let relay_pid = std::process::id();
        let reports = HoldJob { relay, steps: vec![2, 5], seconds: 0.05, relay_pid }.run().unwrap();
        assert_eq!(reports.iter().map(|report| report.clients).collect::<Vec<_>>(), [2, 5]);
        assert!(reports.iter().all(|report| report.with_bytes > 0 && report.closed == 0));
    }
}
