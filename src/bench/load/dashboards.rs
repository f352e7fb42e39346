//! Dashboards that resume: clients of `aurora.v1` by the thousand on one thread.
//!
//! Each remembers the position of the last event it was given, subscribes with it whenever it connects, and knows from
//! the numbers of the events whether one is missing or came twice, over any number of connections.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use tokio::net::TcpSocket;

use super::Percentiles;
use crate::bench::frames::{Frame, FrameReader, Kind, client_text, handshake, must_switch, pong};
use crate::bench::payload::{Clock, read_marks};

/// How many connect at a time: a server's queue of new connections is not endless.
const MAX_OPENING: usize = 256;
/// What the sockets of some dashboards take in when nobody reads, about, in bytes.
const SMALL_BUFFER: u32 = 8 << 10;

/// Where dashboards connect to, and what they subscribe to.
#[derive(Debug, Clone)]
pub(super) struct Board {
    pub(super) address: SocketAddr,
    /// Path and query of the WebSocket.
    pub(super) path: String,
    pub(super) stream: String,
}

/// What dashboards count.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Events, duplicates among them.
    pub(super) events: u64,
    /// Events that had been given before.
    pub(super) duplicates: u64,
    /// Events that were passed over.
    pub(super) missing: u64,
    /// Gaps that were told, and positions that were not recovered.
    pub(super) gaps: u64,
    /// Connections that ended, by close code; `lost` without one, `refused` where none came about.
    pub(super) closes: BTreeMap<String, u64>,
    /// When each connection ended.
    pub(super) ended_at: Vec<Instant>,
    /// Events counted for the latency: those stamped from here on, of the clients from this one on.
    window_start: Option<u64>,
    sampled_from: usize,
    latencies: Vec<u64>,
}

/// All dashboards, on one poll.
#[derive(Debug)]
pub(super) struct Dashboards {
    board: Board,
    /// How an event begins, up to its position.
    event_head: String,
    poll: Poll,
    events: Events,
    all: Vec<Dashboard>,
    /// Those that want to connect.
    waiting: VecDeque<usize>,
    opening: usize,
    /// Whether those whose connection has ended connect again.
    pub(super) do_return: bool,
    buffer: Vec<u8>,
    clock: Clock,
    pub(super) tally: Tally,
}

#[derive(Debug)]
struct Dashboard {
    socket: Socket,
    reader: FrameReader,
    /// The number of the next event.
    next: u64,
    /// The position of the last event; empty before the first.
    position: String,
    is_live: bool,
    is_paused: bool,
    has_small_buffer: bool,
    close_code: Option<u16>,
}

#[derive(Debug)]
enum Socket {
    Away,
    /// On the way to a WebSocket, with what has come of the answer.
    Opening {
        stream: TcpStream,
        is_asked: bool,
        answer: Vec<u8>,
    },
    Open(TcpStream),
}

impl Dashboards {
    /// So many that are not connected, of which the first few have small buffers.
    pub(super) fn new(board: Board, count: usize, small: usize, clock: Clock) -> Result<Self> {
        let dashboard = |index| Dashboard {
            socket: Socket::Away,
            reader: FrameReader::new(),
            next: 0,
            position: String::new(),
            is_live: false,
            is_paused: false,
            has_small_buffer: index < small,
            close_code: None,
        };
        Ok(Self {
            event_head: format!(r#"{{"t":"event","s":"{}","p":""#, board.stream),
            board,
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            all: (0..count).map(dashboard).collect(),
            waiting: VecDeque::new(),
            opening: 0,
            do_return: false,
            buffer: vec![0; 256 << 10],
            clock,
            tally: Tally::default(),
        })
    }

    /// Lets all connect that are not connected.
    pub(super) fn connect(&mut self) {
        self.waiting = (0..self.all.len()).filter(|index| matches!(self.all[*index].socket, Socket::Away)).collect();
    }

    /// Whether all are live: they have subscribed and were given what they had missed.
    pub(super) fn are_live(&self) -> bool {
        self.all.iter().all(|dashboard| dashboard.is_live)
    }

    /// Whether none is connected.
    pub(super) fn are_away(&self) -> bool {
        self.all.iter().all(|dashboard| matches!(dashboard.socket, Socket::Away))
    }

    /// Whether all were given everything before this number.
    pub(super) fn have(&self, next: u64) -> bool {
        self.all.iter().all(|dashboard| dashboard.next >= next)
    }

    /// How many events are still to be given, in all, where this number is the next to be published.
    pub(super) fn behind(&self, next: u64) -> u64 {
        self.all.iter().map(|dashboard| next.saturating_sub(dashboard.next)).sum()
    }

    /// From now on the first `count` do not read.
    pub(super) fn pause(&mut self, count: usize) -> Result<()> {
        for dashboard in self.all.iter_mut().take(count) {
            if let Socket::Open(stream) = &mut dashboard.socket {
                self.poll.registry().deregister(stream)?;
                dashboard.is_paused = true;
            }
        }
        Ok(())
    }

    /// All read again.
    pub(super) fn resume(&mut self) -> Result<()> {
        for (index, dashboard) in self.all.iter_mut().enumerate().filter(|(_, dashboard)| dashboard.is_paused) {
            if let Socket::Open(stream) = &mut dashboard.socket {
                self.poll.registry().register(stream, Token(index), Interest::READABLE)?;
            }
            dashboard.is_paused = false;
        }
        Ok(())
    }

    /// From now on the time from publishing to the dashboards from `first` on is measured.
    pub(super) fn sample(&mut self, first: usize) {
        (self.tally.window_start, self.tally.sampled_from) = (Some(self.clock.nanos()), first);
        self.tally.latencies.clear();
    }

    /// Ends what [`Self::sample`] began.
    pub(super) fn sampled(&mut self) -> Percentiles {
        self.tally.window_start = None;
        Percentiles::of(std::mem::take(&mut self.tally.latencies))
    }

    /// Goes on until `is_done`, at most for `limit`; says whether it is.
    pub(super) fn until(&mut self, limit: Duration, mut is_done: impl FnMut(&Self) -> bool) -> Result<bool> {
        let end = Instant::now() + limit;
        loop {
            self.turn(Duration::from_millis(10))?;
            if is_done(self) {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
        }
    }

    /// Goes on until `is_done`; fails after `limit`.
    pub(super) fn must(&mut self, what: &str, limit: Duration, is_done: impl FnMut(&Self) -> bool) -> Result<()> {
        ensure!(self.until(limit, is_done)?, "{what} did not come about within {} s", limit.as_secs());
        Ok(())
    }

    /// Goes on for a while.
    pub(super) fn run_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)))?;
        }
        Ok(())
    }

    /// Connects those whose turn it is, and takes in what comes within `wait`.
    pub(super) fn turn(&mut self, wait: Duration) -> Result<()> {
        while self.opening < MAX_OPENING
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
        ready.into_iter().try_for_each(|index| self.attend(index))
    }

    fn open(&mut self, index: usize) -> Result<()> {
        let dashboard = &mut self.all[index];
        let stream = if dashboard.has_small_buffer {
            connect_small(self.board.address)
        } else {
            TcpStream::connect(self.board.address)
        };
        // A machine that has no socket left will not have one soon.
        let mut stream = stream.context("a dashboard cannot connect")?;
        self.poll.registry().register(&mut stream, Token(index), Interest::READABLE | Interest::WRITABLE)?;
        dashboard.socket = Socket::Opening { stream, is_asked: false, answer: Vec::new() };
        dashboard.reader = FrameReader::new();
        self.opening += 1;
        Ok(())
    }

    fn attend(&mut self, index: usize) -> Result<()> {
        match &self.all[index].socket {
            Socket::Away => Ok(()),
            Socket::Opening { .. } => self.go_on_opening(index),
            Socket::Open(_) if self.all[index].is_paused => Ok(()),
            Socket::Open(_) => self.read(index),
        }
    }

    fn go_on_opening(&mut self, index: usize) -> Result<()> {
        let Socket::Opening { stream, is_asked, answer } = &mut self.all[index].socket else { return Ok(()) };
        if !*is_asked {
            if matches!(stream.take_error(), Ok(Some(_)) | Err(_)) {
                self.refused(index);
                return Ok(());
            }
            if stream.peer_addr().is_err() {
                return Ok(());
            }
            let request = handshake(self.board.address, &self.board.path);
            match stream.write(&request) {
                Ok(count) if count == request.len() => *is_asked = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.refused(index);
                    return Ok(());
                }
            }
        }
        let end = loop {
            if let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            let mut buffer = [0; 2048];
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => answer.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.refused(index);
                    return Ok(());
                }
            }
        };
        let rest = answer.split_off(end);
        must_switch(str::from_utf8(answer).context("an HTTP head is not text")?)?;
        self.opening -= 1;
        let dashboard = &mut self.all[index];
        let Socket::Opening { mut stream, .. } = std::mem::replace(&mut dashboard.socket, Socket::Away) else {
            return Ok(());
        };
        let since = match &*dashboard.position {
            "" => String::new(),
            position => format!(r#","since":"{position}""#),
        };
        let subscribe = format!(r#"{{"op":"subscribe","id":1,"stream":"{}"{since}}}"#, self.board.stream);
        let is_sent = stream.write_all(&client_text(subscribe.as_bytes())).is_ok();
        dashboard.socket = Socket::Open(stream);
        if !is_sent {
            self.ended(index);
            return Ok(());
        }
        self.take(index, &rest)?;
        self.read(index)
    }

    fn read(&mut self, index: usize) -> Result<()> {
        // Taken out, so that what was read and the dashboard can be used at once.
        let mut buffer = std::mem::take(&mut self.buffer);
        let outcome = loop {
            let Socket::Open(stream) = &mut self.all[index].socket else { break Ok(()) };
            match stream.read(&mut buffer) {
                Ok(count @ 1..) => {
                    if let Err(error) = self.take(index, &buffer[..count]) {
                        break Err(error);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break Ok(()),
                _ => {
                    self.ended(index);
                    break Ok(());
                }
            }
        };
        self.buffer = buffer;
        outcome
    }

    fn take(&mut self, index: usize, input: &[u8]) -> Result<()> {
        let now = self.clock.nanos();
        let Self { all, tally, event_head, .. } = self;
        let dashboard = &mut all[index];
        let Dashboard { socket, reader, next, position, is_live, close_code, .. } = dashboard;
        let Socket::Open(stream) = socket else { return Ok(()) };
        let mut outcome = Ok(());
        reader.feed(input, |Frame { kind, head }| match kind {
            Kind::Message => match understand(head, event_head) {
                Ok(Said::Event { sequence, stamp, at }) => {
                    position.clear();
                    position.push_str(at);
                    tally.events += 1;
                    tally.duplicates += u64::from(sequence < *next);
                    tally.missing += sequence.saturating_sub(*next);
                    *next = (*next).max(sequence + 1);
                    if index >= tally.sampled_from && tally.window_start.is_some_and(|start| stamp >= start) {
                        tally.latencies.push(now.saturating_sub(stamp));
                    }
                }
                Ok(Said::Live) => *is_live = true,
                Ok(Said::Gap) => tally.gaps += 1,
                Ok(Said::Other) => {}
                Err(error) => outcome = Err(error),
            },
            // A socket too full for six bytes belongs to a relay that is gone; its closing is noticed by the read.
            Kind::Ping => drop(stream.write(&pong(head))),
            Kind::Close => *close_code = head.first_chunk().map(|code| u16::from_be_bytes(*code)),
            Kind::Continuation | Kind::Pong => {}
        })?;
        outcome?;
        if dashboard.close_code.is_some() {
            self.ended(index);
        }
        Ok(())
    }

    /// A connection did not come about: the dashboard tries again.
    fn refused(&mut self, index: usize) {
        *self.tally.closes.entry("refused".to_owned()).or_default() += 1;
        self.all[index].socket = Socket::Away;
        self.opening -= 1;
        self.waiting.push_back(index);
    }

    fn ended(&mut self, index: usize) {
        let dashboard = &mut self.all[index];
        let code = dashboard.close_code.take().map_or_else(|| "lost".to_owned(), |code| code.to_string());
        *self.tally.closes.entry(code).or_default() += 1;
        self.tally.ended_at.push(Instant::now());
        (dashboard.socket, dashboard.is_live) = (Socket::Away, false);
        if self.do_return {
            self.waiting.push_back(index);
        }
    }
}

/// What a message of the relay says.
enum Said<'a> {
    Event { sequence: u64, stamp: u64, at: &'a str },
    Live,
    Gap,
    Other,
}

fn understand<'a>(head: &'a [u8], event_head: &str) -> Result<Said<'a>> {
    if let Some(rest) = head.strip_prefix(event_head.as_bytes()) {
        let end = rest.iter().position(|byte| *byte == b'"').context("an event's position has no end")?;
        let at = str::from_utf8(&rest[..end]).context("a position is not text")?;
        let payload = rest[end..].strip_prefix(br#"","d":"#).context("an event has no payload")?;
        let (sequence, stamp) = read_marks(payload).context("an event has no marks")?;
        return Ok(Said::Event { sequence, stamp, at });
    }
    Ok(match head {
        _ if head.starts_with(br#"{"t":"live""#) => Said::Live,
        _ if head.starts_with(br#"{"t":"gap""#) => Said::Gap,
        _ if head.starts_with(br#"{"t":"error""#) => {
            bail!("the relay answered a dashboard: {}", String::from_utf8_lossy(head))
        }
        _ => Said::Other,
    })
}

/// A connection whose receive buffer is small, so that the other side soon notices when nobody reads.
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
    use crate::bench::payload::Template;

    #[test]
    fn an_event_of_the_relay_tells_its_marks_and_its_position() {
        let payload = String::from_utf8(Template::new(400).bytes(7, 9)).unwrap();
        let text = format!(r#"{{"t":"event","s":"aurora:alerts","p":"0123abcd:1741076109120-1234567","d":{payload}}}"#);
        let head = &text.as_bytes()[..192];
        let Ok(Said::Event { sequence, stamp, at }) = understand(head, r#"{"t":"event","s":"aurora:alerts","p":""#)
        else {
            panic!("not understood: {text}")
        };
        assert_eq!((sequence, stamp, at), (7, 9, "0123abcd:1741076109120-1234567"));
        assert!(matches!(understand(br#"{"t":"gap","s":"x"}"#, "x"), Ok(Said::Gap)));
        assert!(understand(br#"{"t":"error","code":422}"#, "x").is_err());
    }
}
