//! Handlers for liveness, readiness, metrics, and the list of routes.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::Serialize;

use crate::http::api::Api;

#[derive(Debug, Serialize)]
struct HealthView {
    status: &'static str,
    version: &'static str,
}

#[derive(Debug, Serialize)]
struct ReadyView {
    ready: bool,
    /// `ok`, `degraded` if a part has a note, or `unavailable`.
    status: &'static str,
    parts: Vec<PartView>,
}

#[derive(Debug, Serialize)]
struct PartView {
    name: String,
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// A problem that an operator should fix although the part works.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// `GET /health`: checks only that the process responds, so that a lost store never restarts the daemon.
pub(crate) async fn health() -> impl IntoResponse {
    Json(HealthView { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// `GET /ready`: every part with its reason. Returns 503 until all parts work.
pub(crate) async fn ready(State(api): State<Api>) -> impl IntoResponse {
    let report = api.services().readiness.report();
    let mut parts: Vec<PartView> = report
        .into_iter()
        .map(|part| PartView { name: part.name, ready: part.reason.is_none(), reason: part.reason, note: part.note })
        .collect();
    if api.is_draining() {
        let reason = Some("shutting down".to_owned());
        parts.insert(0, PartView { name: "daemon".to_owned(), ready: false, reason, note: None });
    }
    let ready = parts.iter().all(|part| part.ready);
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let is_degraded = parts.iter().any(|part| part.note.is_some());
    let word = match (ready, is_degraded) {
        (false, _) => "unavailable",
        (true, true) => "degraded",
        (true, false) => "ok",
    };
    (status, Json(ReadyView { ready, status: word, parts }))
}

/// `GET /metrics`: the metrics in the Prometheus text format.
pub(crate) async fn metrics(State(api): State<Api>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], api.metrics().render())
}

/// `GET /`: a list of routes for people with curl.
pub(crate) async fn index() -> impl IntoResponse {
    concat!(
        "aurora-bus ",
        env!("CARGO_PKG_VERSION"),
        "\n\n",
        "POST /api/v1/streams/{stream}/events  publish: a JSON object, an array, or NDJSON\n",
        "GET  /api/v1/streams/{stream}/events  read: from, to, limit, order, wait_ms\n",
        "GET  /api/v1/streams[/{stream}]       length, groups, lag, pending\n",
        "GET  /api/v1/dead-letters[/{stream}]  entries that failed: list, replay, discard\n",
        "POST /api/v1/alerts                   publish an alert to its stream\n",
        "GET  /api/v1/ws/alerts                WebSocket: one alert per message\n",
        "GET  /api/v1/ws/agent-thoughts        WebSocket: the audit stream\n",
        "GET  /client/                         alerts in a browser, and the module for your pages\n",
        "GET  /health /ready /metrics          for probes and Prometheus\n",
    )
}
