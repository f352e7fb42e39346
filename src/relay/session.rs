//! One client's socket, driven by one task.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::alarm::Alarm;
use super::backoff::jitter;
use super::bell::Listener;
use super::link::Link;
use super::slots::Slot;
use super::subscription::Subscription;
use super::subscriptions::Subscriptions;
use super::{Admission, Channel, CloseCode, Ending, Hub, Refused, Runner, rich};

/// A client that was let in: what it asked for, from the moment of [`super::Relay::connect`] on.
///
/// Holds the client's place among the connections until it is dropped.
#[derive(Debug)]
pub struct Session {
    /// Boxed, or every future on its way would have the room for it.
    client: Box<Client>,
}

#[derive(Debug)]
struct Client {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscriptions: Subscriptions,
    is_rich: bool,
    admission: Admission,
    slot: Slot,
}

impl Session {
    /// A client that has one subscription, and nothing to say.
    pub(super) fn plain(
        hub: Arc<Hub>,
        channel: Arc<Channel>,
        subscription: Subscription,
        admission: Admission,
        slot: Slot,
    ) -> Self {
        let mut subscriptions = Subscriptions::default();
        subscriptions.add(subscription);
        Self { client: Box::new(Client { hub, channel, subscriptions, is_rich: false, admission, slot }) }
    }

    /// A client that will say what it wants.
    pub(super) fn rich(hub: Arc<Hub>, channel: Arc<Channel>, admission: Admission, slot: Slot) -> Self {
        let subscriptions = Subscriptions::default();
        Self { client: Box::new(Client { hub, channel, subscriptions, is_rich: true, admission, slot }) }
    }

    /// Serves the client on `io`, whose WebSocket handshake is done, until one side closes.
    ///
    /// When the relay drains, the client is closed at a random moment within the configured window, and served until then.
    /// Returns within that window and a few seconds. Dropping the future breaks the connection off. To be called within
    /// a runtime.
    pub fn run<S>(self, io: S) -> impl Future<Output = Ending> + Send
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        // Boxed and polled by hand: a future of all this would keep its parts wherever it likes, and some of them twice.
        let mut driver = Box::new(Driver::new(*self.client, io));
        async move {
            let ending = poll_fn(|cx| driver.poll(cx)).await;
            driver.end(ending).await
        }
    }
}

/// What serves one client.
///
/// In this order: what every alert touches is together, for with many clients none of it is in the processor's cache.
#[repr(C)]
struct Driver<S> {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    bell: Listener,
    drain: Listener,
    is_drained: bool,
    is_rich: bool,
    subscriptions: Subscriptions,
    alarm: Alarm,
    link: Link<S>,
    renewing: Option<rich::Renewing>,
    runner: Option<Box<dyn Runner>>,
    admission: Admission,
    _slot: Slot,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    fn new(client: Client, io: S) -> Self {
        let Client { hub, channel, subscriptions, is_rich, admission, slot } = client;
        let mut link = Link::new(io, &hub.config);
        if is_rich {
            link.converse();
            link.answer(&rich::welcome(&hub, &channel, admission.expires_at));
        }
        link.expires_at(admission.deadline(), is_rich);
        Self {
            bell: Listener::new(channel.bell.clone()),
            drain: Listener::new(hub.draining.clone()),
            is_drained: false,
            is_rich,
            subscriptions,
            alarm: Alarm::new(link.next_deadline()),
            link,
            renewing: None,
            runner: None,
            hub,
            channel,
            admission,
            _slot: slot,
        }
    }

    /// Serves the client; ready when its session is over.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ending> {
        let Self { hub, channel, subscriptions, link, renewing, runner, .. } = self;
        loop {
            // Only what changes after this line needs to wake us.
            self.bell.catch_up();
            while self.is_rich
                && let Some(request) = link.next_request()
            {
                let mut asker = rich::Asker { subscriptions, admission: &self.admission, renewing, runner };
                if let Some(answer) = rich::handle(&request, &mut asker, hub, channel) {
                    link.answer(&answer);
                }
            }
            if link.is_hungry()
                && let Err(code) = subscriptions.fill(hub, channel, &mut link.outgoing)
            {
                link.close(code);
            }
            if self.is_rich {
                link.gathered_at(subscriptions.due());
            }
            if let Some(ending) = link.ending() {
                return Poll::Ready(ending);
            }
            if link.poll_write(cx).is_ready() {
                link.count_written(channel);
                continue;
            }
            if link.is_hungry() && self.bell.poll_ring(cx).is_ready() {
                continue;
            }
            // Before the clock, so that a pong which has come is not called late.
            if let Poll::Ready(outcome) = link.poll_read(cx) {
                link.hear(outcome);
                continue;
            }
            if let Poll::Ready((index, fetched)) = subscriptions.poll_work(cx) {
                if let Err(code) = subscriptions.apply(index, fetched, hub, channel) {
                    link.close(code);
                }
                continue;
            }
            if !self.is_drained && self.drain.poll_ring(cx).is_ready() {
                self.is_drained = true;
                let after = jitter(hub.config.drain_window);
                if self.is_rich {
                    link.answer(&format!(r#"{{"t":"drain","after_ms":{}}}"#, after.as_millis()));
                }
                link.drain_at(Instant::now() + after);
                continue;
            }
            // The alarm is set anew only where it would be late.
            if let Some(deadline) = link.take_hurry()
                && deadline < self.alarm.at()
            {
                self.alarm.set(deadline);
            }
            if self.alarm.poll(cx).is_ready() {
                link.look_at_the_clock(self.alarm.at().elapsed());
                if link.take_mark() {
                    subscriptions.mark(&mut link.outgoing);
                }
                self.alarm.set(link.next_deadline());
                continue;
            }
            if let Some(Poll::Ready(renewed)) = renewing.as_mut().map(|renewal| Pin::new(renewal).poll(cx)) {
                *renewing = None;
                match renewed {
                    rich::Renewed::Good { answer, expires_at } => {
                        link.expires_at(expires_at, true);
                        link.answer(&answer);
                    }
                    rich::Renewed::Bad { answer } => link.answer(&answer),
                }
                continue;
            }
            match runner {
                Some(runner) if link.has_room() => link.answer(&ready!(runner.poll_frame(cx))),
                _ => return Poll::Pending,
            }
        }
    }

    /// Ends the connection, and gives back what the client had in hand.
    async fn end(mut self: Box<Self>, ending: Ending) -> Ending {
        if let Some(runner) = self.runner.take() {
            // Whoever was told to come again goes on with what it has.
            let is_sent_away = matches!(ending, Ending::Closed(CloseCode::GoingAway | CloseCode::Expired));
            tokio::join!(self.link.shut_down(), runner.end(is_sent_away));
        } else {
            self.link.shut_down().await;
        }
        self.hub.metrics.relay_closes.with_label_values(&[&ending.label()]).inc();
        tracing::debug!(channel = %self.channel.name, close = %ending.label(), "session ended");
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
    poll_fn(|cx| {
        while link.ending().is_none() {
            if link.poll_write(cx).is_ready() {
                continue;
            }
            match link.poll_read(cx) {
                Poll::Ready(outcome) => link.hear(outcome),
                Poll::Pending => ready!(timer.as_mut().poll(cx)),
            }
        }
        Poll::Ready(())
    })
    .await;
    link.shut_down().await;
    hub.metrics.relay_closes.with_label_values(&[&refused.close_code().to_string()]).inc();
}
