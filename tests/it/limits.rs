//! The limits of the listener per address, on the real binary.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use futures_util::FutureExt as _;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_tungstenite::client_async;

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::until;

/// The address that exceeds its limits. The helpers of the tests use another one.
const GREEDY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const EVENTS: &str = "/api/v1/streams/aurora:alerts/events";
const REQUEST: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn home(http: &str) -> Home {
    let stream = "[[streams]]\nname = \"aurora:alerts\"\nrelay = true\n";
    let cps = "[[streams]]\nname = \"aurora:cps:alerts\"\nrelay = true\n";
    Home::new(&format!("{stream}{cps}[relay]\ndrain_window = \"200ms\"\n[http]\n{http}\n"))
}

async fn connect(daemon: &Daemon) -> TcpStream {
    let address: SocketAddr = daemon.url("").trim_start_matches("http://").parse().expect("an address");
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from((GREEDY, 0))).expect("all of 127.0.0.0/8 is this machine");
    socket.connect(address).await.expect("it listens")
}

/// Returns the bytes until the daemon closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut rest = String::new();
    timeout(BOUND, stream.read_to_string(&mut rest)).await.expect("the daemon closes").expect("an end");
    rest
}

/// Returns the bytes up to and including a text.
async fn up_to(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        let byte = timeout(BOUND, stream.read_u8()).await.expect("a response");
        bytes.push(byte.unwrap_or_else(|error| panic!("{error} after {}", String::from_utf8_lossy(&bytes))));
    }
    String::from_utf8(bytes).expect("UTF-8")
}

#[tokio::test]
async fn silent_connections_of_one_address_do_not_block_others() {
    let home = home("max_idle_per_address = 3\nheader_timeout = \"1m\"");
    let daemon = home.start().await;
    let mut silent = [connect(&daemon).await, connect(&daemon).await, connect(&daemon).await];
    silent[0].write_all(b"GET /health HTTP/1.1\r\nhost: local").await.expect("sent");
    let rejection = rest(&mut connect(&daemon).await).await;
    assert!(rejection.starts_with("HTTP/1.1 503 "), "{rejection}");
    let refused = "aurora_bus_rejected_total{reason=\"idle_connection_limit\"} 1\n";
    assert!(daemon.get("/metrics").await.contains(refused), "another address gets responses, and the metric");
    silent[0].write_all(b"host\r\nconnection: close\r\n\r\n").await.expect("sent");
    let response = rest(&mut silent[0]).await;
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    until("a free slot for an idle connection", BOUND, async || {
        let mut stream = connect(&daemon).await;
        // If the connection is rejected already, the response may be lost.
        stream.write_all(REQUEST.as_bytes()).await.ok()?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.ok()?;
        (&status == b"HTTP/1.1 200").then_some(())
    })
    .await;
    drop(silent);
    daemon.stop().await;
}

#[tokio::test]
async fn keep_alive_needs_a_free_idle_slot_of_the_address() {
    let home = home("max_idle_per_address = 1\nheader_timeout = \"1m\"");
    let daemon = home.start().await;
    let mut client = connect(&daemon).await;
    for _ in 0..3 {
        client.write_all(REQUEST.as_bytes()).await.expect("sent");
        let head = up_to(&mut client, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("connection: close"), "{head}");
        up_to(&mut client, "}").await;
    }
    let publish =
        format!("POST {EVENTS} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 7\r\n\r\n");
    client.write_all(publish.as_bytes()).await.expect("sent");
    up_to(&mut client, "\r\n\r\n").await;
    // The idle slot is free while the request is handled.
    let silent = connect(&daemon).await;
    let rejection = rest(&mut connect(&daemon).await).await;
    assert!(rejection.starts_with("HTTP/1.1 503 "), "{rejection}");
    client.write_all(br#"{"n":1}"#).await.expect("sent");
    let response = rest(&mut client).await;
    assert!(response.starts_with("HTTP/1.1 201 ") && response.contains("connection: close\r\n"), "{response}");
    drop(silent);
    daemon.stop().await;
}

#[tokio::test]
async fn web_sockets_and_feeds_are_not_idle() {
    let home = home("max_idle_per_address = 1\nheader_timeout = \"1m\"");
    let daemon = home.start().await;
    let (mut sockets, mut feeds) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let url = daemon.url("/api/v1/ws/alerts").replacen("http", "ws", 1);
        sockets.push(client_async(url, connect(&daemon).await).await.expect("a WebSocket").0);
        let mut feed = connect(&daemon).await;
        let request = "GET /api/v1/feeds/alerts HTTP/1.1\r\nhost: localhost\r\n\r\n";
        feed.write_all(request.as_bytes()).await.expect("sent");
        let head = up_to(&mut feed, "\r\n\r\n").await;
        assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("connection: close"), "{head}");
        feeds.push(feed);
    }
    let mut client = connect(&daemon).await;
    client.write_all(REQUEST.as_bytes()).await.expect("sent");
    let head = up_to(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    drop((sockets, feeds));
    daemon.stop().await;
}

#[tokio::test]
async fn one_address_may_hold_half_of_the_waiting_reads() {
    let home = home("");
    let daemon = home.start().await;
    let greedy = reqwest::Client::builder().local_address(IpAddr::from(GREEDY)).build().expect("a client");
    let mut waiting = JoinSet::new();
    for _ in 0..33 {
        let request = greedy.get(daemon.url(&format!("{EVENTS}?wait_ms=20000"))).send();
        waiting.spawn(request.map(|response| response.expect("a response")));
    }
    // The other requests wait for longer than this.
    let refused = timeout(BOUND, waiting.join_next()).await.expect("a refusal").expect("a response").expect("a task");
    assert_eq!(
        (refused.status(), &refused.headers()["retry-after"]),
        (StatusCode::TOO_MANY_REQUESTS, &"1".parse().expect("a value"))
    );
    let problem: Value = serde_json::from_slice(&refused.bytes().await.expect("a body")).expect("JSON");
    assert_eq!(problem["code"], json!("too_many_waiting"));
    let other = daemon.get(&format!("{EVENTS}?wait_ms=50")).await;
    assert!(other.starts_with(r#"{"events":[],"#), "another address may wait: {other}");
    daemon.publish("aurora:alerts", &["{}".to_owned()]).await.expect("accepted");
    for response in waiting.join_all().await {
        assert_eq!(response.status(), StatusCode::OK);
    }
    daemon.stop().await;
}
