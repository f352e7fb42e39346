//! External workers over a WebSocket: pulls, settlements on the same or another socket, and leases of closed sockets.

use std::time::{Duration, Instant};

use futures_util::SinkExt as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::app::{BOUND, Daemon, Home, Socket, next_text};
use crate::support::until;

const TASKS: &str = "aurora:agent:tasks";

fn home(config: &str) -> Home {
    Home::new(&format!(
        "{config}\n[relay]\ndrain_window = \"300ms\"\n[[streams]]\nname = \"aurora:alerts\"\nrelay = true\n\
         [[streams]]\nname = \"aurora:agent:tasks\"\n[[streams.groups]]\nname = \"agents\"\nclaim_idle = \"10s\"\n\
         max_deliveries = 3\n"
    ))
}

async fn open(daemon: &Daemon) -> Socket {
    let mut socket = daemon.watch("/api/v1/ws/alerts?v=1").await;
    assert_eq!(frame(&mut socket).await["t"], "welcome");
    socket
}

async fn frame(socket: &mut Socket) -> Value {
    serde_json::from_str(&next_text(socket).await).expect("JSON")
}

async fn send(socket: &mut Socket, body: Value) {
    socket.send(Message::text(body.to_string())).await.expect("an open socket");
}

/// Sends a request and returns the response.
async fn request(socket: &mut Socket, body: Value) -> Value {
    send(socket, body).await;
    frame(socket).await
}

async fn publish(daemon: &Daemon, count: usize) {
    let payloads: Vec<String> = (0..count).map(|n| format!("{{\"task_id\":\"t{n}\"}}")).collect();
    daemon.publish(TASKS, &payloads).await.expect("accepted");
}

/// Receives the next task: its id, its token and its attempt.
async fn task(socket: &mut Socket) -> (String, String, u64) {
    let frame = frame(socket).await;
    assert_eq!((&frame["t"], &frame["s"], &frame["g"]), (&json!("task"), &json!(TASKS), &json!("agents")), "{frame}");
    let task = &frame["task"];
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    (text(&task["data"]["task_id"]), text(&task["token"]), task["attempt"].as_u64().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_are_pulled_as_they_come_and_settled_on_any_socket() {
    let home = home("");
    let daemon = home.start().await;
    let mut agent = open(&daemon).await;
    let pull = json!({"op": "pull", "id": 1, "stream": TASKS, "n": 3, "lease_s": 8});
    assert_eq!(request(&mut agent, pull).await, json!({"t": "ok", "id": 1}));
    publish(&daemon, 2).await;
    let (first, second) = (task(&mut agent).await, task(&mut agent).await);
    assert_eq!((first.0.as_str(), second.0.as_str()), ("t0", "t1"));
    let ok = |id: u64| json!({"t": "ok", "id": id});
    assert_eq!(request(&mut agent, json!({"op": "extend", "id": 2, "token": first.1, "lease_s": 9.5})).await, ok(2));
    assert_eq!(request(&mut agent, json!({"op": "done", "id": 3, "token": first.1})).await, ok(3));
    let again = request(&mut agent, json!({"op": "done", "id": 4, "tokens": [first.1, "nonsense"]})).await;
    assert_eq!((&again["t"], &again["code"], &again["retry"]), (&json!("error"), &json!(409), &json!(false)));
    assert_eq!(again["tokens"], json!(["nonsense", first.1]));
    let nothing = request(&mut agent, json!({"op": "done", "id": 4, "token": "nonsense"})).await;
    assert_eq!((&nothing["code"], &nothing["tokens"]), (&json!(409), &json!(["nonsense"])));
    assert_eq!(request(&mut agent, json!({"op": "nack", "id": 5, "token": second.1, "reason": "busy"})).await, ok(5));
    let back = task(&mut agent).await;
    assert_eq!((back.0.as_str(), back.2), ("t1", 2), "the third of the three requested");
    let mut other = open(&daemon).await;
    assert_eq!(
        request(&mut other, json!({"op": "done", "id": 1, "tokens": [back.1]})).await,
        ok(1),
        "on another socket"
    );
    daemon.handled(TASKS, "agents").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closed_socket_releases_leases_until_task_is_exhausted() {
    let home = home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    for attempt in 1..=3 {
        let mut agent = open(&daemon).await;
        send(&mut agent, json!({"op": "pull", "stream": TASKS, "group": "agents", "consumer": "agent-1"})).await;
        let began = Instant::now();
        assert_eq!(task(&mut agent).await.2, attempt);
        assert!(began.elapsed() < Duration::from_secs(8), "before the end of the lease");
        drop(agent);
    }
    let letter = until("dead letter", BOUND, async || {
        let page: Value = serde_json::from_str(&daemon.get(&format!("/api/v1/dead-letters/{TASKS}")).await).ok()?;
        page["dead_letters"].get(0).cloned()
    })
    .await;
    assert_eq!((&letter["reason"], &letter["attempts"]), (&json!("exhausted"), &json!(3)));
    assert_eq!(letter["error"], "the connection of its worker has closed");
    daemon.handled(TASKS, "agents").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_keeps_its_leases_over_a_daemon_restart() {
    let home = home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let mut agent = open(&daemon).await;
    send(&mut agent, json!({"op": "pull", "stream": TASKS, "n": 5})).await;
    let (_, token, _) = task(&mut agent).await;
    daemon.signal("TERM");
    assert_eq!(frame(&mut agent).await["t"], "drain");
    assert_eq!(daemon.ended().await.status.code(), Some(0));
    let daemon = home.start().await;
    let mut agent = open(&daemon).await;
    assert_eq!(request(&mut agent, json!({"op": "done", "id": 7, "token": token})).await, json!({"t": "ok", "id": 7}));
    daemon.handled(TASKS, "agents").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unsent_tasks_are_released_at_once_on_drain() {
    let home = home("");
    let file = home.path("aurora-bus.toml");
    let config = std::fs::read_to_string(&file).expect("the configuration");
    std::fs::write(&file, config.replace("\"10s\"", "\"10m\"")).expect("a writable folder");
    let daemon = home.start().await;
    // The worker does not read, and the tasks exceed all buffers in between.
    let pad = "x".repeat(1_000_000);
    for n in 0..20 {
        let task = json!({"task_id": format!("t{n}"), "pad": pad}).to_string();
        daemon.publish(TASKS, &[task]).await.expect("accepted");
    }
    let mut agent = open(&daemon).await;
    for _ in 0..8 {
        send(&mut agent, json!({"op": "pull", "stream": TASKS, "n": 4})).await;
    }
    let given = "aurora_bus_pull_deliveries_total";
    until("leases", BOUND, async || (daemon.metric(given).await == 20).then_some(())).await;
    daemon.signal("TERM");
    assert_eq!(daemon.ended().await.status.code(), Some(0));
    let daemon = home.start().await;
    let mut other = open(&daemon).await;
    send(&mut other, json!({"op": "pull", "stream": TASKS, "n": 20})).await;
    for _ in 0..10 {
        assert_eq!(task(&mut other).await.2, 2);
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_requests_get_error_codes() {
    let home = home("[pull]\nmax_batch = 10");
    let daemon = home.start().await;
    let mut agent = open(&daemon).await;
    let cases = [
        (json!({"op": "pull"}), 400),
        (json!({"op": "pull", "stream": "nothing"}), 400),
        (json!({"op": "pull", "stream": "nothing", "group": "g"}), 404),
        (json!({"op": "pull", "stream": TASKS, "group": "nobody"}), 404),
        (json!({"op": "pull", "stream": TASKS, "n": 11}), 400),
        (json!({"op": "pull", "stream": TASKS, "n": "x"}), 400),
        (json!({"op": "pull", "stream": TASKS, "lease_s": -1}), 400),
        (json!({"op": "pull", "stream": TASKS, "lease_s": 1e300}), 400),
        (json!({"op": "done"}), 400),
        (json!({"op": "done", "token": "nonsense"}), 409),
        (json!({"op": "publish", "stream": "aurora:alerts"}), 400),
        (json!({"op": "publish", "stream": "nothing", "data": {}}), 404),
        (json!({"op": "publish", "stream": "aurora:alerts", "data": [1]}), 422),
        (json!({"op": "ack", "s": "aurora:alerts", "p": "nonsense"}), 422),
        (json!({"op": "ack", "s": "aurora:alerts", "p": "none:1-1"}), 410),
        (json!({"op": "subscribe", "batch": {"max": 0}}), 422),
        (json!({"op": "subscribe", "batch": {"ms": 5_001}}), 422),
        (json!({"op": "dance"}), 400),
    ];
    for (id, (mut body, code)) in cases.into_iter().enumerate() {
        body["id"] = id.into();
        send(&mut agent, body.clone()).await;
        let response = loop {
            let response = frame(&mut agent).await;
            if response["t"] != "ok" {
                break response;
            }
        };
        assert_eq!((&response["t"], &response["code"]), (&json!("error"), &json!(code)), "{body}: {response}");
    }
    send(&mut agent, json!({"op": "dance"})).await;
    let pong = request(&mut agent, json!({"op": "ping", "id": 99})).await;
    assert_eq!((&pong["t"], &pong["id"]), (&json!("pong"), &json!(99)), "an unknown request without an id is ignored");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn event_published_on_a_socket_is_stored_once_and_ack_counts() {
    let home = home("");
    let daemon = home.start().await;
    let mut agent = open(&daemon).await;
    let publish = json!({"op": "publish", "id": 1, "stream": "aurora:alerts", "data": {"n": 1}, "key": "finding-1"});
    let (first, second) = (request(&mut agent, publish.clone()).await, request(&mut agent, publish).await);
    assert_eq!((&first["t"], &first["duplicate"], &second["duplicate"]), (&json!("ok"), &json!(false), &json!(true)));
    assert_eq!((&first["entry"], &first["event_id"]), (&second["entry"], &second["event_id"]));
    let events = daemon.events("aurora:alerts").await;
    assert_eq!(
        events.into_iter().collect::<Vec<_>>(),
        [(first["entry"].as_str().expect("an id").to_owned(), "{\"n\":1}".to_owned())]
    );

    send(&mut agent, json!({"op": "subscribe", "id": 2, "since": "earliest"})).await;
    let event = loop {
        let frame = frame(&mut agent).await;
        if frame["t"] == "event" {
            break frame;
        }
    };
    let seen = json!({"op": "ack", "id": 3, "s": event["s"], "p": event["p"]});
    send(&mut agent, seen).await;
    let ok = loop {
        let frame = frame(&mut agent).await;
        if frame["id"] == 3 {
            break frame;
        }
    };
    assert_eq!(ok, json!({"t": "ok", "id": 3}));
    assert_eq!(daemon.metric("aurora_bus_relay_seen_seconds_count").await, 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batched_events_arrive_once_and_in_order() {
    let home = home("");
    let daemon = home.start().await;
    let alerts = |from: usize| (from..from + 100).map(|n| format!("{{\"n\":{n}}}")).collect::<Vec<_>>();
    daemon.publish("aurora:alerts", &alerts(0)).await.expect("accepted");
    let mut dashboard = open(&daemon).await;
    let batch = json!({"max": 30, "ms": 100});
    send(&mut dashboard, json!({"op": "subscribe", "id": 1, "since": "earliest", "batch": batch})).await;
    let (mut seen, mut last, mut longest, mut is_live, mut more) = (Vec::new(), Value::Null, 0, false, false);
    while seen.len() < 200 {
        let frame = frame(&mut dashboard).await;
        match frame["t"].as_str() {
            Some("events") => {
                let events = frame["e"].as_array().expect("a list");
                longest = longest.max(events.len());
                seen.extend(events.iter().map(|event| event[1]["n"].as_u64().expect("a number")));
                last = events.last().expect("at least one")[0].clone();
            }
            Some("live") => is_live = true,
            Some("subscribed" | "mark") => {}
            _ => panic!("{frame}"),
        }
        if is_live && seen.len() == 100 && !std::mem::replace(&mut more, true) {
            daemon.publish("aurora:alerts", &alerts(100)).await.expect("accepted");
        }
    }
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
    assert_eq!(longest, 30);
    let left = request(&mut dashboard, json!({"op": "unsubscribe", "id": 2})).await;
    assert_eq!((&left["t"], &left["p"]), (&json!("ok"), &last));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filter_replaced_during_a_batch_reports_its_start_position() {
    let home = home("");
    let daemon = home.start().await;
    let mut dashboard = open(&daemon).await;
    let subscribe = json!({"op": "subscribe", "id": 1, "since": "earliest", "batch": {"max": 100, "ms": 5_000}});
    send(&mut dashboard, subscribe).await;
    let subscribed = frame(&mut dashboard).await;
    assert_eq!(frame(&mut dashboard).await["t"], "live");
    daemon.publish("aurora:alerts", &["{\"n\":1}".to_owned(), "{\"n\":2}".to_owned()]).await.expect("accepted");
    let mut watcher = daemon.watch("/api/v1/ws/alerts?since=earliest&stream=aurora:alerts").await;
    for expected in ["{\"n\":1}", "{\"n\":2}"] {
        assert_eq!(next_text(&mut watcher).await, expected);
    }
    assert_eq!(request(&mut dashboard, json!({"op": "ping", "id": 2})).await["t"], "pong");
    let replaced = request(&mut dashboard, json!({"op": "filter", "id": 3})).await;
    assert_eq!((&replaced["t"], &replaced["p"]), (&json!("ok"), &subscribed["from"]), "no event was sent yet");
    let events = frame(&mut dashboard).await;
    assert_eq!((&events["t"], events["e"].as_array().map(Vec::len)), (&json!("events"), Some(2)));
    daemon.stop().await;
}
