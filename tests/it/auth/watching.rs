//! Dashboards with credentials: close codes, subprotocols, tickets, connection limits.

use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{HeaderName, HeaderValue};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{Keys, bearer, issuer_toml, request_as, send_request, token};
use crate::support::app::{BOUND, Daemon, Home, Socket, next_text};
use crate::support::until;

/// Opens a WebSocket, and returns it with the confirmed subprotocol.
pub(crate) async fn open(
    daemon: &Daemon,
    target: &str,
    headers: &[(&'static str, &str)],
) -> Result<(Socket, Option<String>), StatusCode> {
    let mut handshake =
        daemon.url(&format!("/api/v1/ws/{target}")).replacen("http", "ws", 1).into_client_request().expect("a URL");
    for (name, value) in headers {
        let value = HeaderValue::from_str(value).expect("a value");
        handshake.headers_mut().insert(HeaderName::from_static(name), value);
    }
    match tokio_tungstenite::connect_async(handshake).await {
        Ok((socket, response)) => {
            let protocol = response.headers().get("sec-websocket-protocol");
            Ok((socket, protocol.map(|value| value.to_str().expect("ASCII").to_owned())))
        }
        Err(Error::Http(response)) => Err(StatusCode::from_u16(response.status().as_u16()).expect("a status")),
        Err(error) => panic!("{error}"),
    }
}

/// Waits for the close frame, and returns its code and reason.
pub(crate) async fn closed(socket: &mut Socket) -> (u16, String) {
    let ends = async {
        loop {
            match socket.next().await.expect("a close frame").expect("a close frame") {
                Message::Close(Some(frame)) => return (frame.code.into(), frame.reason.to_string()),
                Message::Close(None) => panic!("closed without a code"),
                _ => {}
            }
        }
    };
    timeout(BOUND, ends).await.expect("closed in time")
}

pub(crate) async fn frame(socket: &mut Socket) -> Value {
    serde_json::from_str(&next_text(socket).await).expect("a JSON frame")
}

pub(crate) async fn send_frame(socket: &mut Socket, request: Value) {
    socket.send(Message::text(request.to_string())).await.expect("sent");
}

#[tokio::test]
async fn refused_program_gets_a_status_and_page_a_close_code() {
    let mut keys = Keys::default();
    let other = keys.add("other", &["ws:agent_thoughts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let other = bearer(&other);
    let cases = [
        (vec![], StatusCode::UNAUTHORIZED, 4501, "unauthenticated: "),
        (
            vec![("authorization", "Bearer ab_guess")],
            StatusCode::UNAUTHORIZED,
            4501,
            "unauthenticated: the API key is not valid",
        ),
        (
            vec![("authorization", other.as_str())],
            StatusCode::FORBIDDEN,
            4502,
            "forbidden: the scope `ws:alerts` is required",
        ),
    ];
    for (headers, status, code, reason) in cases {
        for protocol in [None, Some(("sec-websocket-protocol", "aurora.v1"))] {
            let headers: Vec<_> = headers.iter().copied().chain(protocol).collect();
            assert_eq!(open(&daemon, "alerts", &headers).await.err(), Some(status), "{reason}");
            let page: Vec<_> = headers.into_iter().chain([("origin", "http://127.0.0.1")]).collect();
            let (mut socket, _) = open(&daemon, "alerts", &page).await.expect("accepted for the close code");
            let (closed_with, text) = closed(&mut socket).await;
            assert_eq!(closed_with, code);
            assert!(text.starts_with(reason) && text.len() <= 123, "{text}");
        }
    }
    daemon.stop().await;
}

#[tokio::test]
async fn token_as_subprotocol_is_accepted_and_never_sent_back() {
    let home = Home::new(&format!("{}\n{}", super::STREAMS, issuer_toml()));
    let daemon = home.start().await;
    let token = token("ann", &["ws:agent_thoughts"], None, 600);
    let offer = format!("aurora.v1, bearer.{token}");
    for origin in [None, Some(("origin", "http://127.0.0.1"))] {
        let headers: Vec<_> = [("sec-websocket-protocol", offer.as_str())].into_iter().chain(origin).collect();
        let (mut socket, protocol) = open(&daemon, "agent-thoughts", &headers).await.expect("accepted");
        assert_eq!(protocol.as_deref(), Some("aurora.v1"));
        let welcome = frame(&mut socket).await;
        assert!(welcome["t"] == "welcome" && welcome["exp"].is_u64(), "{welcome}");
    }
    let (mut socket, protocol) =
        open(&daemon, &format!("agent-thoughts?v=1&token={token}"), &[]).await.expect("accepted");
    assert_eq!((protocol, frame(&mut socket).await["t"].clone()), (None, json!("welcome")));
    daemon.stop().await;
}

pub(crate) async fn ticket(daemon: &Daemon, key: &str, headers: &[(&str, &str)], body: &str) -> String {
    let key = bearer(key);
    let headers: Vec<_> = headers.iter().copied().chain([("authorization", key.as_str())]).collect();
    let response = send_request(daemon, "POST", "/api/v1/ws/ticket", &headers, body).await;
    assert_eq!(response.status(), StatusCode::OK);
    let body: Value = response.json().await.expect("a ticket");
    assert_eq!(body["expires_in"], 30);
    body["ticket"].as_str().expect("a text").to_owned()
}

#[tokio::test]
async fn ticket_opens_one_socket_or_feed_of_its_page() {
    const HERE: (&str, &str) = ("origin", "http://127.0.0.1:3000");
    const THERE: (&str, &str) = ("origin", "http://127.0.0.1:4000");
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    assert_eq!(send_request(&daemon, "POST", "/api/v1/ws/ticket", &[], "").await.status(), StatusCode::UNAUTHORIZED);

    let mine = ticket(&daemon, &key, &[HERE], "").await;
    let target = format!("alerts?v=1&ticket={mine}");
    let (mut socket, _) = open(&daemon, &target, &[HERE]).await.expect("accepted");
    assert_eq!(frame(&mut socket).await["t"], "welcome");
    let (mut again, _) = open(&daemon, &target, &[HERE]).await.expect("accepted for the close code");
    assert_eq!(closed(&mut again).await.0, 4501, "used");

    let mine = ticket(&daemon, &key, &[HERE], "").await;
    let (mut stolen, _) =
        open(&daemon, &format!("alerts?ticket={mine}"), &[THERE]).await.expect("accepted for the close code");
    assert_eq!(closed(&mut stolen).await.0, 4501, "of another page");
    let feed = |ticket: &str| format!("/api/v1/feeds/alerts?ticket={ticket}");
    assert_eq!(
        send_request(&daemon, "GET", &feed(&mine), &[HERE], "").await.status(),
        StatusCode::UNAUTHORIZED,
        "used up"
    );

    let for_page = ticket(&daemon, &key, &[], r#"{"origin":"http://127.0.0.1:3000"}"#).await;
    assert_eq!(send_request(&daemon, "GET", &feed(&for_page), &[HERE], "").await.status(), StatusCode::OK);
    let for_program = ticket(&daemon, &key, &[], "").await;
    assert_eq!(send_request(&daemon, "GET", &feed(&for_program), &[], "").await.status(), StatusCode::OK);

    let key = bearer(&key);
    let foreign = [HERE, ("authorization", key.as_str())];
    let refused =
        send_request(&daemon, "POST", "/api/v1/ws/ticket", &foreign, r#"{"origin":"http://127.0.0.1:4000"}"#).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    daemon.stop().await;
}

#[tokio::test]
async fn token_as_only_subprotocol_is_never_sent_back() {
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let offer = format!("bearer.{key}");
    let both = format!("{offer}, aurora.v2");
    let page = ("origin", "http://127.0.0.1");
    let cases = [
        (&offer, None, StatusCode::SWITCHING_PROTOCOLS, None),
        (&offer, Some(page), StatusCode::SWITCHING_PROTOCOLS, None),
        (&both, None, StatusCode::BAD_REQUEST, None),
        (&both, Some(page), StatusCode::SWITCHING_PROTOCOLS, Some("aurora.v2")),
    ];
    for (offer, origin, status, confirmed) in cases {
        let handshake = [
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", offer.as_str()),
        ];
        let headers: Vec<_> = handshake.into_iter().chain(origin).collect();
        let response = send_request(&daemon, "GET", "/api/v1/ws/alerts", &headers, "").await;
        assert_eq!(response.status(), status, "{origin:?}");
        let protocol = response.headers().get("sec-websocket-protocol");
        assert_eq!(protocol.and_then(|protocol| protocol.to_str().ok()), confirmed, "{origin:?}");
        assert!(!format!("{response:?}").contains(&key), "{origin:?}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn ticket_of_the_own_page_is_valid_without_origin_header() {
    const OWN: (&str, &str) = ("origin", "http://127.0.0.1");
    const SAME: (&str, &str) = ("sec-fetch-site", "same-origin");
    const OTHER: (&str, &str) = ("sec-fetch-site", "same-site");
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts"], None);
    keys.toml = format!("[http]\norigins = [\"https://soc.example\"]\n{}", keys.toml);
    let home = keys.home();
    let daemon = home.start().await;
    let soc = ("origin", "https://soc.example");
    let (good, bad) = (StatusCode::OK, StatusCode::UNAUTHORIZED);
    let cases = [
        (vec![OWN, SAME], "", vec![SAME], good),
        (vec![OWN], "", vec![], good),
        (vec![], r#"{"origin":"http://127.0.0.1"}"#, vec![SAME], good),
        // The daemon does not know the name of a proxy in front of it, but the browser does.
        (vec![soc, SAME], "", vec![SAME], good),
        (vec![OWN, SAME], "", vec![OTHER], bad),
        (vec![OWN, OTHER], "", vec![], bad),
        (vec![OWN, SAME], "", vec![soc], bad),
        (vec![soc], "", vec![], bad),
        (vec![], r#"{"origin":"https://soc.example"}"#, vec![], bad),
    ];
    for (issued_to, body, presented_by, expected) in cases {
        let ticket = ticket(&daemon, &key, &issued_to, body).await;
        let feed = format!("/api/v1/feeds/alerts?ticket={ticket}");
        let status = send_request(&daemon, "GET", &feed, &presented_by, "").await.status();
        assert_eq!(status, expected, "{issued_to:?} {body} {presented_by:?}");
        assert_eq!(send_request(&daemon, "GET", &feed, &presented_by, "").await.status(), bad, "used");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn connections_are_limited_per_principal() {
    let mut keys = Keys::default();
    let (ops, soc) = (keys.add("ops", &["ws:alerts"], None), keys.add("soc", &["ws:alerts"], None));
    let config = super::STREAMS.replace("[relay]\n", "[relay]\nmax_connections_per_principal = 2\n");
    let home = Home::new(&format!("{config}\n{}", keys.toml));
    let daemon = home.start().await;
    let (ops, soc) = (bearer(&ops), bearer(&soc));
    let first = open(&daemon, "alerts", &[("authorization", &ops)]).await.expect("the first");
    let _second = open(&daemon, "alerts", &[("authorization", &ops)]).await.expect("the second");
    let third = open(&daemon, "alerts", &[("authorization", &ops)]).await.err();
    assert_eq!(third, Some(StatusCode::TOO_MANY_REQUESTS));
    open(&daemon, "alerts", &[("authorization", &soc)]).await.expect("another principal");
    drop(first);
    until("a free connection slot", BOUND, async || open(&daemon, "alerts", &[("authorization", &ops)]).await.ok())
        .await;
    daemon.stop().await;
}

#[tokio::test]
async fn no_credentials_are_required_without_keys_and_issuers() {
    let home = Home::new(super::STREAMS);
    let daemon = home.start().await;
    assert_eq!(request_as(&daemon, "anything", "GET", super::EVENTS, "").await.0, StatusCode::OK);
    let (mut socket, _) = open(&daemon, "alerts?v=1&token=anything", &[]).await.expect("accepted");
    assert!(frame(&mut socket).await.get("exp").is_none());
    send_frame(&mut socket, json!({"op": "auth", "id": 1, "token": "anything"})).await;
    assert_eq!(frame(&mut socket).await["code"], 400);
    daemon.stop().await;
}
