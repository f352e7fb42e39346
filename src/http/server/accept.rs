//! The accept loop: connections within limits, and a graceful end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
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
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::http::api::Api;
use crate::http::extract::Peer;
use crate::http::routes;
use crate::http::server::maybe_tls::MaybeTlsStream;
use crate::http::server::open_connection::{IdleConnection, OpenConnection};
use crate::http::server::tls::Tls;
use crate::http::server::write_timeout::WriteTimeoutStream;
use crate::limiter::KeyedLimiter;

/// The pause of the accept loop when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The response to a connection over a limit.
const TOO_MANY_CONNECTIONS: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// The time limit for sending that response.
const REJECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The interval at which the rate limiter forgets addresses without recent requests.
const FORGET_INTERVAL: Duration = Duration::from_secs(10);

/// The maximum size of a request head.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Serves until `stop`, over TLS if `tls` is given, then lets the requests in progress finish.
///
/// Upgraded connections belong to their sessions.
pub async fn serve(listener: TcpListener, tls: Option<Tls>, api: Api, stop: CancellationToken) {
    let router = routes::router(&api);
    let config = api.config();
    let permits = Arc::new(Semaphore::new(config.max_connections));
    let max_idle = config.max_idle_per_address.min(config.max_connections.div_ceil(2));
    let idle_connections = KeyedLimiter::new(max_idle);
    let connections = TaskTracker::new();
    let mut forget_at = Instant::now() + FORGET_INTERVAL;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        if Instant::now() >= forget_at {
            forget_at = Instant::now() + FORGET_INTERVAL;
            api.limits().rate.retain_recent();
            api.limits().rate.shrink_to_fit();
        }
        let (mut stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if concerns_one_connection(&error) => continue,
            Err(error) => {
                tracing::warn!(error = %error, "listener cannot accept connections, retrying");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permit = Arc::clone(&permits).try_acquire_owned();
        let idle = IdleConnection::new(&idle_connections, peer.ip());
        let (permit, idle) = match (permit, idle) {
            (Ok(permit), Some(idle)) => (permit, idle),
            (permit, _) => {
                let reason = if permit.is_ok() { "idle_connection_limit" } else { "connection_limit" };
                api.count_rejected(reason);
                // Over TLS a response would need a handshake, which costs more than the connection is worth.
                if tls.is_none() {
                    connections.spawn(async move {
                        // The client may be gone already.
                        drop(tokio::time::timeout(REJECT_TIMEOUT, stream.write_all(TOO_MANY_CONNECTIONS)).await);
                    });
                }
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %error, "cannot set TCP_NODELAY");
        }
        let (router, stop) = (router.clone(), stop.clone());
        let open = OpenConnection::new(permit, api.metrics().http_connections.clone());
        let (header_timeout, write_timeout) = (config.header_timeout, config.write_timeout);
        let Some(tls) = tls.clone() else {
            let socket = MaybeTlsStream::Plain(WriteTimeoutStream::new(stream, open, write_timeout));
            connections.spawn(serve_connection(socket, peer, idle, router, header_timeout, stop));
            continue;
        };
        let api = api.clone();
        connections.spawn(async move {
            // Boxed, because the handshake needs more memory than all that follows, and only for a moment.
            let accepted = Box::pin(tls.accept(stream, open, peer.ip(), write_timeout, api.metrics()));
            let socket = tokio::select! {
                socket = accepted => socket,
                () = stop.cancelled() => None,
            };
            if let Some(socket) = socket {
                serve_connection(socket, peer, idle, router, header_timeout, stop).await;
            }
        });
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// Returns whether the connection will wait for another request after this response.
///
/// Upgraded connections never do. Feeds have no length, stay open, and have limits of their own.
fn will_be_idle(response: &Response<Body>) -> bool {
    let has_length = response.headers().contains_key(CONTENT_LENGTH) || response.body().size_hint().exact().is_some();
    has_length && response.status() != StatusCode::SWITCHING_PROTOCOLS
}

async fn serve_connection(
    socket: MaybeTlsStream,
    peer: SocketAddr,
    idle: Arc<IdleConnection>,
    router: Router,
    header_timeout: Duration,
    stop: CancellationToken,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (router, idle) = (router.clone(), idle.clone());
        async move {
            idle.set_busy();
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(Peer(peer));
            let Ok(mut response) = router.oneshot(request).await;
            if will_be_idle(&response) && !idle.try_set_idle() {
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

/// Returns whether the error concerns only the accepted connection, so that the loop may go on at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}
