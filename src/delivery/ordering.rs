//! In what order a group's entries may reach its sink.

use std::borrow::Cow;
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::event::{AlertView, Entry, field};

/// What is kept in the order of the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// Nothing: an entry that failed lets others pass.
    #[default]
    None,
    /// Entries with the same key, see [`OrderBy`].
    Key,
    /// All entries: one delivery at a time.
    Stream,
}

/// What becomes of the order when its next entry is given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OnPoison {
    /// The entry goes to the dead letters, and those after it go on.
    #[default]
    DeadLetter,
    /// The group stops there until someone acts.
    Halt,
}

/// Which part of an entry is its key.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum OrderBy {
    /// A field of the entry, such as `source`; `source`, `category` and `tenant` are looked for in the payload where
    /// a producer did not write the field.
    Field(String),
    /// A member of the payload's object, written `data.<name>`.
    Data(String),
}

/// An entry's key, hashed. Two keys with the same hash share a lane, which costs them nothing but speed.
pub(super) type Key = u64;

/// The text names no part of an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be the name of a field, such as source, or data.<name> for a member of the payload, not {0:?}")]
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
    /// The entry's key; nothing where it has none, is empty, or can't be read.
    pub(super) fn key(&self, entry: &Entry) -> Option<Key> {
        match self {
            Self::Field(name) => match entry.fields.get(name) {
                Some(value) => hash(value),
                None => hash(viewed(name, entry.data()?)?.as_bytes()),
            },
            Self::Data(name) => {
                let value = member(entry.data()?, name)?;
                match value.get() {
                    "null" => None,
                    text if text.starts_with('"') => hash(serde_json::from_str::<Text<'_>>(text).ok()?.0.as_bytes()),
                    other => hash(other.as_bytes()),
                }
            }
        }
    }
}

fn hash(key: &[u8]) -> Option<Key> {
    if key.is_empty() {
        return None;
    }
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    Some(hasher.finish())
}

/// What the bus itself would have written into a field of that name.
fn viewed<'a>(name: &str, data: &'a [u8]) -> Option<Cow<'a, str>> {
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

/// The first member of that name of the object in `data`.
fn member<'a>(data: &'a [u8], name: &str) -> Option<&'a RawValue> {
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
    fn a_key_is_a_field_or_a_member_of_the_payload() {
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
    fn a_field_that_a_producer_left_out_is_read_from_the_payload() {
        let written = entry(&[("source", "zeek"), ("data", "{}")]);
        let left_out = entry(&[("data", r#"{"source":"zeek"}"#)]);
        assert_eq!(by("source").key(&written), by("source").key(&left_out));
        assert_eq!(by("source").key(&entry(&[("data", "no json")])), None);
        assert_eq!(by("data.x").key(&entry(&[("data", "[1]")])), None);
        assert_eq!(by("data.x").key(&entry(&[])), None);
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "data", "data."] {
            assert!(OrderBy::try_from(text.to_owned()).is_err(), "{text:?}");
        }
        for text in ["source", "data.a.b", "replay.of"] {
            assert_eq!(by(text).to_string(), text);
        }
    }
}
