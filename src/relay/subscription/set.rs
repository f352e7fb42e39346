//! The subscriptions of one session, served in turn.

use std::sync::Arc;
use std::task::{Context, Poll};

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::event::{Filter, StreamName};
use crate::relay::hub::{Channel, Hub};
use crate::relay::session::close::CloseCode;
use crate::relay::subscription::batching::EventBatcher;
use crate::relay::subscription::{ReadOutcome, StoreRead, Subscription};
use crate::relay::wire::write_buffer::WriteBuffer;

/// The subscriptions of one session: one in plain mode, up to one per stream of the channel in rich mode.
#[derive(Default)]
pub(crate) struct SubscriptionSet {
    active: SmallVec<[ActiveSubscription; 1]>,
    /// The index of the subscription to serve first in the next pass.
    first_index: usize,
}

struct ActiveSubscription {
    subscription: Subscription,
    /// The read of the store in progress for it.
    read: Option<StoreRead>,
    /// Its batcher, if the client asked for batches.
    batcher: Option<Box<EventBatcher>>,
}

impl ActiveSubscription {
    /// Returns the client's position, which is before the events that wait in a batch.
    fn position(&self) -> String {
        let waiting = self.batcher.as_ref().and_then(|batcher| batcher.position());
        waiting.map_or_else(|| self.subscription.positions(), str::to_owned)
    }
}

impl SubscriptionSet {
    pub(crate) fn add(&mut self, subscription: Subscription) {
        self.add_batched(subscription, None);
    }

    /// Adds a subscription whose events are batched.
    pub(crate) fn add_batched(&mut self, subscription: Subscription, batcher: Option<Box<EventBatcher>>) {
        // Many sessions have a few subscriptions, so spare capacity adds up.
        self.active.reserve_exact(1);
        self.active.push(ActiveSubscription { subscription, read: None, batcher });
    }

    /// Ends the subscription to a stream. Returns its position, or `None` if there is none.
    pub(crate) fn remove(&mut self, stream: &StreamName) -> Option<String> {
        let index = self.active.iter().position(|held| held.subscription.contains(stream))?;
        Some(self.active.swap_remove(index).position())
    }

    /// Replaces the filter from the client's position on. Returns that position, or `None` if there is no such
    /// subscription.
    pub(crate) fn replace_filter(&mut self, stream: &StreamName, filter: Filter) -> Option<String> {
        let held = self.active.iter_mut().find(|held| held.subscription.contains(stream))?;
        held.subscription.replace_filter(filter);
        Some(held.position())
    }

    /// Returns the subscription to a stream.
    pub(crate) fn get(&mut self, stream: &StreamName) -> Option<&mut Subscription> {
        self.active.iter_mut().map(|held| &mut held.subscription).find(|subscription| subscription.contains(stream))
    }

    /// Adds as much as can be written now, and starts the next reads of the store. An error is the close code that
    /// ends the session.
    pub(crate) fn fill(&mut self, hub: &Arc<Hub>, channel: &Channel, out: &mut WriteBuffer) -> Result<(), CloseCode> {
        let count = self.active.len();
        self.first_index = (self.first_index + 1).checked_rem(count).unwrap_or(0);
        for offset in 0..count {
            let ActiveSubscription { subscription, read, batcher } =
                &mut self.active[(self.first_index + offset) % count];
            match batcher {
                None => subscription.fill(hub, channel, out),
                Some(batcher) => {
                    let (mut written, from) = (WriteBuffer::default(), subscription.positions());
                    subscription.fill(hub, channel, &mut written);
                    batcher.add(written, from, out);
                }
            }
            if subscription.is_ended_by_gap() {
                return Err(CloseCode::StateLost);
            }
            if read.is_none() {
                *read = subscription.next_read(hub);
            }
        }
        Ok(())
    }

    /// Returns whether the last pass left work.
    pub(crate) fn is_lagging(&self) -> bool {
        self.active.iter().any(|held| held.subscription.is_lagging())
    }

    /// Ready when a read is done, with the index of its subscription.
    pub(crate) fn poll_reads(&mut self, cx: &mut Context<'_>) -> Poll<(usize, ReadOutcome)> {
        for (index, held) in self.active.iter_mut().enumerate() {
            if let Some(Poll::Ready(outcome)) = held.read.as_mut().map(|read| read.as_mut().poll(cx)) {
                held.read = None;
                return Poll::Ready((index, outcome));
            }
        }
        Poll::Pending
    }

    /// Applies the result of a read. An error is the close code that ends the session.
    pub(crate) fn apply(
        &mut self,
        index: usize,
        outcome: ReadOutcome,
        hub: &Hub,
        channel: &Channel,
    ) -> Result<(), CloseCode> {
        self.active[index].subscription.apply(outcome, hub, channel)
    }

    /// Adds the positions of streams in which only filtered entries came since the last report.
    pub(crate) fn add_marks(&mut self, out: &mut WriteBuffer) {
        for held in &mut self.active {
            if let Some(batcher) = &mut held.batcher {
                batcher.flush(out);
            }
            held.subscription.add_marks(out);
        }
    }

    /// Returns the time at which the first batch must be written.
    pub(crate) fn next_flush(&self) -> Option<Instant> {
        self.active.iter().filter_map(|held| held.batcher.as_ref()?.flush_at()).min()
    }
}

impl std::fmt::Debug for SubscriptionSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.active.iter().map(|held| &held.subscription)).finish()
    }
}
