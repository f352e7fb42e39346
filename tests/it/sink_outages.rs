//! Sinks that are unavailable at the start or for a while: reported in `/ready`, without used attempts.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::receiver::{Receiver, Reply};
use crate::support::redis::free_port;
use crate::support::until;

/// Returns a part of `/ready`.
async fn part(daemon: &Daemon, name: &str) -> Value {
    let ready: Value = serde_json::from_str(&daemon.body("/ready").await).expect("JSON");
    let parts = ready["parts"].as_array().expect("parts");
    parts.iter().find(|part| part["name"] == name).cloned().unwrap_or_else(|| panic!("no part {name}: {ready}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unavailable_sink_is_reported_at_start_without_blocking_it() {
    let mut receiver = Receiver::start(|_| Reply::Status(204)).await;
    receiver.go_down().await;
    let home = Home::new(&format!(
        r#"
[[streams]]
name = "aurora:alerts"
[[streams.groups]]
name = "siem"
sink = "siem"
[[streams.groups]]
name = "results"
sink = "results"
[sinks.siem]
type = "webhook"
url = "{}"
allow_private = true
[sinks.results]
type = "postgres"
url = "postgres://nobody@127.0.0.1:{}/none"
table = "results"
"#,
        receiver.url("/in"),
        free_port(),
    ));
    let daemon = home.start().await;
    for (name, words) in [("sink siem", "cannot connect to"), ("sink results", "127.0.0.1")] {
        let told = until(name, BOUND, async || {
            let part = part(&daemon, name).await;
            part["note"].is_string().then_some(part)
        })
        .await;
        let note = told["note"].as_str().expect("a note");
        assert!(
            told["ready"] == json!(true) && note.contains("cannot take entries yet") && note.contains(words),
            "{told}"
        );
    }
    assert_eq!(daemon.status("/ready").await, Some(StatusCode::OK));
    receiver.come_up().await;
    until("a sink that is there", BOUND, async || part(&daemon, "sink siem").await["note"].is_null().then_some(()))
        .await;
    daemon.signal("TERM");
    let log = daemon.ended().await.log;
    let told =
        |name: &str| log.lines().filter(|line| line.contains(name) && line.contains("cannot take entries yet")).count();
    assert_eq!((told("siem"), told("results")), (1, 1), "{log}");
    assert!(log.contains("sink can take entries now"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwarding_to_a_full_stream_uses_up_no_attempt() {
    const TARGET: &str = "it:tasks";
    let mut receiver = Receiver::start(|_| Reply::Status(204)).await;
    receiver.go_down().await;
    let home = Home::new(&format!(
        r#"
[[streams]]
name = "it:alerts"
[[streams.groups]]
name = "triage"
sink = "forward"
retry = {{ max_attempts = 2, base = "10ms", cap = "20ms" }}
breaker = {{ pause = "50ms", max_pause = "200ms" }}
[[streams]]
name = "{TARGET}"
retention = {{ max_len = 100, hard_max_len = 500 }}
[[streams.groups]]
name = "agents"
sink = "siem"
breaker = {{ pause = "50ms", max_pause = "200ms" }}
[sinks.forward]
type = "stream"
stream = "{TARGET}"
min_severity = "high"
[sinks.siem]
type = "webhook"
url = "{}"
allow_private = true
[relay]
channels = {{}}
"#,
        receiver.url("/in")
    ));
    let daemon = home.start().await;
    // Filtered entries count as delivered, so the sink looks up meanwhile.
    let payload = |n: u64| json!({ "n": n, "severity": if n.is_multiple_of(3) { "low" } else { "high" } }).to_string();
    for first in (0..1500).step_by(100) {
        daemon.publish("it:alerts", &(first..first + 100).map(payload).collect::<Vec<_>>()).await.expect("accepted");
    }
    let note = until("back-pressure", BOUND, async || {
        let note = part(&daemon, "worker it:alerts/triage").await["note"].clone();
        note.is_string().then_some(note)
    })
    .await;
    assert!(note.to_string().contains("hard_max_len"), "{note}");
    assert!(daemon.events(TARGET).await.len() <= 500);
    receiver.come_up().await;
    daemon.handled("it:alerts", "triage").await;
    daemon.handled(TARGET, "agents").await;
    let mut taken: Vec<u64> = receiver
        .received()
        .iter()
        .map(|request| {
            serde_json::from_slice::<Value>(&request.body).expect("an event")["n"].as_u64().expect("a number")
        })
        .collect();
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken, (0..1500).filter(|n: &u64| !n.is_multiple_of(3)).collect::<Vec<_>>());
    assert!(daemon.events("it:alerts:dead_letter").await.is_empty());
    assert_eq!(daemon.metric("aurora_bus_retries_total").await, 0);
    daemon.stop().await;
}
