//! Liveness, readiness, metrics, and what there is.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::Serialize;

use crate::http::Api;

#[derive(Debug, Serialize)]
struct Health {
    status: &'static str,
    version: &'static str,
}

#[derive(Debug, Serialize)]
struct Report {
    ready: bool,
    /// `ok`, `degraded` where a part has a note, or `unavailable`.
    status: &'static str,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize)]
struct Part {
    name: String,
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What an operator should see to although the part can work.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// `GET /health`: the process answers. Nothing else is asked, so that a lost store never restarts the daemon.
pub(crate) async fn health() -> impl IntoResponse {
    Json(Health { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// `GET /ready`: every part with its reason; 503 until all can do their work.
pub(crate) async fn ready(State(api): State<Api>) -> impl IntoResponse {
    let report = api.inner.readiness.report();
    let mut parts: Vec<Part> = report
        .into_iter()
        .map(|part| Part { name: part.name, ready: part.reason.is_none(), reason: part.reason, note: part.note })
        .collect();
    if api.is_draining() {
        let reason = Some("shutting down".to_owned());
        parts.insert(0, Part { name: "daemon".to_owned(), ready: false, reason, note: None });
    }
    let ready = parts.iter().all(|part| part.ready);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let is_degraded = parts.iter().any(|part| part.note.is_some());
    let word = match (ready, is_degraded) {
        (false, _) => "unavailable",
        (true, true) => "degraded",
        (true, false) => "ok",
    };
    (status, Json(Report { ready, status: word, parts }))
}

/// `GET /metrics`: Prometheus' text format.
pub(crate) async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], api.inner.metrics.render())
}

/// `GET /`: what there is, for whoever looks with curl.
pub(crate) async fn index() -> impl IntoResponse {
    concat!(
        "aurora-bus ",
        env!("CARGO_PKG_VERSION"),
        "\n\n",
        "POST /api/v1/streams/{stream}/events  publish: a JSON object, an array, or NDJSON\n",
        "GET  /api/v1/streams/{stream}/events  read: from, to, limit, order, wait_ms\n",
        "GET  /api/v1/streams[/{stream}]       length, groups, lag, pending\n",
        "GET  /api/v1/dead-letters[/{stream}]  what could not be handled; replay, discard\n",
        "POST /api/v1/alerts                   publish an alert to its stream\n",
        "GET  /api/v1/ws/alerts                WebSocket: one alert per message\n",
        "GET  /api/v1/ws/agent-thoughts        WebSocket: the audit stream\n",
        "GET  /client/                         alerts in a browser, and the module for pages of yours\n",
        "GET  /health /ready /metrics          for machines\n",
    )
}
