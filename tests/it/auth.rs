//! Access control on the real binary: keys, tokens, scopes, tenants, tickets.

mod expiry;
mod filters;
mod issuers;
mod secrets;
mod tenants;
pub(crate) mod watching;

use std::time::Duration;

use aurora_bus::auth::{AuthConfig, IssuerConfig, KeyHash, TokenRequest, new_key, sign};
use aurora_bus::http::{Access, Route, routes};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::support::app::{Daemon, Home, client};

const STREAMS: &str = r#"
[relay]
drain_window = "200ms"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
[[streams]]
name = "aurora:audit"
relay = true
"#;
const SECRET: &str = "a secret of the tests that is long enough";
const EVENTS: &str = "/api/v1/streams/aurora:alerts/events";

/// API keys, declared in a configuration.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    pub(crate) toml: String,
}

impl Keys {
    /// Declares a new key and returns it.
    pub(crate) fn add(&mut self, name: &str, scopes: &[&str], tenant: Option<&str>) -> String {
        let key = new_key();
        let tenant = tenant.map(|tenant| format!("tenant = \"{tenant}\"\n")).unwrap_or_default();
        let hash = KeyHash::of(&key);
        let declared = [
            "[[auth.keys]]",
            &format!("name = \"{name}\""),
            &format!("hash = \"{hash}\""),
            &format!("scopes = {scopes:?}"),
            &tenant,
        ];
        self.toml.push_str(&declared.join("\n"));
        key
    }

    /// Returns a home whose configuration has the keys.
    pub(crate) fn home(&self) -> Home {
        Home::new(&format!("{STREAMS}\n{}", self.toml))
    }
}

/// Returns the configuration of the issuer that most tests use.
pub(crate) fn issuer_toml() -> String {
    format!(
        "[[auth.issuers]]\nissuer = \"tests\"\naudience = \"bus\"\nalgorithms = [\"HS256\"]\nsecret = \"{SECRET}\"\n"
    )
}

fn issuer() -> IssuerConfig {
    let config: toml::Table = toml::from_str(&issuer_toml()).expect("TOML");
    let auth: AuthConfig = config["auth"].clone().try_into().expect("an issuer");
    auth.issuers.into_iter().next().expect("one")
}

/// Signs a token of that issuer.
pub(crate) fn token(subject: &str, scopes: &[&str], tenant: Option<&str>, seconds: u64) -> String {
    filtered_token(subject, scopes, tenant, None, seconds)
}

/// Signs a token with a filter claim, which may be invalid.
fn filtered_token(subject: &str, scopes: &[&str], tenant: Option<&str>, filter: Option<Value>, seconds: u64) -> String {
    let request = TokenRequest {
        subject: subject.to_owned(),
        scopes: scopes.iter().map(|scope| scope.parse().expect("a scope")).collect(),
        tenant: tenant.map(str::to_owned),
        filter,
        lifetime: Duration::from_secs(seconds),
    };
    sign(&issuer(), &request).expect("a token")
}

/// Sends a request.
pub(crate) async fn send_request(
    daemon: &Daemon,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Response {
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    let builder = client().request(method, daemon.url(path)).body(body.to_owned());
    let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
    builder.send().await.expect("a response")
}

pub(crate) fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// Sends a request with a key or token, and returns status and body.
pub(crate) async fn request_as(
    daemon: &Daemon,
    token: &str,
    method: &str,
    path: &str,
    body: &str,
) -> (StatusCode, Value) {
    let response = send_request(daemon, method, path, &[("authorization", &bearer(token))], body).await;
    let status = response.status();
    (status, response.json().await.unwrap_or(Value::Null))
}

/// Returns whether the scope grants the access.
fn grants(scope: &str, access: Access) -> bool {
    match access {
        Access::Open | Access::Credentials => true,
        Access::Metrics | Access::Administer => scope == "admin",
        Access::Publish | Access::PublishEach => ["admin", "publish:aurora:alerts", "publish:*"].contains(&scope),
        Access::Read => ["admin", "read:aurora:*", "consume:aurora:alerts"].contains(&scope),
        Access::Consume => ["admin", "consume:aurora:alerts"].contains(&scope),
        Access::Watch => ["admin", "ws:alerts"].contains(&scope),
    }
}

/// Sends a valid request to a route.
async fn visit(daemon: &Daemon, route: &Route, credentials: Option<&str>) -> Response {
    let path = route
        .path
        .replace("{stream}", "aurora:alerts")
        .replace("{channel}", "alerts")
        .replace("{id}", "1-1")
        .replace("{group}", "g");
    let mut headers = Vec::new();
    if route.access == Access::Watch && path.contains("/ws/") {
        headers.extend([("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")]);
        headers.push(("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="));
    }
    let credentials = credentials.map(bearer);
    headers.extend(credentials.iter().map(|credentials| ("authorization", credentials.as_str())));
    let body = if matches!(route.access, Access::Publish | Access::PublishEach) { "{}" } else { "" };
    send_request(daemon, route.method, &path, &headers, body).await
}

#[tokio::test]
async fn every_route_accepts_only_the_scopes_that_it_needs() {
    let scopes = [
        "admin",
        "publish:aurora:alerts",
        "publish:*",
        "publish:aurora:audit",
        "read:aurora:*",
        "read:aurora:audit",
        "consume:aurora:alerts",
        "ws:alerts",
        "ws:agent_thoughts",
    ];
    let mut keys = Keys::default();
    let names: Vec<String> = (0..scopes.len()).map(|index| format!("k{index}")).collect();
    let held: Vec<String> = names.iter().zip(scopes).map(|(name, scope)| keys.add(name, &[scope], None)).collect();
    keys.toml += "[auth]\nmetrics = \"admin\"\n";
    let home = keys.home();
    let daemon = home.start().await;
    for route in routes() {
        let is_open = route.access == Access::Open;
        for credentials in [None, Some("ab_guess"), Some("not.a.token")] {
            let response = visit(&daemon, &route, credentials).await;
            assert_eq!(response.status() == StatusCode::UNAUTHORIZED, !is_open, "{route:?} with {credentials:?}");
            let challenge = response.headers().get("www-authenticate");
            assert_eq!(challenge.is_some_and(|value| value == "Bearer realm=\"aurora-bus\""), !is_open, "{route:?}");
        }
        for (scope, key) in scopes.iter().zip(&held) {
            let status = visit(&daemon, &route, Some(key)).await.status();
            let is_accepted = !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            assert_eq!(is_accepted, grants(scope, route.access), "{route:?} with {scope}: {status}");
        }
    }
    daemon.stop().await;
}

#[tokio::test]
async fn publish_needs_the_scope_of_each_events_stream() {
    let mut keys = Keys::default();
    let key = keys.add("sensor", &["publish:aurora:alerts"], None);
    let reader = keys.add("reader", &["read:aurora:alerts", "read:aurora:alerts:dead_letter"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let (status, body) = request_as(&daemon, &key, "POST", "/api/v1/alerts", r#"[{"n":1},{"category":"cps"}]"#).await;
    assert_eq!(status, StatusCode::MULTI_STATUS, "{body}");
    assert!(body["results"][0]["id"].is_string(), "{body}");
    assert_eq!(body["results"][1]["error"]["code"], "forbidden");
    let (status, _) = request_as(&daemon, &key, "POST", "/api/v1/alerts", r#"{"category":"cps"}"#).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let (status, body) = request_as(&daemon, &reader, "GET", "/api/v1/streams", "").await;
    let names: Vec<_> = body["streams"].as_array().expect("a list").iter().map(|stream| &stream["name"]).collect();
    assert_eq!((status, names), (StatusCode::OK, vec![&json!("aurora:alerts")]));
    let dead = "/api/v1/streams/aurora:alerts:dead_letter/events";
    assert_eq!(request_as(&daemon, &reader, "GET", dead, "").await.0, StatusCode::FORBIDDEN, "dead letters need admin");
    assert_eq!(request_as(&daemon, &reader, "GET", "/api/v1/streams/nothing", "").await.0, StatusCode::FORBIDDEN);
    daemon.stop().await;
}

#[tokio::test]
async fn principal_of_a_tenant_cannot_pull_or_settle() {
    let mut keys = Keys::default();
    let bound = keys.add("acme", &["admin"], Some("acme"));
    let home = keys.home();
    let daemon = home.start().await;
    for action in ["pull", "ack", "nack", "extend"] {
        let path = format!("/api/v1/streams/aurora:alerts/groups/g/{action}");
        let (status, body) = request_as(&daemon, &bound, "POST", &path, r#"{"consumer":"w"}"#).await;
        assert_eq!((status, &body["code"]), (StatusCode::FORBIDDEN, &json!("forbidden")), "{action}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn credentials_are_accepted_in_every_place() {
    let mut keys = Keys::default();
    let key = keys.add("ops", &["admin"], None);
    keys.toml += &issuer_toml();
    let home = keys.home();
    let daemon = home.start().await;
    let token = token("ann", &["admin"], None, 600);
    for shown in [&key, &token] {
        let cookie = format!("theme=dark; access_token={shown}");
        let headers = [("authorization", bearer(shown)), ("x-api-key", shown.clone()), ("cookie", cookie.clone())];
        for (name, value) in &headers {
            let status = send_request(&daemon, "GET", EVENTS, &[(name, value)], "").await.status();
            assert_eq!(status, StatusCode::OK, "{name}");
        }
        let foreign = [("cookie", cookie.as_str()), ("origin", "https://evil.example")];
        assert_eq!(send_request(&daemon, "GET", EVENTS, &foreign, "").await.status(), StatusCode::UNAUTHORIZED);
        let feed = format!("/api/v1/feeds/alerts?token={shown}");
        assert_eq!(send_request(&daemon, "GET", &feed, &[], "").await.status(), StatusCode::OK);
        let elsewhere = format!("{EVENTS}?token={shown}");
        assert_eq!(send_request(&daemon, "GET", &elsewhere, &[], "").await.status(), StatusCode::UNAUTHORIZED);
    }
    let basic = [("authorization", "Basic YTpi"), ("x-api-key", key.as_str())];
    assert_eq!(send_request(&daemon, "GET", EVENTS, &basic, "").await.status(), StatusCode::UNAUTHORIZED);
    daemon.stop().await;
}

#[tokio::test]
async fn metrics_access_follows_auth_metrics() {
    for (setting, expected) in
        [("loopback", StatusCode::OK), ("open", StatusCode::OK), ("admin", StatusCode::UNAUTHORIZED)]
    {
        let mut keys = Keys::default();
        keys.add("ops", &["admin"], None);
        let home = Home::new(&format!("{STREAMS}\n[auth]\nmetrics = \"{setting}\"\n{}", keys.toml));
        let daemon = home.start().await;
        assert_eq!(daemon.status("/metrics").await, Some(expected), "{setting}");
        assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
        daemon.stop().await;
    }
}

#[tokio::test]
async fn dead_letter_action_is_audited_with_the_key_name() {
    let mut keys = Keys::default();
    let key = keys.add("ops", &["admin"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let path = "/api/v1/dead-letters/aurora:alerts/discard";
    assert_eq!(request_as(&daemon, &key, "POST", path, r#"{"all":true}"#).await.0, StatusCode::OK);
    let (_, body) = request_as(&daemon, &key, "GET", "/api/v1/streams/aurora:audit/events", "").await;
    let actors: Vec<_> = body["events"].as_array().expect("a list").iter().map(|e| &e["data"]["actor"]).collect();
    assert!(actors.iter().all(|actor| **actor == json!("http:key:ops")), "{body}");
    daemon.stop().await;
}
