//! Catalog of the declared streams and families with their settings.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::event::{Family, GroupName, StreamName, StreamPattern};
use crate::store::{Consumption, Durability, Families};

/// The declared streams and families.
#[derive(Debug, Clone, Default)]
pub struct StreamCatalog {
    streams: BTreeMap<StreamName, StreamSettings>,
    families: Families,
    /// By the family's name.
    family_settings: BTreeMap<String, StreamSettings>,
}

/// Settings of a stream, or of every member of a family.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    /// The stream for dead letters.
    pub dead_letter: StreamPattern,
    /// The minimum durability of accepted events.
    pub durability: Durability,
    /// The declared groups, each with the consumers that settle its entries.
    pub groups: BTreeMap<GroupName, Consumption>,
    /// The time without activity after which an undeclared group counts as abandoned, if it ever does.
    pub abandoned_after: Option<Duration>,
}

impl StreamSettings {
    /// Creates the settings of a stream without groups.
    pub fn new(dead_letter: impl Into<StreamPattern>) -> Self {
        let durability = Durability::default();
        Self { dead_letter: dead_letter.into(), durability, groups: BTreeMap::new(), abandoned_after: None }
    }
}

impl StreamCatalog {
    /// Creates a catalog. `families` has the members of the declared families.
    pub fn new(families: Families, declared: impl IntoIterator<Item = (StreamPattern, StreamSettings)>) -> Self {
        let mut catalog = Self { families, ..Self::default() };
        for (pattern, settings) in declared {
            match pattern {
                StreamPattern::One(stream) => drop(catalog.streams.insert(stream, settings)),
                StreamPattern::Family(family) => {
                    drop(catalog.family_settings.insert(family.name().to_owned(), settings));
                }
            }
        }
        catalog
    }

    fn settings(&self, stream: &StreamName) -> Option<&StreamSettings> {
        let of_family = || self.family_settings.get(self.families.of(stream)?.family().name());
        self.streams.get(stream).or_else(of_family)
    }

    /// Returns the minimum durability of accepted events of a stream.
    pub fn durability(&self, stream: &StreamName) -> Durability {
        self.settings(stream).map(|settings| settings.durability).unwrap_or_default()
    }

    /// Returns the time after which an idle, undeclared group of the stream counts as abandoned, if it ever does.
    pub fn abandoned_after(&self, stream: &StreamName) -> Option<Duration> {
        self.settings(stream)?.abandoned_after
    }

    /// Returns which consumers settle the entries of a group, or `None` if the group is not declared.
    pub fn consumption(&self, stream: &StreamName, group: &GroupName) -> Option<Consumption> {
        self.settings(stream)?.groups.get(group).copied()
    }

    /// Returns the declared families.
    pub fn families(&self) -> &Families {
        &self.families
    }

    /// Returns the placeholder and the key of a family member or of its dead-letter stream.
    pub fn binding<'a>(&'a self, stream: &'a StreamName) -> Option<(&'a str, &'a str)> {
        let of = |family: &'a Family| Some((family.placeholder(), family.key_of(stream)?));
        let member = self.families.of(stream).and_then(|family_members| of(family_members.family()));
        member.or_else(|| self.family_settings.values().find_map(|settings| of(settings.dead_letter.family()?)))
    }

    /// Returns the declared streams by name, without families.
    pub fn streams(&self) -> impl Iterator<Item = &StreamName> {
        self.streams.keys()
    }

    /// Returns the names of the declared streams and families.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.streams.keys().map(StreamName::as_str).chain(self.families.iter().map(|family_members| family_members.family().name()))
    }

    /// Returns whether the stream is declared or its name belongs to a declared family. Only then it takes events.
    pub fn contains(&self, stream: &StreamName) -> bool {
        self.streams.contains_key(stream) || self.families.of(stream).is_some()
    }

    /// Returns whether the stream may be read: it is declared, or has the dead letters of a declared stream.
    pub fn is_readable(&self, stream: &StreamName) -> bool {
        let has_dead_letters = |settings: &StreamSettings| match &settings.dead_letter {
            StreamPattern::One(one) => one == stream,
            StreamPattern::Family(family) => family.key_of(stream).is_some(),
        };
        self.contains(stream) || self.streams.values().chain(self.family_settings.values()).any(has_dead_letters)
    }
}
