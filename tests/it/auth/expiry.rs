//! Connections whose token expires.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tokio::time::timeout;

use super::watching::{closed, frame, open, send_frame};
use super::{STREAMS, bearer, filtered_token, issuer_toml, send_request, token};
use crate::support::app::{BOUND, Home};

const SCOPES: &[&str] = &["ws:alerts"];
const RICH: (&str, &str) = ("sec-websocket-protocol", "aurora.v1");

fn home() -> Home {
    Home::new(&format!("{STREAMS}\n{}", issuer_toml()))
}

#[tokio::test]
async fn sockets_and_feeds_end_when_their_token_expires() {
    let home = home();
    let daemon = home.start().await;
    let token = bearer(&token("ann", SCOPES, None, 6));
    let began = Instant::now();
    let (mut plain, _) = open(&daemon, "alerts", &[("authorization", &token)]).await.expect("accepted");
    let (mut rich, _) = open(&daemon, "alerts", &[("authorization", &token), RICH]).await.expect("accepted");
    let mut feed = send_request(&daemon, "GET", "/api/v1/feeds/alerts", &[("authorization", &token)], "").await;
    assert_eq!(feed.status(), StatusCode::OK);
    assert_eq!(frame(&mut rich).await["t"], "welcome");
    let warning = frame(&mut rich).await;
    assert!(warning["t"] == "expiring" && warning["in"].as_u64().is_some_and(|left| left <= 6), "{warning}");
    assert_eq!(closed(&mut plain).await.0, 4003);
    let (code, reason) = closed(&mut rich).await;
    assert!(code == 4003 && reason.starts_with("expired: "), "{code} {reason}");
    let rest = timeout(BOUND, feed.chunk()).await.expect("it ends").expect("properly");
    assert_eq!(rest, None);
    assert!(began.elapsed() >= Duration::from_secs(4), "not before the expiry");
    daemon.stop().await;
}

#[tokio::test]
async fn newer_token_of_the_same_principal_extends_a_socket() {
    let home = home();
    let daemon = home.start().await;
    let first = bearer(&token("ann", SCOPES, Some("acme"), 8));
    let (mut socket, _) = open(&daemon, "alerts", &[("authorization", &first), RICH]).await.expect("accepted");
    let (mut unrenewed, _) = open(&daemon, "alerts", &[("authorization", &first)]).await.expect("accepted");
    assert_eq!(frame(&mut socket).await["t"], "welcome");
    assert_eq!(frame(&mut socket).await["t"], "expiring");
    let bad = [
        (json!(token("bob", SCOPES, Some("acme"), 600)), 403),
        (json!(token("ann", SCOPES, Some("globex"), 600)), 403),
        (json!(token("ann", SCOPES, None, 600)), 403),
        (json!(filtered_token("ann", SCOPES, Some("acme"), Some(json!({"key": "title", "cmp": "exists"})), 600)), 403),
        (json!(token("ann", &["ws:agent_thoughts"], Some("acme"), 600)), 403),
        (json!("nonsense"), 401),
        (json!("ab_guess"), 401),
    ];
    for (index, (token, code)) in bad.into_iter().enumerate() {
        send_frame(&mut socket, json!({"op": "auth", "id": index, "token": token})).await;
        let body = frame(&mut socket).await;
        assert_eq!((&body["t"], &body["id"], &body["code"]), (&json!("error"), &json!(index), &json!(code)), "{body}");
    }
    send_frame(&mut socket, json!({"op": "auth", "id": 90})).await;
    assert_eq!(frame(&mut socket).await["code"], 400);
    send_frame(&mut socket, json!({"op": "auth", "id": 91, "token": token("ann", SCOPES, Some("acme"), 600)})).await;
    let body = frame(&mut socket).await;
    assert!(body["t"] == "ok" && body["id"] == 91 && body["exp"].is_u64(), "{body}");
    // After the expiry of the first token, the socket still works.
    assert_eq!(closed(&mut unrenewed).await.0, 4003);
    send_frame(&mut socket, json!({"op": "ping", "id": 92})).await;
    assert_eq!(frame(&mut socket).await["t"], "pong");
    // A token that expires earlier shortens the session.
    send_frame(&mut socket, json!({"op": "auth", "id": 93, "token": token("ann", SCOPES, Some("acme"), 4)})).await;
    assert_eq!(frame(&mut socket).await["t"], "ok");
    assert_eq!(closed(&mut socket).await.0, 4003);
    daemon.stop().await;
}
