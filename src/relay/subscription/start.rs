//! Resolves the start of a subscription in each stream from the client's positions.

use crate::event::{EntryId, Epoch, Position};

/// The time in ms before the client's oldest position at which streams without a position start.
const BEFORE_POSITIONS_MS: u64 = 10_000;

/// The start in one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResolvedStart {
    pub(crate) after: EntryId,
    /// Whether gaps after the start are reported. A start by time, and a snapshot, begin with the oldest entry that
    /// exists.
    pub(crate) reports_gaps: bool,
    /// Whether requested entries are gone.
    pub(crate) has_gap: bool,
}

impl ResolvedStart {
    /// Starts with the entries that exist after this one.
    pub(crate) fn available_after(after: EntryId) -> Self {
        Self { after, reports_gaps: false, has_gap: false }
    }

    /// Starts exactly after this entry: gaps are reported.
    pub(crate) fn exactly_after(after: EntryId) -> Self {
        Self { reports_gaps: true, ..Self::available_after(after) }
    }
}

/// Resolves the start in the stream with this `epoch` for a client that has seen all entries up to `positions`.
///
/// A position of none of the `known` epochs belongs to a stream that was lost, and the stream is unknown. So a stream
/// without a position starts with its oldest entry. Otherwise such a stream starts a little before the oldest
/// position: the client has seen no entry of it that it could name.
///
/// Without `known` epochs, because some streams have not begun, every position counts as one of a present stream. No
/// instance has given out a position later than `latest_ms`: it counts as one of a lost epoch.
pub(crate) fn resolve(positions: &[Position], epoch: &Epoch, known: Option<&[Epoch]>, latest_ms: u64) -> ResolvedStart {
    match positions.iter().filter(|p| p.epoch == *epoch).map(|p| p.id).min() {
        Some(after) if after.ms > latest_ms => {
            return ResolvedStart { has_gap: true, ..ResolvedStart::available_after(EntryId::MIN) };
        }
        Some(after) => return ResolvedStart::exactly_after(after),
        None => {}
    }
    let is_known = |position: &Position| known.is_none_or(|known| known.contains(&position.epoch));
    if !positions.iter().all(is_known) {
        return ResolvedStart { has_gap: true, ..ResolvedStart::available_after(EntryId::MIN) };
    }
    let earliest_ms = positions.iter().map(|p| p.id.ms).min().unwrap_or(0);
    ResolvedStart::available_after(EntryId::new(earliest_ms.saturating_sub(BEFORE_POSITIONS_MS), 0).previous())
}

/// Of the newest entries per stream, returns the oldest of each stream that is among the newest `count` of all.
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

    fn resolve_all(positions: &[&str], streams: &[&str], known: &[&str]) -> Vec<ResolvedStart> {
        let positions: Vec<Position> = positions.iter().map(|text| text.parse().expect("a position")).collect();
        let known: Vec<Epoch> = known.iter().map(|name| epoch(name)).collect();
        streams.iter().map(|name| resolve(&positions, &epoch(name), Some(&known), 1_000_000)).collect()
    }

    fn seen(ms: u64) -> ResolvedStart {
        ResolvedStart::exactly_after(id(ms))
    }

    #[test]
    fn stream_continues_after_its_own_position() {
        assert_eq!(resolve_all(&["b:7-0", "a:5-0"], &["a", "b"], &["a", "b"]), [seen(5), seen(7)]);
    }

    #[test]
    fn older_of_two_positions_counts() {
        assert_eq!(resolve_all(&["a:7-0", "a:5-0"], &["a"], &["a"]), [seen(5)]);
    }

    #[test]
    fn stream_without_position_starts_before_the_others() {
        let before = ResolvedStart::available_after(id(90_000).previous());
        assert_eq!(resolve_all(&["a:100000-3"], &["a", "b"], &["a", "b"])[1], before);
        assert_eq!(
            resolve_all(&["a:5-0"], &["b"], &["a", "b"]),
            [ResolvedStart::available_after(EntryId::MIN)],
            "not before the first entry"
        );
    }

    #[test]
    fn position_of_a_lost_epoch_is_a_gap_and_starts_earliest() {
        let gap = ResolvedStart { has_gap: true, ..ResolvedStart::available_after(EntryId::MIN) };
        assert_eq!(resolve_all(&["a:100000-0", "old:99-0"], &["a", "b"], &["a", "b"]), [seen(100_000), gap]);
    }

    #[test]
    fn position_in_the_future_is_a_gap_and_starts_earliest() {
        let gap = ResolvedStart { has_gap: true, ..ResolvedStart::available_after(EntryId::MIN) };
        assert_eq!(resolve_all(&["a:1000000-0"], &["a"], &["a"]), [seen(1_000_000)]);
        assert_eq!(resolve_all(&["a:1000001-0"], &["a"], &["a"]), [gap]);
    }

    #[test]
    fn position_is_not_lost_before_all_streams_have_begun() {
        let positions = ["a:100000-0".parse().expect("a position")];
        assert_eq!(
            resolve(&positions, &epoch("b"), None, u64::MAX),
            ResolvedStart::available_after(id(90_000).previous())
        );
    }

    #[test]
    fn snapshot_has_the_newest_entries_of_all_streams() {
        let found: [&[EntryId]; 3] = [&[id(9), id(5), id(1)], &[id(8), id(7), id(6)], &[]];
        assert_eq!(oldest_of_newest(&found, 4), [Some(id(9)), Some(id(6)), None]);
        assert_eq!(oldest_of_newest(&found, 100), [Some(id(1)), Some(id(6)), None]);
        let tied: [&[EntryId]; 2] = [&[id(5)], &[id(5)]];
        let kept = oldest_of_newest(&tied, 1).into_iter().flatten().count();
        assert_eq!(kept, 1, "the requested number, also if ids are equal");
    }
}
