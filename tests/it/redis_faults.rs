//! The Redis store during faults of the server and of the network.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{Entry, EntryId, Fields, IdempotencyKey, NewEntry};
use aurora_bus::store::redis::{Config, RedisStore};
use aurora_bus::store::{
    Cursor, MAX_APPEND, Order, Outcome, Range, Settled, Settlement, Start, Store, StoreErrorKind, StreamStatus, Trim,
};
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer, free_port};
use crate::support::until;

const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
/// The longest wait for the store to recover from a fault.
const HEALING: Duration = Duration::from_mins(1);

async fn connect(url: &str) -> RedisStore {
    connect_with(Config { url: url.into(), ..Config::default() }).await
}

async fn connect_with(config: Config) -> RedisStore {
    config.connect().await.expect("a valid configuration")
}

fn keyed(text: &str, key: &str) -> NewEntry {
    let idempotency = IdempotencyKey { key: Bytes::copy_from_slice(key.as_bytes()), window: Duration::from_hours(1) };
    NewEntry { idempotency: Some(idempotency), ..new_entry(text) }
}

/// Appends until the append is accepted. The idempotency key makes the retries safe.
async fn append_until_accepted(store: &RedisStore, cursor: &Cursor, key: &str) -> EntryId {
    until("accepted append", HEALING, async || {
        store.append(&cursor.stream, vec![keyed(key, key)]).await.ok().map(|appended| appended[0].id)
    })
    .await
}

/// Reads the stream after the store has recovered. Its connections recover one by one.
async fn everything(store: &RedisStore, cursor: &Cursor) -> Vec<Entry> {
    until("answer", HEALING, async || store.range(&cursor.stream, EVERYTHING, 1_000_000).await.ok()).await
}

async fn length(store: &RedisStore, cursor: &Cursor) -> usize {
    everything(store, cursor).await.len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_server_fails_fast_and_is_found_later() {
    let port = free_port();
    let begun = Instant::now();
    let store = connect(&format!("redis://127.0.0.1:{port}/0")).await;
    let a = cursor(&unique_stream(), "g", "a");
    let errors = [
        store.append(&a.stream, vec![new_entry("x")]).await.expect_err("no server"),
        store.fetch(&a, 1, Duration::from_secs(2)).await.expect_err("no server"),
        store.tail(&a.stream, EntryId::MIN, 1, Duration::from_secs(2)).await.expect_err("no server"),
        store.check().await.expect_err("no server"),
    ];
    for error in errors {
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("no connection to the server"), "{error}");
    }
    assert!(begun.elapsed() < Duration::from_secs(4), "answered after {:?}", begun.elapsed());

    let _server = RedisServer::start_on(port, Product::Redis, &[]).await;
    until("ready store", HEALING, async || store.check().await.ok()).await;
    store.append(&a.stream, vec![new_entry("x")]).await.expect("appended");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    assert_eq!(store.fetch(&a, 10, Duration::ZERO).await.expect("fetched").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_server_with_aof_keeps_accepted_entries() {
    let mut server = RedisServer::durable().await;
    let store = Arc::new(connect(&server.url()).await);
    let stream = unique_stream();
    let stop = tokio_util::sync::CancellationToken::new();
    let mut publishers = JoinSet::new();
    for publisher in 0..4 {
        let (store, stream, stop) = (Arc::clone(&store), stream.clone(), stop.clone());
        publishers.spawn(async move {
            let mut accepted = Vec::new();
            for number in 0.. {
                if stop.is_cancelled() {
                    break;
                }
                let key = format!("{publisher}-{number}");
                let accept = async {
                    loop {
                        match store.append(&stream, vec![keyed(&key, &key)]).await {
                            Ok(appended) => return appended[0].id,
                            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                        }
                    }
                };
                let id = tokio::time::timeout(HEALING, accept).await.expect("accepted after healing");
                accepted.push((key, id));
            }
            accepted
        });
    }
    let a = cursor(&stream, "g", "a");
    for round in 1..=3 {
        until("appends", HEALING, async || {
            let status: Option<StreamStatus> = store.describe(&stream).await.ok().flatten();
            status.filter(|status| status.length > round * 50).map(drop)
        })
        .await;
        server.crash();
        server.restart().await;
        append_until_accepted(&store, &a, &format!("round-{round}")).await;
    }
    stop.cancel();
    let stored = everything(&store, &a).await;
    let stored: std::collections::HashMap<EntryId, String> =
        stored.iter().map(|entry| (entry.id, entry.fields.text("data").expect("text").to_owned())).collect();
    let mut count = 3;
    for accepted in publishers.join_all().await {
        for (key, id) in accepted {
            // Entries accepted after the read are not in it.
            if let Some(data) = stored.get(&id) {
                assert_eq!(data, &key);
                count += 1;
            } else {
                assert!(stored.keys().all(|known| *known < id), "{key} was accepted as {id} and is lost");
            }
        }
    }
    assert_eq!(count, stored.len(), "entries were stored twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_server_is_unavailable_in_time_and_recovers() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let store =
        connect_with(Config { url: server.url().into(), command_timeout: Duration::from_secs(1), ..Config::default() })
            .await;
    let a = cursor(&unique_stream(), "g", "a");
    append_until_accepted(&store, &a, "before").await;
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    server.signal("STOP");
    let stopped = Instant::now();
    let (append, fetch, check) = tokio::join!(
        store.append(&a.stream, vec![keyed("during", "during")]),
        store.fetch(&a, 1, Duration::from_secs(1)),
        store.check(),
    );
    for error in [append.expect_err("stopped"), fetch.expect_err("stopped"), check.expect_err("stopped")] {
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    }
    assert!(stopped.elapsed() < Duration::from_secs(5), "answered after {:?}", stopped.elapsed());
    server.signal("CONT");
    append_until_accepted(&store, &a, "during").await;
    append_until_accepted(&store, &a, "after").await;
    assert_eq!(length(&store, &a).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_append_reply_makes_no_second_entry() {
    let server = RedisServer::shared(Product::Redis).await;
    let proxy = Proxy::start(server.port()).await;
    let store = connect(&proxy.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    append_until_accepted(&store, &a, "first").await;
    proxy.drop_reply_to(b"lost-reply");
    let error = store.append(&a.stream, vec![keyed("lost-reply", "k")]).await.expect_err("the reply is lost");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    assert_eq!(proxy.dropped(), 1);
    let again =
        until("accepted append", HEALING, async || store.append(&a.stream, vec![keyed("lost-reply", "k")]).await.ok())
            .await;
    assert!(again[0].duplicate);
    assert_eq!(again[0].event_id, "id-lost-reply");
    assert_eq!(length(&store, &a).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_delivery_is_pending_and_can_be_claimed() {
    let server = RedisServer::shared(Product::Valkey).await;
    let proxy = Proxy::start(server.port()).await;
    let store = connect(&proxy.url()).await;
    let a = cursor(&unique_stream(), "lost-delivery", "a");
    let id = append_until_accepted(&store, &a, "x").await;
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    proxy.drop_reply_to(b"XREADGROUP");
    let error = store.fetch(&a, 10, Duration::from_secs(1)).await.expect_err("the reply is lost");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    let pending = store.pending(&a, true, EntryId::MIN, 10).await.expect("listed");
    assert_eq!(pending.iter().map(|one| (one.id, one.attempts)).collect::<Vec<_>>(), [(id, 1)]);
    let claimed = store.claim(&a, &[id], Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries.len(), 1);
    assert_eq!(claimed.deliveries[0].attempt, 2);
    assert!(store.fetch(&a, 10, Duration::ZERO).await.expect("fetched").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_dead_letter_reply_writes_it_once() {
    let server = RedisServer::shared(Product::Redis).await;
    let proxy = Proxy::start(server.port()).await;
    let store = connect(&proxy.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    let to = unique_stream();
    append_until_accepted(&store, &a, "x").await;
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let settlements: Vec<Settlement> = store
        .fetch(&a, 10, Duration::ZERO)
        .await
        .expect("fetched")
        .into_iter()
        .map(|delivery| {
            let mut fields = Fields::default();
            fields.push("reason", "lost-letter");
            Settlement { delivery, outcome: Outcome::DeadLetter { to: to.clone(), fields } }
        })
        .collect();
    // The script is loaded first, so that the reply to its run is lost.
    store.settle(&Cursor { consumer: "b".parse().expect("a name"), ..a.clone() }, &settlements).await.expect("settled");
    proxy.drop_reply_to(b"lost-letter");
    store.settle(&a, &settlements).await.expect_err("the reply is lost");
    let again = until("settled", HEALING, async || store.settle(&a, &settlements).await.ok()).await;
    assert_eq!(again, Settled { settled: 0, not_owned: 1 });
    assert_eq!(store.range(&to, EVERYTHING, 10).await.expect("read").len(), 1);
    assert!(store.pending(&a, false, EntryId::MIN, 10).await.expect("listed").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_dead_letter_leaves_its_entry_pending() {
    let server = RedisServer::shared(Product::Valkey).await;
    let store = connect(&server.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    let to = unique_stream();
    server.cli(&["SET", to.as_str(), "taken"]);
    append_until_accepted(&store, &a, "x").await;
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let delivery = store.fetch(&a, 10, Duration::ZERO).await.expect("fetched").remove(0);
    let mut fields = Fields::default();
    fields.push("reason", "x");
    let settlement = Settlement { delivery, outcome: Outcome::DeadLetter { to: to.clone(), fields } };
    let error = store.settle(&a, &[settlement]).await.expect_err("no stream");
    assert_eq!(error.kind(), StoreErrorKind::WrongType);
    assert!(error.to_string().contains(to.as_str()), "{error}");
    assert_eq!(store.pending(&a, false, EntryId::MIN, 10).await.expect("listed").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn black_hole_connections_are_replaced_in_time() {
    let server = RedisServer::shared(Product::Redis).await;
    let proxy = Proxy::start(server.port()).await;
    let store =
        connect_with(Config { url: proxy.url().into(), command_timeout: Duration::from_secs(1), ..Config::default() })
            .await;
    let a = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let block = Duration::from_millis(500);
    assert!(store.fetch(&a, 10, block).await.expect("fetched").is_empty());
    proxy.black_hole_existing();
    let begun = Instant::now();
    let error = store.fetch(&a, 10, block).await.expect_err("swallowed");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
    append_until_accepted(&store, &a, "x").await;
    let fetched = until("fetched entry", HEALING, async || {
        store.fetch(&a, 10, block).await.ok().filter(|deliveries| !deliveries.is_empty())
    })
    .await;
    assert_eq!(fetched.len(), 1);
    assert!(begun.elapsed() < block + Duration::from_secs(4), "recovered after {:?}", begun.elapsed());
    assert_eq!(length(&store, &a).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_are_replaced() {
    let server = RedisServer::shared(Product::Valkey).await;
    let proxy = Proxy::start(server.port()).await;
    let store = connect(&proxy.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    for round in 0..5 {
        append_until_accepted(&store, &a, &round.to_string()).await;
        proxy.reset();
    }
    proxy.refuse(true);
    proxy.reset();
    until("refusal", HEALING, async || store.check().await.err()).await;
    proxy.refuse(false);
    proxy.delay(Duration::from_millis(30));
    append_until_accepted(&store, &a, "last").await;
    assert_eq!(length(&store, &a).await, 6);
}

/// A reader of a group gets the error that its group is missing, both while it waits and in a new call.
async fn flush_removes_groups(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    let store = Arc::new(connect(&server.url()).await);
    let a = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    for command in [vec!["FLUSHALL"], vec!["DEL", a.stream.as_str()]] {
        let mut blocked = JoinSet::new();
        let (reader, of) = (Arc::clone(&store), a.clone());
        blocked.spawn(async move { reader.fetch(&of, 10, Duration::from_secs(2)).await });
        until("blocked reader", HEALING, async || {
            server.cli(&["INFO", "clients"]).contains("blocked_clients:1").then_some(())
        })
        .await;
        server.cli(&command);
        let error = blocked.join_next().await.expect("a task").expect("no panic").expect_err("the group is missing");
        assert_eq!(error.kind(), StoreErrorKind::NoGroup, "{product:?} {command:?}: {error}");
        let error = store.fetch(&a, 10, Duration::from_secs(2)).await.expect_err("the group is missing");
        assert_eq!(error.kind(), StoreErrorKind::NoGroup, "{product:?} {command:?}: {error}");
        assert!(store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group"));
    }
    append_until_accepted(&store, &a, "x").await;
    assert_eq!(store.fetch(&a, 10, Duration::from_secs(1)).await.expect("fetched").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flush_during_fetch_returns_no_group_on_redis() {
    flush_removes_groups(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flush_during_fetch_returns_no_group_on_valkey() {
    flush_removes_groups(Product::Valkey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_of_wrong_type_affects_its_stream_only() {
    let server = RedisServer::shared(Product::Redis).await;
    let store = connect(&server.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    server.cli(&["SET", a.stream.as_str(), "text"]);
    let wait = Duration::from_millis(10);
    let errors = [
        store.append(&a.stream, vec![new_entry("x")]).await.map(drop),
        store.append(&a.stream, vec![keyed("x", "x")]).await.map(drop),
        store.range(&a.stream, EVERYTHING, 1).await.map(drop),
        store.tail(&a.stream, EntryId::MIN, 1, wait).await.map(drop),
        store.ensure_group(&a.stream, &a.group, Start::Oldest).await.map(drop),
        store.fetch(&a, 1, wait).await.map(drop),
        store.reclaim(&a, wait, EntryId::MIN, 1).await.map(drop),
        store.describe(&a.stream).await.map(drop),
        store.epoch(&a.stream).await.map(drop),
        store.trim(&a.stream, Trim::ToLength(1)).await.map(drop),
        store.discard(&a.stream, &[EntryId::new(1, 1)]).await.map(drop),
    ];
    for (number, outcome) in errors.into_iter().enumerate() {
        let error = outcome.expect_err("no stream");
        assert_eq!(error.kind(), StoreErrorKind::WrongType, "{number}: {error}");
        assert!(error.to_string().contains(a.stream.as_str()), "{error}");
    }
    let other = cursor(&unique_stream(), "g", "a");
    append_until_accepted(&store, &other, "x").await;
    store.check().await.expect("the store is ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_password_is_denied_and_never_shown() {
    let server = RedisServer::start(Product::Redis, &["--requirepass", "right-secret"]).await;
    let url = |password: &str| format!("redis://:{password}@127.0.0.1:{}/0", server.port());
    let stream = unique_stream();
    for store in [connect(&url("wrong-secret")).await, connect(&server.url()).await] {
        let errors = [
            store.check().await.map(drop).expect_err("denied"),
            store.append(&stream, vec![new_entry("x")]).await.map(drop).expect_err("denied"),
            store.tail(&stream, EntryId::MIN, 1, Duration::ZERO).await.map(drop).expect_err("denied"),
        ];
        for error in errors {
            assert_eq!(error.kind(), StoreErrorKind::Denied, "{error}");
            let shown = format!("{error} {error:?} {store:?}");
            assert!(!shown.contains("secret"), "{shown}");
        }
    }
    let store = connect(&url("right-secret")).await;
    store.check().await.expect("the password is right");
    store.append(&stream, vec![new_entry("x")]).await.expect("appended");
    server.cli(&["-a", "right-secret", "CONFIG", "SET", "requirepass", "another"]);
    // Open connections stay open; a new one is refused.
    server.cli(&["-a", "another", "CLIENT", "KILL", "TYPE", "normal"]);
    let error =
        until("refusal", HEALING, async || store.check().await.err().filter(|e| e.kind() == StoreErrorKind::Denied))
            .await;
    assert!(error.to_string().contains("refuses the user name or the password"), "{error}");
    server.cli(&["-a", "another", "CONFIG", "SET", "requirepass", "right-secret"]);
    until("recovery", HEALING, async || store.check().await.ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_server_requires_a_trusted_authority() {
    let server = RedisServer::with_tls(Product::Redis).await;
    let url = format!("rediss://127.0.0.1:{}/0", server.port());
    let config = Config { url: url.as_str().into(), ca_file: Some(server.ca_file()), ..Config::default() };
    let store = connect_with(config).await;
    let a = cursor(&unique_stream(), "g", "a");
    store.check().await.expect("ready");
    store.append(&a.stream, vec![new_entry("x")]).await.expect("appended");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    assert_eq!(store.fetch(&a, 1, Duration::from_secs(1)).await.expect("fetched").len(), 1);

    let stranger = RedisServer::with_tls(Product::Redis).await;
    let config = Config { url: url.as_str().into(), ca_file: Some(stranger.ca_file()), ..Config::default() };
    let error = connect_with(config).await.check().await.expect_err("not trusted");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_server_refuses_appends_and_serves_the_rest() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let store = connect(&server.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    let to = unique_stream();
    for n in 0..10 {
        append_until_accepted(&store, &a, &n.to_string()).await;
    }
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let error = store.append(&a.stream, vec![keyed("new", "new")]).await.expect_err("full");
    assert_eq!(error.kind(), StoreErrorKind::Full, "{error}");
    assert_eq!(store.check().await.expect_err("full").kind(), StoreErrorKind::Full);
    let known = store.append(&a.stream, vec![keyed("3", "3")]).await.expect("a known key needs no room");
    assert!(known[0].duplicate);
    let mut delivered = store.fetch(&a, 10, Duration::ZERO).await.expect("fetched");
    let mut fields = Fields::default();
    fields.push("reason", "x");
    let letter = Settlement { delivery: delivered.remove(0), outcome: Outcome::DeadLetter { to, fields } };
    assert_eq!(store.settle(&a, &[letter]).await.expect_err("full").kind(), StoreErrorKind::Full);
    let rest: Vec<Settlement> =
        delivered.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge }).collect();
    assert_eq!(store.settle(&a, &rest).await.expect("settled"), Settled { settled: 9, not_owned: 0 });
    assert_eq!(store.pending(&a, false, EntryId::MIN, 10).await.expect("listed").len(), 1);
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    append_until_accepted(&store, &a, "new").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_write_reports_the_reason() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let store = connect(&server.url()).await;
    let stream = unique_stream();
    store.append(&stream, vec![new_entry("x")]).await.expect("appended");

    server.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    let error = store.check().await.expect_err("no replicas");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(error.to_string().contains("too few replicas"), "{error}");
    server.cli(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    store.check().await.expect("ready");

    server.cli(&["REPLICAOF", "127.0.0.1", &free_port().to_string()]);
    let error = until("refusal", HEALING, async || store.append(&stream, vec![new_entry("y")]).await.err()).await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(error.to_string().contains("read-only replica"), "{error}");
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    until("recovery", HEALING, async || store.check().await.ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_are_reloaded_after_script_flush() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    let store = connect(&server.url()).await;
    let stream = unique_stream();
    for _ in 0..3 {
        store.append(&stream, vec![new_entry("x")]).await.expect("appended");
        store.describe(&stream).await.expect("described");
        server.cli(&["SCRIPT", "FLUSH"]);
    }
    assert_eq!(store.describe(&stream).await.expect("described").expect("a stream").length, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn epoch_changes_when_stream_is_recreated() {
    let server = RedisServer::shared(Product::Redis).await;
    let store = connect(&server.url()).await;
    let stream = unique_stream();
    for n in 0..3 {
        store.append(&stream, vec![new_entry(&n.to_string())]).await.expect("appended");
    }
    let first = store.epoch(&stream).await.expect("an epoch");
    store.append(&stream, vec![new_entry("3")]).await.expect("appended");
    assert_eq!(store.epoch(&stream).await.expect("an epoch"), first);
    server.cli(&["DEL", stream.as_str()]);
    store.append(&stream, vec![new_entry("4")]).await.expect("appended");
    let second = store.epoch(&stream).await.expect("an epoch");
    assert_ne!(second, first);
    assert_eq!(store.epoch(&stream).await.expect("an epoch"), second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_appends_share_commands() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let store = Arc::new(connect(&server.url()).await);
    let stream = unique_stream();
    store.append(&stream, vec![new_entry("first")]).await.expect("appended");
    let calls = || -> u64 {
        let stats = server.cli(&["INFO", "commandstats"]);
        let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).expect("scripts ran");
        let count = line.split("calls=").nth(1).and_then(|rest| rest.split(',').next());
        count.expect("a count").parse().expect("a number")
    };
    let before = calls();
    store.append(&stream, (0..MAX_APPEND).map(|n| new_entry(&n.to_string())).collect()).await.expect("appended");
    assert_eq!(calls() - before, 1, "one append is one command");
    let before = calls();
    let mut appends = JoinSet::new();
    for n in 0..2000 {
        let (store, stream) = (Arc::clone(&store), stream.clone());
        appends.spawn(async move { store.append(&stream, vec![new_entry(&n.to_string())]).await.expect("appended") });
    }
    let mut ids: Vec<EntryId> = appends.join_all().await.into_iter().map(|appended| appended[0].id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 2000);
    assert!(calls() - before < 500, "{} commands for 2000 appends", calls() - before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_fetch_does_not_disturb_the_next() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    let store = connect(&server.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    for _ in 0..20 {
        let dropped = tokio::time::timeout(Duration::from_millis(20), store.fetch(&a, 1, Duration::from_secs(5))).await;
        assert!(dropped.is_err(), "there was nothing to fetch");
    }
    let begun = Instant::now();
    assert!(store.fetch(&a, 1, Duration::from_millis(50)).await.expect("fetched").is_empty());
    assert!(begun.elapsed() < Duration::from_secs(3), "waited for the dropped ones: {:?}", begun.elapsed());
    // The connections of the dropped calls are closed: two shared ones, one reader and redis-cli are left.
    until("few connections", HEALING, async || {
        let clients = server.cli(&["INFO", "clients"]);
        clients.lines().any(|line| line.trim() == "connected_clients:4").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_timeout_does_not_shorten_a_long_wait() {
    let server = RedisServer::shared(Product::Redis).await;
    let command_timeout = Duration::from_millis(300);
    let store = connect_with(Config { url: server.url().into(), command_timeout, ..Config::default() }).await;
    let a = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let wait = Duration::from_millis(1200);
    let begun = Instant::now();
    let (fetched, tailed) = tokio::join!(store.fetch(&a, 1, wait), store.tail(&a.stream, EntryId::MIN, 1, wait));
    assert!(fetched.expect("waited").is_empty());
    assert!(tailed.expect("waited").is_empty());
    assert!(begun.elapsed() >= wait);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loading_server_is_unavailable_until_loaded() {
    let options = ["--appendonly", "yes", "--aof-use-rdb-preamble", "no", "--key-load-delay", "150"];
    let mut server = RedisServer::start(Product::Redis, &options).await;
    let store = connect(&server.url()).await;
    let stream = unique_stream();
    store.append(&stream, vec![new_entry("x")]).await.expect("appended");
    server.cli(&["EVAL", "for i = 1, 30000 do redis.call('SET', 'key' .. i, i) end", "0"]);
    server.crash();
    server.restart().await;
    let error = until("loading", HEALING, async || {
        store.check().await.err().filter(|error| error.to_string().contains("loading its data"))
    })
    .await;
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    until("recovery", HEALING, async || store.check().await.ok()).await;
    assert_eq!(store.range(&stream, EVERYTHING, 10).await.expect("read").len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_entries_and_many_fields_are_accepted() {
    let server = RedisServer::shared(Product::Redis).await;
    let store = connect(&server.url()).await;
    let a = cursor(&unique_stream(), "g", "a");
    for n in 0..24 {
        let mut fields = Fields::default();
        fields.push("data", vec![n; 1 << 20]);
        store.append(&a.stream, vec![NewEntry { fields, idempotency: None }]).await.expect("appended");
    }
    let mut fields = Fields::default();
    for n in 0..3500 {
        fields.push(format!("name-{n}"), "");
    }
    store.append(&a.stream, vec![NewEntry { fields, idempotency: None }]).await.expect("appended");
    let read = store.range(&a.stream, EVERYTHING, 100).await.expect("read");
    assert_eq!(read.len(), 25);
    assert_eq!(read[24].fields.len(), 3500);
    let backward = Range { order: Order::Backward, ..EVERYTHING };
    let ids = |entries: &[Entry]| entries.iter().map(|entry| entry.id).collect::<Vec<_>>();
    let mut reversed = ids(&store.range(&a.stream, backward, 100).await.expect("read"));
    reversed.reverse();
    assert_eq!(reversed, ids(&read));
    assert_eq!(ids(&store.range(&a.stream, EVERYTHING, 20).await.expect("read")), ids(&read)[..20]);

    store.ensure_group(&a.stream, &a.group, Start::Oldest).await.expect("a group");
    let mut fetched = Vec::new();
    while fetched.len() < 25 {
        let deliveries = store.fetch(&a, 25, Duration::ZERO).await.expect("fetched");
        assert!((1..=12).contains(&deliveries.len()), "{} of a mebibyte in one reply", deliveries.len());
        fetched.extend(deliveries.into_iter().map(|delivery| delivery.entry.id));
    }
    assert_eq!(fetched, ids(&read));
    let claimed = store.claim(&a, &fetched, Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries.len(), 25);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_server_still_returns_an_epoch() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    let store = connect(&server.url()).await;
    let stream = unique_stream();
    let epoch = store.epoch(&stream).await.expect("an epoch");
    store.append(&stream, vec![new_entry("x")]).await.expect("appended");
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    assert_eq!(store.epoch(&stream).await.expect("an epoch"), epoch);
    let unknown = store.epoch(&unique_stream()).await.expect_err("full");
    assert_eq!(unknown.kind(), StoreErrorKind::Full, "{unknown}");
}
