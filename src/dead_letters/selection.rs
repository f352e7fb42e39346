//! Selection of dead letters.

use std::fmt;
use std::str::FromStr;

use crate::event::{DeadLetter, DeadLetterReason, Entry, EntryId, Filter, GroupName, StreamName};

/// The reason of entries that the bus did not write into a stream of dead letters.
pub const FOREIGN: &str = "foreign";

/// The dead letters that a name stands for.
#[derive(Debug, Clone)]
pub struct DeadLetterScope {
    /// The stream that holds them.
    pub dead_letter: StreamName,
    /// Limits the scope to dead letters of this stream. Several streams may share one stream of dead letters.
    pub of: Option<StreamName>,
    /// Whether foreign entries are in scope. Nobody knows which stream they belong to.
    pub has_foreign: bool,
    /// Limits the scope to entries that the principal may see, replay and discard.
    pub visible: Filter,
}

/// A filter of a request, with its text for the audit entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestedFilter {
    /// The filter as requested.
    pub text: String,
    /// The same, compiled.
    pub filter: Filter,
}

/// An entry in a stream of dead letters.
#[derive(Debug)]
pub struct DeadLetterEntry {
    /// The entry.
    pub entry: Entry,
    /// Its dead letter. `None` if the bus did not write the entry.
    pub dead_letter: Option<DeadLetter>,
}

impl DeadLetterEntry {
    pub(super) fn new(entry: Entry) -> Self {
        Self { dead_letter: DeadLetter::from_entry(&entry), entry }
    }

    /// Returns the reason in one word.
    pub(super) fn reason(&self) -> &'static str {
        self.dead_letter.as_ref().map_or(FOREIGN, |dead_letter| dead_letter.reason.as_str())
    }

    /// Returns whether the entry passes, judged by the fields that it had before it became a dead letter.
    fn passes(&self, filter: &Filter) -> bool {
        match &self.dead_letter {
            _ if filter.is_empty() => true,
            Some(dead_letter) => filter.passes(&Entry { id: dead_letter.id, fields: dead_letter.fields.clone() }),
            None => filter.passes(&self.entry),
        }
    }
}

/// A condition on the reason of dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasonFilter {
    /// The bus wrote them for this reason.
    Recorded(DeadLetterReason),
    /// The bus did not write them.
    Foreign,
}

impl ReasonFilter {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Recorded(reason) => reason.as_str(),
            Self::Foreign => FOREIGN,
        }
    }
}

impl fmt::Display for ReasonFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ReasonFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == FOREIGN {
            return Ok(Self::Foreign);
        }
        text.parse().map(Self::Recorded).map_err(|()| {
            let known = DeadLetterReason::ALL.map(DeadLetterReason::as_str).join(", ");
            format!("must be one of {known}, {FOREIGN}, not `{text}`")
        })
    }
}

/// Conditions on the dead letters of a scope. All of them must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// The group that gave them up.
    pub group: Option<GroupName>,
    /// The reason.
    pub reason: Option<ReasonFilter>,
    /// They follow this entry of the stream of dead letters.
    pub after: EntryId,
    /// The original entry passes this filter.
    pub filter: Option<RequestedFilter>,
    /// They have one of these ids in the stream of dead letters. Ascending and without duplicates.
    pub ids: Option<Vec<EntryId>>,
}

impl Selection {
    /// Returns whether there is no condition.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether a dead letter meets all conditions except `ids`.
    pub fn matches(&self, scope: &DeadLetterScope, found: &DeadLetterEntry) -> bool {
        let is_selected = || self.filter.as_ref().is_none_or(|requested| found.passes(&requested.filter));
        if found.entry.id <= self.after || !found.passes(&scope.visible) || !is_selected() {
            return false;
        }
        match &found.dead_letter {
            Some(dead_letter) => {
                scope.of.as_ref().is_none_or(|stream| *stream == dead_letter.stream)
                    && self.group.as_ref().is_none_or(|group| *group == dead_letter.group)
                    && self.reason.is_none_or(|reason| reason == ReasonFilter::Recorded(dead_letter.reason))
            }
            None => {
                scope.has_foreign
                    && self.group.is_none()
                    && self.reason.is_none_or(|reason| reason == ReasonFilter::Foreign)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::event::{Attribute, Fields};

    fn dead_letter(stream: &str, group: &str, reason: DeadLetterReason) -> DeadLetterEntry {
        let dead_letter = DeadLetter {
            stream: stream.parse().expect("a name"),
            id: EntryId::new(1, 0),
            group: group.parse().expect("a name"),
            reason,
            error: String::new(),
            attempts: 1,
            first_failure: Timestamp::UNIX_EPOCH,
            last_failure: Timestamp::UNIX_EPOCH,
            replays: 0,
            fields: Fields::default(),
        };
        DeadLetterEntry::new(Entry { id: EntryId::new(5, 0), fields: dead_letter.to_fields() })
    }

    fn foreign() -> DeadLetterEntry {
        let fields = [("x".into(), "y".into())].into_iter().collect();
        DeadLetterEntry::new(Entry { id: EntryId::new(5, 0), fields })
    }

    fn scope(of: Option<&str>, has_foreign: bool) -> DeadLetterScope {
        DeadLetterScope {
            dead_letter: "dead".parse().expect("a name"),
            of: of.map(|of| of.parse().expect("a name")),
            has_foreign,
            visible: Filter::default(),
        }
    }

    #[test]
    fn invisible_dead_letters_do_not_match() {
        let fields = [("tenant".into(), "acme".into())].into_iter().collect();
        let acme = DeadLetterEntry::new(Entry { id: EntryId::new(5, 0), fields });
        let scope = DeadLetterScope { visible: Filter::is(Attribute::Tenant, "acme"), ..scope(None, true) };
        let all = Selection::default();
        assert!(all.matches(&scope, &acme));
        assert!(!all.matches(&scope, &foreign()));
        assert!(!all.matches(&scope, &dead_letter("a", "g", DeadLetterReason::Crashed)));
    }

    #[test]
    fn every_condition_must_hold() {
        use DeadLetterReason::{Exhausted, Rejected};
        let all = Selection::default();
        let siem = Selection { group: Some("siem".parse().expect("a name")), ..Selection::default() };
        let rejected = Selection { reason: Some(ReasonFilter::Recorded(Rejected)), ..Selection::default() };
        let later = Selection { after: EntryId::new(5, 0), ..Selection::default() };
        let any = scope(None, true);
        assert!(all.matches(&any, &dead_letter("a", "siem", Rejected)) && all.matches(&any, &foreign()));
        assert!(siem.matches(&any, &dead_letter("a", "siem", Rejected)));
        assert!(!siem.matches(&any, &dead_letter("a", "soar", Rejected)));
        assert!(rejected.matches(&any, &dead_letter("a", "siem", Rejected)));
        assert!(!rejected.matches(&any, &dead_letter("a", "siem", Exhausted)));
        assert!(!later.matches(&any, &dead_letter("a", "siem", Rejected)));
        assert!(!siem.matches(&any, &foreign()) && !rejected.matches(&any, &foreign()));
        let only_foreign = Selection { reason: Some(ReasonFilter::Foreign), ..Selection::default() };
        assert!(only_foreign.matches(&any, &foreign()));
        assert!(!only_foreign.matches(&any, &dead_letter("a", "siem", Rejected)));
    }

    #[test]
    fn stream_with_shared_dead_letters_sees_only_its_own() {
        let all = Selection::default();
        let shared = scope(Some("a"), false);
        assert!(all.matches(&shared, &dead_letter("a", "g", DeadLetterReason::Crashed)));
        assert!(!all.matches(&shared, &dead_letter("b", "g", DeadLetterReason::Crashed)));
        assert!(!all.matches(&shared, &foreign()), "its stream is unknown");
    }

    #[test]
    fn reasons_have_the_words_of_records_and_metrics() {
        for word in ["rejected", "exhausted", "crashed", "undecodable", "foreign"] {
            assert_eq!(word.parse::<ReasonFilter>().map(|reason| reason.to_string()), Ok(word.to_owned()));
        }
        assert!("broken".parse::<ReasonFilter>().is_err());
    }
}
