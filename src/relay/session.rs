//! The session of one WebSocket client.
//!
//! A task of its own drives the session. While the session waits for new entries only, the tasks of the fan-out write
//! to the client in its place. Both share the session through a mutex. The session's own task is woken for all other
//! work: a full socket, requests, reads of the store, deadlines and the end.

pub(super) mod admission;
pub(super) mod broadcast;
pub(super) mod close;
pub(super) mod commands;
pub(super) mod connection;
pub(super) mod feed;
pub(super) mod limits;
pub(super) mod notify;
pub(super) mod protocol;
pub(super) mod reader;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::backoff::full_jitter;
use crate::relay::hub::{Channel, Hub};
use crate::relay::metrics::LocalMetrics;
use crate::relay::session::admission::{Admission, ConnectError};
use crate::relay::session::broadcast::Recipient;
use crate::relay::session::close::{CloseCode, SessionEnd};
use crate::relay::session::commands::CommandHandler;
use crate::relay::session::connection::ClientConnection;
use crate::relay::session::limits::ConnectionPermit;
use crate::relay::session::notify::Subscriber;
use crate::relay::subscription::Subscription;
use crate::relay::subscription::set::SubscriptionSet;

/// An admitted client with its subscriptions, from the moment of `Relay::connect` on.
///
/// Holds the client's connection permit until it is dropped.
#[derive(Debug)]
pub struct Session {
    /// Boxed, so that futures that hold a session stay small.
    parts: Box<SessionParts>,
}

#[derive(Debug)]
struct SessionParts {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscriptions: SubscriptionSet,
    is_rich: bool,
    admission: Admission,
    permit: ConnectionPermit,
}

impl Session {
    /// Creates the session of a client in plain mode, with one subscription.
    pub(super) fn plain(
        hub: Arc<Hub>,
        channel: Arc<Channel>,
        subscription: Subscription,
        admission: Admission,
        permit: ConnectionPermit,
    ) -> Self {
        let mut subscriptions = SubscriptionSet::default();
        subscriptions.add(subscription);
        Self { parts: Box::new(SessionParts { hub, channel, subscriptions, is_rich: false, admission, permit }) }
    }

    /// Creates the session of a client in rich mode, which subscribes by requests.
    pub(super) fn rich(hub: Arc<Hub>, channel: Arc<Channel>, admission: Admission, permit: ConnectionPermit) -> Self {
        let subscriptions = SubscriptionSet::default();
        Self { parts: Box::new(SessionParts { hub, channel, subscriptions, is_rich: true, admission, permit }) }
    }

    /// Serves the client on `io`, whose WebSocket handshake is done, until one side closes.
    ///
    /// When the relay drains, the client is closed at a random moment within the configured window, and served until
    /// then. Returns within that window and a few seconds. Dropping the future breaks the connection. Must be called
    /// within a runtime.
    pub fn run<S>(self, io: S) -> impl Future<Output = SessionEnd> + Send
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Shared and polled by hand: an `async fn` would lay out its parts in any order, and some of them twice.
        let state = Mutex::new(Some(SessionState::new(*self.parts, io)));
        let future = SessionFuture(Arc::new(SharedSession { state, task: AtomicWaker::new() }));
        async move {
            let end = poll_fn(|cx| future.poll(cx)).await;
            match future.take_state() {
                Some(state) => state.end(end).await,
                None => end,
            }
        }
    }
}

/// The session as its own task holds it. When that task drops it, no other task keeps the socket.
struct SessionFuture<S: ClientSocket>(Arc<SharedSession<S>>);

/// The state that the session's task and the fan-out share.
#[repr(C)]
struct SharedSession<S> {
    /// `None` when the session is over.
    state: Mutex<Option<SessionState<S>>>,
    /// The session's task, for the fan-out to wake.
    task: AtomicWaker,
}

impl<S: ClientSocket> SessionFuture<S> {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<SessionEnd> {
        self.0.task.register(cx.waker());
        match self.0.state.lock().map(|mut state| state.as_mut().map(|state| state.poll(cx, &self.0))) {
            Ok(Some(outcome)) => outcome,
            // A task of the fan-out has panicked.
            Ok(None) | Err(_) => Poll::Ready(SessionEnd::Lost),
        }
    }

    /// Takes the state, so that the fan-out writes to the client no more.
    fn take_state(&self) -> Option<Box<SessionState<S>>> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        state.leave_fanout();
        Some(Box::new(state))
    }
}

impl<S: ClientSocket> Drop for SessionFuture<S> {
    fn drop(&mut self) {
        self.take_state();
    }
}

impl<S: ClientSocket> Recipient for SharedSession<S> {
    fn deliver(&self, local: &mut LocalMetrics) {
        let is_done = match self.state.try_lock() {
            Ok(mut state) => state.as_mut().is_none_or(|state| state.deliver(local)),
            // The session's task holds the lock, and may have looked for entries before these came.
            Err(_) => false,
        };
        if !is_done {
            self.wake();
        }
    }

    fn wake(&self) {
        self.task.wake();
    }
}

/// The state of one session.
///
/// Keep this order of fields, and `repr(C)`: every alert touches the first ones. With many clients none of them is in
/// the processor's cache, so they must be close together.
#[repr(C)]
struct SessionState<S> {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    /// The key in the fan-out while the session waits there.
    fanout_key: Option<usize>,
    is_rich: bool,
    subscriptions: SubscriptionSet,
    connection: ClientConnection<S>,
    timer: Pin<Box<Sleep>>,
    drain: Subscriber,
    is_drained: bool,
    token_refresh: Option<protocol::TokenRefresh>,
    handler: Option<Box<dyn CommandHandler>>,
    admission: Admission,
    _permit: ConnectionPermit,
}

impl<S: ClientSocket> SessionState<S> {
    fn new(parts: SessionParts, io: S) -> Self {
        let SessionParts { hub, channel, subscriptions, is_rich, admission, permit } = parts;
        let mut connection = ClientConnection::new(io, &hub.config);
        if is_rich {
            connection.enable_requests();
            connection.reply(&protocol::welcome_frame(&hub, &channel, admission.expires_at));
        }
        connection.set_expires_at(admission.deadline(), is_rich);
        Self {
            fanout_key: None,
            is_rich,
            subscriptions,
            timer: Box::pin(sleep_until(connection.next_deadline())),
            connection,
            drain: Subscriber::new(hub.draining.clone()),
            is_drained: false,
            token_refresh: None,
            handler: None,
            hub,
            channel,
            admission,
            _permit: permit,
        }
    }

    /// Drives the session. Ready when the session is over.
    fn poll(&mut self, cx: &mut Context<'_>, shared: &Arc<SharedSession<S>>) -> Poll<SessionEnd> {
        let Self { hub, channel, subscriptions, connection, token_refresh, handler, .. } = self;
        loop {
            // Only changes after this line need to wake us.
            let generation = channel.broadcast.generation();
            while self.is_rich
                && let Some(request) = connection.next_request()
            {
                let mut context =
                    protocol::RequestContext { subscriptions, admission: &self.admission, token_refresh, handler };
                if let Some(reply) = protocol::handle(&request, &mut context, hub, channel) {
                    connection.reply(&reply);
                }
            }
            if connection.can_accept()
                && let Err(code) = subscriptions.fill(hub, channel, &mut connection.output)
            {
                connection.close(code);
            }
            if self.is_rich {
                connection.set_batch_flush(subscriptions.next_flush());
            }
            if let Some(end) = connection.session_end() {
                return Poll::Ready(end);
            }
            if connection.poll_write(cx).is_ready() {
                channel.metrics.count(&connection.take_stats());
                continue;
            }
            if self.fanout_key.is_none() && connection.can_accept() {
                self.fanout_key = channel.fanout.join(generation, || shared.clone());
                if self.fanout_key.is_none() {
                    continue;
                }
            }
            // Before the deadlines, so that a pong which has arrived is not called late.
            if let Poll::Ready(outcome) = connection.poll_read(cx) {
                connection.on_inbound(outcome);
                continue;
            }
            if let Poll::Ready((index, outcome)) = subscriptions.poll_reads(cx) {
                if let Err(code) = subscriptions.apply(index, outcome, hub, channel) {
                    connection.close(code);
                }
                continue;
            }
            if !self.is_drained && self.drain.poll_notified(cx).is_ready() {
                self.is_drained = true;
                let after = full_jitter(hub.config.drain_window);
                if self.is_rich {
                    connection.reply(&format!(r#"{{"t":"drain","after_ms":{}}}"#, after.as_millis()));
                }
                connection.set_drain_at(Instant::now() + after);
                continue;
            }
            // The timer is reset only if it would fire too late.
            if let Some(deadline) = connection.take_changed_deadline()
                && deadline < self.timer.deadline()
            {
                self.timer.as_mut().reset(deadline);
            }
            if self.timer.as_mut().poll(cx).is_ready() {
                connection.check_deadlines(self.timer.deadline().elapsed());
                if connection.take_due_mark() {
                    subscriptions.add_marks(&mut connection.output);
                }
                self.timer.as_mut().reset(connection.next_deadline());
                continue;
            }
            if let Some(Poll::Ready(renewed)) = token_refresh.as_mut().map(|refresh| Pin::new(refresh).poll(cx)) {
                *token_refresh = None;
                match renewed {
                    protocol::RefreshResult::Accepted { reply, expires_at } => {
                        connection.set_expires_at(expires_at, true);
                        connection.reply(&reply);
                    }
                    protocol::RefreshResult::Rejected { reply } => connection.reply(&reply),
                }
                continue;
            }
            match handler {
                Some(handler) if connection.can_reply() => connection.reply(&ready!(handler.poll_frame(cx))),
                _ => return Poll::Pending,
            }
        }
    }

    /// Writes new entries. Returns whether no other work is left.
    ///
    /// If there is some, the session has left the fan-out and its task must be woken.
    fn deliver(&mut self, local: &mut LocalMetrics) -> bool {
        let is_done = self.write_new_entries(local);
        if !is_done {
            self.leave_fanout();
        }
        is_done
    }

    fn write_new_entries(&mut self, local: &mut LocalMetrics) -> bool {
        let Self { hub, channel, subscriptions, connection, .. } = self;
        if !connection.can_accept() || subscriptions.is_lagging() {
            return false;
        }
        if let Err(code) = subscriptions.fill(hub, channel, &mut connection.output) {
            connection.close(code);
            return false;
        }
        if self.is_rich {
            connection.set_batch_flush(subscriptions.next_flush());
        }
        if !connection.output.is_empty() {
            // If the socket is full, our task is woken at once and waits for it.
            if connection.poll_write(&mut Context::from_waker(Waker::noop())).is_pending() {
                return false;
            }
            local.add(&connection.take_stats());
        }
        connection.can_accept() && !connection.deadline_changed() && !subscriptions.is_lagging()
    }

    /// Leaves the fan-out.
    fn leave_fanout(&mut self) {
        if let Some(fanout_key) = self.fanout_key.take() {
            self.channel.fanout.leave(fanout_key);
        }
    }

    /// Ends the connection, and returns the entries that the client had pulled.
    async fn end(mut self: Box<Self>, end: SessionEnd) -> SessionEnd {
        if let Some(handler) = self.handler.take() {
            // A client that was asked to reconnect keeps its leases.
            let will_reconnect = matches!(end, SessionEnd::Closed(CloseCode::GoingAway | CloseCode::Expired));
            tokio::join!(self.connection.shut_down(), handler.end(will_reconnect));
        } else {
            self.connection.shut_down().await;
        }
        self.hub.metrics.relay_closes.with_label_values(&[&end.label()]).inc();
        tracing::debug!(channel = %self.channel.name, close = %end.label(), "session ended");
        end
    }
}

/// A socket that a session is served on.
trait ClientSocket: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> ClientSocket for S {}

/// Reports the reason of a refusal by the close code, after the handshake. Browsers show nothing else to pages.
pub(super) async fn refuse<S>(io: S, refused: &ConnectError, hub: &Hub)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut connection = ClientConnection::new(io, &hub.config);
    connection.close_with(refused.close_code(), &refused.close_reason());
    let mut timer = pin!(sleep_until(connection.next_deadline()));
    poll_fn(|cx| {
        while connection.session_end().is_none() {
            if connection.poll_write(cx).is_ready() {
                continue;
            }
            match connection.poll_read(cx) {
                Poll::Ready(outcome) => connection.on_inbound(outcome),
                Poll::Pending => ready!(timer.as_mut().poll(cx)),
            }
        }
        Poll::Ready(())
    })
    .await;
    connection.shut_down().await;
    hub.metrics.relay_closes.with_label_values(&[&refused.close_code().to_string()]).inc();
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;
    use crate::metrics::Metrics;
    use crate::relay::metrics::ChannelMetrics;

    /// Returns whether the task is woken when there are new entries.
    fn is_woken(shared: &SharedSession<DuplexStream>) -> bool {
        shared.task.register(Waker::noop());
        shared.deliver(&mut ChannelMetrics::new(&Metrics::new(), "alerts").local());
        // A wake takes the waker.
        shared.task.take().is_none()
    }

    #[test]
    fn deliver_while_the_task_is_busy_wakes_it() {
        let shared = SharedSession { state: Mutex::new(None), task: AtomicWaker::new() };
        let taken = shared.state.lock();
        assert!(is_woken(&shared));
        drop(taken);
        assert!(!is_woken(&shared), "the session is over");
    }

    #[test]
    fn panic_during_delivery_ends_the_session() {
        let shared = Arc::new(SharedSession::<DuplexStream> { state: Mutex::new(None), task: AtomicWaker::new() });
        let other = shared.clone();
        let failed = std::thread::spawn(move || {
            let _taken = other.state.lock();
            panic!("simulated bug");
        });
        assert!(failed.join().is_err());
        assert!(is_woken(&shared));
        let future = SessionFuture(shared);
        assert_eq!(future.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(SessionEnd::Lost));
    }
}
