//! The order in which the entries of a group may reach its sink.

use std::borrow::Cow;
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::event::{AlertView, Entry, field};

/// The entries that keep the order of the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// None: other entries may pass one that failed.
    #[default]
    None,
    /// Entries with the same ordering key, see [`OrderBy`].
    Key,
    /// All entries: one delivery at a time.
    Stream,
}

/// The reaction of an ordered group when its next entry is given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPoison {
    /// The entry goes to the dead letters, and later entries go on.
    #[default]
    DeadLetter,
    /// The group stops there until an operator acts.
    Halt,
}

/// The part of an entry that is its ordering key.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum OrderBy {
    /// A field of the entry, such as `source`.
    ///
    /// If a producer did not write the fields `source`, `category` or `tenant`, they are read from the payload.
    Field(String),
    /// A property of the payload, written `data.<name>`.
    Data(String),
}

/// The hash of an ordering key. Two keys with the same hash share a queue, which only costs speed.
pub(super) type OrderingHash = u64;

/// A text that does not name a part of an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be the name of a field, such as source, or data.<name> for a property of the payload, not {0:?}")]
pub struct InvalidOrderBy(String);

impl TryFrom<String> for OrderBy {
    type Error = InvalidOrderBy;

    fn try_from(text: String) -> Result<Self, InvalidOrderBy> {
        match text.split_once('.') {
            Some((field::DATA, name)) if !name.is_empty() => Ok(Self::Data(name.to_owned())),
            _ if text.is_empty() || text == field::DATA || text.starts_with("data.") => Err(InvalidOrderBy(text)),
            _ => Ok(Self::Field(text)),
        }
    }
}

impl From<OrderBy> for String {
    fn from(order_by: OrderBy) -> Self {
        order_by.to_string()
    }
}

impl fmt::Display for OrderBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field(name) => f.write_str(name),
            Self::Data(name) => write!(f, "{}.{name}", field::DATA),
        }
    }
}

impl OrderBy {
    /// Returns the key of the entry. Returns `None` if it is missing, empty or not readable.
    pub(super) fn key(&self, entry: &Entry) -> Option<OrderingHash> {
        match self {
            Self::Field(name) => match entry.fields.get(name) {
                Some(value) => hash(value),
                None => hash(payload_field(name, entry.data()?)?.as_bytes()),
            },
            Self::Data(name) => {
                let value = property(entry.data()?, name)?;
                match value.get() {
                    "null" => None,
                    text if text.starts_with('"') => hash(serde_json::from_str::<Text<'_>>(text).ok()?.0.as_bytes()),
                    other => hash(other.as_bytes()),
                }
            }
        }
    }
}

fn hash(key: &[u8]) -> Option<OrderingHash> {
    if key.is_empty() {
        return None;
    }
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    Some(hasher.finish())
}

/// Returns the value that the bus itself would have written into the field.
fn payload_field<'a>(name: &str, data: &'a [u8]) -> Option<Cow<'a, str>> {
    let view = AlertView::parse(data).ok()?;
    match name {
        field::SOURCE => view.source,
        field::CATEGORY => view.category,
        field::TENANT => view.tenant,
        _ => None,
    }
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Returns the first property with this name of the object in `data`.
fn property<'a>(data: &'a [u8], name: &str) -> Option<&'a RawValue> {
    struct Find<'n>(&'n str);

    impl<'de> DeserializeSeed<'de> for Find<'_> {
        type Value = Option<&'de RawValue>;

        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_map(self)
        }
    }

    impl<'de> Visitor<'de> for Find<'_> {
        type Value = Option<&'de RawValue>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = None;
            while let Some(Text(key)) = map.next_key()? {
                if key == self.0 && found.is_none() {
                    found = Some(map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(found)
        }
    }

    Find(name).deserialize(&mut serde_json::Deserializer::from_slice(data)).ok().flatten()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::event::EntryId;

    fn by(text: &str) -> OrderBy {
        OrderBy::try_from(text.to_owned()).unwrap()
    }

    fn entry(fields: &[(&'static str, &'static str)]) -> Entry {
        let fields = fields.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from(*value))).collect();
        Entry { id: EntryId::MIN, fields }
    }

    #[test]
    fn key_is_a_field_or_a_property_of_the_payload() {
        let data = r#"{"a":{"host":"no"},"host":"web\u00312","port":443,"none":null,"empty":"","host":"second"}"#;
        let entry = entry(&[("source", "zeek"), ("data", data)]);
        let hashed = |text: &str| hash(text.as_bytes());
        assert_eq!(by("source").key(&entry), hashed("zeek"));
        assert_eq!(by("data.host").key(&entry), hashed("web12"));
        assert_eq!(by("data.port").key(&entry), hashed("443"));
        for absent in ["tenant", "data.none", "data.empty", "data.nowhere"] {
            assert_eq!(by(absent).key(&entry), None, "{absent}");
        }
    }

    #[test]
    fn missing_field_is_read_from_the_payload() {
        let written = entry(&[("source", "zeek"), ("data", "{}")]);
        let left_out = entry(&[("data", r#"{"source":"zeek"}"#)]);
        assert_eq!(by("source").key(&written), by("source").key(&left_out));
        assert_eq!(by("source").key(&entry(&[("data", "no json")])), None);
        assert_eq!(by("data.x").key(&entry(&[("data", "[1]")])), None);
        assert_eq!(by("data.x").key(&entry(&[])), None);
    }

    #[test]
    fn invalid_order_by_is_rejected() {
        for text in ["", "data", "data."] {
            assert!(OrderBy::try_from(text.to_owned()).is_err(), "{text:?}");
        }
        for text in ["source", "data.a.b", "replay.of"] {
            assert_eq!(by(text).to_string(), text);
        }
    }
}
