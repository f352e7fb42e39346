//! The priority lane: critical alerts, sent early to a client that is far behind.

use std::collections::VecDeque;

use crate::event::{EntryId, Filter};
use crate::relay::log::ring::{Lookup, Ring};
use crate::relay::wire::encoding::Encoding;
use crate::relay::wire::write_buffer::WriteBuffer;

/// The bytes of plain frames in the ring above which a client is far behind.
///
/// A client behind the ring is far behind in any case.
pub(crate) const FAR_BEHIND_BYTES: u64 = 256 * 1024;

/// The maximum number of early alerts of one client. Further ones wait until some of these are due in order.
const MAX_EARLY: usize = 1024;

/// The number of batches to scan at a time.
const MAX_BATCHES: usize = 64;

/// A second position in a stream's ring, ahead of the client's own, that stops at critical alerts only.
#[derive(Debug, Default)]
pub(crate) struct PriorityLane {
    /// All critical alerts up to here were sent early, or are sent in order.
    after: EntryId,
    /// The alerts that were sent early and are not due in order yet, in the order of the stream.
    delivered: VecDeque<EntryId>,
}

impl PriorityLane {
    /// Adds the critical alerts that pass, beyond the position up to which the client is served in order. Returns
    /// their number.
    pub(crate) fn deliver(
        &mut self,
        ring: &Ring,
        generation: u64,
        in_order_up_to: EntryId,
        filter: &Filter,
        encoding: Encoding,
        out: &mut WriteBuffer,
    ) -> usize {
        let before = self.delivered.len();
        self.after = self.after.max(in_order_up_to);
        for _ in 0..MAX_BATCHES {
            let batch = match ring.after(generation, self.after) {
                Lookup::Batch(batch, ..) => batch,
                // Critical alerts that have left the ring are sent in order.
                Lookup::Behind => {
                    let floor = ring.snapshot().map_or(self.after, |snapshot| snapshot.floor);
                    self.after = self.after.max(floor);
                    continue;
                }
                Lookup::Head | Lookup::Restarted => break,
            };
            for index in batch.critical_from(batch.first_after(self.after), filter) {
                if out.is_full() || self.delivered.len() >= MAX_EARLY {
                    return self.delivered.len() - before;
                }
                out.push(batch.early_frame(index, encoding));
                let id = batch.id(index);
                self.after = id;
                self.delivered.push_back(id);
            }
            self.after = self.after.max(batch.last());
        }
        self.delivered.len() - before
    }

    /// Returns the oldest of the last `count` early alerts.
    pub(crate) fn oldest_of_last(&self, count: usize) -> Option<EntryId> {
        self.delivered.iter().rev().take(count).next_back().copied()
    }

    /// Returns whether this entry, which is due in order, was sent early. Forgets all before it.
    pub(crate) fn was_delivered(&mut self, id: EntryId) -> bool {
        while self.delivered.front().is_some_and(|delivered| *delivered < id) {
            self.delivered.pop_front();
        }
        self.delivered.pop_front_if(|delivered| *delivered == id).is_some()
    }

    /// Returns the first early alert that is not due yet.
    pub(crate) fn next_delivered(&self) -> Option<EntryId> {
        self.delivered.front().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Attribute, Entry, Severity};
    use crate::relay::log::frame_batch::FrameBatch;
    use crate::relay::log::frame_batch::testing::entry;
    use crate::relay::log::ring::{Preload, RingLimits};
    use crate::relay::wire::frames;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn ring(entries: usize, severities: &[&str]) -> Ring {
        let ring = Ring::new("s".parse().expect("a name"), RingLimits { bytes: usize::MAX, entries });
        ring.begin("e".parse().expect("an epoch"), EntryId::MIN, Preload::default());
        push(&ring, 1, severities);
        ring
    }

    /// Pushes batches of two entries each.
    fn push(ring: &Ring, first: u64, severities: &[&str]) {
        let entries: Vec<Entry> = (first..)
            .zip(severities)
            .map(|(ms, severity)| entry(ms, &[("data", "{}"), ("severity", severity)]))
            .collect();
        for pair in entries.chunks(2) {
            ring.push(FrameBatch::frame(ring.stream(), &"e".parse().expect("an epoch"), pair, usize::MAX).batch);
        }
    }

    fn deliver_early(lane: &mut PriorityLane, ring: &Ring, in_order_up_to: u64) -> Vec<u64> {
        let before = lane.delivered.len();
        let mut out = WriteBuffer::default();
        lane.deliver(ring, 1, id(in_order_up_to), &Filter::default(), Encoding::Plain, &mut out);
        lane.delivered.iter().skip(before).map(|id| id.ms).collect()
    }

    #[test]
    fn critical_alert_is_sent_early_once_and_skipped_later() {
        let ring = ring(100, &["low", "critical", "high", "critical", "critical", "low"]);
        let mut lane = PriorityLane::default();
        assert_eq!(deliver_early(&mut lane, &ring, 2), [4, 5], "alerts that are being sent in order are not early");
        assert_eq!(deliver_early(&mut lane, &ring, 2), [0_u64; 0]);
        push(&ring, 7, &["info", "critical"]);
        assert_eq!(deliver_early(&mut lane, &ring, 2), [8]);
        assert_eq!(lane.next_delivered(), Some(id(4)));
        assert!(!lane.was_delivered(id(3)) && lane.was_delivered(id(4)) && !lane.was_delivered(id(4)));
        assert!(lane.was_delivered(id(8)), "5 was skipped");
        assert_eq!(lane.next_delivered(), None);
    }

    #[test]
    fn critical_alert_behind_the_ring_is_sent_in_order() {
        let ring = ring(2, &["critical", "critical", "low", "critical"]);
        assert_eq!(deliver_early(&mut PriorityLane::default(), &ring, 0), [4]);
    }

    #[test]
    fn early_alerts_are_limited() {
        let ring = ring(10_000, &vec!["critical"; MAX_EARLY + 10]);
        let mut lane = PriorityLane::default();
        let mut total = 0;
        for _ in 0..100 {
            total += deliver_early(&mut lane, &ring, 0).len();
        }
        assert_eq!(total, MAX_EARLY);
        assert!(lane.was_delivered(id(3)));
        assert_eq!(deliver_early(&mut lane, &ring, 3).len(), 3, "alerts that were due make room for others");
    }

    #[test]
    fn early_alert_passes_the_filter_and_is_labelled() {
        let ring = ring(100, &["low", "critical"]);
        let (mut lane, mut out) = (PriorityLane::default(), WriteBuffer::default());
        let nothing = Filter::is(Attribute::Tenant, "a");
        assert_eq!(lane.deliver(&ring, 1, EntryId::MIN, &nothing, Encoding::Rich, &mut out), 0);
        let mut lane = PriorityLane::default();
        let passes = Filter::min_severity(Severity::High);
        assert_eq!(lane.deliver(&ring, 1, EntryId::MIN, &passes, Encoding::Rich, &mut out), 1);
        let frame = out.pop().expect("a frame");
        let expected = r#"{"t":"event","s":"s","p":"e:2-0","lane":"critical","d":{}}"#;
        assert_eq!(frames::payload(&frame), expected.as_bytes());
    }
}
