//! Pages in a real browser: with a bare WebSocket, with the client module, and of other origins.

mod chromium;
mod client;
mod codes;
mod cors;
mod examples;
mod terms;

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::response::Html;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::support::app::{BOUND, Home};
use crate::support::until;
use chromium::Chromium;

/// A page that reports every text message to its server, in order.
const PAGE: &str = r#"<!doctype html>
<meta charset="utf-8">
<title>dashboard</title>
<script>
  const socket = new WebSocket(decodeURIComponent(location.hash.slice(1)));
  let waiting = ["open"], sending = false;
  async function report() {
    if (sending) return;
    sending = true;
    while (waiting.length) {
      const body = JSON.stringify(waiting);
      waiting = [];
      await fetch("/report", { method: "POST", body });
    }
    sending = false;
  }
  socket.onopen = report;
  socket.onmessage = (message) => { waiting.push("message " + message.data); report(); };
  socket.onclose = (end) => { waiting.push("close " + end.code); report(); };
</script>
"#;

/// The reports of pages so far.
type Reports = Arc<Mutex<Vec<String>>>;

/// A web server with the page, on a free port. Stops when dropped.
struct PageServer {
    origin: String,
    reports: Reports,
    _running: JoinSet<()>,
}

impl PageServer {
    async fn start() -> Self {
        let reports = Reports::default();
        let router = Router::new()
            .route("/", get(async || Html(PAGE)))
            .route("/client", get(async || Html(client::PAGE)))
            .route("/blank", get(async || Html("<!doctype html><title>blank</title>")))
            .route("/report", post(report))
            .with_state(Arc::clone(&reports));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let origin = format!("http://{}", listener.local_addr().expect("a bound listener"));
        let mut running = JoinSet::new();
        running.spawn(async { axum::serve(listener, router).await.expect("it serves until it is dropped") });
        Self { origin, reports, _running: running }
    }

    fn reports(&self) -> Vec<String> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn has_reported(&self, count: usize) -> Vec<String> {
        let what = format!("page with {count} reports");
        until(&what, BOUND, async || Some(self.reports()).filter(|reports| reports.len() >= count)).await
    }
}

async fn report(State(reports): State<Reports>, body: String) {
    let new: Vec<String> = serde_json::from_str(&body).expect("the page reports a list of texts");
    reports.lock().unwrap_or_else(PoisonError::into_inner).extend(new);
}

#[tokio::test(flavor = "multi_thread")]
async fn page_receives_every_alert_unchanged_in_order() {
    let home = Home::new("");
    let daemon = home.start().await;
    let server = PageServer::start().await;
    let before: Vec<String> = (0..500).map(payload).collect();
    let after: Vec<String> = (500..1000).map(payload).collect();
    for batch in before.chunks(50) {
        daemon.publish("aurora:alerts", batch).await.expect("accepted");
    }

    let browser = Chromium::start().await;
    let socket = daemon.url("/api/v1/ws/alerts?since=earliest").replacen("http", "ws", 1);
    let _tab = browser.open(&format!("{}/#{socket}", server.origin)).await;
    server.has_reported(1).await;
    for batch in after.chunks(50) {
        daemon.publish("aurora:alerts", batch).await.expect("accepted");
    }

    let reports = server.has_reported(1001).await;
    assert_eq!(reports.first().map(String::as_str), Some("open"));
    let received: Vec<&str> = reports.iter().filter_map(|report| report.strip_prefix("message ")).collect();
    assert_eq!(received.len(), 1000, "{:?}", reports.last());
    for (received, sent) in received.iter().zip(before.iter().chain(&after)) {
        assert_eq!(received, sent);
    }

    // The close code of a stopping daemon lets the page reconnect.
    daemon.stop().await;
    let reports = server.has_reported(1002).await;
    assert_eq!(reports.last().map(String::as_str), Some("close 4000"));
}

/// Returns payloads that a careless relay would change: order of keys, spaces, numbers, escapes, scripts, line ends.
fn payload(number: u64) -> String {
    let title = ["plain", "Überfall auf Gerät", "警報 \u{1F6A8}", r"\u00e9scaped \/ \\ \t", "a\u{2028}b"]
        .get(usize::try_from(number % 5).expect("small"))
        .copied()
        .unwrap_or_default();
    format!(r#"{{ "severity":"high",  "title":"{title}","n":{number},"score":1.50,"big":12345678901234567890 }}"#)
}
