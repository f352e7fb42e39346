//! Settles deliveries.
//!
//! A young delivery cannot belong to another consumer and is acknowledged without an ownership check. A script with the
//! check settles the others, and given-up entries move to the dead letters.

use std::time::Duration;

use crate::event::{Delivery, EntryId, Fields, StreamName};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::script;
use crate::store::redis::ops::{account, keys};
use crate::store::redis::{MAX_ACKNOWLEDGE, RedisStore, key, of_group};
use crate::store::{Cursor, Outcome, Settled, Settlement, StoreError};

/// The outcome of a pending entry.
pub(crate) enum SettleStep {
    Acknowledge,
    Filter,
    Retry { idle: Duration },
    Release,
}

impl RedisStore {
    pub(crate) async fn settle_all(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        let (mut young, mut young_filtered) = (Vec::new(), Vec::new());
        let mut steps = Vec::new();
        let mut dead: Vec<(&StreamName, Vec<(EntryId, &Fields)>)> = Vec::new();
        // A new lease holder claims all pending entries at once, young ones too.
        let is_young =
            |delivery: &Delivery| cursor.lease.is_none() && delivery.delivered_at.elapsed() < cursor.claim_idle / 2;
        for Settlement { delivery, outcome } in settlements {
            let id = delivery.entry.id;
            match outcome {
                // No other consumer can have claimed it yet, so no check is needed.
                Outcome::Acknowledge if is_young(delivery) => young.push(id),
                Outcome::Filter if is_young(delivery) => young_filtered.push(id),
                Outcome::Acknowledge => steps.push((id, SettleStep::Acknowledge)),
                Outcome::Filter => steps.push((id, SettleStep::Filter)),
                // A delivery time in the future is not possible. So the idle time is set to the claim idle time less
                // the delay.
                Outcome::Retry(delay) => {
                    steps.push((id, SettleStep::Retry { idle: cursor.claim_idle.saturating_sub(*delay) }));
                }
                Outcome::Release => steps.push((id, SettleStep::Release)),
                Outcome::DeadLetter { to, fields } => match dead.iter_mut().find(|(stream, _)| *stream == to) {
                    Some((_, records)) => records.push((id, fields)),
                    None => dead.push((to, vec![(id, fields)])),
                },
            }
        }
        let failed = |failure: Failure| failure.because(of_group("cannot settle deliveries of", cursor));
        let mut not_owned = 0;
        for (counter, ids) in [("acknowledged:", young), ("filtered:", young_filtered)] {
            not_owned += ids.len() - self.acknowledge(cursor, counter, &ids).await.map_err(failed)?;
        }
        not_owned += self.settle_owned(cursor, &steps).await.map_err(failed)?;
        for (to, records) in dead {
            let outcome = self.dead_letter(cursor, to, &records).await;
            let what = format_args!("cannot move entries to dead letters `{to}`");
            not_owned +=
                outcome.map_err(|failure| failure.because(format_args!("{what}, {}", of_group("those of", cursor))))?;
        }
        Ok(Settled { settled: settlements.len() - not_owned, not_owned })
    }

    /// Acknowledges without an ownership check. Returns how many were pending.
    async fn acknowledge(&self, cursor: &Cursor, counter: &'static str, ids: &[EntryId]) -> Result<usize, Failure> {
        let mut acknowledged = 0;
        for ids in ids.chunks(MAX_ACKNOWLEDGE) {
            let keys = [key(&cursor.stream), keys::account(&cursor.stream)];
            let mut arguments = Arguments::with_capacity(3);
            arguments.name(cursor.group.as_str()).text(counter).bytes(account::packed(ids));
            let count = self.control.run(&script::ACKNOWLEDGE, &keys, arguments).await?.count()?;
            acknowledged += usize::try_from(count)
                .ok()
                .filter(|count| *count <= ids.len())
                .ok_or_else(|| Failure::unexpected("more entries acknowledged than requested"))?;
        }
        Ok(acknowledged)
    }

    /// Acknowledges, re-arms and releases the entries that the consumer still owns. Returns how many it does not.
    pub(crate) async fn settle_owned(
        &self,
        cursor: &Cursor,
        steps: &[(EntryId, SettleStep)],
    ) -> Result<usize, Failure> {
        let mut not_owned = 0;
        for steps in steps.chunks(script::MAX_IDS) {
            let mut arguments = Arguments::with_capacity(steps.len() * 3);
            for (id, step) in steps {
                let (what, idle) = match step {
                    SettleStep::Acknowledge => ("ack", Duration::ZERO),
                    SettleStep::Filter => ("filter", Duration::ZERO),
                    SettleStep::Retry { idle } => ("retry", *idle),
                    // Any consumer with this claim idle time may claim it at once.
                    SettleStep::Release => ("release", cursor.claim_idle),
                };
                arguments.display(id).text(what).display(&idle.as_millis());
            }
            not_owned += self.run_for(&script::SETTLE, cursor, arguments).await?.count()?;
        }
        usize::try_from(not_owned).map_err(|e| Failure::unexpected(&e.to_string()))
    }
}
