//! Middlewares that reject foreign host names on loopback, foreign pages, and clients over the rate limit.

use axum::extract::{MatchedPath, Request, State};
use axum::http::header::HOST;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use governor::clock::{Clock as _, DefaultClock};

use crate::http::api::Api;
use crate::http::extract::Peer;
use crate::http::middleware::origin::{is_allowed, is_host_allowed};
use crate::http::problem::ApiError;
use crate::limiter::counted_address;

/// The probes. Proxies and containers of this machine request them under any host name.
const PROBES: [&str; 2] = ["/health", "/ready"];

/// Rejects host names other than this machine's if the daemon listens on loopback.
pub(crate) async fn check_host(State(api): State<Api>, request: Request, next: Next) -> Response {
    let is_open = !api.config().listen.ip().is_loopback() || PROBES.contains(&request.uri().path());
    if is_open || is_host_allowed(request.headers(), &api.config().origins) {
        return next.run(request).await;
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let error = ApiError::forbidden_host(host);
    api.count_rejected(error.code());
    error.into_response()
}

/// Rejects addresses over the rate limit, and requests other than reads from foreign pages.
pub(crate) async fn check_origin_and_rate(
    State(api): State<Api>,
    peer: Peer,
    request: Request,
    next: Next,
) -> Response {
    let is_read = request.method().is_safe();
    if !is_read && !is_allowed(request.headers(), &api.config().origins) {
        let route = request.extensions().get::<MatchedPath>().map_or("this route", MatchedPath::as_str);
        let detail = format!("pages of this origin may not use {} {route} (http.origins)", request.method());
        let error = ApiError::forbidden_origin(detail);
        api.count_rejected(error.code());
        return error.into_response();
    }
    match api.limits().rate.check_key(&counted_address(peer.0.ip())) {
        Ok(()) => next.run(request).await,
        Err(not_until) => {
            let error = ApiError::rate_limited(not_until.wait_time_from(DefaultClock::default().now()));
            api.count_rejected(error.code());
            error.into_response()
        }
    }
}
