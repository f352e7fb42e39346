//! Moving entries to the dead letters.
//!
//! Where both streams are on one server, one script appends the letter and acknowledges the entry, so that it is in
//! exactly one of the two places whatever crashes. Where a cluster keeps them in different slots no script can do that:
//! there the entry is extended, so that nobody claims it meanwhile; the letter is appended, once however often that is
//! tried, and waited for until replicas have it; and then the entry is acknowledged. A crash in between leaves the letter there and the entry pending, and the
//! next attempt only acknowledges.

use std::collections::HashSet;
use std::time::Duration;

use fred::util::redis_keyslot;

use super::connection::Arguments;
use super::failure::Failure;
use super::{RedisStore, Step, key, keys, of_consumer, script};
use crate::event::{EntryId, Fields, StreamName};
use crate::store::{Cursor, StoreErrorKind};

/// About how much goes into one command, so that the server is not held up for long.
const MAX_BYTES: usize = 1 << 20;
/// How long it is remembered that an entry was moved to another part of the cluster.
const REMEMBERED: Duration = Duration::from_hours(7 * 24);

/// An entry and the record of its death.
pub(super) type Record<'a> = (EntryId, &'a Fields);

impl RedisStore {
    /// Moves what the consumer still owns to the dead letters; says how many it does not.
    pub(super) async fn bury(
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
            arguments.shown(id);
            add_fields(&mut arguments, fields);
        }
        let keys = vec![key(&cursor.stream), keys::account(&cursor.stream), key(to)];
        let not_owned = self.run_as(&script::DEAD_LETTER, cursor, keys, arguments).await?;
        usize::try_from(not_owned.count()?).map_err(|e| Failure::unexpected(&e.to_string()))
    }

    async fn bury_apart(&self, cursor: &Cursor, to: &StreamName, batch: &[Record<'_>]) -> Result<usize, Failure> {
        let mut ids = Arguments::with_capacity(batch.len());
        ids.ids(&batch.iter().map(|(id, _)| *id).collect::<Vec<_>>());
        let not_owned = self.run_for(&script::EXTEND, cursor, ids).await?.ids()?;
        let not_owned: HashSet<EntryId> = not_owned.into_iter().collect();
        let mut letters = vec![key(to)];
        let mut arguments = Arguments::with_capacity(batch.len() * 16);
        arguments.shown(&REMEMBERED.as_millis());
        let mut steps = Vec::with_capacity(batch.len());
        for (id, fields) in batch.iter().filter(|(id, _)| !not_owned.contains(id)) {
            letters.push(keys::moved(to, &cursor.stream, &cursor.group, *id));
            add_fields(&mut arguments, fields);
            steps.push((*id, Step::Bury));
        }
        if steps.is_empty() {
            return Ok(not_owned.len());
        }
        self.control.spreading().run(&script::BURY, &letters, arguments).await?;
        Ok(not_owned.len() + self.settle_owned(cursor, &steps).await?)
    }
}

fn add_fields(arguments: &mut Arguments, fields: &Fields) {
    arguments.shown(&(fields.len() * 2));
    for (name, value) in fields.iter() {
        arguments.bytes(name.clone()).bytes(value.clone());
    }
}
