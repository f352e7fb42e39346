//! The limits of clients.

use std::time::Duration;

use aurora_bus::relay::Config;
use bytesize::ByteSize;
use futures_util::SinkExt as _;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use super::config;
use super::server::{Server, alerts};
use super::store::FaultyStore;

fn padded(n: usize) -> String {
    format!(r#"{{"n":{n:05},"pad":"{}"}}"#, "x".repeat(4000))
}

#[tokio::test]
async fn client_beyond_max_lag_age_is_closed_and_resumes() {
    let max_lag_age = Duration::from_millis(200);
    let config = Config { ring_bytes: ByteSize::kib(64), max_lag_age, ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut slow = server.connect_slow("alerts?meta=1&stream=aurora:alerts").await;
    server.publish(&alerts(), [padded(0)]).await;
    let mut seen = vec![slow.text().await];
    let published = server.publish(&alerts(), (1..500).map(padded)).await;
    server.until_relayed(&alerts(), &published).await;
    let oldest = published[0].id.ms + 1000;
    let is_old = || jiff::Timestamp::now().as_millisecond().cast_unsigned() > oldest;
    server.until("the alerts are old", is_old).await;
    let (texts, code, reason) = slow.close().await;
    assert_eq!((code, reason.starts_with("too_slow")), (4001, true), "{reason}");
    seen.extend(texts);
    // This connection was not live, so its lag is not limited.
    let position = super::member(seen.last().expect("some"), "_pos");
    let mut resumed = server.connect(&format!("alerts?meta=1&stream=aurora:alerts&since={position}")).await;
    seen.extend(resumed.texts(500 - seen.len()).await);
    assert!(
        seen.iter().enumerate().all(|(n, text)| text.contains(&format!(r#""n":{n:05},"#))),
        "no gap and no duplicate"
    );
}

#[tokio::test]
async fn connections_and_requests_are_limited() {
    let config = Config { max_connections: 2, ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let _first = server.connect("alerts").await;
    let mut second = server.connect("alerts?v=1").await;
    server.until("two are in", || server.relay.status().connections == 2).await;
    assert_eq!(server.connect("alerts").await.close().await.1, 4503);
    // Requests beyond the limit end the session, whatever they are.
    for id in 0..300 {
        if second.socket.feed(Message::text(json!({"op": "ping", "id": id}).to_string())).await.is_err() {
            break;
        }
    }
    // The relay may have closed the connection before all requests were sent.
    drop(second.socket.flush().await);
    assert_eq!(second.close().await.1, 4005);
    server.until("there is room", || server.relay.status().connections == 1).await;
}

#[tokio::test]
async fn client_that_subscribes_and_never_reads_is_closed() {
    let config = Config { write_timeout: Duration::from_millis(500), ..config() };
    let server = Server::start(FaultyStore::open().await, config).await;
    let mut deaf = server.connect_slow("alerts?v=1").await;
    let subscribe = json!({"op": "subscribe", "id": 1, "stream": "aurora:alerts", "since": "earliest"});
    deaf.socket.send(Message::text(subscribe.to_string())).await.expect("sent");
    server.publish(&alerts(), (0..200).map(padded)).await;
    server
        .until("the write timeout closes it", || server.metrics.relay_closes.with_label_values(&["4008"]).get() == 1)
        .await;
    server.until("its connection is closed", || server.relay.status().connections == 0).await;
}
