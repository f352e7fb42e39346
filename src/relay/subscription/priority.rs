//! What a client that is far behind is given out of its turn: alerts that are critical.

use std::collections::VecDeque;

use crate::event::EntryId;
use crate::event::Filter;
use crate::relay::log::ring::{Lookup, Ring};
use crate::relay::wire::encoding::Form;
use crate::relay::wire::write_buffer::Outgoing;

/// A client that has more than this before it in the ring is far behind, in bytes of plain frames. Whoever has left the
/// ring is in any case.
pub(crate) const FAR_BYTES: u64 = 256 * 1024;

/// The most alerts that one client may have been given before their turn. More have to wait until their turn has come
/// for some.
const MAX_GIVEN: usize = 1024;

/// How many batches are looked through at a time.
const MAX_BATCHES: usize = 64;

/// A second place in a stream's ring, ahead of the client's own, that stops at critical alerts only.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    /// Everything critical up to here was given before its turn, or comes in its turn.
    after: EntryId,
    /// What was given and has not had its turn, in the order of the stream.
    given: VecDeque<EntryId>,
}

impl Lane {
    /// Adds what is critical and passes, beyond `turn`, the place up to which the client is being served in turn. Says
    /// how many there were.
    pub(crate) fn give(
        &mut self,
        ring: &Ring,
        generation: u64,
        turn: EntryId,
        filter: &Filter,
        form: Form,
        out: &mut Outgoing,
    ) -> usize {
        let before = self.given.len();
        self.after = self.after.max(turn);
        for _ in 0..MAX_BATCHES {
            let batch = match ring.after(generation, self.after) {
                Lookup::Batch(batch, ..) => batch,
                // What has left the ring comes in its turn.
                Lookup::Behind => {
                    let floor = ring.mark().map_or(self.after, |mark| mark.floor);
                    self.after = self.after.max(floor);
                    continue;
                }
                Lookup::Head | Lookup::Restarted => break,
            };
            for index in batch.critical_from(batch.first_after(self.after), filter) {
                if out.is_full() || self.given.len() >= MAX_GIVEN {
                    return self.given.len() - before;
                }
                out.push(batch.early_frame(index, form));
                let id = batch.id(index);
                self.after = id;
                self.given.push_back(id);
            }
            self.after = self.after.max(batch.last());
        }
        self.given.len() - before
    }

    /// The oldest of the `count` that were given last.
    pub(crate) fn newest(&self, count: usize) -> Option<EntryId> {
        self.given.iter().rev().take(count).next_back().copied()
    }

    /// Whether this one, whose turn has come, was given before. Those before it have had their turn.
    pub(crate) fn has_given(&mut self, id: EntryId) -> bool {
        while self.given.front().is_some_and(|given| *given < id) {
            self.given.pop_front();
        }
        self.given.pop_front_if(|given| *given == id).is_some()
    }

    /// The first of those given whose turn has not come.
    pub(crate) fn next_given(&self) -> Option<EntryId> {
        self.given.front().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Attribute;
    use crate::event::{Entry, Severity};
    use crate::relay::log::frame_batch::Batch;
    use crate::relay::log::frame_batch::testing::entry;
    use crate::relay::log::ring::{Limits, Past};
    use crate::relay::wire::frames;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn ring(entries: usize, severities: &[&str]) -> Ring {
        let ring = Ring::new("s".parse().expect("a name"), Limits { bytes: usize::MAX, entries });
        ring.begin("e".parse().expect("an epoch"), EntryId::MIN, Past::default());
        push(&ring, 1, severities);
        ring
    }

    /// A batch of two each.
    fn push(ring: &Ring, first: u64, severities: &[&str]) {
        let entries: Vec<Entry> = (first..)
            .zip(severities)
            .map(|(ms, severity)| entry(ms, &[("data", "{}"), ("severity", severity)]))
            .collect();
        for pair in entries.chunks(2) {
            ring.push(Batch::frame(ring.stream(), &"e".parse().expect("an epoch"), pair, usize::MAX).batch);
        }
    }

    fn given(lane: &mut Lane, ring: &Ring, turn: u64) -> Vec<u64> {
        let before = lane.given.len();
        let mut out = Outgoing::default();
        lane.give(ring, 1, id(turn), &Filter::default(), Form::Plain, &mut out);
        lane.given.iter().skip(before).map(|id| id.ms).collect()
    }

    #[test]
    fn what_is_critical_is_given_once_and_known_when_its_turn_comes() {
        let ring = ring(100, &["low", "critical", "high", "critical", "critical", "low"]);
        let mut lane = Lane::default();
        assert_eq!(given(&mut lane, &ring, 2), [4, 5], "what is being given in turn is not given before");
        assert_eq!(given(&mut lane, &ring, 2), [0_u64; 0]);
        push(&ring, 7, &["info", "critical"]);
        assert_eq!(given(&mut lane, &ring, 2), [8]);
        assert_eq!(lane.next_given(), Some(id(4)));
        assert!(!lane.has_given(id(3)) && lane.has_given(id(4)) && !lane.has_given(id(4)));
        assert!(lane.has_given(id(8)), "5 was passed over");
        assert_eq!(lane.next_given(), None);
    }

    #[test]
    fn what_has_left_the_ring_comes_in_its_turn() {
        let ring = ring(2, &["critical", "critical", "low", "critical"]);
        assert_eq!(given(&mut Lane::default(), &ring, 0), [4]);
    }

    #[test]
    fn there_is_a_limit_to_what_is_given_before_its_turn() {
        let ring = ring(10_000, &vec!["critical"; MAX_GIVEN + 10]);
        let mut lane = Lane::default();
        let mut total = 0;
        for _ in 0..100 {
            total += given(&mut lane, &ring, 0).len();
        }
        assert_eq!(total, MAX_GIVEN);
        assert!(lane.has_given(id(3)));
        assert_eq!(given(&mut lane, &ring, 3).len(), 3, "there is room for as many as have had their turn");
    }

    #[test]
    fn only_what_passes_is_given_and_in_a_frame_that_tells() {
        let ring = ring(100, &["low", "critical"]);
        let (mut lane, mut out) = (Lane::default(), Outgoing::default());
        let nothing = Filter::is(Attribute::Tenant, "a");
        assert_eq!(lane.give(&ring, 1, EntryId::MIN, &nothing, Form::Rich, &mut out), 0);
        let mut lane = Lane::default();
        let passes = Filter::min_severity(Severity::High);
        assert_eq!(lane.give(&ring, 1, EntryId::MIN, &passes, Form::Rich, &mut out), 1);
        let frame = out.pop().expect("a frame");
        let expected = r#"{"t":"event","s":"s","p":"e:2-0","lane":"critical","d":{}}"#;
        assert_eq!(frames::payload(&frame), expected.as_bytes());
    }
}
