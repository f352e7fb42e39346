//! Forwarding to another stream: each entry once, on every store, and never in a circle.

use std::sync::Arc;
use std::time::Instant;

use aurora_bus::bus::{Bus, Config, Dedup, PublishOptions, StreamCatalog, StreamSettings};
use aurora_bus::event::{Delivery, Entry, EntryId, NewEvent, StreamName};
use aurora_bus::metrics::Metrics;
use aurora_bus::sink::{Origin, Sink as _, SinkErrorClass, StreamSink};
use aurora_bus::store::{Families, HardLimits, Range, Store, embedded, redis};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::app::{Daemon, Home};
use crate::support::random_below;
use crate::support::redis::{Product, RedisServer};

const ALERTS: &str = "it:alerts";
const TASKS: &str = "it:tasks";
const GROUP: &str = "triage";

/// A daemon that creates tasks for critical alerts.
fn home(more: &str) -> Home {
    Home::new(&format!(
        r#"
[[streams]]
name = "{ALERTS}"
[[streams.groups]]
name = "{GROUP}"
sink = "triage"
claim_idle = "2s"
handler_timeout = "1s"

[[streams]]
name = "{TASKS}"

[sinks.triage]
type = "stream"
stream = "{TASKS}"
as = "task"
agent_type = "triage"
min_severity = "critical"
sources = ["zeek"]

[relay]
channels = {{}}
{more}
"#
    ))
}

fn alert(number: u64, severity: &str) -> String {
    json!({ "id": format!("alert-{number}"), "severity": severity, "source": "zeek", "tenant": "acme" }).to_string()
}

async fn tasks(daemon: &Daemon) -> Vec<Value> {
    daemon.handled(ALERTS, GROUP).await;
    let events = daemon.events(TASKS).await;
    events.values().map(|task| serde_json::from_str(task).expect("JSON")).collect()
}

async fn critical_alert_becomes_one_task(home: &Home) {
    let daemon = home.start().await;
    let other = json!({ "severity": "critical", "source": "suricata" }).to_string();
    daemon.publish(ALERTS, &[alert(1, "low"), alert(2, "critical"), other]).await.expect("accepted");
    let tasks = tasks(&daemon).await;
    assert_eq!(tasks.len(), 1, "{tasks:?}");
    let task = &tasks[0];
    assert_eq!(task["agent_type"], "triage");
    assert_eq!((&task["priority"], &task["alert_id"]), (&json!(10), &json!("alert-2")));
    assert_eq!(task["tenant"], "acme");
    assert_eq!(
        task["alert"].to_string(),
        serde_json::from_str::<Value>(&alert(2, "critical")).expect("JSON").to_string()
    );
    assert!(daemon.events(&format!("{ALERTS}:dead_letter")).await.is_empty());
    daemon.stop().await;
}

async fn kills_create_no_second_task(home: &Home) {
    let mut published = 0;
    for _ in 0..5 {
        let daemon = home.start().await;
        for _ in 0..10 {
            let alerts: Vec<String> = (published..published + 50).map(|n| alert(n, "critical")).collect();
            daemon.publish(ALERTS, &alerts).await.expect("accepted");
            published += 50;
        }
        tokio::time::sleep(std::time::Duration::from_millis(random_below(100))).await;
        daemon.crash();
    }
    let daemon = home.start().await;
    let tasks = tasks(&daemon).await;
    let mut alerts: Vec<&str> = tasks.iter().filter_map(|task| task["alert_id"].as_str()).collect();
    assert_eq!(alerts.len() as u64, published, "a task for each alert");
    alerts.sort_unstable();
    alerts.dedup();
    assert_eq!(alerts.len() as u64, published, "no alert has two tasks");
    daemon.stop().await;
}

/// An entry delivered again has no second successor, and an undecodable one is not lost.
async fn entry_has_one_successor(store: Arc<dyn Store>) {
    let name = |text: &str| text.parse::<StreamName>().expect("a name");
    let bus = |declared: &str| {
        let streams = StreamCatalog::new(
            Families::default(),
            [(name(declared).into(), StreamSettings::new(name(declared).default_dead_letter()))],
        );
        Arc::new(Bus::new(Arc::clone(&store), Config::default(), streams, HardLimits::default(), Metrics::new()))
    };
    let sink = |bus| {
        let config = format!("stream = \"{TASKS}\"\nas = \"task\"\nagent_type = \"triage\"");
        StreamSink::new(toml::from_str(&config).expect("every key is known"), bus)
    };
    let batch: Vec<Delivery> = (1..=700)
        .map(|n| {
            let fields = [(Bytes::from("data"), Bytes::from(alert(n, "high")))].into_iter().collect();
            Delivery { entry: Entry { id: EntryId::new(n, 0), fields }, attempt: 1, delivered_at: Instant::now() }
        })
        .collect();
    let origin = Origin { stream: name(ALERTS), group: GROUP.parse().expect("a name") };
    let forwarding = sink(bus(TASKS));
    forwarding.check().await.expect("the stream is declared");
    // No key of a publisher can make an event look like a forwarded entry.
    let key = Dedup::Key(format!("{ALERTS}/1-0/{GROUP}"));
    let event = NewEvent::parse(Bytes::from_static(b"{}")).expect("an event");
    let published = bus(TASKS).publish(&name(TASKS), vec![(key, event)], PublishOptions::default()).await;
    assert!(matches!(published[..], [Ok(_)]), "{published:?}");
    forwarding.deliver(&origin, &batch[..300]).await.expect("stored");
    forwarding.deliver(&origin, &batch).await.expect("stored");
    let stored = store.range(&name(TASKS), Range::after(EntryId::MIN), 1000).await.expect("a range");
    assert_eq!(stored.len(), 701, "one of them is the publisher's own");

    let error = sink(bus("it:other")).check().await.expect_err("the stream is not declared");
    assert!(error.to_string().contains("not declared") && error.class() == SinkErrorClass::Transient, "{error}");
    store.close().await;
    let error = forwarding.deliver(&origin, &batch).await.expect_err("the store is gone");
    assert_eq!(error.class(), SinkErrorClass::Transient);
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_has_one_successor_on_the_embedded_store() {
    let folder = tempfile::TempDir::new().expect("a temporary folder");
    let config = embedded::Config { path: folder.path().to_owned(), ..embedded::Config::default() };
    entry_has_one_successor(Arc::new(config.open().await.expect("a fresh folder"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_has_one_successor_on_redis() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let config = redis::Config { url: server.url().into(), ..redis::Config::default() };
    entry_has_one_successor(Arc::new(config.connect().await.expect("a valid configuration"))).await;
}

fn on_redis(server: &RedisServer) -> Home {
    home(&format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", server.url()))
}

#[tokio::test(flavor = "multi_thread")]
async fn critical_alert_becomes_one_task_on_the_embedded_store() {
    critical_alert_becomes_one_task(&home("")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn critical_alert_becomes_one_task_on_redis() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    critical_alert_becomes_one_task(&on_redis(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_create_no_second_task_on_the_embedded_store() {
    kills_create_no_second_task(&home("")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_create_no_second_task_on_redis() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    kills_create_no_second_task(&on_redis(&server)).await;
}

#[test]
fn forwarding_in_a_circle_or_to_no_stream_is_refused() {
    let circle = Home::new(
        "[[streams]]\nname = \"a\"\n[[streams.groups]]\nname = \"g\"\nsink = \"to-b\"\n\
         [[streams]]\nname = \"b\"\n[[streams.groups]]\nname = \"g\"\nsink = \"to-a\"\n\
         [sinks.to-a]\ntype = \"stream\"\nstream = \"a\"\n[sinks.to-b]\ntype = \"stream\"\nstream = \"b\"\n\
         [sinks.lost]\ntype = \"stream\"\nstream = \"nowhere\"\n",
    );
    let config = circle.path("aurora-bus.toml");
    let refused = circle.run(&["check", "--config", config.to_str().expect("UTF-8")]);
    let told = String::from_utf8_lossy(&[refused.stdout, refused.stderr].concat()).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{told}");
    assert!(told.contains("entries would circulate: a → b → a"), "{told}");
    assert!(told.contains("`nowhere` is not a declared stream"), "{told}");
}
