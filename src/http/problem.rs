//! Errors for clients: problem documents (RFC 9457) that name the fault and the fix.

use std::any::Any;
use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::auth::AuthError;
use crate::bus::PublishError;
use crate::pull::{PullError, SettleError};
use crate::relay::ConnectError;
use crate::store::{StoreError, StoreErrorKind};

/// An error response.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    retry_after: Option<Duration>,
    problem: Box<Problem>,
}

/// The body: `type` and `code` for programs, `title` and `detail` for people, `field` if one is at fault.
#[derive(Debug, Clone, Serialize)]
struct Problem {
    r#type: String,
    title: &'static str,
    status: u16,
    code: &'static str,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

/// The error of one event or token in a batch.
#[derive(Debug, Serialize)]
pub(super) struct ItemError {
    code: &'static str,
    detail: String,
    /// Whether the same request may succeed later.
    retry: bool,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let problem = Problem {
            r#type: format!("urn:aurora-bus:problem:{}", code.replace('_', "-")),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            code,
            detail: detail.into(),
            field: None,
        };
        Self { status, retry_after: None, problem: Box::new(problem) }
    }

    pub(super) fn with_field(mut self, field: impl Into<String>) -> Self {
        self.problem.field = Some(field.into());
        self
    }

    fn with_retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// Returns the code, which is also the reason in metrics.
    pub(super) fn code(&self) -> &'static str {
        self.problem.code
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    pub(super) fn detail(&self) -> &str {
        &self.problem.detail
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    pub(super) fn no_such_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "no_such_route", "there is no route for this path; GET / lists the routes")
    }

    pub(super) fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path does not support the request method")
    }

    pub(super) fn no_such_stream<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Self {
        let known = known.collect::<Vec<_>>().join(", ");
        let detail = format!("there is no stream `{name}`; declared streams: {known}");
        Self::new(StatusCode::NOT_FOUND, "no_such_stream", detail).with_field("stream")
    }

    pub(super) fn no_such_group<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Self {
        let known = known.collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none" } else { known.as_str() };
        let detail = format!("group `{name}` of this stream cannot be pulled from; pull groups: {known}");
        Self::new(StatusCode::NOT_FOUND, "no_such_group", detail).with_field("group")
    }

    pub(super) fn no_such_channel(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "no_such_channel", detail).with_field("channel")
    }

    pub(super) fn bad_parameter(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_parameter", detail).with_field(field)
    }

    pub(super) fn bad_handshake(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_handshake", detail)
    }

    pub(super) fn invalid_event(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_event", detail)
    }

    pub(super) fn too_large(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, code, detail)
    }

    pub(super) fn body_incomplete() -> Self {
        let detail = "the request body was incomplete or too slow (http.body_timeout)";
        Self::new(StatusCode::REQUEST_TIMEOUT, "body_incomplete", detail)
    }

    pub(super) fn rate_limited(wait: Duration) -> Self {
        let detail = "too many requests from this address (http.rate_limit)";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail).with_retry_after(wait)
    }

    pub(super) fn too_many_in_flight() -> Self {
        let detail = "too many concurrent publish requests (http.max_in_flight)";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_in_flight", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_bodies() -> Self {
        let detail = "too many request bodies in transfer from this address (http.max_bodies_per_address)";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_bodies", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_large_responses() -> Self {
        let detail = "too many large responses in transfer to this address; read them first, or use a smaller limit";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_answers", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_waiting() -> Self {
        let detail = "too many requests wait for new entries; retry later or without wait_ms";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_waiting", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_own_waits() -> Self {
        let detail = "too many of your requests wait for new entries; retry without wait_ms or when one has ended";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_waiting", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_pulls() -> Self {
        let detail = "too many of your pulls wait for entries (pull.max_waiting); retry when one has ended";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_waiting", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn too_many_requests(limit: usize) -> Self {
        let detail = format!("this connection has {limit} requests in progress; wait until one has ended");
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn forbidden_host(host: &str) -> Self {
        let detail =
            format!("host `{host}` is not allowed while the daemon listens on loopback; add it to http.origins");
        Self::new(StatusCode::MISDIRECTED_REQUEST, "forbidden_host", detail).with_field("Host")
    }

    pub(super) fn connection_limit(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "connection_limit", detail).with_retry_after(Duration::from_secs(5))
    }

    pub(super) fn forbidden_origin(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden_origin", detail).with_field("Origin")
    }

    pub(super) fn unauthenticated(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", detail)
    }

    pub(super) fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    pub(super) fn auth_unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "auth_unavailable", detail).with_retry_after(Duration::from_secs(5))
    }

    pub(super) fn forbidden_tenant(tenant: &str) -> Self {
        let detail =
            format!("the event belongs to another tenant; your credentials are restricted to tenant `{tenant}`");
        Self::new(StatusCode::FORBIDDEN, "forbidden_tenant", detail).with_field("tenant")
    }

    pub(super) fn foreign_tenant(tenant: &str) -> Self {
        let detail = format!("the event belongs to another tenant than the stream, which is for tenant `{tenant}`");
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "foreign_tenant", detail).with_field("tenant")
    }

    pub(super) fn too_many_keys(detail: &str) -> Self {
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "too_many_keys", detail).with_field("stream")
    }

    pub(super) fn too_many_tickets() -> Self {
        let detail = "too many unused tickets; use one or wait until it expires";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_tickets", detail).with_retry_after(Duration::from_secs(30))
    }

    pub(super) fn draining() -> Self {
        let detail = "the daemon is shutting down; connect again in a moment";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", detail).with_retry_after(Duration::from_secs(1))
    }

    pub(super) fn no_such_dead_letter(id: &str) -> Self {
        let detail = format!("there is no dead letter `{id}`; it was replayed, was discarded or has expired");
        Self::new(StatusCode::NOT_FOUND, "no_such_dead_letter", detail).with_field("id")
    }

    pub(super) fn not_replayable(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, detail)
    }

    pub(super) fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "internal error; the log of the daemon has the cause")
    }
}

impl From<&AuthError> for ApiError {
    fn from(error: &AuthError) -> Self {
        match error {
            AuthError::Unavailable => Self::auth_unavailable(error.to_string()),
            AuthError::Scope(_) | AuthError::AllEntries | AuthError::OtherTenant(_) => {
                Self::forbidden(error.to_string())
            }
            _ => Self::unauthenticated(error.to_string()),
        }
    }
}

impl From<&StoreError> for ApiError {
    fn from(error: &StoreError) -> Self {
        let api_error = match error.kind() {
            StoreErrorKind::Unavailable => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", error.to_string())
            }
            StoreErrorKind::Full => Self::new(StatusCode::INSUFFICIENT_STORAGE, "store_full", error.to_string()),
            StoreErrorKind::WrongType => Self::new(StatusCode::CONFLICT, "not_a_stream", error.to_string()),
            StoreErrorKind::NoGroup => Self::new(StatusCode::NOT_FOUND, "no_such_group", error.to_string()),
            StoreErrorKind::Denied => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "store_denied",
                "the store rejects the credentials of the daemon",
            ),
            StoreErrorKind::Unsuitable => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_unsuitable", error.to_string())
            }
            StoreErrorKind::Unsupported => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "durability_unsupported", error.to_string())
                    .with_field("durability")
            }
            StoreErrorKind::NotDurable => Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_durable", error.to_string()),
            StoreErrorKind::LeaseLost | StoreErrorKind::Corrupt | StoreErrorKind::Internal => Self::internal(),
        };
        match error.retry_after() {
            Some(wait) => api_error.with_retry_after(wait),
            None => api_error,
        }
    }
}

impl From<&PullError> for ApiError {
    fn from(error: &PullError) -> Self {
        let detail = error.to_string();
        match error {
            PullError::TooManyLeases(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many_leases", detail)
                .with_retry_after(Duration::from_secs(1)),
            PullError::Lease(_) => Self::bad_parameter("lease_ms", detail),
            PullError::Stopping => Self::draining(),
            PullError::NoGroup => Self::new(StatusCode::SERVICE_UNAVAILABLE, "group_not_ready", detail)
                .with_retry_after(Duration::from_secs(1)),
            PullError::Store(error) => error.as_ref().into(),
        }
    }
}

impl From<&SettleError> for ApiError {
    fn from(error: &SettleError) -> Self {
        match error {
            SettleError::NotLeased => Self::new(StatusCode::CONFLICT, "not_leased", error.to_string()),
            SettleError::Store(error) => error.as_ref().into(),
        }
    }
}

impl From<&ConnectError> for ApiError {
    fn from(error: &ConnectError) -> Self {
        match error {
            ConnectError::UnknownChannel(_) => Self::no_such_channel(error.to_string()),
            ConnectError::BadParameter(parameter) => Self::bad_parameter(parameter.name, error.to_string()),
            ConnectError::ConnectionLimit => Self::connection_limit(error.to_string()),
            ConnectError::Unauthenticated(detail) => Self::unauthenticated(detail),
            ConnectError::Forbidden(detail) => Self::forbidden(detail),
            ConnectError::Unavailable(detail) => Self::auth_unavailable(detail),
            ConnectError::TooManyKeys(detail) => Self::too_many_keys(detail),
            ConnectError::Draining => Self::draining(),
            ConnectError::Origin => Self::forbidden_origin(error.to_string()),
            ConnectError::Version => Self::bad_handshake(error.to_string()),
        }
    }
}

impl From<&PublishError> for ApiError {
    fn from(error: &PublishError) -> Self {
        match error {
            PublishError::TooLarge { .. } => Self::too_large(error.code(), error.to_string()),
            PublishError::Key(_) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.code(), error.to_string())
                .with_field("Idempotency-Key"),
            PublishError::NoId => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.code(), error.to_string()).with_field("id")
            }
            PublishError::TooManyKeys(detail) => Self::too_many_keys(detail),
            PublishError::Store(error) => error.as_ref().into(),
        }
    }
}

impl From<&ApiError> for ItemError {
    fn from(error: &ApiError) -> Self {
        Self { code: error.problem.code, detail: error.problem.detail.clone(), retry: error.retry_after.is_some() }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self.problem).expect("a problem document is JSON");
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"aurora-bus\""));
        }
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_millis().div_ceil(1000).max(1);
            headers.insert(RETRY_AFTER, HeaderValue::from_str(&seconds.to_string()).expect("digits"));
        }
        response
    }
}

/// Returns the response to a request whose handler panicked.
#[expect(clippy::needless_pass_by_value, reason = "the layer that calls it passes the panic by value")]
pub(super) fn after_panic(panic: Box<dyn Any + Send>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(error = message.unwrap_or("unknown"), "request handler panicked");
    ApiError::internal().into_response()
}
