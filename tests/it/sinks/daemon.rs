//! Webhooks in the real daemon: entries and their outcome, with every kind of receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::sync::Barrier;

use super::PATIENCE;
use crate::support::app::{Daemon, Home};
use crate::support::receiver::{Receiver, Reply};
use crate::support::until;

const STREAM: &str = "aurora:alerts";
const DEAD_LETTERS: &str = "/api/v1/streams/aurora:alerts:dead_letter/events?limit=1000";

/// Creates the folder of a daemon with one group that posts to this receiver.
fn home(receiver: &Receiver, group: &str, sink: &str) -> Home {
    Home::new(&format!(
        r#"
[[streams]]
name = "{STREAM}"
[[streams.groups]]
name = "siem"
sink = "siem"
{group}
[sinks.siem]
type = "webhook"
url = "{url}"
allow_private = true
{sink}
"#,
        url = receiver.url("/in"),
    ))
}

async fn publish(daemon: &Daemon, numbers: std::ops::Range<usize>) {
    let payloads: Vec<String> = numbers.map(|n| json!({"title": format!("alert {n}"), "n": n}).to_string()).collect();
    daemon.publish(STREAM, &payloads).await.expect("accepted");
}

/// Returns the number of deliveries of each alert, by its number.
fn taken(receiver: &Receiver) -> BTreeMap<usize, usize> {
    let mut taken = BTreeMap::new();
    for request in receiver.received().into_iter().filter(|request| request.is_taken) {
        let alert: Value = serde_json::from_slice(&request.body).expect("an alert");
        let number = usize::try_from(alert["n"].as_u64().expect("a number")).expect("small");
        *taken.entry(number).or_default() += 1;
    }
    taken
}

async fn dead_letters(daemon: &Daemon) -> Vec<Value> {
    let page: Value = serde_json::from_str(&daemon.get(DEAD_LETTERS).await).expect("a page of events");
    page["events"].as_array().expect("events").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_refused_alert_becomes_a_dead_letter() {
    let receiver = Receiver::start(|request| {
        let alert: Value = serde_json::from_slice(&request.body).expect("an alert");
        if alert["n"] == json!(17) {
            Reply::With(400, ("content-type", "text/plain".to_owned()), "field `title` is too cheerful".to_owned())
        } else {
            Reply::Status(202)
        }
    })
    .await;
    let home = home(&receiver, "concurrency = 8", "secret = \"a plain secret\"");
    let daemon = home.start().await;
    publish(&daemon, 0..60).await;
    daemon.handled(STREAM, "siem").await;
    let expected: BTreeMap<usize, usize> = (0..60).filter(|n| *n != 17).map(|n| (n, 1)).collect();
    assert_eq!(taken(&receiver), expected);
    let letters = dead_letters(&daemon).await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0]["data"]["n"], json!(17));
    let text = letters[0].to_string();
    assert!(text.contains("the receiver responded with 400 Bad Request: field `title` is too cheerful"), "{text}");
    assert!(text.contains("rejected"), "{text}");
    let metrics = daemon.get("/metrics").await;
    for line in [
        "aurora_bus_sink_deliveries_total{sink=\"siem\"} 59",
        "aurora_bus_sink_seconds_count{sink=\"siem\"} 60",
        "aurora_bus_sink_errors_total{class=\"permanent\",sink=\"siem\"} 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receiver_gets_everything_after_an_outage() {
    let mut receiver = Receiver::start(|_| Reply::Status(204)).await;
    let home = home(&receiver, "concurrency = 4\nretry = { max_attempts = 3, base = \"100ms\", cap = \"1s\" }", "");
    let daemon = home.start().await;
    publish(&daemon, 0..30).await;
    until("first alerts", PATIENCE, async || (!taken(&receiver).is_empty()).then_some(())).await;
    receiver.go_down().await;
    publish(&daemon, 30..60).await;
    // The daemon works, but an operator should look.
    let reason = until("reason", PATIENCE, async || {
        let answer = body_of(&daemon, "/ready").await;
        answer.contains("cannot connect to").then_some(answer)
    })
    .await;
    assert!(reason.contains(&receiver.url("")) && !reason.contains("/in"), "{reason}");
    publish(&daemon, 60..90).await;
    daemon.ready(StatusCode::OK).await;
    receiver.come_up().await;
    daemon.handled(STREAM, "siem").await;
    let numbers: BTreeSet<usize> = taken(&receiver).into_keys().collect();
    assert_eq!(numbers, (0..90).collect());
    assert_eq!(dead_letters(&daemon).await, [json!(null); 0]);
    daemon.stop().await;
}

/// Returns the body of a response, whatever its status.
async fn body_of(daemon: &Daemon, path: &str) -> String {
    let response = crate::support::app::client().get(daemon.url(path)).send().await.expect("an answer");
    response.text().await.expect("a body")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrency_of_requests_is_that_of_the_group() {
    const AT_ONCE: usize = 32;
    let together = Arc::new(Barrier::new(AT_ONCE));
    let receiver = Receiver::start(move |_| Reply::Meet(Arc::clone(&together))).await;
    let home = home(&receiver, &format!("concurrency = {AT_ONCE}"), "");
    let daemon = home.start().await;
    publish(&daemon, 0..AT_ONCE * 20).await;
    daemon.handled(STREAM, "siem").await;
    assert_eq!(taken(&receiver), (0..AT_ONCE * 20).map(|n| (n, 1)).collect());
    // Far fewer than requests, and a few more than concurrent ones: a connection may not be free in time.
    assert!(receiver.connections() <= 2 * AT_ONCE as u64, "{} connections", receiver.connections());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_webhook_is_reported_at_start() {
    let receiver = Receiver::start(|_| Reply::Status(204)).await;
    let said = |home: &Home, arguments: &[&str]| {
        let output = home.run(&[arguments, &["--config", "aurora-bus.toml"]].concat());
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).expect("UTF-8"))
    };
    let cases = [
        ("batch = 500", "check", 2, "sinks.siem.batch: must be from 1 to 100, not 500"),
        ("[sinks.siem.headers]\nWebhook-Id = \"1\"", "check", 2, "sinks.siem.headers: `Webhook-Id` is a header"),
        ("tmeout = \"1s\"", "check", 2, "sinks.siem.tmeout: unknown key, did you mean `timeout`?"),
        ("secret_file = \"none\"", "check --connect", 1, "secret_file: cannot read none"),
        ("secret_file = \"none\"", "serve", 1, "secret_file: cannot read none"),
    ];
    for (sink, arguments, code, part) in cases {
        let home = home(&receiver, "", sink);
        let (found, text) = said(&home, &arguments.split(' ').collect::<Vec<_>>());
        assert!(found == Some(code) && text.contains(part), "{part:?} is not in {found:?} {text}");
    }
    let home = home(&receiver, "", "secret = \"hunter2\"\n[sinks.siem.headers]\nX-Token = \"hunter3\"");
    let (code, text) = said(&home, &["config"]);
    assert!(code == Some(0) && text.contains("X-Token = \"********\"") && !text.contains("hunter"), "{text}");
    let (code, text) = said(&home, &["check", "--connect"]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(receiver.received().len(), 0, "a check sends no event");
}
