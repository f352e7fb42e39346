//! The record of an entry that a group gave up.

use std::fmt;
use std::str::FromStr;

use bytes::{Buf as _, Bytes, BytesMut};
use jiff::Timestamp;

use super::entry::{field, rfc3339};
use super::{Entry, EntryId, Fields, GroupName, StreamName};

/// The reason why an entry became a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadLetterReason {
    /// The sink refused it for good.
    Rejected,
    /// Every attempt that the group allows has failed.
    Exhausted,
    /// Every delivery that the group allows ended without a result: the handler crashed or hung.
    Crashed,
    /// It has no `data`, or the sink or filter cannot read it.
    Undecodable,
}

impl DeadLetterReason {
    /// All reasons, for metrics and documentation.
    pub const ALL: [Self; 4] = [Self::Rejected, Self::Exhausted, Self::Crashed, Self::Undecodable];

    /// Returns the reason in one word.
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

/// A dead letter: the origin of the entry, the reason, and every original field byte for byte.
///
/// Its entry has the original fields first, in order, and then those of the record. So original fields with the same
/// names are neither lost nor confused. Thousands of fields become one field `dead.fields`, which has each name and
/// each value after its length and a colon: `4:data2:{}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// The stream of the entry.
    pub stream: StreamName,
    /// The id of the entry in that stream.
    pub id: EntryId,
    /// The group that gave it up.
    pub group: GroupName,
    /// The reason.
    pub reason: DeadLetterReason,
    /// The last error, at most 2 KiB.
    pub error: String,
    /// Number of deliveries.
    pub attempts: u32,
    /// Time of the first failure, or of the last one if the first is unknown.
    pub first_failure: Timestamp,
    /// Time of the last failure.
    pub last_failure: Timestamp,
    /// Number of earlier replays from the dead letters.
    pub replays: u32,
    /// The original fields.
    pub fields: Fields,
}

const ERROR_BYTES: usize = 2048;
/// Maximum number of separate fields. More are stored as one, because stores limit the arguments of a call.
const MAX_PLAIN_FIELDS: usize = 3000;

/// The field with all original fields, see [`packed`].
const FIELDS: &str = "dead.fields";

const STREAM: &str = "dead.stream";
const ID: &str = "dead.id";
const GROUP: &str = "dead.group";
const REASON: &str = "dead.reason";
const ERROR: &str = "dead.error";
const ATTEMPTS: &str = "dead.attempts";
const FIRST_FAILURE: &str = "dead.first_failure";
const LAST_FAILURE: &str = "dead.last_failure";
const REPLAYS: &str = "dead.replays";

/// The fields of an earlier replay. A later replay writes new ones.
const REPLAY_FIELDS: [&str; 4] = [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_COUNT, field::REPLAY_ATTEMPTS];

const RECORD_FIELDS: [&str; 9] = [STREAM, ID, GROUP, REASON, ERROR, ATTEMPTS, FIRST_FAILURE, LAST_FAILURE, REPLAYS];

impl DeadLetter {
    /// Creates the record of an entry that fails now. If the entry was appended again for external consumers, the
    /// record has its original fields and id.
    pub fn of_original_entry(
        entry: &Entry,
        stream: &StreamName,
        group: &GroupName,
        reason: DeadLetterReason,
        error: String,
        attempts: u32,
        now: Timestamp,
    ) -> Self {
        let is_again = entry.is_for_one_group();
        let is_kept = |name: &[u8]| !(is_again && REPLAY_FIELDS.iter().any(|ours| ours.as_bytes() == name));
        let fields = entry.fields.iter().filter(|(name, _)| is_kept(name.as_ref()));
        Self {
            stream: stream.clone(),
            id: if is_again { entry.first_id() } else { entry.id },
            group: group.clone(),
            reason,
            error,
            attempts,
            first_failure: now,
            last_failure: now,
            replays: entry.replays(),
            fields: fields.map(|(name, value)| (name.clone(), value.clone())).collect(),
        }
    }

    /// Returns the fields to store.
    pub fn to_fields(&self) -> Fields {
        let mut fields = Fields::with_capacity(self.fields.len() + RECORD_FIELDS.len());
        let is_alike = self.fields.len() == 1 && self.fields.get(FIELDS).is_some();
        if self.fields.len() > MAX_PLAIN_FIELDS || is_alike {
            fields.push(Bytes::from_static(FIELDS.as_bytes()), packed(&self.fields));
        } else {
            for (name, value) in self.fields.iter() {
                fields.push(name.clone(), value.clone());
            }
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
        for (name, value) in RECORD_FIELDS.into_iter().zip(values) {
            fields.push(Bytes::from_static(name.as_bytes()), value);
        }
        fields
    }

    /// Reads a record. Returns `None` if the bus did not write the entry.
    pub fn from_entry(entry: &Entry) -> Option<Self> {
        let original_fields = entry.fields.len().checked_sub(RECORD_FIELDS.len())?;
        let mut values = entry.fields.iter().skip(original_fields).zip(RECORD_FIELDS).map(|((name, value), ours)| {
            let is_ours = name.as_ref() == ours.as_bytes();
            if is_ours { std::str::from_utf8(value).ok() } else { None }
        });
        let mut next = || values.next().flatten();
        let mut fields: Fields =
            entry.fields.iter().take(original_fields).map(|(n, v)| (n.clone(), v.clone())).collect();
        if fields.len() == 1
            && let Some(all) = fields.get(FIELDS)
        {
            fields = unpacked(all)?;
        }
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
            fields,
        })
    }
}

impl DeadLetter {
    /// Returns the fields for a replay: the original fields byte for byte, the target group (or none for all groups),
    /// the id of the first entry, and the number of replays including this one.
    pub fn to_replay(&self, group: Option<&GroupName>) -> Fields {
        let mut fields = Fields::with_capacity(self.fields.len() + 3);
        for (name, value) in self.fields.iter() {
            if !REPLAY_FIELDS.iter().any(|ours| ours.as_bytes() == name.as_ref()) {
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

/// Packs fields: each name and each value after its length and a colon.
fn packed(fields: &Fields) -> Bytes {
    let mut all = BytesMut::with_capacity(fields.size_bytes() + fields.len() * 8);
    for part in fields.iter().flat_map(|(name, value)| [name, value]) {
        all.extend_from_slice(part.len().to_string().as_bytes());
        all.extend_from_slice(b":");
        all.extend_from_slice(part);
    }
    all.freeze()
}

fn unpacked(all: &Bytes) -> Option<Fields> {
    let mut rest = all.clone();
    let mut part = || {
        let colon = rest.iter().position(|byte| *byte == b':')?;
        let length: usize = std::str::from_utf8(&rest.split_to(colon)).ok()?.parse().ok()?;
        rest.advance(1);
        (length <= rest.len()).then(|| rest.split_to(length))
    };
    let mut fields = Fields::default();
    while let Some(name) = part() {
        fields.push(name, part()?);
    }
    rest.is_empty().then_some(fields)
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
    fn nested_dead_letter_keeps_every_original_field() {
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
    fn replay_keeps_original_fields_and_first_id() {
        let mut original = Fields::default();
        original.push("data", Bytes::from_static(b"\xff not utf-8"));
        original.push("data", "twice");
        let mut letter = dead_letter(original.clone());
        let group: GroupName = "siem".parse().expect("a valid name");
        let copy = letter.to_replay(Some(&group));
        assert_eq!(copy.iter().take(2).collect::<Vec<_>>(), original.iter().collect::<Vec<_>>());
        let texts = |fields: &Fields| REPLAY_FIELDS.map(|name| fields.text(name).map(str::to_owned));
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(texts(&copy), [some("siem"), some("7-1"), some("1"), None]);
        (letter.id, letter.replays, letter.fields) = (EntryId::new(99, 0), 1, copy);
        letter.fields.push(field::REPLAY_ATTEMPTS, "9");
        let second = letter.to_replay(None);
        assert_eq!(texts(&second), [None, some("7-1"), some("2"), None]);
        assert_eq!(second.len(), 4);
    }

    #[test]
    fn thousands_of_fields_are_packed_into_one() {
        let mut many = Fields::default();
        for n in 0..5000 {
            many.push(format!("name:{n}"), vec![u8::try_from(n % 256).expect("a byte"); n % 7]);
        }
        let mut alike = Fields::default();
        alike.push(FIELDS, "4:data9:x");
        let few: Fields = many.iter().take(MAX_PLAIN_FIELDS).map(|(n, v)| (n.clone(), v.clone())).collect();
        for (fields, stored) in [(many, 1), (alike, 1), (few, MAX_PLAIN_FIELDS)] {
            let letter = dead_letter(fields);
            let entry = Entry { id: EntryId::new(9, 0), fields: letter.to_fields() };
            assert_eq!(entry.fields.len(), stored + RECORD_FIELDS.len());
            assert_eq!(DeadLetter::from_entry(&entry), Some(letter));
        }
    }

    #[test]
    fn damaged_packed_field_is_not_a_dead_letter() {
        let unpack = |text: &'static str| unpacked(&Bytes::from_static(text.as_bytes()));
        assert!(unpack("1:a1:b").is_some_and(|fields| fields.len() == 1));
        for text in ["1:a", "1:a9:b", "x", "-1:a1:b", "1:a1:b1", "99999999999999999999:a1:b"] {
            assert_eq!(unpack(text), None, "{text}");
        }
    }

    #[test]
    fn foreign_entry_is_not_a_dead_letter() {
        let mut fields = Fields::default();
        for n in 0..12 {
            fields.push(format!("f{n}"), "x");
        }
        assert_eq!(DeadLetter::from_entry(&Entry { id: EntryId::MIN, fields }), None);
    }

    #[test]
    fn long_error_is_cut_at_a_character() {
        let mut letter = dead_letter(Fields::default());
        letter.error = "é".repeat(2000);
        let entry = Entry { id: EntryId::MIN, fields: letter.to_fields() };
        assert_eq!(DeadLetter::from_entry(&entry).expect("a dead letter").error.len(), 2048);
    }
}
