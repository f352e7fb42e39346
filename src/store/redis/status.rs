//! What the server says of its streams and of itself, read into our terms.

use std::time::Duration;

use super::account::Accounts;
use super::failure::Failure;
use super::reply::{Named, Reply};
use crate::event::EntryId;
use crate::store::{ConsumerStatus, GroupStatus, Pending, StoreStatus, StreamStatus};

/// The reply of the `describe` script.
pub(super) fn stream(reply: Reply) -> Result<Option<StreamStatus>, Failure> {
    if reply.is_nil() {
        return Ok(None);
    }
    let [info, groups, accounts] = reply.tuple()?;
    let mut info = info.named()?;
    let accounts = Accounts::read(accounts)?;
    let length = info.take("length")?.count()?;
    let (first, last) = (info.take("first-entry")?.bytes()?, info.take("last-entry")?.bytes()?);
    // Servers before 7.0 don't count them.
    let added = info.find("entries-added").map(Reply::count).transpose()?;
    let held = Held { length, ends: optional_id(&first)?.zip(optional_id(&last)?), added };
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
        groups,
    }))
}

/// What a stream holds.
struct Held {
    length: u64,
    /// The oldest entry and the newest.
    ends: Option<(EntryId, EntryId)>,
    added: Option<u64>,
}

impl Held {
    /// How many entries there are after this one. Certain at both ends; in between, `lag` is the server's count, which
    /// is right unless entries after it were removed.
    fn after(&self, id: EntryId, lag: Option<u64>) -> Option<u64> {
        match self.ends {
            Some((first, _)) if id < first => Some(self.length),
            Some((_, last)) if id < last => lag,
            _ => Some(0),
        }
    }
}

fn group(reply: Reply, held: &Held, accounts: &Accounts) -> Result<GroupStatus, Failure> {
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

/// The rows of XPENDING with a range.
pub(super) fn pending(reply: Reply) -> Result<Vec<Pending>, Failure> {
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
    if text.is_empty() { Ok(None) } else { super::reply::parse_id(text).map(Some) }
}

/// A name that may be of foreign making: what our names can't hold is shown as `_`.
fn name_of<N: std::str::FromStr>(text: &[u8]) -> Result<N, Failure> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'_' | b'.' | b'-');
    let shown: String = text.iter().map(|byte| if allowed(byte) { char::from(*byte) } else { '_' }).take(200).collect();
    let shown = if shown.is_empty() { "_".to_owned() } else { shown };
    shown.parse().or(Err(Failure::unexpected("a name that can't be shown")))
}

/// What the text of INFO says to an operator.
pub(super) fn server(info: &str, now_us: Option<i128>) -> StoreStatus {
    let value = |name: &str| {
        info.lines().find_map(|line| line.split_once(':').filter(|(n, _)| *n == name).map(|(_, value)| value.trim()))
    };
    let (product, version) = match (value("valkey_version"), value("redis_version")) {
        (Some(version), _) => ("valkey", version),
        (None, Some(version)) => ("redis", version),
        (None, None) => ("redis", "of unknown version"),
    };
    let mut warnings = Vec::new();
    let major: Option<u32> = version.split('.').next().and_then(|major| major.parse().ok());
    if product == "redis" && major.is_some_and(|major| major < 7) {
        warnings.push(format!("the server is version {version}: before 7.0 it can't tell how far groups lag behind"));
    }
    if value("aof_enabled") == Some("0") {
        warnings.push(
            "the server's append-only file is off (appendonly no): when it crashes, what it accepted since its last \
             snapshot is lost"
                .to_owned(),
        );
    }
    if value("aof_enabled") == Some("1") && value("aof_last_write_status").is_some_and(|status| status != "ok") {
        warnings.push("the server's last write to its append-only file failed".to_owned());
    }
    if value("rdb_last_bgsave_status").is_some_and(|status| status != "ok") {
        warnings.push("the server's last snapshot failed".to_owned());
    }
    if let Some(policy) = value("maxmemory_policy").filter(|policy| policy.starts_with("allkeys")) {
        warnings.push(format!(
            "the server's eviction policy is {policy}: at its memory limit it drops whole streams, groups included; \
             set maxmemory-policy noeviction"
        ));
    }
    if let Some(policy) = value("maxmemory_policy").filter(|policy| policy.starts_with("volatile")) {
        warnings.push(format!(
            "the server's eviction policy is {policy}: at its memory limit it forgets idempotency keys, and repeated \
             events are stored again; set maxmemory-policy noeviction"
        ));
    }
    if let Some(evicted) = value("evicted_keys").filter(|count| *count != "0") {
        warnings.push(format!("the server has evicted {evicted} keys since it started"));
    }
    if let (Some(now), Some(server)) = (now_us, value("server_time_usec").and_then(|text| text.parse::<i128>().ok())) {
        let seconds = (now - server).abs() / 1_000_000;
        if seconds > 2 {
            warnings.push(format!("the server's clock differs from this machine's by {seconds} s"));
        }
    }
    StoreStatus { description: format!("{product} {version}"), warnings }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{ConsumerName, GroupName};

    #[test]
    fn a_server_without_aof_and_with_eviction_is_warned_about() {
        let info = "# Server\r\nredis_version:6.2.1\r\naof_enabled:0\r\nmaxmemory_policy:allkeys-lru\r\n\
                    rdb_last_bgsave_status:err\r\nevicted_keys:5\r\nserver_time_usec:1000000\r\n";
        let status = server(info, Some(9_000_000));
        assert_eq!(status.description, "redis 6.2.1");
        assert_eq!(status.warnings.len(), 6, "{:?}", status.warnings);
    }

    #[test]
    fn a_sound_valkey_is_named_without_warnings() {
        let info = "server_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:9.1.2\r\naof_enabled:1\r\n\
                    aof_last_write_status:ok\r\nmaxmemory_policy:noeviction\r\nevicted_keys:0\r\n";
        assert_eq!(server(info, None), StoreStatus { description: "valkey 9.1.2".to_owned(), warnings: Vec::new() });
    }

    #[test]
    fn foreign_names_are_shown_as_far_as_they_can_be() {
        assert_eq!(name_of::<ConsumerName>(b"my worker\xff").map(|n| n.to_string()), Ok("my_worker_".to_owned()));
        assert_eq!(name_of::<GroupName>(b"").map(|n| n.to_string()), Ok("_".to_owned()));
    }
}
