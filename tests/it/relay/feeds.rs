//! Feeds whose readers are slow.

use std::time::Duration;

use aurora_bus::relay::{Admission, Config, Feed, FeedForm, SubscribeParams};
use futures_util::FutureExt as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::server::{PATIENCE, Server, alerts};
use super::store::Fragile;
use super::{config, member, numbered, tiny_ring};

fn open(server: &Server, query: &str, stop: CancellationToken) -> Feed {
    let params = SubscribeParams::parse(query).expect("valid");
    let peer = [127, 0, 0, 1].into();
    server.relay.feed("alerts", params, FeedForm::Lines, peer, Admission::default(), stop).expect("let in")
}

#[tokio::test]
async fn feeds_that_nobody_reads_from_keep_nobody_from_the_store() {
    let server = Server::start(Fragile::open().await, tiny_ring()).await;
    let mut first = server.connect("alerts?meta=1&stream=aurora:alerts").await;
    server.publish(&alerts(), numbered(0..100)).await;
    let positions: Vec<String> = first.texts(100).await.iter().map(|text| member(text, "_pos")).collect();
    // The ring has the last one alone.
    let published = server.publish(&alerts(), numbered([100])).await;
    server.until_relayed(&alerts(), &published).await;
    let mut unread = Vec::new();
    for position in positions.iter().step_by(10) {
        let query = format!("stream=aurora:alerts&since={position}");
        let mut feed = open(&server, &query, CancellationToken::new());
        // It begins to read, and is left at that: a reader that is slow asks for no more.
        assert_eq!(feed.next().now_or_never(), None, "what is asked of the store takes its time");
        unread.push(feed);
    }
    let mut client = server.connect("alerts?since=earliest").await;
    assert_eq!(client.texts(101).await, numbered(0..101).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_feed_for_which_there_is_always_more_ends_with_the_others() {
    let server = Server::start(Fragile::open().await, Config { drain_window: Duration::ZERO, ..config() }).await;
    let published = server.publish(&alerts(), numbered(0..10_000)).await;
    server.until_relayed(&alerts(), &published).await;
    let stop = CancellationToken::new();
    let mut feed = open(&server, "since=earliest", stop.clone());
    let piece = timeout(PATIENCE, feed.next()).await.expect("in time").expect("a piece");
    assert!(piece.len() < 100_000, "there is more");
    stop.cancel();
    assert_eq!(timeout(PATIENCE, feed.next()).await.expect("in time"), None);
}
