//! Large JSON responses, limited per address while the client reads them.
//!
//! A response stays in memory until the client has read it.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use crate::http::api::Api;
use crate::http::extract::Peer;
use crate::http::problem::ApiError;

/// The size up to which a response is not counted: about as much as socket buffers hold anyway.
const SMALL_BYTES: usize = 64 * 1024;

/// Returns a JSON response. A large one counts against the limit of its address until the client has read it.
pub(crate) fn json(api: &Api, peer: Peer, view: &impl Serialize) -> Result<Response, ApiError> {
    respond(api, peer, serde_json::to_vec(view).expect("a view is JSON"))
}

fn respond(api: &Api, peer: Peer, body: Vec<u8>) -> Result<Response, ApiError> {
    let length = body.len();
    let body = if length <= SMALL_BYTES {
        Body::from(body)
    } else {
        let permit = api.limits().response_mib.try_acquire_many(peer.0.ip(), length.div_ceil(1 << 20));
        let permit = permit.ok_or_else(ApiError::too_many_large_responses)?;
        // Each piece is a copy: one in a socket buffer must not keep the whole body in memory.
        let pieces = stream::unfold((body, 0, permit), move |(body, at, permit)| async move {
            let piece = body.get(at..length.min(at + SMALL_BYTES)).filter(|piece| !piece.is_empty());
            let piece = Ok::<_, Infallible>(Bytes::copy_from_slice(piece?));
            Some((piece, (body, at + SMALL_BYTES, permit)))
        });
        Body::from_stream(pieces)
    };
    let headers = [(CONTENT_TYPE, HeaderValue::from_static("application/json")), (CONTENT_LENGTH, length.into())];
    Ok((headers, body).into_response())
}
