//! Entries in flight: queued for the sink, with the sink, or expected from a call under way.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant as WallInstant};

use tokio::time::Instant;

use crate::delivery::worker::breaker::Allowance;
use crate::delivery::worker::context::WorkerContext;
use crate::delivery::worker::metrics::GaugeShare;
use crate::delivery::worker::queue::{DispatchQueue, OrderingKey};
use crate::delivery::worker::sink_health::SinkHealth;
use crate::delivery::worker::tasks::{Task, TaskResult};
use crate::event::{DeadLetterReason, Delivery, EntryId};

/// Passes entries to the sink, and knows which ones it has.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) queue: DispatchQueue,
    /// Queued entries that the sink cannot take, for groups that halt at them.
    undeliverable: HashMap<EntryId, (DeadLetterReason, String)>,
    calls: Vec<SinkCall>,
    next_call: u64,
    /// Entries that calls of the store may bring.
    expected: usize,
    gauge: GaugeShare,
}

/// A batch that the sink has now.
#[derive(Debug, Default)]
pub(crate) struct SinkCall {
    number: u64,
    ids: Vec<EntryId>,
    pub(crate) keys: Vec<OrderingKey>,
    oldest: Option<WallInstant>,
    /// Whether the call is to find out if an outage is over.
    pub(crate) is_probe: bool,
}

/// The next entries in the queue: a call of the sink, or an entry at which the group halts.
pub(crate) enum Dispatch {
    Call(Task),
    Undeliverable { delivery: Delivery, error: String },
}

impl InFlight {
    pub(crate) fn new(context: &WorkerContext) -> Self {
        Self {
            queue: DispatchQueue::new(&context.group.config),
            undeliverable: HashMap::new(),
            calls: Vec::new(),
            next_call: 0,
            expected: 0,
            gauge: GaugeShare::new(&context.metrics.in_flight),
        }
    }

    /// Starts the next call of the sink if it is due. During an outage it carries one entry, as a probe.
    pub(crate) fn start(
        &mut self,
        now: Instant,
        may_deliver: bool,
        sink: &mut SinkHealth,
        context: &WorkerContext,
    ) -> Option<Dispatch> {
        if self.next_due(now, may_deliver, sink, context)? > now {
            return None;
        }
        let is_probe = sink.breaker.allows(now) == Allowance::One;
        if is_probe {
            self.choose_probe(sink);
        }
        let first = self.queue.first()?.entry.id;
        if let Some((_, error)) = self.undeliverable.remove(&first) {
            let mut left = 1..=1;
            let delivery = self.queue.take(|_| left.next().is_some()).deliveries.pop()?;
            return Some(Dispatch::Undeliverable { delivery, error });
        }
        let (retry, undeliverable) = (&context.group.config.retry, &self.undeliverable);
        let (mut limit, mut entries) = (if is_probe { 1 } else { context.max_batch }, 0);
        // An entry that failed before makes the whole batch smaller.
        let batch = self.queue.take(|delivery| {
            limit = limit.min(retry.batch_limit(delivery.attempt, context.max_batch));
            let fits = entries < limit && !undeliverable.contains_key(&delivery.entry.id);
            entries += usize::from(fits);
            fits
        });
        let number = self.next_call;
        self.next_call += 1;
        self.calls.push(SinkCall {
            number,
            ids: batch.deliveries.iter().map(|delivery| delivery.entry.id).collect(),
            keys: batch.keys.clone(),
            oldest: batch.deliveries.iter().map(|delivery| delivery.delivered_at).min(),
            is_probe,
        });
        if is_probe {
            sink.breaker.begin_probe();
        }
        let caller = context.caller.clone();
        Some(Dispatch::Call(Task::new(0, async move {
            TaskResult::SinkCalled { call: number, result: caller.deliver(batch, is_probe).await }
        })))
    }

    /// Returns when the next call of the sink is due, or `None` until an event changes the conditions.
    pub(crate) fn next_due(
        &self,
        now: Instant,
        may_deliver: bool,
        sink: &SinkHealth,
        context: &WorkerContext,
    ) -> Option<Instant> {
        let has_slot = self.calls.len() < context.group.config.concurrency;
        if may_deliver && has_slot && self.queue.first().is_some() { sink.breaker.next_call(now) } else { None }
    }

    /// Moves the entry to the front that probes the sink: the oldest one that was not tried yet.
    ///
    /// So an entry that always fails does not make the sink look down.
    fn choose_probe(&mut self, sink: &mut SinkHealth) {
        if self.queue.ready().all(|delivery| sink.breaker.was_tried(delivery.entry.id)) {
            sink.breaker.clear_tried();
        }
        let untried = self.queue.ready().map(|delivery| delivery.entry.id);
        if let Some(oldest) = untried.filter(|id| !sink.breaker.was_tried(*id)).min() {
            self.queue.move_to_front(oldest);
        }
    }

    /// Queues an entry that the sink cannot take: the group halts when it is next.
    pub(crate) fn push_undeliverable(&mut self, delivery: Delivery, reason: DeadLetterReason, error: String) {
        self.undeliverable.insert(delivery.entry.id, (reason, error));
        self.queue.push(delivery);
    }

    /// Ends a call of the sink.
    pub(crate) fn call_ended(&mut self, number: u64) -> SinkCall {
        let index = self.calls.iter().position(|call| call.number == number);
        index.map(|index| self.calls.swap_remove(index)).unwrap_or_default()
    }

    /// Reserves room for entries that a call of the store may bring.
    pub(crate) fn expect(&mut self, entries: usize) {
        self.expected += entries;
    }

    /// Frees the room again when the call has ended.
    pub(crate) fn expectation_ended(&mut self, entries: usize) {
        self.expected -= entries;
    }

    pub(crate) fn expected(&self) -> usize {
        self.expected
    }

    pub(crate) fn is_calling(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Returns the number of entries that are queued or with the sink.
    pub(crate) fn len(&self) -> usize {
        let with_sink: usize = self.calls.iter().map(|call| call.ids.len()).sum();
        self.queue.len() + with_sink
    }

    /// Returns all entries that are queued or with the sink.
    pub(crate) fn ids(&self) -> HashSet<EntryId> {
        let queued = self.queue.iter().map(|delivery| delivery.entry.id);
        queued.chain(self.calls.iter().flat_map(|call| call.ids.iter().copied())).collect()
    }

    /// Returns the entries that were delivered at least `age` ago, with their whole batches.
    pub(crate) fn older_than(&self, age: Duration) -> impl Iterator<Item = EntryId> {
        let queued = self.queue.iter().filter(move |delivery| delivery.delivered_at.elapsed() >= age);
        let calls =
            self.calls.iter().filter(move |call| call.oldest.is_none_or(|delivered_at| delivered_at.elapsed() >= age));
        queued.map(|delivery| delivery.entry.id).chain(calls.flat_map(|call| call.ids.iter().copied()))
    }

    /// Updates the gauge with the number of entries that this worker holds.
    pub(crate) fn set_gauge(&mut self, entries: usize) {
        self.gauge.set(entries);
    }
}
