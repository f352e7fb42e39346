//! A middleware that gives every request an id, and counts and times it by its route.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::HeaderName;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use crate::http::api::Api;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The maximum length of an id that a client gives.
const MAX_REQUEST_ID_BYTES: usize = 64;

/// Traces a request, and returns its id in `x-request-id`.
pub(crate) async fn trace_request(State(api): State<Api>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let is_usable = |id: &&HeaderValue| id.len() <= MAX_REQUEST_ID_BYTES && id.to_str().is_ok();
    let id = request.headers().get(REQUEST_ID).filter(is_usable).cloned();
    let mut response = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    let status = response.status();
    let metrics = api.metrics();
    metrics.http_requests.with_label_values(&[route, status.as_str()]).inc();
    metrics.http_seconds.with_label_values(&[route]).observe(started.elapsed().as_secs_f64());
    let id = id.unwrap_or_else(|| {
        let text = uuid::Uuid::now_v7().hyphenated().to_string();
        HeaderValue::from_str(&text).expect("a UUID is a header value")
    });
    // Faults of the store and the drain are logged where they occur, not once per request.
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!(route, request_id = id.to_str().unwrap_or_default(), "request failed");
    } else {
        tracing::debug!(
            route,
            status = status.as_u16(),
            request_id = id.to_str().unwrap_or_default(),
            "request completed"
        );
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}
