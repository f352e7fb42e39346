//! Feeds whose readers are slow.

use std::time::Duration;

use aurora_bus::relay::{Admission, Config, Feed, FeedForm, SubscribeParams};
use futures_util::FutureExt as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::server::{PATIENCE, Server, alerts, cps_alerts, publish};
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

/// What is told until there are so many empty lines, which end what is told at a time.
async fn told(feed: &mut Feed, count: usize) -> Vec<String> {
    let mut text = String::new();
    while text.matches("\n\n").count() < count {
        let piece = timeout(PATIENCE, feed.next()).await.expect("in time").expect("a piece");
        text.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    text.split_terminator("\n\n").map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn who_reads_several_streams_is_live_while_one_of_them_cannot_be_read() {
    let store = Fragile::open().await;
    store.spoil(Some(cps_alerts()));
    let server = Server::start_cold(store.clone(), config());
    server.publish(&alerts(), numbered(0..1)).await;
    let params = SubscribeParams::parse("since=earliest").expect("valid");
    let (form, peer, stop) = (FeedForm::EventStream, [127, 0, 0, 1].into(), CancellationToken::new());
    let mut feed = server.relay.feed("alerts", params, form, peer, Admission::default(), stop).expect("let in");
    let kind = |words: &String| words.lines().next().map(ToOwned::to_owned).expect("a line");
    let first = told(&mut feed, 3).await;
    assert_eq!(first.iter().map(kind).take(2).collect::<Vec<_>>(), [r#"data: {"n":0}"#, "event: live"]);
    assert!(first[1].contains(alerts().as_str()), "{first:?}");
    publish(&*store.beneath(), &cps_alerts(), numbered(1..2)).await;
    store.spoil(None);
    let late = told(&mut feed, 3).await;
    assert_eq!(late.iter().map(kind).take(2).collect::<Vec<_>>(), [r#"data: {"n":1}"#, "event: live"]);
    assert!(late[1].contains(cps_alerts().as_str()), "{late:?}");
}
