//! Parses the state of streams and groups.

use std::time::Duration;

use crate::event::EntryId;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::{Named, Reply};
use crate::store::redis::ops::account::Accounts;
use crate::store::{ConsumerStatus, GroupStatus, Pending, StreamStatus};

/// The reply of the `describe` script.
pub(crate) fn stream(reply: Reply) -> Result<Option<StreamStatus>, Failure> {
    if reply.is_nil() {
        return Ok(None);
    }
    let [info, groups, accounts] = reply.tuple()?;
    let mut info = info.named()?;
    let accounts = Accounts::read(accounts)?;
    let length = info.take("length")?.count()?;
    let (first, last) = (info.take("first-entry")?.bytes()?, info.take("last-entry")?.bytes()?);
    // Servers before 7.0 do not count them.
    let added = info.find("entries-added").map(Reply::count).transpose()?;
    let newest_deleted = info.find("max-deleted-entry-id").map(Reply::id).transpose()?;
    let held = StreamExtent { length, ends: optional_id(&first)?.zip(optional_id(&last)?), added };
    let groups = groups.list()?.into_iter().map(|reply| group(reply, &held, &accounts));
    let mut groups = groups.collect::<Result<Vec<_>, _>>()?;
    groups.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Some(StreamStatus {
        length,
        first_id: optional_id(&first)?,
        last_id: info.take("last-generated-id")?.id()?,
        entries_added: added.unwrap_or(length),
        removed_by_others: added
            .zip(accounts.removed())
            .map(|(added, removed)| added.saturating_sub(length).saturating_sub(removed)),
        before_first: added.zip(newest_deleted).and_then(|(added, deleted)| {
            let is_whole = held.ends.is_none_or(|(first, _)| deleted < first);
            is_whole.then(|| added.saturating_sub(length))
        }),
        groups,
    }))
}

/// The extent of a stream.
struct StreamExtent {
    length: u64,
    /// The oldest and the newest entry.
    ends: Option<(EntryId, EntryId)>,
    added: Option<u64>,
}

impl StreamExtent {
    /// Returns the number of entries after this one. Exact at both ends. In between it is the server's `lag`, which is
    /// exact unless entries after it were removed.
    fn after(&self, id: EntryId, lag: Option<u64>) -> Option<u64> {
        match self.ends {
            Some((first, _)) if id < first => Some(self.length),
            Some((_, last)) if id < last => lag,
            _ => Some(0),
        }
    }
}

fn group(reply: Reply, held: &StreamExtent, accounts: &Accounts) -> Result<GroupStatus, Failure> {
    let [info, oldest, consumers] = reply.tuple()?;
    let mut info = info.named()?;
    let name = info.take("name")?.bytes()?;
    let last_delivered = info.take("last-delivered-id")?.id()?;
    let lag = info.find("lag").map_or(Ok(None), Reply::count_if_known)?;
    let mut consumers =
        consumers.list()?.into_iter().map(|reply| consumer(reply.named()?)).collect::<Result<Vec<_>, _>>()?;
    consumers.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(GroupStatus {
        name: name_of(&name)?,
        last_delivered,
        entries_read: info.find("entries-read").map_or(Ok(None), Reply::count_if_known)?,
        lag,
        undelivered: held.after(last_delivered, lag),
        pending: info.take("pending")?.count()?,
        oldest_pending: optional_id(&oldest.bytes()?)?,
        account: accounts.of(&name, held.added),
        consumers,
    })
}

fn consumer(mut info: Named) -> Result<ConsumerStatus, Failure> {
    Ok(ConsumerStatus {
        name: name_of(&info.take("name")?.bytes()?)?,
        pending: info.take("pending")?.count()?,
        idle: Duration::from_millis(info.take("idle")?.count()?),
    })
}

/// Parses the rows of XPENDING with a range.
pub(crate) fn pending(reply: Reply) -> Result<Vec<Pending>, Failure> {
    let row = |reply: Reply| {
        let [id, consumer, idle, attempts] = reply.tuple()?;
        Ok(Pending {
            id: id.id()?,
            consumer: name_of(&consumer.bytes()?)?,
            idle: Duration::from_millis(idle.count()?),
            attempts: u32::try_from(attempts.count()?).unwrap_or(u32::MAX),
        })
    };
    reply.list()?.into_iter().map(row).collect()
}

fn optional_id(text: &[u8]) -> Result<Option<EntryId>, Failure> {
    if text.is_empty() { Ok(None) } else { crate::store::redis::net::reply::parse_id(text).map(Some) }
}

/// Parses a name that another program may have created. Characters that our names do not allow become `_`.
pub(crate) fn name_of<N: std::str::FromStr>(text: &[u8]) -> Result<N, Failure> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'_' | b'.' | b'~' | b'-');
    let shown: String = text.iter().map(|byte| if allowed(byte) { char::from(*byte) } else { '_' }).take(200).collect();
    let shown = if shown.is_empty() { "_".to_owned() } else { shown };
    shown.parse().or(Err(Failure::unexpected("an invalid name")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{ConsumerName, GroupName};

    #[test]
    fn foreign_names_get_placeholders() {
        assert_eq!(name_of::<ConsumerName>(b"my worker\xff").map(|n| n.to_string()), Ok("my_worker_".to_owned()));
        assert_eq!(name_of::<GroupName>(b"").map(|n| n.to_string()), Ok("_".to_owned()));
    }
}
