//! Feeds whose readers are slow.

use std::time::Duration;

use aurora_bus::relay::{Admission, Config, Feed, FeedForm, SubscribeParams};
use futures_util::FutureExt as _;
use tokio::time::timeout;

use super::server::{PATIENCE, Server, alerts, cps_alerts, publish};
use super::store::Fragile;
use super::{config, member, number, numbered, tiny_ring};

fn open(server: &Server, query: &str) -> Feed {
    let params = SubscribeParams::parse(query).expect("valid");
    let peer = [127, 0, 0, 1].into();
    server.relay.feed("alerts", params, FeedForm::Lines, peer, Admission::default()).expect("let in")
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
        let mut feed = open(&server, &query);
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
    let mut feed = open(&server, "since=earliest");
    let piece = timeout(PATIENCE, feed.next()).await.expect("in time").expect("a piece");
    assert!(piece.len() < 100_000, "there is more");
    server.relay.drain();
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
    let (form, peer) = (FeedForm::EventStream, [127, 0, 0, 1].into());
    let mut feed = server.relay.feed("alerts", params, form, peer, Admission::default()).expect("let in");
    let first = told(&mut feed, 3).await;
    assert!(first[0].ends_with(r#"data: {"n":0}"#) && first[2].starts_with("event: live"), "{first:?}");
    assert!(first[2].contains(alerts().as_str()), "{first:?}");
    publish(&*store.beneath(), &cps_alerts(), numbered(1..2)).await;
    store.spoil(None);
    let late = told(&mut feed, 3).await;
    assert!(late[0].ends_with(r#"data: {"n":1}"#) && late[2].starts_with("event: live"), "{late:?}");
    assert!(late[2].contains(cps_alerts().as_str()), "{late:?}");
}

/// The last id among what was told.
fn last_id(told: &[String]) -> String {
    let mut ids = told.iter().flat_map(|words| words.lines()).filter_map(|line| line.strip_prefix("id: "));
    ids.next_back().expect("an id").to_owned()
}

#[tokio::test]
async fn who_reads_several_streams_as_events_goes_on_after_the_last_one() {
    let server = Server::start(Fragile::open().await, config()).await;
    let open_at = |since: &str| {
        let params = SubscribeParams::parse(&format!("since={since}")).expect("valid");
        let peer = [127, 0, 0, 1].into();
        server.relay.feed("alerts", params, FeedForm::EventStream, peer, Admission::default()).expect("let in")
    };
    let data = |told: &[String]| -> Vec<usize> {
        let lines = told.iter().flat_map(|words| words.lines()).filter_map(|line| line.strip_prefix("data: {\"n\""));
        lines.map(number).collect()
    };
    // Where it is to go on is known before there is an alert.
    let mut feed = open_at("earliest");
    let begun = told(&mut feed, 3).await;
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
        // It breaks off in the middle of what was written at once.
        let told = told(&mut feed, 1).await;
        seen.extend(data(&told[..1]));
        at = last_id(&told[..1]);
    }
    // In each stream once and in order; what came in the same millisecond has none between streams.
    let (even, odd): (Vec<usize>, Vec<usize>) = seen.iter().partition(|n| n.is_multiple_of(2));
    assert!(even.into_iter().eq((0..20).step_by(2)) && odd.into_iter().eq((1..20).step_by(2)), "{seen:?}");
}
