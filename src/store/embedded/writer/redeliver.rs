//! Redelivers entries that external consumers abandoned.

use crate::event::{Entry, EntryId, field};
use crate::store::embedded::disk::chunk;
use crate::store::embedded::disk::schema::corrupt;
use crate::store::embedded::memory::groups::{NewLeases, PendingEntry};
use crate::store::embedded::memory::index::ChunkRef;
use crate::store::embedded::writer::Writer;
use crate::store::embedded::writer::operations::{RECLAIM_LOOKS, millis};
use crate::store::{Cursor, LostReason, Redelivery, StoreError};

/// The maximum of bytes that one call copies, exceeded by one entry at most.
const COPIED_BYTES: usize = 4 * 1024 * 1024;

/// The redelivered entries, and those to give up.
#[derive(Debug, Default)]
pub(crate) struct RedeliverResult {
    pub(crate) redelivered: usize,
    pub(crate) foreign: usize,
    /// Each with its number of deliveries.
    pub(crate) exhausted: Vec<(Entry, u32)>,
    pub(crate) lost: Vec<EntryId>,
    pub(crate) next: EntryId,
}

/// The decision on one pending entry.
enum RedeliverStep {
    Lost,
    Foreign,
    HandOn(Vec<u8>),
    TakeOver(Entry, u32),
}

impl Writer {
    pub(crate) fn redeliver(
        &mut self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<RedeliverResult, StoreError> {
        self.fail_if_full()?;
        let now_ms = self.now_ms();
        let idle_ms = millis(redelivery.idle);
        let (place, group) = self.group(cursor)?;
        let mut done = RedeliverResult::default();
        let mut idle = Vec::new();
        for (looks, held) in group.held_from(from).enumerate() {
            if looks >= RECLAIM_LOOKS || idle.len() >= limit.max(1) {
                done.next = held.id;
                break;
            }
            if now_ms.saturating_sub(held.delivered_ms) >= idle_ms {
                idle.push(held);
            }
        }
        let mut steps: Vec<(PendingEntry, RedeliverStep)> = Vec::with_capacity(idle.len());
        let mut last = None;
        let mut bytes = 0;
        for held in idle {
            if bytes >= COPIED_BYTES {
                done.next = held.id;
                break;
            }
            let step = self.step(cursor, place, held, redelivery.max_deliveries, &mut last)?;
            bytes += match &step {
                RedeliverStep::HandOn(fields) => fields.len(),
                RedeliverStep::TakeOver(entry, _) => entry.fields.size_bytes(),
                RedeliverStep::Lost | RedeliverStep::Foreign => 0,
            };
            steps.push((held, step));
        }
        let mut leases = NewLeases::default();
        for (held, step) in steps {
            if let RedeliverStep::HandOn(fields) = &step {
                self.stage(place, fields);
            }
            let Some((group, numbers)) = self.change_group(place, &cursor.group) else { break };
            match step {
                RedeliverStep::Lost => {
                    *group.account().lost_mut(LostReason::TrimmedPending) += 1;
                    done.lost.push(held.id);
                }
                RedeliverStep::Foreign => {
                    group.account().filtered += 1;
                    done.foreign += 1;
                }
                RedeliverStep::HandOn(_) => {
                    group.account().acknowledged += 1;
                    done.redelivered += 1;
                }
                RedeliverStep::TakeOver(entry, deliveries) => {
                    let consumer = group.consumer(&cursor.consumer, now_ms, &mut numbers.consumer);
                    group.hold(
                        PendingEntry { consumer, delivered_ms: now_ms, ..held },
                        &mut leases,
                        &mut numbers.lease,
                    );
                    done.exhausted.push((entry, deliveries));
                    continue;
                }
            }
            group.release(held.id);
        }
        Ok(done)
    }

    fn step(
        &self,
        cursor: &Cursor,
        place: usize,
        held: PendingEntry,
        max_deliveries: u32,
        last: &mut Option<(ChunkRef, chunk::Chunk)>,
    ) -> Result<RedeliverStep, StoreError> {
        let Some((chunk, slot)) = self.body(place, held.id, last)? else { return Ok(RedeliverStep::Lost) };
        let entry = chunk.entry(slot).map_err(|damage| {
            corrupt(format!("entry {} of stream `{}` cannot be read: {damage}", held.id, cursor.stream))
        })?;
        let target = entry.fields.text(field::REPLAY_GROUP);
        if entry.fields.get(field::REPLAY_GROUP).is_some() && target != Some(cursor.group.as_str()) {
            return Ok(RedeliverStep::Foreign);
        }
        let before = entry.fields.text(field::REPLAY_ATTEMPTS);
        // Other programs can write this field: only a plain number is valid.
        let before = before.filter(|text| text.len() <= 9 && text.bytes().all(|byte| byte.is_ascii_digit()));
        let before: u32 = before.and_then(|text| text.parse().ok()).unwrap_or_default();
        let deliveries = before.saturating_add(held.attempts);
        if deliveries >= max_deliveries {
            return Ok(RedeliverStep::TakeOver(entry, deliveries));
        }
        let mut encoded = Vec::new();
        chunk::encode(&entry.redelivered(&cursor.group, deliveries), &mut encoded);
        Ok(RedeliverStep::HandOn(encoded))
    }
}
