//! The HTTP surface: router, limits, and what callers see when something is wrong.
//!
//! Owns the listener, routes, request parsing and problem documents. Promises that every answer is within limits and
//! that bad input goes no further than here. The only module that knows HTTP statuses and axum.

mod access;
mod extract;
mod handlers;
mod middleware;
mod problem;
mod routes;
mod server;

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::header::{HOST, HeaderName};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use bytesize::ByteSize;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;

pub use crate::http::handlers::dead_letters::CLI_AGENT;
pub use crate::http::server::tls::{ClientCertificates, Tls, TlsConfig, TlsVersion, Unusable, Validity};
pub use access::Access;
pub use problem::ApiError;
pub use routes::{Need, Route, routes};
pub use server::serve;

use crate::auth::Principal;
use crate::bus::Bus;
use crate::dead_letters::DeadLetters;
use crate::limiter::{KeyedLimiter, LimitKey, counted_address};
use crate::metrics::Metrics;
use crate::pull::PullConsumers;
use crate::readiness::Readiness;
use crate::relay::Relay;
use crate::store::Store;
use crate::validate::{Problems, Validate};

/// Ranges read from the store at a time: each may hold megabytes.
const READS_AT_A_TIME: usize = 32;
/// The most of anything that is counted.
const MAX_COUNT: usize = 1_000_000;
/// Requests that wait for new entries at a time, and those of one principal or address among them.
const WAITS_AT_A_TIME: usize = 64;
const WAITS_OF_EACH: usize = WAITS_AT_A_TIME / 2;
/// What tells whether the daemon works, to proxies and containers of this machine too, whatever name they ask for.
const PROBES: [&str; 2] = ["/health", "/ready"];

/// The listener and its limits.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// The largest request body.
    pub max_body: ByteSize,
    /// The most events in one request.
    pub max_batch: usize,
    /// The most connections at a time, dashboards included. More are refused with 503.
    pub max_connections: usize,
    /// The most connections at a time from one address on which there is no request: those that are new, in a TLS
    /// handshake, or kept open for the next request. At most half of `max_connections`. More are refused with 503, or
    /// closed with the answer.
    pub max_idle_per_address: usize,
    /// The most publish requests being answered at a time. More are refused with 429.
    pub max_in_flight: usize,
    /// The most bodies of requests on their way at a time from one address. More are refused with 429.
    pub max_bodies_per_address: usize,
    /// The most requests per second from one address. More are refused with 429.
    pub rate_limit: u32,
    /// Origins of pages that may publish, read and open a WebSocket, besides those on the daemon's own host, such as
    /// `https://soc.example`; `*` lets in every page.
    pub origins: Vec<String>,
    /// Whether the client module for pages and the page of examples are there, below `/client/`.
    pub pages: bool,
    /// How long a client may take for the head of a request.
    #[serde(with = "humantime_serde")]
    pub header_timeout: Duration,
    /// How long a client may take for the body of a request.
    #[serde(with = "humantime_serde")]
    pub body_timeout: Duration,
    /// How long a client may take none of an answer that is there for it.
    #[serde(with = "humantime_serde")]
    pub write_timeout: Duration,
    /// TLS, instead of plain HTTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_body: ByteSize::mib(8),
            max_batch: 5_000,
            max_connections: 25_000,
            max_idle_per_address: 8_192,
            max_in_flight: 1_024,
            max_bodies_per_address: 256,
            rate_limit: 20_000,
            origins: Vec::new(),
            pages: true,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            tls: None,
        }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        let counts = [
            ("max_batch", self.max_batch),
            ("max_connections", self.max_connections),
            ("max_idle_per_address", self.max_idle_per_address),
            ("max_in_flight", self.max_in_flight),
            ("max_bodies_per_address", self.max_bodies_per_address),
            ("rate_limit", self.rate_limit as usize),
        ];
        for (key, _) in counts.into_iter().filter(|(_, count)| !(1..=MAX_COUNT).contains(count)) {
            problems.add(key, format_args!("must be from 1 to {MAX_COUNT}"));
        }
        for origin in self.origins.iter().filter(|origin| !middleware::origin::is_well_formed(origin)) {
            let message = format_args!("`{origin}` is not an origin; allowed are origins such as https://soc.example");
            problems.add("origins", message);
        }
        problems.require(self.max_body.as_u64() > 0, "max_body", "must be at least 1 byte");
        let times = [
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("write_timeout", self.write_timeout),
        ];
        for (key, time) in times {
            problems.require(!time.is_zero(), key, "must be longer than 0s");
        }
        if let Some(tls) = &self.tls {
            problems.check("tls", tls);
        }
    }
}

/// What the handlers work with.
#[derive(Debug, Clone)]
pub struct Api {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    access: Access,
    bus: Bus,
    dead_letters: DeadLetters,
    pull: PullConsumers,
    /// Requests that wait for entries to pull.
    pulls: Arc<KeyedLimiter>,
    store: Arc<dyn Store>,
    relay: Relay,
    metrics: Metrics,
    readiness: Readiness,
    /// Whether only this machine's own names are answered to.
    is_loopback: bool,
    publishes: Semaphore,
    /// Bodies on their way: one address that sends slowly must not take all of `publishes`, nor all memory.
    bodies: Arc<KeyedLimiter>,
    /// Large answers on their way: one address that reads slowly must not take all memory.
    answers: Arc<KeyedLimiter>,
    reads: Semaphore,
    waits: Semaphore,
    waits_of_each: Arc<KeyedLimiter>,
    rate: DefaultKeyedRateLimiter<IpAddr>,
    sessions: TaskTracker,
}

impl Api {
    /// Puts the parts together.
    #[expect(clippy::too_many_arguments, reason = "the parts of the daemon, put together in one place")]
    pub fn new(
        config: Config,
        access: Access,
        bus: Bus,
        dead_letters: DeadLetters,
        pull: PullConsumers,
        store: Arc<dyn Store>,
        relay: Relay,
        metrics: Metrics,
        readiness: Readiness,
    ) -> Self {
        let rate = NonZeroU32::new(config.rate_limit).unwrap_or(NonZeroU32::MIN);
        let inner = Inner {
            is_loopback: config.listen.ip().is_loopback(),
            publishes: Semaphore::new(config.max_in_flight),
            bodies: KeyedLimiter::new(config.max_bodies_per_address),
            answers: KeyedLimiter::new(middleware::large_response::MIB_PER_ADDRESS),
            reads: Semaphore::new(READS_AT_A_TIME),
            waits: Semaphore::new(WAITS_AT_A_TIME),
            waits_of_each: KeyedLimiter::new(WAITS_OF_EACH),
            rate: RateLimiter::keyed(Quota::per_second(rate)),
            sessions: TaskTracker::new(),
            config,
            access,
            bus,
            dead_letters,
            pulls: KeyedLimiter::new(pull.config().max_waiting),
            pull,
            store,
            relay,
            metrics,
            readiness,
        };
        Self { inner: Arc::new(inner) }
    }

    /// From now on `/ready` answers 503, no new dashboard is let in, and those that are here are told to come again.
    pub fn drain(&self) {
        self.inner.relay.drain();
    }

    /// Ends when every dashboard's session has ended. No new one may begin afterwards.
    pub async fn sessions_ended(&self) {
        self.inner.sessions.close();
        self.inner.sessions.wait().await;
    }

    fn is_draining(&self) -> bool {
        self.inner.relay.is_draining()
    }

    /// Every route.
    pub fn router(&self) -> Router {
        let (guarded, open) = routes::routers(self);
        open.merge(guarded.route_layer(from_fn_with_state(self.clone(), guard)))
            .fallback(|| async { ApiError::no_such_route() })
            .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
            .layer(CatchPanicLayer::custom(problem::after_panic))
            .layer(from_fn_with_state(self.clone(), know))
            .layer(from_fn_with_state(self.clone(), middleware::cors::share))
            .layer(from_fn_with_state(self.clone(), observe))
            .with_state(self.clone())
    }
}

/// The address a request came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// Returns the key that a request counts under: the principal, or the address if no credentials are asked for. Behind a
/// proxy all clients share one address.
pub(crate) fn limit_key(principal: &Principal, peer: Peer) -> LimitKey {
    principal.shared_id().map_or_else(|| peer.0.ip().into(), LimitKey::Principal)
}

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().copied().ok_or_else(ApiError::internal)
    }
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Gives every request an id, and counts and times it by its route.
async fn observe(State(api): State<Api>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let is_usable = |id: &&HeaderValue| id.len() <= 64 && id.to_str().is_ok();
    let id = request.headers().get(REQUEST_ID).filter(is_usable).cloned();
    let mut response = next.run(request).await;
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    let status = response.status();
    let metrics = &api.inner.metrics;
    metrics.http_requests.with_label_values(&[route, status.as_str()]).inc();
    metrics.http_seconds.with_label_values(&[route]).observe(started.elapsed().as_secs_f64());
    let id = id.unwrap_or_else(|| {
        let text = uuid::Uuid::now_v7().hyphenated().to_string();
        HeaderValue::from_str(&text).expect("a UUID is a header value")
    });
    // What the store or the drain is to blame for is told once where it happens, not with every request.
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!(route, request_id = id.to_str().unwrap_or_default(), "request failed");
    } else {
        tracing::debug!(
            route,
            status = status.as_u16(),
            request_id = id.to_str().unwrap_or_default(),
            "request answered"
        );
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Refuses names that are not this machine's where only this machine can connect.
async fn know(State(api): State<Api>, request: Request, next: Next) -> Response {
    let is_open = !api.inner.is_loopback || PROBES.contains(&request.uri().path());
    if is_open || middleware::origin::is_host_allowed(request.headers(), &api.inner.config.origins) {
        return next.run(request).await;
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let error = ApiError::forbidden_host(host);
    api.inner.metrics.rejected.with_label_values(&[error.code()]).inc();
    error.into_response()
}

/// Refuses an address that asks too often, and pages of other hosts that do more than read.
async fn guard(State(api): State<Api>, peer: Peer, request: Request, next: Next) -> Response {
    let is_read = request.method().is_safe();
    if !is_read && !middleware::origin::is_allowed(request.headers(), &api.inner.config.origins) {
        let route = request.extensions().get::<MatchedPath>().map_or("this", MatchedPath::as_str);
        let what = format!("pages of this origin may not use {} {route} (http.origins)", request.method());
        let error = ApiError::forbidden_origin(what);
        api.inner.metrics.rejected.with_label_values(&[error.code()]).inc();
        return error.into_response();
    }
    match api.inner.rate.check_key(&counted_address(peer.0.ip())) {
        Ok(()) => next.run(request).await,
        Err(not_until) => {
            let wait = not_until.wait_time_from(DefaultClock::default().now());
            api.inner.metrics.rejected.with_label_values(&["rate_limited"]).inc();
            ApiError::rate_limited(wait).into_response()
        }
    }
}
