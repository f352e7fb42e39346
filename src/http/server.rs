//! The accept loop: connections with limits, and a graceful end.

pub(super) mod maybe_tls;
pub(super) mod tls;
pub(super) mod write_timeout;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONNECTION, CONTENT_LENGTH};
use axum::http::{HeaderValue, Response, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::IntGauge;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::{Api, Peer};
use crate::http::server::maybe_tls::Socket;
use crate::http::server::tls::Tls;
use crate::http::server::write_timeout::Timed;
use crate::limiter::{KeyedLimiter, KeyedPermit};

/// How long accepting pauses when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The whole answer to a connection over the limit.
const TOO_MANY_CONNECTIONS: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// How often addresses are forgotten that have not asked for a while.
const FORGET_EVERY: Duration = Duration::from_secs(10);

/// The largest head of a request.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Serves until `stop`, over TLS where it is given, then lets requests under way finish. Upgraded connections are the
/// sessions' business.
pub async fn serve(listener: TcpListener, tls: Option<Tls>, api: Api, stop: CancellationToken) {
    let router = api.router();
    let config = &api.inner.config;
    let slots = Arc::new(Semaphore::new(config.max_connections));
    let idle_places = KeyedLimiter::new(config.max_idle_per_address.min(config.max_connections.div_ceil(2)));
    let connections = TaskTracker::new();
    let mut forget_at = Instant::now() + FORGET_EVERY;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        if Instant::now() >= forget_at {
            forget_at = Instant::now() + FORGET_EVERY;
            api.inner.rate.retain_recent();
            api.inner.rate.shrink_to_fit();
        }
        let (mut stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_about_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(error = %error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let places = (Arc::clone(&slots).try_acquire_owned(), Idle::begin(&idle_places, peer.ip()));
        let (Ok(slot), Some(idle)) = places else {
            let reason = if places.0.is_ok() { "idle_connection_limit" } else { "connection_limit" };
            api.inner.metrics.rejected.with_label_values(&[reason]).inc();
            // Without a handshake, which would cost more than it tells, nothing can be said over TLS.
            if tls.is_some() {
                continue;
            }
            connections.spawn(async move {
                // The peer may be gone already, which is as well.
                drop(tokio::time::timeout(Duration::from_secs(1), stream.write_all(TOO_MANY_CONNECTIONS)).await);
            });
            continue;
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %error, "cannot set TCP_NODELAY");
        }
        let (router, stop) = (router.clone(), stop.clone());
        let open = Open::new(slot, api.inner.metrics.http_connections.clone());
        let (header_timeout, write_timeout) = (config.header_timeout, config.write_timeout);
        let Some(tls) = tls.clone() else {
            let socket = Socket::Plain(Timed::new(stream, open, write_timeout));
            connections.spawn(connection(socket, peer, idle, router, header_timeout, stop));
            continue;
        };
        let api = api.clone();
        connections.spawn(async move {
            // Boxed: it takes more room than all that comes afterwards, and for a moment only.
            let accepted = Box::pin(tls.accept(stream, open, peer.ip(), write_timeout, &api.inner.metrics));
            let socket = tokio::select! {
                socket = accepted => socket,
                () = stop.cancelled() => None,
            };
            if let Some(socket) = socket {
                connection(socket, peer, idle, router, header_timeout, stop).await;
            }
        });
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// A connection's place among all, taken as long as its socket is there: a WebSocket outlives its request.
#[derive(Debug)]
pub(crate) struct Open {
    _place: Box<Place>,
}

#[derive(Debug)]
struct Place {
    _slot: OwnedSemaphorePermit,
    open: IntGauge,
}

impl Open {
    fn new(slot: OwnedSemaphorePermit, open: IntGauge) -> Self {
        open.inc();
        Self { _place: Box::new(Place { _slot: slot, open }) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// A connection's place among those of its address on which there is no request. One address can't take all
/// connections by saying nothing, nor by saying little now and then; those on which it asks for something have limits by
/// what it asks for.
#[derive(Debug)]
struct Idle {
    places: Arc<KeyedLimiter>,
    address: IpAddr,
    /// Nothing while a request is answered.
    place: Mutex<Option<KeyedPermit>>,
}

impl Idle {
    fn begin(places: &Arc<KeyedLimiter>, address: IpAddr) -> Option<Arc<Self>> {
        let place = places.try_acquire(address)?;
        Some(Arc::new(Self { places: Arc::clone(places), address, place: Mutex::new(Some(place)) }))
    }

    /// A request has come.
    fn end(&self) {
        self.set(None);
    }

    /// Whether there is a place to wait for the next request.
    fn begin_again(&self) -> bool {
        let place = self.places.try_acquire(self.address);
        let is_there = place.is_some();
        self.set(place);
        is_there
    }

    fn set(&self, place: Option<KeyedPermit>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }
}

/// Whether the connection waits for a request once the answer is taken. Those that are handed over never do; feeds, whose
/// length nobody knows, last, and those who watch are counted.
fn is_soon_idle(response: &Response<Body>) -> bool {
    let has_length = response.headers().contains_key(CONTENT_LENGTH) || response.body().size_hint().exact().is_some();
    has_length && response.status() != StatusCode::SWITCHING_PROTOCOLS
}

async fn connection(
    socket: Socket,
    peer: SocketAddr,
    idle: Arc<Idle>,
    router: Router,
    header_timeout: Duration,
    stop: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, idle) = (router.clone(), idle.clone());
        async move {
            idle.end();
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(Peer(peer));
            let Ok(mut response) = router.oneshot(request).await;
            if is_soon_idle(&response) && !idle.begin_again() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .half_close(false)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    tokio::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(error = %error, "connection ended early");
    }
}

/// Whether the failure is of the connection that came, so that the next one may be accepted at once.
fn is_about_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}
