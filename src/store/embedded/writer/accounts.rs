//! Operations that take unsettled entries from groups, and count them as lost.

use crate::event::{EntryId, GroupName, StreamName};
use crate::store::embedded::disk::schema;
use crate::store::embedded::memory::groups::Group;
use crate::store::embedded::memory::index::ChunkRef;
use crate::store::embedded::writer::{Writer, write_stream};
use crate::store::{Dropped, GroupLoss, LostReason, StoreError};

/// The maximum number of chunks dropped in one step.
const DROP_CHUNKS: usize = 32;

impl Writer {
    /// Removes the oldest chunks, settled or not, in a transaction of its own.
    pub(crate) fn drop_oldest(&mut self, name: &StreamName, keep: u64) -> Result<Dropped, StoreError> {
        let Some(place) = self.made(name) else { return Ok(Dropped::default()) };
        let stream = &self.streams[place];
        let mut dropped = Dropped::default();
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for chunk in &stream.published.log().chunks {
            let left = stream.length - dropped.removed;
            if left < keep.saturating_add(u64::from(chunk.head.count)) {
                break;
            }
            if chunks.len() == DROP_CHUNKS {
                dropped.is_more = true;
                break;
            }
            dropped.removed += u64::from(chunk.head.count);
            chunks.push(*chunk);
        }
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Ok(dropped) };
        let last = last.head.last;
        dropped.range = Some((first.head.first, last));
        for group in stream.groups.values() {
            let pending = group.held_from(EntryId::MIN).take_while(|held| held.id <= last).count() as u64;
            let undelivered = self.count_in(place, &chunks, group)?;
            if pending + undelivered > 0 {
                dropped.losses.push(GroupLoss { group: group.name.clone(), pending, undelivered });
            }
        }
        for loser in &dropped.losses {
            let Some((group, _)) = self.change_group(place, &loser.group) else { continue };
            let pending: Vec<EntryId> =
                group.held_from(EntryId::MIN).map(|held| held.id).take_while(|id| *id <= last).collect();
            for id in pending {
                group.release(id);
            }
            group.passed += loser.undelivered;
            group.changes.is_changed = true;
            *group.account().lost_mut(LostReason::Dropped) += loser.pending + loser.undelivered;
        }
        let stream = self.change(place);
        stream.is_changed = true;
        stream.groups.values_mut().for_each(Group::settle_changes);
        let streams = std::mem::take(&mut self.streams);
        let written = self.transaction(false, |connection| {
            chunks.iter().try_for_each(|chunk| schema::delete_chunk(connection, chunk))?;
            write_stream(connection, &streams[place])
        });
        self.streams = streams;
        if let Err(error) = written {
            self.read_back()?;
            return Err(error);
        }
        let stream = &mut self.streams[place];
        stream.length -= dropped.removed;
        let freed = stream.published.log().remove_oldest(chunks.len());
        self.freed(freed);
        Ok(dropped)
    }

    /// Returns how many entries of these chunks are undelivered for a group.
    fn count_in(&self, place: usize, chunks: &[ChunkRef], group: &Group) -> Result<u64, StoreError> {
        let mut count = 0;
        for chunk in chunks.iter().filter(|chunk| chunk.head.last > group.cursor) {
            if chunk.head.first > group.cursor {
                count += u64::from(chunk.head.count);
            } else {
                let chunk = self.read(place, chunk)?;
                let after = chunk.slots().filter(|slot| slot.is_ok_and(|slot| slot.id > group.cursor));
                count += after.count() as u64;
            }
        }
        Ok(count)
    }

    /// Counts undelivered entries of a group as lost, if the account has not changed meanwhile.
    pub(crate) fn write_off(&mut self, name: &StreamName, group: &GroupName, known: u64, missing: u64) -> bool {
        let Some(place) = self.made(name) else { return false };
        let Some((group, _)) = self.change_group(place, group) else { return false };
        let lost = group.account().lost_mut(LostReason::TrimmedUndelivered);
        let is_unchanged = *lost == known;
        if is_unchanged {
            *lost += missing;
        }
        is_unchanged
    }
}
