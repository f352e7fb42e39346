//! Moves entries to the dead letters.
//!
//! If both streams share a slot, one script appends the dead letter and acknowledges the entry, so that the entry is in
//! exactly one of the two streams whatever crashes. No script can do that if a cluster keeps them in different slots.
//! Then the move has three steps: the entry is extended, so that no other consumer claims it; the dead letter is
//! appended, once for any number of attempts, and its replicas are waited for; the entry is acknowledged. The first step
//! also records the destination beside the entry. After a crash the dead letter may exist while the entry is pending.
//! The consumer that then claims the entry finds the record and the dead letter, and only acknowledges.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use fred::util::redis_keyslot;

use crate::event::{Delivery, EntryId, Fields, StreamName};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::net::script;
use crate::store::redis::ops::keys;
use crate::store::redis::{RedisStore, key, of_consumer};
use crate::store::{Cursor, StoreErrorKind};

/// The approximate size of one command, so that the server is not blocked for long.
const MAX_BYTES: usize = 1 << 20;
/// The lifetime of the marker of a move to another slot.
const REMEMBERED: Duration = Duration::from_hours(7 * 24);

/// An entry and the fields of its dead letter.
pub(crate) type Record<'a> = (EntryId, &'a Fields);

impl RedisStore {
    /// Moves entries to the dead letters. Returns how many the consumer no longer owned.
    pub(crate) async fn dead_letter(
        &self,
        cursor: &Cursor,
        to: &StreamName,
        records: &[Record<'_>],
    ) -> Result<usize, Failure> {
        for (id, fields) in records {
            if fields.is_empty() || fields.len() * 2 > script::MAX_ENTRY_ARGUMENTS {
                let reason = format!("the dead letter of entry {id} has {} fields", fields.len());
                return Err(Failure::new(StoreErrorKind::Internal, reason));
            }
        }
        let slot = |stream: &StreamName| redis_keyslot(stream.as_str().as_bytes());
        let is_apart = self.servers.is_cluster() && slot(&cursor.stream) != slot(to);
        let mut not_owned = 0;
        let mut rest = records;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take(script::MAX_IDS).take_while(|(_, fields)| {
                bytes += fields.size_bytes();
                bytes <= MAX_BYTES
            });
            let (batch, later) = rest.split_at(fits.count().max(1));
            rest = later;
            not_owned += if is_apart {
                self.dead_letter_cross_slot(cursor, to, batch).await?
            } else {
                self.dead_letter_same_slot(cursor, to, batch).await?
            };
        }
        Ok(not_owned)
    }

    async fn dead_letter_same_slot(
        &self,
        cursor: &Cursor,
        to: &StreamName,
        batch: &[Record<'_>],
    ) -> Result<usize, Failure> {
        let mut arguments = of_consumer(cursor);
        for (id, fields) in batch {
            arguments.display(id);
            add_fields(&mut arguments, fields);
        }
        let keys = vec![key(&cursor.stream), keys::account(&cursor.stream), key(to)];
        let not_owned = self.run_as(&script::DEAD_LETTER, cursor, keys, arguments).await?;
        usize::try_from(not_owned.count()?).map_err(|e| Failure::unexpected(&e.to_string()))
    }

    async fn dead_letter_cross_slot(
        &self,
        cursor: &Cursor,
        to: &StreamName,
        batch: &[Record<'_>],
    ) -> Result<usize, Failure> {
        let mut begin = of_consumer(cursor);
        begin.display(&REMEMBERED.as_millis()).bytes(key(to));
        begin.ids(&batch.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        let noted = vec![key(&cursor.stream), keys::moving(&cursor.stream)];
        let not_owned = self.run_as(&script::DEAD_LETTER_PREPARE, cursor, noted, begin).await?.ids()?;
        let not_owned: HashSet<EntryId> = not_owned.into_iter().collect();
        let mut letters = vec![key(to)];
        let mut arguments = Arguments::with_capacity(batch.len() * 16);
        arguments.display(&REMEMBERED.as_millis());
        let mut owned = Vec::with_capacity(batch.len());
        for (id, fields) in batch.iter().filter(|(id, _)| !not_owned.contains(id)) {
            letters.push(keys::moved(to, &cursor.stream, &cursor.group, *id));
            add_fields(&mut arguments, fields);
            owned.push(*id);
        }
        if owned.is_empty() {
            return Ok(not_owned.len());
        }
        self.control.waiting_for_replicas().run(&script::DEAD_LETTER_APPEND, &letters, arguments).await?;
        Ok(not_owned.len() + self.end_burial(cursor, &owned).await?)
    }

    /// Acknowledges entries whose dead letters exist. Returns how many the consumer does not hold.
    async fn end_burial(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<usize, Failure> {
        let mut arguments = of_consumer(cursor);
        arguments.ids(ids);
        let keys = vec![key(&cursor.stream), keys::account(&cursor.stream), keys::moving(&cursor.stream)];
        let not_owned = self.run_as(&script::DEAD_LETTER_FINISH, cursor, keys, arguments).await?;
        usize::try_from(not_owned.count()?).map_err(|e| Failure::unexpected(&e.to_string()))
    }

    /// Removes claimed entries whose dead letters exist, and acknowledges them.
    ///
    /// Their earlier consumer crashed between the append and the acknowledgement. If a check fails, the entry stays
    /// pending for a later claim.
    pub(crate) async fn not_buried(
        &self,
        cursor: &Cursor,
        mut deliveries: Vec<Delivery>,
        moving: Reply,
    ) -> Result<Vec<Delivery>, Failure> {
        let moving = moving.list()?;
        let mut by_letters: HashMap<StreamName, Vec<EntryId>> = HashMap::new();
        for (delivery, to) in deliveries.iter().zip(moving) {
            // The hash contains stream names only.
            if let Ok(to) = to.text()?.parse() {
                by_letters.entry(to).or_default().push(delivery.entry.id);
            }
        }
        for (to, ids) in by_letters {
            let left_out = match self.finish_burials(cursor, &to, &ids).await {
                Ok(buried) => buried,
                Err(failure) => {
                    let (entries, reason) = (ids.len(), failure.reason);
                    tracing::warn!(dead_letter = %to, entries, reason, "cannot check which claimed entries are dead letters, leaving them pending");
                    ids
                }
            };
            deliveries.retain(|delivery| !left_out.contains(&delivery.entry.id));
        }
        Ok(deliveries)
    }

    async fn finish_burials(&self, cursor: &Cursor, to: &StreamName, ids: &[EntryId]) -> Result<Vec<EntryId>, Failure> {
        let mut letters = vec![key(to)];
        letters.extend(ids.iter().map(|id| keys::moved(to, &cursor.stream, &cursor.group, *id)));
        let found = self.control.run(&script::DEAD_LETTER_EXISTS, &letters, Arguments::default()).await?.list()?;
        let mut buried = Vec::new();
        for (id, found) in ids.iter().zip(found) {
            buried.extend((found.count()? > 0).then_some(*id));
        }
        if !buried.is_empty() {
            self.end_burial(cursor, &buried).await?;
        }
        Ok(buried)
    }
}

fn add_fields(arguments: &mut Arguments, fields: &Fields) {
    arguments.display(&(fields.len() * 2));
    for (name, value) in fields.iter() {
        arguments.bytes(name.clone()).bytes(value.clone());
    }
}
