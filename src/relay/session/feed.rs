//! Alerts as the body of an HTTP answer: Server-Sent Events, or lines of JSON.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::backoff::full_jitter;
use crate::relay::metrics::Written;
use crate::relay::session::limits::Slot;
use crate::relay::session::notify::Listener;
use crate::relay::subscription::{Subscription, Work};
use crate::relay::wire::encoding::Form;
use crate::relay::wire::write_buffer::Outgoing;
use crate::relay::{Channel, Hub};

/// How often something is sent where nothing comes, so that nobody on the way takes the connection for dead.
const BEAT: Duration = Duration::from_secs(20);

/// How a feed is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForm {
    /// Server-Sent Events: `id` is where to resume from.
    EventStream,
    /// A line of JSON per alert.
    Lines,
}

/// A client that was let in and reads from an HTTP answer. Holds its place among the connections until it is dropped.
pub struct Feed {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscription: Subscription,
    form: Form,
    outgoing: Outgoing,
    work: Option<Work>,
    bell: Listener,
    beat_at: Instant,
    drain: Listener,
    ends_at: Option<Instant>,
    /// When what the client showed has expired.
    expires_at: Option<Instant>,
    _slot: Slot,
}

impl Feed {
    pub(crate) fn new(
        hub: Arc<Hub>,
        channel: Arc<Channel>,
        subscription: Subscription,
        form: Form,
        slot: Slot,
    ) -> Self {
        let (bell, drain) = (Listener::new(channel.bell.clone()), Listener::new(hub.draining.clone()));
        let beat_at = Instant::now() + BEAT;
        let outgoing = Outgoing::default();
        Self {
            hub,
            channel,
            subscription,
            form,
            outgoing,
            work: None,
            bell,
            beat_at,
            drain,
            ends_at: None,
            expires_at: None,
            _slot: slot,
        }
    }

    /// The same feed, which ends then, if not before.
    pub(crate) fn until(self, ends_at: Option<Instant>) -> Self {
        Self { expires_at: ends_at, ..self }
    }

    /// The next piece of the body, whole alerts; nothing when the feed is over. Waits for it.
    ///
    /// What is asked for next tells that what came before was taken: a reader that does not read is sent nothing, and
    /// costs a few pieces. Cancel-safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            // Also a reader for whom there is always something ends in time.
            if self.ends_at.is_none() && self.hub.draining.is_rung() {
                self.ends_at = Some(Instant::now() + full_jitter(self.hub.config.drain_window));
            }
            let ends_at = self.ends_at.into_iter().chain(self.expires_at).min();
            if ends_at.is_some_and(|at| Instant::now() >= at) {
                return None;
            }
            if let Some(piece) = self.outgoing.pop() {
                self.beat_at = Instant::now() + BEAT;
                return Some(piece);
            }
            // Only what changes after this line needs to wake us.
            self.bell.catch_up();
            if self.subscription.is_lost() {
                return None;
            }
            self.subscription.fill(&self.hub, &self.channel, &mut self.outgoing);
            self.count();
            if !self.outgoing.is_empty() {
                continue;
            }
            if self.work.is_none() {
                self.work = self.subscription.work(&self.hub);
            }
            tokio::select! {
                fetched = async { self.work.as_mut().expect("there is work").await }, if self.work.is_some() => {
                    self.work = None;
                    if self.subscription.apply(fetched, &self.hub, &self.channel).is_err() {
                        return None;
                    }
                }
                () = self.bell.rung() => {}
                () = tokio::time::sleep_until(self.beat_at) => self.beat(),
                () = self.drain.rung(), if self.ends_at.is_none() => {}
                () = tokio::time::sleep_until(ends_at.unwrap_or(self.beat_at)), if ends_at.is_some() => {}
            }
        }
    }

    /// Tells where the client stands, or at least that somebody is there.
    fn beat(&mut self) {
        self.beat_at = Instant::now() + BEAT;
        self.subscription.mark(&mut self.outgoing);
        if self.outgoing.is_empty() {
            let nothing: &[u8] = match self.form {
                Form::EventStream { .. } => b":\n\n",
                _ => b"\n",
            };
            self.outgoing.push(Bytes::from_static(nothing));
        }
    }

    fn count(&mut self) {
        let written = self.outgoing.take_written();
        self.channel.meter.count(&Written { writes: u64::from(written.alerts > 0), ..written });
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").field("channel", &self.channel.name).finish_non_exhaustive()
    }
}
