//! Request bodies, read within limits of size, time and number per address.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use serde::de::DeserializeOwned;

use crate::http::api::Api;
use crate::http::extract::Peer;
use crate::http::problem::ApiError;

/// The part of an oversized body that is read before the response.
const MAX_DROPPED_BYTES: usize = 64 * 1024 * 1024;

/// Reads a whole body.
pub(super) async fn read(api: &Api, head: &Parts, body: Body) -> Result<Bytes, ApiError> {
    let peer = head.extensions.get::<Peer>().ok_or_else(ApiError::internal)?;
    let _permit = api.limits().bodies.try_acquire(peer.0.ip()).ok_or_else(ApiError::too_many_bodies)?;
    let config = api.config();
    let max = config.max_body.as_u64();
    let too_large =
        || ApiError::too_large("body_too_large", format!("the body must have at most {max} bytes (http.max_body)"));
    let declared = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let is_declared_too_large = declared.is_some_and(|length| length > max);
    let max = usize::try_from(max).unwrap_or(usize::MAX);
    let limit = if is_declared_too_large { 0 } else { max };
    match tokio::time::timeout(config.body_timeout, collect(body, declared, limit)).await {
        Ok(Some(body)) if is_declared_too_large || body.len() > max => Err(too_large()),
        Ok(Some(body)) => Ok(body),
        Ok(None) | Err(_) => Err(ApiError::body_incomplete()),
    }
}

/// Reads a body and keeps about `limit` bytes of it. Returns `None` if it is incomplete.
///
/// Bytes beyond the limit are read and dropped for a while. Otherwise a client that still sends would see a broken
/// connection and no response.
async fn collect(mut body: Body, declared: Option<u64>, limit: usize) -> Option<Bytes> {
    let capacity = declared.and_then(|length| usize::try_from(length).ok()).unwrap_or(0).min(limit).min(1 << 20);
    let mut kept = BytesMut::with_capacity(capacity);
    let mut dropped = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        if kept.len() <= limit {
            kept.extend_from_slice(&data);
        } else {
            dropped += data.len();
        }
        if dropped > MAX_DROPPED_BYTES {
            break;
        }
    }
    Some(kept.freeze())
}

/// Reads a body as JSON.
pub(super) async fn read_json<T: DeserializeOwned>(api: &Api, request: Request) -> Result<T, ApiError> {
    let (head, body) = request.into_parts();
    parse(&read(api, &head, body).await?)
}

/// Reads a body as JSON. Returns the default if it is empty.
pub(super) async fn read_json_or_default<T>(api: &Api, head: &Parts, body: Body) -> Result<T, ApiError>
where
    T: Default + DeserializeOwned,
{
    let body = read(api, head, body).await?;
    if body.iter().all(u8::is_ascii_whitespace) { Ok(T::default()) } else { parse(&body) }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|error| ApiError::bad_parameter("body", error.to_string()))
}
