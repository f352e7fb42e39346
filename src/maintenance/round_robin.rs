//! Schedule of the members of a family: members with new entries first, the others in turn.

use std::collections::HashMap;

use crate::event::{EntryId, StreamName};

/// Selects the members of each pass, so that idle members cost a check only now and then.
#[derive(Debug)]
pub(super) struct MemberSchedule {
    newest: HashMap<StreamName, EntryId>,
    /// The number of passes in which each member has its turn once, with or without new entries.
    turns: usize,
    turn: usize,
}

impl MemberSchedule {
    /// Creates a schedule in which each member has its turn once in so many passes, at least 1.
    pub(super) fn new(turns: usize) -> Self {
        Self { newest: HashMap::new(), turns: turns.max(1), turn: 0 }
    }

    /// Returns the members of the next pass. `members` are all members with their newest entries, in a stable order.
    pub(super) fn next(&mut self, members: Vec<(StreamName, EntryId)>) -> Vec<StreamName> {
        self.turn = (self.turn + 1) % self.turns;
        let mut due = Vec::new();
        for (index, (stream, newest)) in members.into_iter().enumerate() {
            let has_new_entries = self.newest.insert(stream.clone(), newest) != Some(newest);
            if has_new_entries || index % self.turns == self.turn {
                due.push(stream);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_due_with_new_entries_and_else_once_per_cycle() {
        let members = |newest: u64| -> Vec<(StreamName, EntryId)> {
            let name = |n: u64| format!("it:t{n}:tasks").parse().expect("a valid name");
            (0..6).map(|n| (name(n), EntryId::new(if n == 5 { newest } else { 1 }, 0))).collect()
        };
        let mut schedule = MemberSchedule::new(3);
        assert_eq!(schedule.next(members(1)).len(), 6, "all are new");
        let mut turns = Vec::new();
        for _ in 0..3 {
            turns.extend(schedule.next(members(1)));
        }
        turns.sort();
        assert_eq!(turns, members(1).into_iter().map(|(stream, _)| stream).collect::<Vec<_>>());
        for newest in 2..5 {
            let last = members(newest).pop().expect("six members").0;
            assert!(schedule.next(members(newest)).contains(&last));
        }
    }
}
