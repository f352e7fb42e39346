//! Where in its streams a client begins, by what it has seen before.

use crate::event::{EntryId, Epoch, Position};

/// How far before a client's oldest position a stream begins for which it gave none, in ms.
const BEFORE_POSITIONS_MS: u64 = 10_000;

/// Where one stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Begin {
    pub(crate) after: EntryId,
    /// Whether everything after that is owed to the client, so that it is told where something is gone. What it asks for
    /// by time, or as a snapshot, is what there is.
    pub(crate) is_owed: bool,
    /// Whether something the client has asked for can't be given.
    pub(crate) is_gap: bool,
}

impl Begin {
    /// What there is after that.
    pub(crate) fn at(after: EntryId) -> Self {
        Self { after, is_owed: false, is_gap: false }
    }

    /// Everything after that.
    pub(crate) fn after(after: EntryId) -> Self {
        Self { is_owed: true, ..Self::at(after) }
    }
}

/// Where the stream with this `epoch` begins for a client that has seen everything up to `positions`.
///
/// A position of none of the `known` epochs belongs to a life that is over, and it can't be told of which stream: one
/// without a position of its own begins with its oldest entry then. Otherwise it begins a little before the oldest
/// position, because the client has seen nothing of it that it could name. Without `known` epochs, because there are
/// streams that have not begun, every position is taken for one of a living stream. One later than `latest_ms` was never
/// given to anybody: it is as good as one of a lost life.
pub(crate) fn resolve(positions: &[Position], epoch: &Epoch, known: Option<&[Epoch]>, latest_ms: u64) -> Begin {
    match positions.iter().filter(|p| p.epoch == *epoch).map(|p| p.id).min() {
        Some(after) if after.ms > latest_ms => return Begin { is_gap: true, ..Begin::at(EntryId::MIN) },
        Some(after) => return Begin::after(after),
        None => {}
    }
    let is_known = |position: &Position| known.is_none_or(|known| known.contains(&position.epoch));
    if !positions.iter().all(is_known) {
        return Begin { is_gap: true, ..Begin::at(EntryId::MIN) };
    }
    let earliest_ms = positions.iter().map(|p| p.id.ms).min().unwrap_or(0);
    Begin::at(EntryId::new(earliest_ms.saturating_sub(BEFORE_POSITIONS_MS), 0).previous())
}

/// From the newest entries of each stream, the oldest of each that is among the newest `count` of all.
pub(crate) fn oldest_of_newest(found: &[&[EntryId]], count: usize) -> Vec<Option<EntryId>> {
    let mut all: Vec<(EntryId, usize)> =
        found.iter().enumerate().flat_map(|(stream, ids)| ids.iter().map(move |id| (*id, stream))).collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.truncate(count);
    let oldest = |stream| all.iter().filter(|(_, s)| *s == stream).map(|(id, _)| *id).next_back();
    (0..found.len()).map(oldest).collect()
}
#[cfg(test)]
mod tests {
    use super::*;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn epoch(text: &str) -> Epoch {
        text.parse().expect("an epoch")
    }

    fn begins(positions: &[&str], streams: &[&str], known: &[&str]) -> Vec<Begin> {
        let positions: Vec<Position> = positions.iter().map(|text| text.parse().expect("a position")).collect();
        let known: Vec<Epoch> = known.iter().map(|name| epoch(name)).collect();
        streams.iter().map(|name| resolve(&positions, &epoch(name), Some(&known), 1_000_000)).collect()
    }

    fn seen(ms: u64) -> Begin {
        Begin::after(id(ms))
    }

    #[test]
    fn each_stream_goes_on_after_its_own_position() {
        assert_eq!(begins(&["b:7-0", "a:5-0"], &["a", "b"], &["a", "b"]), [seen(5), seen(7)]);
    }

    #[test]
    fn of_two_positions_in_a_stream_the_older_one_counts() {
        assert_eq!(begins(&["a:7-0", "a:5-0"], &["a"], &["a"]), [seen(5)]);
    }

    #[test]
    fn a_stream_without_a_position_begins_a_little_before_the_others() {
        let before = Begin::at(id(90_000).previous());
        assert_eq!(begins(&["a:100000-3"], &["a", "b"], &["a", "b"])[1], before);
        assert_eq!(begins(&["a:5-0"], &["b"], &["a", "b"]), [Begin::at(EntryId::MIN)], "not before the beginning");
    }

    #[test]
    fn a_position_of_a_lost_life_is_a_gap_and_begins_with_the_oldest_entry() {
        let gap = Begin { is_gap: true, ..Begin::at(EntryId::MIN) };
        assert_eq!(begins(&["a:100000-0", "old:99-0"], &["a", "b"], &["a", "b"]), [seen(100_000), gap]);
    }

    #[test]
    fn a_position_that_was_never_given_is_a_gap_and_begins_with_the_oldest_entry() {
        let gap = Begin { is_gap: true, ..Begin::at(EntryId::MIN) };
        assert_eq!(begins(&["a:1000000-0"], &["a"], &["a"]), [seen(1_000_000)]);
        assert_eq!(begins(&["a:1000001-0"], &["a"], &["a"]), [gap]);
    }

    #[test]
    fn as_long_as_a_stream_has_not_begun_no_position_counts_as_lost() {
        let positions = ["a:100000-0".parse().expect("a position")];
        assert_eq!(resolve(&positions, &epoch("b"), None, u64::MAX), Begin::at(id(90_000).previous()));
    }

    #[test]
    fn a_snapshot_is_the_newest_of_all_streams_together() {
        let found: [&[EntryId]; 3] = [&[id(9), id(5), id(1)], &[id(8), id(7), id(6)], &[]];
        assert_eq!(oldest_of_newest(&found, 4), [Some(id(9)), Some(id(6)), None]);
        assert_eq!(oldest_of_newest(&found, 100), [Some(id(1)), Some(id(6)), None]);
        let tied: [&[EntryId]; 2] = [&[id(5)], &[id(5)]];
        let kept = oldest_of_newest(&tied, 1).into_iter().flatten().count();
        assert_eq!(kept, 1, "as many as asked for, also where ids are equal");
    }
}
