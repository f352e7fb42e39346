//! A principal that is restricted to a tenant uses only this tenant's streams, on every path.

use super::*;
use crate::auth::watching::{frame, open, send_frame};
use crate::auth::{Keys, bearer, request_as, send_request};

struct Site {
    _home: Home,
    daemon: Daemon,
    acme: String,
    all: String,
}

impl Site {
    async fn new() -> Self {
        let mut keys = Keys::default();
        let acme = keys.add("acme", &["admin"], Some("acme"));
        let all = keys.add("all", &["admin"], None);
        let groups = "[[streams.groups]]\nname = \"siem\"\nsink = \"log\"";
        let home = Home::new(&config(groups, &keys.toml));
        let daemon = home.start().await;
        Self { _home: home, daemon, acme, all }
    }

    async fn status(&self, key: &str, method: &str, path: &str, body: &str) -> StatusCode {
        request_as(&self.daemon, key, method, path, body).await.0
    }
}

#[tokio::test]
async fn restricted_principal_uses_only_its_own_member() {
    let site = Site::new().await;
    let Site { daemon, acme, all, .. } = &site;
    let (own, other) = (member("acme"), member("globex"));
    let events = |stream: &str| format!("/api/v1/streams/{stream}/events");
    for (key, stream, expected) in [
        (acme, &own, StatusCode::CREATED),
        (acme, &other, StatusCode::FORBIDDEN),
        (all, &other, StatusCode::CREATED),
        (all, &own, StatusCode::CREATED),
    ] {
        assert_eq!(site.status(key, "POST", &events(stream), "{}").await, expected, "{stream}");
    }
    // Its attempts create no members of other tenants.
    assert_eq!(site.status(acme, "POST", &events(&member("initech")), "{}").await, StatusCode::FORBIDDEN);
    let (status, problem) = request_as(daemon, all, "POST", &events(&own), r#"{"tenant":"globex"}"#).await;
    assert_eq!((status, &problem["code"]), (StatusCode::UNPROCESSABLE_ENTITY, &json!("foreign_tenant")), "{problem}");

    let dead = |stream: &str| format!("/api/v1/dead-letters/{stream}");
    let paths = |stream: &str| {
        let letters = format!("{stream}:dead_letter");
        [
            ("GET", format!("/api/v1/streams/{stream}")),
            ("GET", events(stream)),
            ("GET", format!("{}?wait_ms=1", events(stream))),
            ("GET", format!("/api/v1/streams/{letters}")),
            ("GET", events(&letters)),
            ("GET", dead(stream)),
            ("GET", dead(&letters)),
            ("POST", format!("{}/replay", dead(stream))),
            ("POST", format!("{}/discard", dead(&letters))),
            ("DELETE", format!("{}?all=true", dead(stream))),
        ]
    };
    for ((method, own), (_, other)) in paths(&own).into_iter().zip(paths(&other)) {
        let body = if method == "POST" { r#"{"all":true}"# } else { "" };
        assert_eq!(site.status(acme, method, &own, body).await, StatusCode::OK, "{own}");
        assert_eq!(site.status(acme, method, &other, body).await, StatusCode::FORBIDDEN, "{other}");
        assert_eq!(site.status(all, method, &other, body).await, StatusCode::OK, "{other}");
    }
    for path in ["GET /{other}/1-1", "DELETE /{other}/1-1", "POST /{other}/1-1/replay"] {
        let (method, path) = path.split_once(' ').expect("two words");
        let path = format!("/api/v1/dead-letters{}", path.replace("{other}", &other));
        assert_eq!(site.status(acme, method, &path, "").await, StatusCode::FORBIDDEN, "{path}");
    }
    let (_, page) = request_as(daemon, acme, "GET", FAMILY_PATH, "").await;
    assert_eq!((&page["family"]["streams"], page["family"].get("keys")), (&json!([own]), None), "{page}");
    let (_, page) = request_as(daemon, all, "GET", FAMILY_PATH, "").await;
    assert_eq!(page["family"]["keys"], 2, "{page}");
    let (_, list) = request_as(daemon, acme, "GET", "/api/v1/streams", "").await;
    assert!(!list.to_string().contains("globex"), "{list}");
    site.daemon.stop().await;
}

#[tokio::test]
async fn restricted_principal_watches_only_its_own_member() {
    let site = Site::new().await;
    let Site { daemon, acme, all, .. } = &site;
    let auth = bearer(acme);
    let headers = [("authorization", auth.as_str())];
    for target in ["tenant-alerts?key=globex", &format!("tenant-alerts?stream={}", member("globex"))] {
        assert_eq!(open(daemon, target, &headers).await.map(drop), Err(StatusCode::FORBIDDEN), "{target}");
        let feed = send_request(daemon, "GET", &format!("/api/v1/feeds/{target}"), &headers, "").await;
        assert_eq!(feed.status(), StatusCode::FORBIDDEN, "{target}");
    }
    // It need not name its own stream.
    let (mut plain, _) = open(daemon, "tenant-alerts", &headers).await.expect("let in");
    let rich = [headers[0], ("sec-websocket-protocol", "aurora.v1")];
    let (mut rich, _) = open(daemon, "tenant-alerts", &rich).await.expect("let in");
    assert_eq!(frame(&mut rich).await["streams"], json!([member("acme")]));
    send_frame(&mut rich, json!({"op": "subscribe", "id": 1, "stream": member("globex")})).await;
    let refused = frame(&mut rich).await;
    assert_eq!((&refused["t"], refused["code"] == 403 || refused["code"] == 404), (&json!("error"), true), "{refused}");
    for (key, expected) in [("globex", json!("error")), ("acme", json!("ok"))] {
        send_frame(&mut rich, json!({"op": "publish", "id": 3, "stream": member(key), "data": {"n": 1}})).await;
        assert_eq!(frame(&mut rich).await["t"], expected, "{key}");
    }
    assert_eq!(next_text(&mut plain).await, r#"{"n":1}"#);
    send_frame(&mut rich, json!({"op": "subscribe", "id": 2, "stream": member("acme")})).await;
    assert_eq!(frame(&mut rich).await["t"], "subscribed");
    assert_eq!(frame(&mut rich).await["t"], "live");
    let publish = async |key: &str, n: usize| {
        let path = format!("/api/v1/streams/{}/events", member(key));
        assert_eq!(site.status(all, "POST", &path, &event(n)).await, StatusCode::CREATED);
    };
    publish("globex", 1).await;
    publish("acme", 2).await;
    // An event without a tenant gets the tenant of its stream.
    assert_eq!(next_text(&mut plain).await, event(2));
    assert_eq!(frame(&mut rich).await["d"]["n"], 2);
    let both = [("authorization", bearer(all)), ("sec-websocket-protocol", "aurora.v1".to_owned())];
    let both = [(both[0].0, both[0].1.as_str()), (both[1].0, both[1].1.as_str())];
    let (mut unbound, _) = open(daemon, "tenant-alerts", &both).await.expect("let in");
    frame(&mut unbound).await;
    for key in ["acme", "globex"] {
        send_frame(&mut unbound, json!({"op": "subscribe", "id": 1, "stream": member(key)})).await;
        assert_eq!(frame(&mut unbound).await["t"], "subscribed", "{key}");
        assert_eq!(frame(&mut unbound).await["t"], "live");
    }
    site.daemon.stop().await;
}
