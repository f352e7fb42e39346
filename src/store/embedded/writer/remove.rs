//! Trims and discards, which remove entries from a stream. Each is a transaction of its own.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{EntryId, GroupName, StreamName};
use crate::store::embedded::disk::chunk::Chunk;
use crate::store::embedded::disk::schema;
use crate::store::embedded::memory::groups::Group;
use crate::store::embedded::memory::index::ChunkRef;
use crate::store::embedded::writer::Writer;
use crate::store::{LostReason, StoreError, StoreErrorKind, Trim};

/// The maximum number of chunks that a trim removes in one transaction.
const TRIM_CHUNKS: usize = 128;

impl Writer {
    /// Removes the oldest chunks that `trim` and the groups allow, in a transaction of its own.
    ///
    /// Returns the number of removed entries, and whether there may be more.
    pub(crate) fn trim(
        &mut self,
        name: &StreamName,
        trim: Trim,
        ignored: &[GroupName],
    ) -> Result<(u64, bool), StoreError> {
        let Some(place) = self.made(name) else { return Ok((0, false)) };
        let stream = &self.streams[place];
        let groups = stream.groups.values().filter(|group| !ignored.contains(&group.name));
        let floor = groups.map(Group::floor).min().unwrap_or(EntryId::MAX);
        let mut removed = 0;
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for chunk in &stream.published.log().chunks {
            let count = u64::from(chunk.head.count);
            let is_old = match trim {
                Trim::ToLength(length) => stream.length - removed >= length.saturating_add(count),
                Trim::Before(id) => chunk.head.last < id,
            };
            if !is_old || chunk.head.last >= floor || chunks.len() >= TRIM_CHUNKS {
                break;
            }
            removed += count;
            chunks.push(*chunk);
        }
        if chunks.is_empty() {
            return Ok((0, false));
        }
        let row = stream.row.clone();
        self.transaction(false, |connection| {
            chunks.iter().try_for_each(|chunk| schema::delete_chunk(connection, chunk))?;
            schema::save_stream(connection, &row)
        })?;
        let stream = &mut self.streams[place];
        stream.length -= removed;
        let freed = stream.published.log().remove_oldest(chunks.len());
        self.freed(freed);
        Ok((removed, chunks.len() == TRIM_CHUNKS))
    }

    /// Removes single entries, in a transaction of its own.
    pub(crate) fn discard(&mut self, name: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError> {
        let Some(place) = self.made(name) else { return Ok(0) };
        let ids: BTreeSet<EntryId> = ids.iter().copied().collect();
        let plan = self.plan_discard(place, &ids)?;
        if plan.removed == 0 {
            return Ok(0);
        }
        let stream = &self.streams[place];
        let (row, number) = (stream.row.clone(), stream.row.number);
        let mut groups: Vec<(GroupName, u64)> = Vec::new();
        for group in stream.groups.values() {
            let passed: u64 = plan.gone.iter().filter(|(first, _)| *first > group.cursor).map(|(_, count)| count).sum();
            if passed > 0 {
                groups.push((group.name.clone(), passed));
            }
        }
        for (name, passed) in &groups {
            if let Some((group, _)) = self.change_group(place, name) {
                group.passed += passed;
                *group.account().lost_mut(LostReason::TrimmedUndelivered) += passed;
            }
        }
        let streams = std::mem::take(&mut self.streams);
        let written = self.transaction(false, |connection| {
            for (old, new) in plan.chunks.values() {
                match new {
                    Some((new, chunk)) => {
                        if let Some(chunk) = chunk {
                            schema::insert_chunk(connection, new.row, chunk)?;
                        }
                        schema::save_ref(connection, new)?;
                    }
                    None => schema::delete_chunk(connection, old)?,
                }
            }
            for (name, _) in &groups {
                let group = &streams[place].groups[name];
                schema::save_group(connection, number, group)?;
                schema::save_account(connection, group)?;
            }
            schema::save_stream(connection, &row)
        });
        self.streams = streams;
        if let Err(error) = written {
            self.read_back()?;
            return Err(error);
        }
        let stream = &mut self.streams[place];
        stream.length = stream.length.saturating_sub(plan.removed);
        let mut log = stream.published.log();
        for (at, (_, new)) in plan.chunks.iter().rev() {
            log.replace(*at..*at + 1, new.iter().map(|(new, _)| *new).collect());
        }
        let freed = log.forget(|id| plan.is_gone(id, &ids));
        drop(log);
        self.freed(freed);
        Ok(plan.removed)
    }

    /// Plans the chunks without these entries.
    fn plan_discard(&self, place: usize, ids: &BTreeSet<EntryId>) -> Result<DiscardPlan, StoreError> {
        let stream = &self.streams[place];
        let log_chunks: BTreeMap<usize, ChunkRef> = {
            let log = stream.published.log();
            ids.iter().filter_map(|id| log.place_of(*id)).map(|at| (at, log.chunks[at])).collect()
        };
        let mut plan = DiscardPlan::default();
        // Entries of chunks that are removed completely are counted by the next remaining chunk.
        let mut carried = 0;
        let mut at = log_chunks.first_key_value().map_or(0, |(at, _)| *at);
        let end = log_chunks.last_key_value().map_or(0, |(at, _)| *at + 1);
        while at < end || carried > 0 {
            let found = log_chunks.get(&at).copied();
            let Some(old) = found.or_else(|| stream.published.log().chunks.get(at).copied()) else { break };
            if found.is_none() {
                if carried > 0 {
                    let new = ChunkRef { holes: old.holes + carried, ..old };
                    plan.chunks.insert(at, (old, Some((new, None))));
                    carried = 0;
                }
                at = log_chunks.range(at..).next().map_or(end.max(at + 1), |(next, _)| *next);
                continue;
            }
            let holes = old.holes + carried;
            let left = match self.read(place, &old) {
                Ok(chunk) => {
                    let left = chunk.without(|id| ids.contains(&id));
                    let left = left.map_err(|damage| schema::damaged_chunk(&stream.row.name, &old, &damage))?;
                    let gone = chunk.slots().filter_map(Result::ok).filter(|slot| ids.contains(&slot.id));
                    plan.gone.extend(gone.map(|slot| (slot.id, 1)));
                    left
                }
                Err(error) => {
                    let is_given_up = ids.contains(&old.head.first) && ids.contains(&old.head.last);
                    if error.kind() != StoreErrorKind::Corrupt || !is_given_up {
                        return Err(error);
                    }
                    tracing::error!(stream = %stream.row.name, error = %error, "damaged entries discarded");
                    plan.gone.push((old.head.first, u64::from(old.head.count)));
                    plan.given_up.push((old.head.first, old.head.last));
                    None
                }
            };
            let count = left.as_ref().map_or(0, |chunk| chunk.head.count);
            let removed = u64::from(old.head.count - count);
            plan.removed += removed;
            let new = left.map(|chunk| {
                let bytes = u32::try_from(chunk.body().len()).unwrap_or(u32::MAX);
                let new = ChunkRef { head: chunk.head, holes: holes + removed, bytes, ..old };
                (new, (removed > 0).then_some(chunk))
            });
            carried = if new.is_some() { 0 } else { holes + removed };
            plan.chunks.insert(at, (old, new));
            at += 1;
        }
        Ok(plan)
    }
}

/// The plan of a discard.
#[derive(Debug, Default)]
struct DiscardPlan {
    removed: u64,
    /// By index: the old chunk and the new one, with the new body if it changes.
    #[expect(clippy::type_complexity, reason = "a private plan, taken apart in one place")]
    chunks: BTreeMap<usize, (ChunkRef, Option<(ChunkRef, Option<Chunk>)>)>,
    /// Removed entries, as the first id and the count.
    gone: Vec<(EntryId, u64)>,
    /// Removed ranges that could not be read.
    given_up: Vec<(EntryId, EntryId)>,
}

impl DiscardPlan {
    fn is_gone(&self, id: EntryId, ids: &BTreeSet<EntryId>) -> bool {
        ids.contains(&id) || self.given_up.iter().any(|(first, last)| (*first..=*last).contains(&id))
    }
}
