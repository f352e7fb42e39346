//! Dashboards while their stream is trimmed, flushed and restarted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::{Site, on_every_product};
use crate::support::app::{BOUND, Socket};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    dashboards_go_on_through_flushes_and_restarts
}

const DASHBOARDS: usize = 300;
const LAST: &str = "e-last";

/// What one dashboard saw.
#[derive(Debug, Default)]
struct Seen {
    /// The ids of each epoch, in the order in which they came.
    ids: HashMap<String, Vec<(u64, u64)>>,
    names: Vec<String>,
}

/// Reads until the last event.
async fn watch(mut socket: Socket) -> Seen {
    let mut seen = Seen::default();
    loop {
        let message = tokio::time::timeout(BOUND, socket.next()).await.expect("an event in time");
        let text = match message.expect("an open socket").expect("an open socket") {
            Message::Text(text) => text,
            Message::Ping(_) | Message::Pong(_) => continue,
            other => panic!("not an event: {other:?}"),
        };
        let alert: Value = serde_json::from_str(&text).expect("JSON");
        let position = alert["_pos"].as_str().expect("a position");
        let (epoch, id) = position.split_once(':').expect("an epoch and an id");
        let (ms, seq) = id.split_once('-').expect("an entry id");
        let id = (ms.parse().expect("a number"), seq.parse().expect("a number"));
        seen.ids.entry(epoch.to_owned()).or_default().push(id);
        let name = alert["id"].as_str().expect("a name").to_owned();
        let is_last = name == LAST;
        seen.names.push(name);
        if is_last {
            return seen;
        }
    }
}

async fn dashboards_go_on_through_flushes_and_restarts(product: Product) {
    let options = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut site = Site::with(RedisServer::start(product, &options).await).await;
    let daemon = site.home.start().await;
    let mut dashboards = JoinSet::new();
    for _ in 0..DASHBOARDS {
        dashboards.spawn(watch(daemon.watch("/api/v1/ws/alerts?meta=1&stream=aurora:alerts").await));
    }
    // One that never reads.
    let _slow = daemon.watch("/api/v1/ws/alerts?meta=1").await;
    // Two workers and the relay's tails of the two streams that are relayed by default: one reader each.
    site.readers_wait(3).await;
    let readers = site.server.cli(&["CLIENT", "LIST"]).lines().filter(|line| line.contains("cmd=xread ")).count();
    assert!(readers <= 2, "{readers} readers for {DASHBOARDS} dashboards");

    // What is trimmed before the relay has read it, nobody can be shown.
    let relayed = async |events: usize| {
        let written = u64::try_from(DASHBOARDS * events).expect("few");
        until("events at each dashboard", BOUND, async || {
            (daemon.metric("aurora_bus_relay_deliveries_total").await >= written).then_some(())
        })
        .await;
    };
    site.publish_and_handle(&daemon, 100).await;
    relayed(100).await;
    site.server.cli(&["XTRIM", &site.account.stream.to_string(), "MAXLEN", "10"]);
    site.publish_and_handle(&daemon, 100).await;
    relayed(200).await;
    site.server.cli(&["FLUSHALL"]);
    site.ledger.forgive();
    site.publish_and_handle_more(&daemon, 100).await;
    relayed(300).await;
    site.server.crash();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    site.server.restart().await;
    daemon.ready(StatusCode::OK).await;
    site.publish_and_handle_more(&daemon, 100).await;

    // Everybody is up to date: how long until all have the last one?
    relayed(400).await;
    let mut last = site.ledger.events(1, 10);
    last[0].payload = last[0].payload.replace(&last[0].name, LAST);
    LAST.clone_into(&mut last[0].name);
    let published = Instant::now();
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &last).await;
    let expected: Vec<String> = (0..400).map(|n| format!("e-{n}")).chain([LAST.to_owned()]).collect();
    for seen in dashboards.join_all().await {
        assert_eq!(seen.names, expected, "every alert once and in order, across the flush");
        assert_eq!(seen.ids.len(), 2, "a flush begins a new epoch");
        for ids in seen.ids.values() {
            assert!(ids.is_sorted_by(|a, b| a < b), "ids grow within an epoch: {ids:?}");
        }
    }
    assert!(published.elapsed() < Duration::from_secs(2), "the last event took {:?}", published.elapsed());
    site.ledger.has_handled(&daemon, 401).await;
    site.settled().await.assert_settled();
    daemon.stop().await;
}
