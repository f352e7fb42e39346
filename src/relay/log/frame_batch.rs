//! A run of entries, framed once for every client.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;

use bytes::Bytes;

use crate::event::{Entry, EntryId, Epoch, Position, Severity, StreamName};
use crate::event::{Filter, Tags, relayable};
use crate::relay::wire::encoding::{Form, VARIANTS};
use crate::relay::wire::frames;

/// Consecutive entries of one stream as ready-made frames, with what is needed to find and filter them.
///
/// Entries that can't be sent as text are left out; `last` still counts them as passed.
pub(crate) struct Batch {
    last: EntryId,
    /// Whether entries right before the first one were gone before the relay had read them.
    is_torn_off: bool,
    stream: StreamName,
    epoch: Epoch,
    ids: Box<[EntryId]>,
    plain: Frames,
    declared: Box<[Tags]>,
    /// The other forms, each made when the first client asks for it.
    variants: OnceLock<Box<[OnceLock<Frames>; VARIANTS]>>,
    /// Made when the first client with a filter comes by: most of its cost is reading payloads.
    completed: OnceLock<Box<[Tags]>>,
    /// Made when the first client comes by that is far behind.
    critical: OnceLock<Critical>,
}

/// The critical alerts of a batch, as they are written for those who are given them before their turn.
struct Critical {
    /// Their indices, in order.
    indices: Box<[usize]>,
    /// Of each form, their frames alone, made when the first client asks for it.
    forms: OnceLock<Box<[OnceLock<Frames>; VARIANTS + 1]>>,
}

/// Frames one after the other, and where each one ends.
struct Frames {
    bytes: Bytes,
    ends: Box<[usize]>,
}

impl Frames {
    fn of(&self, run: Range<usize>) -> Bytes {
        let begin = run.start.checked_sub(1).map_or(0, |before| self.ends[before]);
        let end = run.end.checked_sub(1).map_or(0, |last| self.ends[last]);
        self.bytes.slice(begin..end)
    }
}

/// A batch made of the front of some entries.
#[derive(Debug)]
pub(crate) struct Framed {
    pub(crate) batch: Batch,
    /// How many of the entries went into it, those left out included.
    pub(crate) taken: usize,
    /// How many were left out because they can't be sent as text.
    pub(crate) undecodable: u64,
}

impl Batch {
    /// Frames entries from the front of `entries` until `target_bytes` are reached; at least one entry is taken.
    pub(crate) fn frame(stream: &StreamName, epoch: &Epoch, entries: &[Entry], target_bytes: usize) -> Framed {
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
            is_torn_off: false,
            stream: stream.clone(),
            epoch: epoch.clone(),
            ids: ids.into(),
            plain: Frames { bytes: bytes.into(), ends: ends.into() },
            declared: declared.into(),
            variants: OnceLock::new(),
            completed: OnceLock::new(),
            critical: OnceLock::new(),
        };
        Framed { batch, taken, undecodable }
    }

    /// How many entries it has.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// How many bytes its plain frames have.
    pub(crate) fn size_bytes(&self) -> usize {
        self.plain.bytes.len()
    }

    /// How many bytes its plain frames have from an index on.
    pub(crate) fn size_from(&self, index: usize) -> usize {
        self.plain.of(index..self.len()).len()
    }

    /// The last entry it stands for, whether that one could be sent or not.
    pub(crate) fn last(&self) -> EntryId {
        self.last
    }

    /// Stands for everything up to `last` from now on.
    pub(crate) fn extend_to(&mut self, last: EntryId) {
        self.last = self.last.max(last);
    }

    /// Entries right before the first one are gone, and were never read.
    pub(crate) fn tear_off(&mut self) {
        self.is_torn_off = true;
    }

    /// Whether entries right before the first one are gone, and were never read.
    pub(crate) fn is_torn_off(&self) -> bool {
        self.is_torn_off
    }

    /// The id of an entry.
    pub(crate) fn id(&self, index: usize) -> EntryId {
        self.ids[index]
    }

    /// The index of the first entry after `id`.
    pub(crate) fn first_after(&self, id: EntryId) -> usize {
        self.ids.partition_point(|entry| *entry <= id)
    }

    /// The index of the first entry from `index` on that passes; the batch's length if none does.
    pub(crate) fn next_match(&self, index: usize, filter: &Filter) -> usize {
        if filter.is_empty() {
            return index;
        }
        let tags = self.tags();
        (index..tags.len()).find(|i| filter.matches(&tags[*i])).unwrap_or(tags.len())
    }

    /// The run of entries from `index` on that all pass and come before `bound`. The one at `index` must.
    pub(crate) fn run(&self, index: usize, bound: EntryId, filter: &Filter) -> Range<usize> {
        let before_bound = self.ids.partition_point(|entry| *entry < bound);
        if filter.is_empty() {
            return index..before_bound;
        }
        let tags = self.tags();
        let end = (index..before_bound).find(|i| !filter.matches(&tags[*i])).unwrap_or(before_bound);
        index..end
    }

    /// The ids of the entries at or before `cut` that pass, newest first.
    pub(crate) fn newest(&self, cut: EntryId, filter: &Filter) -> impl Iterator<Item = EntryId> {
        let tags = if filter.is_empty() { None } else { Some(self.tags()) };
        let passes = move |index: &usize| tags.is_none_or(|tags| filter.matches(&tags[*index]));
        (0..self.first_after(cut)).rev().filter(passes).map(|index| self.ids[index])
    }

    /// A run of entries in that form.
    pub(crate) fn frames(&self, run: Range<usize>, form: Form) -> Bytes {
        match form.variant() {
            None => self.plain.of(run),
            Some(variant) => self.variants.get_or_init(Box::default)[variant]
                .get_or_init(|| self.write(0..self.len(), form, false))
                .of(run),
        }
    }

    /// The indices of the critical alerts from `index` on that pass.
    pub(crate) fn critical_from(&self, index: usize, filter: &Filter) -> impl Iterator<Item = usize> {
        let indices = &self.critical().indices;
        let first = indices.partition_point(|critical| *critical < index);
        let tags = if filter.is_empty() || first == indices.len() { None } else { Some(self.tags()) };
        let passes = move |index: &usize| tags.is_none_or(|tags| filter.matches(&tags[*index]));
        indices[first..].iter().copied().filter(passes)
    }

    /// A critical alert as it is given before its turn.
    pub(crate) fn early_frame(&self, index: usize, form: Form) -> Bytes {
        let Critical { indices, forms } = self.critical();
        let frames = &forms.get_or_init(Box::default)[form.variant().map_or(0, |variant| variant + 1)];
        let place = indices.partition_point(|critical| *critical < index);
        frames.get_or_init(|| self.write(indices.iter().copied(), form, true)).of(place..place + 1)
    }

    fn critical(&self) -> &Critical {
        self.critical.get_or_init(|| {
            let is_critical =
                |index: &usize| self.declared[*index].severity(self.payload(*index)) == Some(Severity::Critical);
            Critical { indices: (0..self.len()).filter(is_critical).collect(), forms: OnceLock::new() }
        })
    }

    fn write(&self, indices: impl ExactSizeIterator<Item = usize>, form: Form, is_early: bool) -> Frames {
        let room = if is_early { 0 } else { self.size_bytes() + self.len() * 96 };
        let (mut bytes, mut ends) = (Vec::with_capacity(room), Vec::with_capacity(indices.len()));
        let mut position = Position { epoch: self.epoch.clone(), id: EntryId::MIN };
        for index in indices {
            position.id = self.ids[index];
            form.push(&mut bytes, self.payload(index), &position, &self.stream, is_early);
            ends.push(bytes.len());
        }
        Frames { bytes: bytes.into(), ends: ends.into() }
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

impl fmt::Debug for Batch {
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

    /// An entry of that number with some fields.
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
    use crate::event::Attribute;
    use crate::event::Severity;

    fn frame(entries: &[Entry], target: usize) -> Framed {
        Batch::frame(&"s".parse().expect("a name"), &"e".parse().expect("an epoch"), entries, target)
    }

    fn high() -> Filter {
        Filter::min_severity(Severity::High)
    }

    #[test]
    fn entries_that_are_no_text_are_left_out_and_passed() {
        let mut broken = entry(2, &[]);
        broken.fields.push("data", Bytes::from_static(b"\xff"));
        let framed = frame(&[entry(1, &[("data", "{}")]), broken, entry(3, &[("other", "x")])], 1000);
        assert_eq!((framed.taken, framed.undecodable, framed.batch.len()), (3, 2, 1));
        assert_eq!(framed.batch.last(), EntryId::new(3, 0));
    }

    #[test]
    fn a_batch_ends_at_its_target_size_but_takes_one_entry_at_least() {
        let big = "x".repeat(100);
        let entries = [1, 2, 3].map(|ms| entry(ms, &[("data", &big)]));
        assert_eq!(frame(&entries, 1).taken, 1);
        assert_eq!(frame(&entries, 230).taken, 2);
        assert_eq!(frame(&entries, 1000).taken, 3);
    }

    #[test]
    fn runs_are_slices_of_what_passes() {
        let severities = ["high", "low", "critical", "high", "info"];
        let entries: Vec<Entry> =
            (1..).zip(severities).map(|(ms, s)| entry(ms, &[("data", "{}"), ("severity", s)])).collect();
        let batch = frame(&entries, 1000).batch;
        assert_eq!(batch.next_match(1, &high()), 2);
        assert_eq!(batch.run(2, EntryId::MAX, &high()), 2..4);
        assert_eq!(batch.run(2, EntryId::new(4, 0), &high()), 2..3);
        assert_eq!(batch.next_match(4, &high()), 5);
        assert_eq!(batch.run(0, EntryId::MAX, &Filter::default()), 0..5);
        assert_eq!(batch.frames(2..4, Form::Plain).as_ref(), b"\x81\x02{}\x81\x02{}");
        let newest: Vec<u64> = batch.newest(EntryId::new(3, 0), &high()).map(|id| id.ms).collect();
        assert_eq!(newest, [3, 1]);
    }

    #[test]
    fn other_forms_are_made_on_request_only() {
        let batch = frame(&[entry(7, &[("data", r#"{"a":1}"#)]), entry(8, &[("data", "{}")])], 1000).batch;
        assert!(batch.variants.get().is_none());
        let frames = batch.frames(1..2, Form::WithPosition);
        assert_eq!(frames::payload(&frames), br#"{"_pos":"e:8-0","_stream":"s"}"#);
    }

    #[test]
    fn filters_read_payloads_where_fields_are_missing() {
        let batch = frame(&[entry(1, &[("data", r#"{"severity":"critical","source":"zeek"}"#)])], 1000).batch;
        let zeek = high().and(Filter::is(Attribute::Source, "zeek"));
        assert_eq!(batch.next_match(0, &zeek), 0);
    }
}
