//! Pages of other origins: the headers for their browsers, and the effect in a real one.

use reqwest::header::HeaderName;
use reqwest::{Method, Response, StatusCode};
use serde_json::json;

use super::PageServer;
use super::chromium::Chromium;
use super::client::{ALERTS, STREAMS};
use crate::auth::{Keys, bearer};
use crate::support::app::{Daemon, Home, client};

const SOC: &str = "https://soc.example";
const EVENTS: &str = "/api/v1/streams/aurora:alerts/events";

async fn ask(daemon: &Daemon, method: Method, path: &str, headers: &[(&str, &str)]) -> Response {
    let request = client().request(method, daemon.url(path));
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.send().await.expect("an answer")
}

fn header_of<'a>(response: &'a Response, name: &str) -> Option<&'a str> {
    response.headers().get(name).map(|value| value.to_str().expect("ASCII"))
}

/// Returns the names of the headers that permit an action of a page.
fn allowances(response: &Response) -> Vec<&str> {
    response.headers().keys().map(HeaderName::as_str).filter(|name| name.starts_with("access-control-")).collect()
}

#[tokio::test]
async fn cors_headers_are_for_allowed_origins_only() {
    let mut keys = Keys::default();
    let key = bearer(&keys.add("page", &["admin"], None));
    keys.toml = format!("[http]\norigins = [{SOC:?}]\n{}", keys.toml);
    let home = keys.home();
    let daemon = home.start().await;
    let question = ("access-control-request-method", "POST");
    let asks_headers = ("access-control-request-headers", "authorization,content-type");
    let paths = [EVENTS, "/api/v1/alerts", "/api/v1/ws/ticket", "/api/v1/feeds/alerts", "/api/v1/streams"];
    for path in paths {
        // Without credentials: browsers send none with a preflight.
        for origin in [SOC, "http://127.0.0.1:3000"] {
            let answer = ask(&daemon, Method::OPTIONS, path, &[("origin", origin), question, asks_headers]).await;
            assert_eq!(answer.status(), StatusCode::NO_CONTENT, "{path}");
            assert_eq!(header_of(&answer, "access-control-allow-origin"), Some(origin));
            assert_eq!(header_of(&answer, "access-control-allow-credentials"), Some("true"));
            assert!(
                header_of(&answer, "access-control-allow-methods").is_some_and(|methods| methods.contains("DELETE"))
            );
            for header in ["authorization", "content-type", "idempotency-key", "last-event-id", "x-api-key"] {
                assert!(
                    header_of(&answer, "access-control-allow-headers").is_some_and(|headers| headers.contains(header))
                );
            }
            assert_eq!(header_of(&answer, "vary"), Some("origin"));
        }
        for origin in ["https://evil.example", "null", "https://soc.example.evil.example", "http://soc.example"] {
            let answer = ask(&daemon, Method::OPTIONS, path, &[("origin", origin), question, asks_headers]).await;
            assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{path} {origin}");
            assert_eq!(allowances(&answer), Vec::<&str>::new());
            assert_eq!(header_of(&answer, "vary"), Some("origin"));
        }
    }
    // Responses have the headers too, also errors, so that the page can read the reason.
    let cases = [
        (EVENTS, Some(&key), StatusCode::OK),
        (EVENTS, None, StatusCode::UNAUTHORIZED),
        ("/api/v1/feeds/alerts?since=never", Some(&key), StatusCode::BAD_REQUEST),
        ("/api/v1/nothing", Some(&key), StatusCode::NOT_FOUND),
        ("/client/aurora-bus.js", None, StatusCode::OK),
    ];
    for (path, key, status) in cases {
        let credentials = key.map(|key| ("authorization", key.as_str()));
        let headers: Vec<_> = [("origin", SOC)].into_iter().chain(credentials).collect();
        let answer = ask(&daemon, Method::GET, path, &headers).await;
        assert_eq!((answer.status(), header_of(&answer, "access-control-allow-origin")), (status, Some(SOC)), "{path}");
        assert!(header_of(&answer, "access-control-expose-headers").is_some_and(|names| names.contains("retry-after")));
        let headers: Vec<_> = [("origin", "https://evil.example")].into_iter().chain(credentials).collect();
        let answer = ask(&daemon, Method::GET, path, &headers).await;
        assert_eq!((allowances(&answer), header_of(&answer, "vary")), (vec![], Some("origin")), "{path}");
    }
    // Programs get no such header, but caches learn that the origin matters.
    let answer = ask(&daemon, Method::GET, EVENTS, &[("authorization", &key)]).await;
    assert_eq!((allowances(&answer), header_of(&answer, "vary")), (vec![], Some("origin")));
    let answer = ask(&daemon, Method::OPTIONS, EVENTS, &[]).await;
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
    let answer = ask(&daemon, Method::OPTIONS, "/api/v1/nothing", &[("origin", SOC), question]).await;
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    for path in ["/metrics", "/ready", "/health", "/"] {
        let answer = ask(&daemon, Method::GET, path, &[("origin", SOC)]).await;
        assert_eq!(allowances(&answer), Vec::<&str>::new(), "{path} is for machines");
    }
    daemon.stop().await;
}

#[tokio::test]
async fn wildcard_origin_allows_no_credentials() {
    let home = Home::new(&format!("{STREAMS}\n[http]\norigins = [\"*\", {SOC:?}, \"null\"]\n"));
    let daemon = home.start().await;
    for (origin, credentials) in [(SOC, Some("true")), ("https://any.example", None), ("null", None)] {
        for method in [Method::GET, Method::OPTIONS] {
            let headers = [("origin", origin), ("access-control-request-method", "GET")];
            let answer = ask(&daemon, method, "/api/v1/streams", &headers).await;
            assert_eq!(header_of(&answer, "access-control-allow-origin"), Some(origin));
            assert_eq!(header_of(&answer, "access-control-allow-credentials"), credentials, "{origin}");
        }
    }
    daemon.stop().await;
}

/// The actions of a page of another origin. Each results in `true` or the reason.
const DEEDS: &str = "(async () => {
    const [base, key] = DATA;
    const headers = { authorization: 'Bearer ' + key };
    const attempt = (deed) => deed.then((value) => value, () => 'refused');
    const json = (path, options) => fetch(base + path, options).then((answer) => answer.json());
    const read = (path) => json(path, { headers });
    const feed = (url) => new Promise((done, fail) => {
        const source = new EventSource(url);
        source.onmessage = ({ data }) => (source.close(), done(JSON.parse(data).n));
        source.onerror = () => (source.close(), fail(new Error('refused')));
    });
    const watch = async () => {
        const { connect } = await import(base + '/client/aurora-bus.js');
        for await (const { data } of connect({ since: 'earliest', token: key })) return data.n;
    };
    const ticket = () => json('/api/v1/ws/ticket', { method: 'POST', headers }).then(({ ticket }) => ticket);
    const body = JSON.stringify({ n: 2 });
    return {
        read: await attempt(read('/api/v1/streams/aurora:alerts/events').then(({ events }) => events.length)),
        publish: await attempt(json('/api/v1/alerts', { method: 'POST', headers, body }).then(({ results }) => results.length)),
        problem: await attempt(json('/api/v1/streams').then(({ code }) => code)),
        feed: await attempt(ticket().then((ticket) => feed(`${base}/api/v1/feeds/alerts?since=earliest&ticket=${ticket}`))),
        watch: await attempt(watch()),
    };
})()";

#[tokio::test(flavor = "multi_thread")]
async fn page_of_another_origin_may_do_all_or_nothing() {
    let (server, browser) = (PageServer::start().await, Chromium::start().await);
    // The same server by its other name, which makes it another origin and another host.
    let elsewhere = server.origin.replace("127.0.0.1", "localhost");
    for is_let_in in [true, false] {
        let mut keys = Keys::default();
        let key = keys.add("page", &["admin"], None);
        let origins = if is_let_in { format!("[http]\norigins = [{elsewhere:?}]\n") } else { String::new() };
        keys.toml = format!("{origins}{}", keys.toml);
        let home = keys.home();
        let daemon = home.start().await;
        let published = client().post(daemon.url(&format!("/api/v1/streams/{ALERTS}/events")));
        let published = published.header("x-api-key", &key).body(r#"{"n":1}"#).send().await.expect("an answer");
        assert_eq!(published.status(), StatusCode::CREATED);
        let mut tab = browser.open(&format!("{elsewhere}/blank")).await;
        tab.until("location.pathname === '/blank' && document.readyState === 'complete'").await;
        let done = tab.get(&DEEDS.replace("DATA", &json!([daemon.url(""), key]).to_string())).await;
        let expected = if is_let_in {
            json!({"read": 1, "publish": 1, "problem": "unauthenticated", "feed": 1, "watch": 1})
        } else {
            json!({"read": "refused", "publish": "refused", "problem": "refused", "feed": "refused", "watch": "refused"})
        };
        assert_eq!(done, expected);
        daemon.stop().await;
    }
}
