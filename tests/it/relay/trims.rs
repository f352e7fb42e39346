//! Entries that are trimmed before the relay has read them.

use std::sync::Arc;

use aurora_bus::store::{self, Store as _, Trim};
use futures_util::SinkExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::histories::TestStore;
use super::server::{Client, Server, alerts, publish};
use super::store::FaultyStore;
use super::{config, number, numbered, tiny_ring};
use crate::support::redis::{Product, RedisServer};

/// The number of alerts that all clients see, and the number at the end.
const SEEN: usize = 5;
const ALL: usize = 1005;

async fn frame(client: &mut Client) -> Value {
    serde_json::from_str(&client.text().await).expect("a JSON frame")
}

/// Returns a live client in rich mode.
async fn rich(server: &Server, terms: Value) -> Client {
    let mut client = server.connect("alerts?v=1").await;
    let mut request = json!({"op": "subscribe", "id": 1, "stream": alerts().as_str()});
    request.as_object_mut().expect("an object").extend(terms.as_object().expect("an object").clone());
    client.socket.send(Message::text(request.to_string())).await.expect("sent");
    while frame(&mut client).await["t"] != "live" {}
    client
}

/// Checks that live clients learn the exact bounds of entries that are trimmed while the store is away.
async fn check_gap_after_trim(test_store: TestStore) {
    let store = test_store.fresh().await;
    let server = Server::start(store.clone(), config()).await;
    let mut plain = server.connect("alerts").await;
    let (mut live, mut strict) = (rich(&server, json!({})).await, rich(&server, json!({"strict": true})).await);
    publish(&*store, &alerts(), numbered(0..SEEN)).await;
    assert_eq!(plain.texts(SEEN).await, numbered(0..SEEN).collect::<Vec<_>>());
    let mut last = Value::Null;
    for _ in 0..SEEN {
        last = frame(&mut live).await["p"].take();
    }

    let is_out = || server.readiness.report().iter().all(|part| part.reason.is_some());
    store.set_unavailable(true);
    server.until("the outage is noticed", is_out).await;
    let others = store.inner_store();
    for first in (SEEN..ALL).step_by(100) {
        publish(&*others, &alerts(), numbered(first..first + 100)).await;
    }
    others.trim(&alerts(), Trim::ToLength(150)).await.expect("trimmed");
    let oldest = others.describe(&alerts()).await.expect("described").expect("it exists").first_id.expect("some");
    store.set_unavailable(false);

    let gap = frame(&mut live).await;
    assert_eq!((&gap["t"], &gap["reason"], &gap["after"]), (&json!("gap"), &json!("trimmed"), &last), "{gap}");
    let before = gap["before"].as_str().expect("a position");
    assert!(before.ends_with(&format!(":{oldest}")), "{gap}, but there is {oldest}");
    let event = frame(&mut live).await;
    assert_eq!((&event["t"], &event["p"]), (&json!("event"), &gap["before"]));
    let first = number(&plain.text().await);
    assert!(first > SEEN && event["d"]["n"] == first, "{event}");
    let rest = plain.texts(ALL - first - 1).await;
    assert!(rest.iter().map(|text| number(text)).eq(first + 1..ALL), "all entries that are left");
    assert_eq!(strict.close().await.1, 4002);
    assert_eq!(server.gaps("trimmed"), 3 + 1, "for each client, and for the channel");

    // Trimmed entries that all clients have seen are not missing, so there is no further gap.
    server.until("the relay has recovered", || !is_out()).await;
    store.set_unavailable(true);
    server.until("the outage is noticed", is_out).await;
    others.trim(&alerts(), Trim::ToLength(0)).await.expect("trimmed");
    let left = others.describe(&alerts()).await.expect("described").expect("it exists").length;
    publish(&*others, &alerts(), numbered(2000..2100)).await;
    others.trim(&alerts(), Trim::ToLength(100)).await.expect("trimmed");
    store.set_unavailable(false);
    assert_eq!(number(&plain.text().await), 2000, "{left} were left");
    assert_eq!(server.gaps("trimmed"), 3 + 1);
}

#[tokio::test]
async fn live_client_receives_gap_after_trim_embedded() {
    check_gap_after_trim(TestStore::Embedded).await;
}

#[tokio::test]
async fn live_client_receives_gap_after_trim_redis() {
    check_gap_after_trim(TestStore::Redis(RedisServer::start(Product::Redis, &[]).await)).await;
}

#[tokio::test]
async fn live_client_receives_gap_after_trim_valkey() {
    check_gap_after_trim(TestStore::Redis(RedisServer::start(Product::Valkey, &[]).await)).await;
}

#[tokio::test]
async fn resume_from_zero_reports_an_unnoticed_loss() {
    let store = FaultyStore::open().await;
    let server = Server::start(store.clone(), tiny_ring()).await;
    for first in [0, 5] {
        let published = server.publish(&alerts(), numbered(first..first + 5)).await;
        server.until_relayed(&alerts(), &published).await;
    }
    let epoch = store.epoch(&alerts()).await.expect("an epoch");
    store.lose_all_data().await;
    let mut client = server.connect("alerts?v=1").await;
    let request = json!({"op": "subscribe", "id": 1, "stream": alerts().as_str(), "since": format!("{epoch}:0-0")});
    client.socket.send(Message::text(request.to_string())).await.expect("sent");
    let mut answer = frame(&mut client).await;
    while answer["t"] == "welcome" {
        answer = frame(&mut client).await;
    }
    assert_eq!((&answer["t"], &answer["recovered"]), (&json!("subscribed"), &json!(false)), "{answer}");
    assert_eq!(frame(&mut client).await["t"], "gap");
}

#[tokio::test]
async fn restored_older_data_is_not_sent_again() {
    let redis = RedisServer::start(Product::Redis, &[]).await;
    let config_of = store::redis::Config { url: redis.url().into(), ..store::redis::Config::default() };
    let store = FaultyStore::around(Arc::new(config_of.connect().await.expect("a valid configuration")));
    let server = Server::start(store.clone(), config()).await;
    let mut plain = server.connect("alerts").await;
    let mut live = rich(&server, json!({})).await;
    publish(&*store, &alerts(), numbered(0..10)).await;
    redis.cli(&["COPY", alerts().as_str(), "{aurora:alerts}:older"]);
    publish(&*store, &alerts(), numbered(10..20)).await;
    assert_eq!(plain.texts(20).await, numbered(0..20).collect::<Vec<_>>());
    for n in 0..20 {
        assert_eq!(frame(&mut live).await["d"]["n"], n);
    }

    let is_out = || server.readiness.report().iter().all(|part| part.reason.is_some());
    store.set_unavailable(true);
    server.until("the outage is noticed", is_out).await;
    redis.cli(&["COPY", "{aurora:alerts}:older", alerts().as_str(), "REPLACE"]);
    store.set_unavailable(false);
    server.until("the loss is noticed", || server.gaps("state_lost") > 0).await;
    publish(&*store, &alerts(), numbered(20..25)).await;
    assert_eq!(plain.texts(5).await, numbered(20..25).collect::<Vec<_>>());
    let gap = frame(&mut live).await;
    assert_eq!((&gap["t"], &gap["reason"]), (&json!("gap"), &json!("state_lost")));
    for n in 20..25 {
        assert_eq!(frame(&mut live).await["d"]["n"], n);
    }
}
