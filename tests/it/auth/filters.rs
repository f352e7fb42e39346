//! Principals with a filter: they read only matching entries, on every path.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::watching::{closed, frame, open, send_frame, ticket};
use super::{EVENTS, Keys, STREAMS, bearer, filtered_token, issuer_toml, request_as, send_request};
use crate::support::app::{BOUND, Daemon, Home, Socket, next_text};
use crate::support::receiver::{Receiver, Reply};
use crate::support::until;

const DEAD: &str = "/api/v1/dead-letters/aurora:alerts";
const SEVERE: &str = r#"{"key":"severity","cmp":"gte","val":"high"}"#;
const EVERYTHING: &str = r#"{"op":"or","nodes":[{"key":"severity","cmp":"exists"},{"op":"not","nodes":[{"key":"severity","cmp":"exists"}]}]}"#;
/// The severities of the first events, by number.
const SEVERITIES: [&str; 6] = ["high", "low", "critical", "info", "high", "unheard-of"];
/// The numbers of those events that match the filter.
const MATCHING: [u64; 3] = [0, 2, 4];

/// A daemon with a sink that rejects everything, a key without a filter, and a key and a token with one.
struct Site {
    _receiver: Receiver,
    _home: Home,
    daemon: Daemon,
    all: String,
    severe: [String; 2],
}

impl Site {
    async fn new() -> Self {
        let receiver = Receiver::start(|_| Reply::Status(400)).await;
        let mut keys = Keys::default();
        let all = keys.add("all", &["admin"], None);
        let key = keys.add("severe", &["admin"], None);
        keys.toml += &["filter = '", SEVERE, "'\n", &issuer_toml(), "[auth]\nmetrics = \"admin\"\n"].concat();
        let tree = serde_json::from_str(SEVERE).expect("JSON");
        let token = filtered_token("ann", &["admin"], None, Some(tree), 600);
        let streams = format!(
            "[relay]\ndrain_window = \"200ms\"\n[[streams]]\nname = \"aurora:alerts\"\nrelay = true\n[[streams.groups]]\n\
             name = \"siem\"\nsink = \"siem\"\n[sinks.siem]\ntype = \"webhook\"\nurl = \"{}\"\nallow_private = true\n",
            receiver.url("/")
        );
        let home = Home::new(&format!("{streams}{}", keys.toml));
        let daemon = home.start().await;
        Self { _receiver: receiver, _home: home, daemon, all, severe: [key, token] }
    }

    async fn publish(&self, shown: &str, n: usize, severity: &str) {
        let event = json!({"n": n, "severity": severity}).to_string();
        let (status, body) = request_as(&self.daemon, shown, "POST", EVENTS, &event).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
    }

    /// Publishes the first events and waits until the relay has read them.
    async fn publish_some(&self) {
        let mut all = self.socket(&self.all, "alerts?stream=aurora:alerts&since=earliest").await;
        for (n, severity) in SEVERITIES.into_iter().enumerate() {
            self.publish(&self.all, n, severity).await;
        }
        for n in 0..SEVERITIES.len() as u64 {
            assert_eq!(number(&next_text(&mut all).await), n);
        }
    }

    async fn get(&self, shown: &str, path: &str) -> Value {
        let (status, body) = request_as(&self.daemon, shown, "GET", path, "").await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    async fn dead_letters(&self, shown: &str) -> Vec<Value> {
        self.get(shown, DEAD).await["dead_letters"].as_array().expect("a list").clone()
    }

    async fn socket(&self, shown: &str, target: &str) -> Socket {
        open(&self.daemon, target, &[("authorization", &bearer(shown))]).await.expect("accepted").0
    }
}

fn number(event: &str) -> u64 {
    let event: Value = serde_json::from_str(event).expect("JSON");
    event["n"].as_u64().expect("a number")
}

fn numbers(events: &Value) -> Vec<u64> {
    let events = events.as_array().expect("a list");
    events.iter().map(|event| event["data"]["n"].as_u64().expect("a number")).collect()
}

fn encoded(filter: &str) -> String {
    url::form_urlencoded::byte_serialize(filter.as_bytes()).collect()
}

#[tokio::test]
async fn range_has_only_matching_entries_in_both_orders_and_waits() {
    let site = Site::new().await;
    site.publish_some().await;
    for severe in &site.severe {
        assert_eq!(numbers(&site.get(severe, EVENTS).await["events"]), MATCHING);
        assert_eq!(numbers(&site.get(severe, &format!("{EVENTS}?order=desc")).await["events"]), [4, 2, 0]);
        let widened = site.get(severe, &format!("{EVENTS}?filter={}", encoded(EVERYTHING))).await;
        assert_eq!(numbers(&widened["events"]), MATCHING);
        let narrowed = site.get(severe, &format!("{EVENTS}?min_severity=critical")).await;
        assert_eq!(numbers(&narrowed["events"]), [2]);
    }
    assert_eq!(numbers(&site.get(&site.all, EVENTS).await["events"]), [0, 1, 2, 3, 4, 5]);
    let end = site.get(&site.severe[0], EVENTS).await["next"].as_str().expect("the next position").to_owned();
    let rest = format!("{EVENTS}?from={end}&wait_ms=20000");
    let (waited, ()) = tokio::join!(site.get(&site.severe[0], &rest), async {
        // The filter does not restrict publishing.
        site.publish(&site.severe[0], 6, "low").await;
        site.publish(&site.all, 7, "critical").await;
    });
    assert_eq!(numbers(&waited["events"]), [7]);
    site.daemon.stop().await;
}

#[tokio::test]
async fn sockets_and_feeds_have_only_matching_events() {
    let site = Site::new().await;
    site.publish_some().await;
    let target = |query: &str| format!("alerts?stream=aurora:alerts&{query}");
    let (mut sockets, mut feeds) = (Vec::new(), Vec::new());
    for severe in &site.severe {
        let widened = format!("since=earliest&filter={}", encoded(EVERYTHING));
        for (query, past) in [
            ("since=earliest", &MATCHING[..]),
            ("snapshot=1000", &MATCHING),
            ("snapshot=1", &[4]),
            (widened.as_str(), &MATCHING),
            ("", &[]),
        ] {
            sockets.push((site.socket(severe, &target(query)).await, past));
        }
        let mine = ticket(&site.daemon, severe, &[], "").await;
        let of_ticket = target(&format!("since=earliest&ticket={mine}"));
        sockets.push((open(&site.daemon, &of_ticket, &[]).await.expect("accepted").0, &MATCHING));
        for accept in ["text/event-stream", "application/x-ndjson"] {
            let mine = ticket(&site.daemon, severe, &[], "").await;
            let path = format!("/api/v1/feeds/{}", target(&format!("since=earliest&ticket={mine}")));
            feeds.push(send_request(&site.daemon, "GET", &path, &[("accept", accept)], "").await);
        }
    }
    site.publish(&site.all, 7, "low").await;
    site.publish(&site.all, 6, "high").await;
    for (socket, past) in &mut sockets {
        for expected in past.iter().chain(&[6]) {
            assert_eq!(number(&next_text(socket).await), *expected, "{past:?}");
        }
    }
    for feed in &mut feeds {
        assert_eq!(feed.status(), StatusCode::OK);
        let mut text = String::new();
        while !text.contains(r#""n":6,"#) {
            let piece =
                tokio::time::timeout(BOUND, feed.chunk()).await.expect("in time").expect("a piece").expect("more");
            text.push_str(str::from_utf8(&piece).expect("text"));
        }
        let contains = |n: u32| text.contains(&format!(r#""n":{n},"#));
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6, 7].map(contains),
            [true, false, true, false, true, false, true, false],
            "{text}"
        );
    }
    site.daemon.stop().await;
}

#[tokio::test]
async fn replaced_filter_never_widens_the_filter_of_the_principal() {
    let site = Site::new().await;
    site.publish_some().await;
    let everything: Value = serde_json::from_str(EVERYTHING).expect("JSON");
    let mut past = MATCHING.to_vec();
    for severe in &site.severe {
        let mut socket = site.socket(severe, "alerts?v=1").await;
        assert_eq!(frame(&mut socket).await["t"], "welcome");
        let subscribe =
            json!({"op": "subscribe", "id": 1, "stream": "aurora:alerts", "since": "earliest", "filter": everything});
        send_frame(&mut socket, subscribe).await;
        assert_eq!(events_until(&mut socket, "live").await, past);
        let requests = [
            json!({"op": "filter", "id": 2, "stream": "aurora:alerts", "filter": everything}),
            json!({"op": "filter", "id": 3, "stream": "aurora:alerts"}),
        ];
        for request in requests {
            send_frame(&mut socket, request).await;
            assert_eq!(events_until(&mut socket, "ok").await, [0; 0]);
            site.publish(&site.all, 10, "low").await;
            site.publish(&site.all, 11, "high").await;
            let passed = events_until(&mut socket, "event").await;
            assert_eq!(passed, [11]);
            past.extend(passed);
        }
    }
    site.daemon.stop().await;
}

/// Receives frames up to the first one of type `last`, and returns the numbers of their events.
async fn events_until(socket: &mut Socket, last: &str) -> Vec<u64> {
    let mut seen = Vec::new();
    loop {
        let frame = frame(socket).await;
        assert_ne!(frame["t"], "error", "{frame}");
        if frame["t"] == "event" {
            seen.push(frame["d"]["n"].as_u64().expect("a number"));
        }
        if frame["t"] == last {
            return seen;
        }
    }
}

#[tokio::test]
async fn excluded_dead_letters_are_neither_shown_nor_moved() {
    let site = Site::new().await;
    site.publish_some().await;
    until("six dead letters", BOUND, async || (site.dead_letters(&site.all).await.len() == 6).then_some(())).await;
    let of = |letters: &[Value]| letters.iter().map(|letter| letter["entry"]["data"]["n"].clone()).collect::<Vec<_>>();
    let id = |letter: &Value| letter["id"].as_str().expect("an id").to_owned();
    let hidden = id(&site.dead_letters(&site.all).await[1]);
    for severe in &site.severe {
        assert_eq!(of(&site.dead_letters(severe).await), MATCHING.map(Value::from));
        let widened = site.get(severe, &format!("{DEAD}?filter={}", encoded(EVERYTHING))).await;
        assert_eq!(of(widened["dead_letters"].as_array().expect("a list")), MATCHING.map(Value::from));
        let raw = "/api/v1/streams/aurora:alerts:dead_letter/events";
        assert_eq!(numbers(&site.get(severe, raw).await["events"]), MATCHING);
        for (method, path) in [("GET", ""), ("DELETE", ""), ("POST", "/replay")] {
            let path = format!("{DEAD}/{hidden}{path}");
            assert_eq!(
                request_as(&site.daemon, severe, method, &path, "").await.0,
                StatusCode::NOT_FOUND,
                "{method} {path}"
            );
        }
        for action in ["replay", "discard"] {
            let path = format!("{DEAD}/{action}");
            let (_, body) = request_as(&site.daemon, severe, "POST", &path, r#"{"all":true,"dry_run":true}"#).await;
            assert_eq!(body["matched"], 3, "{body}");
            let named = json!({"ids": [hidden]}).to_string();
            let (_, body) = request_as(&site.daemon, severe, "POST", &path, &named).await;
            assert_eq!(body["matched"], 0, "{body}");
        }
    }
    let path = format!("{DEAD}/discard");
    let (_, body) = request_as(&site.daemon, &site.severe[1], "POST", &path, r#"{"all":true}"#).await;
    assert_eq!(body["discarded"], 3, "{body}");
    let (_, body) =
        request_as(&site.daemon, &site.severe[0], "POST", &format!("{DEAD}/replay"), r#"{"all":true}"#).await;
    assert_eq!(body["replayed"], 0, "{body}");
    assert_eq!(of(&site.dead_letters(&site.all).await), [1, 3, 5].map(Value::from));
    site.daemon.stop().await;
}

#[tokio::test]
async fn data_about_all_entries_is_refused_with_a_filter() {
    let site = Site::new().await;
    site.publish_some().await;
    assert_eq!(request_as(&site.daemon, &site.all, "GET", "/metrics", "").await.0, StatusCode::OK);
    for severe in &site.severe {
        for (method, path) in [
            ("GET", "/metrics"),
            ("GET", "/api/v1/dead-letters"),
            ("POST", "/api/v1/streams/aurora:alerts/groups/siem/pull"),
            ("POST", "/api/v1/streams/aurora:alerts/groups/siem/ack"),
            ("POST", "/api/v1/streams/aurora:alerts/groups/siem/nack"),
            ("POST", "/api/v1/streams/aurora:alerts/groups/siem/extend"),
        ] {
            let (status, body) = request_as(&site.daemon, severe, method, path, r#"{"consumer":"w"}"#).await;
            assert_eq!((status, &body["code"]), (StatusCode::FORBIDDEN, &json!("forbidden")), "{path}");
        }
        let stream = site.get(severe, "/api/v1/streams/aurora:alerts").await;
        let members: Vec<_> = stream.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(members, ["first_id", "last_id", "name"]);
        assert_eq!(site.get(severe, "/api/v1/streams").await["streams"][0], stream);
        let mut socket = site.socket(severe, "alerts?v=1").await;
        assert_eq!(frame(&mut socket).await["t"], "welcome");
        for op in ["pull", "done", "nack", "extend"] {
            send_frame(
                &mut socket,
                json!({"op": op, "id": 1, "stream": "aurora:alerts", "group": "siem", "token": "x"}),
            )
            .await;
            let body = frame(&mut socket).await;
            assert_eq!((&body["t"], &body["code"]), (&json!("error"), &json!(403)), "{op}: {body}");
        }
    }
    site.daemon.stop().await;
}

#[tokio::test]
async fn newer_token_needs_the_same_filter_to_extend_a_socket() {
    let home = Home::new(&format!("{STREAMS}\n{}", issuer_toml()));
    let daemon = home.start().await;
    let tree: Value = serde_json::from_str(SEVERE).expect("JSON");
    let token = |filter: Option<Value>, seconds| filtered_token("ann", &["ws:alerts"], None, filter, seconds);
    let first = bearer(&token(Some(tree.clone()), 60));
    let (mut socket, _) = open(&daemon, "alerts?v=1", &[("authorization", &first)]).await.expect("accepted");
    assert_eq!(frame(&mut socket).await["t"], "welcome");
    let other = json!({"key": "severity", "cmp": "gte", "val": "low"});
    let cases = [
        (token(None, 600), Some(403)),
        (token(Some(other), 600), Some(403)),
        (token(Some(json!({})), 600), Some(401)),
        (token(Some(tree.to_string().into()), 600), None),
    ];
    for (newer, error) in cases {
        send_frame(&mut socket, json!({"op": "auth", "id": 1, "token": newer})).await;
        let body = loop {
            let frame = frame(&mut socket).await;
            if frame["t"] != "expiring" {
                break frame;
            }
        };
        let expected = error.map_or(json!("ok"), |_| json!("error"));
        assert_eq!((&body["t"], body["code"].as_u64()), (&expected, error), "{body}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn invalid_filter_rejects_its_token_and_its_configuration() {
    let home = Home::new(&format!("{STREAMS}\n{}", issuer_toml()));
    let daemon = home.start().await;
    let sauce = json!({"key": "sauce", "cmp": "exists"});
    let reason_start = "the claim `filter` of the token is not accepted: ";
    for filter in [Value::Null, json!(""), json!({}), json!([]), sauce, json!("x".repeat(300))] {
        let token = filtered_token("ann", &["admin"], None, Some(filter.clone()), 600);
        let (status, body) = request_as(&daemon, &token, "GET", EVENTS, "").await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{filter}");
        assert!(body["detail"].as_str().is_some_and(|detail| detail.contains(reason_start)), "{body}");
        let shown = bearer(&token);
        let refused = open(&daemon, "alerts", &[("authorization", &shown)]).await.err();
        assert_eq!(refused, Some(StatusCode::UNAUTHORIZED), "{filter}");
        let page = [("authorization", shown.as_str()), ("origin", "http://127.0.0.1")];
        let (mut socket, _) = open(&daemon, "alerts", &page).await.expect("accepted for the close code");
        let (code, reason) = closed(&mut socket).await;
        assert!(code == 4501 && reason.contains(reason_start), "{code} {reason}");
    }
    daemon.stop().await;

    let mut keys = Keys::default();
    keys.add("severe", &["admin"], None);
    keys.toml += "filter = '{\"key\":\"sauce\",\"cmp\":\"exists\"}'\n";
    let home = keys.home();
    let config = home.path("aurora-bus.toml");
    let output = home.run(&["check", "--config", config.to_str().expect("UTF-8")]);
    let printed = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(2), "{printed}");
    assert!(printed.contains("auth.keys[0].filter: is not accepted: key must be severity or one of"), "{printed}");
}

#[tokio::test]
async fn cli_makes_keys_and_tokens_with_filters() {
    let home = Home::new(STREAMS);
    let made = home.run(&["token", "key", "--name", "severe", "--scope", "read:*", "--filter", SEVERE]);
    let printed = String::from_utf8(made.stdout).expect("text");
    let (key, declared) = printed.split_once('\n').expect("a key and its declaration");
    let home = Home::new(&format!("{STREAMS}\n{declared}\n{}", issuer_toml()));
    let config = home.path("aurora-bus.toml");
    let jwt = ["token", "jwt", "--config", config.to_str().expect("UTF-8"), "--subject", "ann", "--scope", "admin"];
    let made = home.run(&[&jwt[..], &["--filter", SEVERE]].concat());
    let token = String::from_utf8(made.stdout).expect("text").trim().to_owned();
    for command in [&jwt[..], &["token", "key", "--name", "a", "--scope", "admin"]] {
        let refused = home.run(&[command, &["--filter", "{}"]].concat());
        let printed = String::from_utf8(refused.stderr).expect("text");
        assert!(
            !refused.status.success() && printed.contains("--filter") && printed.contains("is not accepted: must have"),
            "{printed}"
        );
    }
    let daemon = home.start().await;
    let events = r#"[{"n":0,"severity":"critical"},{"n":1,"severity":"low"}]"#;
    assert_eq!(request_as(&daemon, &token, "POST", EVENTS, events).await.0, StatusCode::CREATED);
    for shown in [key, &token] {
        let (_, body) = request_as(&daemon, shown, "GET", EVENTS, "").await;
        assert_eq!(numbers(&body["events"]), [0], "{body}");
    }
    daemon.stop().await;
}
