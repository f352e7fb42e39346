//! Operations on deliveries that receipts identify.

use crate::store::embedded::memory::groups::{Group, NewLeases, PendingEntry};
use crate::store::embedded::writer::Writer;
use crate::store::embedded::writer::operations::{millis, no_group};
use crate::store::{Cursor, Receipt, ReceiptAction, StoreError};

impl Writer {
    pub(crate) fn settle_by_receipt(
        &mut self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, StoreError> {
        let now_ms = self.now_ms();
        let limit_ms = millis(cursor.claim_idle);
        let (place, group) = self.group(cursor)?;
        let mut last = None;
        let mut are_there = Vec::with_capacity(actions.len());
        for (receipt, redemption) in actions {
            let is_held_on = matches!(redemption, ReceiptAction::Hold { .. });
            let needs_body = is_held_on && of_receipt(group, receipt, now_ms, limit_ms).is_some();
            are_there.push(!needs_body || self.body(place, receipt.id, &mut last)?.is_some());
        }
        let (group, numbers) = self.change_group(place, &cursor.group).ok_or_else(|| no_group(cursor))?;
        let mut leases = NewLeases::default();
        let mut redeem = |(receipt, redemption): &(Receipt, ReceiptAction)| {
            let Some(held) = of_receipt(group, receipt, now_ms, limit_ms) else { return false };
            match redemption {
                ReceiptAction::Acknowledge => {
                    group.account().acknowledged += 1;
                    group.release(held.id);
                }
                ReceiptAction::Hold { by, lease } => {
                    let consumer = group.consumer(by, now_ms, &mut numbers.consumer);
                    let idle_ms = limit_ms - millis(*lease).min(limit_ms);
                    let delivered_ms = now_ms.saturating_sub(idle_ms);
                    group.hold(PendingEntry { consumer, delivered_ms, ..held }, &mut leases, &mut numbers.lease);
                }
            }
            true
        };
        Ok(actions.iter().zip(are_there).map(|(one, is_there)| is_there && redeem(one)).collect())
    }
}

/// Returns the pending entry of a receipt, or `None` if the receipt is not valid.
fn of_receipt(group: &Group, receipt: &Receipt, now_ms: u64, limit_ms: u64) -> Option<PendingEntry> {
    let consumer = group.number_of(&receipt.consumer)?;
    let is_idle = |held: &PendingEntry| now_ms.saturating_sub(held.delivered_ms) >= limit_ms;
    let is_its = |held: &PendingEntry| held.consumer == consumer && held.attempts == receipt.attempt;
    group.held(receipt.id).filter(|held| is_its(held) && !is_idle(held))
}
