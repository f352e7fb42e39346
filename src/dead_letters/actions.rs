//! Replaying and discarding: one, some by id, or all that match, in bounded steps.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::audit::{Action, Deed};
use super::selection::{Found, Scope, Selection};
use super::{DeadLetters, Failure, Inner, store_failure};
use crate::dead_letters::scan::{Cursor, Walk};
use crate::event::{DeadLetter, EntryId, Fields, GroupName, IdempotencyKey, NewEntry, StreamName};
use crate::store::{Order, Range};

/// How many dead letters are taken at a time by their ids.
const IDS_AT_A_TIME: usize = 64;

/// Whom a replay is for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Target {
    /// The group that gave the entry up.
    #[default]
    FailedGroup,
    /// That group of the stream.
    Group(GroupName),
    /// Every group of the stream, and dashboards.
    Stream,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailedGroup => f.write_str("group"),
            Self::Group(group) => write!(f, "group:{group}"),
            Self::Stream => f.write_str("stream"),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "group" => Ok(Self::FailedGroup),
            "stream" => Ok(Self::Stream),
            other => {
                let group = other.strip_prefix("group:").and_then(|group| group.parse().ok());
                group
                    .map(Self::Group)
                    .ok_or_else(|| format!("must be group (the one that failed), group:NAME or stream, not `{other}`"))
            }
        }
    }
}

/// How to replay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Replay {
    /// Whom for.
    pub to: Target,
    /// Also what was replayed as often as is allowed.
    pub force: bool,
}

/// Why a dead letter is not replayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The bus did not write it, so nobody knows where it would go.
    #[error("it is no dead letter of the bus: it can be discarded, not replayed")]
    Foreign,
    /// Its stream is not declared any more.
    #[error("the stream `{0}` that it came from is not declared")]
    Stream(StreamName),
    /// Nobody would handle it.
    #[error("the stream has no group `{0}`: replay to another group (group:NAME) or to the stream")]
    Group(GroupName),
    /// The loop guard.
    #[error("it was replayed {replays} times before, of at most {max} (dead_letters.max_replays): force it if need be")]
    Replays {
        /// How often it was.
        replays: u32,
        /// How often it may be.
        max: u32,
    },
}

impl Refusal {
    /// The reason in one word, for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Foreign => "not_a_dead_letter",
            Self::Stream(_) => "no_such_stream",
            Self::Group(_) => "no_such_group",
            Self::Replays { .. } => "too_many_replays",
        }
    }
}

/// Which dead letters, and how much of the work to do now.
#[derive(Debug, Clone, Default)]
pub struct Bulk {
    /// Which.
    pub selection: Selection,
    /// Where to go on; at the beginning by default.
    pub cursor: Cursor,
    /// The most to do now.
    pub limit: usize,
    /// Whether to count only, and change nothing.
    pub is_dry_run: bool,
}

/// What was done, or would be.
#[derive(Debug, Clone, Default)]
pub struct Done {
    /// How many dead letters were meant.
    pub matched: u64,
    /// How many were replayed or discarded.
    pub done: u64,
    /// How many of those asked for are not there: someone else has dealt with them, or an earlier try whose answer
    /// was lost.
    pub gone: u64,
    /// How many were in the stream already, by an earlier try that was broken off; they are not appended twice.
    pub repeated: u64,
    /// How many were left alone, by [`Refusal::code`].
    pub refused: BTreeMap<&'static str, u64>,
    /// The first refusal in words.
    pub refusal: Option<String>,
    /// How many were meant, by group.
    pub by_group: BTreeMap<String, u64>,
    /// How many were meant, by reason.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// The first one meant.
    pub first_id: Option<EntryId>,
    /// The last one meant.
    pub last_id: Option<EntryId>,
    /// The id that a single replayed dead letter has in its stream now.
    pub new_id: Option<EntryId>,
    /// Whether everything done is in the audit stream.
    pub is_audited: bool,
    /// Where to go on; nothing when all is done.
    pub next: Option<Cursor>,
}

impl Done {
    fn count(&mut self, found: &Found) {
        self.matched += 1;
        let group = found.letter.as_ref().map(|letter| letter.group.to_string());
        *self.by_group.entry(group.unwrap_or_default()).or_default() += 1;
        *self.by_reason.entry(found.reason()).or_default() += 1;
        self.first_id.get_or_insert(found.entry.id);
        self.last_id = Some(found.entry.id);
    }

    /// What came before a failure is told, with where to go on: the failure comes again with the next try. Where nothing
    /// came before, the failure is told at once.
    fn broken_off(mut self, from: EntryId, until: Option<EntryId>, failure: Failure) -> Result<Self, Failure> {
        if self.done + self.repeated == 0 {
            return Err(failure);
        }
        self.next = Some(Cursor { from, until });
        Ok(self)
    }

    fn refuse(&mut self, refusal: &Refusal) {
        *self.refused.entry(refusal.code()).or_default() += 1;
        self.refusal.get_or_insert_with(|| refusal.to_string());
    }
}

/// What to do with each dead letter.
#[derive(Debug, Clone, Copy)]
enum Step<'a> {
    Replay(&'a Replay),
    Discard,
}

impl DeadLetters {
    /// Appends dead letters to their streams once more, and removes them. See [`Done`] for what became of which.
    ///
    /// Safe to repeat after any failure. Cancel-safe: what was begun is completed when it is repeated.
    pub async fn replay(&self, scope: &Scope, bulk: &Bulk, how: &Replay, actor: &str) -> Result<Done, Failure> {
        self.inner.act(scope, bulk, Step::Replay(how), actor).await
    }

    /// Removes dead letters for good. Safe to repeat.
    pub async fn discard(&self, scope: &Scope, bulk: &Bulk, actor: &str) -> Result<Done, Failure> {
        self.inner.act(scope, bulk, Step::Discard, actor).await
    }
}

impl Inner {
    async fn act(&self, scope: &Scope, bulk: &Bulk, step: Step<'_>, actor: &str) -> Result<Done, Failure> {
        let mut done = Done { is_audited: self.audit.is_some() && !bulk.is_dry_run, ..Done::default() };
        let task = Task { scope, bulk, step, actor };
        if let Some(ids) = &bulk.selection.ids {
            let ids: Vec<EntryId> = ids.iter().copied().filter(|id| *id >= bulk.cursor.from).collect();
            for ids in ids.chunks(IDS_AT_A_TIME) {
                if let Err(failure) = self.take_by_ids(&task, ids, &mut done).await {
                    return done.broken_off(ids[0], None, failure);
                }
            }
            return Ok(done);
        }
        let until = match bulk.cursor.until {
            Some(until) => until,
            None => self.store.describe(&scope.dead_letter).await?.map_or(EntryId::MIN, |status| status.last_id),
        };
        let mut walk = Walk::new(Cursor { until: Some(until), ..bulk.cursor }, &bulk.selection);
        while let Some(entries) = walk.next(&*self.store, &scope.dead_letter).await? {
            let begin = entries.first().map_or(EntryId::MIN, |entry| entry.id);
            let mut found: Vec<Found> = entries.into_iter().map(Found::new).collect();
            found.retain(|found| bulk.selection.matches(scope, found));
            let left = bulk.limit.saturating_sub(usize::try_from(done.matched).unwrap_or(usize::MAX));
            let beyond = found.get(left).map(|found| found.entry.id);
            found.truncate(left);
            if let Err(failure) = self.take(&task, &found, &mut done).await {
                return done.broken_off(begin, Some(until), failure);
            }
            if let Some(beyond) = beyond {
                done.next = Some(Cursor { from: beyond, until: Some(until) });
                return Ok(done);
            }
        }
        done.next = walk.rest(Some(until));
        Ok(done)
    }

    async fn take_by_ids(&self, task: &Task<'_>, ids: &[EntryId], done: &mut Done) -> Result<(), Failure> {
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            let range = Range { from: *id, to: *id, order: Order::Forward };
            let entries = self.store.range(&task.scope.dead_letter, range, 1).await?;
            found.extend(entries.into_iter().map(Found::new));
        }
        found.retain(|found| task.bulk.selection.matches(task.scope, found));
        self.take(task, &found, done).await?;
        done.gone += (ids.len() - found.len()) as u64;
        Ok(())
    }

    async fn take(&self, task: &Task<'_>, found: &[Found], done: &mut Done) -> Result<(), Failure> {
        let mut counted = Done { is_audited: done.is_audited, ..Done::default() };
        let mut letters: Vec<(&Found, Option<Resent>)> = Vec::with_capacity(found.len());
        for found in found {
            counted.count(found);
            match task.step {
                Step::Discard => letters.push((found, None)),
                Step::Replay(how) => match self.copy(found.letter.as_ref(), how) {
                    Ok(copy) => letters.push((found, Some(copy))),
                    Err(refusal) => counted.refuse(&refusal),
                },
            }
        }
        if task.bulk.is_dry_run {
            counted.done = letters.len() as u64;
        } else if !letters.is_empty() {
            let about: Vec<&Found> = letters.iter().map(|(found, _)| *found).collect();
            let is_written = self.write_down(&task.action(), &about).await?;
            if !is_written {
                counted.is_audited = false;
            }
            match task.step {
                Step::Discard => self.discard(task.scope, &about, &mut counted).await?,
                Step::Replay(_) => self.replay(task.scope, letters, &mut counted).await?,
            }
        }
        done.add(counted);
        Ok(())
    }

    /// What a replay appends, and where.
    fn copy(&self, letter: Option<&DeadLetter>, how: &Replay) -> Result<Resent, Refusal> {
        let letter = letter.ok_or(Refusal::Foreign)?;
        let source = self.source_of(&letter.stream).map(|(source, _)| source);
        let source = source.ok_or_else(|| Refusal::Stream(letter.stream.clone()))?;
        let group = match &how.to {
            Target::FailedGroup => Some(&letter.group),
            Target::Group(group) => Some(group),
            Target::Stream => None,
        };
        if let Some(group) = group.filter(|group| !source.groups.contains(group)) {
            return Err(Refusal::Group(group.clone()));
        }
        let max = self.config.max_replays;
        if letter.replays >= max && !how.force {
            return Err(Refusal::Replays { replays: letter.replays, max });
        }
        Ok(Resent { stream: letter.stream.clone(), fields: letter.to_replay(group) })
    }

    async fn discard(&self, scope: &Scope, about: &[&Found], done: &mut Done) -> Result<(), Failure> {
        let ids: Vec<EntryId> = about.iter().map(|found| found.entry.id).collect();
        done.done = self.store.discard(&scope.dead_letter, &ids).await?;
        done.gone = (ids.len() as u64).saturating_sub(done.done);
        self.metrics.dead_letters_discarded.with_label_values(&[self.label(&scope.dead_letter)]).inc_by(done.done);
        Ok(())
    }

    /// Appends the copies, then removes the dead letters.
    async fn replay(
        &self,
        scope: &Scope,
        letters: Vec<(&Found, Option<Resent>)>,
        done: &mut Done,
    ) -> Result<(), Failure> {
        let mut by_stream: BTreeMap<StreamName, (Vec<EntryId>, Vec<NewEntry>)> = BTreeMap::new();
        for (found, copy) in letters {
            let Some(Resent { stream, fields }) = copy else { continue };
            let (ids, entries) = by_stream.entry(stream).or_default();
            let idempotency = Some(self.key(&scope.dead_letter, found.entry.id));
            ids.push(found.entry.id);
            entries.push(NewEntry { fields, idempotency });
        }
        for (stream, (ids, entries)) in by_stream {
            let appended = self.bus.append(&stream, entries).await.map_err(store_failure)?;
            self.store.discard(&scope.dead_letter, &ids).await?;
            let repeated = appended.iter().filter(|appended| appended.duplicate).count() as u64;
            let replayed = appended.len() as u64 - repeated;
            done.done += replayed;
            done.repeated += repeated;
            done.new_id = appended.last().map(|appended| appended.id);
            self.metrics.dead_letters_replayed.with_label_values(&[self.label(&scope.dead_letter)]).inc_by(replayed);
        }
        Ok(())
    }

    /// What makes a dead letter's replay the same one when it is repeated. No publisher's key begins so: theirs are
    /// UTF-8.
    fn key(&self, dead_letter: &StreamName, id: EntryId) -> IdempotencyKey {
        let mut key = BytesMut::with_capacity(dead_letter.as_str().len() + 48);
        key.put_u8(0xff);
        key.put_slice(b"dead:");
        key.put_slice(format!("{dead_letter}/{id}").as_bytes());
        IdempotencyKey { key: Bytes::from(key), window: self.config.max_age }
    }
}

impl Done {
    fn add(&mut self, other: Self) {
        self.matched += other.matched;
        self.done += other.done;
        self.gone += other.gone;
        self.repeated += other.repeated;
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        for (group, count) in other.by_group {
            *self.by_group.entry(group).or_default() += count;
        }
        for (reason, count) in other.by_reason {
            *self.by_reason.entry(reason).or_default() += count;
        }
        self.refusal = self.refusal.take().or(other.refusal);
        self.first_id = self.first_id.or(other.first_id);
        self.last_id = other.last_id.or(self.last_id);
        self.new_id = other.new_id.or(self.new_id);
        if !other.is_audited {
            self.is_audited = false;
        }
    }
}

/// A dead letter as it goes back to its stream.
#[derive(Debug)]
struct Resent {
    stream: StreamName,
    fields: Fields,
}

#[derive(Debug)]
struct Task<'a> {
    scope: &'a Scope,
    bulk: &'a Bulk,
    step: Step<'a>,
    actor: &'a str,
}

impl Task<'_> {
    fn action(&self) -> Action<'_> {
        let (deed, replay) = match self.step {
            Step::Replay(how) => (Deed::Replay, Some((&how.to, how.force))),
            Step::Discard => (Deed::Discard, None),
        };
        Action {
            deed,
            actor: self.actor,
            stream: &self.scope.dead_letter,
            selection: Some(&self.bulk.selection),
            replay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_survive_their_text_form() {
        for text in ["group", "stream", "group:siem"] {
            assert_eq!(text.parse::<Target>().map(|target| target.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "siem", "group:", "group:a b"] {
            assert!(text.parse::<Target>().is_err(), "{text:?} was accepted");
        }
    }
}
