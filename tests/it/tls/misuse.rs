//! Clients that send no TLS, or do not complete a handshake.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::{address, curl, home, secure, text};
use crate::support::app::BOUND;
use crate::support::until;

/// Sends bytes, and returns the response until the daemon closes the connection.
async fn exchange(address: &str, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    stream.write_all(bytes).await.expect("sent");
    let mut response = Vec::new();
    // A reset after the response counts as the end.
    drop(timeout(BOUND, stream.read_to_end(&mut response)).await.expect("the daemon closes"));
    text(&response)
}

#[tokio::test]
async fn plain_http_gets_a_hint_to_use_tls() {
    let (home, _authority) = home("");
    let daemon = home.start().await;
    let address = address(&daemon);
    let response = exchange(&address, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(response.starts_with("HTTP/1.1 400 ") && response.contains("This port requires TLS"), "{response}");
    assert_eq!(exchange(&address, &[0; 100]).await, "");
    let alert = exchange(&address, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00").await;
    assert_eq!(alert.chars().next(), Some('\u{15}'), "an alert: {alert:?}");
    let metrics = daemon.get("/metrics").await;
    for outcome in ["plain", "failed", "ok"] {
        let line = format!("aurora_bus_http_tls_handshakes_total{{outcome=\"{outcome}\"}}");
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn silent_clients_block_no_others_and_are_closed() {
    let (home, authority) = home("handshake_timeout = \"2s\"\nmax_handshakes_per_address = 100");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let address = address(&daemon);
    let started = Instant::now();
    let mut silent = Vec::new();
    for n in 0..80 {
        let mut stream = TcpStream::connect(&address).await.expect("it listens");
        if n % 2 == 0 {
            // The start of a handshake that does not continue.
            stream.write_all(b"\x16\x03\x01\x02\x00\x01").await.expect("sent");
        }
        silent.push(stream);
    }
    assert!(curl(&ca, &[&daemon.url("/health")]).status.success());
    assert!(secure(&daemon, &ca).await.is_ok());
    for stream in &mut silent {
        let mut rest = Vec::new();
        drop(timeout(BOUND, stream.read_to_end(&mut rest)).await.expect("the daemon closes"));
    }
    assert!(started.elapsed() >= Duration::from_secs(2), "silent clients have their time limit");
    daemon.stop().await;
}

#[tokio::test]
async fn silent_clients_use_up_only_the_limit_of_their_address() {
    let (mut home, authority) = home("handshake_timeout = \"1m\"");
    home.set_env("AURORA_BUS__HTTP__MAX_IDLE_PER_ADDRESS", "2");
    let daemon = home.start().await;
    let ca = authority.path("ca.pem");
    let greedy = async || {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 2], 0).into()).expect("all of 127.0.0.0/8 is this machine");
        socket.connect(address(&daemon).parse().expect("an address")).await.expect("it listens")
    };
    let mut held = [greedy().await, greedy().await];
    // The start of a handshake that does not continue.
    held[0].write_all(b"\x16\x03\x01\x02\x00\x01").await.expect("sent");
    let mut refused = Vec::new();
    timeout(BOUND, greedy().await.read_to_end(&mut refused)).await.expect("the daemon closes").expect("an end");
    assert_eq!(text(&refused), "");
    assert!(secure(&daemon, &ca).await.is_ok(), "another address");
    drop(held);
    until("a free slot", BOUND, async || {
        curl(&ca, &["--interface", "127.0.0.2", &daemon.url("/health")]).status.success().then_some(())
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn concurrent_handshakes_are_limited_per_address() {
    let (home, authority) = home("max_handshakes_per_address = 3\nhandshake_timeout = \"1m\"");
    let daemon = home.start().await;
    let address = address(&daemon);
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(&address).await.expect("it listens");
        stream.write_all(b"\x16\x03\x01\x02\x00\x01").await.expect("sent");
        held.push(stream);
    }
    let ca = authority.path("ca.pem");
    // The connections may not be accepted yet.
    let waits = async || timeout(Duration::from_millis(500), secure(&daemon, &ca)).await.is_err().then_some(());
    until("a connection that waits", BOUND, waits).await;
    let other = curl(&ca, &["--interface", "127.0.0.2", &daemon.url("/health")]);
    assert!(other.status.success(), "another address: {}", text(&other.stderr));
    drop(held);
    assert!(secure(&daemon, &ca).await.is_ok(), "a slot is free");
    daemon.stop().await;
}

#[tokio::test]
async fn unread_response_is_dropped_over_tls_too() {
    let (mut home, authority) = home("");
    home.set_env("AURORA_BUS__HTTP__WRITE_TIMEOUT", "1s");
    let daemon = home.start().await;
    let payload = format!(r#"{{"x":"{}"}}"#, "x".repeat(500_000));
    for _ in 0..20 {
        daemon.publish("aurora:alerts", std::slice::from_ref(&payload)).await.expect("accepted");
    }
    let mut stream = secure(&daemon, &authority.path("ca.pem")).await.expect("a handshake");
    let request = "GET /api/v1/streams/aurora:alerts/events?from=0-0&limit=20 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("sent");
    until("the end of the connection", BOUND, async || {
        let counted = "aurora_bus_http_requests_total{route=\"/api/v1/streams/{stream}/events\",status=\"200\"} 1";
        let is_answered = daemon.get("/metrics").await.contains(counted);
        (is_answered && daemon.metric("aurora_bus_http_connections").await == 1).then_some(())
    })
    .await;
    daemon.stop().await;
}
