//! Families of streams on the real binary: members are created on first use, limited, and separate by key.

mod groups;
mod instances;
mod pulled;
mod tokens;

use std::collections::BTreeMap;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::app::{BOUND, Daemon, Home, client, next_text};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const FAMILY: &str = "aurora:tenant:{tenant}:alerts";
/// The family's name in a path.
const FAMILY_PATH: &str = "/api/v1/streams/aurora:tenant:%7Btenant%7D:alerts";

/// Returns the configuration of a relayed family, with more keys of its stream and other sections.
fn config(stream: &str, rest: &str) -> String {
    format!(
        "[relay]\ndrain_window = \"200ms\"\nmax_connections_per_address = 0\n[relay.channels]\ntenant-alerts = \
         [\"{FAMILY}\"]\n[[streams]]\nname = \"{FAMILY}\"\nrelay = true\n{stream}\n{rest}\n"
    )
}

fn on_redis(server: &RedisServer) -> String {
    format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", server.url())
}

fn member(key: &str) -> String {
    format!("aurora:tenant:{key}:alerts")
}

fn event(n: usize) -> String {
    json!({"n": n}).to_string()
}

async fn publish(daemon: &Daemon, key: &str, n: usize) {
    let accepted = daemon.publish(&member(key), &[event(n)]).await;
    assert!(accepted.is_ok(), "{key} {n}: {accepted:?}");
}

/// Publishes to any stream, and returns the status and body.
async fn try_publish(daemon: &Daemon, stream: &str) -> (StatusCode, Value) {
    let url = daemon.url(&format!("/api/v1/streams/{stream}/events"));
    let response = client().post(url).body(event(0)).send().await.expect("an answer");
    (response.status(), response.json().await.unwrap_or(Value::Null))
}

/// Returns the members that the daemon knows.
async fn members(daemon: &Daemon) -> Vec<String> {
    let page: Value = serde_json::from_str(&daemon.get(FAMILY_PATH).await).expect("JSON");
    let streams = page["family"]["streams"].as_array().expect("a list");
    streams.iter().map(|stream| stream.as_str().expect("a name").to_owned()).collect()
}

async fn watch_by_key(daemon: &Daemon, key: &str) -> crate::support::app::Socket {
    daemon.watch(&format!("/api/v1/ws/tenant-alerts?key={key}")).await
}

async fn two_tenants(store: &str) {
    let home = Home::new(&config("[[streams.groups]]\nname = \"siem\"\nsink = \"log\"", store));
    let daemon = home.start().await;
    let (mut acme, mut globex) = (watch_by_key(&daemon, "acme").await, watch_by_key(&daemon, "globex").await);
    for (n, key) in ["acme", "globex", "globex", "acme"].into_iter().enumerate() {
        publish(&daemon, key, n).await;
    }
    assert_eq!([next_text(&mut acme).await, next_text(&mut acme).await], [event(0), event(3)]);
    assert_eq!([next_text(&mut globex).await, next_text(&mut globex).await], [event(1), event(2)]);
    let mut past = daemon.watch("/api/v1/ws/tenant-alerts?key=globex&since=earliest").await;
    assert_eq!([next_text(&mut past).await, next_text(&mut past).await], [event(1), event(2)]);
    let mut newest = daemon.watch(&format!("/api/v1/ws/tenant-alerts?stream={}&snapshot=1", member("acme"))).await;
    assert_eq!(next_text(&mut newest).await, event(3));

    assert_eq!(members(&daemon).await, [member("acme"), member("globex")]);
    assert_eq!(daemon.events(&member("acme")).await.into_values().collect::<Vec<_>>(), [event(0), event(3)]);
    for key in ["acme", "globex"] {
        daemon.handled(&member(key), "siem").await;
    }
    let config = home.path("aurora-bus.toml");
    let config = config.to_str().expect("UTF-8");
    let url = daemon.url("");
    let reconciled = home.run(&["reconcile", "--config", config, "--url", &url, "--json"]);
    let lines: Vec<Value> = serde_json::from_slice(&reconciled.stdout).expect("JSON");
    let published: BTreeMap<_, _> =
        lines.iter().map(|line| (line["stream"].as_str().expect("a name"), &line["published"])).collect();
    let (acme, globex) = (member("acme"), member("globex"));
    assert_eq!(published, [(&*acme, &json!(2)), (&*globex, &json!(2))].into(), "{reconciled:?}");
    assert!(reconciled.status.success(), "{reconciled:?}");
    let tailed =
        home.run(&["tail", &acme, "--config", config, "--url", &url, "--since", "earliest", "--no-follow", "--data"]);
    assert_eq!(String::from_utf8_lossy(&tailed.stdout), format!("{}\n{}\n", event(0), event(3)), "{tailed:?}");

    // Keys must not become labels.
    let metrics = until("the metrics of the family", BOUND, async || {
        let metrics = daemon.get("/metrics").await;
        let is_sampled = metrics.contains(&format!("aurora_bus_stream_length{{stream=\"{FAMILY}\"}} 4"));
        let is_counted = metrics.contains(&format!("aurora_bus_family_members{{stream=\"{FAMILY}\"}} 2"));
        (is_sampled && is_counted).then_some(metrics)
    });
    let metrics = metrics.await;
    assert!(!metrics.contains("acme") && !metrics.contains("globex"), "{metrics}");
    assert!(metrics.contains(&format!("aurora_bus_published_total{{stream=\"{FAMILY}\"}} 4")), "{metrics}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_publish_and_watch_by_key_embedded() {
    two_tenants("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_publish_and_watch_by_key_redis() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    two_tenants(&on_redis(&server)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_keys_share_one_connection_to_redis() {
    const KEYS: usize = 200;
    let server = RedisServer::start(Product::Redis, &[]).await;
    let groups = "[[streams.groups]]\nname = \"siem\"\nsink = \"log\"";
    let home = Home::new(&config(groups, &on_redis(&server)));
    let daemon = home.start().await;
    let connections = || server.cli(&["CLIENT", "LIST"]).lines().count();
    publish(&daemon, "first", 0).await;
    daemon.handled(&member("first"), "siem").await;
    let before = connections();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("k{n}")).collect();
    let mut sockets = join_all(keys.iter().map(|key| watch_by_key(&daemon, key))).await;
    for round in 0..2 {
        for (n, key) in keys.iter().enumerate() {
            publish(&daemon, key, round * KEYS + n).await;
        }
        let mut most = 0;
        for (n, socket) in sockets.iter_mut().enumerate() {
            assert_eq!(next_text(socket).await, event(round * KEYS + n));
            most = most.max(if n % 50 == 0 { connections() } else { 0 });
        }
        // Sockets, keys and groups have no connections of their own.
        assert!(most <= before + 2, "{most} connections, {before} before:\n{}", server.cli(&["CLIENT", "LIST"]));
    }
    let (taken, all) = ("aurora_bus_acknowledged_total", 2 * KEYS as u64 + 1);
    until("all entries handled", BOUND, async || (daemon.metric(taken).await >= all).then_some(())).await;
    for key in keys.iter().step_by(40) {
        daemon.handled(&member(key), "siem").await;
    }
    assert_eq!(members(&daemon).await.len(), KEYS + 1);
    daemon.stop().await;
}

#[tokio::test]
async fn family_at_max_keys_rejects_new_keys() {
    let home = Home::new(&config("max_keys = 2", ""));
    let daemon = home.start().await;
    publish(&daemon, "a", 0).await;
    let mut b = watch_by_key(&daemon, "b").await;
    until("the watched member", BOUND, async || (members(&daemon).await.len() == 2).then_some(())).await;
    for _ in 0..2 {
        let (status, problem) = try_publish(&daemon, &member("c")).await;
        assert_eq!(
            (status, &problem["code"]),
            (StatusCode::INSUFFICIENT_STORAGE, &json!("too_many_keys")),
            "{problem}"
        );
    }
    let feed = daemon.url("/api/v1/feeds/tenant-alerts?key=c");
    let refused = client().get(feed).send().await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::INSUFFICIENT_STORAGE);
    publish(&daemon, "b", 1).await;
    assert_eq!(next_text(&mut b).await, event(1));
    assert_eq!(members(&daemon).await, [member("a"), member("b")]);
    daemon.stop().await;

    let daemon = home.start().await;
    until("the members after the restart", BOUND, async || (members(&daemon).await.len() == 2).then_some(())).await;
    assert_eq!(try_publish(&daemon, &member("c")).await.0, StatusCode::INSUFFICIENT_STORAGE);
    publish(&daemon, "a", 2).await;
    daemon.stop().await;
}

#[tokio::test]
async fn hostile_key_reaches_no_other_stream() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let other = "[[streams]]\nname = \"aurora:alerts\"\n";
    let home = Home::new(&config("", &format!("{other}{}", on_redis(&server))));
    let daemon = home.start().await;
    let before = server.cli(&["KEYS", "*tenant*"]);
    let long = "x".repeat(65);
    let hostile = [
        "",
        "a:b",
        "a%3Ab",
        "~keys",
        "%7Etilde",
        "{tenant}",
        "%7Btenant%7D",
        "{aurora:alerts}",
        "a%7Db",
        "..%2F..",
        "%2e%2e%2f",
        "a%20b",
        "%00",
        "%0a",
        "\u{e9}",
        "*",
        "%2A",
        "a+b",
        "a%25b",
        &long,
    ];
    for key in hostile {
        let (status, problem) = try_publish(&daemon, &member(key)).await;
        assert!(status == StatusCode::NOT_FOUND || status == StatusCode::BAD_REQUEST, "{key:?}: {status} {problem}");
        for path in ["/api/v1/feeds/tenant-alerts?key=", "/api/v1/feeds/tenant-alerts?stream="] {
            let text = if path.ends_with("key=") { key.to_owned() } else { member(key) };
            let status = daemon.status(&format!("{path}{text}")).await;
            assert_eq!(status, Some(StatusCode::BAD_REQUEST), "{path}{text}");
        }
    }
    let missing = daemon.status("/api/v1/feeds/tenant-alerts").await;
    assert_eq!(missing, Some(StatusCode::BAD_REQUEST), "a key is required");
    assert_eq!(members(&daemon).await, [""; 0]);
    assert_eq!(server.cli(&["KEYS", "*tenant*"]), before, "no stream was created");
    // Clients cannot read or write the key index. A stream that was never used reads as an empty one.
    let key_index = "aurora:tenant:~keys:alerts";
    assert_eq!(daemon.status(&format!("/api/v1/streams/{key_index}/events")).await, Some(StatusCode::NOT_FOUND));
    assert_eq!(daemon.events(&member("nobody")).await, BTreeMap::new());
    assert_eq!(members(&daemon).await, [""; 0]);
    daemon.stop().await;
}

#[tokio::test]
async fn members_are_trimmed_by_the_retention_of_their_family() {
    let retention = "retention = { max_len = 20 }\n[[streams.groups]]\nname = \"siem\"\nsink = \"log\"";
    let home = Home::new(&config(retention, ""));
    let daemon = home.start().await;
    for key in ["acme", "globex"] {
        let events: Vec<String> = (0..400).map(event).collect();
        assert_eq!(daemon.publish(&member(key), &events).await.map(|accepted| accepted.len()), Ok(400));
    }
    for key in ["acme", "globex"] {
        until("a trimmed member", BOUND, async || (daemon.events(&member(key)).await.len() <= 120).then_some(())).await;
    }
    daemon.stop().await;
}
