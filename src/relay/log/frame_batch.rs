//! A run of entries, framed once for all clients.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use bytes::Bytes;

use crate::event::{Entry, EntryId, Epoch, Filter, Position, Severity, StreamName, Tags, relayable};
use crate::relay::wire::encoding::{Encoding, VARIANTS};
use crate::relay::wire::frames;

/// Consecutive entries of one stream as ready-made frames, with tags to filter them.
///
/// Entries that cannot be sent as text are left out; `last` counts them too.
pub(crate) struct FrameBatch {
    last: EntryId,
    /// Whether entries right before the first one were gone before the relay could read them.
    has_gap_before: bool,
    stream: StreamName,
    epoch: Epoch,
    ids: Box<[EntryId]>,
    plain: EncodedFrames,
    declared: Box<[Tags]>,
    /// The other encodings, each made for its first client.
    variants: OnceLock<Box<[OnceLock<EncodedFrames>; VARIANTS]>>,
    /// Made for the first client with a filter: most of the cost is reading payloads.
    completed: OnceLock<Box<[Tags]>>,
    /// Made for the first client that is far behind.
    critical: OnceLock<CriticalFrames>,
}

/// The critical alerts of a batch, framed for the priority lane.
struct CriticalFrames {
    /// The indices of these alerts, in order.
    indices: Box<[usize]>,
    /// Their frames in each encoding, each made for its first client.
    encodings: OnceLock<Box<[OnceLock<EncodedFrames>; VARIANTS + 1]>>,
}

/// Consecutive frames, and the end of each.
struct EncodedFrames {
    bytes: Bytes,
    ends: Box<[usize]>,
}

impl EncodedFrames {
    fn slice(&self, run: Range<usize>) -> Bytes {
        let begin = run.start.checked_sub(1).map_or(0, |before| self.ends[before]);
        let end = run.end.checked_sub(1).map_or(0, |last| self.ends[last]);
        self.bytes.slice(begin..end)
    }
}

/// A batch of the first of some entries.
#[derive(Debug)]
pub(crate) struct FramedBatch {
    pub(crate) batch: FrameBatch,
    /// The number of entries used, with those left out.
    pub(crate) taken: usize,
    /// The number of entries left out because they cannot be sent as text.
    pub(crate) undecodable: u64,
}

impl FrameBatch {
    /// Frames entries from the start of `entries` until `target_bytes` are reached, but at least one.
    pub(crate) fn frame(stream: &StreamName, epoch: &Epoch, entries: &[Entry], target_bytes: usize) -> FramedBatch {
        let mut size = 0;
        let mut taken = 0;
        let mut sendable = 0;
        for entry in entries {
            size += entry.data().map_or(0, |data| data.len() + frames::MAX_HEADER);
            if taken > 0 && size > target_bytes {
                break;
            }
            taken += 1;
            sendable += usize::from(entry.data().is_some());
        }
        let mut bytes = Vec::with_capacity(size.min(target_bytes.saturating_mul(2)));
        let mut ids = Vec::with_capacity(sendable);
        let mut ends = Vec::with_capacity(sendable);
        let mut declared = Vec::with_capacity(sendable);
        let mut undecodable = 0;
        for entry in &entries[..taken] {
            let Some(payload) = relayable(entry) else {
                undecodable += u64::from(!entry.is_for_one_group());
                continue;
            };
            frames::push_text(&mut bytes, payload);
            ids.push(entry.id);
            ends.push(bytes.len());
            declared.push(Tags::declared(&entry.fields));
        }
        let batch = Self {
            last: entries[..taken].last().map_or(EntryId::MIN, |entry| entry.id),
            has_gap_before: false,
            stream: stream.clone(),
            epoch: epoch.clone(),
            ids: ids.into(),
            plain: EncodedFrames { bytes: bytes.into(), ends: ends.into() },
            declared: declared.into(),
            variants: OnceLock::new(),
            completed: OnceLock::new(),
            critical: OnceLock::new(),
        };
        FramedBatch { batch, taken, undecodable }
    }

    /// Returns the number of entries.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// Returns the size of the plain frames in bytes.
    pub(crate) fn size_bytes(&self) -> usize {
        self.plain.bytes.len()
    }

    /// Returns the size of the plain frames from an index on.
    pub(crate) fn size_from(&self, index: usize) -> usize {
        self.plain.slice(index..self.len()).len()
    }

    /// Returns the last entry that the batch covers, even if it could not be sent.
    pub(crate) fn last(&self) -> EntryId {
        self.last
    }

    /// Has the batch cover all entries up to `last`.
    pub(crate) fn extend_to(&mut self, last: EntryId) {
        self.last = self.last.max(last);
    }

    /// Notes that the entries right before the first one are gone and were never read.
    pub(crate) fn set_gap_before(&mut self) {
        self.has_gap_before = true;
    }

    /// Returns whether the entries right before the first one are gone and were never read.
    pub(crate) fn has_gap_before(&self) -> bool {
        self.has_gap_before
    }

    /// Returns the id of an entry.
    pub(crate) fn id(&self, index: usize) -> EntryId {
        self.ids[index]
    }

    /// Returns the index of the first entry after `id`.
    pub(crate) fn first_after(&self, id: EntryId) -> usize {
        self.ids.partition_point(|entry| *entry <= id)
    }

    /// Returns the index of the first entry from `index` on that passes, or the batch's length if there is none.
    pub(crate) fn next_match(&self, index: usize, filter: &Filter) -> usize {
        if filter.is_empty() {
            return index;
        }
        let tags = self.tags();
        (index..tags.len()).find(|i| filter.matches(&tags[*i])).unwrap_or(tags.len())
    }

    /// Returns the run of entries from `index` on that pass and come before `bound`. The entry at `index` must pass.
    pub(crate) fn run(&self, index: usize, bound: EntryId, filter: &Filter) -> Range<usize> {
        let before_bound = self.ids.partition_point(|entry| *entry < bound);
        if filter.is_empty() {
            return index..before_bound;
        }
        let tags = self.tags();
        let end = (index..before_bound).find(|i| !filter.matches(&tags[*i])).unwrap_or(before_bound);
        index..end
    }

    /// Returns the ids of the entries at or before `cut` that pass, newest first.
    pub(crate) fn newest(&self, cut: EntryId, filter: &Filter) -> impl Iterator<Item = EntryId> {
        let tags = if filter.is_empty() { None } else { Some(self.tags()) };
        let passes = move |index: &usize| tags.is_none_or(|tags| filter.matches(&tags[*index]));
        (0..self.first_after(cut)).rev().filter(passes).map(|index| self.ids[index])
    }

    /// Returns a run of entries in an encoding.
    pub(crate) fn frames(&self, run: Range<usize>, encoding: Encoding) -> Bytes {
        match encoding.variant_index() {
            None => self.plain.slice(run),
            Some(variant) => self.variants.get_or_init(Box::default)[variant]
                .get_or_init(|| self.encode(0..self.len(), encoding, false))
                .slice(run),
        }
    }

    /// Returns the indices of the critical alerts from `index` on that pass.
    pub(crate) fn critical_from(&self, index: usize, filter: &Filter) -> impl Iterator<Item = usize> {
        let indices = &self.critical().indices;
        let first = indices.partition_point(|critical| *critical < index);
        let tags = if filter.is_empty() || first == indices.len() { None } else { Some(self.tags()) };
        let passes = move |index: &usize| tags.is_none_or(|tags| filter.matches(&tags[*index]));
        indices[first..].iter().copied().filter(passes)
    }

    /// Returns a critical alert, framed for the priority lane.
    pub(crate) fn early_frame(&self, index: usize, encoding: Encoding) -> Bytes {
        let CriticalFrames { indices, encodings } = self.critical();
        let frames = &encodings.get_or_init(Box::default)[encoding.variant_index().map_or(0, |variant| variant + 1)];
        let place = indices.partition_point(|critical| *critical < index);
        frames.get_or_init(|| self.encode(indices.iter().copied(), encoding, true)).slice(place..place + 1)
    }

    fn critical(&self) -> &CriticalFrames {
        self.critical.get_or_init(|| {
            let is_critical =
                |index: &usize| self.declared[*index].severity(self.payload(*index)) == Some(Severity::Critical);
            CriticalFrames { indices: (0..self.len()).filter(is_critical).collect(), encodings: OnceLock::new() }
        })
    }

    fn encode(
        &self,
        indices: impl ExactSizeIterator<Item = usize>,
        encoding: Encoding,
        is_early: bool,
    ) -> EncodedFrames {
        let room = if is_early { 0 } else { self.size_bytes() + self.len() * 96 };
        let (mut bytes, mut ends) = (Vec::with_capacity(room), Vec::with_capacity(indices.len()));
        let mut position = Position { epoch: self.epoch.clone(), id: EntryId::MIN };
        for index in indices {
            position.id = self.ids[index];
            encoding.append_event(&mut bytes, self.payload(index), &position, &self.stream, is_early);
            ends.push(bytes.len());
        }
        EncodedFrames { bytes: bytes.into(), ends: ends.into() }
    }

    fn tags(&self) -> &[Tags] {
        let complete = || self.declared.iter().enumerate().map(|(i, tags)| tags.completed(self.payload(i))).collect();
        self.completed.get_or_init(complete)
    }

    fn payload(&self, index: usize) -> &[u8] {
        let begin = index.checked_sub(1).map_or(0, |before| self.plain.ends[before]);
        frames::payload(&self.plain.bytes[begin..self.plain.ends[index]])
    }
}

impl fmt::Debug for FrameBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch")
            .field("stream", &self.stream)
            .field("first", &self.ids.first())
            .field("last", &self.last)
            .field("len", &self.len())
            .field("bytes", &self.size_bytes())
            .finish_non_exhaustive()
    }
}

/// Entries for the tests of this module and its siblings.
#[cfg(test)]
pub(crate) mod testing {
    use bytes::Bytes;

    use crate::event::{Entry, EntryId, Fields};

    /// Creates an entry with this time as its id.
    pub(crate) fn entry(ms: u64, fields: &[(&'static str, &str)]) -> Entry {
        let fields: Fields =
            fields.iter().map(|(name, value)| (Bytes::from(*name), Bytes::copy_from_slice(value.as_bytes()))).collect();
        Entry { id: EntryId::new(ms, 0), fields }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::entry;
    use super::*;
    use crate::event::{Attribute, Severity};

    fn frame(entries: &[Entry], target: usize) -> FramedBatch {
        FrameBatch::frame(&"s".parse().expect("a name"), &"e".parse().expect("an epoch"), entries, target)
    }

    fn high() -> Filter {
        Filter::min_severity(Severity::High)
    }

    #[test]
    fn entries_without_text_are_left_out_but_covered() {
        let mut broken = entry(2, &[]);
        broken.fields.push("data", Bytes::from_static(b"\xff"));
        let framed = frame(&[entry(1, &[("data", "{}")]), broken, entry(3, &[("other", "x")])], 1000);
        assert_eq!((framed.taken, framed.undecodable, framed.batch.len()), (3, 2, 1));
        assert_eq!(framed.batch.last(), EntryId::new(3, 0));
    }

    #[test]
    fn batch_ends_at_its_target_size_after_one_entry() {
        let big = "x".repeat(100);
        let entries = [1, 2, 3].map(|ms| entry(ms, &[("data", &big)]));
        assert_eq!(frame(&entries, 1).taken, 1);
        assert_eq!(frame(&entries, 230).taken, 2);
        assert_eq!(frame(&entries, 1000).taken, 3);
    }

    #[test]
    fn run_is_a_slice_of_matching_entries() {
        let severities = ["high", "low", "critical", "high", "info"];
        let entries: Vec<Entry> =
            (1..).zip(severities).map(|(ms, s)| entry(ms, &[("data", "{}"), ("severity", s)])).collect();
        let batch = frame(&entries, 1000).batch;
        assert_eq!(batch.next_match(1, &high()), 2);
        assert_eq!(batch.run(2, EntryId::MAX, &high()), 2..4);
        assert_eq!(batch.run(2, EntryId::new(4, 0), &high()), 2..3);
        assert_eq!(batch.next_match(4, &high()), 5);
        assert_eq!(batch.run(0, EntryId::MAX, &Filter::default()), 0..5);
        assert_eq!(batch.frames(2..4, Encoding::Plain).as_ref(), b"\x81\x02{}\x81\x02{}");
        let newest: Vec<u64> = batch.newest(EntryId::new(3, 0), &high()).map(|id| id.ms).collect();
        assert_eq!(newest, [3, 1]);
    }

    #[test]
    fn other_encodings_are_made_on_request_only() {
        let batch = frame(&[entry(7, &[("data", r#"{"a":1}"#)]), entry(8, &[("data", "{}")])], 1000).batch;
        assert!(batch.variants.get().is_none());
        let frames = batch.frames(1..2, Encoding::WithPosition);
        assert_eq!(frames::payload(&frames), br#"{"_pos":"e:8-0","_stream":"s"}"#);
    }

    #[test]
    fn filter_reads_the_payload_if_fields_are_missing() {
        let batch = frame(&[entry(1, &[("data", r#"{"severity":"critical","source":"zeek"}"#)])], 1000).batch;
        let zeek = high().and(Filter::is(Attribute::Source, "zeek"));
        assert_eq!(batch.next_match(0, &zeek), 0);
    }
}
