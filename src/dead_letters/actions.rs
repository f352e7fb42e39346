//! Replay and discard: one dead letter, some by id, or all that match, in bounded steps.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::audit::{AuditAction, AuditContext};
use super::selection::{DeadLetterEntry, DeadLetterScope, Selection};
use super::{DeadLetters, Inner, SharedStoreError, store_failure};
use crate::dead_letters::scan::{DeadLetterCursor, PageScan};
use crate::event::{DeadLetter, EntryId, Fields, GroupName, IdempotencyKey, NewEntry, StreamName};
use crate::store::{Order, Range};

/// Number of dead letters that are handled at a time by their ids.
const IDS_AT_A_TIME: usize = 64;

/// The target of a replay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ReplayTarget {
    /// The group that gave the entry up.
    #[default]
    FailedGroup,
    /// Another group of the stream.
    Group(GroupName),
    /// Every group of the stream, and all dashboards.
    Stream,
}

impl fmt::Display for ReplayTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailedGroup => f.write_str("group"),
            Self::Group(group) => write!(f, "group:{group}"),
            Self::Stream => f.write_str("stream"),
        }
    }
}

impl FromStr for ReplayTarget {
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

/// The options of a replay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplayOptions {
    /// The target.
    pub to: ReplayTarget,
    /// Replays entries even if they reached `dead_letters.max_replays`.
    pub force: bool,
}

/// The reason why a dead letter is not replayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayRefused {
    /// The bus did not write it, so its stream is unknown.
    #[error("the entry was not written by aurora-bus: it can be discarded, but not replayed")]
    Foreign,
    /// Its stream is not declared any more.
    #[error("its stream `{0}` is not declared")]
    Stream(StreamName),
    /// The target group does not exist.
    #[error("the stream has no group `{0}`: replay to another group (group:NAME) or to the stream")]
    Group(GroupName),
    /// It reached the maximum number of replays.
    #[error("it was replayed {replays} times, the maximum is {max} (dead_letters.max_replays): use force to replay it")]
    Replays {
        /// Number of its replays.
        replays: u32,
        /// Maximum number of replays.
        max: u32,
    },
}

impl ReplayRefused {
    /// Returns the reason in one word, for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Foreign => "not_a_dead_letter",
            Self::Stream(_) => "no_such_stream",
            Self::Group(_) => "no_such_group",
            Self::Replays { .. } => "too_many_replays",
        }
    }
}

/// The dead letters to act on, and the limit of one request.
#[derive(Debug, Clone, Default)]
pub struct BulkRequest {
    /// The conditions.
    pub selection: Selection,
    /// The position to continue from. The beginning by default.
    pub cursor: DeadLetterCursor,
    /// Maximum number of dead letters to handle.
    pub limit: usize,
    /// Whether to count only.
    pub is_dry_run: bool,
}

/// The result of a request, or of its dry run.
#[derive(Debug, Clone, Default)]
pub struct BulkResult {
    /// Number of matching dead letters.
    pub matched: u64,
    /// Number of replayed or discarded dead letters.
    pub done: u64,
    /// Number of requested dead letters that do not exist any more: another request has handled them, or an earlier try
    /// with a lost response.
    pub missing: u64,
    /// Number of entries that an interrupted replay had already appended. They are not appended twice.
    pub repeated: u64,
    /// Number of refused dead letters, by [`ReplayRefused::code`].
    pub refused: BTreeMap<&'static str, u64>,
    /// The text of the first refusal.
    pub refusal: Option<String>,
    /// Number of matching dead letters by group.
    pub by_group: BTreeMap<String, u64>,
    /// Number of matching dead letters by reason.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// The first matching dead letter.
    pub first_id: Option<EntryId>,
    /// The last matching dead letter.
    pub last_id: Option<EntryId>,
    /// The id of a single replayed dead letter in its stream.
    pub new_id: Option<EntryId>,
    /// Whether the audit stream has an entry for all of it.
    pub is_audited: bool,
    /// The position to continue from. `None` at the end.
    pub next: Option<DeadLetterCursor>,
}

impl BulkResult {
    fn count(&mut self, found: &DeadLetterEntry) {
        self.matched += 1;
        let group = found.dead_letter.as_ref().map(|dead_letter| dead_letter.group.to_string());
        *self.by_group.entry(group.unwrap_or_default()).or_default() += 1;
        *self.by_reason.entry(found.reason()).or_default() += 1;
        self.first_id.get_or_insert(found.entry.id);
        self.last_id = Some(found.entry.id);
    }

    /// Returns the progress before a failure, with the position to continue from: the next try meets the failure again.
    /// Fails if there was no progress.
    fn interrupted_at(
        mut self,
        from: EntryId,
        until: Option<EntryId>,
        failure: SharedStoreError,
    ) -> Result<Self, SharedStoreError> {
        if self.done + self.repeated == 0 {
            return Err(failure);
        }
        self.next = Some(DeadLetterCursor { from, until });
        Ok(self)
    }

    fn refuse(&mut self, refusal: &ReplayRefused) {
        *self.refused.entry(refusal.code()).or_default() += 1;
        self.refusal.get_or_insert_with(|| refusal.to_string());
    }
}

/// The action for each dead letter.
#[derive(Debug, Clone, Copy)]
enum BulkAction<'a> {
    Replay(&'a ReplayOptions),
    Discard,
}

impl DeadLetters {
    /// Appends dead letters to their streams again, and removes them. [`BulkResult`] has the counts.
    ///
    /// Safe to repeat after any failure. Cancel-safe: a repeated request completes what was begun.
    pub async fn replay(
        &self,
        scope: &DeadLetterScope,
        bulk: &BulkRequest,
        how: &ReplayOptions,
        actor: &str,
    ) -> Result<BulkResult, SharedStoreError> {
        self.inner.act(scope, bulk, BulkAction::Replay(how), actor).await
    }

    /// Removes dead letters for good. Safe to repeat.
    pub async fn discard(
        &self,
        scope: &DeadLetterScope,
        bulk: &BulkRequest,
        actor: &str,
    ) -> Result<BulkResult, SharedStoreError> {
        self.inner.act(scope, bulk, BulkAction::Discard, actor).await
    }
}

impl Inner {
    async fn act(
        &self,
        scope: &DeadLetterScope,
        bulk: &BulkRequest,
        action: BulkAction<'_>,
        actor: &str,
    ) -> Result<BulkResult, SharedStoreError> {
        let mut done = BulkResult { is_audited: self.audit.is_some() && !bulk.is_dry_run, ..BulkResult::default() };
        let task = BulkTask { scope, bulk, action, actor };
        if let Some(ids) = &bulk.selection.ids {
            let ids: Vec<EntryId> = ids.iter().copied().filter(|id| *id >= bulk.cursor.from).collect();
            for ids in ids.chunks(IDS_AT_A_TIME) {
                if let Err(failure) = self.handle_by_ids(&task, ids, &mut done).await {
                    return done.interrupted_at(ids[0], None, failure);
                }
            }
            return Ok(done);
        }
        let until = match bulk.cursor.until {
            Some(until) => until,
            None => self.store.describe(&scope.dead_letter).await?.map_or(EntryId::MIN, |status| status.last_id),
        };
        let mut scan = PageScan::new(DeadLetterCursor { until: Some(until), ..bulk.cursor }, &bulk.selection);
        while let Some(entries) = scan.next(&*self.store, &scope.dead_letter).await? {
            let begin = entries.first().map_or(EntryId::MIN, |entry| entry.id);
            let mut found: Vec<DeadLetterEntry> = entries.into_iter().map(DeadLetterEntry::new).collect();
            found.retain(|found| bulk.selection.matches(scope, found));
            let left = bulk.limit.saturating_sub(usize::try_from(done.matched).unwrap_or(usize::MAX));
            let beyond = found.get(left).map(|found| found.entry.id);
            found.truncate(left);
            if let Err(failure) = self.handle(&task, &found, &mut done).await {
                return done.interrupted_at(begin, Some(until), failure);
            }
            if let Some(beyond) = beyond {
                done.next = Some(DeadLetterCursor { from: beyond, until: Some(until) });
                return Ok(done);
            }
        }
        done.next = scan.rest(Some(until));
        Ok(done)
    }

    async fn handle_by_ids(
        &self,
        task: &BulkTask<'_>,
        ids: &[EntryId],
        done: &mut BulkResult,
    ) -> Result<(), SharedStoreError> {
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            let range = Range { from: *id, to: *id, order: Order::Forward };
            let entries = self.store.range(&task.scope.dead_letter, range, 1).await?;
            found.extend(entries.into_iter().map(DeadLetterEntry::new));
        }
        found.retain(|found| task.bulk.selection.matches(task.scope, found));
        self.handle(task, &found, done).await?;
        done.missing += (ids.len() - found.len()) as u64;
        Ok(())
    }

    async fn handle(
        &self,
        task: &BulkTask<'_>,
        found: &[DeadLetterEntry],
        done: &mut BulkResult,
    ) -> Result<(), SharedStoreError> {
        let mut counted = BulkResult { is_audited: done.is_audited, ..BulkResult::default() };
        let mut dead_letters: Vec<(&DeadLetterEntry, Option<ReplayCopy>)> = Vec::with_capacity(found.len());
        for found in found {
            counted.count(found);
            match task.action {
                BulkAction::Discard => dead_letters.push((found, None)),
                BulkAction::Replay(how) => match self.copy(found.dead_letter.as_ref(), how) {
                    Ok(copy) => dead_letters.push((found, Some(copy))),
                    Err(refusal) => counted.refuse(&refusal),
                },
            }
        }
        if task.bulk.is_dry_run {
            counted.done = dead_letters.len() as u64;
        } else if !dead_letters.is_empty() {
            let about: Vec<&DeadLetterEntry> = dead_letters.iter().map(|(found, _)| *found).collect();
            let is_written = self.write_audit(&task.audit_context(), &about).await?;
            if !is_written {
                counted.is_audited = false;
            }
            match task.action {
                BulkAction::Discard => self.discard(task.scope, &about, &mut counted).await?,
                BulkAction::Replay(_) => self.replay(task.scope, dead_letters, &mut counted).await?,
            }
        }
        done.add(counted);
        Ok(())
    }

    /// Returns the entry that a replay appends, and its stream.
    fn copy(&self, dead_letter: Option<&DeadLetter>, how: &ReplayOptions) -> Result<ReplayCopy, ReplayRefused> {
        let dead_letter = dead_letter.ok_or(ReplayRefused::Foreign)?;
        let source = self.source_of(&dead_letter.stream).map(|(source, _)| source);
        let source = source.ok_or_else(|| ReplayRefused::Stream(dead_letter.stream.clone()))?;
        let group = match &how.to {
            ReplayTarget::FailedGroup => Some(&dead_letter.group),
            ReplayTarget::Group(group) => Some(group),
            ReplayTarget::Stream => None,
        };
        if let Some(group) = group.filter(|group| !source.groups.contains(group)) {
            return Err(ReplayRefused::Group(group.clone()));
        }
        let max = self.config.max_replays;
        if dead_letter.replays >= max && !how.force {
            return Err(ReplayRefused::Replays { replays: dead_letter.replays, max });
        }
        Ok(ReplayCopy { stream: dead_letter.stream.clone(), fields: dead_letter.to_replay(group) })
    }

    async fn discard(
        &self,
        scope: &DeadLetterScope,
        about: &[&DeadLetterEntry],
        done: &mut BulkResult,
    ) -> Result<(), SharedStoreError> {
        let ids: Vec<EntryId> = about.iter().map(|found| found.entry.id).collect();
        done.done = self.store.discard(&scope.dead_letter, &ids).await?;
        done.missing = (ids.len() as u64).saturating_sub(done.done);
        self.metrics.dead_letters_discarded.with_label_values(&[self.label(&scope.dead_letter)]).inc_by(done.done);
        Ok(())
    }

    /// Appends the copies, then removes the dead letters.
    async fn replay(
        &self,
        scope: &DeadLetterScope,
        dead_letters: Vec<(&DeadLetterEntry, Option<ReplayCopy>)>,
        done: &mut BulkResult,
    ) -> Result<(), SharedStoreError> {
        let mut by_stream: BTreeMap<StreamName, (Vec<EntryId>, Vec<NewEntry>)> = BTreeMap::new();
        for (found, copy) in dead_letters {
            let Some(ReplayCopy { stream, fields }) = copy else { continue };
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

    /// Returns the idempotency key of a replay, the same for every repetition. Keys of publishers are UTF-8, so none
    /// begins like this one.
    fn key(&self, dead_letter: &StreamName, id: EntryId) -> IdempotencyKey {
        let mut key = BytesMut::with_capacity(dead_letter.as_str().len() + 48);
        key.put_u8(0xff);
        key.put_slice(b"dead:");
        key.put_slice(format!("{dead_letter}/{id}").as_bytes());
        IdempotencyKey { key: Bytes::from(key), window: self.config.max_age }
    }
}

impl BulkResult {
    fn add(&mut self, other: Self) {
        self.matched += other.matched;
        self.done += other.done;
        self.missing += other.missing;
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

/// An entry that returns to its stream.
#[derive(Debug)]
struct ReplayCopy {
    stream: StreamName,
    fields: Fields,
}

#[derive(Debug)]
struct BulkTask<'a> {
    scope: &'a DeadLetterScope,
    bulk: &'a BulkRequest,
    action: BulkAction<'a>,
    actor: &'a str,
}

impl BulkTask<'_> {
    fn audit_context(&self) -> AuditContext<'_> {
        let (kind, replay) = match self.action {
            BulkAction::Replay(how) => (AuditAction::Replay, Some((&how.to, how.force))),
            BulkAction::Discard => (AuditAction::Discard, None),
        };
        AuditContext {
            kind,
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
    fn targets_round_trip_through_text() {
        for text in ["group", "stream", "group:siem"] {
            assert_eq!(text.parse::<ReplayTarget>().map(|target| target.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "siem", "group:", "group:a b"] {
            assert!(text.parse::<ReplayTarget>().is_err(), "{text:?} was accepted");
        }
    }
}
