//! Which dead letters are meant.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::event::{DeadLetter, DeadLetterReason, Entry, EntryId, GroupName, StreamName};

/// The reason of entries in a stream of dead letters that are none.
pub const FOREIGN: &str = "foreign";

/// The dead letters that a name stands for.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The stream that holds them.
    pub dead_letter: StreamName,
    /// Only those of this stream; several streams may share one for their dead letters.
    pub of: Option<StreamName>,
    /// Whether entries that someone else wrote there belong to it: nobody can tell which stream they are of.
    pub has_foreign: bool,
    /// What of them whoever asks may see, and so replay and discard.
    pub sight: Sight,
}

/// Which entries someone may see: all of them by default.
#[derive(Clone, Default)]
pub struct Sight(Option<Arc<Passes>>);

type Passes = dyn Fn(&Entry) -> bool + Send + Sync;

impl Sight {
    /// Those for which this is true. A dead letter is asked about as the entry that it was before.
    pub fn only(passes: impl Fn(&Entry) -> bool + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(passes)))
    }

    fn sees(&self, found: &Found) -> bool {
        let Some(passes) = &self.0 else { return true };
        match &found.letter {
            Some(letter) => passes(&Entry { id: letter.id, fields: letter.fields.clone() }),
            None => passes(&found.entry),
        }
    }
}

impl fmt::Debug for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Sight(some)" } else { "Sight(all)" })
    }
}

/// Alerts that a filter lets pass.
#[derive(Debug, Clone)]
pub struct Alerts {
    /// The filter as it was asked for.
    pub filter: String,
    /// What it lets pass.
    pub sight: Sight,
}

/// By what was asked for.
impl PartialEq for Alerts {
    fn eq(&self, other: &Self) -> bool {
        self.filter == other.filter
    }
}

impl Eq for Alerts {}

/// An entry of a stream of dead letters.
#[derive(Debug)]
pub struct Found {
    /// The entry.
    pub entry: Entry,
    /// What it says; nothing where the bus did not write it.
    pub letter: Option<DeadLetter>,
}

impl Found {
    pub(super) fn new(entry: Entry) -> Self {
        Self { letter: DeadLetter::from_entry(&entry), entry }
    }

    /// Why it is there, in one word.
    pub(super) fn reason(&self) -> &'static str {
        self.letter.as_ref().map_or(FOREIGN, |letter| letter.reason.as_str())
    }
}

/// Why entries are among the dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// They died of this.
    Died(DeadLetterReason),
    /// They are no dead letters: someone else wrote them there.
    Foreign,
}

impl Reason {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Died(reason) => reason.as_str(),
            Self::Foreign => FOREIGN,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Reason {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == FOREIGN {
            return Ok(Self::Foreign);
        }
        text.parse().map(Self::Died).map_err(|()| {
            let known = DeadLetterReason::ALL.map(DeadLetterReason::as_str).join(", ");
            format!("must be one of {known}, {FOREIGN}, not `{text}`")
        })
    }
}

/// Which of a scope's dead letters: those that meet every condition that is set.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// This group gave them up.
    pub group: Option<GroupName>,
    /// For this reason.
    pub reason: Option<Reason>,
    /// They died after this entry of the stream of dead letters did.
    pub after: EntryId,
    /// What died is an alert that passes this.
    pub alerts: Option<Alerts>,
    /// These alone, by their ids in the stream of dead letters, ascending and each once.
    pub ids: Option<Vec<EntryId>>,
}

impl Selection {
    /// Whether nothing narrows it.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a dead letter is meant, but for its id.
    pub fn matches(&self, scope: &Scope, found: &Found) -> bool {
        let is_wanted = || self.alerts.as_ref().is_none_or(|alerts| alerts.sight.sees(found));
        if found.entry.id <= self.after || !scope.sight.sees(found) || !is_wanted() {
            return false;
        }
        match &found.letter {
            Some(letter) => {
                scope.of.as_ref().is_none_or(|stream| *stream == letter.stream)
                    && self.group.as_ref().is_none_or(|group| *group == letter.group)
                    && self.reason.is_none_or(|reason| reason == Reason::Died(letter.reason))
            }
            None => {
                scope.has_foreign && self.group.is_none() && self.reason.is_none_or(|reason| reason == Reason::Foreign)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::event::Fields;

    fn letter(stream: &str, group: &str, reason: DeadLetterReason) -> Found {
        let letter = DeadLetter {
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
        Found::new(Entry { id: EntryId::new(5, 0), fields: letter.to_fields() })
    }

    fn foreign() -> Found {
        let fields = [("x".into(), "y".into())].into_iter().collect();
        Found::new(Entry { id: EntryId::new(5, 0), fields })
    }

    fn scope(of: Option<&str>, has_foreign: bool) -> Scope {
        Scope {
            dead_letter: "dead".parse().expect("a name"),
            of: of.map(|of| of.parse().expect("a name")),
            has_foreign,
            sight: Sight::default(),
        }
    }

    #[test]
    fn what_may_not_be_seen_is_not_there() {
        let fields = [("tenant".into(), "acme".into())].into_iter().collect();
        let acme = Found::new(Entry { id: EntryId::new(5, 0), fields });
        let scope =
            Scope { sight: Sight::only(|entry| entry.fields.text("tenant") == Some("acme")), ..scope(None, true) };
        let all = Selection::default();
        assert!(all.matches(&scope, &acme));
        assert!(!all.matches(&scope, &foreign()));
        assert!(!all.matches(&scope, &letter("a", "g", DeadLetterReason::Crashed)));
    }

    #[test]
    fn every_condition_must_hold() {
        use DeadLetterReason::{Exhausted, Rejected};
        let all = Selection::default();
        let siem = Selection { group: Some("siem".parse().expect("a name")), ..Selection::default() };
        let rejected = Selection { reason: Some(Reason::Died(Rejected)), ..Selection::default() };
        let later = Selection { after: EntryId::new(5, 0), ..Selection::default() };
        let any = scope(None, true);
        assert!(all.matches(&any, &letter("a", "siem", Rejected)) && all.matches(&any, &foreign()));
        assert!(siem.matches(&any, &letter("a", "siem", Rejected)));
        assert!(!siem.matches(&any, &letter("a", "soar", Rejected)));
        assert!(rejected.matches(&any, &letter("a", "siem", Rejected)));
        assert!(!rejected.matches(&any, &letter("a", "siem", Exhausted)));
        assert!(!later.matches(&any, &letter("a", "siem", Rejected)));
        assert!(!siem.matches(&any, &foreign()) && !rejected.matches(&any, &foreign()));
        let only_foreign = Selection { reason: Some(Reason::Foreign), ..Selection::default() };
        assert!(only_foreign.matches(&any, &foreign()));
        assert!(!only_foreign.matches(&any, &letter("a", "siem", Rejected)));
    }

    #[test]
    fn a_stream_that_shares_its_dead_letters_is_given_its_own_only() {
        let all = Selection::default();
        let shared = scope(Some("a"), false);
        assert!(all.matches(&shared, &letter("a", "g", DeadLetterReason::Crashed)));
        assert!(!all.matches(&shared, &letter("b", "g", DeadLetterReason::Crashed)));
        assert!(!all.matches(&shared, &foreign()), "nobody can tell whose it is");
    }

    #[test]
    fn reasons_are_the_words_that_records_and_metrics_use() {
        for word in ["rejected", "exhausted", "crashed", "undecodable", "foreign"] {
            assert_eq!(word.parse::<Reason>().map(|reason| reason.to_string()), Ok(word.to_owned()));
        }
        assert!("broken".parse::<Reason>().is_err());
    }
}
