//! Thousands of dashboards on one thread that resume after each connection.
//!
//! Each dashboard keeps the position of its last event and subscribes from it on. The numbers of the events show
//! missing events and duplicates over any number of connections.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use tokio::net::TcpSocket;

use super::centrifugo::{self, CentrifugoMessage, CentrifugoReader};
use super::endpoint::{FleetEndpoint, FleetProtocol};
use crate::clock::StampClock;
use crate::payload::{Marks, read_marks};
use crate::stats::Percentiles;
use crate::websocket::{Frame, FrameKind, FrameReader, client_text, ensure_upgraded, handshake, pong};

/// The number of concurrent handshakes, which must fit the accept queue of the server.
const MAX_CONNECTING: usize = 256;
/// The approximate receive buffer of dashboards that stop reading, in bytes.
const SMALL_BUFFER: u32 = 8 << 10;

/// The counters of all dashboards.
#[derive(Debug, Default)]
pub(super) struct FleetCounters {
    /// Received events, including duplicates.
    pub(super) events: u64,
    /// Events received a second time.
    pub(super) duplicates: u64,
    /// Events that were skipped.
    pub(super) missing: u64,
    /// Gaps that the server reported.
    pub(super) gaps: u64,
    /// Ended connections by close code; `lost` without a code, `refused` if the connection failed.
    pub(super) closes: BTreeMap<String, u64>,
    /// The time when each connection ended.
    pub(super) ended_at: Vec<Instant>,
    /// Latencies are recorded of events stamped from here on, at all dashboards but the first `unsampled`.
    window_start: Option<u64>,
    unsampled: usize,
    latencies: Vec<u64>,
}

impl FleetCounters {
    fn count(&mut self, Marks { sequence, stamp }: Marks, next: &mut u64, index: usize, now: u64) {
        self.events += 1;
        self.duplicates += u64::from(sequence < *next);
        self.missing += sequence.saturating_sub(*next);
        *next = (*next).max(sequence + 1);
        if index >= self.unsampled && self.window_start.is_some_and(|start| stamp >= start) {
            self.latencies.push(now.saturating_sub(stamp));
        }
    }
}

/// All dashboards, on one poll.
#[derive(Debug)]
pub(super) struct DashboardFleet {
    endpoint: FleetEndpoint,
    poll: Poll,
    events: Events,
    dashboards: Vec<Dashboard>,
    /// Dashboards that wait to connect.
    waiting: VecDeque<usize>,
    connecting: usize,
    /// Whether dashboards reconnect when their connection ends.
    pub(super) reconnects: bool,
    buffer: Vec<u8>,
    clock: StampClock,
    pub(super) counters: FleetCounters,
}

#[derive(Debug)]
struct Dashboard {
    socket: DashboardSocket,
    reader: MessageReader,
    /// The number of the next event.
    next: u64,
    /// The position of the last event, or the epoch of Centrifugo's channel. Empty until it is known.
    position: String,
    is_live: bool,
    is_paused: bool,
    has_small_buffer: bool,
    /// The close code, if the server has sent one.
    close_code: Option<u16>,
}

#[derive(Debug)]
enum DashboardSocket {
    Disconnected,
    /// Within the handshake, with the bytes of the response so far.
    Connecting {
        stream: TcpStream,
        is_requested: bool,
        response: Vec<u8>,
    },
    Open(TcpStream),
}

/// Finds the messages in the bytes of one connection.
#[derive(Debug)]
enum MessageReader {
    Aurora {
        frames: FrameReader,
        /// The text of an event message up to its position.
        event_prefix: Box<str>,
    },
    Centrifugo(CentrifugoReader),
}

impl DashboardFleet {
    /// Creates `count` dashboards that are not connected, the first `small` of them with small buffers.
    pub(super) fn new(endpoint: FleetEndpoint, count: usize, small: usize, clock: StampClock) -> Result<Self> {
        let dashboard = |index| Dashboard {
            socket: DashboardSocket::Disconnected,
            reader: MessageReader::new(&endpoint.protocol),
            next: 0,
            position: String::new(),
            is_live: false,
            is_paused: false,
            has_small_buffer: index < small,
            close_code: None,
        };
        Ok(Self {
            dashboards: (0..count).map(dashboard).collect(),
            endpoint,
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            waiting: VecDeque::new(),
            connecting: 0,
            reconnects: false,
            buffer: vec![0; 256 << 10],
            clock,
            counters: FleetCounters::default(),
        })
    }

    /// Starts to connect all disconnected dashboards.
    pub(super) fn connect(&mut self) {
        let is_disconnected = |index: &usize| matches!(self.dashboards[*index].socket, DashboardSocket::Disconnected);
        self.waiting = (0..self.dashboards.len()).filter(is_disconnected).collect();
    }

    /// Returns whether all dashboards are subscribed and have received the events that they had missed.
    pub(super) fn are_live(&self) -> bool {
        self.dashboards.iter().all(|dashboard| dashboard.is_live)
    }

    /// Returns whether no dashboard is connected.
    pub(super) fn are_disconnected(&self) -> bool {
        self.dashboards.iter().all(|dashboard| matches!(dashboard.socket, DashboardSocket::Disconnected))
    }

    /// Returns whether all dashboards have received all events before the number `next`.
    pub(super) fn have_received(&self, next: u64) -> bool {
        self.dashboards.iter().all(|dashboard| dashboard.next >= next)
    }

    /// Returns the number of events before `next` that dashboards have not received, in total.
    pub(super) fn lag(&self, next: u64) -> u64 {
        self.dashboards.iter().map(|dashboard| next.saturating_sub(dashboard.next)).sum()
    }

    /// Stops reading at the first `count` dashboards.
    pub(super) fn pause(&mut self, count: usize) -> Result<()> {
        for dashboard in self.dashboards.iter_mut().take(count) {
            if let DashboardSocket::Open(stream) = &mut dashboard.socket {
                self.poll.registry().deregister(stream)?;
                dashboard.is_paused = true;
            }
        }
        Ok(())
    }

    /// Resumes reading at all dashboards.
    pub(super) fn resume(&mut self) -> Result<()> {
        for (index, dashboard) in self.dashboards.iter_mut().enumerate().filter(|(_, dashboard)| dashboard.is_paused) {
            if let DashboardSocket::Open(stream) = &mut dashboard.socket {
                self.poll.registry().register(stream, Token(index), Interest::READABLE)?;
            }
            dashboard.is_paused = false;
        }
        Ok(())
    }

    /// Starts to record latencies at all dashboards but the first `unsampled`.
    pub(super) fn start_sampling(&mut self, unsampled: usize) {
        (self.counters.window_start, self.counters.unsampled) = (Some(self.clock.nanos()), unsampled);
        self.counters.latencies.clear();
    }

    /// Ends the recording of latencies and returns their percentiles.
    pub(super) fn end_sampling(&mut self) -> Percentiles {
        self.counters.window_start = None;
        Percentiles::of(std::mem::take(&mut self.counters.latencies))
    }

    /// Runs until `is_done`, at most for `limit`; returns whether it is done.
    pub(super) fn run_until(&mut self, limit: Duration, mut is_done: impl FnMut(&Self) -> bool) -> Result<bool> {
        let end = Instant::now() + limit;
        loop {
            self.poll_once(Duration::from_millis(10))?;
            if is_done(self) {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
        }
    }

    /// Runs until `is_done`; fails after `limit`.
    pub(super) fn require(&mut self, state: &str, limit: Duration, is_done: impl FnMut(&Self) -> bool) -> Result<()> {
        ensure!(self.run_until(limit, is_done)?, "{state}: not reached within {} s", limit.as_secs());
        Ok(())
    }

    /// Runs for a while.
    pub(super) fn run_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.poll_once(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)))?;
        }
        Ok(())
    }

    /// Connects waiting dashboards and receives for at most `wait`.
    pub(super) fn poll_once(&mut self, wait: Duration) -> Result<()> {
        while self.connecting < MAX_CONNECTING
            && let Some(index) = self.waiting.pop_front()
        {
            self.open(index)?;
        }
        if let Err(error) = self.poll.poll(&mut self.events, Some(wait))
            && error.kind() != ErrorKind::Interrupted
        {
            return Err(error).context("cannot wait for frames");
        }
        let ready: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
        ready.into_iter().try_for_each(|index| self.on_ready(index))
    }

    fn open(&mut self, index: usize) -> Result<()> {
        let dashboard = &mut self.dashboards[index];
        let stream = if dashboard.has_small_buffer {
            connect_small(self.endpoint.address)
        } else {
            TcpStream::connect(self.endpoint.address)
        };
        // Not retried: a machine without free sockets stays without them.
        let mut stream = stream.context("a dashboard cannot connect")?;
        self.poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        dashboard.socket = DashboardSocket::Connecting { stream, is_requested: false, response: Vec::new() };
        dashboard.reader = MessageReader::new(&self.endpoint.protocol);
        self.connecting += 1;
        Ok(())
    }

    fn on_ready(&mut self, index: usize) -> Result<()> {
        match &self.dashboards[index].socket {
            DashboardSocket::Disconnected => Ok(()),
            DashboardSocket::Connecting { .. } => self.continue_handshake(index),
            DashboardSocket::Open(_) if self.dashboards[index].is_paused => Ok(()),
            DashboardSocket::Open(_) => self.read(index),
        }
    }

    fn continue_handshake(&mut self, index: usize) -> Result<()> {
        let DashboardSocket::Connecting { stream, is_requested, response } = &mut self.dashboards[index].socket else {
            return Ok(());
        };
        if !*is_requested {
            if matches!(stream.take_error(), Ok(Some(_)) | Err(_)) {
                self.on_refused(index);
                return Ok(());
            }
            if stream.peer_addr().is_err() {
                return Ok(());
            }
            let request = handshake(self.endpoint.address, &self.endpoint.path);
            match stream.write(&request) {
                Ok(count) if count == request.len() => *is_requested = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.on_refused(index);
                    return Ok(());
                }
            }
        }
        let end = loop {
            if let Some(end) = response.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            let mut buffer = [0; 2048];
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => response.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.on_refused(index);
                    return Ok(());
                }
            }
        };
        let rest = response.split_off(end);
        ensure_upgraded(str::from_utf8(response).context("an HTTP head is not UTF-8")?)?;
        self.connecting -= 1;
        let dashboard = &mut self.dashboards[index];
        let socket = std::mem::replace(&mut dashboard.socket, DashboardSocket::Disconnected);
        let DashboardSocket::Connecting { mut stream, .. } = socket else { return Ok(()) };
        let subscribe = subscribe(&self.endpoint.protocol, &dashboard.position, dashboard.next);
        let is_sent = stream.write_all(&client_text(&subscribe)).is_ok();
        dashboard.socket = DashboardSocket::Open(stream);
        if !is_sent {
            self.on_ended(index);
            return Ok(());
        }
        self.take(index, &rest)?;
        self.read(index)
    }

    fn read(&mut self, index: usize) -> Result<()> {
        // Taken out of `self`, so that `take` can borrow the rest.
        let mut buffer = std::mem::take(&mut self.buffer);
        let outcome = loop {
            let DashboardSocket::Open(stream) = &mut self.dashboards[index].socket else { break Ok(()) };
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => {
                    if let Err(error) = self.take(index, &buffer[..count]) {
                        break Err(error);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                _ => {
                    self.on_ended(index);
                    break Ok(());
                }
            }
        };
        self.buffer = buffer;
        outcome
    }

    fn take(&mut self, index: usize, input: &[u8]) -> Result<()> {
        let now = self.clock.nanos();
        let Self { dashboards, counters, .. } = self;
        let Dashboard { socket, reader, next, position, is_live, close_code, .. } = &mut dashboards[index];
        let DashboardSocket::Open(stream) = socket else { return Ok(()) };
        // The result of writing a pong is ignored: if the socket has no room for it, the next read notices the end.
        match reader {
            MessageReader::Aurora { frames, event_prefix } => {
                let mut outcome = Ok(());
                frames.feed(input, |Frame { kind, head }| match kind {
                    FrameKind::Message => match parse_message(head, event_prefix) {
                        Ok(ServerMessage::Event { marks, at }) => {
                            position.clear();
                            position.push_str(at);
                            counters.count(marks, next, index, now);
                        }
                        Ok(ServerMessage::Live) => *is_live = true,
                        Ok(ServerMessage::Gap) => counters.gaps += 1,
                        Ok(ServerMessage::Other) => {}
                        Err(error) => outcome = Err(error),
                    },
                    FrameKind::Ping => drop(stream.write(&pong(head))),
                    FrameKind::Close => *close_code = head.first_chunk().map(|code| u16::from_be_bytes(*code)),
                    FrameKind::Continuation | FrameKind::Pong => {}
                })?;
                outcome?;
            }
            MessageReader::Centrifugo(messages) => messages.feed(input, |message| match message {
                CentrifugoMessage::Event(marks) => counters.count(marks, next, index, now),
                CentrifugoMessage::Subscribed { epoch } => {
                    *is_live = true;
                    position.clear();
                    position.push_str(epoch);
                }
                CentrifugoMessage::Ping => drop(stream.write(&client_text(centrifugo::PONG))),
                CentrifugoMessage::Closed(code) => *close_code = code,
            })?,
        }
        if close_code.is_some() {
            self.on_ended(index);
        }
        Ok(())
    }

    /// Counts a failed connection and tries again.
    fn on_refused(&mut self, index: usize) {
        *self.counters.closes.entry("refused".to_owned()).or_default() += 1;
        self.dashboards[index].socket = DashboardSocket::Disconnected;
        self.connecting -= 1;
        self.waiting.push_back(index);
    }

    fn on_ended(&mut self, index: usize) {
        let dashboard = &mut self.dashboards[index];
        let code = dashboard.close_code.take().map_or_else(|| "lost".to_owned(), |code| code.to_string());
        *self.counters.closes.entry(code).or_default() += 1;
        self.counters.ended_at.push(Instant::now());
        (dashboard.socket, dashboard.is_live) = (DashboardSocket::Disconnected, false);
        if self.reconnects {
            self.waiting.push_back(index);
        }
    }
}

impl MessageReader {
    fn new(protocol: &FleetProtocol) -> Self {
        match protocol {
            FleetProtocol::Aurora { stream } => {
                let event_prefix = format!(r#"{{"t":"event","s":"{stream}","p":""#).into();
                Self::Aurora { frames: FrameReader::new(), event_prefix }
            }
            FleetProtocol::Centrifugo { .. } => Self::Centrifugo(CentrifugoReader::new()),
        }
    }
}

/// Returns the message that subscribes, from the position on if there is one.
fn subscribe(protocol: &FleetProtocol, position: &str, next: u64) -> Vec<u8> {
    match protocol {
        FleetProtocol::Aurora { stream } => {
            let since = if position.is_empty() { String::new() } else { format!(r#","since":"{position}""#) };
            format!(r#"{{"op":"subscribe","id":1,"stream":"{stream}"{since}}}"#).into_bytes()
        }
        // Offsets of a new channel start at 1, and the numbers of its events at 0.
        FleetProtocol::Centrifugo { channel } => {
            centrifugo::subscribe(channel, (!position.is_empty()).then_some((position, next)))
        }
    }
}

/// A message of the aurora.v1 protocol.
enum ServerMessage<'a> {
    Event { marks: Marks, at: &'a str },
    Live,
    Gap,
    Other,
}

fn parse_message<'a>(head: &'a [u8], event_prefix: &str) -> Result<ServerMessage<'a>> {
    if let Some(rest) = head.strip_prefix(event_prefix.as_bytes()) {
        let end = rest.iter().position(|byte| *byte == b'"').context("the position of an event has no end")?;
        let at = str::from_utf8(&rest[..end]).context("a position is not UTF-8")?;
        let payload = rest[end..].strip_prefix(br#"","d":"#).context("an event has no payload")?;
        let marks = read_marks(payload).context("an event has no marks")?;
        return Ok(ServerMessage::Event { marks, at });
    }
    Ok(match head {
        _ if head.starts_with(br#"{"t":"live""#) => ServerMessage::Live,
        _ if head.starts_with(br#"{"t":"gap""#) => ServerMessage::Gap,
        _ if head.starts_with(br#"{"t":"error""#) => {
            bail!("the relay returned an error: {}", String::from_utf8_lossy(head))
        }
        _ => ServerMessage::Other,
    })
}

/// Connects with a small receive buffer, so that the server soon notices a client that does not read.
fn connect_small(address: SocketAddr) -> std::io::Result<TcpStream> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let stream = runtime.block_on(async {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(SMALL_BUFFER)?;
        socket.connect(address).await?.into_std()
    })?;
    Ok(TcpStream::from_std(stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::EventTemplate;

    #[test]
    fn event_message_has_marks_and_position() {
        let payload = String::from_utf8(EventTemplate::new(400).bytes(7, 9)).unwrap();
        let text = format!(r#"{{"t":"event","s":"aurora:alerts","p":"0123abcd:1741076109120-1234567","d":{payload}}}"#);
        let head = &text.as_bytes()[..192];
        let Ok(ServerMessage::Event { marks, at }) = parse_message(head, r#"{"t":"event","s":"aurora:alerts","p":""#)
        else {
            panic!("not parsed: {text}")
        };
        assert_eq!((marks, at), (Marks { sequence: 7, stamp: 9 }, "0123abcd:1741076109120-1234567"));
        assert!(matches!(parse_message(br#"{"t":"gap","s":"x"}"#, "x"), Ok(ServerMessage::Gap)));
        assert!(parse_message(br#"{"t":"error","code":422}"#, "x").is_err());
    }
}
