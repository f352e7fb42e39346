//! Appends entries with more fields than a script can pass to one command.
//!
//! They are sent as plain commands in a transaction, so that an entry and its idempotency key are stored together or not
//! at all. That needs a connection of its own and a round trip per command. Such entries are rare: other programs write
//! them, and the store appends them when they are replayed or redelivered.

use std::collections::HashMap;

use bytes::Bytes;

use crate::event::{EntryId, Fields, NewEntry, StreamName, field};
use crate::store::redis::net::client::RoutedClient;
use crate::store::redis::net::connection::{Arguments, Connection};
use crate::store::redis::net::durability;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::{Reply, parse_id};
use crate::store::redis::net::script::{MAX_ENTRY_ARGUMENTS, STORE_KEY};
use crate::store::redis::ops::keys;
use crate::store::{Appended, StoreErrorKind};

/// The maximum of names and values of one entry: a server accepts a million arguments.
pub(crate) const MAX_ARGUMENTS: usize = 1_000_000;
/// The number of attempts if another client writes one of the transaction's keys meanwhile.
const TRIES: usize = 5;

/// Returns whether an entry has more fields than a script can pass to one command.
pub(crate) fn is_wide(entry: &NewEntry) -> bool {
    entry.fields.len() * 2 > MAX_ENTRY_ARGUMENTS
}

/// Appends entries, in order, all or none.
///
/// Returns the appended entries, and the failure to confirm their durability, if any.
pub(crate) async fn append(
    link: &RoutedClient,
    stream: &StreamName,
    entries: &[&NewEntry],
) -> Result<(Vec<Appended>, Option<Failure>), Failure> {
    let stream_key = Bytes::copy_from_slice(stream.as_str().as_bytes());
    // A failure may leave a transaction open, so its connection is not kept.
    let leased = link.lease_connection(&stream_key).await?;
    let transaction = Transaction { link, connection: &leased.connection, stream, stream_key };
    let appended = transaction.append(entries).await.map_err(|failure| link.classify(failure))?;
    let mut written = vec![transaction.stream_key.clone()];
    written.extend(entries.iter().filter_map(|entry| dedup_key(stream, entry)));
    let confirmed = durability::confirm(&leased.connection, link.durability(), &written, false, link.settings()).await;
    link.release(leased);
    Ok((appended, confirmed.err()))
}

fn dedup_key(stream: &StreamName, entry: &NewEntry) -> Option<Bytes> {
    entry.idempotency.as_ref().map(|idempotency| keys::idempotency(stream, &idempotency.key))
}

fn event_id(fields: &Fields) -> Bytes {
    fields.get(field::ID).cloned().unwrap_or_default()
}

#[derive(Debug)]
struct Transaction<'a> {
    link: &'a RoutedClient,
    connection: &'a Connection,
    stream: &'a StreamName,
    stream_key: Bytes,
}

impl Transaction<'_> {
    async fn append(&self, entries: &[&NewEntry]) -> Result<Vec<Appended>, Failure> {
        durability::prepare(self.connection, self.link.durability(), self.link.settings()).await?;
        let mut load = Arguments::with_capacity(2);
        load.text("LOAD").name(STORE_KEY.source());
        self.call("SCRIPT", load).await?;
        for _ in 0..TRIES {
            if let Some(appended) = self.try_append(entries).await? {
                return Ok(appended);
            }
        }
        Err(Failure::unavailable("other clients append the same events at the same time"))
    }

    /// Returns `None` if another client has written one of the keys meanwhile.
    async fn try_append(&self, entries: &[&NewEntry]) -> Result<Option<Vec<Appended>>, Failure> {
        let mut known: HashMap<Bytes, (EntryId, Bytes)> = HashMap::new();
        for key in entries.iter().filter_map(|entry| dedup_key(self.stream, entry)) {
            self.call("WATCH", of(&key)).await?;
            let first = self.call("GET", of(&key)).await?;
            if !first.is_nil() {
                known.insert(key, remembered(&first.bytes()?)?);
            }
        }
        let is_known = |entry: &NewEntry| dedup_key(self.stream, entry).is_some_and(|key| known.contains_key(&key));
        self.call("MULTI", Arguments::default()).await?;
        let mut fresh: HashMap<Bytes, usize> = HashMap::new();
        let mut added = 0;
        for entry in entries.iter().filter(|entry| !is_known(entry)) {
            let key = dedup_key(self.stream, entry);
            if key.as_ref().is_some_and(|key| fresh.contains_key(key)) {
                continue;
            }
            self.queue(entry, key.as_ref()).await?;
            if let Some(key) = key {
                fresh.insert(key, added);
            }
            added += 1;
        }
        let answer = self.call("EXEC", Arguments::default()).await?;
        if answer.is_nil() {
            return Ok(None);
        }
        let ids = added_ids(answer)?;
        if ids.len() != added {
            return Err(Failure::unexpected("the number of ids differs from the number of entries"));
        }
        let mut next = 0;
        let appended = entries.iter().map(|entry| {
            let key = dedup_key(self.stream, entry);
            if let Some((id, event_id)) = key.as_ref().and_then(|key| known.get(key)) {
                return Appended { id: *id, event_id: event_id.clone(), duplicate: true };
            }
            // A second entry with the same key in this batch.
            let first = key.as_ref().and_then(|key| fresh.get(key)).copied().filter(|first| *first < next);
            let place = first.unwrap_or(next);
            next += usize::from(first.is_none());
            Appended { id: ids[place], event_id: event_id(&entry.fields), duplicate: first.is_some() }
        });
        Ok(Some(appended.collect()))
    }

    async fn queue(&self, entry: &NewEntry, key: Option<&Bytes>) -> Result<(), Failure> {
        let fields = &entry.fields;
        let mut add = Arguments::with_capacity(fields.len() * 2 + 2);
        add.bytes(self.stream_key.clone()).text("*");
        for (name, value) in fields.iter() {
            add.bytes(name.clone()).bytes(value.clone());
        }
        self.call("XADD", add).await?;
        let (Some(key), Some(idempotency)) = (key, &entry.idempotency) else { return Ok(()) };
        let mut remember = Arguments::with_capacity(11);
        remember.bytes(STORE_KEY.sha().clone()).text("2").bytes(self.stream_key.clone()).bytes(key.clone());
        remember.display(&idempotency.window.as_millis().max(1)).bytes(event_id(fields)).display(&(fields.len() * 2));
        let parts: Vec<&Bytes> = fields.iter().flat_map(|(name, value)| [name, value]).collect();
        for place in 0..4 {
            // A smaller entry may have fewer.
            let part = (parts.len() + place).checked_sub(4).map(|at| parts[at].clone());
            remember.bytes(part.unwrap_or_default());
        }
        self.call("EVALSHA", remember).await.map(drop)
    }

    async fn call(&self, command: &'static str, arguments: Arguments) -> Result<Reply, Failure> {
        self.connection.call(command, arguments, self.link.settings().command_timeout, false).await
    }
}

fn of(key: &Bytes) -> Arguments {
    let mut arguments = Arguments::with_capacity(1);
    arguments.bytes(key.clone());
    arguments
}

/// Parses the stored first entry of a key: its id, and its event id after a space.
fn remembered(text: &Bytes) -> Result<(EntryId, Bytes), Failure> {
    let end = text.iter().position(|byte| *byte == b' ').unwrap_or(text.len());
    Ok((parse_id(&text.slice(..end))?, text.slice((end + 1).min(text.len())..)))
}

/// Returns the ids of the appended entries. For an entry with an idempotency key, the script returns its id again.
fn added_ids(answer: Reply) -> Result<Vec<EntryId>, Failure> {
    let mut ids: Vec<EntryId> = Vec::new();
    for reply in answer.list()? {
        let id = parse_id(&reply.bytes().map_err(|failure| Failure { kind: StoreErrorKind::Unavailable, ..failure })?)?;
        if ids.last() != Some(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}
