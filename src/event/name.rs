//! Names of streams, groups and consumers, validated at the boundary.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Maximum length of a name, in bytes.
const MAX_BYTES: usize = 200;

/// The reason why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// The text is empty.
    #[error("a name must not be empty")]
    Empty,
    /// The text is longer than 200 bytes.
    #[error("a name must have at most {MAX_BYTES} bytes, not {0}")]
    TooLong(usize),
    /// The text has a character that is not allowed in keys, labels or paths.
    #[error("a name must have letters, digits and `:_.~-` only, not {0:?}")]
    Character(char),
}

fn check(text: &str) -> Result<(), InvalidName> {
    if text.is_empty() {
        return Err(InvalidName::Empty);
    }
    if text.len() > MAX_BYTES {
        return Err(InvalidName::TooLong(text.len()));
    }
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '_' | '.' | '~' | '-');
    match text.chars().find(|c| !is_allowed(*c)) {
        Some(c) => Err(InvalidName::Character(c)),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name! {
    /// The name of a stream, such as `aurora:alerts`. It is also its key in Redis.
    StreamName
}
name! {
    /// The name of a consumer group of a stream, such as `alert-processor`.
    GroupName
}
name! {
    /// The name of one consumer in a group, such as `soc-a-0`.
    ConsumerName
}

impl ConsumerName {
    /// Returns a numbered variant of the name: `soc-a-0~2`.
    #[must_use]
    pub fn numbered(&self, number: u32) -> Self {
        Self(format!("{self}~{number}").into())
    }
}

impl StreamName {
    /// Returns the default stream for dead letters of this stream: `<stream>:dead_letter`, and one shared stream for
    /// the two agent streams of a SOC.
    #[must_use]
    pub fn default_dead_letter(&self) -> Self {
        match self.as_str() {
            "aurora:agent:tasks" | "aurora:agent:results" => Self("aurora:agent:dead_letter".into()),
            other => Self(format!("{other}:dead_letter").into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_names_are_refused() {
        assert!("aurora:cps:alerts".parse::<StreamName>().is_ok());
        assert_eq!("".parse::<StreamName>(), Err(InvalidName::Empty));
        assert_eq!("a b".parse::<GroupName>(), Err(InvalidName::Character(' ')));
        assert_eq!("a{b}".parse::<StreamName>(), Err(InvalidName::Character('{')));
        assert_eq!("x".repeat(201).parse::<ConsumerName>(), Err(InvalidName::TooLong(201)));
    }

    #[test]
    fn agent_streams_share_one_dead_letter_stream() {
        let dead = |name: &str| name.parse::<StreamName>().expect("a valid name").default_dead_letter().to_string();
        assert_eq!(dead("aurora:agent:tasks"), "aurora:agent:dead_letter");
        assert_eq!(dead("aurora:alerts"), "aurora:alerts:dead_letter");
    }
}
