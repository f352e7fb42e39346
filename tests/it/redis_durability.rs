//! Appends that are confirmed only when they are on disk or on replicas.

use std::pin::pin;
use std::time::Duration;

use aurora_bus::store::redis::{Config, RedisStore};
use aurora_bus::store::{Appended, Durability, Store, StoreError, StoreErrorKind};
use tokio::time::timeout;

use crate::store_contract::{keyed, new_entry, unique_stream};
use crate::support::app::Home;
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const BOUND: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);

/// Returns a store with a short limit for the wait for replicas.
async fn connect(url: &str) -> RedisStore {
    connect_waiting(url, Duration::from_millis(500)).await
}

async fn connect_waiting(url: &str, wait_timeout: Duration) -> RedisStore {
    let config = Config { url: url.into(), wait_timeout, ..Config::default() };
    config.connect().await.expect("a valid configuration")
}

/// A primary and its replica, with a proxy between them.
struct Replicated {
    primary: RedisServer,
    proxy: Proxy,
    replica: RedisServer,
}

impl Replicated {
    async fn start(product: Product) -> Self {
        let primary = RedisServer::start(product, &["--repl-diskless-sync-delay", "0"]).await;
        let proxy = Proxy::start(primary.port()).await;
        let (_, port) = proxy
            .url()
            .trim_end_matches("/0")
            .rsplit_once(':')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .expect("a port");
        let replica = RedisServer::start(product, &["--replicaof", "127.0.0.1", &port]).await;
        let replicated = Self { primary, proxy, replica };
        replicated.wait_linked().await;
        replicated
    }

    async fn wait_linked(&self) {
        until("replica that follows", BOUND, async || {
            self.replica.cli(&["INFO", "replication"]).contains("master_link_status:up").then_some(())
        })
        .await;
    }
}

/// A confirmed replicated append is on the replica. Otherwise it is reported, also when it is repeated.
async fn replicated_append_is_on_the_replica(product: Product) {
    let servers = Replicated::start(product).await;
    // Long enough for a connected replica, also on a busy machine.
    let store = connect_waiting(&servers.primary.url(), Duration::from_secs(4)).await;
    let stream = unique_stream();
    let append = async |key: &str| -> Result<Vec<Appended>, StoreError> {
        store.append_durably(&stream, vec![keyed(key, key, HOUR)], Durability::REPLICATED).await
    };
    let first = append("first").await.expect("replicated");
    assert!(!first[0].duplicate);
    assert_eq!(servers.replica.cli(&["XLEN", stream.as_str()]), "1");

    servers.proxy.black_hole_existing();
    servers.proxy.refuse(true);
    for round in 0..3 {
        // Also on connections that did not write the entries themselves.
        let store = connect(&servers.primary.url()).await;
        for attempt in 0..2 {
            let entries = vec![keyed("second", "second", HOUR)];
            let error = store.append_durably(&stream, entries, Durability::REPLICATED).await.expect_err("cut off");
            assert_eq!(error.kind(), StoreErrorKind::NotDurable, "{error}");
            assert!(error.to_string().contains("the entries are stored, but 0 of 1 replicas"), "{error}");
            assert_eq!(error.stored(), u64::from(round + attempt == 0), "stored by the first attempt");
        }
    }
    assert_eq!(servers.primary.cli(&["XLEN", stream.as_str()]), "2", "stored, and once");
    // An append that waits for its replicas delays no other call.
    let mut slow = pin!(append("third"));
    timeout(Duration::from_millis(100), &mut slow).await.expect_err("cut off");
    tokio::select! {
        biased;
        quick = store.append(&stream, vec![new_entry("quick")]) => drop(quick.expect("appended")),
        _ = &mut slow => panic!("an append waited behind another"),
    }
    assert_eq!(slow.await.expect_err("cut off").kind(), StoreErrorKind::NotDurable);

    servers.proxy.refuse(false);
    servers.proxy.reset();
    servers.wait_linked().await;
    let again = until("replicated append", BOUND, async || append("second").await.ok()).await;
    assert!(again[0].duplicate);
    assert_eq!(servers.replica.cli(&["XLEN", stream.as_str()]), servers.primary.cli(&["XLEN", stream.as_str()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicated_append_is_on_the_replica_of_redis() {
    replicated_append_is_on_the_replica(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicated_append_is_on_the_replica_of_valkey() {
    replicated_append_is_on_the_replica(Product::Valkey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fsync_append_is_on_disk_or_refused_before_storing() {
    let aof = ["--appendonly", "yes"];
    let always = ["--appendonly", "yes", "--appendfsync", "always"];
    let cases: [(Product, &[&str], Option<&str>); 5] = [
        (Product::Valkey, &aof, None),
        (Product::Valkey, &[], Some("append-only file is off")),
        (Product::Redis, &always, None),
        (Product::Redis, &aof, Some("appendfsync always")),
        (Product::Redis, &[], Some("appendfsync always")),
    ];
    for (product, options, refused) in cases {
        let mut server = RedisServer::start(product, options).await;
        let config = Config { url: server.url().into(), ..Config::default() };
        let store = config.connect().await.expect("a valid configuration");
        let stream = unique_stream();
        let outcome = store.append_durably(&stream, vec![new_entry("x")], Durability::FSYNC).await;
        let can = store.check_durability(Durability::FSYNC).await;
        match refused {
            None => {
                outcome.unwrap_or_else(|error| panic!("{product:?} {options:?}: {error}"));
                can.expect("it can");
                server.crash();
                server.restart().await;
                assert_eq!(server.cli(&["XLEN", stream.as_str()]), "1");
            }
            Some(words) => {
                for error in [outcome.expect_err("refused"), can.expect_err("refused")] {
                    assert_eq!(error.kind(), StoreErrorKind::Unsupported, "{error}");
                    assert!(error.to_string().contains(words), "{error}");
                }
                assert_eq!(server.cli(&["EXISTS", stream.as_str()]), "0");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_may_request_more_than_stream_durability() {
    let servers = Replicated::start(Product::Redis).await;
    let home = Home::new(&format!(
        "[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\nwait_timeout = \"300ms\"\n\
         [[streams]]\nname = \"plain\"\n[[streams]]\nname = \"safe\"\ndurability = \"replicated\"\n",
        servers.primary.url()
    ));
    let daemon = home.start().await;
    let client = crate::support::app::client();
    let publish = async |path: &str| {
        let url = daemon.url(&format!("/api/v1/streams/{path}"));
        let request = client.post(url).header("idempotency-key", "k").body(r#"{"a":1}"#);
        let response = request.send().await.expect("a response");
        let retry_after = response.headers().contains_key("retry-after");
        (response.status().as_u16(), retry_after, response.text().await.expect("a body"))
    };
    // A busy replica may be too late. A repeated event is stored and counted once.
    for path in ["safe/events", "plain/events?durability=replicated"] {
        until("replicated event", BOUND, async || (publish(path).await.0 == 201).then_some(())).await;
    }
    let (status, _, body) = publish("plain/events?durability=fsync").await;
    assert_eq!(status, 422, "{body}");
    assert!(body.contains("durability_unsupported") && body.contains("appendfsync always"), "{body}");
    let (status, _, body) = publish("plain/events?durability=most").await;
    assert!(status == 400 && body.contains("fsync+replicated"), "{body}");

    servers.proxy.black_hole_existing();
    for path in ["safe/events", "plain/events?durability=replicated"] {
        let (status, retry_after, body) = publish(path).await;
        assert!(status == 503 && retry_after, "{body}");
        assert!(body.contains("not_durable") && body.contains("the entries are stored"), "{body}");
    }
    assert_eq!(publish("plain/events").await.0, 201);
    // A stored event counts as published, confirmed or not. The first two were confirmed.
    assert_eq!(daemon.metric("aurora_bus_published_total").await, 2);
    let url = daemon.url("/api/v1/streams/safe/events?dedup=id");
    for _ in 0..2 {
        let answer = client.post(&url).body(r#"{"id":"new"}"#).send().await.expect("a response");
        assert_eq!(answer.status(), 503);
        assert_eq!(daemon.metric("aurora_bus_published_total").await, 3);
    }
    servers.proxy.reset();
    servers.wait_linked().await;
    let safe = until("replicated event", BOUND, async || {
        Some(publish("safe/events").await).filter(|(status, ..)| *status == 201)
    })
    .await;
    assert!(safe.2.contains("\"duplicate\":true"), "{}", safe.2);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsupported_stream_durability_stops_the_start() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let stream = "[[streams]]\nname = \"s\"\ndurability = \"fsync\"\n";
    let home = Home::new(&format!("{stream}[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", server.url()));
    let ended = home.spawn().await.expect_err("refused");
    assert!(ended.log.contains("appendfsync always") && ended.log.contains("stream `s`"), "{}", ended.log);
    let home = Home::new(&stream.replace("fsync", "replicated"));
    let ended = home.spawn().await.expect_err("refused");
    assert!(ended.log.contains("streams[0].durability: the embedded store has no replicas"), "{}", ended.log);
}
