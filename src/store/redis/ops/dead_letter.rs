//! Moving entries to the dead letters.
//!
//! Where both streams are on one server, one script appends the letter and acknowledges the entry, so that it is in
//! exactly one of the two places whatever crashes. Where a cluster keeps them in different slots no script can do that:
//! there the entry is extended, so that nobody claims it meanwhile; the letter is appended, once however often that is
//! tried, and waited for until replicas have it; and then the entry is acknowledged. Before, it is noted beside the entry
//! where it goes: after a crash in between, which leaves the letter there and the entry pending, whoever takes the entry
//! over finds the note and the letter, and only acknowledges.

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

/// About how much goes into one command, so that the server is not held up for long.
const MAX_BYTES: usize = 1 << 20;
/// How long it is remembered that an entry was moved to another part of the cluster.
const REMEMBERED: Duration = Duration::from_hours(7 * 24);

/// An entry and the record of its death.
pub(crate) type Record<'a> = (EntryId, &'a Fields);

impl RedisStore {
    /// Moves what the consumer still owns to the dead letters; says how many it does not.
    pub(crate) async fn bury(
        &self,
        cursor: &Cursor,
        to: &StreamName,
        records: &[Record<'_>],
    ) -> Result<usize, Failure> {
        for (id, fields) in records {
            if fields.is_empty() || fields.len() * 2 > script::MAX_ENTRY_ARGUMENTS {
                let reason = format!("the record of entry {id} has {} fields", fields.len());
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
                self.bury_apart(cursor, to, batch).await?
            } else {
                self.bury_together(cursor, to, batch).await?
            };
        }
        Ok(not_owned)
    }

    async fn bury_together(&self, cursor: &Cursor, to: &StreamName, batch: &[Record<'_>]) -> Result<usize, Failure> {
        let mut arguments = of_consumer(cursor);
        for (id, fields) in batch {
            arguments.display(id);
            add_fields(&mut arguments, fields);
        }
        let keys = vec![key(&cursor.stream), keys::account(&cursor.stream), key(to)];
        let not_owned = self.run_as(&script::DEAD_LETTER, cursor, keys, arguments).await?;
        usize::try_from(not_owned.count()?).map_err(|e| Failure::unexpected(&e.to_string()))
    }

    async fn bury_apart(&self, cursor: &Cursor, to: &StreamName, batch: &[Record<'_>]) -> Result<usize, Failure> {
        let mut begin = of_consumer(cursor);
        begin.display(&REMEMBERED.as_millis()).bytes(key(to));
        begin.ids(&batch.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        let noted = vec![key(&cursor.stream), keys::moving(&cursor.stream)];
        let not_owned = self.run_as(&script::BURY_BEGIN, cursor, noted, begin).await?.ids()?;
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
        self.control.spreading().run(&script::BURY, &letters, arguments).await?;
        Ok(not_owned.len() + self.end_burial(cursor, &owned).await?)
    }

    /// Acknowledges entries whose letters are there; says how many the consumer does not hold.
    async fn end_burial(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<usize, Failure> {
        let mut arguments = of_consumer(cursor);
        arguments.ids(ids);
        let keys = vec![key(&cursor.stream), keys::account(&cursor.stream), keys::moving(&cursor.stream)];
        let not_owned = self.run_as(&script::BURY_END, cursor, keys, arguments).await?;
        usize::try_from(not_owned.count()?).map_err(|e| Failure::unexpected(&e.to_string()))
    }

    /// Leaves out what was just taken over though its letter is there: whoever wrote that died before it could
    /// acknowledge the entry, which is done now. What can't be found out now stays pending, for a later claim.
    pub(crate) async fn not_buried(
        &self,
        cursor: &Cursor,
        mut deliveries: Vec<Delivery>,
        moving: Reply,
    ) -> Result<Vec<Delivery>, Failure> {
        let moving = moving.list()?;
        let mut by_letters: HashMap<StreamName, Vec<EntryId>> = HashMap::new();
        for (delivery, to) in deliveries.iter().zip(moving) {
            // Only names were ever noted there.
            if let Ok(to) = to.text()?.parse() {
                by_letters.entry(to).or_default().push(delivery.entry.id);
            }
        }
        for (to, ids) in by_letters {
            let left_out = match self.finish_burials(cursor, &to, &ids).await {
                Ok(buried) => buried,
                Err(failure) => {
                    let (entries, reason) = (ids.len(), failure.reason);
                    tracing::warn!(dead_letter = %to, entries, reason, "it is unknown which entries are dead letters");
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
        let found = self.control.run(&script::BURIED, &letters, Arguments::default()).await?.list()?;
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
