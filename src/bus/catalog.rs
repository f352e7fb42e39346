//! What is declared: streams and families of them, and what holds for each.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::event::{Family, GroupName, StreamName, StreamPattern};
use crate::store::{Consumption, Durability, Families};

/// The declared streams and families.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    streams: BTreeMap<StreamName, Terms>,
    families: Families,
    /// By the family's name.
    of_families: BTreeMap<String, Terms>,
}

/// What holds for a stream, or for every member of a family.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Where dead letters go.
    pub dead_letter: StreamPattern,
    /// How durable an event is at least when it is accepted.
    pub durability: Durability,
    /// The groups that are declared, and who settles their entries.
    pub groups: BTreeMap<GroupName, Consumption>,
    /// How long a group that is not declared may be silent before it counts as abandoned, if ever.
    pub abandoned_after: Option<Duration>,
}

impl Terms {
    /// Those of a stream without groups.
    pub fn new(dead_letter: impl Into<StreamPattern>) -> Self {
        let durability = Durability::default();
        Self { dead_letter: dead_letter.into(), durability, groups: BTreeMap::new(), abandoned_after: None }
    }
}

impl Catalogue {
    /// From what is declared; `families` knows the members of those that are families.
    pub fn new(families: Families, declared: impl IntoIterator<Item = (StreamPattern, Terms)>) -> Self {
        let mut catalogue = Self { families, ..Self::default() };
        for (pattern, terms) in declared {
            match pattern {
                StreamPattern::One(stream) => drop(catalogue.streams.insert(stream, terms)),
                StreamPattern::Family(family) => {
                    drop(catalogue.of_families.insert(family.name().to_owned(), terms));
                }
            }
        }
        catalogue
    }

    fn terms(&self, stream: &StreamName) -> Option<&Terms> {
        let of_family = || self.of_families.get(self.families.of(stream)?.family().name());
        self.streams.get(stream).or_else(of_family)
    }

    /// How durable an event of this stream is at least when it is accepted.
    pub fn durability(&self, stream: &StreamName) -> Durability {
        self.terms(stream).map(|terms| terms.durability).unwrap_or_default()
    }

    /// How long a group of that stream that is not declared may be silent before it counts as abandoned, if ever.
    pub fn abandoned_after(&self, stream: &StreamName) -> Option<Duration> {
        self.terms(stream)?.abandoned_after
    }

    /// Who settles a group's entries, if the group is declared.
    pub fn consumption(&self, stream: &StreamName, group: &GroupName) -> Option<Consumption> {
        self.terms(stream)?.groups.get(group).copied()
    }

    /// The declared families.
    pub fn families(&self) -> &Families {
        &self.families
    }

    /// What binds a member of a family, or the stream of its dead letters, to a key: the family's placeholder, and the key.
    pub fn binding<'a>(&'a self, stream: &'a StreamName) -> Option<(&'a str, &'a str)> {
        let of = |family: &'a Family| Some((family.placeholder(), family.key_of(stream)?));
        let member = self.families.of(stream).and_then(|roster| of(roster.family()));
        member.or_else(|| self.of_families.values().find_map(|terms| of(terms.dead_letter.family()?)))
    }

    /// The declared streams, by name, without families.
    pub fn streams(&self) -> impl Iterator<Item = &StreamName> {
        self.streams.keys()
    }

    /// What is declared: the names of streams and of families.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.streams.keys().map(StreamName::as_str).chain(self.families.iter().map(|roster| roster.family().name()))
    }

    /// Whether the stream is declared, or can be of a declared family, so that it may be published to.
    pub fn contains(&self, stream: &StreamName) -> bool {
        self.streams.contains_key(stream) || self.families.of(stream).is_some()
    }

    /// Whether the stream may be read: it is declared, or holds the dead letters of one that is.
    pub fn is_readable(&self, stream: &StreamName) -> bool {
        let holds = |terms: &Terms| match &terms.dead_letter {
            StreamPattern::One(one) => one == stream,
            StreamPattern::Family(family) => family.key_of(stream).is_some(),
        };
        self.contains(stream) || self.streams.values().chain(self.of_families.values()).any(holds)
    }
}
