//! Pull groups of families: each consumer receives the entries of its member, on every kind of store.

use super::*;
use crate::auth::watching::{frame, open, send_frame};
use crate::auth::{Keys, request_as};

/// A family with a pull group. Redeliverers run rarely here, so a quick redelivery comes from a notification.
const GROUP: &str = "max_keys = 3\n[[streams.groups]]\nname = \"agents\"\nclaim_idle = \"10m\"\nmax_deliveries = 3";

/// Starts the store of the entries.
async fn store(product: Option<Product>) -> (Option<RedisServer>, String) {
    match product {
        None => (None, String::new()),
        Some(product) => {
            let server = RedisServer::start(product, &[]).await;
            let store = on_redis(&server);
            (Some(server), store)
        }
    }
}

async fn post(daemon: &Daemon, key: &str, what: &str, body: &Value) -> (StatusCode, Value) {
    daemon.post(&format!("/api/v1/streams/{}/groups/agents/{what}", member(key)), body).await
}

/// Pulls entries, and waits for them for a while.
async fn pull(daemon: &Daemon, key: &str, consumer: &str, lease_ms: u64) -> Value {
    let body = json!({"consumer": consumer, "max": 10, "lease_ms": lease_ms, "wait_ms": 30_000});
    let (status, answer) = post(daemon, key, "pull", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let tasks = answer["deliveries"].as_array().expect("a list");
    assert_eq!(tasks.len(), 1, "{key}: {answer}");
    tasks[0].clone()
}

async fn settle(daemon: &Daemon, key: &str, what: &str, task: &Value, more: Value) -> Value {
    let mut body = json!({"tokens": [task["token"]]});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let (_, answer) = post(daemon, key, what, &body).await;
    answer["results"][0]["status"].clone()
}

async fn consumer_pulls_entries_of_its_member(product: Option<Product>) {
    let (_server, store) = store(product).await;
    let home = Home::new(&config(GROUP, &store));
    let daemon = home.start().await;
    // The first pull creates the member, and receives its entries.
    let (early, ()) = tokio::join!(pull(&daemon, "acme", "agent-1", 300_000), async {
        until("the member", BOUND, async || (members(&daemon).await == [member("acme")]).then_some(())).await;
        publish(&daemon, "acme", 1).await;
    });
    publish(&daemon, "globex", 2).await;
    let other = pull(&daemon, "globex", "agent-1", 300_000).await;
    assert_eq!((&early["data"]["n"], &other["data"]["n"]), (&json!(1), &json!(2)));
    assert_eq!(daemon.metric("aurora_bus_pull_leases").await, 2, "of both members together");

    // A token belongs to its member, and is valid after a restart.
    assert_eq!(settle(&daemon, "globex", "ack", &early, json!({})).await, 409);
    daemon.stop().await;
    let daemon = home.start().await;
    assert_eq!(settle(&daemon, "acme", "ack", &early, json!({})).await, 200);
    daemon.handled(&member("acme"), "agents").await;

    // Entries are redelivered at once after a nack and after the end of their lease.
    assert_eq!(settle(&daemon, "globex", "nack", &other, json!({})).await, 200);
    let second = pull(&daemon, "globex", "agent-2", 300).await;
    let third = pull(&daemon, "globex", "agent-3", 300_000).await;
    assert_eq!((&second["attempt"], &third["attempt"], &third["id"]), (&json!(2), &json!(3), &other["id"]));
    assert_eq!(settle(&daemon, "globex", "ack", &second, json!({})).await, 409);
    assert_eq!(settle(&daemon, "globex", "nack", &third, json!({"reason": "no use"})).await, 200);
    daemon.handled(&member("globex"), "agents").await;
    let letters = daemon.get(&format!("/api/v1/dead-letters/{}", member("globex"))).await;
    let letters: Value = serde_json::from_str(&letters).expect("JSON");
    assert_eq!(letters["dead_letters"][0]["error"], "no use", "{letters}");
    assert_eq!(letters["dead_letters"][0]["attempts"], 3, "{letters}");
    let metrics = daemon.get("/metrics").await;
    assert!(!metrics.contains("acme") && !metrics.contains("globex"), "{metrics}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_pulls_entries_of_its_member_embedded() {
    consumer_pulls_entries_of_its_member(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_pulls_entries_of_its_member_redis() {
    consumer_pulls_entries_of_its_member(Some(Product::Redis)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_pulls_entries_of_its_member_valkey() {
    consumer_pulls_entries_of_its_member(Some(Product::Valkey)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pull_creates_members_up_to_the_limit_and_settle_none() {
    let home = Home::new(&config(GROUP, ""));
    let daemon = home.start().await;
    let strange = json!({"token": "1-0.1.0.00000000.agent-1"});
    for action in ["ack", "nack", "extend"] {
        let (status, problem) = post(&daemon, "acme", action, &json!({"tokens": [strange["token"]]})).await;
        assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("no_such_stream")), "{problem}");
    }
    let body = json!({"consumer": "agent-1", "wait_ms": 0});
    let other = format!("/api/v1/streams/{}/groups/siem/pull", member("acme"));
    let (status, problem) = daemon.post(&other, &body).await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("no_such_group")), "{problem}");
    assert_eq!(members(&daemon).await, [""; 0]);
    for key in ["a", "b", "c", "d"] {
        let (status, answer) = post(&daemon, key, "pull", &body).await;
        let expected = if key == "d" { StatusCode::INSUFFICIENT_STORAGE } else { StatusCode::OK };
        // The group of a new member may not exist yet.
        let is_early = key != "d" && answer["code"] == "group_not_ready";
        assert!(status == expected || is_early, "{key}: {status} {answer}");
    }
    assert_eq!(members(&daemon).await, ["a", "b", "c"].map(member));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_pull_from_members_over_a_websocket() {
    let home = Home::new(&config(GROUP, ""));
    let daemon = home.start().await;
    let rich = [("sec-websocket-protocol", "aurora.v1")];
    let (mut agent, _) = open(&daemon, "tenant-alerts", &rich).await.expect("let in");
    assert_eq!(frame(&mut agent).await["t"], "welcome");
    let mut tokens = Vec::new();
    for (id, key) in ["acme", "globex"].into_iter().enumerate() {
        publish(&daemon, key, id).await;
        send_frame(&mut agent, json!({"op": "pull", "id": id, "stream": member(key), "n": 1})).await;
        assert_eq!(frame(&mut agent).await, json!({"t": "ok", "id": id}));
        let task = frame(&mut agent).await;
        assert_eq!((&task["t"], &task["s"]), (&json!("task"), &json!(member(key))), "{task}");
        tokens.push(task["task"]["token"].clone());
    }
    send_frame(&mut agent, json!({"op": "done", "id": 5, "token": tokens[0]})).await;
    assert_eq!(frame(&mut agent).await, json!({"t": "ok", "id": 5}));
    daemon.handled(&member("acme"), "agents").await;
    // On another socket, a token needs the name of its member.
    let (mut other, _) = open(&daemon, "tenant-alerts", &rich).await.expect("let in");
    frame(&mut other).await;
    send_frame(&mut other, json!({"op": "done", "id": 6, "token": tokens[1]})).await;
    assert_eq!(frame(&mut other).await["code"], 409);
    let done = json!({"op": "done", "id": 7, "token": tokens[1], "stream": member("globex"), "group": "agents"});
    send_frame(&mut other, done).await;
    assert_eq!(frame(&mut other).await, json!({"t": "ok", "id": 7}));
    daemon.handled(&member("globex"), "agents").await;
    daemon.stop().await;
}

#[tokio::test]
async fn restricted_principal_cannot_pull_from_members() {
    let mut keys = Keys::default();
    let acme = keys.add("acme", &["admin"], Some("acme"));
    let home = Home::new(&config(GROUP, &keys.toml));
    let daemon = home.start().await;
    for key in ["acme", "globex"] {
        let path = format!("/api/v1/streams/{}/groups/agents/pull", member(key));
        let (status, problem) = request_as(&daemon, &acme, "POST", &path, r#"{"consumer":"agent-1"}"#).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{problem}");
    }
    assert_eq!(members_known_to(&daemon, &acme).await, json!([]));
    daemon.stop().await;
}

async fn members_known_to(daemon: &Daemon, key: &str) -> Value {
    request_as(daemon, key, "GET", FAMILY_PATH, "").await.1["family"]["streams"].clone()
}
