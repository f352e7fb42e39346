//! Waits until appended entries are on the server's disk, or on its replicas.
//!
//! `WAIT` and `WAITAOF` refer to the writes of their own connection, and block it. So each append that waits has a
//! connection of its own.

use std::time::Duration;

use bytes::Bytes;

use crate::store::redis::config::Settings;
use crate::store::redis::net::connection::{Arguments, Connection};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::ops::keys;
use crate::store::{Durability, StoreErrorKind};

/// The time that the reply to a wait may take beyond the waiting time.
const MARGIN: Duration = Duration::from_secs(1);
/// The lifetime of the key that is written only to wait for it.
const MARK_KEPT_MS: u32 = 1000;

/// How the server can confirm writes to its disk.
enum DiskSupport {
    /// By `WAITAOF`.
    Waits,
    /// Every write is on disk before the reply.
    Always,
    /// Not at all, with the reason.
    Never(String),
}

/// Checks whether the server supports this durability. Call it before writing.
pub(crate) async fn prepare(connection: &Connection, wanted: Durability, settings: &Settings) -> Result<(), Failure> {
    if !wanted.fsync || connection.reaches_disk.get().is_some() {
        return Ok(());
    }
    match disk(connection, settings).await? {
        DiskSupport::Waits | DiskSupport::Always => {
            connection.reaches_disk.get_or_init(|| ());
            Ok(())
        }
        DiskSupport::Never(why) => {
            let reason = format!("the server cannot confirm writes to its disk (durability fsync): {why}");
            Err(Failure::new(StoreErrorKind::Unsupported, reason))
        }
    }
}

/// Waits until all writes of this connection have this durability. The keys are those of the script.
pub(crate) async fn confirm(
    connection: &Connection,
    wanted: Durability,
    keys: &[Bytes],
    is_asking: bool,
    settings: &Settings,
) -> Result<(), Failure> {
    let unconfirmed = |why: String| {
        let reason = format!("the entries are stored, but {why}; a retry is safe with the same idempotency key");
        Failure::new(StoreErrorKind::NotDurable, reason)
    };
    let lost = |failure: Failure| unconfirmed(format!("their durability is unknown: {}", failure.reason));
    let time = humantime_serde::re::humantime::format_duration(settings.wait_timeout);
    if wanted == Durability::MEMORY {
        return Ok(());
    }
    if let (Some(stream), true) = (keys.first(), keys.len() > 1) {
        // If all entries were duplicates, this connection has written nothing to wait for. So it writes a key.
        let mut mark = Arguments::with_capacity(4);
        mark.bytes(keys::mark(stream)).text("1").text("PX").display(&MARK_KEPT_MS);
        connection.call_asking(is_asking, "SET", mark, settings.command_timeout, false).await.map_err(lost)?;
    }
    if wanted.fsync {
        match wait_for_disk(connection, settings.wait_timeout).await {
            Ok(true) => {}
            Ok(false) => return Err(unconfirmed(format!("the server has not written them to its disk within {time}"))),
            // A server without WAITAOF passed the check because it writes before it replies.
            Err(failure) if is_unknown_command(&failure) => {}
            Err(failure) => return Err(lost(failure)),
        }
    }
    if wanted.replicated {
        let mut wait = Arguments::with_capacity(2);
        wait.display(&settings.replicas).display(&settings.wait_timeout.as_millis());
        let answer = connection.call("WAIT", wait, settings.wait_timeout + MARGIN, true).await;
        let confirmed = answer.and_then(Reply::count).map_err(lost)?;
        if confirmed < u64::from(settings.replicas) {
            let wanted = settings.replicas;
            return Err(unconfirmed(format!("{confirmed} of {wanted} replicas have confirmed them within {time}")));
        }
    }
    Ok(())
}

/// Waits until the existing replicas have all writes of this connection, within a time limit.
///
/// Fails if the server is lost meanwhile.
pub(crate) async fn spread(connection: &Connection, settings: &Settings) -> Result<(), Failure> {
    let mut about = Arguments::with_capacity(1);
    about.text("replication");
    let info = match connection.call("INFO", about, settings.command_timeout, false).await {
        Ok(info) => info.text()?,
        // Without permission for INFO there is no wait.
        Err(failure) if failure.kind == StoreErrorKind::Denied => return Ok(()),
        Err(failure) => return Err(failure),
    };
    let connected = info.lines().find_map(|line| line.strip_prefix("connected_slaves:")?.trim().parse::<u8>().ok());
    let replicas = connected.unwrap_or(0).min(settings.replicas);
    if replicas == 0 {
        return Ok(());
    }
    let mut wait = Arguments::with_capacity(2);
    wait.display(&replicas).display(&settings.wait_timeout.as_millis());
    connection.call("WAIT", wait, settings.wait_timeout + MARGIN, true).await?.count().map(drop)
}

async fn disk(connection: &Connection, settings: &Settings) -> Result<DiskSupport, Failure> {
    match wait_for_disk(connection, Duration::from_millis(1)).await {
        Ok(_) => return Ok(DiskSupport::Waits),
        Err(failure) if is_unknown_command(&failure) => {}
        Err(failure) if failure.reason.contains("appendonly is disabled") => {
            return Ok(DiskSupport::Never("its append-only file is off (appendonly yes)".to_owned()));
        }
        Err(failure) => return Err(failure),
    }
    let why = "before Redis 7.2 this requires appendonly yes and appendfsync always";
    let mut get = Arguments::with_capacity(2);
    get.text("GET").text("append*");
    match connection.call("CONFIG", get, settings.command_timeout, false).await {
        Ok(settings) => {
            let mut settings = settings.named()?;
            let mut is = |name: &str, wanted: &str| -> Result<bool, Failure> {
                Ok(settings.find(name).map(Reply::text).transpose()?.as_deref() == Some(wanted))
            };
            let is_always = is("appendonly", "yes")? && is("appendfsync", "always")?;
            Ok(if is_always { DiskSupport::Always } else { DiskSupport::Never(why.to_owned()) })
        }
        Err(failure) if failure.kind == StoreErrorKind::Unavailable => Err(failure),
        Err(_) => Ok(DiskSupport::Never(format!("{why}, and CONFIG GET is not permitted"))),
    }
}

async fn wait_for_disk(connection: &Connection, time: Duration) -> Result<bool, Failure> {
    let mut wait = Arguments::with_capacity(3);
    wait.text("1").text("0").display(&time.as_millis());
    let [local, _replicas] = connection.call("WAITAOF", wait, time + MARGIN, true).await?.tuple()?;
    Ok(local.count()? >= 1)
}

fn is_unknown_command(failure: &Failure) -> bool {
    failure.reason.contains("unknown command")
}
