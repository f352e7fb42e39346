//! Access as callers meet it, on the real binary: keys, tokens, scopes, tenants, tickets.

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

/// Keys for a configuration, and the texts that callers show.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    pub(crate) toml: String,
}

impl Keys {
    /// A fresh key, declared.
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

    /// A configuration with them.
    pub(crate) fn home(&self) -> Home {
        Home::new(&format!("{STREAMS}\n{}", self.toml))
    }
}

/// The one issuer that most tests have.
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

/// A token of that issuer.
pub(crate) fn token(subject: &str, scopes: &[&str], tenant: Option<&str>, seconds: u64) -> String {
    filtered_token(subject, scopes, tenant, None, seconds)
}

/// The same with a filter, or something else in its place.
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

pub(crate) async fn ask(daemon: &Daemon, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    let request = client().request(method, daemon.url(path)).body(body.to_owned());
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.send().await.expect("an answer")
}

pub(crate) fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// Asks with a key or token; status and body.
pub(crate) async fn asks(daemon: &Daemon, token: &str, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
    let response = ask(daemon, method, path, &[("authorization", &bearer(token))], body).await;
    let status = response.status();
    (status, response.json().await.unwrap_or(Value::Null))
}

/// Whether those with the scope are let in where that is needed.
fn is_enough(scope: &str, access: Access) -> bool {
    match access {
        Access::Open | Access::Credentials => true,
        Access::Metrics | Access::Administer => scope == "admin",
        Access::Publish | Access::PublishEach => ["admin", "publish:aurora:alerts", "publish:*"].contains(&scope),
        Access::Read => ["admin", "read:aurora:*", "consume:aurora:alerts"].contains(&scope),
        Access::Consume => ["admin", "consume:aurora:alerts"].contains(&scope),
        Access::Watch => ["admin", "ws:alerts"].contains(&scope),
    }
}

/// Asks a route as it should be asked.
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
    ask(daemon, route.method, &path, &headers, body).await
}

#[tokio::test]
async fn every_route_lets_in_those_with_the_right_scope_alone() {
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
            let answer = visit(&daemon, &route, credentials).await;
            assert_eq!(answer.status() == StatusCode::UNAUTHORIZED, !is_open, "{route:?} with {credentials:?}");
            let challenge = answer.headers().get("www-authenticate");
            assert_eq!(challenge.is_some_and(|value| value == "Bearer realm=\"aurora-bus\""), !is_open, "{route:?}");
        }
        for (scope, key) in scopes.iter().zip(&held) {
            let status = visit(&daemon, &route, Some(key)).await.status();
            let is_let_in = !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            assert_eq!(is_let_in, is_enough(scope, route.access), "{route:?} with {scope}: {status}");
        }
    }
    daemon.stop().await;
}

#[tokio::test]
async fn a_scope_is_asked_for_the_stream_that_an_event_goes_to() {
    let mut keys = Keys::default();
    let key = keys.add("sensor", &["publish:aurora:alerts"], None);
    let reader = keys.add("reader", &["read:aurora:alerts", "read:aurora:alerts:dead_letter"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let (status, answer) = asks(&daemon, &key, "POST", "/api/v1/alerts", r#"[{"n":1},{"category":"cps"}]"#).await;
    assert_eq!(status, StatusCode::MULTI_STATUS, "{answer}");
    assert!(answer["results"][0]["id"].is_string(), "{answer}");
    assert_eq!(answer["results"][1]["error"]["code"], "forbidden");
    let (status, _) = asks(&daemon, &key, "POST", "/api/v1/alerts", r#"{"category":"cps"}"#).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let (status, answer) = asks(&daemon, &reader, "GET", "/api/v1/streams", "").await;
    let names: Vec<_> = answer["streams"].as_array().expect("a list").iter().map(|stream| &stream["name"]).collect();
    assert_eq!((status, names), (StatusCode::OK, vec![&json!("aurora:alerts")]));
    let dead = "/api/v1/streams/aurora:alerts:dead_letter/events";
    assert_eq!(asks(&daemon, &reader, "GET", dead, "").await.0, StatusCode::FORBIDDEN, "dead letters need admin");
    assert_eq!(asks(&daemon, &reader, "GET", "/api/v1/streams/nothing", "").await.0, StatusCode::FORBIDDEN);
    daemon.stop().await;
}

#[tokio::test]
async fn those_bound_to_a_tenant_pull_nothing_for_a_group_has_entries_of_all() {
    let mut keys = Keys::default();
    let bound = keys.add("acme", &["admin"], Some("acme"));
    let home = keys.home();
    let daemon = home.start().await;
    for what in ["pull", "ack", "nack", "extend"] {
        let path = format!("/api/v1/streams/aurora:alerts/groups/g/{what}");
        let (status, answer) = asks(&daemon, &bound, "POST", &path, r#"{"consumer":"w"}"#).await;
        assert_eq!((status, &answer["code"]), (StatusCode::FORBIDDEN, &json!("forbidden")), "{what}");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn credentials_are_taken_from_every_place_they_may_be_in() {
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
            let status = ask(&daemon, "GET", EVENTS, &[(name, value)], "").await.status();
            assert_eq!(status, StatusCode::OK, "{name}");
        }
        let foreign = [("cookie", cookie.as_str()), ("origin", "https://evil.example")];
        assert_eq!(ask(&daemon, "GET", EVENTS, &foreign, "").await.status(), StatusCode::UNAUTHORIZED);
        let feed = format!("/api/v1/feeds/alerts?token={shown}");
        assert_eq!(ask(&daemon, "GET", &feed, &[], "").await.status(), StatusCode::OK);
        let elsewhere = format!("{EVENTS}?token={shown}");
        assert_eq!(ask(&daemon, "GET", &elsewhere, &[], "").await.status(), StatusCode::UNAUTHORIZED);
    }
    let basic = [("authorization", "Basic YTpi"), ("x-api-key", key.as_str())];
    assert_eq!(ask(&daemon, "GET", EVENTS, &basic, "").await.status(), StatusCode::UNAUTHORIZED);
    daemon.stop().await;
}

#[tokio::test]
async fn metrics_are_open_on_loopback_unless_the_configuration_says_otherwise() {
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
async fn a_dead_letter_action_is_audited_under_the_name_of_its_key() {
    let mut keys = Keys::default();
    let key = keys.add("ops", &["admin"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let path = "/api/v1/dead-letters/aurora:alerts/discard";
    assert_eq!(asks(&daemon, &key, "POST", path, r#"{"all":true}"#).await.0, StatusCode::OK);
    let (_, answer) = asks(&daemon, &key, "GET", "/api/v1/streams/aurora:audit/events", "").await;
    let actors: Vec<_> = answer["events"].as_array().expect("a list").iter().map(|e| &e["data"]["actor"]).collect();
    assert!(actors.iter().all(|actor| **actor == json!("http:key:ops")), "{answer}");
    daemon.stop().await;
}
