//! The WebSocket handshake. Sessions need the bare socket, which the upgrade of axum hides.

use std::io::Cursor;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{RawQuery, Request, State};
use axum::http::header::{
    CONNECTION, ORIGIN, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::http::admission::admit;
use crate::http::api::Api;
use crate::http::extract::{Peer, Segment};
use crate::http::handlers::ws_commands::WorkerCommandsFactory;
use crate::http::problem::ApiError;
use crate::http::server::maybe_tls::MaybeTlsStream;
use crate::relay::{Admission, CommandHandlerFactory, ConnectError, PROTOCOL, Session, SubscribeParams};

/// `GET /api/v1/ws/{channel}`
///
/// A refused program gets an HTTP status. A page cannot read that, so its connection is accepted and closed with a
/// close code.
pub(crate) async fn connect(
    State(api): State<Api>,
    Segment(channel): Segment,
    RawQuery(query): RawQuery,
    peer: Peer,
    mut request: Request,
) -> Response {
    let accept = match check_handshake(request.method(), request.headers()) {
        Ok(accept) => accept,
        Err(error) => return error.into_response(),
    };
    let is_browser = request.headers().contains_key(ORIGIN);
    let (protocol, confirmed) = requested_protocol(request.headers(), query.as_deref());
    let opened = open_session(&api, &channel, query.as_deref(), protocol, peer, request.headers()).await;
    let session = match opened {
        Ok(session) => Ok(session),
        Err(refused) if is_browser => Err(refused),
        Err(refused) => return ApiError::from(&refused).into_response(),
    };
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return ApiError::bad_handshake("the connection cannot be upgraded").into_response();
    };
    let sessions = api.sessions().clone();
    sessions.clone().spawn(async move {
        let socket = match upgrade.await.map(into_socket) {
            Ok(Some(socket)) => socket,
            Ok(None) => return tracing::error!("upgraded connection has an unexpected type"),
            Err(error) => return tracing::debug!(error = %error, "WebSocket upgrade failed"),
        };
        match (session, socket) {
            // A new task: the future of this one has room for the handshake too, and would keep it.
            (Ok(session), (socket, sent_early)) if sent_early.is_empty() => {
                sessions.spawn(session.run(socket));
            }
            (session, socket) => run_with_early_bytes(api, session, socket).await,
        }
    });
    switching_protocols(&accept, confirmed)
}

/// Serves a client that was refused, or that sent bytes before the response to its handshake.
async fn run_with_early_bytes(api: Api, session: Result<Session, ConnectError>, socket: (MaybeTlsStream, Bytes)) {
    let (socket, sent_early) = socket;
    let (read, write) = tokio::io::split(socket);
    let socket = tokio::io::join(Cursor::new(sent_early).chain(read), write);
    match session {
        Ok(session) => {
            session.run(socket).await;
        }
        Err(refused) => api.services().relay.refuse(socket, &refused).await,
    }
}

/// The protocol that a client requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestedProtocol {
    /// Plain mode.
    Plain,
    /// Rich mode: [`PROTOCOL`] as a subprotocol, or `v=1` in the query.
    Rich,
    /// Only unsupported versions of rich mode.
    Unknown,
}

/// Returns the requested protocol, and the subprotocol to confirm.
///
/// Browsers can set subprotocols but no other headers. Other clients may only be able to set the query. An unsupported
/// version is confirmed too: without a confirmation a browser drops the connection, and the page gets no close code. A
/// token among the subprotocols is never sent back.
fn requested_protocol(headers: &HeaderMap, query: Option<&str>) -> (RequestedProtocol, Option<HeaderValue>) {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).map(str::trim);
    let versions: Vec<&str> = names.filter(|name| name.starts_with("aurora.")).collect();
    if versions.contains(&PROTOCOL) {
        return (RequestedProtocol::Rich, Some(HeaderValue::from_static(PROTOCOL)));
    }
    if let Some(version) = versions.first() {
        return (RequestedProtocol::Unknown, HeaderValue::from_str(version).ok());
    }
    let pairs = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let versions: Vec<_> = pairs.filter(|(name, _)| name == "v").map(|(_, version)| version).collect();
    if versions.is_empty() {
        (RequestedProtocol::Plain, None)
    } else if versions.iter().all(|version| version == "1") {
        (RequestedProtocol::Rich, None)
    } else {
        (RequestedProtocol::Unknown, None)
    }
}

async fn open_session(
    api: &Api,
    channel: &str,
    query: Option<&str>,
    protocol: RequestedProtocol,
    peer: Peer,
    headers: &HeaderMap,
) -> Result<Session, ConnectError> {
    let (principal, admission) = admit(api, channel, query, headers).await?;
    match protocol {
        RequestedProtocol::Rich => {
            let key = key_of(query.unwrap_or_default());
            let commands: Option<Arc<dyn CommandHandlerFactory>> =
                Some(Arc::new(WorkerCommandsFactory::new(api.clone(), principal)));
            let admission = Admission { commands, ..admission };
            api.services().relay.connect_rich(channel, key.as_deref(), peer.0.ip(), admission)
        }
        RequestedProtocol::Unknown => Err(ConnectError::Version),
        RequestedProtocol::Plain => {
            let params = SubscribeParams::parse(query.unwrap_or_default())?;
            api.services().relay.connect(channel, params, peer.0.ip(), admission)
        }
    }
}

/// Returns the family key in the query.
fn key_of(query: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(name, _)| name == "key").map(|(_, key)| key.into_owned())
}

/// Returns the value of `Sec-WebSocket-Accept`. Fails if the request is not a WebSocket handshake.
fn check_handshake(method: &Method, headers: &HeaderMap) -> Result<String, ApiError> {
    let has = |name: HeaderName, word: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
    };
    if method != Method::GET || !has(CONNECTION, "upgrade") || !has(UPGRADE, "websocket") {
        return Err(ApiError::bad_handshake("this path needs a WebSocket handshake; connect with ws:// or wss://"));
    }
    if !has(SEC_WEBSOCKET_VERSION, "13") {
        return Err(ApiError::bad_handshake("Sec-WebSocket-Version must be 13"));
    }
    let key = headers
        .get(SEC_WEBSOCKET_KEY)
        .ok_or_else(|| ApiError::bad_handshake("the header Sec-WebSocket-Key is required"))?;
    Ok(derive_accept_key(key.as_bytes()))
}

fn switching_protocols(accept: &str, confirmed: Option<HeaderValue>) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    let accept = HeaderValue::from_str(accept).expect("base64 is a header value");
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(confirmed) = confirmed {
        headers.insert(SEC_WEBSOCKET_PROTOCOL, confirmed);
    }
    response
}

/// Returns the bare socket, and the bytes that the client has sent early.
///
/// The bytes are a copy: even an empty slice would keep the whole read buffer until the session ends.
fn into_socket(upgraded: Upgraded) -> Option<(MaybeTlsStream, Bytes)> {
    let parts = upgraded.downcast::<TokioIo<MaybeTlsStream>>().ok()?;
    Some((parts.io.into_inner().without_write_timeout(), Bytes::copy_from_slice(&parts.read_buf)))
}
