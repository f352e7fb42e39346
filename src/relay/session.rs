//! One client's socket, driven by one task.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::backoff::jitter;
use super::inbound::Heard;
use super::link::Link;
use super::slots::Slot;
use super::subscription::{Fetched, Subscription};
use super::subscriptions::Subscriptions;
use super::{Admission, Channel, CloseCode, Ending, Hub, Refused, Runner, rich};

/// A client that was let in: what it asked for, from the moment of [`super::Relay::connect`] on.
///
/// Holds the client's place among the connections until it is dropped.
#[derive(Debug)]
pub struct Session {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscriptions: Subscriptions,
    is_rich: bool,
    admission: Admission,
    _slot: Slot,
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
        Self { hub, channel, subscriptions, is_rich: false, admission, _slot: slot }
    }

    /// A client that will say what it wants.
    pub(super) fn rich(hub: Arc<Hub>, channel: Arc<Channel>, admission: Admission, slot: Slot) -> Self {
        Self { hub, channel, subscriptions: Subscriptions::default(), is_rich: true, admission, _slot: slot }
    }

    /// Serves the client on `io`, whose WebSocket handshake is done, until one side closes.
    ///
    /// When `stop` is cancelled the client is closed at a random moment within the configured drain window, and served
    /// until then. Returns within that window and a few seconds. Dropping the future breaks the connection off.
    pub async fn run<S>(self, io: S, stop: CancellationToken) -> Ending
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let Self { hub, channel, mut subscriptions, is_rich, admission, _slot } = self;
        let mut link = Link::new(io, &hub.config);
        if is_rich {
            link.converse();
            link.answer(&rich::welcome(&hub, &channel, admission.expires_at));
        }
        link.expires_at(admission.deadline(), is_rich);
        let mut renewing: Option<rich::Renewing> = None;
        let mut runner: Option<Box<dyn Runner>> = None;
        let mut wake = channel.wake.subscribe();
        let mut timer = pin!(tokio::time::sleep_until(link.next_deadline()));
        let mut stop = pin!(Some(stop.cancelled_owned()));
        let ending = loop {
            // Only what changes after this line needs to wake us.
            wake.mark_unchanged();
            while let Some(request) = link.next_request() {
                let mut asker = rich::Asker {
                    subscriptions: &mut subscriptions,
                    admission: &admission,
                    renewing: &mut renewing,
                    runner: &mut runner,
                };
                if let Some(answer) = rich::handle(&request, &mut asker, &hub, &channel) {
                    link.answer(&answer);
                }
            }
            if link.is_hungry()
                && let Err(code) = subscriptions.fill(&hub, &channel, &mut link.outgoing)
            {
                link.close(code);
            }
            link.gathered_at = subscriptions.due();
            if let Some(ending) = link.ending() {
                break ending;
            }
            let is_hungry = link.is_hungry();
            let event = {
                let mut changed = pin!(is_hungry.then(|| wake.changed()));
                let (work, renewing, runner) = (&mut subscriptions, &mut renewing, &mut runner);
                poll_fn(|cx| {
                    let event = poll_event(cx, &mut link, work, changed.as_mut(), timer.as_mut(), stop.as_mut());
                    if event.is_ready() {
                        return event;
                    }
                    if let Some(Poll::Ready(renewed)) = renewing.as_mut().map(|renewal| Pin::new(renewal).poll(cx)) {
                        return Poll::Ready(Event::Renewed(renewed));
                    }
                    match runner {
                        Some(runner) if link.has_room() => runner.poll_frame(cx).map(Event::Errand),
                        _ => Poll::Pending,
                    }
                })
                .await
            };
            match event {
                Event::Written => link.count_written(&channel),
                Event::Read(outcome) => link.hear(outcome),
                Event::Wake => {}
                Event::Fetched(index, fetched) => {
                    if let Err(code) = subscriptions.apply(index, fetched, &hub, &channel) {
                        link.close(code);
                    }
                }
                Event::Timer => {
                    let lateness = timer.deadline().elapsed();
                    link.look_at_the_clock(lateness);
                    if link.take_mark() {
                        subscriptions.mark(&mut link.outgoing);
                    }
                    timer.as_mut().reset(link.next_deadline());
                }
                Event::Renewed(renewed) => {
                    renewing = None;
                    match renewed {
                        rich::Renewed::Good { answer, expires_at } => {
                            link.expires_at(expires_at, true);
                            link.answer(&answer);
                        }
                        rich::Renewed::Bad { answer } => link.answer(&answer),
                    }
                }
                Event::Errand(frame) => link.answer(&frame),
                Event::Stop => {
                    stop.set(None);
                    let after = jitter(hub.config.drain_window);
                    if is_rich {
                        link.answer(&format!(r#"{{"t":"drain","after_ms":{}}}"#, after.as_millis()));
                    }
                    link.drain_at(Instant::now() + after);
                }
            }
        };
        if let Some(runner) = runner {
            // Whoever was told to come again goes on with what it has.
            let is_sent_away = matches!(ending, Ending::Closed(CloseCode::GoingAway | CloseCode::Expired));
            tokio::join!(link.shut_down(), runner.end(is_sent_away));
        } else {
            link.shut_down().await;
        }
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
    let mut nothing = Subscriptions::default();
    while link.ending().is_none() {
        let event = poll_fn(|cx| {
            let (mut changed, mut stop) =
                (pin!(None::<std::future::Pending<_>>), pin!(None::<std::future::Pending<()>>));
            poll_event(cx, &mut link, &mut nothing, changed.as_mut(), timer.as_mut(), stop.as_mut())
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
    Fetched(usize, Fetched),
    Timer,
    Renewed(rich::Renewed),
    /// A frame from whoever runs the client's errands.
    Errand(String),
    Stop,
}

/// Polls everything a session waits for: reading before the clock, so that a pong which has come is not called late.
fn poll_event<S, W, T>(
    cx: &mut Context<'_>,
    link: &mut Link<S>,
    work: &mut Subscriptions,
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
    if let Poll::Ready((index, fetched)) = work.poll_work(cx) {
        return Poll::Ready(Event::Fetched(index, fetched));
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
