//! Entries of the store, events of publishers, and deliveries of workers.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::{AlertView, EntryId, GroupName, Severity};

/// Names of the fields that the bus reads or writes. All other fields pass through unchanged.
pub mod field {
    /// The event id (UUID text), as opposed to the entry id of the store.
    pub const ID: &str = "id";
    /// Time of acceptance, RFC 3339. Other producers may omit the zone: it is read as UTC.
    pub const TIMESTAMP: &str = "timestamp";
    /// The payload: JSON text, unchanged byte for byte.
    pub const DATA: &str = "data";
    /// `critical`, `high`, `medium`, `low` or `info`.
    pub const SEVERITY: &str = "severity";
    /// The product that raised the alert, such as `suricata`.
    pub const SOURCE: &str = "source";
    /// `cps`, `network`, `endpoint`, `identity`, `cloud`, or another word.
    pub const CATEGORY: &str = "category";
    /// The tenant, if several tenants share a stream.
    pub const TENANT: &str = "tenant";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// The group that a replayed entry is for. Other groups and the relay skip the entry.
    pub const REPLAY_GROUP: &str = "replay.group";
    /// The id of a replayed entry at its first append to this stream.
    pub const REPLAY_OF: &str = "replay.of";
    /// Number of replays from the dead letters.
    pub const REPLAY_COUNT: &str = "replay.count";
    /// Number of deliveries before the entry was appended again for an external consumer.
    pub const REPLAY_ATTEMPTS: &str = "replay.attempts";
}

/// The fields of an entry: names and values as bytes, in order, with duplicates.
///
/// Producers in several languages write to the same streams, so names and values are arbitrary.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Fields(Vec<(Bytes, Bytes)>);

impl Fields {
    /// Creates an empty list with this capacity.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Adds a field at the end.
    pub fn push(&mut self, name: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// Returns the value of the first field with this name.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.0.iter().find(|(n, _)| n.as_ref() == name.as_bytes()).map(|(_, value)| value)
    }

    /// Returns the value of the first field with this name, if it is UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Returns names and values, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Bytes, &Bytes)> + ExactSizeIterator {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// Returns the number of fields.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns whether there are no fields.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the size of all names and values, in bytes.
    pub fn size_bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

impl FromIterator<(Bytes, Bytes)> for Fields {
    fn from_iter<I: IntoIterator<Item = (Bytes, Bytes)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// Shows names and sizes only, because payloads must not appear in logs.
impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), value.len())))
            .finish()
    }
}

/// A stored entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its id in the stream.
    pub id: EntryId,
    /// The fields that its producer wrote.
    pub fields: Fields,
}

impl Entry {
    /// Returns the payload, if there is one.
    pub fn data(&self) -> Option<&Bytes> {
        self.fields.get(field::DATA)
    }

    /// Returns the severity from the field if it has a known word, else from the payload.
    pub fn severity(&self) -> Option<Severity> {
        let named = self.fields.text(field::SEVERITY).and_then(|text| text.parse().ok());
        named.or_else(|| self.data().and_then(|data| AlertView::parse(data).ok()).and_then(|view| view.severity))
    }

    /// Returns whether it was appended again for one group. Other groups and dashboards skip it.
    pub fn is_for_one_group(&self) -> bool {
        self.fields.get(field::REPLAY_GROUP).is_some()
    }

    /// Returns whether the entry is for this group: it is for all groups, or for this one.
    pub fn is_for(&self, group: &GroupName) -> bool {
        self.fields.get(field::REPLAY_GROUP).is_none_or(|only| only.as_ref() == group.as_str().as_bytes())
    }

    /// Returns the fields for an append for one group alone. `deliveries` counts all deliveries under all ids.
    pub fn redelivered(&self, group: &GroupName, deliveries: u32) -> Fields {
        let ours = [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_ATTEMPTS].map(str::as_bytes);
        let kept = self.fields.iter().filter(|(name, _)| !ours.contains(&name.as_ref()));
        let mut fields: Fields = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
        let is_again = self.fields.get(field::REPLAY_GROUP).is_some();
        let first = self.fields.get(field::REPLAY_OF).filter(|_| is_again).cloned();
        fields.push(field::REPLAY_GROUP, group.to_string());
        fields.push(field::REPLAY_OF, first.unwrap_or_else(|| self.id.to_string().into()));
        fields.push(field::REPLAY_ATTEMPTS, deliveries.to_string());
        fields
    }

    /// Returns the id of its first append: its own id unless it was appended again.
    pub fn first_id(&self) -> EntryId {
        self.fields.text(field::REPLAY_OF).and_then(|id| id.parse().ok()).unwrap_or(self.id)
    }

    /// Returns the number of replays from the dead letters.
    pub fn replays(&self) -> u32 {
        self.fields.text(field::REPLAY_COUNT).and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

/// An entry on delivery to a consumer. It is pending in the store until it is settled.
#[derive(Debug)]
pub struct Delivery {
    /// The entry.
    pub entry: Entry,
    /// Number of deliveries by the store, including this one.
    pub attempt: u32,
    /// Time of the delivery, by the monotonic clock of this process.
    pub delivered_at: Instant,
}

/// A key of the publisher for an event. Within `window`, a second append with the same key returns the first entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// 1 to 256 bytes of UTF-8. Keys of the bus begin with a byte that is not UTF-8, and may be longer.
    pub key: Bytes,
    /// Time for which the key is remembered.
    pub window: Duration,
}

/// An entry to append to a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// The fields to store, including `id` if the event has one.
    pub fields: Fields,
    /// Prevents a second entry with the same key.
    pub idempotency: Option<IdempotencyKey>,
}

/// A parsed event of a publisher: a JSON object with the properties that the bus reads.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// The event id (UUID v7 text), created by the bus.
    pub event_id: Bytes,
    /// The payload, byte for byte.
    pub data: Bytes,
    /// The property `id` of the payload, if there is one.
    pub own_id: Option<String>,
    severity: Option<Severity>,
    source: Option<String>,
    category: Option<String>,
    tenant: Option<String>,
    is_tenant_of_product: bool,
    traceparent: Option<String>,
}

/// The reason why a payload is not an event.
#[derive(Debug, thiserror::Error)]
pub enum NotAnEvent {
    /// The bytes are not UTF-8.
    #[error("the event is not UTF-8: byte {0} starts an invalid sequence")]
    Utf8(usize),
    /// The text is not one JSON object.
    #[error("the event is not one JSON object: {0}")]
    Json(String),
}

impl NewEvent {
    /// Parses a payload: checks that it is one JSON object, and reads the properties for filters.
    pub fn parse(data: Bytes) -> Result<Self, NotAnEvent> {
        let text = std::str::from_utf8(&data).map_err(|e| NotAnEvent::Utf8(e.valid_up_to()))?;
        let view = AlertView::parse_text(text).map_err(|e| NotAnEvent::Json(e.to_string()))?;
        let owned = |text: Option<std::borrow::Cow<'_, str>>| text.map(std::borrow::Cow::into_owned);
        Ok(Self {
            event_id: Bytes::copy_from_slice(
                Uuid::now_v7().hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes(),
            ),
            own_id: owned(view.id),
            severity: view.severity,
            source: owned(view.source),
            category: owned(view.category),
            tenant: owned(view.tenant),
            is_tenant_of_product: view.is_tenant_of_product,
            traceparent: owned(view.traceparent),
            data,
        })
    }

    /// Returns the category of the payload.
    pub fn category(&self) -> Option<&str> {
        self.category.as_deref()
    }

    /// Returns the tenant.
    pub fn tenant(&self) -> Option<&str> {
        self.tenant.as_deref()
    }

    /// Sets the tenant unless the payload names one. The tenant names of a product do not count.
    pub fn set_tenant(&mut self, tenant: &str) {
        if std::mem::take(&mut self.is_tenant_of_product) {
            self.tenant = None;
        }
        self.tenant.get_or_insert_with(|| tenant.to_owned());
    }

    /// Sets the trace context unless the payload has one.
    pub fn set_traceparent(&mut self, traceparent: &str) {
        self.traceparent.get_or_insert_with(|| traceparent.to_owned());
    }

    /// Converts the event to an entry: `id`, `timestamp`, `data`, and the known properties.
    pub fn into_entry(self, timestamp: &Bytes, idempotency: Option<IdempotencyKey>) -> NewEntry {
        let mut fields = Fields::with_capacity(6);
        let name = |name: &'static str| Bytes::from_static(name.as_bytes());
        fields.push(name(field::ID), self.event_id);
        fields.push(name(field::TIMESTAMP), timestamp.clone());
        fields.push(name(field::DATA), self.data);
        if let Some(severity) = self.severity {
            fields.push(name(field::SEVERITY), severity.as_str());
        }
        let texts = [
            (field::SOURCE, self.source),
            (field::CATEGORY, self.category),
            (field::TENANT, self.tenant),
            (field::TRACEPARENT, self.traceparent),
        ];
        for (field, text) in texts {
            if let Some(text) = text {
                fields.push(name(field), text);
            }
        }
        NewEntry { fields, idempotency }
    }
}

/// Formats a time for entries: RFC 3339, UTC, milliseconds.
pub(super) fn rfc3339(time: Timestamp) -> String {
    format!("{time:.3}")
}

impl NewEntry {
    /// Returns the `timestamp` field for entries that are accepted now.
    pub fn timestamp_now() -> Bytes {
        rfc3339(Timestamp::now()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_becomes_entry_with_unchanged_payload() {
        let data = Bytes::from_static(b"{ \"severity\":\"HIGH\",\"source\":\"zeek\",\n\"x\":1.0 }");
        let event = NewEvent::parse(data.clone()).expect("a JSON object");
        let entry = event.into_entry(&NewEntry::timestamp_now(), None);
        assert_eq!(entry.fields.get(field::DATA), Some(&data));
        assert_eq!(entry.fields.text(field::SEVERITY), Some("high"));
        assert_eq!(entry.fields.text(field::SOURCE), Some("zeek"));
        assert_eq!(entry.fields.get(field::CATEGORY), None);
        let timestamp = entry.fields.text(field::TIMESTAMP).expect("a timestamp");
        assert!(timestamp.ends_with('Z') && timestamp.len() == 24, "{timestamp}");
    }

    #[test]
    fn only_json_objects_are_events() {
        for bad in ["", "[]", "1", "\"x\"", "{", "{}{}", "{\"a\":}", "nul"] {
            assert!(NewEvent::parse(Bytes::from(bad)).is_err(), "{bad:?} was accepted");
        }
        let error = NewEvent::parse(Bytes::from_static(b"{\"a\":\"\xff\"}")).expect_err("invalid UTF-8");
        assert_eq!(error.to_string(), "the event is not UTF-8: byte 6 starts an invalid sequence");
    }

    #[test]
    fn redelivered_entry_is_for_one_group_only() {
        let entry = |pairs: &[(&'static str, &'static str)]| Entry {
            id: EntryId::MIN,
            fields: pairs.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect(),
        };
        let (siem, soar): (GroupName, GroupName) = ("siem".parse().expect("a name"), "soar".parse().expect("a name"));
        let usual = entry(&[("data", "{}")]);
        assert!(usual.is_for(&siem) && usual.is_for(&soar) && !usual.is_for_one_group());
        assert_eq!(usual.replays(), 0);
        let again = entry(&[("data", "{}"), (field::REPLAY_GROUP, "siem"), (field::REPLAY_COUNT, "2")]);
        assert!(again.is_for(&siem) && !again.is_for(&soar) && again.is_for_one_group());
        assert_eq!(again.replays(), 2);
        assert_eq!(entry(&[(field::REPLAY_COUNT, "many")]).replays(), 0);
    }

    #[test]
    fn severity_is_read_from_field_then_payload() {
        let entry = |pairs: &[(&'static str, &'static str)]| Entry {
            id: EntryId::MIN,
            fields: pairs.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect(),
        };
        assert_eq!(entry(&[("severity", "critical"), ("data", "{}")]).severity(), Some(Severity::Critical));
        assert_eq!(entry(&[("severity", "weird"), ("data", r#"{"severity":"low"}"#)]).severity(), Some(Severity::Low));
        assert_eq!(entry(&[("data", "not json")]).severity(), None);
    }
}
