//! The client module with credentials that are required, expire, or are not sufficient.

use serde_json::json;

use super::PageServer;
use super::chromium::Chromium;
use super::client::{ALERTS, STREAMS, open};
use crate::auth::{Keys, issuer_toml, token};
use crate::support::app::Home;

const SCOPES: &[&str] = &["ws:alerts"];

#[tokio::test(flavor = "multi_thread")]
async fn token_is_renewed_before_and_after_it_expires() {
    let home = Home::new(&format!("{STREAMS}\n{}", issuer_toml()));
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let token = |seconds| token("ann", SCOPES, None, seconds);
    // The first two tokens expire soon, so that the next one is requested at once. After the second there is none in
    // time.
    let mut tab = open(&browser, &server, &daemon.url(""), &json!({"tokens": [token(8), token(16)]})).await;
    tab.until("bus.state === 'live'").await;
    tab.until("seen.needs.length >= 3").await;
    assert_eq!(
        tab.get("[seen.needs, seen.states.length]").await,
        json!([[false, true, true], 3]),
        "one connection so far"
    );
    let tokens = json!([token(600)]);
    tab.get(&format!("tokens = {tokens}")).await;
    tab.until("seen.states.some(({ code }) => code === 4003)").await;
    tab.until("bus.state === 'live' && tokens.length === 0").await;
    daemon.publish(ALERTS, &[r#"{"n":1}"#.to_owned()]).await.expect_err("credentials are needed");
    let needs = tab.get("seen.needs").await;
    assert_eq!(needs.as_array().expect("a list").last(), Some(&json!(true)), "{needs}");
    let connected = tab.get("seen.states.filter(({ state }) => state === 'live').length").await;
    assert_eq!(connected, 2, "the second token extended the first connection");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_client_stops_with_the_reason_and_may_retry() {
    let mut keys = Keys::default();
    let (good, other) = (keys.add("good", SCOPES, None), keys.add("other", &["ws:agent_thoughts"], None));
    let home = keys.home();
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let base = daemon.url("");
    let last = "[bus.state, seen.states.at(-1).code, seen.states.at(-1).reason.split(':')[0]]";

    let mut tab = open(&browser, &server, &base, &json!({})).await;
    tab.until("bus.state === 'stopped'").await;
    assert_eq!(tab.get(last).await, json!(["stopped", 4501, "unauthenticated"]));
    assert_eq!(tab.get("seen.states.length").await, 2, "no further attempt");

    // A client with a token source retries once after a refusal.
    let mut tab = open(&browser, &server, &base, &json!({"tokens": ["ab_bad", "ab_worse", other, good]})).await;
    tab.until("bus.state === 'stopped'").await;
    assert_eq!(tab.get(last).await, json!(["stopped", 4501, "unauthenticated"]));
    assert_eq!(tab.get("seen.needs").await, json!([false, true]));
    tab.get("dispatchEvent(new Event('online')), bus.resume()").await;
    tab.until("bus.state === 'stopped'").await;
    assert_eq!(tab.get(last).await, json!(["stopped", 4502, "forbidden"]));
    tab.get("bus.resume()").await;
    tab.until("bus.state === 'live'").await;

    // An invalid request would be invalid again, so the client does not retry.
    let cases = [
        (json!({"token": good, "streams": ["aurora:nothing"]}), 404),
        (json!({"token": good, "since": "yesterday"}), 422),
        (json!({"token": good, "url": format!("{base}/api/v1/ws/nothing")}), 4502),
    ];
    for (options, code) in cases {
        let mut tab = open(&browser, &server, &base, &options).await;
        tab.until("bus.state === 'stopped'").await;
        assert_eq!(tab.get("seen.states.at(-1).code").await, code, "{options}");
        assert_eq!(tab.complaints().await, Vec::<String>::new());
    }
    // A token that is not valid in a header does not appear in a message either.
    let mut tab = open(&browser, &server, &base, &json!({"token": "a secret, with blanks"})).await;
    tab.until("bus.state === 'stopped'").await;
    let reason = tab.get("seen.states.at(-1).reason").await;
    assert!(reason.as_str().is_some_and(|reason| reason.contains("token") && !reason.contains("secret")), "{reason}");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page_opens_each_connection_with_a_new_ticket() {
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let mut tab = open(&browser, &server, &daemon.url(""), &json!({"streams": []})).await;
    // A page on another port, so that its browser sends a preflight before the key.
    let script = format!(
        "(async () => {{
            const base = {base:?};
            const ticket = async () => {{
                const headers = {{ authorization: 'Bearer {key}' }};
                const answer = await fetch(base + '/api/v1/ws/ticket', {{ method: 'POST', headers }});
                return (await answer.json()).ticket;
            }};
            window.other = connect({{ url: base + '/api/v1/ws/alerts', ticket }});
        }})()",
        base = daemon.url("")
    );
    tab.get(&script).await;
    tab.until("other.state === 'live'").await;
    tab.get("other.pause(), other.resume()").await;
    tab.until("other.state === 'live'").await;
    daemon.stop().await;
}
