//! The WebSocket handshake, by hand: sessions write to the bare socket, which axum's own upgrade would hide.

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

use crate::auth::{AuthError, Principal};
use crate::http::extract::Segment;
use crate::http::handlers::ws_commands::Agents;
use crate::http::middleware::credentials::PresentedCredentials;
use crate::http::middleware::origin::is_allowed;
use crate::http::server::maybe_tls::Socket;
use crate::http::{Api, ApiError, Peer};
use crate::relay::{Admission, CommandHandlerFactory, ConnectError, PROTOCOL, Session, SubscribeParams};

/// `GET /api/v1/ws/{channel}`
///
/// Programs are refused with a status. A browser's page can't see that, so it is let in and told by a close code.
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
    let (protocol, confirmed) = offered(request.headers(), query.as_deref());
    let admitted = admit(&api, &channel, query.as_deref(), protocol, peer, request.headers()).await;
    let session = match admitted {
        Ok(session) => Ok(session),
        Err(refused) if is_browser => Err(refused),
        Err(refused) => return ApiError::from(&refused).into_response(),
    };
    let Some(upgrade) = request.extensions_mut().remove::<OnUpgrade>() else {
        return ApiError::bad_handshake("the connection can't be upgraded").into_response();
    };
    let sessions = api.inner.sessions.clone();
    sessions.clone().spawn(async move {
        let socket = match upgrade.await.map(into_socket) {
            Ok(Some(socket)) => socket,
            Ok(None) => return tracing::error!("an upgraded connection is of another kind"),
            Err(error) => return tracing::debug!(error = %error, "the upgrade did not come about"),
        };
        match (session, socket) {
            // A task of its own, which has no room for what came before.
            (Ok(session), (socket, sent_early)) if sent_early.is_empty() => {
                sessions.spawn(session.run(socket));
            }
            (session, socket) => converse(api, session, socket).await,
        }
    });
    switching_protocols(&accept, confirmed)
}

/// Serves a client that was refused, or has sent something before it was answered.
async fn converse(api: Api, session: Result<Session, ConnectError>, socket: (Socket, Bytes)) {
    let (socket, sent_early) = socket;
    let (read, write) = tokio::io::split(socket);
    let socket = tokio::io::join(Cursor::new(sent_early).chain(read), write);
    match session {
        Ok(session) => {
            session.run(socket).await;
        }
        Err(refused) => api.inner.relay.refuse(socket, &refused).await,
    }
}

/// What a client speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// It only listens.
    Plain,
    /// [`PROTOCOL`], asked for as a subprotocol or in the query.
    Rich,
    /// Versions of it that are not spoken here, of which this is one.
    Unknown,
}

/// What the client offers to speak, and the subprotocol to confirm. Browsers can name subprotocols, but no headers; others
/// may only have the query.
///
/// A version that is not spoken here is confirmed too: a browser breaks off where nothing that it offered is, and its page
/// would never see the close code. A token is no version, and never sent back.
fn offered(headers: &HeaderMap, query: Option<&str>) -> (Protocol, Option<HeaderValue>) {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).map(str::trim);
    let versions: Vec<&str> = names.filter(|name| name.starts_with("aurora.")).collect();
    if versions.contains(&PROTOCOL) {
        return (Protocol::Rich, Some(HeaderValue::from_static(PROTOCOL)));
    }
    if let Some(version) = versions.first() {
        return (Protocol::Unknown, HeaderValue::from_str(version).ok());
    }
    let pairs = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let versions: Vec<_> = pairs.filter(|(name, _)| name == "v").map(|(_, version)| version).collect();
    if versions.is_empty() {
        (Protocol::Plain, None)
    } else if versions.iter().all(|version| version == "1") {
        (Protocol::Rich, None)
    } else {
        (Protocol::Unknown, None)
    }
}

async fn admit(
    api: &Api,
    channel: &str,
    query: Option<&str>,
    protocol: Protocol,
    peer: Peer,
    headers: &HeaderMap,
) -> Result<Session, ConnectError> {
    if api.is_draining() {
        return Err(ConnectError::Draining);
    }
    if !is_allowed(headers, &api.inner.config.origins) {
        return Err(ConnectError::Origin);
    }
    let (principal, admission) = principal_and_admission(api, channel, query, headers).await?;
    match protocol {
        Protocol::Rich => {
            let key = key_of(query.unwrap_or_default());
            let commands: Option<Arc<dyn CommandHandlerFactory>> = Some(Arc::new(Agents::new(api.clone(), principal)));
            let admission = Admission { commands, ..admission };
            api.inner.relay.connect_rich(channel, key.as_deref(), peer.0.ip(), admission)
        }
        Protocol::Unknown => Err(ConnectError::Version),
        Protocol::Plain => {
            let params = SubscribeParams::parse(query.unwrap_or_default())?;
            api.inner.relay.connect(channel, params, peer.0.ip(), admission)
        }
    }
}

/// The key that the query names.
fn key_of(query: &str) -> Option<String> {
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(name, _)| name == "key").map(|(_, key)| key.into_owned())
}

/// On what terms whoever asks may watch a channel.
pub(crate) async fn admission(
    api: &Api,
    channel: &str,
    query: Option<&str>,
    headers: &HeaderMap,
) -> Result<Admission, ConnectError> {
    principal_and_admission(api, channel, query, headers).await.map(|(_, admission)| admission)
}

async fn principal_and_admission(
    api: &Api,
    channel: &str,
    query: Option<&str>,
    headers: &HeaderMap,
) -> Result<(Principal, Admission), ConnectError> {
    let access = &api.inner.access;
    let principal = access.principal(PresentedCredentials { headers, query, origins: &api.inner.config.origins }).await;
    let admitted = principal.and_then(|principal| {
        let admission = access.admission(&principal, channel)?;
        Ok((principal, admission))
    });
    admitted.map_err(|denied| {
        crate::http::routes::refuse(api, &denied);
        let text = denied.to_string();
        match denied {
            AuthError::Scope(_) | AuthError::AllEntries | AuthError::OtherTenant(_) => ConnectError::Forbidden(text),
            AuthError::Unavailable => ConnectError::Unavailable(text),
            _ => ConnectError::Unauthenticated(text),
        }
    })
}

/// What the client must be answered to its key, if it asks for a WebSocket properly.
fn check_handshake(method: &Method, headers: &HeaderMap) -> Result<String, ApiError> {
    let has = |name: HeaderName, word: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
    };
    if method != Method::GET || !has(CONNECTION, "upgrade") || !has(UPGRADE, "websocket") {
        return Err(ApiError::bad_handshake("this path is a WebSocket: connect with ws://"));
    }
    if !has(SEC_WEBSOCKET_VERSION, "13") {
        return Err(ApiError::bad_handshake("Sec-WebSocket-Version must be 13"));
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or_else(|| ApiError::bad_handshake("Sec-WebSocket-Key is missing"))?;
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

/// The bare socket, and what the client has sent already: a copy, because even nothing would keep the whole buffer that
/// it was read into for as long as the session lives.
fn into_socket(upgraded: Upgraded) -> Option<(Socket, Bytes)> {
    let parts = upgraded.downcast::<TokioIo<Socket>>().ok()?;
    Some((parts.io.into_inner().without_limit(), Bytes::copy_from_slice(&parts.read_buf)))
}

impl From<&ConnectError> for ApiError {
    fn from(refused: &ConnectError) -> Self {
        match refused {
            ConnectError::UnknownChannel(_) => Self::no_such_channel(refused.to_string()),
            ConnectError::BadParameter(parameter) => Self::bad_parameter(parameter.name, refused.to_string()),
            ConnectError::ConnectionLimit => Self::connection_limit(refused.to_string()),
            ConnectError::Unauthenticated(detail) => Self::unauthenticated(detail),
            ConnectError::Forbidden(detail) => Self::forbidden(detail),
            ConnectError::Unavailable(detail) => Self::auth_unavailable(detail),
            ConnectError::TooManyKeys(detail) => Self::too_many_keys(detail),
            ConnectError::Draining => Self::draining(),
            ConnectError::Origin => Self::forbidden_origin(refused.to_string()),
            ConnectError::Version => Self::bad_handshake(refused.to_string()),
        }
    }
}
