//! Handing on what consumers outside left, by one script.

use std::time::Instant;

use super::connection::Arguments;
use super::failure::Failure;
use super::{LOOKED_AT_PER_CLAIM, MAX_CLAIM, RedisStore, reply, script};
use crate::event::{Delivery, EntryId, field};
use crate::store::{Cursor, Redelivered, Redelivery};

/// How many bytes of entries one run copies, give or take one entry: the server does nothing else meanwhile.
const COPIED_BYTES: usize = 4 << 20;

impl RedisStore {
    pub(super) async fn hand_on(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, Failure> {
        let limit = self.sizes.bounded(&cursor.stream, limit.min(MAX_CLAIM));
        let mut arguments = Arguments::with_capacity(10);
        arguments.shown(&redelivery.idle.as_millis()).shown(&from);
        arguments.shown(&limit).shown(&(limit * LOOKED_AT_PER_CLAIM)).shown(&COPIED_BYTES);
        arguments.shown(&redelivery.max_deliveries).shown(&script::MAX_ENTRY_ARGUMENTS);
        for name in [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_ATTEMPTS] {
            arguments.text(name);
        }
        let delivered_at = Instant::now();
        let answer = self.run_for(&script::REDELIVER, cursor, arguments).await?;
        let [handed_on, foreign, lost, taken, counts, more] = answer.tuple()?;
        let (taken, counts) = (taken.entries()?, counts.list()?);
        if taken.len() != counts.len() {
            return Err(Failure::unexpected("another number of counts than of entries"));
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
        Ok(Redelivered { handed_on: count(handed_on)?, foreign: count(foreign)?, exhausted, lost: lost.ids()?, next })
    }
}
