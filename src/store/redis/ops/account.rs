//! The accounts that the scripts keep, parsed, and acknowledging with accounts.

use std::collections::HashMap;

use bytes::{BufMut, Bytes, BytesMut};

use crate::event::{EntryId, GroupName, StreamName};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::{Reply, parse_id};
use crate::store::redis::net::script;
use crate::store::redis::ops::{keys, status};
use crate::store::redis::{RedisStore, key};
use crate::store::{Account, Dropped, GroupLoss, LostReason};

/// The accounts of a stream's groups, from its hash: by counter and group.
#[derive(Debug)]
pub(crate) struct Accounts(HashMap<Bytes, u64>);

impl Accounts {
    pub(crate) fn read(reply: Reply) -> Result<Self, Failure> {
        let mut fields = HashMap::new();
        let mut list = reply.list()?.into_iter();
        while let (Some(name), Some(value)) = (list.next(), list.next()) {
            let (name, value) = (name.bytes()?, value.text()?);
            let number = value.parse().map_err(|_not_a_number| {
                Failure::unexpected(&format!("`{value}` is not a count in `{}`", String::from_utf8_lossy(&name)))
            })?;
            fields.insert(name, number);
        }
        Ok(Self(fields))
    }

    /// Returns the number of entries that the store itself removed, or `None` if it does not count them.
    pub(crate) fn removed(&self) -> Option<u64> {
        self.0.get(&b"removed"[..]).copied()
    }

    /// Returns the account of a group, or `None` if it has none.
    pub(crate) fn of(&self, group: &[u8], entries_added: Option<u64>) -> Option<Account> {
        let find = |counter: &str| {
            let name = [counter.as_bytes(), b":", group].concat();
            self.0.get(&name[..]).copied()
        };
        let base = find("base");
        // An account whose start is after all entries belongs to an earlier stream of that name.
        if base.zip(entries_added).is_some_and(|(base, added)| base > added) {
            return None;
        }
        let count = |counter: &str| find(counter).unwrap_or(0);
        let counters = [count("acknowledged"), count("filtered"), count("dead")];
        let lost = LostReason::ALL.map(|reason| count(reason.as_str()));
        if base.is_none() && counters.iter().chain(&lost).all(|count| *count == 0) {
            return None;
        }
        let [acknowledged, filtered, dead] = counters;
        Some(Account { base, acknowledged, filtered, dead, lost })
    }
}

impl RedisStore {
    pub(crate) async fn drop_step(&self, stream: &StreamName, keep: u64) -> Result<Dropped, Failure> {
        let mut arguments = Arguments::with_capacity(1);
        arguments.display(&keep);
        let keys = [key(stream), keys::account(stream)];
        let reply = self.control.run(&script::DROP_OLDEST, &keys, arguments).await?;
        let [removed, more, first, last, losses] = reply.tuple()?;
        let (removed, first, last) = (removed.count()?, first.bytes()?, last.bytes()?);
        let range = if removed == 0 { None } else { Some((parse_id(&first)?, parse_id(&last)?)) };
        let loser = |reply: Reply| {
            let [group, pending, undelivered] = reply.tuple()?;
            let group = status::name_of(&group.bytes()?)?;
            Ok(GroupLoss { group, pending: pending.count()?, undelivered: undelivered.count()? })
        };
        let losses = losses.list()?.into_iter().map(loser).collect::<Result<_, Failure>>()?;
        Ok(Dropped { removed, range, losses, is_more: more.count()? == 1 })
    }

    pub(crate) async fn count_missing(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, Failure> {
        let mut arguments = Arguments::with_capacity(3);
        arguments.name(group.as_str()).display(&known).display(&missing);
        let keys = [key(stream), keys::account(stream)];
        self.control.run(&script::WRITE_OFF, &keys, arguments).await?.count().map(|counted| counted == 1)
    }
}

/// Packs ids into one argument, as `MessagePack`. With one argument per id the script takes half as long again.
pub(crate) fn packed(ids: &[EntryId]) -> Bytes {
    use std::io::Write as _;
    let mut packed = BytesMut::with_capacity(ids.len() * 20).writer();
    let mut text = Vec::with_capacity(41);
    for id in ids {
        text.clear();
        write!(text, "{id}").expect("a buffer that grows takes everything");
        let length = u8::try_from(text.len()).expect("an id has at most 41 bytes");
        let packed = packed.get_mut();
        if length < 32 {
            packed.put_u8(0xa0 | length);
        } else {
            packed.put_slice(&[0xda, 0, length]);
        }
        packed.put_slice(&text);
    }
    packed.into_inner().freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_any_length_are_packed() {
        let ids = [EntryId::new(1, 0), EntryId::MAX];
        let expected = [&b"\xa31-0"[..], &b"\xda\x00\x2918446744073709551615-18446744073709551615"[..]].concat();
        assert_eq!(packed(&ids), expected);
    }
}
