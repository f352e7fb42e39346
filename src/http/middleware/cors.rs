//! What pages of other origins are told, so that their browser lets them ask and read (CORS).
//!
//! Whoever [`origin`] lets in is answered by name, others get no word of it. Cookies count for pages on the daemon's own
//! host and those that are named one by one alone, so only these are told that they may send them.

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD,
    ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::http::middleware::origin::is_allowed;
use crate::http::{Api, ApiError};

/// What pages may send beside what every page may.
const HEADERS: &str =
    "authorization, content-type, idempotency-key, last-event-id, traceparent, x-api-key, x-request-id";
const METHODS: &str = "GET, POST, DELETE";
/// What pages may read beside what every page may.
const EXPOSED: &str = "etag, retry-after, x-request-id";
/// For how long a browser need not ask again, in seconds.
const MAX_AGE: &str = "600";

/// Answers browsers that ask what a page may do, and adds to other answers who may read them.
pub(crate) async fn share(State(api): State<Api>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/api/") && !path.starts_with("/client/") {
        return next.run(request).await;
    }
    let origins = &api.inner.config.origins;
    let origin = request.headers().get(ORIGIN).filter(|_| is_allowed(request.headers(), origins)).cloned();
    let has_credentials = origin.is_some() && may_send_cookies(request.headers(), origins);
    let is_question = request.method() == Method::OPTIONS
        && request.headers().contains_key(ORIGIN)
        && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        && request.extensions().get::<MatchedPath>().is_some();
    let mut response = match &origin {
        _ if !is_question => next.run(request).await,
        Some(_) => preflight(),
        None => ApiError::forbidden_origin("pages of this origin are not let in (http.origins)").into_response(),
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return response;
    }
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("origin"));
    if let Some(origin) = origin {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        if has_credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }
    response
}

fn preflight() -> Response {
    let headers = [
        (ACCESS_CONTROL_ALLOW_METHODS, METHODS),
        (ACCESS_CONTROL_ALLOW_HEADERS, HEADERS),
        (ACCESS_CONTROL_MAX_AGE, MAX_AGE),
    ];
    (StatusCode::NO_CONTENT, headers).into_response()
}

/// `null` is what every sandboxed page calls itself, so that it names none.
fn may_send_cookies(headers: &HeaderMap, origins: &[String]) -> bool {
    let named: Vec<String> = origins.iter().filter(|origin| *origin != "*" && *origin != "null").cloned().collect();
    is_allowed(headers, &named)
}
