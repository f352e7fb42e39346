//! Families of streams: names with a placeholder for a key, and the names of their members.
//!
//! A key fills one whole part of a name, between colons, and has no colon, brace or tilde. So no key forms the name of
//! a stream outside of the family, a hash tag, or the name of the key index.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::name::{InvalidName, StreamName};

/// Maximum length of a key, in bytes.
const MAX_KEY_BYTES: usize = 64;
/// Takes the place of the key in the name of the key index. It is not a valid key.
const KEY_INDEX: &str = "~keys";
/// Takes the place of the key to check the rest of a name.
const ANY_KEY: &str = "k";

/// A name with one placeholder, such as `aurora:tenant:{tenant}:alerts`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Family(Arc<FamilyParts>);

#[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
struct FamilyParts {
    name: Box<str>,
    before: Box<str>,
    placeholder: Box<str>,
    after: Box<str>,
}

/// The reason why a text is not a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// The text is empty.
    #[error("a key must not be empty")]
    Empty,
    /// It is longer than 64 bytes, or the name with it is too long.
    #[error("a key must have at most {MAX_KEY_BYTES} bytes, and the name with it must have at most 200")]
    TooLong,
    /// The text has a character that is not allowed in names.
    #[error("a key must have letters, digits and `_.-` only, not {0:?}")]
    Character(char),
}

/// The reason why a text is neither a name nor a family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// It has no placeholder and is not a name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Its placeholder does not fill a part, or it has several.
    #[error(
        "a family must have one placeholder, which fills a part after the first colon, such as `aurora:tenant:{{tenant}}:alerts`"
    )]
    Placeholder,
    /// It leaves too little room for keys.
    #[error("the name of a family must leave room for keys of {MAX_KEY_BYTES} bytes: a name has at most 200 bytes")]
    TooLong,
}

fn check_key(key: &str) -> Result<(), InvalidKey> {
    if key.is_empty() {
        return Err(InvalidKey::Empty);
    }
    if key.len() > MAX_KEY_BYTES {
        return Err(InvalidKey::TooLong);
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    key.chars().find(|c| !is_allowed(*c)).map_or(Ok(()), |c| Err(InvalidKey::Character(c)))
}

impl Family {
    /// Returns the declared name with the placeholder.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the placeholder, such as `tenant`.
    pub fn placeholder(&self) -> &str {
        &self.0.placeholder
    }

    /// Returns the key of a member, or `None` if the stream is not a member.
    pub fn key_of<'a>(&self, stream: &'a StreamName) -> Option<&'a str> {
        let key = stream.as_str().strip_prefix(&*self.0.before)?.strip_suffix(&*self.0.after)?;
        check_key(key).is_ok().then_some(key)
    }

    /// Returns the member with this key.
    pub fn member(&self, key: &str) -> Result<StreamName, InvalidKey> {
        check_key(key)?;
        self.with(key).parse().map_err(|_too_long: InvalidName| InvalidKey::TooLong)
    }

    /// Returns the name of the key index, the stream from which every instance reads the keys of the family.
    pub fn key_index(&self) -> StreamName {
        self.with(KEY_INDEX).parse().expect("the name of a family was checked with the longest key")
    }

    /// Returns the default family for the dead letters of members.
    #[must_use]
    pub fn default_dead_letter(&self) -> Self {
        let after = format!("{}:dead_letter", self.0.after);
        Self::of(&self.0.before, &self.0.placeholder, &after)
    }

    /// Returns whether the longest key fits, as with every declared family.
    pub fn has_room_for_keys(&self) -> bool {
        self.with(&ANY_KEY.repeat(MAX_KEY_BYTES)).parse::<StreamName>().is_ok()
    }

    fn with(&self, key: &str) -> String {
        format!("{}{key}{}", self.0.before, self.0.after)
    }

    fn of(before: &str, placeholder: &str, after: &str) -> Self {
        let name = format!("{before}{{{placeholder}}}{after}").into();
        Self(Arc::new(FamilyParts {
            name,
            before: before.into(),
            placeholder: placeholder.into(),
            after: after.into(),
        }))
    }
}

impl FromStr for Family {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let (before, rest) = text.split_once('{').ok_or(InvalidPattern::Placeholder)?;
        let (placeholder, after) = rest.split_once('}').ok_or(InvalidPattern::Placeholder)?;
        let is_part = before.len() > 1 && before.ends_with(':') && (after.is_empty() || after.starts_with(':'));
        if !is_part || check_key(placeholder).is_err() {
            return Err(InvalidPattern::Placeholder);
        }
        let family = Self::of(before, placeholder, after);
        if family.with(ANY_KEY).contains(['{', '}']) {
            return Err(InvalidPattern::Placeholder);
        }
        family.with(ANY_KEY).parse::<StreamName>()?;
        if family.has_room_for_keys() { Ok(family) } else { Err(InvalidPattern::TooLong) }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.name(), f)
    }
}

/// The declared name of one stream, or of a family of streams.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub enum StreamPattern {
    /// One stream.
    One(StreamName),
    /// A family. Its members are created at their first use.
    Family(Family),
}

impl StreamPattern {
    /// Returns the declared text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::One(stream) => stream.as_str(),
            Self::Family(family) => family.name(),
        }
    }

    /// Returns the stream, if it is one.
    pub fn stream(&self) -> Option<&StreamName> {
        match self {
            Self::One(stream) => Some(stream),
            Self::Family(_) => None,
        }
    }

    /// Returns the family, if it is one.
    pub fn family(&self) -> Option<&Family> {
        match self {
            Self::One(_) => None,
            Self::Family(family) => Some(family),
        }
    }

    /// Returns the stream for a key. Without a placeholder it is always the same stream.
    pub fn of_key(&self, key: &str) -> Result<StreamName, InvalidKey> {
        match self {
            Self::One(stream) => Ok(stream.clone()),
            Self::Family(family) => family.member(key),
        }
    }

    /// Returns whether both have a name in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        let parts = |pattern: &Self| pattern.as_str().split(':').map(str::to_owned).collect::<Vec<_>>();
        let is_any = |part: &str| part.starts_with('{');
        let fits = |a: &str, b: &str| a == b || is_any(a) && (is_any(b) || check_key(b).is_ok());
        let (ours, theirs) = (parts(self), parts(other));
        ours.len() == theirs.len() && ours.iter().zip(&theirs).all(|(a, b)| fits(a, b) || fits(b, a))
    }
}

impl From<StreamName> for StreamPattern {
    fn from(stream: StreamName) -> Self {
        Self::One(stream)
    }
}

impl FromStr for StreamPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        if text.contains(['{', '}']) { text.parse().map(Self::Family) } else { Ok(Self::One(text.parse()?)) }
    }
}

impl TryFrom<String> for StreamPattern {
    type Error = InvalidPattern;

    fn try_from(text: String) -> Result<Self, InvalidPattern> {
        text.parse()
    }
}

impl From<StreamPattern> for String {
    fn from(pattern: StreamPattern) -> Self {
        pattern.as_str().to_owned()
    }
}

impl fmt::Display for StreamPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn family(name: &str) -> Family {
        name.parse().expect("a family")
    }

    fn pattern(name: &str) -> StreamPattern {
        name.parse().expect("a pattern")
    }

    #[test]
    fn family_names_and_recognizes_its_members() {
        let family = family("aurora:tenant:{tenant}:alerts");
        assert_eq!((family.placeholder(), family.name()), ("tenant", "aurora:tenant:{tenant}:alerts"));
        let member = family.member("acme-1.eu").expect("a key");
        assert_eq!(member.as_str(), "aurora:tenant:acme-1.eu:alerts");
        assert_eq!(family.key_of(&member), Some("acme-1.eu"));
        for other in ["aurora:tenant:a:b:alerts", "aurora:tenant::alerts", "aurora:tenant:acme:audit", "aurora:alerts"]
        {
            assert_eq!(family.key_of(&other.parse().expect("a name")), None, "{other}");
        }
        assert_eq!(family.key_of(&family.key_index()), None, "{}", family.key_index());
        assert_eq!(family.default_dead_letter().name(), "aurora:tenant:{tenant}:alerts:dead_letter");
    }

    #[test]
    fn placeholder_is_one_whole_part() {
        for text in
            ["{a}", "a{b}", "a:b{c}", "a:{b}c", "a:{b}:{c}", "a:{}", "a:{b", "a:b}", "a:{b:c}", "a:{b}}", ":{a}"]
        {
            assert!(text.parse::<StreamPattern>().is_err(), "{text} was accepted");
        }
        assert!("a:{b}".parse::<Family>().is_ok() && "a:{b}:c".parse::<StreamPattern>().is_ok());
        assert!("a b:{c}".parse::<Family>().is_err());
        let long = |bytes: usize| format!("{}:{{c}}", "a".repeat(bytes)).parse::<Family>();
        assert!(long(135).is_ok_and(|family| family.member(&"k".repeat(64)).is_ok()));
        assert_eq!(long(136), Err(InvalidPattern::TooLong));
    }

    #[test]
    fn overlapping_patterns_are_found() {
        let both = [
            ("a:{k}:b", "a:{x}:b", true),
            ("a:{k}:b", "a:c:b", true),
            ("a:{k}:b", "a:c:d", false),
            ("a:{k}", "a:b:c", false),
            ("a:{k}:b", "a:c:{x}", true),
            ("a:{k}:b", "a:~keys:b", false),
            ("a:b", "a:b", true),
        ];
        for (a, b, expected) in both {
            assert_eq!(pattern(a).overlaps(&pattern(b)), expected, "{a} {b}");
            assert_eq!(pattern(b).overlaps(&pattern(a)), expected, "{b} {a}");
        }
    }

    proptest! {
        /// No key forms a name outside of its family, or a hash tag.
        #[test]
        fn keys_stay_within_their_family(key in "\\PC{0,80}|[a-z:{}~/%]{0,12}") {
            let family = family("aurora:tenant:{tenant}:alerts");
            if let Ok(member) = family.member(&key) {
                prop_assert_eq!(family.key_of(&member), Some(key.as_str()));
                let is_plain = !member.as_str().contains(['{', '}', '~']);
                prop_assert!(is_plain, "{}", member);
                prop_assert_eq!(member.as_str().split(':').count(), 4);
                prop_assert!(member != family.key_index());
            }
        }
    }
}
