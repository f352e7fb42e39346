//! The drain of a daemon with hundreds of dashboards.

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

/// Returns the time at which a socket was closed with 4000, and the delay in its `drain` frame, if there was one.
async fn close(mut socket: Socket) -> (Instant, Option<Duration>) {
    let mut planned = None;
    let closed = async {
        loop {
            match socket.next().await.expect("a close").expect("no broken connection") {
                Message::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).expect("a frame");
                    if frame["t"] == "drain" {
                        planned = frame["after_ms"].as_u64().map(Duration::from_millis);
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
    (at, planned)
}

/// Counts the times in each tenth of the window. Later ones count in the last.
fn histogram(times: impl Iterator<Item = Duration>) -> [usize; BUCKETS] {
    let mut buckets = [0; BUCKETS];
    for time in times {
        let bucket = time.as_micros() * BUCKETS as u128 / WINDOW.as_micros();
        buckets[usize::try_from(bucket).expect("a small number").min(BUCKETS - 1)] += 1;
    }
    buckets
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_closes_dashboards_evenly_over_the_window() {
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
    // A new client receives a status that programs can see.
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

    // The planned times are even, even on a busy machine.
    let planned: Vec<Duration> = ends.iter().filter_map(|(_, planned)| *planned).collect();
    assert_eq!(planned.len(), SOCKETS / 2, "every rich client receives the delay");
    assert!(planned.iter().all(|after| *after <= WINDOW));
    let share = SOCKETS / 2 / BUCKETS;
    let planned_counts = histogram(planned.into_iter());
    assert!(
        planned_counts.iter().all(|count| (1..=share * 5 / 2).contains(count)),
        "{planned_counts:?} of {share} each"
    );
    // The actual times are nearly even: a busy machine delays them by some buckets.
    let share = SOCKETS / BUCKETS;
    let actual_counts = histogram(ends.iter().map(|(at, _)| at.duration_since(began)));
    assert!(actual_counts.iter().all(|count| *count <= share * 4), "{actual_counts:?} of {share} each");
    let late = ends.iter().filter(|(at, _)| *at > refused).count();
    assert!(late > SOCKETS / 4, "only {late} were connected when readiness failed");
    assert!(began.elapsed() < WINDOW + Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_does_not_wait_for_dashboards() {
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
fn drain_window_longer_than_the_grace_is_rejected() {
    let home = Home::new(&format!("{CONFIG}\n[shutdown]\ngrace = \"3s\"\n"));
    let output = home.run(&["check", "--config", "aurora-bus.toml"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && stderr.contains("relay.drain_window: must be shorter"), "{stderr}");
}
