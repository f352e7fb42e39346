//! A subscription as the body of an HTTP response: Server-Sent Events or JSON lines.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::backoff::full_jitter;
use crate::relay::hub::{Channel, Hub};
use crate::relay::metrics::WriteStats;
use crate::relay::session::limits::ConnectionPermit;
use crate::relay::session::notify::Subscriber;
use crate::relay::subscription::{StoreRead, Subscription};
use crate::relay::wire::encoding::Encoding;
use crate::relay::wire::write_buffer::WriteBuffer;

/// The interval of heartbeats in an idle feed, so that proxies do not close the connection.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(20);

/// The encoding of a feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedEncoding {
    /// Server-Sent Events. `id` is the position to resume from.
    EventStream,
    /// JSON lines, one per alert.
    Lines,
}

/// An admitted client that reads from an HTTP response. Holds its connection permit until it is dropped.
pub struct Feed {
    hub: Arc<Hub>,
    channel: Arc<Channel>,
    subscription: Subscription,
    encoding: Encoding,
    output: WriteBuffer,
    read: Option<StoreRead>,
    new_entries: Subscriber,
    heartbeat_at: Instant,
    drain: Subscriber,
    ends_at: Option<Instant>,
    /// The time at which the client's credentials expire.
    expires_at: Option<Instant>,
    _permit: ConnectionPermit,
}

impl Feed {
    pub(crate) fn new(
        hub: Arc<Hub>,
        channel: Arc<Channel>,
        subscription: Subscription,
        encoding: Encoding,
        permit: ConnectionPermit,
    ) -> Self {
        let (new_entries, drain) = (Subscriber::new(channel.broadcast.clone()), Subscriber::new(hub.draining.clone()));
        let heartbeat_at = Instant::now() + HEARTBEAT_INTERVAL;
        let output = WriteBuffer::default();
        Self {
            hub,
            channel,
            subscription,
            encoding,
            output,
            read: None,
            new_entries,
            heartbeat_at,
            drain,
            ends_at: None,
            expires_at: None,
            _permit: permit,
        }
    }

    /// Sets a time at which the feed ends, if not before.
    pub(crate) fn ending_at(self, ends_at: Option<Instant>) -> Self {
        Self { expires_at: ends_at, ..self }
    }

    /// Returns the next piece of the body, which has whole alerts, or `None` at the end of the feed.
    ///
    /// Each call confirms that the piece before was read. A client that does not read receives nothing more and costs
    /// a few pieces of memory. Cancel-safe: yes.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            // Here, so that a reader with unlimited data ends in time as well.
            if self.ends_at.is_none() && self.hub.draining.was_notified() {
                self.ends_at = Some(Instant::now() + full_jitter(self.hub.config.drain_window));
            }
            let ends_at = self.ends_at.into_iter().chain(self.expires_at).min();
            if ends_at.is_some_and(|at| Instant::now() >= at) {
                return None;
            }
            if let Some(piece) = self.output.pop() {
                self.heartbeat_at = Instant::now() + HEARTBEAT_INTERVAL;
                return Some(piece);
            }
            // Only changes after this line need to wake us.
            self.new_entries.mark_seen();
            if self.subscription.is_ended_by_gap() {
                return None;
            }
            self.subscription.fill(&self.hub, &self.channel, &mut self.output);
            self.count_written();
            if !self.output.is_empty() {
                continue;
            }
            if self.read.is_none() {
                self.read = self.subscription.next_read(&self.hub);
            }
            tokio::select! {
                outcome = async { self.read.as_mut().expect("a read").await }, if self.read.is_some() => {
                    self.read = None;
                    if self.subscription.apply(outcome, &self.hub, &self.channel).is_err() {
                        return None;
                    }
                }
                () = self.new_entries.notified() => {}
                () = tokio::time::sleep_until(self.heartbeat_at) => self.heartbeat(),
                () = self.drain.notified(), if self.ends_at.is_none() => {}
                () = tokio::time::sleep_until(ends_at.unwrap_or(self.heartbeat_at)), if ends_at.is_some() => {}
            }
        }
    }

    /// Adds the position, or an empty line or comment if the client knows it.
    fn heartbeat(&mut self) {
        self.heartbeat_at = Instant::now() + HEARTBEAT_INTERVAL;
        self.subscription.add_marks(&mut self.output);
        if self.output.is_empty() {
            let keep_alive: &[u8] = match self.encoding {
                Encoding::EventStream { .. } => b":\n\n",
                _ => b"\n",
            };
            self.output.push(Bytes::from_static(keep_alive));
        }
    }

    fn count_written(&mut self) {
        let stats = self.output.take_stats();
        self.channel.metrics.count(&WriteStats { writes: u64::from(stats.alerts > 0), ..stats });
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").field("channel", &self.channel.name).finish_non_exhaustive()
    }
}
