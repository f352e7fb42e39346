//! The store and the daemon on servers with sentinels.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aurora_bus::store::redis::Config;
use aurora_bus::store::{Store, StoreErrorKind};
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde::Deserialize;
use tokio_tungstenite::tungstenite::Message;

use crate::support::app::Home;
use crate::support::sentinel::SentinelGroup;
use crate::support::until;

const BOUND: Duration = Duration::from_mins(1);
const STREAM: &str = "aurora:alerts";

#[derive(Deserialize)]
struct Reply {
    results: Vec<Accepted>,
}

#[derive(Deserialize)]
struct Accepted {
    id: String,
}

/// Publishes one event until it is accepted. The idempotency key makes the retries safe.
async fn publish(client: &reqwest::Client, url: &str, key: &str) -> String {
    let accept = async {
        loop {
            if let Some(id) = try_publish(client, url, key).await {
                return id;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(BOUND, accept).await.unwrap_or_else(|_| panic!("{key} is not accepted"))
}

async fn try_publish(client: &reqwest::Client, url: &str, key: &str) -> Option<String> {
    let body = format!(r#"{{"title":"{key}","severity":"high"}}"#);
    let response = client.post(url).header("idempotency-key", key).body(body).send().await.ok()?;
    if response.status() != StatusCode::CREATED {
        return None;
    }
    Some(response.json::<Reply>().await.ok()?.results.remove(0).id)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_under_load_keeps_replicated_and_recovers() {
    let mut watched = SentinelGroup::start().await;
    let home = Home::new(&format!(
        "[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n\
         [[streams]]\nname = \"{STREAM}\"\nrelay = true\n[[streams.groups]]\nname = \"g\"\nsink = \"log\"\n\
         claim_idle = \"5s\"\nhandler_timeout = \"2s\"\n[sinks.log]\ntype = \"log\"\n[log]\nlevel = \"info\"\n",
        watched.url()
    ));
    let daemon = home.start().await;
    let mut socket = daemon.watch("/api/v1/ws/alerts").await;
    let shown = Arc::new(Mutex::new(Vec::<String>::new()));
    let stop = tokio_util::sync::CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    let seen = Arc::clone(&shown);
    let stop_watching = stop.clone();
    tasks.spawn(async move {
        loop {
            let message = tokio::select! {
                () = stop_watching.cancelled() => return,
                message = socket.next() => message,
            };
            if let Message::Text(text) = message.expect("an open socket").expect("an open socket") {
                seen.lock().expect("unpoisoned").push(text.to_string());
            }
        }
    });
    // About 500 events a second. Some require replication and are refused while there is no replica.
    let (memory, replicated) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let has_failed = tokio_util::sync::CancellationToken::new();
    for publisher in 0..8 {
        let (query, accepted) =
            if publisher % 2 == 0 { ("?durability=replicated", &replicated) } else { ("", &memory) };
        let url = daemon.url(&format!("/api/v1/streams/{STREAM}/events{query}"));
        let (accepted, stop, has_failed) = (Arc::clone(accepted), stop.clone(), has_failed.clone());
        tasks.spawn(async move {
            let client = crate::support::app::client();
            let mut ticks = tokio::time::interval(Duration::from_millis(15));
            for number in 0.. {
                ticks.tick().await;
                if stop.is_cancelled() || (publisher % 2 == 0 && has_failed.is_cancelled()) {
                    return;
                }
                let key = format!("{publisher}-{number}");
                let id = tokio::select! {
                    id = publish(&client, &url, &key) => id,
                    () = has_failed.cancelled(), if publisher % 2 == 0 => return,
                };
                accepted.lock().expect("unpoisoned").push((id, key));
            }
        });
    }
    let count = |list: &Mutex<Vec<(String, String)>>| list.lock().expect("unpoisoned").len();
    until("load", BOUND, async || (count(&memory) > 300 && count(&replicated) > 100).then_some(())).await;

    watched.servers[0].crash();
    has_failed.cancel();
    watched.promoted(1).await;
    let promoted = Instant::now();
    let client = crate::support::app::client();
    publish(&client, &daemon.url(&format!("/api/v1/streams/{STREAM}/events")), "after").await;
    assert!(promoted.elapsed() < Duration::from_secs(10), "back after {:?}", promoted.elapsed());
    daemon.ready(StatusCode::OK).await;
    assert!(promoted.elapsed() < Duration::from_secs(10), "ready after {:?}", promoted.elapsed());
    let before = count(&memory);
    until("load", BOUND, async || (count(&memory) > before + 100).then_some(())).await;
    stop.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no publisher fails");
    }

    let stored = daemon.events(STREAM).await;
    for (id, key) in replicated.lock().expect("unpoisoned").iter() {
        let data = stored.get(id).unwrap_or_else(|| panic!("{key} was replicated and is lost"));
        assert!(data.contains(&format!("\"{key}\"")), "{key}: {data}");
    }
    // Events accepted in memory may be lost if they were not replicated yet. Most of them were.
    let lost = memory.lock().expect("unpoisoned").iter().filter(|(id, _)| !stored.contains_key(id)).count();
    assert!(lost < 100, "{lost} lost");
    daemon.handled(STREAM, "g").await;
    let last = stored.values().next_back().expect("events").clone();
    assert!(!shown.lock().expect("unpoisoned").is_empty());
    let mut socket = daemon.watch("/api/v1/ws/alerts?snapshot=1").await;
    assert_eq!(crate::support::app::next_text(&mut socket).await, last);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinel_password_is_used_and_demoted_primary_left() {
    let watched = SentinelGroup::with_password("hush").await;
    let without = Config { url: watched.url().into(), ..Config::default() };
    let error = without.connect().await.expect("valid").check().await.expect_err("denied");
    assert_eq!(error.kind(), StoreErrorKind::Denied, "{error}");
    assert!(error.to_string().contains("store.redis.sentinel_password"), "{error}");
    let url = watched.url();
    let unknown = url.rsplit_once('/').map(|(hosts, _)| format!("{hosts}/other")).expect("a service");
    let unknown = Config { url: unknown.into(), sentinel_password: Some("hush".into()), ..Config::default() };
    let error = unknown.connect().await.expect("valid").check().await.expect_err("no such service");
    assert!(error.to_string().contains("does not know the service `other`"), "{error}");

    let config = Config { url: url.into(), sentinel_password: Some("hush".into()), ..Config::default() };
    let store = config.connect().await.expect("valid");
    let status = until("ready store", BOUND, async || store.check().await.ok()).await;
    assert!(status.description.ends_with("the primary of `soc`"));
    watched.fail_over_under(&store).await;
}
