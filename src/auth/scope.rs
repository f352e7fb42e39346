//! Scopes: the permissions of a principal, as texts in tokens and in the configuration.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The possible scopes, for messages.
pub(crate) const KNOWN: &str = "publish:<stream>, read:<stream>, consume:<stream>, ws:<channel>, admin";

/// One permission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Scope {
    /// `publish:<stream>`: append to these streams.
    Publish(NamePattern),
    /// `read:<stream>`: read these streams' entries and state.
    Read(NamePattern),
    /// `consume:<stream>`: the same, and pull from the groups of these streams and settle entries.
    Consume(NamePattern),
    /// `ws:<channel>`: watch these channels, by WebSocket or feed. `-` and `_` are equal here.
    Watch(NamePattern),
    /// `admin`: everything, including dead letters and metrics.
    Admin,
}

/// One name, or all names with a prefix: `aurora:*`, `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern {
    text: Box<str>,
    is_prefix: bool,
}

/// An action that needs a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action<'a> {
    Publish(&'a str),
    Read(&'a str),
    Consume(&'a str),
    Watch(&'a str),
    Administer,
}

impl fmt::Display for Action<'_> {
    /// Writes the scope that the action needs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = |name: &str| name.chars().take(64).collect::<String>();
        match self {
            Self::Publish(stream) => write!(f, "publish:{}", cut(stream)),
            Self::Read(stream) => write!(f, "read:{}", cut(stream)),
            Self::Consume(stream) => write!(f, "consume:{}", cut(stream)),
            Self::Watch(channel) => write!(f, "ws:{}", cut(channel).replace('-', "_")),
            Self::Administer => f.write_str("admin"),
        }
    }
}

impl Scope {
    pub(crate) fn allows(&self, action: Action<'_>) -> bool {
        match (self, action) {
            (Self::Admin, _) => true,
            (Self::Publish(names), Action::Publish(name))
            | (Self::Consume(names), Action::Consume(name))
            | (Self::Read(names) | Self::Consume(names), Action::Read(name)) => names.matches(name),
            (Self::Watch(names), Action::Watch(name)) => names.matches(&name.replace('-', "_")),
            _ => false,
        }
    }
}

impl NamePattern {
    fn matches(&self, name: &str) -> bool {
        if self.is_prefix { name.starts_with(&*self.text) } else { *self.text == *name }
    }
}

/// The text is not a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a scope; allowed are {KNOWN}; a name may end with `*`")]
pub struct UnknownScope(String);

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        let unknown = || UnknownScope(text.chars().take(64).collect());
        if text == "admin" {
            return Ok(Self::Admin);
        }
        let (verb, name) = text.split_once(':').ok_or_else(unknown)?;
        let (front, is_prefix) = name.strip_suffix('*').map_or((name, false), |front| (front, true));
        let is_name = front.chars().all(|c| c.is_ascii_graphic() && c != '*') && (is_prefix || !front.is_empty());
        if !is_name {
            return Err(unknown());
        }
        let names = |front: &str| NamePattern { text: front.into(), is_prefix };
        match verb {
            "publish" => Ok(Self::Publish(names(front))),
            "read" => Ok(Self::Read(names(front))),
            "consume" => Ok(Self::Consume(names(front))),
            "ws" => Ok(Self::Watch(names(&front.replace('-', "_")))),
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for Scope {
    type Error = UnknownScope;

    fn try_from(text: String) -> Result<Self, UnknownScope> {
        text.parse()
    }
}

impl From<Scope> for String {
    fn from(scope: Scope) -> Self {
        scope.to_string()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, names) = match self {
            Self::Publish(names) => ("publish", names),
            Self::Read(names) => ("read", names),
            Self::Consume(names) => ("consume", names),
            Self::Watch(names) => ("ws", names),
            Self::Admin => return f.write_str("admin"),
        };
        write!(f, "{verb}:{}{}", names.text, if names.is_prefix { "*" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allows(scope: &str, action: Action<'_>) -> bool {
        scope.parse::<Scope>().expect(scope).allows(action)
    }

    #[test]
    fn scope_allows_only_the_actions_it_names() {
        use Action::{Administer, Consume, Publish, Read, Watch};
        let actions = [
            Publish("aurora:alerts"),
            Publish("aurora:audit"),
            Read("aurora:alerts"),
            Watch("alerts"),
            Watch("agent-thoughts"),
            Administer,
            Consume("aurora:alerts"),
        ];
        let cases: [(&str, [bool; 7]); 9] = [
            ("publish:aurora:alerts", [true, false, false, false, false, false, false]),
            ("publish:*", [true, true, false, false, false, false, false]),
            ("publish:aurora:al*", [true, false, false, false, false, false, false]),
            ("read:aurora:alerts", [false, false, true, false, false, false, false]),
            ("consume:aurora:*", [false, false, true, false, false, false, true]),
            ("ws:alerts", [false, false, false, true, false, false, false]),
            ("ws:agent_thoughts", [false, false, false, false, true, false, false]),
            ("ws:agent-thoughts", [false, false, false, false, true, false, false]),
            ("admin", [true; 7]),
        ];
        for (scope, expected) in cases {
            assert_eq!(actions.map(|action| allows(scope, action)), expected, "{scope}");
        }
        assert_eq!(Watch("agent-thoughts").to_string(), "ws:agent_thoughts");
    }

    #[test]
    fn malformed_scopes_are_rejected() {
        for text in
            ["", "admin:", "Admin", "publish", "publish:", "publish:a*b", "publish:**", "write:a", "ws:a b", "*"]
        {
            assert!(text.parse::<Scope>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn scope_round_trips_through_text(verb in "publish|read|consume", name in "[a-z:{}.-]{1,20}", star in any::<bool>()) {
            let text = format!("{verb}:{name}{}", if star { "*" } else { "" });
            prop_assert_eq!(text.parse::<Scope>().expect("a scope").to_string(), text);
        }

        #[test]
        fn name_without_star_matches_only_itself(name in "[a-z:]{1,12}", other in "[a-z:]{1,12}") {
            let scope: Scope = format!("read:{name}").parse().expect("a scope");
            prop_assert_eq!(scope.allows(Action::Read(&other)), name == other);
        }
    }
}
