//! Clients by the thousand on one thread, which count what they are given.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::nats::{self, NatsReader};
use super::{RelayAddress, Speech};
use crate::bench::frames::{FrameReader, Kind, client_binary, connect, pong};
use crate::bench::payload::{Clock, read_marks};

/// What the receiving side counts.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) delivered: u64,
    pub(super) out_of_order: u64,
    pub(super) closed: u64,
    /// Events counted for the latency: those stamped from here on, of these clients only.
    pub(super) window_start: u64,
    pub(super) sampled_clients: usize,
    pub(super) latencies: Vec<u64>,
}

/// All clients, on one poll.
#[derive(Debug)]
pub(super) struct Crowd {
    poll: Poll,
    events: Events,
    pub(super) clients: Vec<Client>,
    buffer: Vec<u8>,
    clock: Clock,
    pub(super) tally: Tally,
}

#[derive(Debug)]
pub(super) struct Client {
    stream: TcpStream,
    reader: Reader,
    next_sequence: u64,
    pub(super) open: bool,
}

/// What finds the events in what a client is sent.
#[derive(Debug)]
enum Reader {
    Alerts(Box<FrameReader>),
    Nats(Box<NatsReader>),
}

impl Crowd {
    pub(super) fn new(clock: Clock) -> Result<Self> {
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
    pub(super) fn grow(&mut self, relay: &RelayAddress, count: usize) -> Result<()> {
        while self.clients.len() < count {
            let index = self.clients.len();
            let (mut stream, rest) = connect(relay.address, &relay.path_of(index))
                .with_context(|| format!("client {} of {count} cannot connect", index + 1))?;
            let reader = match &relay.speech {
                Speech::Alerts => Reader::Alerts(Box::new(FrameReader::new())),
                Speech::Nats { subject } => {
                    stream.write_all(&client_binary(&nats::subscribe(subject))).context("cannot subscribe")?;
                    Reader::Nats(Box::new(NatsReader::new()))
                }
            };
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            self.poll.registry().register(&mut stream, Token(index), Interest::READABLE)?;
            let mut client = Client { stream, reader, next_sequence: 0, open: true };
            client.take(&rest, index, self.clock, &mut self.tally)?;
            self.clients.push(client);
        }
        Ok(())
    }

    /// Waits for events and counts them, at most for `wait`.
    pub(super) fn receive(&mut self, wait: Duration) -> Result<()> {
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

    /// Receives until `end`; `progress` is told how many events came.
    pub(super) fn receive_until(&mut self, end: Instant, progress: Option<&AtomicU64>) -> Result<()> {
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
        let Self { stream, reader, next_sequence, .. } = self;
        let mut count = |(sequence, stamp): (u64, u64)| {
            tally.delivered += 1;
            tally.out_of_order += u64::from(sequence != *next_sequence);
            *next_sequence = sequence + 1;
            if index < tally.sampled_clients && stamp >= tally.window_start {
                tally.latencies.push(now.saturating_sub(stamp));
            }
        };
        let mut said_goodbye = false;
        match reader {
            Reader::Alerts(frames) => frames.feed(input, |frame| match frame.kind {
                Kind::Message => read_marks(frame.head).into_iter().for_each(&mut count),
                // A socket too full for six bytes belongs to a relay that is gone; its closing is noticed by the read.
                Kind::Ping => drop(stream.write(&pong(frame.head))),
                Kind::Close => said_goodbye = true,
                Kind::Continuation | Kind::Pong => {}
            })?,
            Reader::Nats(protocol) => {
                let answers = protocol.feed(input, count)?;
                if answers > 0 {
                    drop(stream.write(&client_binary(&nats::PONG.repeat(answers))));
                }
            }
        }
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
