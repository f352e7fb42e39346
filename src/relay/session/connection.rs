//! One client's socket: what is on its way through it, and its deadlines.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::protocol::frame::Utf8Bytes;

use crate::backoff::full_jitter;
use crate::relay::metrics::Written;
use crate::relay::session::reader::{Heard, Inbound};
use crate::relay::wire::encoding::text_message;
use crate::relay::wire::frames::PING;
use crate::relay::wire::write_buffer::{MAX_SLICES, Outgoing};
use crate::relay::{CloseCode, Config, Ending};

/// What is read of a socket at once.
const READ_BYTES: usize = 4096;

/// Answers to control frames beyond this are not made until what there is of them is written.
const MAX_ANSWERS: usize = 4096;

/// How long a client has to take in our close frame and to answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A timer that fires later than this tells that this process was stalled, not the client.
const STALL: Duration = Duration::from_millis(500);

/// How long before its token expires a client in rich mode is told.
const WARNING: Duration = Duration::from_mins(1);

/// How often a client in rich mode is told where it stands, if nothing else has told it.
const MARK_INTERVAL: Duration = Duration::from_secs(20);

/// A socket, what is on its way through it, and its deadlines.
///
/// In this order: what every alert touches is together, for with many clients none of it is in the processor's cache.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Link<S> {
    io: S,
    pub(crate) outgoing: Outgoing,
    /// Frames that go out between those of alerts: control frames, and answers to requests.
    answers: Vec<u8>,
    /// Writes of the outgoing bytes so far.
    writes: u64,
    /// Whether everything that was written has left the layers below.
    is_flushed: bool,
    /// Whether the next deadline may be sooner than it was.
    is_hurried: bool,
    /// Since when the socket has taken no bytes.
    blocked_since: Option<Instant>,
    closing: Option<Closing>,
    next_ping: Instant,
    pong_due: Option<Instant>,
    drain_at: Option<Instant>,
    /// When what the client showed expires.
    expires_at: Option<Instant>,
    /// When it is told that this is near, if it wants to know.
    warn_at: Option<Instant>,
    /// When the client is told next where it stands, if it wants to know.
    mark_at: Option<Instant>,
    /// When events that wait for others are written.
    gathered_at: Option<Instant>,
    ping_interval: Duration,
    pong_timeout: Duration,
    write_timeout: Duration,
    inbound: Inbound,
}

/// The way to the end.
#[derive(Debug)]
struct Closing {
    ending: Ending,
    deadline: Instant,
    /// Whether the client has nothing more to say.
    is_answered: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(crate) fn new(io: S, config: &Config) -> Self {
        let now = Instant::now();
        let max_message_bytes = usize::try_from(config.max_message_bytes.as_u64()).unwrap_or(usize::MAX);
        // Clients that came at once, after a restart, should not be pinged at once for ever.
        let next_ping = now + config.ping_interval - full_jitter(config.ping_interval / 2);
        Self {
            io,
            inbound: Inbound::new(max_message_bytes, now),
            answers: Vec::new(),
            outgoing: Outgoing::default(),
            writes: 0,
            blocked_since: None,
            is_flushed: true,
            is_hurried: false,
            next_ping,
            pong_due: None,
            drain_at: None,
            expires_at: None,
            warn_at: None,
            mark_at: None,
            gathered_at: None,
            closing: None,
            ping_interval: config.ping_interval,
            pong_timeout: config.pong_timeout,
            write_timeout: config.write_timeout,
        }
    }

    /// Whether alerts may be added: everything before them is written.
    pub(crate) fn is_hungry(&self) -> bool {
        self.closing.is_none() && self.is_told()
    }

    fn is_told(&self) -> bool {
        self.outgoing.is_empty() && self.answers.is_empty() && self.is_flushed
    }

    /// How the session ends, once there is nothing left to wait for.
    pub(crate) fn ending(&self) -> Option<Ending> {
        let closing = self.closing.as_ref()?;
        let is_done = closing.is_answered && self.is_told();
        (is_done || Instant::now() >= closing.deadline).then_some(closing.ending)
    }

    /// Writes as much as the socket takes; ready once everything is written.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.outgoing.is_empty() {
            // Only here, between whole frames of ours, is there room for control frames.
            self.outgoing.push(Bytes::from(std::mem::take(&mut self.answers)));
        }
        if self.is_told() {
            return Poll::Pending;
        }
        while !self.outgoing.is_empty() {
            let io = Pin::new(&mut self.io);
            // While little happens there is one, and the kernel is quicker with it than with a list of one.
            let result = if let Some(slice) = self.outgoing.only() {
                io.poll_write(cx, slice)
            } else {
                let mut buffers = [IoSlice::new(&[]); MAX_SLICES];
                let count = self.outgoing.fill(&mut buffers);
                io.poll_write_vectored(cx, &buffers[..count])
            };
            match result {
                Poll::Ready(Ok(written)) if written > 0 => {
                    self.outgoing.advance(written);
                    self.writes += 1;
                    self.is_flushed = false;
                    // A socket that takes bytes again has a client that reads: it may answer late.
                    if self.unblocked() && self.pong_due.is_some() {
                        self.pong_due = Some(Instant::now() + self.pong_timeout);
                    }
                }
                Poll::Ready(_) => {
                    self.lose();
                    return Poll::Ready(());
                }
                Poll::Pending => return self.blocked(),
            }
        }
        match Pin::new(&mut self.io).poll_flush(cx) {
            Poll::Ready(Ok(())) => self.is_flushed = true,
            Poll::Ready(Err(_)) => self.lose(),
            Poll::Pending => return self.blocked(),
        }
        self.unblocked();
        Poll::Ready(())
    }

    /// The socket takes something again; says whether it did not before.
    fn unblocked(&mut self) -> bool {
        let was_blocked = self.blocked_since.take().is_some();
        if was_blocked {
            self.is_hurried = true;
        }
        was_blocked
    }

    /// The socket takes nothing more now.
    fn blocked(&mut self) -> Poll<()> {
        self.blocked_since.get_or_insert_with(Instant::now);
        self.is_hurried = true;
        Poll::Pending
    }

    /// Reads what has come; ready when it told something.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Heard, CloseCode>> {
        while self.answers.len() <= MAX_ANSWERS && !self.is_deaf() {
            let mut space = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut space);
            match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    let heard = self.inbound.read(buffer.filled(), &mut self.answers, Instant::now());
                    if heard != Ok(Heard::Nothing) {
                        return Poll::Ready(heard);
                    }
                }
                Poll::Ready(_) => {
                    self.lose();
                    return Poll::Ready(Ok(Heard::Nothing));
                }
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    /// Whether nothing that could still come matters.
    fn is_deaf(&self) -> bool {
        self.closing.as_ref().is_some_and(|closing| closing.is_answered)
    }

    pub(crate) fn hear(&mut self, outcome: Result<Heard, CloseCode>) {
        self.is_hurried = true;
        match outcome {
            Ok(Heard::Nothing) => {}
            Ok(Heard::Alive) => self.pong_due = None,
            Ok(Heard::Closed(code)) => self.answered(Ending::ByPeer(code)),
            Err(code) => self.close(code),
        }
    }

    pub(crate) fn close(&mut self, code: CloseCode) {
        self.close_with(code, code.reason());
    }

    pub(crate) fn close_with(&mut self, code: CloseCode, reason: &str) {
        if self.closing.is_none() {
            self.inbound.close(code, reason, &mut self.answers);
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            self.closing = Some(Closing { ending: Ending::Closed(code), deadline, is_answered: false });
            self.is_hurried = true;
        }
    }

    /// The client has nothing more to say.
    fn answered(&mut self, ending: Ending) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let closing = self.closing.get_or_insert(Closing { ending, deadline, is_answered: true });
        closing.is_answered = true;
        self.is_hurried = true;
    }

    /// The connection is broken: nothing can be told any more.
    fn lose(&mut self) {
        self.answered(Ending::Lost);
        self.outgoing = Outgoing::default();
        self.answers.clear();
        self.is_flushed = true;
    }

    /// The next deadline, if it may be sooner than it was when this was asked last.
    pub(crate) fn take_hurry(&mut self) -> Option<Instant> {
        std::mem::take(&mut self.is_hurried).then(|| self.next_deadline())
    }

    pub(crate) fn next_deadline(&self) -> Instant {
        if let Some(closing) = &self.closing {
            return closing.deadline;
        }
        let ping_or_pong = self.pong_due.unwrap_or(self.next_ping);
        let blocked = self.blocked_since.map(|since| since + self.write_timeout);
        // While the socket takes nothing nothing is told, so that time is not waited for.
        let mark_at = self.mark_at.into_iter().chain(self.gathered_at).min();
        let mark_at = mark_at.filter(|_| self.blocked_since.is_none());
        [blocked, self.drain_at, mark_at, self.expires_at, self.warn_at]
            .into_iter()
            .flatten()
            .fold(ping_or_pong, Instant::min)
    }

    /// Closes the client at that moment, unless it ends before.
    pub(crate) fn drain_at(&mut self, at: Instant) {
        (self.drain_at, self.is_hurried) = (Some(at), true);
    }

    /// Closes the client when what it showed expires, and tells it before that.
    pub(crate) fn expires_at(&mut self, at: Option<Instant>, is_told: bool) {
        self.expires_at = at;
        // Clients that were let in at once, after a restart, should not all come with a new token at once.
        let early = WARNING + full_jitter(WARNING / 4);
        let warn_at = at.map(|at| at.checked_sub(early).unwrap_or_else(Instant::now));
        (self.warn_at, self.is_hurried) = (warn_at.filter(|_| is_told), true);
    }

    /// From now on the client's messages are requests, and it is told from time to time where it stands.
    pub(crate) fn converse(&mut self) {
        self.inbound.keep_requests();
        self.mark_at = Some(Instant::now() + MARK_INTERVAL);
    }

    /// The next message of the client, as long as there is room for its answer.
    pub(crate) fn next_request(&mut self) -> Option<Utf8Bytes> {
        if self.has_room() { self.inbound.next_request() } else { None }
    }

    /// Whether there is room for one more answer.
    pub(crate) fn has_room(&self) -> bool {
        self.closing.is_none() && self.answers.len() <= MAX_ANSWERS
    }

    /// Answers a request: the answer goes out after the alerts that are on their way.
    pub(crate) fn answer(&mut self, text: &str) {
        if self.closing.is_none() {
            self.answers.extend_from_slice(&text_message(text));
        }
    }

    /// Events that wait for others are to be written then.
    pub(crate) fn gathered_at(&mut self, at: Option<Instant>) {
        if at.is_some_and(|at| self.gathered_at.is_none_or(|before| at < before)) {
            self.is_hurried = true;
        }
        self.gathered_at = at;
    }

    /// Whether it is time to tell the client where it stands.
    pub(crate) fn take_mark(&mut self) -> bool {
        let now = Instant::now();
        let is_due = self.mark_at.is_some_and(|at| now >= at) && self.is_hungry();
        if is_due {
            self.mark_at = Some(now + MARK_INTERVAL);
        }
        is_due
    }

    /// Does what is due. `lateness` is how much later than asked the timer has fired.
    pub(crate) fn look_at_the_clock(&mut self, lateness: Duration) {
        if lateness > STALL {
            // Nobody could be heard or written to meanwhile.
            self.pong_due = self.pong_due.map(|due| due + lateness);
            self.blocked_since = self.blocked_since.map(|since| since + lateness);
        }
        let now = Instant::now();
        let is_over = |limit: Option<Instant>| limit.is_some_and(|limit| now >= limit);
        if is_over(self.blocked_since.map(|since| since + self.write_timeout)) {
            self.close(CloseCode::WriteTimeout);
        } else if is_over(self.pong_due) {
            self.close(CloseCode::NoPong);
        } else if is_over(self.expires_at) {
            self.close(CloseCode::Expired);
        } else if is_over(self.drain_at) {
            self.close(CloseCode::GoingAway);
        } else if is_over(self.warn_at) {
            self.warn_at = None;
            let left = self.expires_at.map(|at| at.saturating_duration_since(now)).unwrap_or_default();
            self.answer(&format!(r#"{{"t":"expiring","in":{}}}"#, left.as_secs()));
        } else if self.pong_due.is_none() && now >= self.next_ping && self.closing.is_none() {
            self.answers.extend_from_slice(PING);
            self.pong_due = Some(now + self.pong_timeout);
            self.next_ping = now + self.ping_interval;
        }
    }

    /// What was written since this was asked last.
    pub(crate) fn take_written(&mut self) -> Written {
        Written { writes: std::mem::take(&mut self.writes), ..self.outgoing.take_written() }
    }

    /// Whether the next deadline may be sooner than it was when it was asked for last.
    pub(crate) fn is_hurried(&self) -> bool {
        self.is_hurried
    }

    /// Ends the connection.
    pub(crate) async fn shut_down(&mut self) {
        if let Ok(Err(error)) = tokio::time::timeout(CLOSE_TIMEOUT, self.io.shutdown()).await {
            tracing::trace!(%error, "the socket was closed before");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;

    fn link(buffer: usize) -> (Link<DuplexStream>, DuplexStream) {
        let (ours, theirs) = duplex(buffer);
        (Link::new(ours, &Config::default()), theirs)
    }

    fn ends(link: &Link<DuplexStream>) -> Option<Ending> {
        link.closing.as_ref().map(|closing| closing.ending)
    }

    #[tokio::test(start_paused = true)]
    async fn a_ping_is_sent_when_due_and_its_answer_waited_for() {
        let (mut link, _theirs) = link(1024);
        tokio::time::advance(link.ping_interval).await;
        link.look_at_the_clock(Duration::ZERO);
        assert_eq!(link.answers, PING);
        assert_eq!(link.next_deadline(), Instant::now() + link.pong_timeout);
        link.hear(Ok(Heard::Alive));
        assert_eq!(link.next_deadline(), Instant::now() + link.ping_interval);
        tokio::time::advance(link.ping_interval).await;
        link.look_at_the_clock(Duration::ZERO);
        tokio::time::advance(link.pong_timeout).await;
        link.look_at_the_clock(Duration::ZERO);
        assert_eq!(ends(&link), Some(Ending::Closed(CloseCode::NoPong)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_of_ours_is_not_counted_against_the_client() {
        let (mut link, _theirs) = link(1024);
        link.pong_due = Some(Instant::now() + link.pong_timeout);
        let stall = Duration::from_secs(30);
        tokio::time::advance(link.pong_timeout + stall).await;
        link.look_at_the_clock(stall);
        assert_eq!(ends(&link), Some(Ending::Closed(CloseCode::NoPong)), "late by its own fault");

        let (mut link, _theirs) = self::link(1024);
        link.pong_due = Some(Instant::now() + link.pong_timeout);
        tokio::time::advance(stall).await;
        link.look_at_the_clock(stall);
        assert_eq!(ends(&link), None);
        assert_eq!(link.next_deadline(), Instant::now() + link.pong_timeout, "all of its time is left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_socket_that_takes_nothing_is_given_up_and_one_that_takes_a_little_is_not() {
        let (mut link, mut theirs) = link(16);
        link.outgoing.push(Bytes::from(vec![0; 64]));
        let write = |link: &mut Link<DuplexStream>| {
            link.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready()
        };
        let mut taken = [0; 16];
        for _ in 0..3 {
            assert!(!write(&mut link), "it is blocked");
            tokio::time::advance(link.write_timeout * 9 / 10).await;
            theirs.read_exact(&mut taken).await.expect("there is some");
        }
        assert!(write(&mut link) || link.outgoing.is_empty());
        link.look_at_the_clock(Duration::ZERO);
        assert_eq!(ends(&link), None, "it went on all the time");

        link.outgoing.push(Bytes::from(vec![0; 64]));
        assert!(!write(&mut link));
        tokio::time::advance(link.write_timeout).await;
        link.look_at_the_clock(Duration::ZERO);
        assert_eq!(ends(&link), Some(Ending::Closed(CloseCode::WriteTimeout)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_at_once_changes_no_deadline() {
        let (mut link, _theirs) = link(1024);
        let write = |link: &mut Link<DuplexStream>, bytes| {
            link.outgoing.push(Bytes::from(vec![0; bytes]));
            link.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready()
        };
        assert!(write(&mut link, 64) && !link.is_hurried());
        assert!(!write(&mut link, 2048) && link.is_hurried());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_on_its_way_keeps_nobody_from_being_told_in_time_where_it_stands() {
        let (mut link, _theirs) = link(64);
        link.converse();
        let mark_at = link.mark_at.expect("it is to be told");
        link.next_ping = mark_at + Duration::from_mins(1);
        link.outgoing.push(Bytes::from(vec![0; 64]));
        assert_eq!(link.next_deadline(), mark_at, "it is about to be written");
        let mut write = || link.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready();
        assert!(write());
        link.outgoing.push(Bytes::from(vec![0; 64]));
        assert!(link.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_pending());
        assert!(link.next_deadline() < mark_at, "nothing is told before it is written or has taken too long");
    }

    #[tokio::test(start_paused = true)]
    async fn control_frames_go_out_between_whole_frames_of_ours() {
        let (mut link, mut theirs) = link(4);
        link.outgoing.push(Bytes::from_static(b"\x81\x04abcd"));
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(link.poll_write(&mut context).is_pending());
        link.answers.extend_from_slice(PING);
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).await.expect("the front of the frame");
        assert!(link.poll_write(&mut context).is_ready());
        let mut rest = [0; 2];
        theirs.read_exact(&mut rest).await.expect("the rest of the frame");
        assert_eq!(&rest, b"cd");
        assert!(link.poll_write(&mut context).is_ready());
        theirs.read_exact(&mut rest).await.expect("the ping");
        assert_eq!(rest, PING);
    }
}
