//! The operations of the store on the writer thread.
//!
//! Each operation does everything that can fail before its first change, so that a failed operation has changed nothing.
//! Fields arrive encoded and leave as slots of chunks: callers encode and decode on their own threads.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use bytes::Bytes;

use crate::event::{ConsumerName, EntryId, Epoch, GroupName, StreamName};
use crate::store::embedded::disk::chunk::{Chunk, Slot};
use crate::store::embedded::disk::schema;
use crate::store::embedded::disk::schema::{FirstEntry, ReadFailure, corrupt, engine_error};
use crate::store::embedded::memory::groups::{Group, MAX_PENDING, NewLeases, PendingEntry};
use crate::store::embedded::memory::index::{ChunkLocation, ChunkRef};
use crate::store::embedded::writer::Writer;
use crate::store::{
    Appended, ConsumerStatus, Cursor, GroupStatus, IsolationLimits, LostReason, Pending, Range, Settled, Start,
    StoreError, StoreErrorKind, StoreStatus, StreamStatus,
};

/// The maximum of chunk bytes in one fetch, which returns one entry at least.
const FETCH_BYTES: usize = 4 * 1024 * 1024;
/// The maximum number of pending entries that one reclaim scans.
pub(crate) const RECLAIM_LOOKS: usize = 1000;

/// Entries to append, encoded one after the other.
#[derive(Debug, Default)]
pub(crate) struct NewEntries {
    pub(crate) bytes: Vec<u8>,
    pub(crate) entries: Vec<EncodedEntry>,
}

#[derive(Debug)]
pub(crate) struct EncodedEntry {
    /// The position of its fields.
    pub(crate) fields: std::ops::Range<usize>,
    pub(crate) event_id: Bytes,
    /// Its idempotency key, and the window of the key.
    pub(crate) key: Option<(Bytes, u64)>,
}

/// A delivery to settle.
#[derive(Debug)]
pub(crate) struct Settle {
    pub(crate) id: EntryId,
    pub(crate) how: SettleAction,
}

#[derive(Debug)]
pub(crate) enum SettleAction {
    Acknowledge,
    Filter,
    /// Claimable after this many milliseconds, or after the claim idle time if that is shorter.
    Retry(u64),
    Release,
    DeadLetter {
        to: StreamName,
        fields: Vec<u8>,
    },
}

/// Entries that were made pending, not decoded.
#[derive(Debug, Default)]
pub(crate) struct PendingBatch {
    /// Each entry with its chunk and its attempts.
    pub(crate) entries: Vec<(Chunk, Slot, u32)>,
    pub(crate) lost: Vec<EntryId>,
    pub(crate) next: EntryId,
    pub(crate) held_back: Option<u32>,
}

pub(crate) fn no_group(cursor: &Cursor) -> StoreError {
    let message = format!("stream `{}` has no group `{}`", cursor.stream, cursor.group);
    StoreError::new(StoreErrorKind::NoGroup, message)
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Writer {
    pub(crate) fn append(&mut self, name: &StreamName, new: &NewEntries) -> Result<Vec<Appended>, StoreError> {
        self.fail_if_full()?;
        let now_ms = self.now_ms();
        let mut known = self.find_keys(name, new, now_ms)?;
        let place = self.place_or_new(name);
        let number = self.streams[place].row.number;
        let mut results = Vec::with_capacity(new.entries.len());
        for entry in &new.entries {
            if let Some(first) = entry.key.as_ref().and_then(|(key, _)| known.get(key)) {
                results.push(Appended { id: first.id, event_id: first.event_id.clone(), duplicate: true });
                continue;
            }
            let id = self.stage(place, &new.bytes[entry.fields.clone()]);
            if let Some((key, window_ms)) = &entry.key {
                let expires_ms = now_ms.saturating_add(*window_ms);
                let first = FirstEntry { id, event_id: entry.event_id.clone(), expires_ms };
                known.insert(key.clone(), first.clone());
                self.staged.keys.insert((number, key.clone()), first);
            }
            results.push(Appended { id, event_id: entry.event_id.clone(), duplicate: false });
        }
        Ok(results)
    }

    /// Returns the entries' keys that were used within their windows.
    fn find_keys(
        &self,
        name: &StreamName,
        new: &NewEntries,
        now_ms: u64,
    ) -> Result<HashMap<Bytes, FirstEntry>, StoreError> {
        let mut known = HashMap::new();
        let Some(place) = self.place(name) else { return Ok(known) };
        let number = self.streams[place].row.number;
        for (key, _) in new.entries.iter().filter_map(|entry| entry.key.as_ref()) {
            let staged = self.staged.keys.get(&(number, key.clone())).cloned();
            let first = match staged {
                Some(first) => Some(first),
                None => schema::find_key(&self.connection, number, key)
                    .map_err(|error| engine_error("look up an idempotency key", error))?,
            };
            if let Some(first) = first.filter(|first| first.expires_ms > now_ms) {
                known.insert(key.clone(), first);
            }
        }
        Ok(known)
    }

    pub(crate) fn ensure_group(
        &mut self,
        name: &StreamName,
        group: &GroupName,
        start: Start,
    ) -> Result<bool, StoreError> {
        let mut made = Group::new(self.numbers.group + 1, group.clone());
        if let Some(place) = self.made(name) {
            let stream = &self.streams[place];
            if stream.groups.contains_key(group) {
                return Ok(false);
            }
            let (cursor, left) = match start {
                Start::Oldest => (EntryId::MIN, stream.length),
                Start::New => (stream.row.last_id, 0),
                Start::After(id) => (id, self.count_after(place, id)?),
            };
            made.cursor = cursor;
            made.passed = stream.row.added - left;
        } else if let Start::After(id) = start {
            made.cursor = id;
        }
        made.account().base = Some(made.passed);
        made.changes.is_changed = true;
        self.numbers.group += 1;
        let place = self.place_or_new(name);
        let stream = self.change(place);
        if !stream.row.is_made {
            (stream.is_changed, stream.row.is_made) = (true, true);
        }
        stream.groups.insert(group.clone(), made);
        self.staged.must_sync = true;
        Ok(true)
    }

    /// Returns the number of committed entries of a stream after this one.
    fn count_after(&self, place: usize, id: EntryId) -> Result<u64, StoreError> {
        let stream = &self.streams[place];
        let (behind, holding) = stream.published.log().count_after(id);
        let Some(chunk) = holding else { return Ok(behind) };
        let chunk = self.read(place, &chunk)?;
        let after = chunk.slots().filter(|slot| slot.is_ok_and(|slot| slot.id > id)).count();
        Ok(behind + after as u64)
    }

    /// Reads a chunk. References that the writer holds are reliable.
    pub(crate) fn read(&self, place: usize, chunk: &ChunkRef) -> Result<Chunk, StoreError> {
        let name = &self.streams[place].row.name;
        schema::read_chunk(&self.connection, name, chunk).map_err(|failure| match failure {
            ReadFailure::Changed => schema::damaged_chunk(name, chunk, &"the row is missing or has other content"),
            ReadFailure::Failed(error) => error,
        })
    }

    fn place_of_group(&self, cursor: &Cursor) -> Result<usize, StoreError> {
        let place = self.made(&cursor.stream).filter(|place| self.streams[*place].groups.contains_key(&cursor.group));
        place.ok_or_else(|| no_group(cursor))
    }

    pub(crate) fn group(&self, cursor: &Cursor) -> Result<(usize, &Group), StoreError> {
        let place = self.place_of_group(cursor)?;
        Ok((place, &self.streams[place].groups[&cursor.group]))
    }

    pub(crate) fn fetch(&mut self, cursor: &Cursor, limit: usize) -> Result<PendingBatch, StoreError> {
        let now_ms = self.now_ms();
        let (place, group) = self.group(cursor)?;
        let room = MAX_PENDING.saturating_sub(group.pending_count());
        if room == 0 {
            let message = format!(
                "cannot fetch from stream `{}`: group `{}` has {MAX_PENDING} pending entries, the maximum; settle some first",
                cursor.stream, cursor.group
            );
            return Err(StoreError::new(StoreErrorKind::Full, message));
        }
        let (picked, ahead) = self.pick(place, group, limit.min(room))?;
        let (group, numbers) = self.change_group(place, &cursor.group).ok_or_else(|| no_group(cursor))?;
        let consumer = group.consumer(&cursor.consumer, now_ms, &mut numbers.consumer);
        if let Some(ahead) = ahead {
            group.ahead = ahead;
        }
        let Some((_, last)) = picked.last() else { return Ok(PendingBatch::default()) };
        group.cursor = last.id;
        group.passed += picked.len() as u64;
        group.read += picked.len() as u64;
        group.changes.is_changed = true;
        let mut leases = NewLeases::default();
        for (_, slot) in &picked {
            let held = PendingEntry { id: slot.id, consumer, delivered_ms: now_ms, attempts: 1 };
            group.hold(held, &mut leases, &mut numbers.lease);
        }
        let entries = picked.into_iter().map(|(chunk, slot)| (chunk, slot, 1)).collect();
        Ok(PendingBatch { entries, ..PendingBatch::default() })
    }

    /// Returns the committed entries after a group's cursor, and the chunk to keep for the next call if one was read.
    #[expect(clippy::type_complexity, reason = "one caller takes the pair apart at once")]
    fn pick(
        &self,
        place: usize,
        group: &Group,
        limit: usize,
    ) -> Result<(Vec<(Chunk, Slot)>, Option<Option<Chunk>>), StoreError> {
        let stream = &self.streams[place];
        let range = Range::after(group.cursor);
        let mut picked = Vec::with_capacity(limit.min(512));
        let mut bytes = 0;
        let mut take = |chunk: &Chunk, picked: &mut Vec<(Chunk, Slot)>| -> Result<bool, StoreError> {
            bytes += chunk.body().len();
            for slot in chunk.slots() {
                let slot =
                    slot.map_err(|damage| corrupt(format!("cannot read stream `{}`: {damage}", stream.row.name)))?;
                if slot.id >= range.from && picked.len() < limit {
                    picked.push((chunk.clone(), slot));
                }
            }
            Ok(picked.len() >= limit || bytes >= FETCH_BYTES)
        };
        let found = stream.published.log().find(range, limit);
        match found {
            ChunkLocation::Recent(chunks) => {
                for chunk in &chunks {
                    if take(chunk, &mut picked)? {
                        break;
                    }
                }
                Ok((picked, Some(None)))
            }
            ChunkLocation::Rows { chunks, .. } => {
                let mut last = None;
                for chunk_ref in &chunks {
                    let ahead = group.ahead.as_ref().filter(|ahead| ahead.head == chunk_ref.head).cloned();
                    let chunk = match ahead.map_or_else(|| self.read(place, chunk_ref), Ok) {
                        Ok(chunk) => chunk,
                        // Entries before the damage are delivered first. The next fetch finds the damage again.
                        Err(_) if !picked.is_empty() => break,
                        Err(error) => return Err(error),
                    };
                    let is_enough = take(&chunk, &mut picked)?;
                    last = Some(chunk);
                    if is_enough {
                        break;
                    }
                }
                Ok((picked, Some(last)))
            }
        }
    }

    pub(crate) fn claim(&mut self, cursor: &Cursor, ids: &[EntryId], idle_ms: u64) -> Result<PendingBatch, StoreError> {
        let now_ms = self.now_ms();
        let (place, group) = self.group(cursor)?;
        let is_idle = |held: &PendingEntry| now_ms.saturating_sub(held.delivered_ms) >= idle_ms;
        let ids: BTreeSet<EntryId> = ids.iter().copied().collect();
        let idle: Vec<PendingEntry> = ids.into_iter().filter_map(|id| group.held(id)).filter(is_idle).collect();
        self.take_over(cursor, place, &idle, now_ms)
    }

    /// Makes pending entries the cursor's if they still have bodies.
    fn take_over(
        &mut self,
        cursor: &Cursor,
        place: usize,
        entries: &[PendingEntry],
        now_ms: u64,
    ) -> Result<PendingBatch, StoreError> {
        let mut bodies = Vec::with_capacity(entries.len());
        let mut last: Option<(ChunkRef, Chunk)> = None;
        for held in entries {
            bodies.push(self.body(place, held.id, &mut last)?);
        }
        let (group, numbers) = self.change_group(place, &cursor.group).ok_or_else(|| no_group(cursor))?;
        let consumer = group.consumer(&cursor.consumer, now_ms, &mut numbers.consumer);
        let mut leases = NewLeases::default();
        let mut taken = PendingBatch::default();
        for (held, body) in entries.iter().zip(bodies) {
            let Some((chunk, slot)) = body else {
                group.release(held.id);
                *group.account().lost_mut(LostReason::TrimmedPending) += 1;
                taken.lost.push(held.id);
                continue;
            };
            let attempts = held.attempts.saturating_add(1);
            let now_held = PendingEntry { id: held.id, consumer, delivered_ms: now_ms, attempts };
            group.hold(now_held, &mut leases, &mut numbers.lease);
            taken.entries.push((chunk, slot, attempts));
        }
        Ok(taken)
    }

    /// Returns the position of an entry's body, or `None` if it is gone. `last` caches the chunk read last.
    pub(crate) fn body(
        &self,
        place: usize,
        id: EntryId,
        last: &mut Option<(ChunkRef, Chunk)>,
    ) -> Result<Option<(Chunk, Slot)>, StoreError> {
        let find = |chunk: &Chunk| {
            let slot = chunk.slots().filter_map(Result::ok).find(|slot| slot.id == id);
            slot.map(|slot| (chunk.clone(), slot))
        };
        let (recent, chunk_ref) = {
            let log = self.streams[place].published.log();
            (log.recent_of(id).cloned(), log.chunk_of(id))
        };
        if let Some(chunk) = recent {
            return Ok(find(&chunk));
        }
        let Some(chunk_ref) = chunk_ref else { return Ok(None) };
        if let Some((_, chunk)) = last.as_ref().filter(|(last, _)| *last == chunk_ref) {
            return Ok(find(chunk));
        }
        let chunk = self.read(place, &chunk_ref)?;
        let found = find(&chunk);
        *last = Some((chunk_ref, chunk));
        Ok(found)
    }

    pub(crate) fn reclaim(
        &mut self,
        cursor: &Cursor,
        idle_ms: u64,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<PendingBatch, StoreError> {
        let now_ms = self.now_ms();
        let (place, group) = self.group(cursor)?;
        let mut idle = Vec::new();
        let mut next = EntryId::MIN;
        for (looks, held) in group.held_from(from).enumerate() {
            if looks >= RECLAIM_LOOKS || idle.len() >= limit.max(1) {
                next = held.id;
                break;
            }
            if now_ms.saturating_sub(held.delivered_ms) >= idle_ms {
                idle.push(held);
            }
        }
        let fitting = isolation.fitting(idle.iter().map(|held| held.attempts));
        let held_back = idle.get(fitting).map(|held| held.attempts);
        next = idle.get(fitting).map_or(next, |held| held.id);
        idle.truncate(fitting);
        let taken = self.take_over(cursor, place, &idle, now_ms)?;
        Ok(PendingBatch { next, held_back, ..taken })
    }

    pub(crate) fn settle(&mut self, cursor: &Cursor, endings: &[Settle]) -> Settled {
        let nothing = Settled { settled: 0, not_owned: endings.len() };
        let now_ms = self.now_ms();
        let Ok((place, group)) = self.group(cursor) else { return nothing };
        let Some(consumer) = group.number_of(&cursor.consumer) else { return nothing };
        let limit_ms = millis(cursor.claim_idle);
        let mut leases = NewLeases::default();
        let mut settled = Settled::default();
        for ending in endings {
            let Ok((_, group)) = self.group(cursor) else { return nothing };
            let Some(held) = group.held(ending.id).filter(|held| held.consumer == consumer) else {
                settled.not_owned += 1;
                continue;
            };
            settled.settled += 1;
            if let SettleAction::DeadLetter { to, fields } = &ending.how {
                let to = self.place_or_new(to);
                self.stage(to, fields);
            }
            let Some((group, numbers)) = self.change_group(place, &cursor.group) else { return nothing };
            let account = &mut group.counted;
            let counter = match ending.how {
                SettleAction::Acknowledge => Some(&mut account.acknowledged),
                SettleAction::Filter => Some(&mut account.filtered),
                SettleAction::DeadLetter { .. } => Some(&mut account.dead),
                SettleAction::Retry(_) | SettleAction::Release => None,
            };
            if let Some(counter) = counter {
                *counter += 1;
                group.changes.is_account_changed = true;
            }
            let again = match ending.how {
                SettleAction::Acknowledge | SettleAction::Filter | SettleAction::DeadLetter { .. } => None,
                SettleAction::Retry(due_ms) => {
                    let delivered_ms = now_ms.saturating_sub(limit_ms - due_ms.min(limit_ms));
                    Some(PendingEntry { delivered_ms, ..held })
                }
                SettleAction::Release => {
                    let delivered_ms = now_ms.saturating_sub(limit_ms);
                    // An entry idle for that long was released before: this settlement is a repetition.
                    let is_again = held.delivered_ms <= delivered_ms;
                    let attempts = held.attempts.saturating_sub(u32::from(!is_again));
                    Some(PendingEntry { delivered_ms, attempts, ..held })
                }
            };
            match again {
                Some(held) => group.hold(held, &mut leases, &mut numbers.lease),
                None => group.release(held.id),
            }
        }
        if let Some((group, numbers)) = self.change_group(place, &cursor.group) {
            group.consumer(&cursor.consumer, now_ms, &mut numbers.consumer);
        }
        settled
    }

    pub(crate) fn extend(&mut self, cursor: &Cursor, ids: &[EntryId]) -> Vec<EntryId> {
        let now_ms = self.now_ms();
        let Ok((place, group)) = self.group(cursor) else { return ids.to_vec() };
        let Some(consumer) = group.number_of(&cursor.consumer) else { return ids.to_vec() };
        let Some((group, numbers)) = self.change_group(place, &cursor.group) else { return ids.to_vec() };
        group.consumer(&cursor.consumer, now_ms, &mut numbers.consumer);
        let mut leases = NewLeases::default();
        let mut foreign = Vec::new();
        for id in ids {
            match group.held(*id).filter(|held| held.consumer == consumer) {
                Some(held) => {
                    group.hold(PendingEntry { delivered_ms: now_ms, ..held }, &mut leases, &mut numbers.lease);
                }
                None => foreign.push(*id),
            }
        }
        foreign
    }

    pub(crate) fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError> {
        let now_ms = self.now_ms();
        let (_, group) = self.group(cursor)?;
        let names: HashMap<i64, &ConsumerName> =
            group.consumers().map(|consumer| (consumer.number, &consumer.name)).collect();
        let held = match group.number_of(&cursor.consumer) {
            Some(own) if own_only => group.held_by(own, from, limit),
            None if own_only => Vec::new(),
            _ => group.held_from(from).take(limit).collect(),
        };
        Ok(held
            .into_iter()
            .filter_map(|held| {
                Some(Pending {
                    id: held.id,
                    consumer: (*names.get(&held.consumer)?).clone(),
                    idle: Duration::from_millis(now_ms.saturating_sub(held.delivered_ms)),
                    attempts: held.attempts,
                })
            })
            .collect())
    }

    pub(crate) fn describe(&self, name: &StreamName) -> Option<StreamStatus> {
        let now_ms = self.now_ms();
        let stream = &self.streams[self.made(name)?];
        let oldest = stream.published.log().chunks.front().copied();
        let first_id = oldest.map(|chunk| chunk.head.first);
        let before_first = match oldest {
            Some(chunk) => (chunk.holes == 0).then(|| chunk.head.added.saturating_sub(u64::from(chunk.head.count))),
            // Staged entries are counted already, but not visible yet.
            None => (stream.length == 0).then_some(stream.row.added),
        };
        let group_status = |group: &Group| GroupStatus {
            name: group.name.clone(),
            last_delivered: group.cursor,
            entries_read: Some(group.read),
            lag: Some(stream.row.added.saturating_sub(group.passed)),
            undelivered: Some(stream.row.added.saturating_sub(group.passed)),
            pending: group.pending_count() as u64,
            oldest_pending: group.oldest_pending(),
            account: Some(group.counted),
            consumers: group
                .consumers()
                .map(|consumer| ConsumerStatus {
                    name: consumer.name.clone(),
                    pending: consumer.pending,
                    idle: Duration::from_millis(now_ms.saturating_sub(consumer.seen_ms)),
                })
                .collect(),
        };
        Some(StreamStatus {
            length: stream.length,
            first_id,
            last_id: stream.row.last_id,
            entries_added: stream.row.added,
            // No other program can remove entries.
            removed_by_others: None,
            before_first,
            groups: stream.groups.values().map(group_status).collect(),
        })
    }

    pub(crate) fn epoch(&mut self, name: &StreamName) -> Epoch {
        let place = self.place_or_new(name);
        self.streams[place].row.epoch.clone()
    }

    pub(crate) fn remove_consumer(&mut self, cursor: &Cursor) -> Result<bool, StoreError> {
        let place = self.place_of_group(cursor)?;
        let (group, _) = self.change_group(place, &cursor.group).ok_or_else(|| no_group(cursor))?;
        Ok(group.remove_consumer(&cursor.consumer))
    }

    pub(crate) fn check(&mut self) -> Result<StoreStatus, StoreError> {
        self.fail_if_full()?;
        self.staged.must_write = true;
        let description = format!("embedded (SQLite {}, `{}`)", rusqlite::version(), self.path().display());
        Ok(StoreStatus { warnings: self.warnings.clone(), ..StoreStatus::new(description) })
    }
}
