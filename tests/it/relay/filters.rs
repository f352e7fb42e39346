//! Filters on alerts of any shape, and filters that are replaced during a snapshot.

use futures_util::SinkExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::server::{Server, alerts};
use super::store::FaultyStore;
use super::{config, tiny_ring};

#[tokio::test]
async fn snapshot_uses_the_filter_replaced_during_the_read() {
    let store = FaultyStore::open().await;
    let server = Server::start(store.clone(), tiny_ring()).await;
    let severity = |n: usize| if n.is_multiple_of(10) { "high" } else { "low" };
    let alert = |n: usize| json!({"n": n, "severity": severity(n)}).to_string();
    // The ring has only the last entry.
    for numbers in [0..100, 100..101] {
        let published = server.publish(&alerts(), numbers.map(alert)).await;
        server.until_relayed(&alerts(), &published).await;
    }
    let mut client = server.connect("alerts?v=1").await;
    let mut ask = async |request: Value| {
        client.socket.send(Message::text(request.to_string())).await.expect("sent");
    };
    store.set_unavailable(true);
    let reads = server.metrics.relay_store_reads.get();
    ask(json!({"op": "subscribe", "id": 1, "stream": "aurora:alerts", "snapshot": 5})).await;
    server.until("the snapshot is being read", || server.metrics.relay_store_reads.get() > reads).await;
    ask(json!({"op": "filter", "id": 2, "stream": "aurora:alerts", "filter": {"key": "severity", "cmp": "eq", "val": "high"}}))
        .await;
    let mut frames = Vec::new();
    while frames.last().is_none_or(|frame: &Value| frame["t"] != "live") {
        frames.push(serde_json::from_str(&client.text().await).expect("a JSON frame"));
        // After the new filter is confirmed.
        store.set_unavailable(false);
    }
    let numbers: Vec<u64> = frames.iter().filter_map(|frame| frame["d"]["n"].as_u64()).collect();
    assert_eq!(numbers, [60, 70, 80, 90, 100], "{frames:?}");
}

#[tokio::test]
async fn filter_matches_alerts_of_every_shape() {
    let shapes = [
        json!({
            "class_uid": 2004, "class_name": "Detection Finding", "category_name": "Findings", "severity_id": 5,
            "finding_info": {"title": "Modbus write", "attacks": [{"technique": {"uid": "T0855"}}]},
            "metadata": {"tenant_uid": "acme", "product": {"name": "OT Sensor"}},
        }),
        json!({
            "event_type": "alert", "alert": {
                "signature": "Modbus write", "category": "ICS", "severity": 1, "metadata": {"mitre_technique_id": ["T0855"]},
            },
        }),
        json!({
            "severity": "critical", "title": "Modbus write", "source": "zeek", "category": "cps", "tenant": "acme",
            "mitre_techniques": ["T0855"],
        }),
        json!({"ts": 950_988_235.15, "name": "fragment_overlap", "notice": false, "peer": "zeek"}),
    ];
    let shapes: Vec<String> = shapes.iter().map(Value::to_string).collect();
    let exists = |key: &str| {
        let filter = json!({"key": key, "cmp": "exists"}).to_string();
        url::form_urlencoded::Serializer::new(String::new()).append_pair("filter", &filter).finish()
    };
    let server = Server::start(FaultyStore::open().await, config()).await;
    let queries: [(String, &[usize]); 10] = [
        ("technique=T0855".to_owned(), &[0, 1, 2]),
        ("min_severity=critical".to_owned(), &[0, 1, 2]),
        (exists("title"), &[0, 1, 2]),
        (exists("source"), &[0, 1, 2]),
        (exists("category"), &[0, 1, 2]),
        ("source=OT%20Sensor".to_owned(), &[0]),
        ("category=ICS".to_owned(), &[1]),
        ("category=cps".to_owned(), &[2]),
        ("tenant=acme".to_owned(), &[0, 2]),
        ("since=earliest".to_owned(), &[0, 1, 2, 3]),
    ];
    let mut live = Vec::new();
    for (query, passing) in &queries {
        live.push((server.connect(&format!("alerts?{query}")).await, query, passing));
    }
    // The last alert passes every filter, so nothing else may come before it.
    let last = json!({
        "severity": "critical", "title": "last", "source": "OT Sensor", "category": "ICS", "tenant": "acme",
        "mitre_techniques": ["T0855"],
    })
    .to_string();
    server.publish(&alerts(), shapes.iter().cloned().chain([last.clone()])).await;
    for (client, query, passing) in &mut live {
        let mut expected: Vec<&str> = passing.iter().filter_map(|n| shapes.get(*n)).map(String::as_str).collect();
        if *query != "category=cps" {
            expected.push(&last);
        }
        assert_eq!(client.texts(expected.len()).await, expected, "{query}");
    }
}
