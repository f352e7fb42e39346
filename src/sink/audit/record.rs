//! The lines of the audit files: encoding, decoding and chaining. Pure.
//!
//! A line is one JSON object. Its last property `hash` is the hash of all bytes before it:
//!
//! ```text
//! {"seq":8,"prev":"<hash of record 7>","recorded_at":"…","stream":"aurora:audit","id":"17-0","event_id":"…",
//!  "fields":{"id":"…","data":"…"},"hash":"<SHA-256, hex>"}
//! ```
//!
//! Every file begins with a record of its own number and of the greatest entry id per stream in the files before it:
//!
//! ```text
//! {"seq":9,"prev":"…","recorded_at":"…","file":2,"heads":{"aurora:audit":"17-0"},"hash":"…"}
//! ```
//!
//! Values of `fields` are the original bytes: a text if they are UTF-8, else `{"base64":"…"}`. If names of fields
//! repeat or are not UTF-8, `fields` is an array of pairs in the original order instead of an object.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::event::{Entry, EntryId, Fields, StreamName, field};

const HASH_MEMBER: &[u8] = br#","hash":""#;
const HEX_BYTES: usize = 64;
/// `,"hash":"…"}`
const SUFFIX_BYTES: usize = HASH_MEMBER.len() + HEX_BYTES + 2;

/// The SHA-256 hash of a record.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct RecordHash([u8; 32]);

impl RecordHash {
    fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    fn from_hex(hex: &[u8]) -> Option<Self> {
        if hex.len() != HEX_BYTES {
            return None;
        }
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Some(byte - b'0'),
            b'a'..=b'f' => Some(byte - b'a' + 10),
            _ => None,
        };
        let mut hash = Self::default();
        for (byte, pair) in hash.0.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(hash)
    }

    fn push_hex(self, out: &mut Vec<u8>) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        for byte in self.0 {
            out.extend([DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
    }
}

impl fmt::Display for RecordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RecordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The end of a chain. The next record is linked to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ChainHead {
    /// Sequence number of the last record; 0 before the first.
    pub(super) seq: u64,
    /// The hash of the last record; zeros before the first.
    pub(super) hash: RecordHash,
}

impl ChainHead {
    /// Appends the line of the next record to `out`. `body` has its properties after `recorded_at`.
    pub(super) fn seal(&mut self, recorded_at: &str, body: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        let seq = self.seq + 1;
        out.extend_from_slice(format!(r#"{{"seq":{seq},"prev":""#).as_bytes());
        self.hash.push_hex(out);
        out.extend_from_slice(br#"","recorded_at":""#);
        out.extend_from_slice(recorded_at.as_bytes());
        out.extend_from_slice(br#"","#);
        out.extend_from_slice(body);
        let hash = RecordHash::of(&out[start..]);
        out.extend_from_slice(HASH_MEMBER);
        hash.push_hex(out);
        out.extend_from_slice(b"\"}\n");
        *self = Self { seq, hash };
    }

    /// Returns whether a record is the next one.
    pub(super) fn is_followed_by(self, record: &ChainRecord<'_>) -> bool {
        record.seq == self.seq + 1 && record.prev == self.hash
    }
}

/// Formats a time for records: RFC 3339, UTC, milliseconds.
pub(super) fn recorded_at(now: Timestamp) -> String {
    format!("{now:.3}")
}

/// Writes the properties of an entry's record.
pub(super) fn entry_body(stream: &StreamName, entry: &Entry, out: &mut Vec<u8>) {
    out.extend_from_slice(br#""stream":"#);
    push_text(stream.as_str(), out);
    out.extend_from_slice(format!(r#","id":"{}","event_id":"#, entry.id).as_bytes());
    match entry.fields.text(field::ID) {
        Some(id) => push_text(id, out),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(br#","fields":"#);
    push_fields(&entry.fields, out);
}

/// Writes the properties of the record that begins a file.
pub(super) fn file_body(file: u64, heads: &BTreeMap<String, EntryId>, out: &mut Vec<u8>) {
    out.extend_from_slice(format!(r#""file":{file},"heads":{{"#).as_bytes());
    for (n, (stream, id)) in heads.iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        push_text(stream, out);
        out.extend_from_slice(format!(r#":"{id}""#).as_bytes());
    }
    out.push(b'}');
}

fn push_fields(fields: &Fields, out: &mut Vec<u8>) {
    let is_plain = fields.iter().enumerate().all(|(n, (name, _))| {
        std::str::from_utf8(name).is_ok() && fields.iter().take(n).all(|(earlier, _)| earlier != name)
    });
    let (open, between, close) = if is_plain { (b'{', b':', b'}') } else { (b'[', b',', b']') };
    out.push(open);
    for (n, (name, value)) in fields.iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        if !is_plain {
            out.push(b'[');
        }
        push_bytes(name, out);
        out.push(between);
        push_bytes(value, out);
        if !is_plain {
            out.push(b']');
        }
    }
    out.push(close);
}

fn push_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        push_text(text, out);
    } else {
        out.extend_from_slice(br#"{"base64":""#);
        out.extend_from_slice(BASE64.encode(bytes).as_bytes());
        out.extend_from_slice(br#""}"#);
    }
}

fn push_text(text: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, text).expect("writing to a Vec succeeds");
}

/// A decoded record.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ChainRecord<'a> {
    pub(super) seq: u64,
    pub(super) prev: RecordHash,
    pub(super) hash: RecordHash,
    pub(super) recorded_at: &'a str,
    pub(super) content: RecordContent,
}

/// The content of a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RecordContent {
    /// The beginning of a file.
    File { number: u64, heads: BTreeMap<String, EntryId> },
    /// An entry of a stream.
    Entry { stream: String, id: EntryId },
}

/// The reason why a line is not a valid record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It does not have the form of a record.
    NotARecord,
    /// Its content does not match its hash.
    Changed,
}

impl<'a> ChainRecord<'a> {
    /// Decodes a line without its newline, and checks its hash.
    pub(super) fn parse(line: &'a [u8]) -> Result<Self, Unreadable> {
        #[derive(Deserialize)]
        struct Members<'a> {
            seq: u64,
            prev: &'a str,
            recorded_at: &'a str,
            file: Option<u64>,
            heads: Option<BTreeMap<String, String>>,
            stream: Option<String>,
            id: Option<&'a str>,
        }

        let body_bytes = line.len().checked_sub(SUFFIX_BYTES).ok_or(Unreadable::NotARecord)?;
        let (body, suffix) = line.split_at(body_bytes);
        let hex = suffix.strip_prefix(HASH_MEMBER).and_then(|rest| rest.strip_suffix(b"\"}"));
        let hash = hex.and_then(RecordHash::from_hex).ok_or(Unreadable::NotARecord)?;
        let members: Members<'a> = serde_json::from_slice(line).map_err(|_not_json| Unreadable::NotARecord)?;
        if RecordHash::of(body) != hash {
            return Err(Unreadable::Changed);
        }
        let prev = RecordHash::from_hex(members.prev.as_bytes()).ok_or(Unreadable::NotARecord)?;
        let content = match (members.file, members.heads, members.stream, members.id) {
            (Some(number), Some(heads), None, None) => {
                let parsed = heads.into_iter().map(|(stream, id)| id.parse().ok().map(|id| (stream, id)));
                RecordContent::File { number, heads: parsed.collect::<Option<_>>().ok_or(Unreadable::NotARecord)? }
            }
            (None, None, Some(stream), Some(id)) => {
                RecordContent::Entry { stream, id: id.parse().map_err(|_no_id| Unreadable::NotARecord)? }
            }
            _ => return Err(Unreadable::NotARecord),
        };
        Ok(Self { seq: members.seq, prev, hash, recorded_at: members.recorded_at, content })
    }

    /// Returns the end of the chain if this is its last record.
    pub(super) fn head(&self) -> ChainHead {
        ChainHead { seq: self.seq, hash: self.hash }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    const NOW: &str = "2026-01-01T00:00:00.000Z";

    fn line_of(fields: Fields) -> Vec<u8> {
        let entry = Entry { id: EntryId::new(7, 1), fields };
        let (mut body, mut out) = (Vec::new(), Vec::new());
        entry_body(&"aurora:audit".parse().expect("a valid name"), &entry, &mut body);
        ChainHead::default().seal(NOW, &body, &mut out);
        assert_eq!(out.pop(), Some(b'\n'));
        out
    }

    /// Returns the original fields of a line.
    fn fields_of(line: &[u8]) -> Fields {
        fn bytes(value: &Value) -> Bytes {
            match value {
                Value::String(text) => Bytes::from(text.clone()),
                other => BASE64.decode(other["base64"].as_str().expect("a text")).expect("valid base64").into(),
            }
        }
        let record: Value = serde_json::from_slice(line).expect("JSON");
        match &record["fields"] {
            Value::Object(map) => map.iter().map(|(n, v)| (Bytes::from(n.clone()), bytes(v))).collect(),
            Value::Array(pairs) => pairs.iter().map(|pair| (bytes(&pair[0]), bytes(&pair[1]))).collect(),
            other => panic!("no fields: {other}"),
        }
    }

    #[test]
    fn record_of_an_entry_round_trips() {
        let fields = [("id", "e-1"), ("data", "{\"a\":\"\n\"}")];
        let line = line_of(fields.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect());
        let text = String::from_utf8(line.clone()).expect("UTF-8");
        let expected = r#""stream":"aurora:audit","id":"7-1","event_id":"e-1","fields":{"id":"e-1","data":"#;
        assert!(text.starts_with(r#"{"seq":1,"prev":"0000"#) && text.contains(expected), "{text}");
        let record = ChainRecord::parse(&line).expect("a record");
        assert!(ChainHead::default().is_followed_by(&record));
        assert_eq!(record.content, RecordContent::Entry { stream: "aurora:audit".to_owned(), id: EntryId::new(7, 1) });
    }

    #[test]
    fn record_of_a_file_round_trips() {
        let heads = BTreeMap::from([("a".to_owned(), EntryId::new(1, 2)), ("b".to_owned(), EntryId::MAX)]);
        let (mut body, mut line) = (Vec::new(), Vec::new());
        file_body(3, &heads, &mut body);
        let mut head = ChainHead::default();
        head.seal(NOW, &body, &mut line);
        line.pop();
        let record = ChainRecord::parse(&line).expect("a record");
        assert_eq!(record.content, RecordContent::File { number: 3, heads });
        assert_eq!(record.head(), head);
    }

    proptest! {
        #[test]
        fn every_field_round_trips_byte_for_byte(
            pairs in prop::collection::vec(any::<(Vec<u8>, Vec<u8>)>(), 0..6)
        ) {
            let fields: Fields = pairs.into_iter().map(|(n, v)| (Bytes::from(n), Bytes::from(v))).collect();
            let read = fields_of(&line_of(fields.clone()));
            let sorted = |fields: &Fields| {
                let mut pairs: Vec<_> = fields.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
                pairs.sort();
                pairs
            };
            // A parsed JSON object has no order, the line has.
            prop_assert_eq!(sorted(&read), sorted(&fields));
        }

        #[test]
        fn changed_byte_makes_a_line_unreadable(position: prop::sample::Index, change in 1_u8..) {
            let mut line = line_of([(Bytes::from("data"), Bytes::from("{\"title\":\"x\"}"))].into_iter().collect());
            let position = position.index(line.len());
            line[position] ^= change;
            prop_assert!(ChainRecord::parse(&line).is_err());
        }

        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(ChainRecord::parse(&bytes).is_err());
        }
    }
}
