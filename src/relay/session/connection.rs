//! The socket of one client, with its buffers and deadlines.

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
use crate::relay::config::Config;
use crate::relay::metrics::WriteStats;
use crate::relay::session::close::{CloseCode, SessionEnd};
use crate::relay::session::reader::{InboundEvent, InboundReader};
use crate::relay::wire::encoding::text_message;
use crate::relay::wire::frames::PING;
use crate::relay::wire::write_buffer::{MAX_SLICES, WriteBuffer};

/// The size of one read from the socket.
const READ_BYTES: usize = 4096;

/// The size of waiting replies above which no more requests are read.
const MAX_REPLY_BYTES: usize = 4096;

/// The time in which a client must receive our close frame and answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A timer that fires later than this shows that this process was stalled, not the client.
const STALL: Duration = Duration::from_millis(500);

/// The time between the warning and the expiry of a token, in rich mode.
const EXPIRY_WARNING: Duration = Duration::from_mins(1);

/// The interval between marks in rich mode, if no event has carried a position.
const MARK_INTERVAL: Duration = Duration::from_secs(20);

/// The socket of a client, with its buffers and deadlines.
///
/// Keep this order of fields, and `repr(C)`: every alert touches the first ones. With many clients none of them is in
/// the processor's cache, so they must be close together.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct ClientConnection<S> {
    io: S,
    pub(crate) output: WriteBuffer,
    /// Frames that go out between the frames of alerts: control frames and replies to requests.
    replies: Vec<u8>,
    /// The number of writes to the socket.
    writes: u64,
    /// Whether the layers below have flushed all written bytes.
    is_flushed: bool,
    /// Whether the next deadline may be earlier than the timer's.
    deadline_changed: bool,
    /// The time since which the socket accepts no bytes.
    blocked_since: Option<Instant>,
    closing: Option<Closing>,
    next_ping: Instant,
    pong_due: Option<Instant>,
    drain_at: Option<Instant>,
    /// The time at which the client's credentials expire.
    expires_at: Option<Instant>,
    /// The time of the warning before that, if the client wants one.
    warn_at: Option<Instant>,
    /// The time of the next mark, if the client wants marks.
    mark_at: Option<Instant>,
    /// The time at which a batch of events must be written.
    batch_flush_at: Option<Instant>,
    ping_interval: Duration,
    pong_timeout: Duration,
    write_timeout: Duration,
    inbound: InboundReader,
}

/// The closing handshake in progress.
#[derive(Debug)]
struct Closing {
    end: SessionEnd,
    deadline: Instant,
    /// Whether the client will send nothing more.
    is_peer_done: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientConnection<S> {
    pub(crate) fn new(io: S, config: &Config) -> Self {
        let now = Instant::now();
        let max_message_bytes = usize::try_from(config.max_message_bytes.as_u64()).unwrap_or(usize::MAX);
        // Clients that connected together, after a restart, should not be pinged together for ever.
        let next_ping = now + config.ping_interval - full_jitter(config.ping_interval / 2);
        Self {
            io,
            inbound: InboundReader::new(max_message_bytes, now),
            replies: Vec::new(),
            output: WriteBuffer::default(),
            writes: 0,
            blocked_since: None,
            is_flushed: true,
            deadline_changed: false,
            next_ping,
            pong_due: None,
            drain_at: None,
            expires_at: None,
            warn_at: None,
            mark_at: None,
            batch_flush_at: None,
            closing: None,
            ping_interval: config.ping_interval,
            pong_timeout: config.pong_timeout,
            write_timeout: config.write_timeout,
        }
    }

    /// Returns whether alerts may be added: everything before them is written.
    pub(crate) fn can_accept(&self) -> bool {
        self.closing.is_none() && self.is_written()
    }

    fn is_written(&self) -> bool {
        self.output.is_empty() && self.replies.is_empty() && self.is_flushed
    }

    /// Returns how the session ends, or `None` if it must wait for the client.
    pub(crate) fn session_end(&self) -> Option<SessionEnd> {
        let closing = self.closing.as_ref()?;
        let is_done = closing.is_peer_done && self.is_written();
        (is_done || Instant::now() >= closing.deadline).then_some(closing.end)
    }

    /// Writes as much as the socket accepts. Ready when everything is written.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.output.is_empty() {
            // Only here, between whole frames, is there room for control frames.
            self.output.push(Bytes::from(std::mem::take(&mut self.replies)));
        }
        if self.is_written() {
            return Poll::Pending;
        }
        while !self.output.is_empty() {
            let io = Pin::new(&mut self.io);
            // At low rates there is one slice, and a plain write of it is faster than a vectored one.
            let result = if let Some(slice) = self.output.single_slice() {
                io.poll_write(cx, slice)
            } else {
                let mut buffers = [IoSlice::new(&[]); MAX_SLICES];
                let count = self.output.fill_slices(&mut buffers);
                io.poll_write_vectored(cx, &buffers[..count])
            };
            match result {
                Poll::Ready(Ok(written)) if written > 0 => {
                    self.output.advance(written);
                    self.writes += 1;
                    self.is_flushed = false;
                    // A client whose socket accepts bytes again does read: its pong may be late.
                    if self.on_unblocked() && self.pong_due.is_some() {
                        self.pong_due = Some(Instant::now() + self.pong_timeout);
                    }
                }
                Poll::Ready(_) => {
                    self.mark_broken();
                    return Poll::Ready(());
                }
                Poll::Pending => return self.on_blocked(),
            }
        }
        match Pin::new(&mut self.io).poll_flush(cx) {
            Poll::Ready(Ok(())) => self.is_flushed = true,
            Poll::Ready(Err(_)) => self.mark_broken(),
            Poll::Pending => return self.on_blocked(),
        }
        self.on_unblocked();
        Poll::Ready(())
    }

    /// Notes that the socket accepts bytes. Returns whether it did not before.
    fn on_unblocked(&mut self) -> bool {
        let was_blocked = self.blocked_since.take().is_some();
        if was_blocked {
            self.deadline_changed = true;
        }
        was_blocked
    }

    /// Notes that the socket accepts no more bytes now.
    fn on_blocked(&mut self) -> Poll<()> {
        self.blocked_since.get_or_insert_with(Instant::now);
        self.deadline_changed = true;
        Poll::Pending
    }

    /// Reads from the socket. Ready if that resulted in an event.
    pub(crate) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<InboundEvent, CloseCode>> {
        while self.replies.len() <= MAX_REPLY_BYTES && !self.is_read_closed() {
            let mut space = [MaybeUninit::uninit(); READ_BYTES];
            let mut buffer = ReadBuf::uninit(&mut space);
            match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    let event = self.inbound.read(buffer.filled(), &mut self.replies, Instant::now());
                    if event != Ok(InboundEvent::Nothing) {
                        return Poll::Ready(event);
                    }
                }
                Poll::Ready(_) => {
                    self.mark_broken();
                    return Poll::Ready(Ok(InboundEvent::Nothing));
                }
                Poll::Pending => break,
            }
        }
        Poll::Pending
    }

    /// Returns whether nothing more can come from the client.
    fn is_read_closed(&self) -> bool {
        self.closing.as_ref().is_some_and(|closing| closing.is_peer_done)
    }

    pub(crate) fn on_inbound(&mut self, outcome: Result<InboundEvent, CloseCode>) {
        self.deadline_changed = true;
        match outcome {
            Ok(InboundEvent::Nothing) => {}
            Ok(InboundEvent::Alive) => self.pong_due = None,
            Ok(InboundEvent::Closed(code)) => self.on_peer_closed(SessionEnd::ByPeer(code)),
            Err(code) => self.close(code),
        }
    }

    pub(crate) fn close(&mut self, code: CloseCode) {
        self.close_with(code, code.reason());
    }

    pub(crate) fn close_with(&mut self, code: CloseCode, reason: &str) {
        if self.closing.is_none() {
            self.inbound.close(code, reason, &mut self.replies);
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            self.closing = Some(Closing { end: SessionEnd::Closed(code), deadline, is_peer_done: false });
            self.deadline_changed = true;
        }
    }

    /// Notes that the client will send nothing more.
    fn on_peer_closed(&mut self, end: SessionEnd) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let closing = self.closing.get_or_insert(Closing { end, deadline, is_peer_done: true });
        closing.is_peer_done = true;
        self.deadline_changed = true;
    }

    /// Notes that the connection is broken, and drops all waiting bytes.
    fn mark_broken(&mut self) {
        self.on_peer_closed(SessionEnd::Lost);
        self.output = WriteBuffer::default();
        self.replies.clear();
        self.is_flushed = true;
    }

    /// Returns the next deadline if it may be earlier than it was at the last call.
    pub(crate) fn take_changed_deadline(&mut self) -> Option<Instant> {
        std::mem::take(&mut self.deadline_changed).then(|| self.next_deadline())
    }

    pub(crate) fn next_deadline(&self) -> Instant {
        if let Some(closing) = &self.closing {
            return closing.deadline;
        }
        let ping_or_pong = self.pong_due.unwrap_or(self.next_ping);
        let blocked = self.blocked_since.map(|since| since + self.write_timeout);
        // While the socket accepts nothing, no mark or batch can be written, so their time does not count.
        let mark_at = self.mark_at.into_iter().chain(self.batch_flush_at).min();
        let mark_at = mark_at.filter(|_| self.blocked_since.is_none());
        [blocked, self.drain_at, mark_at, self.expires_at, self.warn_at]
            .into_iter()
            .flatten()
            .fold(ping_or_pong, Instant::min)
    }

    /// Closes the client at that time, unless it ends before.
    pub(crate) fn set_drain_at(&mut self, at: Instant) {
        (self.drain_at, self.deadline_changed) = (Some(at), true);
    }

    /// Closes the client when its credentials expire, with a warning before if `is_warned`.
    pub(crate) fn set_expires_at(&mut self, at: Option<Instant>, is_warned: bool) {
        self.expires_at = at;
        // Clients that connected together, after a restart, should not all send new tokens together.
        let early = EXPIRY_WARNING + full_jitter(EXPIRY_WARNING / 4);
        let warn_at = at.map(|at| at.checked_sub(early).unwrap_or_else(Instant::now));
        (self.warn_at, self.deadline_changed) = (warn_at.filter(|_| is_warned), true);
    }

    /// Treats the client's messages as requests from now on, and sends marks.
    pub(crate) fn enable_requests(&mut self) {
        self.inbound.keep_requests();
        self.mark_at = Some(Instant::now() + MARK_INTERVAL);
    }

    /// Returns the next request of the client, if there is room for its reply.
    pub(crate) fn next_request(&mut self) -> Option<Utf8Bytes> {
        if self.can_reply() { self.inbound.next_request() } else { None }
    }

    /// Returns whether there is room for one more reply.
    pub(crate) fn can_reply(&self) -> bool {
        self.closing.is_none() && self.replies.len() <= MAX_REPLY_BYTES
    }

    /// Adds a reply to a request. It goes out after the alerts that are being written.
    pub(crate) fn reply(&mut self, text: &str) {
        if self.closing.is_none() {
            self.replies.extend_from_slice(&text_message(text));
        }
    }

    /// Sets the time at which a batch of events must be written.
    pub(crate) fn set_batch_flush(&mut self, at: Option<Instant>) {
        if at.is_some_and(|at| self.batch_flush_at.is_none_or(|before| at < before)) {
            self.deadline_changed = true;
        }
        self.batch_flush_at = at;
    }

    /// Returns whether a mark is due, and sets the time of the next one.
    pub(crate) fn take_due_mark(&mut self) -> bool {
        let now = Instant::now();
        let is_due = self.mark_at.is_some_and(|at| now >= at) && self.can_accept();
        if is_due {
            self.mark_at = Some(now + MARK_INTERVAL);
        }
        is_due
    }

    /// Handles due deadlines. `lateness` is the delay with which the timer has fired.
    pub(crate) fn check_deadlines(&mut self, lateness: Duration) {
        if lateness > STALL {
            // Nothing could be read or written during the stall.
            self.pong_due = self.pong_due.map(|due| due + lateness);
            self.blocked_since = self.blocked_since.map(|since| since + lateness);
        }
        let now = Instant::now();
        let is_past = |limit: Option<Instant>| limit.is_some_and(|limit| now >= limit);
        if is_past(self.blocked_since.map(|since| since + self.write_timeout)) {
            self.close(CloseCode::WriteTimeout);
        } else if is_past(self.pong_due) {
            self.close(CloseCode::NoPong);
        } else if is_past(self.expires_at) {
            self.close(CloseCode::Expired);
        } else if is_past(self.drain_at) {
            self.close(CloseCode::GoingAway);
        } else if is_past(self.warn_at) {
            self.warn_at = None;
            let left = self.expires_at.map(|at| at.saturating_duration_since(now)).unwrap_or_default();
            self.reply(&format!(r#"{{"t":"expiring","in":{}}}"#, left.as_secs()));
        } else if self.pong_due.is_none() && now >= self.next_ping && self.closing.is_none() {
            self.replies.extend_from_slice(PING);
            self.pong_due = Some(now + self.pong_timeout);
            self.next_ping = now + self.ping_interval;
        }
    }

    /// Takes the numbers of all writes since the last call.
    pub(crate) fn take_stats(&mut self) -> WriteStats {
        WriteStats { writes: std::mem::take(&mut self.writes), ..self.output.take_stats() }
    }

    /// Returns whether the next deadline may be earlier than it was at the last call.
    pub(crate) fn deadline_changed(&self) -> bool {
        self.deadline_changed
    }

    /// Shuts the socket down.
    pub(crate) async fn shut_down(&mut self) {
        if let Ok(Err(error)) = tokio::time::timeout(CLOSE_TIMEOUT, self.io.shutdown()).await {
            tracing::trace!(%error, "socket already closed");
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;

    fn connection(buffer: usize) -> (ClientConnection<DuplexStream>, DuplexStream) {
        let (ours, theirs) = duplex(buffer);
        (ClientConnection::new(ours, &Config::default()), theirs)
    }

    fn end_of(connection: &ClientConnection<DuplexStream>) -> Option<SessionEnd> {
        connection.closing.as_ref().map(|closing| closing.end)
    }

    #[tokio::test(start_paused = true)]
    async fn ping_is_sent_when_due_and_needs_a_pong() {
        let (mut connection, _theirs) = connection(1024);
        tokio::time::advance(connection.ping_interval).await;
        connection.check_deadlines(Duration::ZERO);
        assert_eq!(connection.replies, PING);
        assert_eq!(connection.next_deadline(), Instant::now() + connection.pong_timeout);
        connection.on_inbound(Ok(InboundEvent::Alive));
        assert_eq!(connection.next_deadline(), Instant::now() + connection.ping_interval);
        tokio::time::advance(connection.ping_interval).await;
        connection.check_deadlines(Duration::ZERO);
        tokio::time::advance(connection.pong_timeout).await;
        connection.check_deadlines(Duration::ZERO);
        assert_eq!(end_of(&connection), Some(SessionEnd::Closed(CloseCode::NoPong)));
    }

    #[tokio::test(start_paused = true)]
    async fn stall_of_this_process_extends_the_deadlines() {
        let (mut connection, _theirs) = connection(1024);
        connection.pong_due = Some(Instant::now() + connection.pong_timeout);
        let stall = Duration::from_secs(30);
        tokio::time::advance(connection.pong_timeout + stall).await;
        connection.check_deadlines(stall);
        assert_eq!(end_of(&connection), Some(SessionEnd::Closed(CloseCode::NoPong)), "the client itself is late");

        let (mut connection, _theirs) = self::connection(1024);
        connection.pong_due = Some(Instant::now() + connection.pong_timeout);
        tokio::time::advance(stall).await;
        connection.check_deadlines(stall);
        assert_eq!(end_of(&connection), None);
        assert_eq!(connection.next_deadline(), Instant::now() + connection.pong_timeout, "the full timeout is left");
    }

    #[tokio::test(start_paused = true)]
    async fn write_timeout_closes_a_socket_without_progress_only() {
        let (mut connection, mut theirs) = connection(16);
        connection.output.push(Bytes::from(vec![0; 64]));
        let write = |connection: &mut ClientConnection<DuplexStream>| {
            connection.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready()
        };
        let mut taken = [0; 16];
        for _ in 0..3 {
            assert!(!write(&mut connection), "the socket is full");
            tokio::time::advance(connection.write_timeout * 9 / 10).await;
            theirs.read_exact(&mut taken).await.expect("some bytes");
        }
        assert!(write(&mut connection) || connection.output.is_empty());
        connection.check_deadlines(Duration::ZERO);
        assert_eq!(end_of(&connection), None, "each write makes progress");

        connection.output.push(Bytes::from(vec![0; 64]));
        assert!(!write(&mut connection));
        tokio::time::advance(connection.write_timeout).await;
        connection.check_deadlines(Duration::ZERO);
        assert_eq!(end_of(&connection), Some(SessionEnd::Closed(CloseCode::WriteTimeout)));
    }

    #[tokio::test(start_paused = true)]
    async fn complete_write_changes_no_deadline() {
        let (mut connection, _theirs) = connection(1024);
        let write = |connection: &mut ClientConnection<DuplexStream>, bytes| {
            connection.output.push(Bytes::from(vec![0; bytes]));
            connection.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready()
        };
        assert!(write(&mut connection, 64) && !connection.deadline_changed());
        assert!(!write(&mut connection, 2048) && connection.deadline_changed());
    }

    #[tokio::test(start_paused = true)]
    async fn pending_write_does_not_delay_the_mark_deadline() {
        let (mut connection, _theirs) = connection(64);
        connection.enable_requests();
        let mark_at = connection.mark_at.expect("marks are enabled");
        connection.next_ping = mark_at + Duration::from_mins(1);
        connection.output.push(Bytes::from(vec![0; 64]));
        assert_eq!(connection.next_deadline(), mark_at, "the bytes are not blocked");
        let mut write = || connection.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_ready();
        assert!(write());
        connection.output.push(Bytes::from(vec![0; 64]));
        assert!(connection.poll_write(&mut Context::from_waker(std::task::Waker::noop())).is_pending());
        assert!(connection.next_deadline() < mark_at, "a blocked socket waits for the write timeout only");
    }

    #[tokio::test(start_paused = true)]
    async fn control_frames_go_out_between_whole_frames() {
        let (mut connection, mut theirs) = connection(4);
        connection.output.push(Bytes::from_static(b"\x81\x04abcd"));
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(connection.poll_write(&mut context).is_pending());
        connection.replies.extend_from_slice(PING);
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).await.expect("the front of the frame");
        assert!(connection.poll_write(&mut context).is_ready());
        let mut rest = [0; 2];
        theirs.read_exact(&mut rest).await.expect("the rest of the frame");
        assert_eq!(&rest, b"cd");
        assert!(connection.poll_write(&mut context).is_ready());
        theirs.read_exact(&mut rest).await.expect("the ping");
        assert_eq!(rest, PING);
    }
}
