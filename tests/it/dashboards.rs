//! Dashboards that speak `aurora.v1` or read a feed, on the real binary.

use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::app::{BOUND, Daemon, Home, Socket, client, next_text};

const STREAMS: &str = r#"
[relay]
drain_window = "500ms"
ring_entries = 100
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
"#;
const ALERTS: &str = "aurora:alerts";
const CPS: &str = "aurora:cps:alerts";

fn numbered(numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    let severity = |n: usize| if n.is_multiple_of(2) { "high" } else { "low" };
    numbers.into_iter().map(|n| format!(r#"{{"n":{n},"severity":"{}"}}"#, severity(n))).collect()
}

async fn publish(daemon: &Daemon, stream: &str, numbers: impl IntoIterator<Item = usize>) {
    daemon.publish(stream, &numbered(numbers)).await.expect("accepted");
}

/// Waits until the relay has read alerts of these numbers: they are past for clients that connect now.
async fn relayed(daemon: &Daemon, stream: &str, numbers: impl IntoIterator<Item = usize>) {
    let mut socket = daemon.watch(&format!("/api/v1/ws/alerts?since=earliest&stream={stream}")).await;
    for payload in numbered(numbers) {
        assert_eq!(next_text(&mut socket).await, payload);
    }
}

/// A client of `aurora.v1`.
struct Rich(Socket);

impl Rich {
    async fn connect(daemon: &Daemon) -> Self {
        let mut request = daemon.url("/api/v1/ws/alerts").replace("http", "ws").into_client_request().expect("a URL");
        request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("aurora.v9, aurora.v1"));
        let (socket, response) = tokio_tungstenite::connect_async(request).await.expect("a handshake");
        assert_eq!(response.headers()["sec-websocket-protocol"], "aurora.v1");
        let mut rich = Self(socket);
        let welcome = rich.frame().await;
        assert_eq!((&welcome["t"], &welcome["v"]), (&json!("welcome"), &json!(1)));
        assert_eq!(welcome["streams"], json!([ALERTS, CPS]));
        rich
    }

    async fn frame(&mut self) -> Value {
        serde_json::from_str(&next_text(&mut self.0).await).expect("a JSON frame")
    }

    /// Returns the next frame, which must have that type.
    async fn expect(&mut self, kind: &str) -> Value {
        let frame = self.frame().await;
        assert_eq!(frame["t"], kind, "{frame}");
        frame
    }

    /// Returns the next frame that is not a mark, which must have that type.
    async fn expect_past_marks(&mut self, kind: &str) -> Value {
        loop {
            let frame = self.frame().await;
            if frame["t"] != "mark" {
                assert_eq!(frame["t"], kind, "{frame}");
                return frame;
            }
        }
    }

    /// Returns the numbers of the next events, and the position of the last one.
    async fn events(&mut self, stream: &str, count: usize) -> (Vec<u64>, String) {
        let (mut numbers, mut position) = (Vec::new(), String::new());
        while numbers.len() < count {
            let event = self.expect("event").await;
            assert_eq!(event["s"], stream);
            numbers.push(event["d"]["n"].as_u64().expect("a number"));
            event["p"].as_str().expect("a position").clone_into(&mut position);
        }
        (numbers, position)
    }

    async fn send(&mut self, request: Value) {
        self.0.send(Message::text(request.to_string())).await.expect("sent");
    }
}

#[tokio::test]
async fn rich_client_subscribes_per_stream_and_resumes() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    publish(&daemon, ALERTS, 0..300).await;
    relayed(&daemon, ALERTS, 0..300).await;
    let mut rich = Rich::connect(&daemon).await;
    rich.send(json!({"op": "subscribe", "id": 1, "stream": ALERTS, "since": "earliest"})).await;
    let subscribed = rich.expect("subscribed").await;
    assert_eq!((&subscribed["id"], &subscribed["recovered"]), (&json!(1), &json!(false)));
    let (numbers, _) = rich.events(ALERTS, 300).await;
    assert!(numbers.into_iter().eq(0..300));
    assert_eq!(rich.expect("live").await["s"], ALERTS);
    publish(&daemon, CPS, 0..5).await;
    publish(&daemon, ALERTS, 300..303).await;
    let (numbers, position) = rich.events(ALERTS, 3).await;
    assert_eq!(numbers, [300, 301, 302], "no entries of the other stream");
    relayed(&daemon, CPS, 0..5).await;
    rich.send(json!({"op": "subscribe", "id": 2, "stream": CPS, "snapshot": 2})).await;
    rich.expect("subscribed").await;
    assert_eq!(rich.events(CPS, 2).await.0, [3, 4]);
    rich.expect("live").await;
    rich.send(json!({"op": "unsubscribe", "id": 3, "stream": ALERTS})).await;
    let ok = rich.expect("ok").await;
    assert_eq!((&ok["id"], &ok["p"]), (&json!(3), &json!(position)));
    publish(&daemon, ALERTS, 303..310).await;
    publish(&daemon, CPS, [5]).await;
    assert_eq!(rich.events(CPS, 1).await.0, [5]);
    drop(rich);

    let mut rich = Rich::connect(&daemon).await;
    rich.send(json!({"op": "subscribe", "id": 7, "stream": ALERTS, "since": position})).await;
    let subscribed = rich.expect("subscribed").await;
    assert_eq!((&subscribed["from"], &subscribed["recovered"]), (&json!(position), &json!(true)));
    assert!(rich.events(ALERTS, 7).await.0.into_iter().eq(303..310));
    rich.expect("live").await;
    daemon.signal("TERM");
    assert!(rich.expect("drain").await["after_ms"].as_u64().is_some_and(|ms| ms <= 500));
    daemon.ended().await;
}

#[tokio::test]
async fn position_of_another_epoch_is_reported_as_a_gap() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    publish(&daemon, ALERTS, 0..3).await;
    relayed(&daemon, ALERTS, 0..3).await;
    let mut rich = Rich::connect(&daemon).await;
    rich.send(json!({"op": "subscribe", "stream": ALERTS, "since": "0123abcd:5-0"})).await;
    let subscribed = rich.expect("subscribed").await;
    assert_eq!(subscribed["recovered"], json!(false));
    let gap = rich.expect("gap").await;
    assert_eq!((&gap["s"], &gap["reason"]), (&json!(ALERTS), &json!("epoch")));
    assert_eq!(rich.events(ALERTS, 3).await.0, [0, 1, 2], "the entries that exist are sent");

    let url = daemon.url("/api/v1/ws/alerts?stream=aurora:alerts&since=0123abcd:5-0&strict=1").replace("http", "ws");
    let (mut strict, _) = tokio_tungstenite::connect_async(url).await.expect("a handshake");
    let close = timeout(BOUND, strict.next()).await.expect("in time");
    assert!(matches!(close, Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == 4002));
    daemon.stop().await;
}

#[tokio::test]
async fn filter_is_replaced_and_marks_move_the_position() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let high = json!({"key": "severity", "cmp": "gte", "val": "high"});
    let mut rich = Rich::connect(&daemon).await;
    rich.send(json!({"op": "subscribe", "stream": ALERTS, "filter": high})).await;
    rich.expect("subscribed").await;
    rich.expect("live").await;
    publish(&daemon, ALERTS, 0..4).await;
    assert_eq!(rich.events(ALERTS, 2).await.0, [0, 2]);
    publish(&daemon, ALERTS, (0..1500).map(|n| 2 * n + 1)).await;
    let mark = rich.expect("mark").await;
    assert_eq!((&mark["s"], mark["p"].is_string()), (&json!(ALERTS), true), "{mark}");
    // Filtered entries come before it, for which there may be more marks.
    publish(&daemon, ALERTS, [4]).await;
    let passes = rich.expect_past_marks("event").await;
    assert_eq!(passes["d"]["n"], 4);
    rich.send(json!({"op": "filter", "id": 4, "stream": ALERTS})).await;
    // Entries before the reply pass the old filter.
    let holds_from = rich.expect("ok").await;
    assert_eq!(holds_from["p"], passes["p"]);
    publish(&daemon, ALERTS, [5, 7]).await;
    assert_eq!(rich.events(ALERTS, 2).await.0, [5, 7]);
    daemon.stop().await;
}

#[tokio::test]
async fn invalid_request_is_answered_and_the_session_continues() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let mut rich = Rich::connect(&daemon).await;
    let subscribe = |extra: Value| {
        let mut request = json!({"op": "subscribe", "id": 9, "stream": ALERTS});
        request.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        request
    };
    let cases = [
        (json!([1]), 400, "not a request"),
        (json!({"op": "fly", "id": 9}), 400, "no op `fly`"),
        (subscribe(json!({"snapshot": "5"})), 400, "not a request"),
        (subscribe(json!({"stream": "aurora:audit"})), 404, "aurora:alerts, aurora:cps:alerts"),
        (json!({"op": "subscribe", "id": 9}), 422, "`stream` is missing"),
        (subscribe(json!({"since": "yesterday"})), 422, "`since`"),
        (subscribe(json!({"mode": "fast"})), 422, "`mode`"),
        (subscribe(json!({"snapshot": 100_000})), 422, "`snapshot`"),
        (subscribe(json!({"filter": {"op": "and", "nodes": [{"key": "x"}]}})), 422, "`filter` nodes[0]"),
        (json!({"op": "unsubscribe", "id": 9, "stream": CPS}), 404, "not subscribed"),
    ];
    for (request, code, words) in cases {
        rich.send(request.clone()).await;
        let error = rich.expect("error").await;
        assert_eq!(
            (&error["code"], error.get("id")),
            (&json!(code), request.get("id").or(Some(&Value::Null))),
            "{error}"
        );
        assert!(error["msg"].as_str().is_some_and(|message| message.contains(words)), "{request}: {error}");
    }
    rich.send(json!({"op": "unknown, without an id"})).await;
    rich.send(subscribe(json!({}))).await;
    rich.expect("subscribed").await;
    rich.expect("live").await;
    rich.send(subscribe(json!({}))).await;
    assert_eq!(rich.expect("error").await["code"], 409);
    rich.send(json!({"op": "ping", "id": 5})).await;
    assert_eq!(rich.expect("pong").await["id"], 5);
    let escaped = r#"{"op":"p\u0069ng","id":6,"stream":"aurora\u003aalerts"}"#;
    rich.0.send(Message::text(escaped)).await.expect("sent");
    assert_eq!(rich.expect("pong").await["id"], 6);
    daemon.stop().await;
}

#[tokio::test]
async fn unsupported_protocol_version_is_rejected() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let connect = |query: &str, offer: Option<&'static str>, origin: Option<&'static str>| {
        let url = daemon.url(&format!("/api/v1/ws/alerts{query}")).replace("http", "ws");
        let mut request = url.into_client_request().expect("a URL");
        for (name, value) in [("sec-websocket-protocol", offer), ("origin", origin)] {
            value.map(|value| request.headers_mut().insert(name, HeaderValue::from_static(value)));
        }
        tokio_tungstenite::connect_async(request)
    };
    let cases = [
        ("", Some("aurora.v9"), Some("aurora.v9")),
        ("", Some("chat, aurora.v9, aurora.v8"), Some("aurora.v9")),
        ("?v=1", Some("aurora.v9"), Some("aurora.v9")),
        ("?v=2", None, None),
        ("?v=1&v=2", None, None),
        ("?v=", None, None),
    ];
    for (query, offer, confirmed) in cases {
        let refused = connect(query, offer, None).await.expect_err("no version in common");
        assert!(matches!(refused, Error::Http(response) if response.status() == 400), "{query} {offer:?}");
        // A page sees the code only if one of its subprotocols is confirmed.
        let page = connect(query, offer, Some("http://127.0.0.1")).await;
        let (mut socket, response) = page.expect("the handshake of a page is accepted");
        let protocol = response.headers().get("sec-websocket-protocol");
        assert_eq!(protocol.and_then(|protocol| protocol.to_str().ok()), confirmed, "{query} {offer:?}");
        let close = timeout(BOUND, socket.next()).await.expect("in time");
        assert!(matches!(close, Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == 4506), "{query}");
    }
    daemon.stop().await;
}

/// The response of a feed, piece by piece.
struct Feed {
    response: reqwest::Response,
    text: String,
}

impl Feed {
    async fn open(daemon: &Daemon, query: &str, headers: &[(&str, &str)]) -> Self {
        let request = client().get(daemon.url(&format!("/api/v1/feeds/alerts{query}"))).timeout(BOUND);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        Self { response, text: String::new() }
    }

    /// Returns the text up to the `count`-th `end`.
    async fn until(&mut self, end: &str, count: usize) -> String {
        loop {
            if let Some((at, _)) = self.text.match_indices(end).nth(count - 1) {
                let rest = self.text.split_off(at + end.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let piece = timeout(BOUND, self.response.chunk()).await.expect("in time").expect("a piece").expect("more");
            self.text.push_str(std::str::from_utf8(&piece).expect("text"));
        }
    }
}

const EVENTS: (&str, &str) = ("accept", "text/event-stream");

#[tokio::test]
async fn event_source_resumes_by_its_last_event_id() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    publish(&daemon, ALERTS, 0..250).await;
    relayed(&daemon, ALERTS, 0..250).await;
    let mut feed = Feed::open(&daemon, "?stream=aurora:alerts&since=earliest", &[EVENTS]).await;
    assert_eq!(feed.response.headers()["content-type"], "text/event-stream");
    let past = feed.until("\n\n", 250).await;
    let data = past.lines().filter_map(|line| line.strip_prefix("data: "));
    assert!(data.eq(numbered(0..250)));
    let last_id = past.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().expect("ids").to_owned();
    assert_eq!(feed.until("\n\n", 1).await, format!("id: {last_id}\n\n"));
    assert!(feed.until("\n\n", 1).await.starts_with("event: live\n"));
    drop(feed);
    publish(&daemon, ALERTS, 250..260).await;
    relayed(&daemon, ALERTS, 0..260).await;
    // The `since` of the first request is older than the last event id.
    let query = "?stream=aurora:alerts&since=earliest";
    let mut feed = Feed::open(&daemon, query, &[EVENTS, ("last-event-id", &last_id)]).await;
    let missed = feed.until("\n\n", 10).await;
    assert!(missed.lines().filter_map(|line| line.strip_prefix("data: ")).eq(numbered(250..260)));
    daemon.stop().await;
}

#[tokio::test]
async fn event_source_of_two_streams_has_one_id_for_both() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let mut feed = Feed::open(&daemon, "", &[EVENTS]).await;
    let begun = feed.until("event: live", 2).await;
    assert!(begun.starts_with("id: "), "{begun}");
    feed.until("\n\n", 1).await;
    publish(&daemon, ALERTS, [0]).await;
    let first = feed.until("\n\n", 1).await;
    let (id, data) = first.trim().split_once('\n').expect("two lines");
    assert_eq!(data, format!("data: {}", numbered([0])[0]));
    let id = id.strip_prefix("id: ").expect("an id").to_owned();
    assert_eq!(id.split(',').count(), 2, "{id}");
    drop(feed);
    publish(&daemon, CPS, [1]).await;
    relayed(&daemon, CPS, [1]).await;
    publish(&daemon, ALERTS, [2]).await;
    relayed(&daemon, ALERTS, [0, 2]).await;
    let mut feed = Feed::open(&daemon, "", &[EVENTS, ("last-event-id", id.trim())]).await;
    let missed = feed.until("event: live", 1).await;
    let data = missed.lines().filter_map(|line| line.strip_prefix("data: "));
    assert!(data.eq(numbered([1, 2])), "{missed}");
    daemon.stop().await;
}

#[tokio::test]
async fn json_lines_are_unchanged_and_end_with_the_daemon() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    publish(&daemon, ALERTS, 0..20).await;
    relayed(&daemon, ALERTS, 0..20).await;
    let mut feed = Feed::open(&daemon, "?snapshot=5&min_severity=high", &[]).await;
    assert_eq!(feed.response.headers()["content-type"], "application/x-ndjson");
    assert!(feed.until("\n", 5).await.lines().eq(numbered([10, 12, 14, 16, 18])));
    publish(&daemon, ALERTS, 20..23).await;
    assert!(feed.until("\n", 2).await.lines().eq(numbered([20, 22])));
    let mut meta = Feed::open(&daemon, "?since=earliest&meta=1&stream=aurora:alerts", &[]).await;
    let lines = meta.until("\n", 23).await;
    assert!(lines.lines().all(|line| serde_json::from_str::<Value>(line).is_ok_and(|v| v["_stream"] == ALERTS)));
    daemon.signal("TERM");
    let rest = timeout(BOUND, feed.response.chunk()).await.expect("it ends").expect("properly");
    assert_eq!(rest, None);
    daemon.ended().await;
}

#[tokio::test]
async fn feed_rejects_the_same_requests_as_the_websocket() {
    let home = Home::new(STREAMS);
    let daemon = home.start().await;
    let cases = [
        ("/api/v1/feeds/nothing", EVENTS, StatusCode::NOT_FOUND),
        ("/api/v1/feeds/alerts?since=never", EVENTS, StatusCode::BAD_REQUEST),
        ("/api/v1/feeds/alerts", ("last-event-id", "odd"), StatusCode::BAD_REQUEST),
        ("/api/v1/feeds/alerts", ("origin", "https://evil.example"), StatusCode::FORBIDDEN),
    ];
    for (path, (name, value), status) in cases {
        let response = client().get(daemon.url(path)).header(name, value).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{path} {name}");
    }
    daemon.stop().await;
}
