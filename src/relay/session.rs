//! One client's socket, driven by a task of its own, and written to by those who bring news.

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

use super::subscription::Subscription;
use super::{Admission, Channel, CloseCode, Ending, Hub, Refused, Runner};
use crate::backoff::full_jitter;
use crate::relay::metrics::Tally;
use crate::relay::session::broadcast::Recipient;
use crate::relay::session::connection::Link;
use crate::relay::session::limits::Slot;
use crate::relay::session::notify::Listener;
use crate::relay::subscription::set::Subscriptions;

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
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Shared and polled by hand: a future of all this would keep its parts wherever it likes, and some of them twice.
        let driver = Mutex::new(Some(Driver::new(*self.client, io)));
        let served = Served(Arc::new(Shared { driver, task: AtomicWaker::new() }));
        async move {
            let ending = poll_fn(|cx| served.poll(cx)).await;
            match served.take_out() {
                Some(driver) => driver.end(ending).await,
                None => ending,
            }
        }
    }
}

/// A client as its own task has it: when that is dropped, nobody else may keep the socket.
struct Served<S: Socket>(Arc<Shared<S>>);

/// What its task and those who bring news share.
#[repr(C)]
struct Shared<S> {
    /// Nothing once the session is over.
    driver: Mutex<Option<Driver<S>>>,
    /// Its task, for those who leave it something to do.
    task: AtomicWaker,
}

impl<S: Socket> Served<S> {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Ending> {
        self.0.task.register(cx.waker());
        match self.0.driver.lock().map(|mut driver| driver.as_mut().map(|driver| driver.poll(cx, &self.0))) {
            Ok(Some(outcome)) => outcome,
            // Whoever brought it news has panicked.
            Ok(None) | Err(_) => Poll::Ready(Ending::Lost),
        }
    }

    /// Nobody writes to the client any more.
    fn take_out(&self) -> Option<Box<Driver<S>>> {
        let mut driver = self.0.driver.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        driver.leave();
        Some(Box::new(driver))
    }
}

impl<S: Socket> Drop for Served<S> {
    fn drop(&mut self) {
        self.take_out();
    }
}

impl<S: Socket> Recipient for Shared<S> {
    fn give(&self, tally: &mut Tally) {
        let is_given = match self.driver.try_lock() {
            Ok(mut driver) => driver.as_mut().is_none_or(|driver| driver.give(tally)),
            // Someone is at it, and may have looked for news before there was this.
            Err(_) => false,
        };
        if !is_given {
            self.wake();
        }
    }

    fn wake(&self) {
        self.task.wake();
    }
}

/// What serves one client.
///
/// In this order: what every alert touches is together, for with many clients none of it is in the processor's cache.
#[repr(C)]
struct Driver<S> {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    /// Its place among those who wait for news, if it does.
    place: Option<usize>,
    is_rich: bool,
    subscriptions: Subscriptions,
    link: Link<S>,
    timer: Pin<Box<Sleep>>,
    drain: Listener,
    is_drained: bool,
    renewing: Option<protocol::Renewing>,
    runner: Option<Box<dyn Runner>>,
    admission: Admission,
    _slot: Slot,
}

impl<S: Socket> Driver<S> {
    fn new(client: Client, io: S) -> Self {
        let Client { hub, channel, subscriptions, is_rich, admission, slot } = client;
        let mut link = Link::new(io, &hub.config);
        if is_rich {
            link.converse();
            link.answer(&protocol::welcome(&hub, &channel, admission.expires_at));
        }
        link.expires_at(admission.deadline(), is_rich);
        Self {
            place: None,
            is_rich,
            subscriptions,
            timer: Box::pin(sleep_until(link.next_deadline())),
            link,
            drain: Listener::new(hub.draining.clone()),
            is_drained: false,
            renewing: None,
            runner: None,
            hub,
            channel,
            admission,
            _slot: slot,
        }
    }

    /// Serves the client; ready when its session is over.
    fn poll(&mut self, cx: &mut Context<'_>, shared: &Arc<Shared<S>>) -> Poll<Ending> {
        let Self { hub, channel, subscriptions, link, renewing, runner, .. } = self;
        loop {
            // Only what changes after this line needs to wake us.
            let heard = channel.bell.rings();
            while self.is_rich
                && let Some(request) = link.next_request()
            {
                let mut asker = protocol::Asker { subscriptions, admission: &self.admission, renewing, runner };
                if let Some(answer) = protocol::handle(&request, &mut asker, hub, channel) {
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
                channel.meter.count(&link.take_written());
                continue;
            }
            if self.place.is_none() && link.is_hungry() {
                self.place = channel.fanout.join(heard, || shared.clone());
                if self.place.is_none() {
                    continue;
                }
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
                let after = full_jitter(hub.config.drain_window);
                if self.is_rich {
                    link.answer(&format!(r#"{{"t":"drain","after_ms":{}}}"#, after.as_millis()));
                }
                link.drain_at(Instant::now() + after);
                continue;
            }
            // The timer is set anew only where it would be late.
            if let Some(deadline) = link.take_hurry()
                && deadline < self.timer.deadline()
            {
                self.timer.as_mut().reset(deadline);
            }
            if self.timer.as_mut().poll(cx).is_ready() {
                link.look_at_the_clock(self.timer.deadline().elapsed());
                if link.take_mark() {
                    subscriptions.mark(&mut link.outgoing);
                }
                self.timer.as_mut().reset(link.next_deadline());
                continue;
            }
            if let Some(Poll::Ready(renewed)) = renewing.as_mut().map(|renewal| Pin::new(renewal).poll(cx)) {
                *renewing = None;
                match renewed {
                    protocol::Renewed::Good { answer, expires_at } => {
                        link.expires_at(expires_at, true);
                        link.answer(&answer);
                    }
                    protocol::Renewed::Bad { answer } => link.answer(&answer),
                }
                continue;
            }
            match runner {
                Some(runner) if link.has_room() => link.answer(&ready!(runner.poll_frame(cx))),
                _ => return Poll::Pending,
            }
        }
    }

    /// Gives the client what is new, and says whether that is all there is to do: if not, it waits for news no more, and its
    /// task has to look.
    fn give(&mut self, tally: &mut Tally) -> bool {
        let is_given = self.give_all(tally);
        if !is_given {
            self.leave();
        }
        is_given
    }

    fn give_all(&mut self, tally: &mut Tally) -> bool {
        let Self { hub, channel, subscriptions, link, .. } = self;
        if !link.is_hungry() || subscriptions.is_lagging() {
            return false;
        }
        if let Err(code) = subscriptions.fill(hub, channel, &mut link.outgoing) {
            link.close(code);
            return false;
        }
        if self.is_rich {
            link.gathered_at(subscriptions.due());
        }
        if !link.outgoing.is_empty() {
            // Where the socket takes no more, our task is woken at once, and waits for it.
            if link.poll_write(&mut Context::from_waker(Waker::noop())).is_pending() {
                return false;
            }
            tally.add(&link.take_written());
        }
        link.is_hungry() && !link.is_hurried() && !subscriptions.is_lagging()
    }

    /// Waits for news no more.
    fn leave(&mut self) {
        if let Some(place) = self.place.take() {
            self.channel.fanout.leave(place);
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

/// What a client is served on.
trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Socket for S {}

/// Tells a client whose handshake is done why it is not let in, by the close code: browsers can't see more.
pub(super) async fn refuse<S>(io: S, refused: &Refused, hub: &Hub)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut link = Link::new(io, &hub.config);
    link.close_with(refused.close_code(), &refused.close_reason());
    let mut timer = pin!(sleep_until(link.next_deadline()));
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

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;
    use crate::metrics::Metrics;
    use crate::relay::metrics::Meter;

    /// Whether the task is woken where there is news.
    fn is_woken(shared: &Shared<DuplexStream>) -> bool {
        shared.task.register(Waker::noop());
        shared.give(&mut Meter::new(&Metrics::new(), "alerts").tally());
        // Whoever wakes it takes the waker.
        shared.task.take().is_none()
    }

    #[test]
    fn a_task_that_is_at_work_when_news_comes_is_woken_to_look_again() {
        let shared = Shared { driver: Mutex::new(None), task: AtomicWaker::new() };
        let taken = shared.driver.lock();
        assert!(is_woken(&shared));
        drop(taken);
        assert!(!is_woken(&shared), "it is over");
    }

    #[test]
    fn a_task_whose_client_could_not_be_given_news_ends_it() {
        let shared = Arc::new(Shared::<DuplexStream> { driver: Mutex::new(None), task: AtomicWaker::new() });
        let giving = shared.clone();
        let failed = std::thread::spawn(move || {
            let _taken = giving.driver.lock();
            panic!("as a bug would");
        });
        assert!(failed.join().is_err());
        assert!(is_woken(&shared));
        let served = Served(shared);
        assert_eq!(served.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ending::Lost));
    }
}
