//! Principals of one tenant: they read only its entries, on every path.

use reqwest::StatusCode;
use serde_json::{Value, json};

use super::watching::{frame, open, send_frame};
use super::{EVENTS, Keys, bearer, request_as, send_request};
use crate::support::app::{BOUND, Daemon, Home, Socket, next_text};
use crate::support::receiver::{Receiver, Reply};
use crate::support::until;

const DEAD: &str = "/api/v1/dead-letters/aurora:alerts";
const ALL_TENANTS: &str = r#"{"cmp":"exists","key":"tenant"}"#;

/// A daemon with a sink that rejects everything, keys of two tenants, and a key without a tenant.
struct Site {
    _receiver: Receiver,
    _home: Home,
    daemon: Daemon,
    acme: String,
    globex: String,
    all: String,
}

impl Site {
    async fn new() -> Self {
        let receiver = Receiver::start(|_| Reply::Status(400)).await;
        let mut keys = Keys::default();
        let acme = keys.add("acme", &["admin"], Some("acme"));
        let globex = keys.add("globex", &["admin"], Some("globex"));
        let all = keys.add("all", &["admin"], None);
        let streams = format!(
            "[relay]\ndrain_window = \"200ms\"\n[[streams]]\nname = \"aurora:alerts\"\nrelay = true\n[[streams.groups]]\n\
             name = \"siem\"\nsink = \"siem\"\n[[streams]]\nname = \"aurora:cps:alerts\"\nrelay = true\n\
             [sinks.siem]\ntype = \"webhook\"\nurl = \"{}\"\nallow_private = true\n",
            receiver.url("/")
        );
        let home = Home::new(&format!("{streams}{}", keys.toml));
        let daemon = home.start().await;
        Self { _receiver: receiver, _home: home, daemon, acme, globex, all }
    }

    /// Publishes a numbered event that names a tenant or none.
    async fn publish(&self, key: &str, n: usize, tenant: Option<&str>) -> (StatusCode, Value) {
        let mut event = json!({"n": n, "severity": "high", "id": format!("event-{}", n % 100)});
        if let Some(tenant) = tenant {
            event["tenant"] = tenant.into();
        }
        request_as(&self.daemon, key, "POST", EVENTS, &event.to_string()).await
    }

    /// Publishes events 0 to 5, in turn of acme, globex and no tenant, and waits until the relay has sent them.
    async fn publish_some(&self) {
        let mut dashboard = self.socket(&self.all, "alerts?stream=aurora:alerts").await;
        for n in [0, 3] {
            assert_eq!(self.publish(&self.acme, n, None).await.0, StatusCode::CREATED);
            assert_eq!(self.publish(&self.all, n + 1, Some("globex")).await.0, StatusCode::CREATED);
            assert_eq!(self.publish(&self.all, n + 2, None).await.0, StatusCode::CREATED);
        }
        for _ in 0..6 {
            next_text(&mut dashboard).await;
        }
    }

    /// Publishes the same events, and waits until the relay can send them as past events.
    async fn publish_and_relay_some(&self) {
        self.publish_some().await;
        let mut all = self.socket(&self.all, "alerts?stream=aurora:alerts&since=earliest").await;
        for n in 0..6 {
            let event: Value = serde_json::from_str(&next_text(&mut all).await).expect("JSON");
            assert_eq!(event["n"], n);
        }
    }

    async fn get(&self, key: &str, path: &str) -> Value {
        let (status, body) = request_as(&self.daemon, key, "GET", path, "").await;
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    async fn socket(&self, key: &str, target: &str) -> Socket {
        open(&self.daemon, target, &[("authorization", &bearer(key))]).await.expect("accepted").0
    }
}

fn numbers(events: &Value) -> Vec<u64> {
    let events = events.as_array().expect("a list");
    events.iter().map(|event| event["data"]["n"].as_u64().expect("a number")).collect()
}

#[tokio::test]
async fn published_event_belongs_to_the_tenant_of_its_principal() {
    let site = Site::new().await;
    let Site { acme, globex, all, .. } = &site;
    assert_eq!(site.publish(acme, 1, Some("acme")).await.0, StatusCode::CREATED);
    let (status, problem) = site.publish(acme, 2, Some("globex")).await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("forbidden_tenant")));
    let batch = r#"[{"n":3},{"n":4,"tenant_id":"globex"},{"n":5,"tenant":"acme"}]"#;
    let (status, body) = request_as(&site.daemon, acme, "POST", EVENTS, batch).await;
    assert_eq!(status, StatusCode::MULTI_STATUS);
    assert_eq!(body["results"][1]["error"]["code"], "forbidden_tenant", "{body}");
    let seen = site.get(all, EVENTS).await;
    assert_eq!(numbers(&seen["events"]), [1, 3, 5]);
    let fields: Vec<_> = seen["events"].as_array().expect("a list").iter().map(|event| &event["fields"]).collect();
    assert!(fields.iter().all(|fields| fields.to_string().contains(r#"["tenant","acme"]"#)), "{fields:?}");

    // Idempotency keys of one tenant neither reveal nor block the events of another.
    let keyed = |key: &str| {
        let key = bearer(key);
        let daemon = &site.daemon;
        async move {
            let headers = [("authorization", key.as_str()), ("idempotency-key", "same")];
            let body: Value = send_request(daemon, "POST", EVENTS, &headers, "{}").await.json().await.expect("JSON");
            body["results"][0]["duplicate"].as_bool().expect("a flag")
        }
    };
    assert_eq!(
        [keyed(acme).await, keyed(globex).await, keyed(all).await, keyed(acme).await],
        [false, false, false, true]
    );
    let by_id = format!("{EVENTS}?dedup=id");
    let own_id = async |key: &str| {
        let (_, body) = request_as(&site.daemon, key, "POST", &by_id, r#"{"id":"INC-1"}"#).await;
        body["results"][0]["duplicate"].as_bool().expect("a flag")
    };
    assert_eq!([own_id(acme).await, own_id(globex).await, own_id(globex).await], [false, false, true]);
    site.daemon.stop().await;
}

#[tokio::test]
async fn tenant_range_has_only_its_entries_page_by_page() {
    let site = Site::new().await;
    site.publish_some().await;
    for order in ["asc", "desc"] {
        let (mut seen, mut query) = (Vec::new(), format!("{EVENTS}?limit=1&order={order}"));
        for _ in 0..10 {
            let page = site.get(&site.acme, &query).await;
            seen.extend(numbers(&page["events"]));
            let (false, Some(next)) = (page["events"] == json!([]), page["next"].as_str()) else { break };
            let from = if order == "asc" { "from" } else { "to" };
            query = format!("{EVENTS}?limit=1&order={order}&{from}={next}");
        }
        if order == "desc" {
            seen.reverse();
        }
        assert_eq!(seen, [0, 3], "{order}");
    }
    assert_eq!(numbers(&site.get(&site.all, EVENTS).await["events"]), [0, 1, 2, 3, 4, 5]);
    let end = site.get(&site.acme, EVENTS).await["next"].as_str().expect("the next position").to_owned();
    let rest = format!("{EVENTS}?from={end}&wait_ms=20000");
    let (waited, ()) = tokio::join!(site.get(&site.acme, &rest), async {
        site.publish(&site.globex, 6, None).await;
        site.publish(&site.acme, 7, None).await;
    });
    assert_eq!(numbers(&waited["events"]), [7]);
    site.daemon.stop().await;
}

#[tokio::test]
async fn tenant_dashboards_have_only_its_events() {
    let site = Site::new().await;
    site.publish_and_relay_some().await;
    let target = |query: &str| format!("alerts?stream=aurora:alerts&{query}");
    let widened = url::form_urlencoded::byte_serialize(ALL_TENANTS.as_bytes()).collect::<String>();
    let mut sockets = vec![
        (site.socket(&site.acme, &target("since=earliest")).await, vec![0, 3]),
        (site.socket(&site.acme, &target("snapshot=1000")).await, vec![0, 3]),
        (site.socket(&site.acme, &target("snapshot=1")).await, vec![3]),
        (site.socket(&site.acme, &target(&format!("since=earliest&filter={widened}"))).await, vec![0, 3]),
        (site.socket(&site.acme, &target("")).await, vec![]),
        (site.socket(&site.globex, &target("since=earliest")).await, vec![1, 4]),
    ];
    let mut none = site.socket(&site.acme, &target("since=earliest&tenant=globex")).await;
    let feed = async |accept: &str| {
        let key = bearer(&site.acme);
        let headers = [("authorization", key.as_str()), ("accept", accept)];
        send_request(&site.daemon, "GET", "/api/v1/feeds/alerts?stream=aurora:alerts&since=earliest", &headers, "")
            .await
    };
    let mut feeds = [feed("text/event-stream").await, feed("application/x-ndjson").await];
    site.publish(&site.globex, 7, None).await;
    site.publish(&site.acme, 6, None).await;
    for (socket, past) in &mut sockets {
        let live = if past.contains(&1) { 7 } else { 6 };
        for expected in past.iter().copied().chain([live]) {
            let event: Value = serde_json::from_str(&next_text(socket).await).expect("JSON");
            assert_eq!(event["n"], expected, "{past:?}");
        }
    }
    for feed in &mut feeds {
        let mut text = String::new();
        while !text.contains(r#""n":6"#) {
            let piece =
                tokio::time::timeout(BOUND, feed.chunk()).await.expect("in time").expect("a piece").expect("more");
            text.push_str(str::from_utf8(&piece).expect("text"));
        }
        let contains = |n: u32| text.contains(&format!(r#""n":{n},"#));
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6, 7].map(contains),
            [true, false, false, true, false, false, true, false],
            "{text}"
        );
    }
    assert!(tokio::time::timeout(std::time::Duration::from_millis(100), next_text(&mut none)).await.is_err());
    site.daemon.stop().await;
}

#[tokio::test]
async fn tenant_filter_cannot_be_widened_in_rich_mode() {
    let site = Site::new().await;
    site.publish_and_relay_some().await;
    let mut socket = site.socket(&site.acme, "alerts?v=1").await;
    assert_eq!(frame(&mut socket).await["t"], "welcome");
    let filter: Value = serde_json::from_str(ALL_TENANTS).expect("JSON");
    let subscribe =
        json!({"op": "subscribe", "id": 1, "stream": "aurora:alerts", "since": "earliest", "filter": filter});
    send_frame(&mut socket, subscribe).await;
    let mut seen = Vec::new();
    loop {
        let frame = frame(&mut socket).await;
        match frame["t"].as_str().expect("a type") {
            "event" => seen.push(frame["d"]["n"].as_u64().expect("a number")),
            "live" => break,
            _ => {}
        }
    }
    assert_eq!(seen, [0, 3]);
    send_frame(&mut socket, json!({"op": "filter", "id": 2, "stream": "aurora:alerts", "filter": filter})).await;
    assert_eq!(frame(&mut socket).await["t"], "ok");
    send_frame(&mut socket, json!({"op": "filter", "id": 3, "stream": "aurora:alerts"})).await;
    assert_eq!(frame(&mut socket).await["t"], "ok");
    site.publish(&site.globex, 7, None).await;
    site.publish(&site.acme, 6, None).await;
    let next = loop {
        let frame = frame(&mut socket).await;
        if frame["t"] == "event" {
            break frame;
        }
    };
    assert_eq!(next["d"]["n"], 6);
    site.daemon.stop().await;
}

#[tokio::test]
async fn tenant_sees_and_moves_only_its_dead_letters() {
    let site = Site::new().await;
    site.publish_some().await;
    let listed = async |key: &str| site.get(key, DEAD).await["dead_letters"].as_array().expect("a list").clone();
    until("six dead letters", BOUND, async || (listed(&site.all).await.len() == 6).then_some(())).await;
    let mine = listed(&site.acme).await;
    let of = |letters: &[Value]| letters.iter().map(|letter| letter["entry"]["data"]["n"].clone()).collect::<Vec<_>>();
    assert_eq!(of(&mine), [0, 3].map(Value::from));
    let theirs = listed(&site.globex).await;
    let id = |letter: &Value| letter["id"].as_str().expect("an id").to_owned();
    let (status, _) = request_as(&site.daemon, &site.acme, "GET", &format!("{DEAD}/{}", id(&mine[0])), "").await;
    assert_eq!(status, StatusCode::OK);
    for (method, path) in [("GET", ""), ("DELETE", ""), ("POST", "/replay")] {
        let path = format!("{DEAD}/{}{path}", id(&theirs[0]));
        assert_eq!(
            request_as(&site.daemon, &site.acme, method, &path, "").await.0,
            StatusCode::NOT_FOUND,
            "{method} {path}"
        );
    }
    let raw = "/api/v1/streams/aurora:alerts:dead_letter/events";
    assert_eq!(numbers(&site.get(&site.acme, raw).await["events"]), [0, 3]);
    let ids = json!({"ids": [id(&theirs[0]), id(&mine[0])], "dry_run": true}).to_string();
    let (_, body) = request_as(&site.daemon, &site.acme, "POST", &format!("{DEAD}/discard"), &ids).await;
    assert_eq!(body["matched"], 1, "{body}");
    let (_, body) = request_as(&site.daemon, &site.acme, "POST", &format!("{DEAD}/discard"), r#"{"all":true}"#).await;
    assert_eq!(body["discarded"], 2, "{body}");
    assert_eq!(of(&listed(&site.all).await), [1, 2, 4, 5].map(Value::from));
    let (_, body) = request_as(&site.daemon, &site.acme, "DELETE", &format!("{DEAD}?all=true"), "").await;
    assert_eq!(body["discarded"], 0, "{body}");
    site.daemon.stop().await;
}

#[tokio::test]
async fn data_about_all_tenants_is_hidden_from_one() {
    let site = Site::new().await;
    site.publish_some().await;
    let stream = site.get(&site.acme, "/api/v1/streams/aurora:alerts").await;
    let members: Vec<_> = stream.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(members, ["first_id", "last_id", "name"]);
    assert_eq!(site.get(&site.acme, "/api/v1/streams").await["streams"][0], stream);
    assert!(site.get(&site.all, "/api/v1/streams/aurora:alerts").await["length"].is_u64());
    let (status, _) = request_as(&site.daemon, &site.acme, "GET", "/api/v1/dead-letters", "").await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    site.daemon.stop().await;
}
