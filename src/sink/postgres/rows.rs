//! Deliveries as the columns of one insert.

use std::borrow::Cow;
use std::error::Error;
use std::time::SystemTime;

use bytes::{BufMut as _, BytesMut};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::event::{AlertView, Delivery, Entry, EntryId, Severity, StreamName, field};
use crate::sink::envelope::{Envelope, plain};
use crate::sink::{SinkError, SinkErrorClass};

/// A text column of one row.
type Text<'a> = Option<Cow<'a, str>>;

/// The values of several rows, column by column, ordered by key.
///
/// All inserts take keys in the same order. So two inserts with common keys wait for each other instead of deadlocking.
#[derive(Debug, Default)]
pub(super) struct InsertRows<'a> {
    stream: &'a str,
    entry_id: Vec<String>,
    event_id: Vec<Text<'a>>,
    received_at: Vec<SystemTime>,
    severity: Vec<Option<&'static str>>,
    source: Vec<Text<'a>>,
    category: Vec<Text<'a>>,
    tenant: Vec<Text<'a>>,
    traceparent: Vec<Text<'a>>,
    task_id: Vec<Text<'a>>,
    agent_type: Vec<Text<'a>>,
    case_id: Vec<Text<'a>>,
    alert_id: Vec<Text<'a>>,
    data: Vec<Json<'a>>,
}

impl<'a> InsertRows<'a> {
    /// Reads deliveries. Fails with the first entry that cannot be a row, before anything is sent.
    pub(super) fn read(stream: &'a StreamName, batch: &'a [Delivery]) -> Result<Self, SinkError> {
        let mut entries: Vec<(EntryId, &Entry)> =
            batch.iter().map(|delivery| (delivery.entry.first_id(), &delivery.entry)).collect();
        entries.sort_unstable_by_key(|(id, _)| *id);
        let mut rows = Self { stream: stream.as_str(), ..Self::default() };
        for (id, entry) in entries {
            rows.push(id, entry)?;
        }
        Ok(rows)
    }

    fn push(&mut self, id: EntryId, entry: &'a Entry) -> Result<(), SinkError> {
        let json = payload(entry)?;
        let envelope = Envelope::parse(json).map_err(|error| {
            SinkError::new(SinkErrorClass::Undecodable, format!("`data` of entry {id} is not JSON: {error}"))
        })?;
        if let Some(part) = refused_by_jsonb(json) {
            let message = format!("`data` of entry {id} has {part}, which jsonb cannot hold");
            return Err(SinkError::new(SinkErrorClass::Permanent, message));
        }
        let view = AlertView::parse(json.as_bytes()).unwrap_or_default();
        let named = |name: &str, from_payload: Text<'a>| {
            let text = entry.fields.text(name).filter(|text| !text.is_empty()).map(Cow::Borrowed);
            text.or(from_payload).map(storable)
        };
        let severity = entry.fields.text(field::SEVERITY).and_then(|text| text.parse::<Severity>().ok());
        self.entry_id.push(id.to_string());
        self.event_id.push(named(field::ID, view.id));
        self.received_at.push(received_at(entry, id));
        self.severity.push(severity.or(view.severity).map(Severity::as_str));
        self.source.push(named(field::SOURCE, view.source));
        self.category.push(named(field::CATEGORY, view.category));
        self.tenant.push(named(field::TENANT, view.tenant));
        self.traceparent.push(named(field::TRACEPARENT, view.traceparent));
        self.task_id.push(plain(envelope.task_id).map(storable));
        self.agent_type.push(plain(envelope.agent_type).map(storable));
        self.case_id.push(plain(envelope.case_id).map(storable));
        self.alert_id.push(plain(envelope.alert_id).map(storable));
        self.data.push(Json(json));
        Ok(())
    }

    /// Returns the size of the payloads, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.data.iter().map(|json| json.0.len()).sum()
    }

    /// Returns the parameters of [`super::table::TableName::insert`], in order.
    pub(super) fn parameters(&self) -> [&(dyn ToSql + Sync); 14] {
        [
            &self.stream,
            &self.entry_id,
            &self.event_id,
            &self.received_at,
            &self.severity,
            &self.source,
            &self.category,
            &self.tenant,
            &self.traceparent,
            &self.task_id,
            &self.agent_type,
            &self.case_id,
            &self.alert_id,
            &self.data,
        ]
    }
}

fn payload(entry: &Entry) -> Result<&str, SinkError> {
    let undecodable = |what| SinkError::new(SinkErrorClass::Undecodable, format!("entry {} {what}", entry.id));
    let data = entry.data().ok_or_else(|| undecodable("has no field `data`"))?;
    std::str::from_utf8(data).map_err(|error| undecodable("is not UTF-8").with_source(error))
}

/// Returns the time of acceptance according to the producer, or else the time of the entry id.
fn received_at(entry: &Entry, id: EntryId) -> SystemTime {
    let declared = entry.fields.text(field::TIMESTAMP).and_then(|text| {
        let zoned = text.parse::<Timestamp>();
        zoned.or_else(|_| text.parse::<DateTime>()?.to_zoned(TimeZone::UTC).map(|zoned| zoned.timestamp())).ok()
    });
    // PostgreSQL has no year before 4714 BC, and real times are after 1970.
    let declared = declared.filter(|time| *time >= Timestamp::UNIX_EPOCH);
    let stored = || i64::try_from(id.ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    declared.or_else(stored).unwrap_or_else(Timestamp::now).into()
}

/// Removes NUL, which texts of `PostgreSQL` cannot hold.
fn storable(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text }
}

/// Returns the part of a JSON text that `jsonb` refuses: U+0000, or half of a surrogate pair.
///
/// Other limits of `jsonb`, such as numbers with more digits than `numeric` has, are left to the server.
fn refused_by_jsonb(json: &str) -> Option<&'static str> {
    let unit = |rest: &str| rest.get(..4).and_then(|digits| u16::from_str_radix(digits, 16).ok());
    let mut rest = json;
    while let Some((_, after)) = rest.split_once('\\') {
        // An escaped character is always ASCII.
        rest = after.get(1..)?;
        if !after.starts_with('u') {
            continue;
        }
        match unit(rest)? {
            0 => return Some("\\u0000"),
            0xD800..0xDC00 => {
                let low = rest.get(4..).and_then(|rest| rest.strip_prefix("\\u")).and_then(unit);
                if !low.is_some_and(|low| (0xDC00..0xE000).contains(&low)) {
                    return Some("half of a surrogate pair");
                }
                rest = rest.get(10..)?;
            }
            0xDC00..0xE000 => return Some("half of a surrogate pair"),
            _ => rest = rest.get(4..)?,
        }
    }
    None
}

/// JSON text as a `jsonb` parameter, without a copy.
#[derive(Debug)]
struct Json<'a>(&'a str);

impl ToSql for Json<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        // The version of the binary format.
        out.put_u8(1);
        out.put_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::JSONB
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;

    use super::*;

    fn delivery(ms: u64, fields: &[(&'static str, &'static str)]) -> Delivery {
        let fields = fields.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect();
        Delivery { entry: Entry { id: EntryId::new(ms, 0), fields }, attempt: 1, delivered_at: Instant::now() }
    }

    fn stream() -> StreamName {
        "aurora:agent:results".parse().expect("a name")
    }

    #[test]
    fn row_has_values_of_fields_and_payload() {
        let (stream, batch) = (
            stream(),
            [
                delivery(
                    1_700_000_000_000,
                    &[
                        ("id", "e1"),
                        ("timestamp", "2026-01-02T03:04:05"),
                        ("severity", "high"),
                        ("source", "a\0b"),
                        (
                            "data",
                            r#"{"task_id":"t1","agent_type":"triage","case_id":9,"severity":"low","tenant_id":"x"}"#,
                        ),
                    ],
                ),
                delivery(1_700_000_000_001, &[("data", "[1]")]),
            ],
        );
        let rows = InsertRows::read(&stream, &batch).expect("two rows");
        assert_eq!(rows.entry_id, ["1700000000000-0", "1700000000001-0"]);
        assert_eq!(rows.event_id, [Some("e1".into()), None]);
        assert_eq!(rows.severity, [Some("high"), None]);
        assert_eq!(rows.source, [Some("a\u{fffd}b".into()), None]);
        assert_eq!(rows.tenant[0].as_deref(), Some("x"));
        assert_eq!([&rows.task_id[0], &rows.case_id[0]].map(|text| text.as_deref()), [Some("t1"), Some("9")]);
        let declared: Timestamp = "2026-01-02T03:04:05Z".parse().expect("a time");
        let stored = Timestamp::from_millisecond(1_700_000_000_001).expect("a time");
        assert_eq!(rows.received_at, [declared, stored].map(SystemTime::from));
    }

    #[test]
    fn replayed_entry_keeps_its_key_and_rows_are_ordered() {
        let (stream, batch) =
            (stream(), [delivery(3, &[("data", "{}")]), delivery(9, &[("data", "{}"), ("replay.of", "2-0")])]);
        assert_eq!(InsertRows::read(&stream, &batch).expect("two rows").entry_id, ["2-0", "3-0"]);
    }

    #[test]
    fn invalid_json_and_jsonb_have_their_error_classes() {
        let (stream, class) = (stream(), |fields: &[(&'static str, &'static str)]| {
            InsertRows::read(&stream(), &[delivery(1, fields)]).err().map(|error| error.class())
        });
        assert!(InsertRows::read(&stream, &[]).is_ok());
        assert_eq!(class(&[]), Some(SinkErrorClass::Undecodable));
        assert_eq!(class(&[("data", "nope")]), Some(SinkErrorClass::Undecodable));
        assert_eq!(class(&[("data", r#"{"a":"x\u0000"}"#)]), Some(SinkErrorClass::Permanent));
        assert_eq!(class(&[("data", r#"{"a":"x\\u0000"}"#)]), None);
    }

    #[test]
    fn jsonb_takes_all_escapes_but_nul_and_broken_pairs() {
        let cases = [
            (r#""\ud83d\ude00 \u00e4 \" \\ \n""#, true),
            (r#""\ud83d""#, false),
            (r#""\ud83dx\ude00""#, false),
            (r#""\ud83d\u0041""#, false),
            (r#""\ude00""#, false),
            (r#""\\\u0000""#, false),
            (r#""\\\\u0000 ä\\""#, true),
        ];
        for (json, is_taken) in cases {
            assert_eq!(refused_by_jsonb(json).is_none(), is_taken, "{json}");
        }
    }
}
