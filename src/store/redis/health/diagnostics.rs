//! Diagnoses the server: version, eviction, persistence, clock.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fred::util::redis_keyslot;
use futures_util::future::join_all;

use crate::store::redis::RedisStore;
use crate::store::redis::net::address::{Address, Topology};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::durability;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::topology::SlotMap;
use crate::store::redis::ops::keys;
use crate::store::{Durability, StoreErrorKind, StoreStatus};

/// The lifetime of the key that is written to check the write path.
const PROBE_KEPT_MS: u32 = 5000;
/// The clock differences, in seconds, that cause a warning.
const CLOCK_STEPS: [u64; 6] = [5, 15, 60, 600, 3600, 86400];
/// The maximum number of keys tried to find one in the slots of each server.
const MAX_PROBES: u32 = 100_000;

/// The diagnosis of one server.
#[derive(Debug, Default, PartialEq, Eq)]
struct ServerReport {
    product: &'static str,
    version: String,
    warnings: Vec<String>,
    clock_ahead_ms: Option<i64>,
    evicted_keys: Option<u64>,
}

impl RedisStore {
    /// Checks that every server with slots takes writes, and collects the warnings.
    pub(crate) async fn probe(&self) -> Result<StoreStatus, Failure> {
        let map = self.servers.map().await?;
        let probes = if self.servers.is_cluster() { probes(&map) } else { sole_probe(&map) };
        let reports = join_all(probes.into_iter().map(|(server, key)| async move {
            let report = self.probe_server(&server, key).await;
            (server, report)
        }));
        let is_cluster = self.servers.is_cluster();
        let mut status = StoreStatus::default();
        let mut names: Vec<String> = Vec::new();
        for (server, report) in reports.await {
            let at_server = |text: String| if is_cluster { format!("{server}: {text}") } else { text };
            let report = report.map_err(|failure| Failure { reason: at_server(failure.reason), ..failure })?;
            let name = format!("{} {}", report.product, report.version);
            if !names.contains(&name) {
                names.push(name);
            }
            status.warnings.extend(report.warnings.into_iter().map(at_server));
            status.clock_ahead_ms = [status.clock_ahead_ms, report.clock_ahead_ms]
                .into_iter()
                .flatten()
                .max_by_key(|ahead| ahead.unsigned_abs());
            if let Some(keys) = report.evicted_keys {
                *status.evicted_keys.get_or_insert(0) += keys;
            }
        }
        let names = names.join(" and ");
        status.description = match &self.settings.topology {
            Topology::Single(_) => names,
            Topology::Sentinel { service, .. } => format!("{names}, the primary of `{service}`"),
            Topology::Cluster(_) => {
                if map.uncovered() > 0 {
                    let uncovered = map.uncovered();
                    status.warnings.push(format!("{uncovered} of the cluster's 16384 slots have no server"));
                }
                format!("{names}, a cluster of {}", map.servers().len())
            }
        };
        Ok(status)
    }

    async fn probe_server(&self, server: &Address, key: Bytes) -> Result<ServerReport, Failure> {
        self.publish.up(server).await?;
        let mut arguments = Arguments::with_capacity(4);
        arguments.bytes(key.clone()).text("probe").text("PX").display(&PROBE_KEPT_MS);
        match self.control.call_server(server, "SET", arguments).await {
            // The check of permissions reports all missing ones.
            Err(failure) if failure.kind == StoreErrorKind::Denied => {
                self.permissions.check(&self.control, server, &key).await?;
                return Err(failure);
            }
            answer => answer.map(drop)?,
        }
        self.permissions.check(&self.control, server, &key).await?;
        let asked_at = now_us();
        let info = match self.control.call_server(server, "INFO", Arguments::default()).await {
            Ok(info) => info.text()?,
            // The server takes writes, so it is ready. Only the warnings stay unknown.
            Err(failure) if failure.kind == StoreErrorKind::Denied => {
                let warning = "the user lacks permission for INFO, so version, eviction policy, append-only file and clock \
                               of the server are unknown";
                let warnings = vec![warning.to_owned()];
                return Ok(ServerReport {
                    product: "redis",
                    version: "of unknown version".to_owned(),
                    warnings,
                    ..ServerReport::default()
                });
            }
            Err(failure) => return Err(failure),
        };
        // Subtracts half of the reply time from the clock difference.
        let now = asked_at.zip(now_us()).map(|(before, after)| before.midpoint(after));
        diagnose(&info, now, self.settings.allow_eviction)
    }

    /// Checks whether the servers support this durability.
    pub(crate) async fn check_disks(&self, wanted: Durability) -> Result<(), Failure> {
        if !wanted.fsync {
            return Ok(());
        }
        let map = self.servers.map().await?;
        for (server, _) in map.servers() {
            self.publish.up(&server).await?;
            let leased = self.pool.take(&server).await?;
            let checked = durability::prepare(&leased.connection, wanted, &self.settings).await;
            self.pool.release(leased);
            checked?;
        }
        Ok(())
    }
}

fn now_us() -> Option<i64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(now.as_micros()).ok()
}

fn sole_probe(map: &Arc<SlotMap>) -> Vec<(Address, Bytes)> {
    map.servers().into_iter().map(|(server, _)| (server, keys::probe(0))).collect()
}

/// Returns every server with slots, and a key in one of its slots.
fn probes(map: &Arc<SlotMap>) -> Vec<(Address, Bytes)> {
    let mut without: Vec<Address> = map.servers().into_iter().map(|(server, _)| server).collect();
    let mut probes = Vec::with_capacity(without.len());
    for number in 0..MAX_PROBES {
        if without.is_empty() {
            break;
        }
        let key = keys::probe(number);
        let Some(server) = map.server_of(redis_keyslot(&key)) else { continue };
        if let Some(place) = without.iter().position(|other| other == server) {
            probes.push((without.swap_remove(place), key));
        }
    }
    probes.sort();
    probes
}

/// Derives warnings from the text of INFO. Fails if the server is configured so that it would lose data.
fn diagnose(info: &str, now_us: Option<i64>, allow_eviction: bool) -> Result<ServerReport, Failure> {
    let value = |name: &str| {
        info.lines().find_map(|line| line.split_once(':').filter(|(n, _)| *n == name).map(|(_, value)| value.trim()))
    };
    let unsuitable = |reason: String| Err(Failure::new(StoreErrorKind::Unsuitable, reason));
    let (product, version) = match (value("valkey_version"), value("redis_version")) {
        (Some(version), _) => ("valkey", version),
        (None, Some(version)) => ("redis", version),
        (None, None) => ("redis", "of unknown version"),
    };
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    let numbers = (product, parts.next().flatten(), parts.next().flatten());
    let mut warnings = Vec::new();
    if let ("redis", Some(major), Some(minor)) = numbers {
        if (major, minor) < (6, 2) {
            return unsuitable(format!("the server is Redis {version}; it must be 6.2 or newer, or Valkey"));
        }
        if major < 7 {
            warnings.push(format!(
                "the server is Redis {version}: servers before 7.0 do not report the lag of groups, so lag and losses \
                 before delivery are unknown"
            ));
        }
    }
    let policy = value("maxmemory_policy").filter(|policy| *policy != "noeviction");
    if let Some(policy) = policy {
        let loses = if policy.starts_with("allkeys") {
            "drops whole streams and their groups"
        } else {
            "drops idempotency keys, so that repeated events are stored again"
        };
        let words = format!("the server's eviction policy is {policy}: at its memory limit it {loses}");
        if !allow_eviction {
            return unsuitable(format!(
                "{words}; set maxmemory-policy noeviction on the server, or store.redis.allow_eviction = true if that loss \
                 is acceptable"
            ));
        }
        warnings.push(words);
    }
    let evicted_keys = value("evicted_keys").and_then(|keys| keys.parse().ok());
    if evicted_keys.is_some_and(|keys: u64| keys > 0) {
        warnings.push(
            "the server has evicted keys since it started, possibly streams (aurora_bus_store_evicted_keys)".to_owned(),
        );
    }
    if value("aof_enabled") == Some("0") {
        warnings.push(
            "the server's append-only file is off (appendonly no): a crash loses everything since the last snapshot"
                .to_owned(),
        );
    }
    if value("aof_enabled") == Some("1") && value("aof_last_write_status").is_some_and(|status| status != "ok") {
        warnings.push("the server's last write to its append-only file failed; check its disk".to_owned());
    }
    if value("rdb_last_bgsave_status").is_some_and(|status| status != "ok") {
        warnings.push("the server's last snapshot failed; check its disk".to_owned());
    }
    let server_us = value("server_time_usec").and_then(|text| text.parse::<i64>().ok());
    let clock_ahead_ms = now_us.zip(server_us).map(|(now, server)| (server - now) / 1000);
    if let Some(ahead) = clock_ahead_ms
        && let Some(step) = CLOCK_STEPS.into_iter().rfind(|step| ahead.unsigned_abs() > step * 1000)
    {
        let direction = if ahead > 0 { "ahead of" } else { "behind" };
        warnings.push(format!(
            "the server's clock is more than {step} s {direction} this machine's; ids, ages and retention use the \
             server's clock"
        ));
    }
    Ok(ServerReport { product, version: version.to_owned(), warnings, clock_ahead_ms, evicted_keys })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_a_server_cause_warnings() {
        let info = "# Server\r\nredis_version:6.2.1\r\naof_enabled:0\r\nmaxmemory_policy:allkeys-lru\r\n\
                    rdb_last_bgsave_status:err\r\nevicted_keys:5\r\nserver_time_usec:1000000\r\n";
        let report = diagnose(info, Some(20_000_000), true).expect("taken");
        assert_eq!((report.product, report.version.as_str()), ("redis", "6.2.1"));
        assert_eq!((report.clock_ahead_ms, report.evicted_keys), (Some(-19_000), Some(5)));
        let words = ["before 7.0", "allkeys-lru", "evicted", "append-only file is off", "snapshot", "15 s behind"];
        for (warning, words) in report.warnings.iter().zip(words) {
            assert!(warning.contains(words), "{warning}");
        }
        assert_eq!(report.warnings.len(), words.len(), "{:?}", report.warnings);
    }

    #[test]
    fn servers_that_would_lose_data_are_refused() {
        let cases = [
            ("redis_version:7.0.15\r\nmaxmemory_policy:allkeys-lru\r\n", "noeviction"),
            ("valkey_version:9.1.2\r\nmaxmemory_policy:volatile-ttl\r\n", "store.redis.allow_eviction"),
            ("redis_version:6.0.16\r\nmaxmemory_policy:noeviction\r\n", "6.2 or newer"),
        ];
        for (info, words) in cases {
            let failure = diagnose(info, None, false).expect_err(info);
            assert_eq!(failure.kind, StoreErrorKind::Unsuitable);
            assert!(failure.reason.contains(words), "{}", failure.reason);
        }
    }

    #[test]
    fn healthy_valkey_has_no_warnings() {
        let info = "server_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:9.1.2\r\naof_enabled:1\r\n\
                    aof_last_write_status:ok\r\nmaxmemory_policy:noeviction\r\nevicted_keys:0\r\n\
                    server_time_usec:5000000\r\n";
        let report = diagnose(info, Some(4_000_000), false).expect("sound");
        assert_eq!((report.product, report.version.as_str()), ("valkey", "9.1.2"));
        assert_eq!(report.warnings, Vec::<String>::new());
        assert_eq!(report.clock_ahead_ms, Some(1000));
    }
}
