//! Dashboards while their stream is trimmed, flushed and restarted.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::{Site, on_every_product};
use crate::support::app::{BOUND, Socket};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    dashboards_survive_trims_flushes_and_restarts
}

/// Number of dashboards on Redis. Valkey gets fewer, because both tests run at the same time.
const DASHBOARDS: usize = 500;
const DASHBOARDS_ON_VALKEY: usize = 50;
/// Number of single events that are timed.
const TIMED: usize = 40;
/// The delivery time of a single event at 99 % of the dashboards.
const SOON: Duration = Duration::from_millis(200);
const LAST: &str = "e-last";

/// The events of one dashboard.
#[derive(Debug, Default)]
struct Seen {
    /// The entry ids of each epoch, in order of arrival.
    ids: HashMap<String, Vec<(u64, u64)>>,
    names: Vec<String>,
    /// The times of arrival.
    times: Vec<Instant>,
}

/// Reads until the last event.
async fn watch(mut socket: Socket) -> Seen {
    let mut messages: Vec<(Utf8Bytes, Instant)> = Vec::new();
    while messages.last().is_none_or(|(text, _)| !text.contains(LAST)) {
        let message = tokio::time::timeout(BOUND, socket.next()).await.expect("an event in time");
        match message.expect("an open socket").expect("an open socket") {
            Message::Text(text) => messages.push((text, Instant::now())),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("not an event: {other:?}"),
        }
    }
    // Parsed at the end, because parsing would delay the other dashboards.
    let mut seen = Seen::default();
    for (text, time) in messages {
        let alert: Value = serde_json::from_str(&text).expect("JSON");
        let position = alert["_pos"].as_str().expect("a position");
        let (epoch, id) = position.split_once(':').expect("an epoch and an id");
        let (ms, seq) = id.split_once('-').expect("an entry id");
        let id = (ms.parse().expect("a number"), seq.parse().expect("a number"));
        seen.ids.entry(epoch.to_owned()).or_default().push(id);
        seen.names.push(alert["id"].as_str().expect("a name").to_owned());
        seen.times.push(time);
    }
    seen
}

async fn dashboards_survive_trims_flushes_and_restarts(product: Product) {
    let options = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut site = Site::with(RedisServer::start(product, &options).await).await;
    let daemon = site.home.start().await;
    let count = if product == Product::Redis { DASHBOARDS } else { DASHBOARDS_ON_VALKEY };
    let mut dashboards = JoinSet::new();
    for _ in 0..count {
        dashboards.spawn(watch(daemon.watch("/api/v1/ws/alerts?meta=1&stream=aurora:alerts").await));
    }
    // One client never reads.
    let _slow = daemon.watch("/api/v1/ws/alerts?meta=1").await;
    // Two workers, and the tails of the two streams that the relay sends by default: one reader each.
    site.readers_wait(3).await;
    let readers = site.server.cli(&["CLIENT", "LIST"]).lines().filter(|line| line.contains("cmd=xread ")).count();
    assert!(readers <= 2, "{readers} readers for {count} dashboards");

    // The relay must read all events before the trim, because dashboards cannot get trimmed ones.
    let relayed = async |events: usize| {
        let written = u64::try_from(count * events).expect("few");
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
    site.ledger.forget_accepted();
    site.publish_and_handle_more(&daemon, 100).await;
    relayed(300).await;
    site.server.crash();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    site.server.restart().await;
    daemon.ready(StatusCode::OK).await;
    site.publish_and_handle_more(&daemon, 100).await;

    // All dashboards are up to date: measure the delivery time of a single event. The best of several counts, because
    // the machine may be busy. A client that never reads would delay every one of them.
    let mut published = Vec::new();
    for timed in 1..=TIMED {
        relayed(399 + timed).await;
        let mut event = site.ledger.events(1, 10);
        if timed == TIMED {
            event[0].payload = event[0].payload.replace(&event[0].name, LAST);
            LAST.clone_into(&mut event[0].name);
        }
        published.push(Instant::now());
        site.ledger.publish_until_accepted(&daemon, &site.account.stream, &event).await;
    }
    let expected: Vec<String> = (0..399 + TIMED).map(|n| format!("e-{n}")).chain([LAST.to_owned()]).collect();
    let seen = dashboards.join_all().await;
    for seen in &seen {
        assert_eq!(seen.names, expected, "every alert once and in order, across the flush");
        assert_eq!(seen.ids.len(), 2, "a flush begins a new epoch");
        for ids in seen.ids.values() {
            assert!(ids.is_sorted_by(|a, b| a < b), "ids grow within an epoch: {ids:?}");
        }
    }
    let slow_ones = published.iter().zip(400..).map(|(published, place)| {
        let mut times: Vec<Duration> = seen.iter().map(|seen| seen.times[place] - *published).collect();
        times.sort_unstable();
        times[times.len() * 99 / 100]
    });
    let best = slow_ones.min().expect("some were timed");
    assert!(best < SOON, "one dashboard in a hundred waited {best:?} or longer");
    site.ledger.wait_handled(&daemon, 400 + TIMED).await;
    site.settled().await.assert_settled();
    daemon.stop().await;
}
