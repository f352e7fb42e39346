//! A middleware for cross-origin requests (CORS): preflight responses, and headers that let pages read responses.
//!
//! Only origins that [`origin`](super::origin) allows get these headers. Only pages on the daemon's own host, or of an
//! origin that is configured by name, may send cookies.

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD,
    ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::http::api::Api;
use crate::http::middleware::origin::is_allowed;
use crate::http::problem::ApiError;

/// The request headers that pages may send in addition to the safelisted ones.
const ALLOWED_HEADERS: &str =
    "authorization, content-type, idempotency-key, last-event-id, traceparent, x-api-key, x-request-id";
const ALLOWED_METHODS: &str = "GET, POST, DELETE";
/// The response headers that pages may read in addition to the safelisted ones.
const EXPOSED_HEADERS: &str = "etag, retry-after, x-request-id";
/// The time for which a browser may cache a preflight response.
const MAX_AGE_SECONDS: &str = "600";

/// Answers preflight requests, and adds CORS headers to the other responses.
pub(crate) async fn add_cors_headers(State(api): State<Api>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/api/") && !path.starts_with("/client/") {
        return next.run(request).await;
    }
    let origins = &api.config().origins;
    let origin = request.headers().get(ORIGIN).filter(|_| is_allowed(request.headers(), origins)).cloned();
    let has_credentials = origin.is_some() && may_send_cookies(request.headers(), origins);
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(ORIGIN)
        && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        && request.extensions().get::<MatchedPath>().is_some();
    let mut response = match &origin {
        _ if !is_preflight => next.run(request).await,
        Some(_) => preflight(),
        None => ApiError::forbidden_origin("pages of this origin are not allowed (http.origins)").into_response(),
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return response;
    }
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
        if has_credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
    response
}

fn preflight() -> Response {
    let headers = [
        (ACCESS_CONTROL_ALLOW_METHODS, ALLOWED_METHODS),
        (ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS),
        (ACCESS_CONTROL_MAX_AGE, MAX_AGE_SECONDS),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

/// Every sandboxed page has the origin `null`, so that name identifies no page.
fn may_send_cookies(headers: &HeaderMap, origins: &[String]) -> bool {
    let named: Vec<String> = origins.iter().filter(|origin| *origin != "*" && *origin != "null").cloned().collect();
    is_allowed(headers, &named)
}
