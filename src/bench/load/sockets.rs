//! WebSocket clients by the thousand on one thread, and a publisher beside them.
//!
//! Every frame of every client is counted; its number tells whether one is missing or out of order, its stamp how
//! long it took.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

use super::publisher::{Publisher, PublisherSpec};
use super::{Percentiles, RelayAddress, wait_until};
use crate::bench::frames::{FrameReader, Kind, connect, pong};
use crate::bench::payload::{Clock, read_marks};
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

#[derive(Debug)]
struct Client {
    stream: TcpStream,
    frames: FrameReader,
    next_sequence: u64,
    open: bool,
}

/// What the receiving side counts.
#[derive(Debug, Default)]
struct Tally {
    delivered: u64,
    out_of_order: u64,
    closed: u64,
    /// Frames counted for the latency: those stamped from here on, of these clients only.
    window_start: u64,
    sampled_clients: usize,
    latencies: Vec<u64>,
}

/// All clients, on one poll.
#[derive(Debug)]
struct Crowd {
    poll: Poll,
    events: Events,
    clients: Vec<Client>,
    buffer: Vec<u8>,
    clock: Clock,
    tally: Tally,
}

impl Crowd {
    fn new(clock: Clock) -> Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            clients: Vec::new(),
            buffer: vec![0; 1 << 20],
            clock,
            tally: Tally { window_start: u64::MAX, ..Tally::default() },
        })
    }

    /// Connects until there are `count` clients.
    fn grow(&mut self, relay: &RelayAddress, count: usize) -> Result<()> {
        while self.clients.len() < count {
            let index = self.clients.len();
            let (stream, rest) = connect(relay.address, &relay.path)
                .with_context(|| format!("client {} of {count} cannot connect", index + 1))?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            self.poll.registry().register(&mut stream, Token(index), Interest::READABLE)?;
            let mut client = Client { stream, frames: FrameReader::new(), next_sequence: 0, open: true };
            client.take(&rest, index, self.clock, &mut self.tally)?;
            self.clients.push(client);
        }
        Ok(())
    }

    /// Waits for frames and counts them, at most for `wait`.
    fn receive(&mut self, wait: Duration) -> Result<()> {
        if let Err(error) = self.poll.poll(&mut self.events, Some(wait))
            && error.kind() != ErrorKind::Interrupted
        {
            return Err(error).context("cannot wait for frames");
        }
        for event in &self.events {
            let index = event.token().0;
            let Some(client) = self.clients.get_mut(index) else { continue };
            while client.open {
                match client.stream.read(&mut self.buffer) {
                    Ok(0) => client.close(&mut self.tally),
                    Ok(count) => {
                        client.take(&self.buffer[..count], index, self.clock, &mut self.tally)?;
                        // A read that does not fill the buffer has emptied the socket: more comes with a new event.
                        if count < self.buffer.len() && !event.is_read_closed() {
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => client.close(&mut self.tally),
                }
            }
        }
        Ok(())
    }

    fn receive_until(&mut self, end: Instant, progress: Option<&AtomicU64>) -> Result<()> {
        while Instant::now() < end {
            self.receive(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)))?;
            if let Some(progress) = progress {
                progress.store(self.tally.delivered, Ordering::Release);
            }
        }
        Ok(())
    }
}

impl Client {
    fn take(&mut self, input: &[u8], index: usize, clock: Clock, tally: &mut Tally) -> Result<()> {
        let now = clock.nanos();
        let Self { stream, frames, next_sequence, .. } = self;
        let mut said_goodbye = false;
        frames.feed(input, |frame| match frame.kind {
            Kind::Message => {
                let Some((sequence, stamp)) = read_marks(frame.head) else { return };
                tally.delivered += 1;
                tally.out_of_order += u64::from(sequence != *next_sequence);
                *next_sequence = sequence + 1;
                if index < tally.sampled_clients && stamp >= tally.window_start {
                    tally.latencies.push(now.saturating_sub(stamp));
                }
            }
            // A socket too full for six bytes belongs to a relay that is gone; its closing is noticed by the read.
            Kind::Ping => drop(stream.write(&pong(frame.head))),
            Kind::Close => said_goodbye = true,
            Kind::Continuation | Kind::Pong => {}
        })?;
        if said_goodbye {
            self.close(tally);
        }
        Ok(())
    }

    fn close(&mut self, tally: &mut Tally) {
        if self.open {
            self.open = false;
            tally.closed += 1;
        }
    }
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
                .publishers(clock)?
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

    fn publishers(&self, clock: Clock) -> Result<Vec<(Publisher, Lane)>> {
        let start = Instant::now();
        let lanes = match self.pace {
            Pace::Saturate { window, burst } => vec![Lane::Saturate { window, burst }],
            Pace::PerSecond { rate, connections } => (0..connections)
                .map(|number| Lane::PerSecond {
                    start,
                    interval: Duration::from_secs(1) / rate,
                    number,
                    of: connections,
                })
                .collect(),
        };
        lanes.into_iter().map(|lane| Ok((self.publisher.open(clock)?, lane))).collect()
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
struct Flow<'a> {
    stop: &'a AtomicBool,
    published: &'a AtomicU64,
    delivered: &'a AtomicU64,
    clients: u64,
}

/// What one publishing connection does.
#[derive(Debug, Clone, Copy)]
enum Lane {
    Saturate { window: u64, burst: u64 },
    PerSecond { start: Instant, interval: Duration, number: u32, of: u32 },
}

impl Lane {
    fn run(self, mut publisher: Publisher, flow: Flow<'_>) -> Result<()> {
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
            relay: RelayAddress { address: relay, path: "/".to_owned() },
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
        let relay = RelayAddress { address: start_server(), path: "/".to_owned() };
        let relay_pid = std::process::id();
        let reports = HoldJob { relay, steps: vec![2, 5], seconds: 0.05, relay_pid }.run().unwrap();
        assert_eq!(reports.iter().map(|report| report.clients).collect::<Vec<_>>(), [2, 5]);
        assert!(reports.iter().all(|report| report.with_bytes > 0 && report.closed == 0));
    }
}
