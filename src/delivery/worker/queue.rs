//! The dispatch queue: entries that wait for the sink, in the order in which they may go there.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::delivery::config::GroupConfig;
use crate::delivery::ordering::{OrderBy, Ordering, OrderingHash};
use crate::event::{Delivery, Entry, EntryId};

/// The key of an entry. Entries with the same key go to the sink one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum OrderingKey {
    /// All entries of the group.
    Stream,
    /// The entries with one value of the key.
    Key(OrderingHash),
    /// An entry without a key.
    Entry(EntryId),
}

/// Entries that wait for the sink.
#[derive(Debug)]
pub(crate) enum DispatchQueue {
    /// First in, first out.
    Fifo(VecDeque<Delivery>),
    /// In order per key.
    Keyed(KeyedQueues),
}

/// The entries of one call of the sink, with the key of each if the queue is keyed.
#[derive(Debug, Default)]
pub(crate) struct SinkBatch {
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) keys: Vec<OrderingKey>,
}

/// One queue per key.
#[derive(Debug)]
pub(crate) struct KeyedQueues {
    /// The key, or `None` if the whole stream has one queue.
    order_by: Option<OrderBy>,
    queues: HashMap<OrderingKey, KeyQueue>,
    /// Keys whose first entry may go now. The first one has waited longest.
    ready: VecDeque<OrderingKey>,
    /// The key of every entry that waits, is with the sink, or blocks its key.
    keys: HashMap<EntryId, OrderingKey>,
    waiting: usize,
    blocked: usize,
}

/// The entries of one key.
#[derive(Debug, Default)]
struct KeyQueue {
    /// Oldest first.
    waiting: VecDeque<Delivery>,
    is_with_sink: bool,
    /// An entry that failed, and waits for its next attempt or its dead letter. Until then no other entry may go.
    blocked_by: Option<EntryId>,
}

impl DispatchQueue {
    pub(crate) fn new(config: &GroupConfig) -> Self {
        let order_by = match config.ordering {
            Ordering::None => return Self::Fifo(VecDeque::new()),
            Ordering::Key => config.order_by.clone(),
            Ordering::Stream => None,
        };
        Self::Keyed(KeyedQueues {
            order_by,
            queues: HashMap::new(),
            ready: VecDeque::new(),
            keys: HashMap::new(),
            waiting: 0,
            blocked: 0,
        })
    }

    /// Adds an entry after the older ones of its key.
    pub(crate) fn push(&mut self, delivery: Delivery) {
        match self {
            Self::Fifo(queue) => queue.push_back(delivery),
            Self::Keyed(keyed) => keyed.push(delivery),
        }
    }

    /// Returns the number of entries that wait.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Fifo(queue) => queue.len(),
            Self::Keyed(keyed) => keyed.waiting,
        }
    }

    /// Returns the number of keys that a failed entry blocks.
    pub(crate) fn blocked(&self) -> usize {
        match self {
            Self::Fifo(_) => 0,
            Self::Keyed(keyed) => keyed.blocked,
        }
    }

    /// Returns all entries that wait.
    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = &Delivery> + '_> {
        match self {
            Self::Fifo(queue) => Box::new(queue.iter()),
            Self::Keyed(keyed) => Box::new(keyed.queues.values().flat_map(|queue| queue.waiting.iter())),
        }
    }

    /// Returns the next entry, or `None` if none may go now.
    pub(crate) fn first(&self) -> Option<&Delivery> {
        match self {
            Self::Fifo(queue) => queue.front(),
            Self::Keyed(keyed) => keyed.ready.front().and_then(|key| keyed.queues.get(key)?.waiting.front()),
        }
    }

    /// Returns the entries that may go now: the first of each key.
    pub(crate) fn ready(&self) -> Box<dyn Iterator<Item = &Delivery> + '_> {
        match self {
            Self::Fifo(queue) => Box::new(queue.iter()),
            Self::Keyed(keyed) => Box::new(keyed.ready.iter().filter_map(|key| keyed.queues.get(key)?.waiting.front())),
        }
    }

    /// Makes this entry of [`Self::ready`] the next one.
    pub(crate) fn move_to_front(&mut self, id: EntryId) {
        match self {
            Self::Fifo(queue) => {
                let index = queue.iter().position(|delivery| delivery.entry.id == id);
                if let Some(delivery) = index.and_then(|index| queue.remove(index)) {
                    queue.push_front(delivery);
                }
            }
            Self::Keyed(keyed) => {
                let key = keyed.keys.get(&id);
                if let Some(index) = keyed.ready.iter().position(|ready| Some(ready) == key) {
                    keyed.ready.rotate_left(index);
                }
            }
        }
    }

    /// Returns entries to the front, in their order, because the sink did not take them.
    pub(crate) fn requeue(&mut self, deliveries: Vec<Delivery>) {
        match self {
            Self::Fifo(queue) => deliveries.into_iter().rev().for_each(|delivery| queue.push_front(delivery)),
            Self::Keyed(keyed) => deliveries.into_iter().for_each(|delivery| keyed.push(delivery)),
        }
    }

    /// Sorts all entries by their ids, after some were moved to the front.
    pub(crate) fn sort(&mut self) {
        if let Self::Fifo(queue) = self {
            queue.make_contiguous().sort_by_key(|delivery| delivery.entry.id);
        }
    }

    /// Takes entries that may go now while they `fit`. Their keys are busy until [`Self::call_ended`].
    pub(crate) fn take(&mut self, mut fits: impl FnMut(&Delivery) -> bool) -> SinkBatch {
        match self {
            Self::Fifo(queue) => {
                let fitting = queue.iter().take_while(|delivery| fits(delivery)).count();
                SinkBatch { deliveries: queue.drain(..fitting).collect(), keys: Vec::new() }
            }
            Self::Keyed(keyed) => keyed.take(fits),
        }
    }

    /// Frees the keys of a call that has ended. The outcome of each entry is noted before.
    pub(crate) fn call_ended(&mut self, keys: &[OrderingKey]) {
        if let Self::Keyed(keyed) = self {
            for key in keys {
                keyed.change(*key, |queue| queue.is_with_sink = false);
            }
        }
    }

    /// Blocks the key of a failed entry until the entry is pushed again or done.
    pub(crate) fn block(&mut self, id: EntryId) {
        if let Self::Keyed(keyed) = self
            && let Some(key) = keyed.keys.get(&id).copied()
        {
            keyed.change(key, |queue| queue.blocked_by = Some(id));
        }
    }

    /// Returns whether another entry blocks the key of this one.
    pub(crate) fn is_blocked(&self, id: EntryId) -> bool {
        match self {
            Self::Fifo(_) => false,
            Self::Keyed(keyed) => {
                let queue = keyed.keys.get(&id).and_then(|key| keyed.queues.get(key));
                queue.and_then(|queue| queue.blocked_by).is_some_and(|blocking| blocking != id)
            }
        }
    }

    /// Drops an entry for good. Later entries of its key go on.
    pub(crate) fn done(&mut self, id: EntryId) {
        if let Self::Keyed(keyed) = self
            && let Some(key) = keyed.keys.remove(&id)
        {
            keyed.change(key, |queue| {
                queue.waiting.retain(|delivery| delivery.entry.id != id);
                queue.blocked_by = queue.blocked_by.filter(|blocking| *blocking != id);
            });
        }
    }

    /// Drops waiting entries. Returns how many there were.
    pub(crate) fn remove(&mut self, ids: &[EntryId]) -> usize {
        let before = self.len();
        match self {
            Self::Fifo(queue) => {
                let ids: HashSet<EntryId> = ids.iter().copied().collect();
                queue.retain(|delivery| !ids.contains(&delivery.entry.id));
            }
            Self::Keyed(_) => {
                let waiting: HashSet<EntryId> = self.iter().map(|delivery| delivery.entry.id).collect();
                for id in ids.iter().filter(|id| waiting.contains(id)) {
                    self.done(*id);
                }
            }
        }
        before - self.len()
    }

    /// Takes all entries that wait.
    pub(crate) fn drain(&mut self) -> Vec<Delivery> {
        match self {
            Self::Fifo(queue) => queue.drain(..).collect(),
            Self::Keyed(keyed) => {
                keyed.ready.clear();
                keyed.waiting = 0;
                keyed.queues.values_mut().flat_map(|queue| queue.waiting.drain(..)).collect()
            }
        }
    }
}

impl KeyedQueues {
    fn key_of(&self, entry: &Entry) -> OrderingKey {
        match &self.order_by {
            None => OrderingKey::Stream,
            Some(order_by) => order_by.key(entry).map_or(OrderingKey::Entry(entry.id), OrderingKey::Key),
        }
    }

    fn push(&mut self, delivery: Delivery) {
        let id = delivery.entry.id;
        let key = self.keys.get(&id).copied().unwrap_or_else(|| self.key_of(&delivery.entry));
        self.keys.insert(id, key);
        self.change(key, |queue| {
            queue.blocked_by = queue.blocked_by.filter(|blocking| *blocking != id);
            let index = queue.waiting.partition_point(|other| other.entry.id < id);
            queue.waiting.insert(index, delivery);
        });
    }

    fn take(&mut self, mut fits: impl FnMut(&Delivery) -> bool) -> SinkBatch {
        let mut batch = SinkBatch::default();
        while let Some(key) = self.ready.front().copied() {
            let queue = self.queues.get_mut(&key).expect("a ready key has entries");
            let fitting = queue.waiting.iter().take_while(|delivery| fits(delivery)).count();
            if fitting == 0 {
                break;
            }
            self.ready.pop_front();
            self.waiting -= fitting;
            queue.is_with_sink = true;
            batch.deliveries.extend(queue.waiting.drain(..fitting));
            batch.keys.extend(std::iter::repeat_n(key, fitting));
        }
        batch
    }

    /// Changes the queue of a key, and updates the counters and the ready keys.
    fn change(&mut self, key: OrderingKey, change: impl FnOnce(&mut KeyQueue)) {
        let queue = self.queues.entry(key).or_default();
        let (waiting, was_blocked, was_ready) = (queue.waiting.len(), queue.blocked_by.is_some(), queue.is_ready());
        change(queue);
        self.waiting = self.waiting + queue.waiting.len() - waiting;
        self.blocked = self.blocked + usize::from(queue.blocked_by.is_some()) - usize::from(was_blocked);
        match (was_ready, queue.is_ready()) {
            (false, true) => self.ready.push_back(key),
            (true, false) => self.ready.retain(|ready| *ready != key),
            _ => {}
        }
        if queue.is_unused() {
            self.queues.remove(&key);
        }
    }
}

impl KeyQueue {
    fn is_ready(&self) -> bool {
        !self.is_with_sink && self.blocked_by.is_none() && !self.waiting.is_empty()
    }

    fn is_unused(&self) -> bool {
        !self.is_with_sink && self.blocked_by.is_none() && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;

    use super::*;
    use crate::event::Fields;

    fn queue(ordering: Ordering) -> DispatchQueue {
        let mut config = GroupConfig::new("siem".parse().unwrap());
        config.ordering = ordering;
        config.order_by = Some(OrderBy::Field("source".to_owned()));
        DispatchQueue::new(&config)
    }

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn delivery(ms: u64, source: &'static str) -> Delivery {
        let fields: Fields = [(Bytes::from("source"), Bytes::from(source))].into_iter().collect();
        Delivery { entry: Entry { id: id(ms), fields }, attempt: 1, delivered_at: Instant::now() }
    }

    fn take(queue: &mut DispatchQueue, limit: usize) -> (Vec<u64>, Vec<OrderingKey>) {
        let mut left = limit;
        let batch = queue.take(|_| {
            let fits = left > 0;
            left = left.saturating_sub(1);
            fits
        });
        (batch.deliveries.iter().map(|delivery| delivery.entry.id.ms).collect(), batch.keys)
    }

    #[test]
    fn unordered_queue_is_first_in_first_out() {
        let mut queue = queue(Ordering::None);
        for ms in [3, 1, 2] {
            queue.push(delivery(ms, "a"));
        }
        assert_eq!(queue.first().map(|delivery| delivery.entry.id), Some(id(3)));
        assert_eq!(take(&mut queue, 2).0, [3, 1]);
        queue.block(id(3));
        assert_eq!((take(&mut queue, 2).0, queue.blocked(), queue.len()), (vec![2], 0, 0));
    }

    #[test]
    fn key_with_the_sink_lets_only_other_keys_pass() {
        let mut queue = queue(Ordering::Key);
        for (ms, source) in [(1, "a"), (2, "b"), (3, "a"), (4, ""), (5, ""), (6, "b")] {
            queue.push(delivery(ms, source));
        }
        let (taken, keys) = take(&mut queue, 1);
        assert_eq!(taken, [1]);
        assert_eq!(take(&mut queue, 9).0, [2, 6, 4, 5], "entries without a key go independently");
        assert_eq!(take(&mut queue, 9).0, Vec::<u64>::new());
        assert_eq!(queue.len(), 1);
        queue.done(id(1));
        queue.call_ended(&keys);
        assert_eq!(take(&mut queue, 9).0, [3]);
    }

    #[test]
    fn key_waits_until_its_failed_entry_is_retried_or_done() {
        for is_retried in [true, false] {
            let mut queue = queue(Ordering::Key);
            for (ms, source) in [(1, "a"), (2, "a"), (3, "b"), (4, "a")] {
                queue.push(delivery(ms, source));
            }
            let (taken, keys) = take(&mut queue, 3);
            assert_eq!(taken, [1, 2, 4]);
            queue.block(id(1));
            assert!(queue.is_blocked(id(2)) && !queue.is_blocked(id(1)));
            queue.push(delivery(2, "a"));
            queue.push(delivery(4, "a"));
            queue.call_ended(&keys);
            assert_eq!((take(&mut queue, 9).0, queue.blocked(), queue.len()), (vec![3], 1, 2));
            if is_retried {
                queue.push(delivery(1, "a"));
                assert_eq!(take(&mut queue, 9).0, [1, 2, 4]);
            } else {
                queue.done(id(1));
                assert_eq!(take(&mut queue, 9).0, [2, 4]);
            }
            assert_eq!((queue.blocked(), queue.len()), (0, 0));
        }
    }

    #[test]
    fn stream_order_has_one_queue() {
        let mut queue = queue(Ordering::Stream);
        for ms in [2, 1, 3] {
            queue.push(delivery(ms, "a"));
        }
        let (taken, keys) = take(&mut queue, 2);
        assert_eq!(taken, [1, 2]);
        assert_eq!(take(&mut queue, 2).0, Vec::<u64>::new());
        for ms in [1, 2] {
            queue.done(id(ms));
        }
        queue.call_ended(&keys);
        assert_eq!(queue.iter().count(), 1);
        assert_eq!(queue.remove(&[id(3), id(9)]), 1);
        assert!(queue.first().is_none() && queue.len() == 0);
    }

    #[test]
    fn unused_keys_are_removed() {
        let mut queue = queue(Ordering::Key);
        for pass in 0..3 {
            for (ms, source) in [(1, "a"), (2, ""), (3, "b")] {
                queue.push(delivery(pass * 10 + ms, source));
            }
            let (taken, keys) = take(&mut queue, 9);
            for ms in taken {
                queue.done(id(ms));
            }
            queue.call_ended(&keys);
        }
        let DispatchQueue::Keyed(keyed) = &queue else { panic!("a keyed queue") };
        assert!(keyed.queues.is_empty() && keyed.keys.is_empty() && keyed.ready.is_empty());
    }
}
