//! The record of an entry that could not be handled.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use jiff::Timestamp;

use super::entry::{field, rfc3339};
use super::{Entry, EntryId, Fields, GroupName, StreamName};

/// Why an entry went to the dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadLetterReason {
    /// The sink refused it and would refuse it again.
    Rejected,
    /// It failed as often as the group allows.
    Exhausted,
    /// It was delivered as often as the group allows without a result: the handler crashed or hung each time.
    Crashed,
    /// It has no `data`, or its `data` is not what the sink or filter needs.
    Undecodable,
}

impl DeadLetterReason {
    /// All reasons, for metrics and documentation.
    pub const ALL: [Self; 4] = [Self::Rejected, Self::Exhausted, Self::Crashed, Self::Undecodable];

    /// The reason in one word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Exhausted => "exhausted",
            Self::Crashed => "crashed",
            Self::Undecodable => "undecodable",
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeadLetterReason {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text).ok_or(())
    }
}

/// A dead letter: where the entry came from, why it is here, and every original field byte for byte.
///
/// As an entry it has the original fields first, in their order, and then ours, so that original fields of the same
/// names are neither lost nor mistaken for ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The stream the entry was in.
    pub stream: StreamName,
    /// The entry's id there.
    pub id: EntryId,
    /// The group that could not handle it.
    pub group: GroupName,
    /// Why.
    pub reason: DeadLetterReason,
    /// The last error, at most 2 KiB of it.
    pub error: String,
    /// How many times it was delivered.
    pub attempts: u32,
    /// When the first failure was seen; the last one when that is not known any more.
    pub first_failure: Timestamp,
    /// When the last failure was seen.
    pub last_failure: Timestamp,
    /// How many times it was replayed from the dead letters before.
    pub replays: u32,
    /// The original fields.
    pub fields: Fields,
}

const ERROR_BYTES: usize = 2048;

const STREAM: &str = "dead.stream";
const ID: &str = "dead.id";
const GROUP: &str = "dead.group";
const REASON: &str = "dead.reason";
const ERROR: &str = "dead.error";
const ATTEMPTS: &str = "dead.attempts";
const FIRST_FAILURE: &str = "dead.first_failure";
const LAST_FAILURE: &str = "dead.last_failure";
const REPLAYS: &str = "dead.replays";

/// What tells of an earlier replay; a later one says it anew.
const OF_REPLAYS: [&str; 4] = [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_COUNT, field::REPLAY_ATTEMPTS];

const OURS: [&str; 9] = [STREAM, ID, GROUP, REASON, ERROR, ATTEMPTS, FIRST_FAILURE, LAST_FAILURE, REPLAYS];

impl DeadLetter {
    /// The fields to store.
    pub fn to_fields(&self) -> Fields {
        let mut fields = Fields::with_capacity(self.fields.len() + OURS.len());
        for (name, value) in self.fields.iter() {
            fields.push(name.clone(), value.clone());
        }
        let mut error = self.error.clone();
        error.truncate(error.floor_char_boundary(ERROR_BYTES));
        let values = [
            self.stream.to_string(),
            self.id.to_string(),
            self.group.to_string(),
            self.reason.to_string(),
            error,
            self.attempts.to_string(),
            rfc3339(self.first_failure),
            rfc3339(self.last_failure),
            self.replays.to_string(),
        ];
        for (name, value) in OURS.into_iter().zip(values) {
            fields.push(Bytes::from_static(name.as_bytes()), value);
        }
        fields
    }

    /// Reads a record back; nothing when the entry is not one that the bus wrote.
    pub fn from_entry(entry: &Entry) -> Option<Self> {
        let original_fields = entry.fields.len().checked_sub(OURS.len())?;
        let mut values = entry.fields.iter().skip(original_fields).zip(OURS).map(|((name, value), ours)| {
            let is_ours = name.as_ref() == ours.as_bytes();
            if is_ours { std::str::from_utf8(value).ok() } else { None }
        });
        let mut next = || values.next().flatten();
        Some(Self {
            stream: next()?.parse().ok()?,
            id: next()?.parse().ok()?,
            group: next()?.parse().ok()?,
            reason: next()?.parse().ok()?,
            error: next()?.to_owned(),
            attempts: next()?.parse().ok()?,
            first_failure: next()?.parse().ok()?,
            last_failure: next()?.parse().ok()?,
            replays: next()?.parse().ok()?,
            fields: entry.fields.iter().take(original_fields).map(|(n, v)| (n.clone(), v.clone())).collect(),
        })
    }
}

impl DeadLetter {
    /// The fields to append to its stream once more: every original field byte for byte, then whom it is for (one
    /// group, or all where there is none), which entry it was at first, and how many replays it has had with this one.
    pub fn to_replay(&self, group: Option<&GroupName>) -> Fields {
        let mut fields = Fields::with_capacity(self.fields.len() + 3);
        for (name, value) in self.fields.iter() {
            if !OF_REPLAYS.iter().any(|ours| ours.as_bytes() == name.as_ref()) {
                fields.push(name.clone(), value.clone());
            }
        }
        let mut push = |name: &'static str, value: Bytes| fields.push(Bytes::from_static(name.as_bytes()), value);
        if let Some(group) = group {
            push(field::REPLAY_GROUP, group.to_string().into());
        }
        let first = self.fields.get(field::REPLAY_OF).cloned();
        push(field::REPLAY_OF, first.unwrap_or_else(|| self.id.to_string().into()));
        push(field::REPLAY_COUNT, self.replays.saturating_add(1).to_string().into());
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead_letter(fields: Fields) -> DeadLetter {
        DeadLetter {
            stream: "aurora:alerts".parse().expect("a valid name"),
            id: EntryId::new(7, 1),
            group: "siem".parse().expect("a valid name"),
            reason: DeadLetterReason::Rejected,
            error: "HTTP 400".to_owned(),
            attempts: 3,
            first_failure: Timestamp::from_millisecond(1_000).expect("in range"),
            last_failure: Timestamp::from_millisecond(2_000).expect("in range"),
            replays: 0,
            fields,
        }
    }

    #[test]
    fn a_dead_letter_of_a_dead_letter_keeps_every_original_field() {
        let mut original = Fields::default();
        original.push("data", Bytes::from_static(b"\xff not utf-8"));
        original.push("data", "twice");
        let first = dead_letter(original);
        let second = dead_letter(first.to_fields());
        let entry = Entry { id: EntryId::new(9, 0), fields: second.to_fields() };
        let read = DeadLetter::from_entry(&entry).expect("a dead letter");
        assert_eq!(read, second);
        let inner = Entry { id: EntryId::new(8, 0), fields: read.fields };
        assert_eq!(DeadLetter::from_entry(&inner), Some(first));
    }

    #[test]
    fn a_replay_keeps_every_original_field_and_names_the_first_entry_whatever_comes_between() {
        let mut original = Fields::default();
        original.push("data", Bytes::from_static(b"\xff not utf-8"));
        original.push("data", "twice");
        let mut letter = dead_letter(original.clone());
        let group: GroupName = "siem".parse().expect("a valid name");
        let copy = letter.to_replay(Some(&group));
        assert_eq!(copy.iter().take(2).collect::<Vec<_>>(), original.iter().collect::<Vec<_>>());
        let texts = |fields: &Fields| OF_REPLAYS.map(|name| fields.text(name).map(str::to_owned));
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(texts(&copy), [some("siem"), some("7-1"), some("1"), None]);
        (letter.id, letter.replays, letter.fields) = (EntryId::new(99, 0), 1, copy);
        letter.fields.push(field::REPLAY_ATTEMPTS, "9");
        let second = letter.to_replay(None);
        assert_eq!(texts(&second), [None, some("7-1"), some("2"), None]);
        assert_eq!(second.len(), 4);
    }

    #[test]
    fn a_foreign_entry_is_no_dead_letter() {
        let mut fields = Fields::default();
        for n in 0..12 {
            fields.push(format!("f{n}"), "x");
        }
        assert_eq!(DeadLetter::from_entry(&Entry { id: EntryId::MIN, fields }), None);
    }

    #[test]
    fn a_long_error_is_cut_at_a_character() {
        let mut letter = dead_letter(Fields::default());
        letter.error = "é".repeat(2000);
        let entry = Entry { id: EntryId::MIN, fields: letter.to_fields() };
        assert_eq!(DeadLetter::from_entry(&entry).expect("a dead letter").error.len(), 2048);
    }
}
