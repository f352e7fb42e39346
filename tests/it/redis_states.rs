//! The daemon's messages and behaviour while its server is in a state that stops or degrades it.

use std::time::{Duration, Instant};

use aurora_bus::event::{DeadLetter, EntryId};
use aurora_bus::store::redis::{Config, RedisStore};
use aurora_bus::store::{Order, Range, Store, StoreErrorKind};
use reqwest::StatusCode;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::store_contract::{cursor, keyed, new_entry, unique_stream};
use crate::support::app::{Daemon, Home};
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer, free_port};
use crate::support::until;

const BOUND: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

async fn connect(url: &str) -> RedisStore {
    let config = Config { url: url.into(), ..Config::default() };
    config.connect().await.expect("a valid configuration")
}

fn home(server: &RedisServer, more: &str) -> Home {
    Home::new(&format!(
        "[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n{more}\n\
         [[streams]]\nname = \"s\"\n[[streams.groups]]\nname = \"g\"\nsink = \"log\"\n",
        server.url()
    ))
}

/// Waits until `/ready` returns 503 and contains these words.
async fn wait_not_ready(daemon: &Daemon, words: &str) {
    let client = crate::support::app::client();
    let mut last = String::new();
    let is_found = tokio::time::timeout(BOUND, async {
        loop {
            let response = client.get(daemon.url("/ready")).send().await.expect("a response");
            let status = response.status();
            last = response.text().await.expect("a body");
            if status == StatusCode::SERVICE_UNAVAILABLE && last.contains(words) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(is_found.await.is_ok(), "/ready does not contain {words:?}: {last}");
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
}

async fn publish(daemon: &Daemon, key: &str) -> u16 {
    let client = crate::support::app::client();
    let request = client.post(daemon.url("/api/v1/streams/s/events")).header("idempotency-key", key);
    request.body(format!(r#"{{"key":"{key}"}}"#)).send().await.expect("a response").status().as_u16()
}

async fn publish_until_accepted(daemon: &Daemon, key: &str) {
    until("accepted event", BOUND, async || (publish(daemon, key).await == 201).then_some(())).await;
}

/// Each state is reported, rejects the affected requests with the right status, and ends with its cause.
async fn every_server_state_is_reported_and_recovers(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    let home = home(&server, "");
    let daemon = home.start().await;
    assert_eq!(publish(&daemon, "first").await, 201);

    let set = |name: &str, value: &str| assert_eq!(server.cli(&["CONFIG", "SET", name, value]), "OK", "{name}");
    let dead = free_port().to_string();
    server.cli(&["REPLICAOF", "127.0.0.1", &dead]);
    let connections = || -> u64 {
        let info = server.cli(&["INFO", "stats"]);
        let line = info.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
        line.expect("a count").trim().parse().expect("a number")
    };
    let (begun, before) = (Instant::now(), connections());
    wait_not_ready(&daemon, "read-only replica").await;
    assert_eq!(publish(&daemon, "readonly").await, 503);
    until("some seconds", BOUND, async || (begun.elapsed() > Duration::from_secs(5)).then_some(())).await;
    let opened = connections() - before;
    assert!(opened <= 10, "{opened} connections in {:?}", begun.elapsed());
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    publish_until_accepted(&daemon, "readonly").await;

    set("min-replicas-to-write", "1");
    wait_not_ready(&daemon, "too few replicas are connected").await;
    assert_eq!(publish(&daemon, "noreplicas").await, 503);
    set("min-replicas-to-write", "0");
    publish_until_accepted(&daemon, "noreplicas").await;

    set("maxmemory", "1");
    wait_not_ready(&daemon, "has reached its memory limit (maxmemory)").await;
    assert_eq!(publish(&daemon, "full").await, 507);
    assert_eq!(publish(&daemon, "first").await, 201, "a known key needs no room");
    set("maxmemory", "0");
    publish_until_accepted(&daemon, "full").await;

    // It cannot save, because the path of its file is a folder.
    let folder = server.cli(&["CONFIG", "GET", "dir"]).lines().last().expect("a folder").to_owned();
    std::fs::create_dir(std::path::Path::new(&folder).join("dump.rdb")).expect("a folder");
    set("save", "1 1");
    set("stop-writes-on-bgsave-error", "yes");
    server.cli(&["BGSAVE"]);
    wait_not_ready(&daemon, "cannot save its data to disk").await;
    assert_eq!(publish(&daemon, "misconf").await, 503);
    set("stop-writes-on-bgsave-error", "no");
    publish_until_accepted(&daemon, "misconf").await;
    set("save", "");
    std::fs::remove_dir(std::path::Path::new(&folder).join("dump.rdb")).expect("an empty folder");

    set("maxmemory-policy", "allkeys-lru");
    wait_not_ready(&daemon, "set maxmemory-policy noeviction").await;
    set("maxmemory-policy", "noeviction");

    set("requirepass", "secret");
    server.cli(&["-a", "secret", "--no-auth-warning", "CLIENT", "KILL", "TYPE", "normal"]);
    wait_not_ready(&daemon, "the server requires a password (store.redis.password)").await;
    assert_eq!(publish(&daemon, "noauth").await, 503);
    server.cli(&["-a", "secret", "--no-auth-warning", "CONFIG", "SET", "requirepass", ""]);
    publish_until_accepted(&daemon, "noauth").await;

    daemon.ready(StatusCode::OK).await;
    daemon.handled("s", "g").await;
    let events = daemon.events("s").await;
    let mut keys: Vec<&str> = events.values().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = ["first", "full", "misconf", "noauth", "noreplicas", "readonly"];
    assert_eq!(keys, expected.map(|key| format!(r#"{{"key":"{key}"}}"#)));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_state_of_redis_is_reported_and_recovers() {
    every_server_state_is_reported_and_recovers(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_state_of_valkey_is_reported_and_recovers() {
    every_server_state_is_reported_and_recovers(Product::Valkey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evicting_server_is_refused_unless_allowed() {
    let server = RedisServer::start(Product::Redis, &["--maxmemory-policy", "allkeys-lru"]).await;
    let strict = home(&server, "");
    let ended = strict.spawn().await.expect_err("refused");
    assert!(ended.log.contains("eviction policy is allkeys-lru"), "{}", ended.log);
    assert!(ended.log.contains("store.redis.allow_eviction"), "{}", ended.log);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    let checked = strict.run(&["check", "--connect", "--config", "aurora-bus.toml"]);
    assert!(!checked.status.success());

    let tolerant = home(&server, "allow_eviction = true");
    let checked = tolerant.run(&["check", "--connect", "--config", "aurora-bus.toml"]);
    let warnings = format!("{}{}", String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success(), "{warnings}");
    assert!(warnings.contains("drops whole streams") && warnings.contains("append-only file is off"), "{warnings}");
    let daemon = tolerant.start().await;
    let limit = "2097152";
    server.cli(&["CONFIG", "SET", "maxmemory", limit]);
    server.cli(&["EVAL", "for i = 1, 20000 do redis.call('SET', 'k' .. i, string.rep('x', 100)) end", "0"]);
    until("evicted keys", BOUND, async || {
        let metrics = daemon.get("/metrics").await;
        let line = metrics.lines().find_map(|line| line.strip_prefix("aurora_bus_store_evicted_keys "))?;
        (line != "0").then_some(())
    })
    .await;
    assert!(daemon.get("/metrics").await.contains("aurora_bus_store_clock_ahead_seconds "));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_permissions_are_named() {
    for product in [Product::Redis, Product::Valkey] {
        let server = RedisServer::start(product, &[]).await;
        let rules = ["on", ">pw", "~aurora:*", "~{aurora:*", "+@all", "-@admin", "-@dangerous", "+info"];
        assert_eq!(server.cli(&[&["ACL", "SETUSER", "bus"][..], &rules].concat()), "OK");
        let url = format!("redis://bus:pw@127.0.0.1:{}/0", server.port());
        let store = connect(&url).await;
        store.check().await.expect("enough rights");
        let a = cursor(&"aurora:alerts".parse().expect("a name"), "g", "a");
        store.append(&a.stream, vec![keyed("x", "x", HOUR)]).await.expect("appended");

        server.cli(&["ACL", "SETUSER", "bus", "-xadd", "-xgroup"]);
        let error = store.append(&a.stream, vec![new_entry("x")]).await.expect_err("no right");
        assert_eq!(error.kind(), StoreErrorKind::Denied, "{error}");
        // A new store has not seen the sufficient permissions.
        let store = connect(&url).await;
        let error = store.check().await.expect_err("no right");
        assert_eq!(error.kind(), StoreErrorKind::Denied, "{error}");
        let words = "lacks permission for +xadd, +xgroup|create, +xgroup|delconsumer; grant it";
        assert!(error.to_string().contains(words), "{error}");
        server.cli(&["ACL", "SETUSER", "bus", "+xadd", "+xgroup", "-info", "resetkeys", "~aurora:*"]);
        let error = store.check().await.expect_err("no right");
        assert!(error.to_string().contains("keys such as `{aurora:bus:probe}:mark`"), "{error}");
        server.cli(&["ACL", "SETUSER", "bus", "~{aurora:*"]);
        let status = store.check().await.expect("enough rights");
        assert!(status.warnings.iter().any(|warning| warning.contains("INFO")), "{:?}", status.warnings);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_host_name_is_reported() {
    let error = connect("redis://no-such-host.invalid:6379").await.check().await.expect_err("no such host");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    let text = error.to_string();
    assert!(text.contains("its name cannot be resolved; check the host in store.redis.url"), "{text}");
    assert!(!text.contains("Custom"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconnects_to_full_or_absent_server_are_limited() {
    const STORES: usize = 20;
    // Connections per store and second, averaged, after the pauses have grown.
    const PER_SECOND: usize = 2;
    let mut server = RedisServer::start(Product::Redis, &[]).await;
    let proxy = Proxy::start(server.port()).await;
    // Connected while the server still has room.
    let mut operator = TcpStream::connect(("127.0.0.1", server.port())).await.expect("a connection");
    assert_eq!(server.cli(&["CONFIG", "SET", "maxclients", "10"]), "OK");
    let mut stores = Vec::new();
    for _ in 0..STORES {
        stores.push(connect(&proxy.url()).await);
    }
    let stream = unique_stream();
    let mut refused = 0;
    for store in &stores {
        if let Err(error) = store.append(&stream, vec![new_entry("x")]).await {
            assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
            refused += 1;
        }
    }
    assert!(refused >= STORES / 2, "{refused} of {STORES} were refused");
    let error = until("refusal", BOUND, async || {
        for store in &stores {
            if let Err(error) = store.check().await
                && error.to_string().contains("too many clients (maxclients)")
            {
                return Some(error);
            }
        }
        None
    })
    .await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    let seconds_later = async |seconds: f64| {
        let begun = Instant::now();
        until("later time", BOUND, async || (begun.elapsed().as_secs_f64() > seconds).then_some(())).await;
        proxy.connections()
    };
    let is_room_for_all = async || {
        until("room for all", BOUND, async || {
            for store in &stores {
                store.check().await.ok()?;
            }
            Some(())
        })
        .await;
    };
    let asks_rarely = async || {
        let before = seconds_later(2.0).await;
        let attempts = usize::try_from(seconds_later(3.0).await - before).expect("few");
        assert!(attempts <= STORES * PER_SECOND * 3, "{attempts} connections in 3 s by {STORES} stores");
    };
    asks_rarely().await;
    operator.write_all(b"CONFIG SET maxclients 1000\r\n").await.expect("sent");
    is_room_for_all().await;

    server.crash();
    asks_rarely().await;
    server.restart().await;
    is_room_for_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_entry_with_many_fields_is_dead_lettered_whole() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let home = home(&server, "");
    let daemon = home.start().await;
    let fields: Vec<String> = (0..5000).flat_map(|n| [format!("name{n}"), format!("value{n}")]).collect();
    let mut command = vec!["XADD", "s", "*"];
    command.extend(fields.iter().map(String::as_str));
    let id = server.cli(&command);
    assert!(id.contains('-'), "{id}");
    assert_eq!(publish(&daemon, "next").await, 201);
    daemon.handled("s", "g").await;
    let store = connect(&server.url()).await;
    let range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    let entries = store.range(&"s:dead_letter".parse().expect("a name"), range, 10).await.expect("read");
    assert_eq!(entries.len(), 1);
    let dead_letter = DeadLetter::from_entry(&entries[0]).expect("a dead letter");
    assert_eq!(dead_letter.id.to_string(), id);
    let kept = dead_letter.fields.iter().flat_map(|(name, value)| [name, value]);
    assert!(kept.eq(fields.iter().map(String::as_bytes)), "not byte for byte");
}
