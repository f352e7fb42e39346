//! Redelivers entries that external consumers abandoned, with one script.

use std::time::{Duration, Instant};

use crate::event::{Delivery, Entry, EntryId, IdempotencyKey, NewEntry, field};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::{reply, script};
use crate::store::redis::ops::settle::SettleStep;
use crate::store::redis::{LOOKED_AT_PER_CLAIM, MAX_CLAIM, RedisStore};
use crate::store::{Cursor, Redelivered, Redelivery};

/// The maximum of bytes copied by one run, exceeded by one entry at most. The server is blocked during a run.
const COPIED_BYTES: usize = 4 << 20;

/// The lifetime of the key that marks a large entry as appended again.
const REMEMBERED: Duration = Duration::from_hours(7 * 24);

impl RedisStore {
    pub(crate) async fn hand_on(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, Failure> {
        let limit = self.reply_sizes.bounded(&cursor.stream, limit.min(MAX_CLAIM));
        let mut arguments = Arguments::with_capacity(10);
        arguments.display(&redelivery.idle.as_millis()).display(&from);
        arguments.display(&limit).display(&(limit * LOOKED_AT_PER_CLAIM)).display(&COPIED_BYTES);
        arguments.display(&redelivery.max_deliveries).display(&script::MAX_ENTRY_ARGUMENTS);
        for name in [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_ATTEMPTS] {
            arguments.text(name);
        }
        let delivered_at = Instant::now();
        let answer = self.run_for(&script::REDELIVER, cursor, arguments).await?;
        let [redelivered, foreign, lost, taken, counts, more, wide, wide_counts] = answer.tuple()?;
        let (taken, counts) = (taken.entries()?, counts.list()?);
        if taken.len() != counts.len() {
            return Err(Failure::unexpected("the number of counts differs from the number of entries"));
        }
        let mut exhausted = Vec::with_capacity(taken.len());
        for (entry, count) in taken.into_iter().zip(counts) {
            let attempt = u32::try_from(count.count()?).unwrap_or(u32::MAX);
            exhausted.push(Delivery { entry, attempt, delivered_at });
        }
        let more = more.bytes()?;
        let next = if more.is_empty() { EntryId::MIN } else { reply::parse_id(&more)?.next() };
        let count = |reply: reply::Reply| {
            usize::try_from(reply.count()?).map_err(|error| Failure::unexpected(&error.to_string()))
        };
        let mut redelivered = count(redelivered)?;
        for (entry, deliveries) in wide.entries()?.into_iter().zip(wide_counts.list()?) {
            let deliveries = u32::try_from(deliveries.count()?).unwrap_or(u32::MAX);
            match self.hand_on_wide(cursor, &entry, deliveries).await {
                Ok(was_ours) => redelivered += usize::from(was_ours),
                // The entry is pending on this consumer, and is tried again when it is idle.
                Err(failure) => {
                    let (stream, group, reason) = (&cursor.stream, &cursor.group, failure.reason);
                    tracing::warn!(%stream, %group, entry.id = %entry.id, reason, "redelivery of an entry failed");
                }
            }
        }
        Ok(Redelivered { redelivered, foreign: count(foreign)?, exhausted, lost: lost.ids()?, next })
    }
    /// Appends an entry again that is too large for the script, once for any number of attempts, and acknowledges it.
    ///
    /// Returns whether this consumer still owned it.
    async fn hand_on_wide(&self, cursor: &Cursor, entry: &Entry, deliveries: u32) -> Result<bool, Failure> {
        // No publisher's key can have this prefix, because theirs are UTF-8.
        let key = [&b"\xffhanded-on:"[..], format!("{}/{}", cursor.group, entry.id).as_bytes()].concat();
        let idempotency = Some(IdempotencyKey { key: key.into(), window: REMEMBERED });
        let again = NewEntry { fields: entry.redelivered(&cursor.group, deliveries), idempotency };
        let (_, publisher) = &self.publishers[0];
        publisher.append(&cursor.stream, vec![again]).await?;
        Ok(self.settle_owned(cursor, &[(entry.id, SettleStep::Acknowledge)]).await? == 0)
    }
}
