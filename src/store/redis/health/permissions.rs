//! Checks the user's permissions with commands that change nothing.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::store::StoreErrorKind;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::client::RoutedClient;
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;

/// The time for which complete permissions are not checked again.
const VALID_FOR: Duration = Duration::from_mins(1);

/// Each command of the store and its scripts, with arguments that pass the parser and then fail on `KEY`, a text key.
/// The server checks permissions in between.
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
    // Auxiliary keys of a stream begin with a brace.
    ("GET", &["{KEY}:mark"]),
    // The last one, because other commands would create the key again.
    ("DEL", &["KEY"]),
];

/// The servers at which the user has all permissions, with the time of the check.
#[derive(Debug, Default)]
pub(crate) struct AclCheck(Mutex<HashMap<Address, Instant>>);

impl AclCheck {
    /// Fails with the missing permissions at this server. `key` must hold a text that is not a number.
    pub(crate) async fn check(&self, link: &RoutedClient, server: &Address, key: &[u8]) -> Result<(), Failure> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lock().get(server).is_some_and(|checked_at| checked_at.elapsed() < VALID_FOR) {
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
                    missing.push(acl_rule(command, parts, &key));
                }
                // Such a failure concerns every command.
                Err(failure) if failure.kind == StoreErrorKind::Unavailable => return Err(failure),
                Ok(_) | Err(_) => {}
            }
        }
        if missing.is_empty() {
            lock().insert(server.clone(), Instant::now());
            return Ok(());
        }
        missing.dedup();
        let reason = format!("the user lacks permission for {}; grant it with ACL SETUSER", missing.join(", "));
        Err(Failure::new(StoreErrorKind::Denied, reason))
    }
}

/// Returns the ACL rule that grants a command, such as `+xgroup|create`.
fn acl_rule(command: &str, parts: &[&str], key: &str) -> String {
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
    fn acl_rules_are_ready_for_setuser() {
        assert_eq!(acl_rule("XADD", &["KEY"], "k"), "+xadd");
        assert_eq!(acl_rule("XGROUP", &["CREATE", "KEY"], "k"), "+xgroup|create");
        assert_eq!(acl_rule("GET", &["{KEY}:mark"], "k"), "keys such as `{k}:mark`");
    }
}
