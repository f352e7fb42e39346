//! One client's socket, driven by one task.

use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::backoff::jitter;
use super::frames::PING;
use super::inbound::{Heard, Inbound};
use super::outgoing::{MAX_SLICES, Outgoing};
use super::slots::Slot;
use super::subscription::{Fetched, Subscription, Work, now_ms};
use super::{Channel, CloseCode, Config, Ending, Hub, Refused};

/// What is read of a socket at once.
const READ_BYTES: usize = 4096;

/// Answers to control frames beyond this are not made until what there is of them is written.
const MAX_ANSWERS: usize = 4096;

/// How long a client has to take in our close frame and to answer it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// A timer that fires later than this tells that this process was stalled, not the client.
const STALL: Duration = Duration::from_millis(500);

/// A client that was let in: what it asked for, from the moment of [`super::Relay::connect`] on.
///
/// Holds the client's place among the connections until it is dropped.
#[derive(Debug)]
pub struct Session {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscription: Subscription,
    _slot: Slot,
}

impl Session {
    pub(super) fn new(hub: Arc<Hub>, channel: Arc<Channel>, subscription: Subscription, slot: Slot) -> Self {
        Self { hub, channel, subscription, _slot: slot }
    }

    /// Serves the client on `io`, whose WebSocket handshake is done, until one side closes.
    ///
    /// When `stop` is cancelled the client is closed at a random moment within the configured drain window, and served
    /// until then. Returns within that window and a few seconds. Dropping the future breaks the connection off.
    pub async fn run<S>(self, io: S, stop: CancellationToken) -> Ending
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let Self { hub, channel, mut subscription, _slot } = self;
        let mut link = Link::new(io, &hub.config);
        let mut wake = channel.wake.subscribe();
        let mut timer = pin!(tokio::time::sleep_until(link.next_deadline()));
        let mut stop = pin!(Some(stop.cancelled_owned()));
        let mut work: Option<Work> = None;
        let ending = loop {
            // Only what changes after this line needs to wake us.
            wake.mark_unchanged();
            if link.is_hungry() {
                subscription.fill(&hub, &channel, &mut link.outgoing);
                if work.is_none() {
                    work = subscription.work(&hub);
                }
            }
            if let Some(ending) = link.ending() {
                break ending;
            }
            let is_hungry = link.is_hungry();
            let event = {
                let mut changed = pin!(is_hungry.then(|| wake.changed()));
                poll_fn(|cx| poll_event(cx, &mut link, work.as_mut(), changed.as_mut(), timer.as_mut(), stop.as_mut()))
                    .await
            };
            match event {
                Event::Written => link.count_written(&channel),
                Event::Read(outcome) => link.hear(outcome),
                Event::Wake => {}
                Event::Fetched(fetched) => {
                    work = None;
                    if let Err(code) = subscription.apply(fetched, &hub, &channel) {
                        link.close(code);
                    }
                }
                Event::Timer => {
                    let lateness = timer.deadline().elapsed();
                    link.look_at_the_clock(lateness);
                    timer.as_mut().reset(link.next_deadline());
                }
                Event::Stop => {
                    stop.set(None);
                    link.drain_at = Some(Instant::now() + jitter(hub.config.drain_window));
                }
            }
        };
        link.shut_down().await;
        hub.metrics.relay_closes.with_label_values(&[&ending.label()]).inc();
        tracing::debug!(channel = %channel.name, close = %ending.label(), "session ended");
        ending
    }
}

/// Tells a client whose handshake is done why it is not let in, by the close code: browsers can't see more.
pub(super) async fn refuse<S>(io: S, refused: &Refused, hub: &Hub)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut link = Link::new(io, &hub.config);
    link.close_with(refused.close_code(), &refused.close_reason());
    let mut timer = pin!(tokio::time::sleep_until(link.next_deadline()));
    while link.ending().is_none() {
        let event = poll_fn(|cx| {
            let (mut changed, mut stop) =
                (pin!(None::<std::future::Pending<_>>), pin!(None::<std::future::Pending<()>>));
            poll_event(cx, &mut link, None, changed.as_mut(), timer.as_mut(), stop.as_mut())
        })
        .await;
        match event {
            Event::Read(outcome) => link.hear(outcome),
            Event::Timer => link.look_at_the_clock(Duration::ZERO),
            _ => {}
        }
    }
    link.shut_down().await;
    hub.metrics.relay_closes.with_label_values(&[&refused.close_code().to_string()]).inc();
}

/// What a session waits for.
enum Event {
    /// Everything that was outgoing is written.
    Written,
    Read(Result<Heard, CloseCode>),
    Wake,
    Fetched(Fetched),
    Timer,
    Stop,
}

/// Polls everything a session waits for: reading before the clock, so that a pong which has come is not called late.
fn poll_event<S, W, T>(
    cx: &mut Context<'_>,
    link: &mut Link<S>,
    work: Option<&mut Work>,
    wake: Pin<&mut Option<W>>,
    mut timer: Pin<&mut Sleep>,
    stop: Pin<&mut Option<T>>,
) -> Poll<Event>
where
    S: AsyncRead + AsyncWrite + Unpin,
    W: Future<Output = Result<(), watch::error::RecvError>>,
    T: Future<Output = ()>,
{
    if link.poll_write(cx).is_ready() {
        return Poll::Ready(Event::Written);
    }
    if let Poll::Ready(outcome) = link.poll_read(cx) {
        return Poll::Ready(Event::Read(outcome));
    }
    if let Some(Poll::Ready(fetched)) = work.map(|work| work.as_mut().poll(cx)) {
        return Poll::Ready(Event::Fetched(fetched));
    }
    // The sender lives as long as the hub, which the session holds.
    if wake.as_pin_mut().is_some_and(|wake| wake.poll(cx).is_ready()) {
        return Poll::Ready(Event::Wake);
    }
    if stop.as_pin_mut().is_some_and(|stop| stop.poll(cx).is_ready()) {
        return Poll::Ready(Event::Stop);
    }
    // Deadlines come and go with each write; the timer is set anew only where it would be late.
    if link.next_deadline() < timer.deadline() {
        timer.as_mut().reset(link.next_deadline());
    }
    timer.poll(cx).map(|()| Event::Timer)
}

/// A socket, what is on its way through it, and its deadlines.
#[derive(Debug)]
struct Link<S> {
    io: S,
    inbound: Inbound,
    /// Control frames that go out between ours.
    answers: Vec<u8>,
    outgoing: Outgoing,
    /// Writes of the outgoing bytes so far.
    writes: u64,
    /// Since when the socket has taken no bytes.
    blocked_since: Option<Instant>,
    /// Whether everything that was written has left the layers below.
    is_flushed: bool,
    next_ping: Instant,
    pong_due: Option<Instant>,
    drain_at: Option<Instant>,
    closing: Option<Closing>,
    ping_interval: Duration,
    pong_timeout: Duration,
    write_timeout: Duration,
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
    fn new(io: S, config: &Config) -> Self {
        let now = Instant::now();
        let max_message_bytes = usize::try_from(config.max_message_bytes.as_u64()).unwrap_or(usize::MAX);
        // Clients that came at once, after a restart, should not be pinged at once for ever.
        let next_ping = now + config.ping_interval - jitter(config.ping_interval / 2);
        Self {
            io,
            inbound: Inbound::new(max_message_bytes, now),
            answers: Vec::new(),
            outgoing: Outgoing::default(),
            writes: 0,
            blocked_since: None,
            is_flushed: true,
            next_ping,
            pong_due: None,
            drain_at: None,
            closing: None,
            ping_interval: config.ping_interval,
            pong_timeout: config.pong_timeout,
            write_timeout: config.write_timeout,
        }
    }

    /// Whether alerts may be added: everything before them is written.
    fn is_hungry(&self) -> bool {
        self.closing.is_none() && self.is_told()
    }

    fn is_told(&self) -> bool {
        self.outgoing.is_empty() && self.answers.is_empty() && self.is_flushed
    }

    /// How the session ends, once there is nothing left to wait for.
    fn ending(&self) -> Option<Ending> {
        let closing = self.closing.as_ref()?;
        let is_done = closing.is_answered && self.is_told();
        (is_done || Instant::now() >= closing.deadline).then_some(closing.ending)
    }

    /// Writes as much as the socket takes; ready once everything is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.outgoing.is_empty() {
            // Only here, between whole frames of ours, is there room for control frames.
            self.outgoing.push(Bytes::from(std::mem::take(&mut self.answers)));
        }
        if self.is_told() {
            return Poll::Pending;
        }
        while !self.outgoing.is_empty() {
            let mut buffers = [IoSlice::new(&[]); MAX_SLICES];
            let count = self.outgoing.fill(&mut buffers);
            match Pin::new(&mut self.io).poll_write_vectored(cx, &buffers[..count]) {
                Poll::Ready(Ok(written)) if written > 0 => {
                    self.outgoing.advance(written);
                    self.writes += 1;
                    self.is_flushed = false;
                    // A socket that takes bytes again has a client that reads: it may answer late.
                    if self.blocked_since.take().is_some() && self.pong_due.is_some() {
                        self.pong_due = Some(Instant::now() + self.pong_timeout);
                    }
                }
                Poll::Ready(_) => {
                    self.lose();
                    return Poll::Ready(());
                }
                Poll::Pending => {
                    self.blocked_since.get_or_insert_with(Instant::now);
                    return Poll::Pending;
                }
            }
        }
        match Pin::new(&mut self.io).poll_flush(cx) {
            Poll::Ready(Ok(())) => self.is_flushed = true,
            Poll::Ready(Err(_)) => self.lose(),
            Poll::Pending => {
                self.blocked_since.get_or_insert_with(Instant::now);
                return Poll::Pending;
            }
        }
        self.blocked_since = None;
        Poll::Ready(())
    }

    /// Reads what has come; ready when it told something.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Heard, CloseCode>> {
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

    fn hear(&mut self, outcome: Result<Heard, CloseCode>) {
        match outcome {
            Ok(Heard::Nothing) => {}
            Ok(Heard::Alive) => self.pong_due = None,
            Ok(Heard::Closed(code)) => self.answered(Ending::ByPeer(code)),
            Err(code) => self.close(code),
        }
    }

    fn close(&mut self, code: CloseCode) {
        self.close_with(code, code.reason());
    }

    fn close_with(&mut self, code: CloseCode, reason: &str) {
        if self.closing.is_none() {
            self.inbound.close(code, reason, &mut self.answers);
            let deadline = Instant::now() + CLOSE_TIMEOUT;
            self.closing = Some(Closing { ending: Ending::Closed(code), deadline, is_answered: false });
        }
    }

    /// The client has nothing more to say.
    fn answered(&mut self, ending: Ending) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let closing = self.closing.get_or_insert(Closing { ending, deadline, is_answered: true });
        closing.is_answered = true;
    }

    /// The connection is broken: nothing can be told any more.
    fn lose(&mut self) {
        self.answered(Ending::Lost);
        self.outgoing = Outgoing::default();
        self.answers.clear();
        self.is_flushed = true;
    }

    fn next_deadline(&self) -> Instant {
        if let Some(closing) = &self.closing {
            return closing.deadline;
        }
        let ping_or_pong = self.pong_due.unwrap_or(self.next_ping);
        let blocked = self.blocked_since.map(|since| since + self.write_timeout);
        [blocked, self.drain_at].into_iter().flatten().fold(ping_or_pong, Instant::min)
    }

    /// Does what is due. `lateness` is how much later than asked the timer has fired.
    fn look_at_the_clock(&mut self, lateness: Duration) {
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
        } else if is_over(self.drain_at) {
            self.close(CloseCode::GoingAway);
        } else if self.pong_due.is_none() && now >= self.next_ping && self.closing.is_none() {
            self.answers.extend_from_slice(PING);
            self.pong_due = Some(now + self.pong_timeout);
            self.next_ping = now + self.ping_interval;
        }
    }

    fn count_written(&mut self, channel: &Channel) {
        channel.writes.inc_by(std::mem::take(&mut self.writes));
        let alerts = std::mem::take(&mut self.outgoing.alerts);
        if alerts > 0 {
            channel.deliveries.inc_by(alerts);
        }
        if let Some(ms) = self.outgoing.oldest_ms.take() {
            channel.latency.observe(Duration::from_millis(now_ms().saturating_sub(ms)).as_secs_f64());
        }
    }

    /// Ends the connection.
    async fn shut_down(&mut self) {
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
