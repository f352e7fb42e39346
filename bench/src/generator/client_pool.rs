//! Thousands of clients on one thread that count the events they receive.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::centrifugo::{self, CentrifugoMessage, CentrifugoReader};
use super::endpoint::{Protocol, RelayEndpoint};
use super::nats::{self, NatsReader};
use crate::clock::StampClock;
use crate::payload::{Marks, read_marks};
use crate::websocket::{FrameKind, FrameReader, client_binary, client_text, connect, pong};

/// The longest wait of a poll while receiving for a longer time.
const POLL: Duration = Duration::from_millis(20);

/// The counters of all clients of a pool.
#[derive(Debug, Default)]
pub(super) struct PoolCounters {
    pub(super) delivered: u64,
    pub(super) out_of_order: u64,
    pub(super) closed: u64,
    /// Latencies are recorded of events stamped from here on, at the first `sampled_clients` clients.
    pub(super) window_start: u64,
    pub(super) sampled_clients: usize,
    pub(super) latencies: Vec<u64>,
}

/// All clients, on one poll.
#[derive(Debug)]
pub(super) struct ClientPool {
    poll: Poll,
    events: Events,
    clients: Vec<PoolClient>,
    buffer: Vec<u8>,
    clock: StampClock,
    pub(super) counters: PoolCounters,
}

#[derive(Debug)]
struct PoolClient {
    stream: TcpStream,
    reader: EventReader,
    next_sequence: u64,
    is_open: bool,
}

/// Finds the events in the bytes of one connection.
#[derive(Debug)]
enum EventReader {
    Alerts(Box<FrameReader>),
    Nats(Box<NatsReader>),
    Centrifugo(Box<CentrifugoReader>),
}

impl ClientPool {
    pub(super) fn new(clock: StampClock) -> Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            clients: Vec::new(),
            buffer: vec![0; 1 << 20],
            clock,
            counters: PoolCounters { window_start: u64::MAX, ..PoolCounters::default() },
        })
    }

    /// Connects until there are `count` clients.
    pub(super) fn grow(&mut self, relay: &RelayEndpoint, count: usize) -> Result<()> {
        while self.clients.len() < count {
            let index = self.clients.len();
            let (mut stream, rest) = connect(relay.address, &relay.path_of(index))
                .with_context(|| format!("client {} of {count} cannot connect", index + 1))?;
            let (reader, subscribe) = match &relay.protocol {
                Protocol::Alerts => (EventReader::Alerts(Box::new(FrameReader::new())), Vec::new()),
                Protocol::Nats { subject } => {
                    (EventReader::Nats(Box::new(NatsReader::new())), client_binary(&nats::subscribe(subject)))
                }
                Protocol::Centrifugo { channel } => {
                    let subscribe = client_text(&centrifugo::subscribe(channel, None));
                    (EventReader::Centrifugo(Box::new(CentrifugoReader::new())), subscribe)
                }
            };
            stream.write_all(&subscribe).context("cannot subscribe")?;
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            self.poll.registry().register(&mut stream, Token(index), Interest::READABLE)?;
            let mut client = PoolClient { stream, reader, next_sequence: 0, is_open: true };
            client.take(&rest, index, self.clock, &mut self.counters)?;
            self.clients.push(client);
        }
        Ok(())
    }

    /// Returns whether any client is connected.
    pub(super) fn has_open_clients(&self) -> bool {
        self.clients.iter().any(|client| client.is_open)
    }

    /// Receives for at most `wait`, and returns after the first events.
    pub(super) fn receive(&mut self, wait: Duration) -> Result<()> {
        if let Err(error) = self.poll.poll(&mut self.events, Some(wait))
            && error.kind() != ErrorKind::Interrupted
        {
            return Err(error).context("cannot wait for frames");
        }
        for event in &self.events {
            let index = event.token().0;
            let Some(client) = self.clients.get_mut(index) else { continue };
            while client.is_open {
                match client.stream.read(&mut self.buffer) {
                    Ok(0) => client.close(&mut self.counters),
                    Ok(count) => {
                        client.take(&self.buffer[..count], index, self.clock, &mut self.counters)?;
                        // A read that does not fill the buffer has emptied the socket: new data causes a new event.
                        if count < self.buffer.len() && !event.is_read_closed() {
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => client.close(&mut self.counters),
                }
            }
        }
        Ok(())
    }

    /// Receives until `end`, and stores the number of received events in `progress`.
    pub(super) fn receive_until(&mut self, end: Instant, progress: Option<&AtomicU64>) -> Result<()> {
        while Instant::now() < end {
            self.receive(end.saturating_duration_since(Instant::now()).min(POLL))?;
            if let Some(progress) = progress {
                progress.store(self.counters.delivered, Ordering::Release);
            }
        }
        Ok(())
    }
}

impl PoolClient {
    fn take(&mut self, input: &[u8], index: usize, clock: StampClock, counters: &mut PoolCounters) -> Result<()> {
        let now = clock.nanos();
        let Self { stream, reader, next_sequence, .. } = self;
        let mut count = |Marks { sequence, stamp }| {
            counters.delivered += 1;
            counters.out_of_order += u64::from(sequence != *next_sequence);
            *next_sequence = sequence + 1;
            if index < counters.sampled_clients && stamp >= counters.window_start {
                counters.latencies.push(now.saturating_sub(stamp));
            }
        };
        let mut is_closing = false;
        // The result of writing a pong is ignored: if the socket has no room for it, the next read notices the end.
        match reader {
            EventReader::Alerts(frames) => frames.feed(input, |frame| match frame.kind {
                FrameKind::Message => read_marks(frame.head).into_iter().for_each(&mut count),
                FrameKind::Ping => drop(stream.write(&pong(frame.head))),
                FrameKind::Close => is_closing = true,
                FrameKind::Continuation | FrameKind::Pong => {}
            })?,
            EventReader::Nats(messages) => {
                let pings = messages.feed(input, count)?;
                if pings > 0 {
                    drop(stream.write(&client_binary(&nats::PONG.repeat(pings))));
                }
            }
            EventReader::Centrifugo(messages) => messages.feed(input, |message| match message {
                CentrifugoMessage::Event(marks) => count(marks),
                CentrifugoMessage::Ping => drop(stream.write(&client_text(centrifugo::PONG))),
                CentrifugoMessage::Closed(_) => is_closing = true,
                CentrifugoMessage::Subscribed { .. } => {}
            })?,
        }
        if is_closing {
            self.close(counters);
        }
        Ok(())
    }

    fn close(&mut self, counters: &mut PoolCounters) {
        if self.is_open {
            self.is_open = false;
            counters.closed += 1;
        }
    }
}
