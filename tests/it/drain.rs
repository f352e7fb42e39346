//! How the daemon takes leave of hundreds of dashboards.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::app::{BOUND, Home, Socket, next_text};
use crate::support::until;

const SOCKETS: usize = 300;
const WINDOW: Duration = Duration::from_secs(3);
const BUCKETS: usize = 10;

const CONFIG: &str = r#"
[relay]
drain_window = "3s"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
"#;

/// When a socket was closed with 4000, and after how long the `drain` frame had said it would be, if there was one.
async fn close(mut socket: Socket) -> (Instant, Option<Duration>) {
    let mut told = None;
    let closed = async {
        loop {
            match socket.next().await.expect("a close").expect("no broken connection") {
                Message::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).expect("a frame");
                    if frame["t"] == "drain" {
                        told = frame["after_ms"].as_u64().map(Duration::from_millis);
                    }
                }
                Message::Close(frame) => {
                    assert_eq!(frame.map(|frame| u16::from(frame.code)), Some(4000));
                    return Instant::now();
                }
                _ => {}
            }
        }
    };
    let at = timeout(BOUND, closed).await.expect("closed in time");
    (at, told)
}

/// How many fall into each tenth of the window; those beyond it into the last.
fn histogram(times: impl Iterator<Item = Duration>) -> [usize; BUCKETS] {
    let mut buckets = [0; BUCKETS];
    for time in times {
        let bucket = time.as_micros() * BUCKETS as u128 / WINDOW.as_micros();
        buckets[usize::try_from(bucket).expect("a small number").min(BUCKETS - 1)] += 1;
    }
    buckets
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dashboards_are_closed_evenly_over_the_window_after_readiness_has_said_no() {
    let home = Home::new(CONFIG);
    let daemon = home.start().await;
    let mut sockets = Vec::new();
    for n in 0..SOCKETS {
        let is_rich = n % 2 == 0;
        let mut socket = daemon.watch(if is_rich { "/api/v1/ws/alerts?v=1" } else { "/api/v1/ws/alerts" }).await;
        if is_rich {
            assert!(next_text(&mut socket).await.contains(r#""t":"welcome""#));
        }
        sockets.push(socket);
    }
    let mut closes = JoinSet::new();
    for socket in sockets {
        closes.spawn(close(socket));
    }
    let began = Instant::now();
    daemon.signal("TERM");
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    let refused = Instant::now();
    // Whoever comes now is sent elsewhere, by a status that programs see.
    let url = daemon.url("/api/v1/ws/alerts").replacen("http", "ws", 1);
    match tokio_tungstenite::connect_async(&url).await {
        Err(Error::Http(response)) => assert_eq!(response.status().as_u16(), 503),
        other => panic!("not refused: {other:?}"),
    }
    let mut ends = Vec::new();
    while let Some(end) = closes.join_next().await {
        ends.push(end.expect("closed in order"));
    }
    let ended = daemon.ended().await;
    assert_eq!(ended.status.code(), Some(0), "{}", ended.log);

    // What was decided is even, whatever this machine makes of it.
    let told: Vec<Duration> = ends.iter().filter_map(|(_, told)| *told).collect();
    assert_eq!(told.len(), SOCKETS / 2, "whoever can be told is told");
    assert!(told.iter().all(|after| *after <= WINDOW));
    let share = SOCKETS / 2 / BUCKETS;
    let decided = histogram(told.into_iter());
    assert!(decided.iter().all(|count| (1..=share * 5 / 2).contains(count)), "{decided:?} of {share} each");
    // What happened is nearly so: a busy machine is late by some buckets.
    let share = SOCKETS / BUCKETS;
    let happened = histogram(ends.iter().map(|(at, _)| at.duration_since(began)));
    assert!(happened.iter().all(|count| *count <= share * 4), "{happened:?} of {share} each");
    let late = ends.iter().filter(|(at, _)| *at > refused).count();
    assert!(late > SOCKETS / 4, "only {late} were still there when readiness had said no");
    assert!(began.elapsed() < WINDOW + Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_does_not_wait_for_dashboards() {
    let home = Home::new(&CONFIG.replace("\"3s\"", "\"20s\""));
    let daemon = home.start().await;
    let mut sockets = Vec::new();
    for _ in 0..30 {
        sockets.push(daemon.watch("/api/v1/ws/alerts").await);
    }
    daemon.signal("TERM");
    until("drain", BOUND, async || (daemon.status("/ready").await != Some(StatusCode::OK)).then_some(())).await;
    let signalled = Instant::now();
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert!(signalled.elapsed() < Duration::from_secs(5), "{}", ended.log);
    assert_ne!(ended.status.code(), Some(0), "{}", ended.log);
}

#[test]
fn a_window_longer_than_the_grace_is_refused() {
    let home = Home::new(&format!("{CONFIG}\n[shutdown]\ngrace = \"3s\"\n"));
    let output = home.run(&["check", "--config", "aurora-bus.toml"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("relay.drain_window: must be shorter"), "{told}");
}
