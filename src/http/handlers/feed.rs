//! The feed handler: a channel as an endless response. Server-Sent Events for `EventSource`, JSON lines for `curl -N`.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures_util::stream;

use crate::http::admission::admit;
use crate::http::api::Api;
use crate::http::extract::{Peer, Segment};
use crate::http::problem::ApiError;
use crate::relay::{BadParameter, ConnectError, FeedEncoding, SubscribeParams};

/// The header that `EventSource` sends when it reconnects: the last `id` that it has seen.
const LAST_EVENT_ID: &str = "last-event-id";

/// `GET /api/v1/feeds/{channel}`: Server-Sent Events if `Accept` has `text/event-stream`, otherwise JSON lines.
///
/// Takes the parameters of the WebSocket. `Last-Event-ID` takes precedence over `since`, because the client has seen
/// that event.
pub(crate) async fn open(
    State(api): State<Api>,
    Segment(channel): Segment,
    RawQuery(query): RawQuery,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let encoding = encoding(&headers);
    let admitted = admit(&api, &channel, query.as_deref(), &headers).await;
    let (_, admission) = admitted.map_err(|error| ApiError::from(&error))?;
    let params = params(query.as_deref(), &headers).map_err(|bad| ApiError::from(&ConnectError::BadParameter(bad)))?;
    let feed = api.services().relay.feed(&channel, params, encoding, peer.0.ip(), admission);
    let feed = feed.map_err(|error| ApiError::from(&error))?;
    let pieces = stream::unfold(feed, |mut feed| async {
        let piece = feed.next().await?;
        Some((Ok::<_, Infallible>(piece), feed))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let content_type = match encoding {
        FeedEncoding::EventStream => "text/event-stream",
        FeedEncoding::Lines => "application/x-ndjson",
    };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
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

fn encoding(headers: &HeaderMap) -> FeedEncoding {
    let accepted = headers.get_all(ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let is_event_stream = |kind: &str| kind.trim().to_ascii_lowercase().starts_with("text/event-stream");
    let wants_events = accepted.flat_map(|value| value.split(',')).any(is_event_stream);
    if wants_events { FeedEncoding::EventStream } else { FeedEncoding::Lines }
}
