//! Entries as the store keeps them, events as publishers bring them, deliveries as workers hold them.

use std::fmt;
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use uuid::Uuid;

use super::{AlertView, EntryId, GroupName, Severity};

/// The names of the fields that the bus itself reads or writes. Any other field is passed on untouched.
pub mod field {
    /// The event's own id (UUID text), as opposed to the entry id that the store gives.
    pub const ID: &str = "id";
    /// When the event was accepted, RFC 3339. Other producers may leave out the zone: read it as UTC.
    pub const TIMESTAMP: &str = "timestamp";
    /// The payload: JSON text, passed on byte for byte.
    pub const DATA: &str = "data";
    /// `critical`, `high`, `medium`, `low` or `info`.
    pub const SEVERITY: &str = "severity";
    /// What raised the alert, such as `suricata`.
    pub const SOURCE: &str = "source";
    /// `cps`, `network`, `endpoint`, `identity`, `cloud`, or another word.
    pub const CATEGORY: &str = "category";
    /// Whose event it is, where several tenants share a stream.
    pub const TENANT: &str = "tenant";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// The one group that an entry appended again is for; every other group, and the relay, pass over it.
    pub const REPLAY_GROUP: &str = "replay.group";
    /// The id that an entry appended again had when it was first stored in this stream.
    pub const REPLAY_OF: &str = "replay.of";
    /// How many times it was replayed from the dead letters.
    pub const REPLAY_COUNT: &str = "replay.count";
    /// How many deliveries it had before it was appended again for a consumer outside the daemon.
    pub const REPLAY_ATTEMPTS: &str = "replay.attempts";
}

/// The fields of an entry: names and values as bytes, in order, duplicates kept.
///
/// Producers in several languages write to the same streams, so nothing is assumed of names or values here.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Fields(Vec<(Bytes, Bytes)>);

impl Fields {
    /// No fields, with room for `capacity`.
    pub fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    /// Adds a field at the end.
    pub fn push(&mut self, name: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    /// The value of the first field of that name.
    pub fn get(&self, name: &str) -> Option<&Bytes> {
        self.0.iter().find(|(n, _)| n.as_ref() == name.as_bytes()).map(|(_, value)| value)
    }

    /// The value of the first field of that name, if it is UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok())
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Bytes, &Bytes)> + ExactSizeIterator {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// How many fields there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes of all names and values together.
    pub fn size_bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

impl FromIterator<(Bytes, Bytes)> for Fields {
    fn from_iter<I: IntoIterator<Item = (Bytes, Bytes)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// Names and sizes only: payloads don't belong in logs.
impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), value.len())))
            .finish()
    }
}

/// One stored entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands in its stream.
    pub id: EntryId,
    /// What its producer wrote.
    pub fields: Fields,
}

impl Entry {
    /// The payload, if the entry has one.
    pub fn data(&self) -> Option<&Bytes> {
        self.fields.get(field::DATA)
    }

    /// How severe the alert is: by its own field where a producer wrote a known word there, else by its payload.
    pub fn severity(&self) -> Option<Severity> {
        let named = self.fields.text(field::SEVERITY).and_then(|text| text.parse().ok());
        named.or_else(|| self.data().and_then(|data| AlertView::parse(data).ok()).and_then(|view| view.severity))
    }

    /// Whether it was appended again for one group alone: no other group, and no dashboard, is to see it.
    pub fn is_for_one_group(&self) -> bool {
        self.fields.get(field::REPLAY_GROUP).is_some()
    }

    /// Whether the group is to handle it: it is for every group, or for this one.
    pub fn is_for(&self, group: &GroupName) -> bool {
        self.fields.get(field::REPLAY_GROUP).is_none_or(|only| only.as_ref() == group.as_str().as_bytes())
    }

    /// The fields with which it is appended again for one group alone, after so many deliveries under all its ids.
    pub fn handed_on(&self, group: &GroupName, deliveries: u32) -> Fields {
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

    /// The id under which it has its effect: that of its first life where it was appended again.
    pub fn first_id(&self) -> EntryId {
        self.fields.text(field::REPLAY_OF).and_then(|id| id.parse().ok()).unwrap_or(self.id)
    }

    /// How many times it was replayed from the dead letters.
    pub fn replays(&self) -> u32 {
        self.fields.text(field::REPLAY_COUNT).and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

/// An entry in the hands of a consumer: pending in the store until it is settled.
#[derive(Debug)]
pub struct Delivery {
    /// The entry.
    pub entry: Entry,
    /// How many times the store has delivered it, this time included: 1 at first.
    pub attempt: u32,
    /// When it was delivered, by this process's monotonic clock.
    pub delivered_at: Instant,
}

/// A publisher's own name for an event: within `window` a second append with the same key returns the first entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// 1 to 256 bytes of UTF-8; the bus's own begin with a byte that no text has, and may be a little longer.
    pub key: Bytes,
    /// How long the key is remembered.
    pub window: Duration,
}

/// What is appended to a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// The fields to store, `id` among them where the event has one.
    pub fields: Fields,
    /// Refuses a second entry with the same key.
    pub idempotency: Option<IdempotencyKey>,
}

/// An event as a publisher brings it: a JSON object, and what the bus read in it.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// The event's id (UUID v7 text), given by the bus.
    pub event_id: Bytes,
    /// The payload as it came, byte for byte.
    pub data: Bytes,
    /// The payload's own `id`, if it has one.
    pub own_id: Option<String>,
    severity: Option<Severity>,
    source: Option<String>,
    category: Option<String>,
    tenant: Option<String>,
    is_tenant_of_product: bool,
    traceparent: Option<String>,
}

/// Why a payload is no event.
#[derive(Debug, thiserror::Error)]
pub enum NotAnEvent {
    /// The bytes are not UTF-8.
    #[error("the event is not UTF-8: byte {0} starts an invalid sequence")]
    Utf8(usize),
    /// The text is not JSON, or not one object.
    #[error("the event is not one JSON object: {0}")]
    Json(String),
}

impl NewEvent {
    /// Takes a payload: checks that it is one JSON object and reads what filters need, once.
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

    /// The payload's category, if it names one.
    pub fn category(&self) -> Option<&str> {
        self.category.as_deref()
    }

    /// Whose event it is, if it says so.
    pub fn tenant(&self) -> Option<&str> {
        self.tenant.as_deref()
    }

    /// Whose event it is, where the payload does not say so itself. What a product calls its own tenants says nothing of
    /// the bus's.
    pub fn set_tenant(&mut self, tenant: &str) {
        if std::mem::take(&mut self.is_tenant_of_product) {
            self.tenant = None;
        }
        self.tenant.get_or_insert_with(|| tenant.to_owned());
    }

    /// The trace the event belongs to, where the payload does not say so itself.
    pub fn set_traceparent(&mut self, traceparent: &str) {
        self.traceparent.get_or_insert_with(|| traceparent.to_owned());
    }

    /// The entry to store: `id`, `timestamp`, `data`, and what is known of severity, source, category, tenant and trace.
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

/// The present time as the bus writes it into entries: RFC 3339, UTC, milliseconds.
pub(super) fn rfc3339(time: Timestamp) -> String {
    format!("{time:.3}")
}

impl NewEntry {
    /// The `timestamp` field for entries accepted now.
    pub fn timestamp_now() -> Bytes {
        rfc3339(Timestamp::now()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_becomes_an_entry_with_its_payload_byte_for_byte() {
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
    fn what_is_no_object_is_no_event() {
        for bad in ["", "[]", "1", "\"x\"", "{", "{}{}", "{\"a\":}", "nul"] {
            assert!(NewEvent::parse(Bytes::from(bad)).is_err(), "{bad:?} was accepted");
        }
        let error = NewEvent::parse(Bytes::from_static(b"{\"a\":\"\xff\"}")).expect_err("invalid UTF-8");
        assert_eq!(error.to_string(), "the event is not UTF-8: byte 6 starts an invalid sequence");
    }

    #[test]
    fn an_entry_appended_again_for_one_group_is_for_no_other() {
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
    fn severity_comes_from_the_field_or_else_from_the_payload() {
        let entry = |pairs: &[(&'static str, &'static str)]| Entry {
            id: EntryId::MIN,
            fields: pairs.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect(),
        };
        assert_eq!(entry(&[("severity", "critical"), ("data", "{}")]).severity(), Some(Severity::Critical));
        assert_eq!(entry(&[("severity", "weird"), ("data", r#"{"severity":"low"}"#)]).severity(), Some(Severity::Low));
        assert_eq!(entry(&[("data", "not json")]).severity(), None);
    }
}
