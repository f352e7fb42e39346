//! Filters that are replaced while their client is given the past.

use futures_util::SinkExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::server::{Server, alerts};
use super::store::Fragile;
use super::tiny_ring;

#[tokio::test]
async fn a_snapshot_is_of_what_passes_the_filter_that_has_come_meanwhile() {
    let store = Fragile::open().await;
    let server = Server::start(store.clone(), tiny_ring()).await;
    let severity = |n: usize| if n.is_multiple_of(10) { "high" } else { "low" };
    let alert = |n: usize| json!({"n": n, "severity": severity(n)}).to_string();
    // The ring has the last one alone.
    for numbers in [0..100, 100..101] {
        let published = server.publish(&alerts(), numbers.map(alert)).await;
        server.until_relayed(&alerts(), &published).await;
    }
    let mut client = server.connect("alerts?v=1").await;
    let mut ask = async |request: Value| {
        client.socket.send(Message::text(request.to_string())).await.expect("sent");
    };
    store.set_away(true);
    let reads = server.metrics.relay_store_reads.get();
    ask(json!({"op": "subscribe", "id": 1, "stream": "aurora:alerts", "snapshot": 5})).await;
    server.until("the snapshot is looked for", || server.metrics.relay_store_reads.get() > reads).await;
    ask(json!({"op": "filter", "id": 2, "stream": "aurora:alerts", "filter": {"key": "severity", "cmp": "eq", "val": "high"}}))
        .await;
    let mut frames = Vec::new();
    while frames.last().is_none_or(|frame: &Value| frame["t"] != "live") {
        frames.push(serde_json::from_str(&client.text().await).expect("a JSON frame"));
        // Once the new filter is confirmed.
        store.set_away(false);
    }
    let numbers: Vec<u64> = frames.iter().filter_map(|frame| frame["d"]["n"].as_u64()).collect();
    assert_eq!(numbers, [60, 70, 80, 90, 100], "{frames:?}");
}
