//! Whether the user may do what the store does, asked by commands that change nothing.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::store::StoreErrorKind;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::client::Link;
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;

/// For how long rights that are all there are believed to stay.
const BELIEVED: Duration = Duration::from_mins(1);

/// Each command that the store or one of its scripts uses, with arguments that pass the server's first look and then
/// do nothing to `KEY`, which holds a text. Rights are checked between the two.
const COMMANDS: [(&str, &[&str]); 36] = [
    ("EVALSHA", &["0000000000000000000000000000000000000000", "1", "KEY"]),
    ("EXISTS", &["KEY"]),
    ("GET", &["KEY"]),
    ("HDEL", &["KEY", "f"]),
    ("HEXISTS", &["KEY", "f"]),
    ("HGET", &["KEY", "f"]),
    ("HGETALL", &["KEY"]),
    ("HINCRBY", &["KEY", "f", "none"]),
    ("HMGET", &["KEY", "f"]),
    ("HSET", &["KEY", "f", "v", "g"]),
    ("HSETNX", &["KEY", "f", "v"]),
    ("INCR", &["KEY"]),
    ("PEXPIRE", &["KEY", "none"]),
    ("PTTL", &["KEY"]),
    ("SCRIPT", &["LOAD", "return 0"]),
    ("SET", &["KEY", "1", "NX", "XX"]),
    ("TIME", &[]),
    ("XACK", &["KEY", "g", "0-1"]),
    ("XADD", &["KEY", "NOMKSTREAM", "*", "f"]),
    ("XCLAIM", &["KEY", "g", "c", "1", "0-1"]),
    ("XDEL", &["KEY", "0-1"]),
    ("XGROUP", &["CREATE", "KEY", "g", "$"]),
    ("XGROUP", &["DELCONSUMER", "KEY", "g", "c"]),
    ("XINFO", &["CONSUMERS", "KEY", "g"]),
    ("XINFO", &["GROUPS", "KEY"]),
    ("XINFO", &["STREAM", "KEY"]),
    ("XLEN", &["KEY"]),
    ("XPENDING", &["KEY", "g"]),
    ("XRANGE", &["KEY", "-", "+", "COUNT", "1"]),
    ("XREAD", &["COUNT", "1", "STREAMS", "KEY", "0"]),
    ("XREADGROUP", &["GROUP", "g", "c", "COUNT", "1", "STREAMS", "KEY", ">"]),
    ("XREVRANGE", &["KEY", "+", "-", "COUNT", "1"]),
    ("XTRIM", &["KEY", "MAXLEN", "1"]),
    ("PING", &[]),
    // Keys beside a stream begin with a brace.
    ("GET", &["{KEY}:mark"]),
    // The last, for others would make the key anew.
    ("DEL", &["KEY"]),
];

/// What is known of the user's rights at each server.
#[derive(Debug, Default)]
pub(crate) struct Rights(Mutex<HashMap<Address, Instant>>);

impl Rights {
    /// Fails with what the user may not do at this server. `key` has just been given a text that is no number, unless that
    /// is what the user may not do.
    pub(crate) async fn check(&self, link: &Link, server: &Address, key: &[u8]) -> Result<(), Failure> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().get(server).is_some_and(|checked_at| checked_at.elapsed() < BELIEVED) {
            return Ok(());
        }
        let key = String::from_utf8_lossy(key);
        let answers = COMMANDS.iter().map(|(command, parts)| {
            let mut arguments = Arguments::with_capacity(parts.len());
            for part in *parts {
                arguments.bytes(part.replace("KEY", &key));
            }
            link.call_server(server, command, arguments)
        });
        let mut missing: Vec<String> = Vec::new();
        for (answer, (command, parts)) in join_all(answers).await.into_iter().zip(COMMANDS) {
            match answer {
                Err(failure) if failure.kind == StoreErrorKind::Denied => {
                    missing.push(shown(command, parts, &key));
                }
                // What concerns every command is told as such.
                Err(failure) if failure.kind == StoreErrorKind::Unavailable => return Err(failure),
                Ok(_) | Err(_) => {}
            }
        }
        if missing.is_empty() {
            lock().insert(server.clone(), Instant::now());
            return Ok(());
        }
        missing.dedup();
        let reason = format!("the user lacks the right to {}: grant it with ACL SETUSER", missing.join(", "));
        Err(Failure::new(StoreErrorKind::Denied, reason))
    }
}

/// A command as rights are written, such as `+xgroup|create`.
fn shown(command: &str, parts: &[&str], key: &str) -> String {
    let command = command.to_lowercase();
    match parts.first() {
        Some(part) if part.starts_with('{') => format!("keys such as `{}`", part.replace("KEY", key)),
        Some(part) if matches!(command.as_str(), "xgroup" | "xinfo" | "script") => {
            format!("+{command}|{}", part.to_lowercase())
        }
        _ => format!("+{command}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_every_script_is_checked() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/redis/lua");
        for file in std::fs::read_dir(folder).expect("the scripts") {
            let path = file.expect("a file").path();
            let text = std::fs::read_to_string(&path).expect("a script");
            for used in text.split("call('").skip(1) {
                let command = used.split('\'').next().expect("a command");
                let is_checked = COMMANDS.iter().any(|(known, _)| *known == command);
                assert!(is_checked, "{}: {command} is not in COMMANDS", path.display());
            }
        }
    }

    #[test]
    fn rights_are_named_as_they_are_granted() {
        assert_eq!(shown("XADD", &["KEY"], "k"), "+xadd");
        assert_eq!(shown("XGROUP", &["CREATE", "KEY"], "k"), "+xgroup|create");
        assert_eq!(shown("GET", &["{KEY}:mark"], "k"), "keys such as `{k}:mark`");
    }
}
