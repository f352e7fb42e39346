//! The priority lane: critical alerts for clients that are far behind.

use std::collections::BTreeSet;

use aurora_bus::relay::Config;
use bytesize::ByteSize;
use futures_util::SinkExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::server::{Client, Server, alerts};
use super::store::FaultyStore;
use super::{config, member};

const LOWS: usize = 10_000;

fn alert(n: usize, severity: &str) -> String {
    format!(r#"{{"n":{n},"severity":"{severity}","tenant":"{}","pad":"{}"}}"#, ["a", "b"][n % 2], "x".repeat(200))
}

fn small_ring() -> Config {
    Config { ring_bytes: ByteSize::kib(512), max_lag_bytes: ByteSize::gib(1), ..config() }
}

/// Returns a client that reads nothing while ten thousand alerts come that are not critical, and then two critical
/// ones, one of each tenant.
async fn behind(server: &Server, target: &str, subscribe: Option<Value>) -> Client {
    let mut client = server.connect_slow(target).await;
    if let Some(request) = subscribe {
        client.socket.send(Message::text(request.to_string())).await.expect("sent");
        while frame(&mut client).await["t"] != "live" {}
    }
    let mut reader = server.connect("alerts").await;
    for first in (0..LOWS).step_by(1000) {
        server.publish(&alerts(), (first..first + 1000).map(|n| alert(n, "low"))).await;
        reader.texts(1000).await;
    }
    let critical = [LOWS, LOWS + 1].map(|n| alert(n, "critical"));
    let published = server.publish(&alerts(), critical).await;
    server.until_relayed(&alerts(), &published).await;
    client
}

async fn frame(client: &mut Client) -> Value {
    serde_json::from_str(&client.text().await).expect("JSON")
}

fn number(alert: &Value) -> usize {
    usize::try_from(alert["n"].as_u64().expect("a number")).expect("small")
}

#[tokio::test]
async fn critical_alert_overtakes_ten_thousand_others_once() {
    let server = Server::start(FaultyStore::open().await, small_ring()).await;
    let mut client = behind(&server, "alerts?v=1", Some(json!({"op": "subscribe", "stream": "aurora:alerts"}))).await;
    let (mut in_turn, mut early, mut stands) = (Vec::new(), Vec::new(), String::new());
    while in_turn.len() < LOWS {
        let frame = frame(&mut client).await;
        match frame["t"].as_str().expect("a type") {
            "event" if frame["lane"] == "critical" => early.push((in_turn.len(), number(&frame["d"]))),
            "event" => {
                in_turn.push(number(&frame["d"]));
                frame["p"].as_str().expect("a position").clone_into(&mut stands);
            }
            "mark" => assert_eq!(frame["p"], stands, "the position has not moved"),
            other => panic!("unexpected {other}"),
        }
    }
    assert!(in_turn.into_iter().eq(0..LOWS), "all others are in order, without the critical ones");
    let numbers: Vec<usize> = early.iter().map(|(_, n)| *n).collect();
    assert_eq!(numbers, [LOWS, LOWS + 1]);
    // Only bytes that were already in the socket come before.
    assert!(early.iter().all(|(after, _)| *after < 1000), "{early:?}");
    assert_eq!(server.metrics.relay_early.with_label_values(&["alerts"]).get(), 2);
    // The client is live again, so the order is normal.
    server.publish(&alerts(), [alert(LOWS + 2, "critical")]).await;
    let live = frame(&mut client).await;
    assert_eq!((number(&live["d"]), live.get("lane")), (LOWS + 2, None));

    // A client that resumes may receive them again, and knows them by their positions.
    let mut resumed = server.connect("alerts?v=1").await;
    let request = json!({"op": "subscribe", "stream": "aurora:alerts", "since": stands});
    resumed.socket.send(Message::text(request.to_string())).await.expect("sent");
    let mut again = BTreeSet::new();
    while again.len() < 3 {
        let frame = frame(&mut resumed).await;
        if frame["t"] == "event" {
            assert!(again.insert(number(&frame["d"])), "twice on one connection");
        }
    }
    assert!(again.into_iter().eq(LOWS..LOWS + 3));
}

#[tokio::test]
async fn priority_lane_respects_the_filter_of_a_tenant() {
    let server = Server::start(FaultyStore::open().await, small_ring()).await;
    let request = json!({"op": "subscribe", "stream": "aurora:alerts"});
    let mut bound = behind(&server, "alerts?v=1&bound_to=b", Some(request)).await;
    let mut seen = Vec::new();
    while seen.len() <= LOWS / 2 {
        let frame = frame(&mut bound).await;
        if frame["t"] == "event" {
            assert_eq!(frame["d"]["tenant"], "b");
            seen.push((number(&frame["d"]), frame.get("lane").is_some()));
        }
    }
    let early: Vec<usize> = seen.iter().filter(|(_, is_early)| *is_early).map(|(n, _)| *n).collect();
    assert_eq!(early, [LOWS + 1]);
}

#[tokio::test]
async fn priority_lane_in_plain_mode_is_on_request_only() {
    let server = Server::start(FaultyStore::open().await, small_ring()).await;
    let mut client = behind(&server, "alerts?meta=1&lane=critical", None).await;
    let (mut in_turn, mut early) = (Vec::new(), Vec::new());
    while in_turn.len() < LOWS {
        let text = client.text().await;
        let n = number(&serde_json::from_str(&text).expect("JSON"));
        if text.contains(r#""_lane":"critical""#) {
            assert!(member(&text, "_pos").contains(':'));
            early.push(n);
        } else {
            in_turn.push(n);
        }
    }
    assert!(in_turn.into_iter().eq(0..LOWS));
    assert_eq!(early, [LOWS, LOWS + 1]);
    let mut resumed = server.connect("alerts?since=earliest").await;
    for n in 0..LOWS + 2 {
        assert_eq!(number(&serde_json::from_str(&resumed.text().await).expect("JSON")), n, "in order without the lane");
    }
    assert_eq!(server.metrics.relay_early.with_label_values(&["alerts"]).get(), 2);
}
