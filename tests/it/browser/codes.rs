//! Close codes and permissions of a page with a bare WebSocket or feed, in a real browser.

use serde_json::{Value, json};

use super::PageServer;
use super::chromium::{Chromium, Tab};
use crate::auth::Keys;
use crate::support::app::Daemon;

/// Returns the code and reason that a page sees at the end of a socket to this target.
async fn ended(tab: &mut Tab, daemon: &Daemon, target: &str, offer: &Value) -> Value {
    let url = daemon.url(&format!("/api/v1/ws/{target}")).replacen("http", "ws", 1);
    let socket = format!(
        "new Promise((done) => {{
            new WebSocket({url:?}, {offer}).onclose = ({{ code, reason }}) => done([code, reason]);
        }})"
    );
    tab.get(&socket).await
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_page_sees_the_code_with_any_version() {
    let mut keys = Keys::default();
    let key = keys.add("page", &["ws:alerts"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    let mut tab = browser.open(&format!("{}/blank", server.origin)).await;
    tab.until("location.pathname === '/blank' && document.readyState === 'complete'").await;
    let bearer = format!("bearer.{key}");
    let with_token = format!("alerts?token={key}");
    let cases = [
        (with_token.as_str(), json!(["aurora.v2"]), 4506),
        ("alerts", json!(["aurora.v2", bearer]), 4506),
        ("alerts", json!([bearer, "aurora.v2"]), 4506),
        (&format!("{with_token}&v=2"), json!([]), 4506),
        ("alerts", json!(["aurora.v2"]), 4501),
        ("alerts", json!(["aurora.v2", "bearer.ab_guess"]), 4501),
        ("alerts", json!(["aurora.v1", "bearer.ab_guess"]), 4501),
        ("agent-thoughts", json!(["aurora.v2", bearer]), 4502),
        // A server cannot confirm a token as a subprotocol, so the browser disconnects.
        ("alerts", json!([bearer]), 1006),
    ];
    for (target, offer, code) in cases {
        let end = ended(&mut tab, &daemon, target, &offer).await;
        assert_eq!(end[0], code, "{target} {offer}: {end}");
    }
    let end = ended(&mut tab, &daemon, "alerts", &json!([])).await;
    let reason = "unauthenticated: credentials are required: Authorization: Bearer, X-API-Key, cookie access_token; \
                 to watch, also a ticket";
    assert_eq!(end, json!([4501, reason]));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn page_of_the_same_origin_opens_feeds_with_tickets() {
    let mut keys = Keys::default();
    let key = keys.add("page", &["admin"], None);
    let home = keys.home();
    let daemon = home.start().await;
    let browser = Chromium::start().await;
    let mut tab = browser.open(&daemon.url("/health")).await;
    tab.until("location.pathname === '/health' && document.readyState === 'complete'").await;
    let deeds = "(async () => {
        const headers = { authorization: 'Bearer KEY' };
        const post = async (path, body) => (await fetch(path, { method: 'POST', headers, body })).json();
        await post('/api/v1/alerts', JSON.stringify({ n: 1 }));
        const url = async (kind) => {
            const { ticket } = await post('/api/v1/ws/ticket');
            return `/api/v1/${kind}/alerts?since=earliest&ticket=${ticket}`;
        };
        const first = (source) => new Promise((done) => {
            source.onmessage = ({ data }) => (source.close(), done(JSON.parse(data).n));
            source.onerror = () => (source.close(), done('refused'));
        });
        const stop = new AbortController();
        const { status } = await fetch(await url('feeds'), { signal: stop.signal });
        stop.abort();
        return [status, await first(new EventSource(await url('feeds'))), await first(new WebSocket(await url('ws')))];
    })()";
    assert_eq!(tab.get(&deeds.replace("KEY", &key)).await, json!([200, 1, 1]));
    daemon.stop().await;
}
