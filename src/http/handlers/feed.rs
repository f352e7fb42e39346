//! Alerts as the body of an answer that does not end: Server-Sent Events for `EventSource`, lines of JSON for `curl -N`.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures_util::stream;

use crate::http::extract::Segment;
use crate::http::handlers::websocket::admission;
use crate::http::middleware::origin::is_allowed;
use crate::http::{Api, ApiError, Peer};
use crate::relay::{BadParameter, ConnectError, FeedEncoding, SubscribeParams};

/// What `EventSource` sends when it connects again: the last `id` it has seen.
const LAST_EVENT_ID: &str = "last-event-id";

/// `GET /api/v1/feeds/{channel}`: Server-Sent Events where `Accept` asks for `text/event-stream`, lines of JSON otherwise.
///
/// Takes the same parameters as the WebSocket. `Last-Event-ID` comes before `since`: it is what the client has seen.
pub(crate) async fn open(
    State(api): State<Api>,
    Segment(channel): Segment,
    RawQuery(query): RawQuery,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if api.is_draining() {
        return Err(ApiError::from(&ConnectError::Draining));
    }
    if !is_allowed(&headers, &api.inner.config.origins) {
        return Err(ApiError::from(&ConnectError::Origin));
    }
    let form = form(&headers);
    let admission = admission(&api, &channel, query.as_deref(), &headers).await;
    let admission = admission.map_err(|refused| ApiError::from(&refused))?;
    let params = params(query.as_deref(), &headers).map_err(|bad| ApiError::from(&ConnectError::BadParameter(bad)))?;
    let feed = api.inner.relay.feed(&channel, params, form, peer.0.ip(), admission);
    let feed = feed.map_err(|refused| ApiError::from(&refused))?;
    let pieces = stream::unfold(feed, |mut feed| async {
        let piece = feed.next().await?;
        Some((Ok::<_, Infallible>(piece), feed))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let content_type = match form {
        FeedEncoding::EventStream => "text/event-stream",
        FeedEncoding::Lines => "application/x-ndjson",
    };
    let answered = response.headers_mut();
    answered.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answered.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answered.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

fn params(query: Option<&str>, headers: &HeaderMap) -> Result<SubscribeParams, BadParameter> {
    let mut params = SubscribeParams::parse(query.unwrap_or_default())?;
    let seen = headers.get(LAST_EVENT_ID).map(|seen| String::from_utf8_lossy(seen.as_bytes()));
    if let Some(seen) = seen.filter(|seen| !seen.is_empty()) {
        let since = seen.parse().map_err(|problem| BadParameter { name: "Last-Event-ID", problem })?;
        params.since = Some(since);
    }
    Ok(params)
}

fn form(headers: &HeaderMap) -> FeedEncoding {
    let accepted = headers.get_all(ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let is_event_stream = |kind: &str| kind.trim().to_ascii_lowercase().starts_with("text/event-stream");
    let wants_events = accepted.flat_map(|value| value.split(',')).any(is_event_stream);
    if wants_events { FeedEncoding::EventStream } else { FeedEncoding::Lines }
}
