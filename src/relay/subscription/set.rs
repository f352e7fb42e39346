//! What one client is subscribed to, and who is next.

use std::sync::Arc;
use std::task::{Context, Poll};

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::event::Filter;
use crate::event::StreamName;
use crate::relay::subscription::batching::Gathering;
use crate::relay::subscription::{Fetched, Subscription, Work};
use crate::relay::wire::write_buffer::Outgoing;
use crate::relay::{Channel, CloseCode, Hub};

/// The subscriptions of one session: one in plain mode, up to one per stream of the channel in rich mode.
#[derive(Default)]
pub(crate) struct Subscriptions {
    held: SmallVec<[Held; 1]>,
    /// Which of them is served first the next time.
    first: usize,
}

struct Held {
    subscription: Subscription,
    /// The read of the store that is under way for it.
    work: Option<Work>,
    /// Its events that wait for others, where the client wants that.
    gathering: Option<Box<Gathering>>,
}

impl Held {
    /// Where the client stands: it has not been given what waits.
    fn position(&self) -> String {
        let waiting = self.gathering.as_ref().and_then(|gathering| gathering.position());
        waiting.map_or_else(|| self.subscription.positions(), str::to_owned)
    }
}

impl Subscriptions {
    pub(crate) fn add(&mut self, subscription: Subscription) {
        self.add_gathered(subscription, None);
    }

    /// A subscription whose events are gathered.
    pub(crate) fn add_gathered(&mut self, subscription: Subscription, gathering: Option<Box<Gathering>>) {
        // Many have a few, and there are many clients.
        self.held.reserve_exact(1);
        self.held.push(Held { subscription, work: None, gathering });
    }

    /// Ends the subscription to a stream, if there is one, and says where it stood.
    pub(crate) fn remove(&mut self, stream: &StreamName) -> Option<String> {
        let index = self.held.iter().position(|held| held.subscription.is_to(stream))?;
        Some(self.held.swap_remove(index).position())
    }

    /// Lets something else pass from where the client stands, and says where that is, if there is such a subscription.
    pub(crate) fn replace_filter(&mut self, stream: &StreamName, filter: Filter) -> Option<String> {
        let held = self.held.iter_mut().find(|held| held.subscription.is_to(stream))?;
        held.subscription.replace_filter(filter);
        Some(held.position())
    }

    /// The subscription to a stream.
    pub(crate) fn of(&mut self, stream: &StreamName) -> Option<&mut Subscription> {
        self.held.iter_mut().map(|held| &mut held.subscription).find(|subscription| subscription.is_to(stream))
    }

    /// Adds what can be written now, and begins the reads of the store that come next. An error is how the session
    /// must end.
    pub(crate) fn fill(&mut self, hub: &Arc<Hub>, channel: &Channel, out: &mut Outgoing) -> Result<(), CloseCode> {
        let count = self.held.len();
        self.first = (self.first + 1).checked_rem(count).unwrap_or(0);
        for turn in 0..count {
            let Held { subscription, work, gathering } = &mut self.held[(self.first + turn) % count];
            match gathering {
                None => subscription.fill(hub, channel, out),
                Some(gathering) => {
                    let (mut written, from) = (Outgoing::default(), subscription.positions());
                    subscription.fill(hub, channel, &mut written);
                    gathering.add(written, from, out);
                }
            }
            if subscription.is_lost() {
                return Err(CloseCode::StateLost);
            }
            if work.is_none() {
                *work = subscription.work(hub);
            }
        }
        Ok(())
    }

    /// Whether there was more than could be given when this was filled last.
    pub(crate) fn is_lagging(&self) -> bool {
        self.held.iter().any(|held| held.subscription.is_lagging())
    }

    /// Ready when one of the reads is done, and then with the index of whose it is.
    pub(crate) fn poll_work(&mut self, cx: &mut Context<'_>) -> Poll<(usize, Fetched)> {
        for (index, held) in self.held.iter_mut().enumerate() {
            if let Some(Poll::Ready(fetched)) = held.work.as_mut().map(|work| work.as_mut().poll(cx)) {
                held.work = None;
                return Poll::Ready((index, fetched));
            }
        }
        Poll::Pending
    }

    /// Takes in what was read. An error is how the session must end.
    pub(crate) fn apply(
        &mut self,
        index: usize,
        fetched: Fetched,
        hub: &Hub,
        channel: &Channel,
    ) -> Result<(), CloseCode> {
        self.held[index].subscription.apply(fetched, hub, channel)
    }

    /// Tells where the client stands in streams of which nothing passed since it was told last.
    pub(crate) fn mark(&mut self, out: &mut Outgoing) {
        for held in &mut self.held {
            if let Some(gathering) = &mut held.gathering {
                gathering.flush(out);
            }
            held.subscription.mark(out);
        }
    }

    /// When the first of the events that wait for others are to be written.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.held.iter().filter_map(|held| held.gathering.as_ref()?.due()).min()
    }
}

impl std::fmt::Debug for Subscriptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.held.iter().map(|held| &held.subscription)).finish()
    }
}
