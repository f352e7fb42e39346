//! Going round the members of a family: those with news first, the others in turn.

use std::collections::HashMap;
use std::sync::Arc;

use crate::delivery::GroupConfig;
use crate::event::{EntryId, StreamName};
use crate::maintenance::retention::{Retention, StreamSpec};
use crate::store::Roster;

/// In how many rounds each member has its turn once, whether there is news of it or not.
const TURNS: usize = 12;

/// A declared family: what its members keep, and the groups that they keep it for.
#[derive(Debug, Clone)]
pub struct FamilySpec {
    /// The family and its members.
    pub roster: Arc<Roster>,
    /// What each member keeps.
    pub retention: Retention,
    /// The groups of each member.
    pub groups: Vec<GroupConfig>,
}

impl FamilySpec {
    /// What members are counted under.
    pub(crate) fn label(&self) -> &str {
        self.roster.family().name()
    }

    /// The declaration of a member.
    pub(crate) fn member(&self, stream: StreamName) -> StreamSpec {
        StreamSpec { name: stream, retention: self.retention, groups: self.groups.clone() }
    }
}

/// Which members are to be looked at next: idle ones cost a look now and then.
#[derive(Debug, Default)]
pub(crate) struct Rounds {
    seen: HashMap<StreamName, EntryId>,
    round: usize,
}

impl Rounds {
    /// The members of the next round.
    pub(crate) fn next(&mut self, spec: &FamilySpec) -> Vec<StreamName> {
        self.round = (self.round + 1) % TURNS;
        let mut due = Vec::new();
        for (place, (stream, newest)) in spec.roster.newest().into_iter().enumerate() {
            let has_news = self.seen.insert(stream.clone(), newest) != Some(newest);
            if has_news || place % TURNS == self.round {
                due.push(stream);
            }
        }
        due
    }
}
