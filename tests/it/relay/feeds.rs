//! Feeds with slow readers.

use std::time::Duration;

use aurora_bus::relay::{Admission, Config, Feed, FeedEncoding, SubscribeParams};
use futures_util::FutureExt as _;
use tokio::time::timeout;

use super::server::{Server, TEST_TIMEOUT, alerts, cps_alerts, publish};
use super::store::FaultyStore;
use super::{config, member, number, numbered, tiny_ring};

fn open(server: &Server, query: &str) -> Feed {
    let params = SubscribeParams::parse(query).expect("valid");
    let peer = [127, 0, 0, 1].into();
    server.relay.feed("alerts", params, FeedEncoding::Lines, peer, Admission::default()).expect("let in")
}

#[tokio::test]
async fn unread_feeds_do_not_block_reads_of_the_store() {
    let server = Server::start(FaultyStore::open().await, tiny_ring()).await;
    let mut first = server.connect("alerts?meta=1&stream=aurora:alerts").await;
    server.publish(&alerts(), numbered(0..100)).await;
    let positions: Vec<String> = first.texts(100).await.iter().map(|text| member(text, "_pos")).collect();
    // The ring has only the last entry.
    let published = server.publish(&alerts(), numbered([100])).await;
    server.until_relayed(&alerts(), &published).await;
    let mut unread = Vec::new();
    for position in positions.iter().step_by(10) {
        let query = format!("stream=aurora:alerts&since={position}");
        let mut feed = open(&server, &query);
        // It starts a read and is not polled again, as with a slow reader.
        assert_eq!(feed.next().now_or_never(), None, "the read of the store takes time");
        unread.push(feed);
    }
    let mut client = server.connect("alerts?since=earliest").await;
    assert_eq!(client.texts(101).await, numbered(0..101).collect::<Vec<_>>());
}

#[tokio::test]
async fn busy_feed_ends_when_the_relay_drains() {
    let server = Server::start(FaultyStore::open().await, Config { drain_window: Duration::ZERO, ..config() }).await;
    let published = server.publish(&alerts(), numbered(0..10_000)).await;
    server.until_relayed(&alerts(), &published).await;
    let mut feed = open(&server, "since=earliest");
    let piece = timeout(TEST_TIMEOUT, feed.next()).await.expect("in time").expect("a piece");
    assert!(piece.len() < 100_000, "there is more");
    server.relay.drain();
    assert_eq!(timeout(TEST_TIMEOUT, feed.next()).await.expect("in time"), None);
}

/// Returns the next `count` blocks of a feed, each of which ends with an empty line.
async fn blocks(feed: &mut Feed, count: usize) -> Vec<String> {
    let mut text = String::new();
    while text.matches("\n\n").count() < count {
        let piece = timeout(TEST_TIMEOUT, feed.next()).await.expect("in time").expect("a piece");
        text.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    text.split_terminator("\n\n").map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn feed_is_live_while_one_of_its_streams_is_unreadable() {
    let store = FaultyStore::open().await;
    store.set_unreadable(Some(cps_alerts()));
    let server = Server::start_cold(store.clone(), config());
    server.publish(&alerts(), numbered(0..1)).await;
    let params = SubscribeParams::parse("since=earliest").expect("valid");
    let (form, peer) = (FeedEncoding::EventStream, [127, 0, 0, 1].into());
    let mut feed = server.relay.feed("alerts", params, form, peer, Admission::default()).expect("let in");
    let first = blocks(&mut feed, 3).await;
    assert!(first[0].ends_with(r#"data: {"n":0}"#) && first[2].starts_with("event: live"), "{first:?}");
    assert!(first[2].contains(alerts().as_str()), "{first:?}");
    publish(&*store.inner_store(), &cps_alerts(), numbered(1..2)).await;
    store.set_unreadable(None);
    let late = blocks(&mut feed, 3).await;
    assert!(late[0].ends_with(r#"data: {"n":1}"#) && late[2].starts_with("event: live"), "{late:?}");
    assert!(late[2].contains(cps_alerts().as_str()), "{late:?}");
}

/// Returns the last id in some blocks.
fn last_id(blocks: &[String]) -> String {
    let mut ids = blocks.iter().flat_map(|block| block.lines()).filter_map(|line| line.strip_prefix("id: "));
    ids.next_back().expect("an id").to_owned()
}

#[tokio::test]
async fn event_stream_of_several_streams_resumes_by_id() {
    let server = Server::start(FaultyStore::open().await, config()).await;
    let open_at = |since: &str| {
        let params = SubscribeParams::parse(&format!("since={since}")).expect("valid");
        let peer = [127, 0, 0, 1].into();
        server.relay.feed("alerts", params, FeedEncoding::EventStream, peer, Admission::default()).expect("let in")
    };
    let data = |blocks: &[String]| -> Vec<usize> {
        let lines = blocks.iter().flat_map(|block| block.lines()).filter_map(|line| line.strip_prefix("data: {\"n\""));
        lines.map(number).collect()
    };
    // The position is known before the first alert.
    let mut feed = open_at("earliest");
    let begun = blocks(&mut feed, 3).await;
    assert!(begun[0].starts_with("id: ") && begun[1].starts_with("event: live"), "{begun:?}");
    drop(feed);
    for n in 0..10 {
        server.publish(&alerts(), numbered([2 * n])).await;
        let published = server.publish(&cps_alerts(), numbered([2 * n + 1])).await;
        server.until_relayed(&cps_alerts(), &published).await;
    }
    let (mut at, mut seen) = (last_id(&begun), Vec::new());
    for _ in 0..20 {
        let mut feed = open_at(&at);
        // It disconnects in the middle of one write.
        let blocks = blocks(&mut feed, 1).await;
        seen.extend(data(&blocks[..1]));
        at = last_id(&blocks[..1]);
    }
    // Each stream is complete and in order. Entries of the same millisecond have no order between streams.
    let (even, odd): (Vec<usize>, Vec<usize>) = seen.iter().partition(|n| n.is_multiple_of(2));
    assert!(even.into_iter().eq((0..20).step_by(2)) && odd.into_iter().eq((1..20).step_by(2)), "{seen:?}");
}
