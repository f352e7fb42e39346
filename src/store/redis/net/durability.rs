//! Waiting until what was appended is on the server's disk, or on its replicas.
//!
//! The server counts what a connection has written, so the same connection must ask, and it can do nothing else while
//! it waits: each append that is waited for has a connection to itself.

use std::time::Duration;

use bytes::Bytes;

use crate::store::redis::config::Settings;
use crate::store::redis::net::connection::{Arguments, Connection};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::ops::keys;
use crate::store::{Durability, StoreErrorKind};

/// What an answer to a wait may take beyond the time that is waited.
const MARGIN: Duration = Duration::from_secs(1);
/// How long the key lives that is written to have something to wait for.
const MARK_KEPT_MS: u32 = 1000;

/// What the server can do to have writes on its disk.
enum Disk {
    /// It can be asked to wait.
    Waits,
    /// Every write is there before it answers.
    Always,
    /// Neither, and why.
    Never(String),
}

/// Whether the server can be as durable as that; to be asked before anything is written.
pub(crate) async fn prepare(connection: &Connection, wanted: Durability, settings: &Settings) -> Result<(), Failure> {
    if !wanted.fsync || connection.reaches_disk.get().is_some() {
        return Ok(());
    }
    match disk(connection, settings).await? {
        Disk::Waits | Disk::Always => {
            connection.reaches_disk.get_or_init(|| ());
            Ok(())
        }
        Disk::Never(why) => {
            let reason = format!("the server can't have it on its disk before it answers (durability fsync): {why}");
            Err(Failure::new(StoreErrorKind::Unsupported, reason))
        }
    }
}

/// Waits until all that this connection has written is as durable as that. The keys are those of the script.
pub(crate) async fn confirm(
    connection: &Connection,
    wanted: Durability,
    keys: &[Bytes],
    is_asking: bool,
    settings: &Settings,
) -> Result<(), Failure> {
    let unconfirmed = |why: String| {
        let reason = format!("the entries are stored, but {why}; to ask again is safe with the same idempotency key");
        Failure::new(StoreErrorKind::NotDurable, reason)
    };
    let lost = |failure: Failure| unconfirmed(format!("it is not known how durably: {}", failure.reason));
    let time = humantime_serde::re::humantime::format_duration(settings.wait_timeout);
    if wanted == Durability::MEMORY {
        return Ok(());
    }
    if let (Some(stream), true) = (keys.first(), keys.len() > 1) {
        // Where all were duplicates this connection has written nothing, and the server would have nothing to wait for.
        let mut mark = Arguments::with_capacity(4);
        mark.bytes(keys::mark(stream)).text("1").text("PX").display(&MARK_KEPT_MS);
        connection.ask(is_asking, "SET", mark, settings.command_timeout, false).await.map_err(lost)?;
    }
    if wanted.fsync {
        match wait_for_disk(connection, settings.wait_timeout).await {
            Ok(true) => {}
            Ok(false) => return Err(unconfirmed(format!("the server has not written them to its disk within {time}"))),
            // Servers that can't be asked were let pass because they write before they answer.
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

/// Waits until replicas have all that this connection has written, as far as there are any and they are not slow.
/// Fails where the server is lost meanwhile.
pub(crate) async fn spread(connection: &Connection, settings: &Settings) -> Result<(), Failure> {
    let mut about = Arguments::with_capacity(1);
    about.text("replication");
    let info = match connection.call("INFO", about, settings.command_timeout, false).await {
        Ok(info) => info.text()?,
        // Who may not ask waits for nobody.
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

async fn disk(connection: &Connection, settings: &Settings) -> Result<Disk, Failure> {
    match wait_for_disk(connection, Duration::from_millis(1)).await {
        Ok(_) => return Ok(Disk::Waits),
        Err(failure) if is_unknown_command(&failure) => {}
        Err(failure) if failure.reason.contains("appendonly is disabled") => {
            return Ok(Disk::Never("its append-only file is off (appendonly yes)".to_owned()));
        }
        Err(failure) => return Err(failure),
    }
    let why = "before Redis 7.2 that takes appendonly yes and appendfsync always";
    let mut get = Arguments::with_capacity(2);
    get.text("GET").text("append*");
    match connection.call("CONFIG", get, settings.command_timeout, false).await {
        Ok(settings) => {
            let mut settings = settings.named()?;
            let mut is = |name: &str, wanted: &str| -> Result<bool, Failure> {
                Ok(settings.find(name).map(Reply::text).transpose()?.as_deref() == Some(wanted))
            };
            let is_always = is("appendonly", "yes")? && is("appendfsync", "always")?;
            Ok(if is_always { Disk::Always } else { Disk::Never(why.to_owned()) })
        }
        Err(failure) if failure.kind == StoreErrorKind::Unavailable => Err(failure),
        Err(_) => Ok(Disk::Never(format!("{why}, and CONFIG GET can't be asked"))),
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
