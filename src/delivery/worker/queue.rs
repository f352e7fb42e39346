//! What is in hand and not with the sink yet, in the order in which it may go there.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::delivery::config::GroupConfig;
use crate::delivery::ordering::{Key, OrderBy, Ordering};
use crate::event::{Delivery, Entry, EntryId};

/// Entries of one lane go to the sink one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum OrderingKey {
    /// All entries of the group.
    Stream,
    /// The entries of one key.
    Key(Key),
    /// An entry without a key.
    Alone(EntryId),
}

/// Entries that wait for the sink.
#[derive(Debug)]
pub(crate) enum DispatchQueue {
    /// Any entry may go, the first to come first.
    Any(VecDeque<Delivery>),
    /// KeyedQueues are kept in order, each for itself.
    Keyed(KeyedQueues),
}

/// One call's entries, taken out of the queue. Where there are lanes, the one of each entry.
#[derive(Debug, Default)]
pub(crate) struct SinkBatch {
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) lanes: Vec<OrderingKey>,
}

#[derive(Debug)]
pub(crate) struct KeyedQueues {
    /// What the key is; nothing where the whole stream is one lane.
    order_by: Option<OrderBy>,
    all: HashMap<OrderingKey, KeyQueue>,
    /// KeyedQueues whose first entry may go now, the one that waited longest first.
    free: VecDeque<OrderingKey>,
    /// The lane of every entry that is in one: waiting, with the sink, or held back.
    of: HashMap<EntryId, OrderingKey>,
    waiting: usize,
    held: usize,
}

/// A lane with at least one entry.
#[derive(Debug, Default)]
struct KeyQueue {
    /// Oldest first.
    waiting: VecDeque<Delivery>,
    is_with_sink: bool,
    /// An entry that has failed and comes again, or goes to the dead letters: until then no other may go.
    held_by: Option<EntryId>,
}

impl DispatchQueue {
    pub(crate) fn new(config: &GroupConfig) -> Self {
        let order_by = match config.ordering {
            Ordering::None => return Self::Any(VecDeque::new()),
            Ordering::Key => config.order_by.clone(),
            Ordering::Stream => None,
        };
        Self::Keyed(KeyedQueues {
            order_by,
            all: HashMap::new(),
            free: VecDeque::new(),
            of: HashMap::new(),
            waiting: 0,
            held: 0,
        })
    }

    /// Adds an entry behind those of its lane that are older.
    pub(crate) fn push(&mut self, delivery: Delivery) {
        match self {
            Self::Any(queue) => queue.push_back(delivery),
            Self::Keyed(lanes) => lanes.push(delivery),
        }
    }

    /// How many entries wait.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Any(queue) => queue.len(),
            Self::Keyed(lanes) => lanes.waiting,
        }
    }

    /// How many lanes are held back.
    pub(crate) fn held(&self) -> usize {
        match self {
            Self::Any(_) => 0,
            Self::Keyed(lanes) => lanes.held,
        }
    }

    /// All entries that wait.
    pub(crate) fn iter(&self) -> Box<dyn Iterator<Item = &Delivery> + '_> {
        match self {
            Self::Any(queue) => Box::new(queue.iter()),
            Self::Keyed(lanes) => Box::new(lanes.all.values().flat_map(|lane| lane.waiting.iter())),
        }
    }

    /// The entry that goes next, if one may.
    pub(crate) fn first(&self) -> Option<&Delivery> {
        match self {
            Self::Any(queue) => queue.front(),
            Self::Keyed(lanes) => lanes.free.front().and_then(|id| lanes.all.get(id)?.waiting.front()),
        }
    }

    /// Entries that may go now, of each lane the first.
    pub(crate) fn may_go(&self) -> Box<dyn Iterator<Item = &Delivery> + '_> {
        match self {
            Self::Any(queue) => Box::new(queue.iter()),
            Self::Keyed(lanes) => Box::new(lanes.free.iter().filter_map(|id| lanes.all.get(id)?.waiting.front())),
        }
    }

    /// Has that one of [`Self::may_go`] go next.
    pub(crate) fn prefer(&mut self, id: EntryId) {
        match self {
            Self::Any(queue) => {
                let place = queue.iter().position(|delivery| delivery.entry.id == id);
                if let Some(delivery) = place.and_then(|place| queue.remove(place)) {
                    queue.push_front(delivery);
                }
            }
            Self::Keyed(lanes) => {
                let lane = lanes.of.get(&id);
                if let Some(place) = lanes.free.iter().position(|free| Some(free) == lane) {
                    lanes.free.rotate_left(place);
                }
            }
        }
    }

    /// Takes entries back that the sink did not take, in their order; they go first.
    pub(crate) fn put_back(&mut self, deliveries: Vec<Delivery>) {
        match self {
            Self::Any(queue) => deliveries.into_iter().rev().for_each(|delivery| queue.push_front(delivery)),
            Self::Keyed(lanes) => deliveries.into_iter().for_each(|delivery| lanes.push(delivery)),
        }
    }

    /// Brings all into the order of the stream, after some were preferred.
    pub(crate) fn sort(&mut self) {
        if let Self::Any(queue) = self {
            queue.make_contiguous().sort_by_key(|delivery| delivery.entry.id);
        }
    }

    /// Takes entries that may go now for as long as they `fit`. Their lanes are busy until [`Self::returned`].
    pub(crate) fn take(&mut self, mut fits: impl FnMut(&Delivery) -> bool) -> SinkBatch {
        match self {
            Self::Any(queue) => {
                let fitting = queue.iter().take_while(|delivery| fits(delivery)).count();
                SinkBatch { deliveries: queue.drain(..fitting).collect(), lanes: Vec::new() }
            }
            Self::Keyed(lanes) => lanes.take(fits),
        }
    }

    /// These lanes' entries are back from the sink; what became of each was said before.
    pub(crate) fn returned(&mut self, ids: &[OrderingKey]) {
        if let Self::Keyed(lanes) = self {
            for id in ids {
                lanes.change(*id, |lane| lane.is_with_sink = false);
            }
        }
    }

    /// The entry has failed: its lane waits until it is pushed again, or done.
    pub(crate) fn hold(&mut self, id: EntryId) {
        if let Self::Keyed(lanes) = self
            && let Some(lane) = lanes.of.get(&id).copied()
        {
            lanes.change(lane, |lane| lane.held_by = Some(id));
        }
    }

    /// Whether the entry's lane is held back by another one.
    pub(crate) fn is_held_back(&self, id: EntryId) -> bool {
        match self {
            Self::Any(_) => false,
            Self::Keyed(lanes) => {
                let lane = lanes.of.get(&id).and_then(|lane| lanes.all.get(lane));
                lane.and_then(|lane| lane.held_by).is_some_and(|holding| holding != id)
            }
        }
    }

    /// The entry is out of hand for good: those after it go on.
    pub(crate) fn done(&mut self, id: EntryId) {
        if let Self::Keyed(lanes) = self
            && let Some(lane) = lanes.of.remove(&id)
        {
            lanes.change(lane, |lane| {
                lane.waiting.retain(|delivery| delivery.entry.id != id);
                lane.held_by = lane.held_by.filter(|holding| *holding != id);
            });
        }
    }

    /// Drops those of the waiting entries; says how many there were.
    pub(crate) fn remove(&mut self, ids: &[EntryId]) -> usize {
        let before = self.len();
        match self {
            Self::Any(queue) => {
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

    /// Takes all that wait.
    pub(crate) fn drain(&mut self) -> Vec<Delivery> {
        match self {
            Self::Any(queue) => queue.drain(..).collect(),
            Self::Keyed(lanes) => {
                lanes.free.clear();
                lanes.waiting = 0;
                lanes.all.values_mut().flat_map(|lane| lane.waiting.drain(..)).collect()
            }
        }
    }
}

impl KeyedQueues {
    fn lane_of(&self, entry: &Entry) -> OrderingKey {
        match &self.order_by {
            None => OrderingKey::Stream,
            Some(order_by) => order_by.key(entry).map_or(OrderingKey::Alone(entry.id), OrderingKey::Key),
        }
    }

    fn push(&mut self, delivery: Delivery) {
        let id = delivery.entry.id;
        let lane = self.of.get(&id).copied().unwrap_or_else(|| self.lane_of(&delivery.entry));
        self.of.insert(id, lane);
        self.change(lane, |lane| {
            lane.held_by = lane.held_by.filter(|holding| *holding != id);
            let place = lane.waiting.partition_point(|other| other.entry.id < id);
            lane.waiting.insert(place, delivery);
        });
    }

    fn take(&mut self, mut fits: impl FnMut(&Delivery) -> bool) -> SinkBatch {
        let mut batch = SinkBatch::default();
        while let Some(id) = self.free.front().copied() {
            let lane = self.all.get_mut(&id).expect("a free lane has entries");
            let fitting = lane.waiting.iter().take_while(|delivery| fits(delivery)).count();
            if fitting == 0 {
                break;
            }
            self.free.pop_front();
            self.waiting -= fitting;
            lane.is_with_sink = true;
            batch.deliveries.extend(lane.waiting.drain(..fitting));
            batch.lanes.extend(std::iter::repeat_n(id, fitting));
        }
        batch
    }

    /// Changes a lane, and keeps the books about it.
    fn change(&mut self, id: OrderingKey, change: impl FnOnce(&mut KeyQueue)) {
        let lane = self.all.entry(id).or_default();
        let (was_waiting, was_held, was_free) = (lane.waiting.len(), lane.held_by.is_some(), lane.is_free());
        change(lane);
        self.waiting = self.waiting + lane.waiting.len() - was_waiting;
        self.held = self.held + usize::from(lane.held_by.is_some()) - usize::from(was_held);
        match (was_free, lane.is_free()) {
            (false, true) => self.free.push_back(id),
            (true, false) => self.free.retain(|free| *free != id),
            _ => {}
        }
        if lane.is_over() {
            self.all.remove(&id);
        }
    }
}

impl KeyQueue {
    fn is_free(&self) -> bool {
        !self.is_with_sink && self.held_by.is_none() && !self.waiting.is_empty()
    }

    fn is_over(&self) -> bool {
        !self.is_with_sink && self.held_by.is_none() && self.waiting.is_empty()
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
        (batch.deliveries.iter().map(|delivery| delivery.entry.id.ms).collect(), batch.lanes)
    }

    #[test]
    fn without_an_order_the_first_to_come_goes_first() {
        let mut queue = queue(Ordering::None);
        for ms in [3, 1, 2] {
            queue.push(delivery(ms, "a"));
        }
        assert_eq!(queue.first().map(|delivery| delivery.entry.id), Some(id(3)));
        assert_eq!(take(&mut queue, 2).0, [3, 1]);
        queue.hold(id(3));
        assert_eq!((take(&mut queue, 2).0, queue.held(), queue.len()), (vec![2], 0, 0));
    }

    #[test]
    fn a_lane_that_is_with_the_sink_lets_only_others_pass() {
        let mut queue = queue(Ordering::Key);
        for (ms, source) in [(1, "a"), (2, "b"), (3, "a"), (4, ""), (5, ""), (6, "b")] {
            queue.push(delivery(ms, source));
        }
        let (taken, lanes) = take(&mut queue, 1);
        assert_eq!(taken, [1]);
        assert_eq!(take(&mut queue, 9).0, [2, 6, 4, 5], "each entry without a key goes for itself");
        assert_eq!(take(&mut queue, 9).0, Vec::<u64>::new());
        assert_eq!(queue.len(), 1);
        queue.done(id(1));
        queue.returned(&lanes);
        assert_eq!(take(&mut queue, 9).0, [3]);
    }

    #[test]
    fn a_lane_waits_for_its_failed_entry_however_it_ends() {
        for comes_again in [true, false] {
            let mut queue = queue(Ordering::Key);
            for (ms, source) in [(1, "a"), (2, "a"), (3, "b"), (4, "a")] {
                queue.push(delivery(ms, source));
            }
            let (taken, lanes) = take(&mut queue, 3);
            assert_eq!(taken, [1, 2, 4]);
            queue.hold(id(1));
            assert!(queue.is_held_back(id(2)) && !queue.is_held_back(id(1)));
            queue.push(delivery(2, "a"));
            queue.push(delivery(4, "a"));
            queue.returned(&lanes);
            assert_eq!((take(&mut queue, 9).0, queue.held(), queue.len()), (vec![3], 1, 2));
            if comes_again {
                queue.push(delivery(1, "a"));
                assert_eq!(take(&mut queue, 9).0, [1, 2, 4]);
            } else {
                queue.done(id(1));
                assert_eq!(take(&mut queue, 9).0, [2, 4]);
            }
            assert_eq!((queue.held(), queue.len()), (0, 0));
        }
    }

    #[test]
    fn a_stream_is_one_lane() {
        let mut queue = queue(Ordering::Stream);
        for ms in [2, 1, 3] {
            queue.push(delivery(ms, "a"));
        }
        let (taken, lanes) = take(&mut queue, 2);
        assert_eq!(taken, [1, 2]);
        assert_eq!(take(&mut queue, 2).0, Vec::<u64>::new());
        for ms in [1, 2] {
            queue.done(id(ms));
        }
        queue.returned(&lanes);
        assert_eq!(queue.iter().count(), 1);
        assert_eq!(queue.remove(&[id(3), id(9)]), 1);
        assert!(queue.first().is_none() && queue.len() == 0);
    }

    #[test]
    fn nothing_is_left_of_a_lane_that_is_over() {
        let mut queue = queue(Ordering::Key);
        for round in 0..3 {
            for (ms, source) in [(1, "a"), (2, ""), (3, "b")] {
                queue.push(delivery(round * 10 + ms, source));
            }
            let (taken, lanes) = take(&mut queue, 9);
            for ms in taken {
                queue.done(id(ms));
            }
            queue.returned(&lanes);
        }
        let DispatchQueue::Keyed(lanes) = &queue else { panic!("lanes") };
        assert!(lanes.all.is_empty() && lanes.of.is_empty() && lanes.free.is_empty());
    }
}
