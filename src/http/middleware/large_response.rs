//! Answers of megabytes: each is kept until its client has taken it, so one address has so many of them at a time.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;

use crate::http::{Api, ApiError, Peer};

/// How many MiB of answers are kept for one address, each part of one counted as a whole.
pub(crate) const MIB_PER_ADDRESS: usize = 256;
/// What an answer may have without being counted: about as much as is in sockets on its way anyway.
const SMALL: usize = 64 * 1024;

/// An answer in JSON. One that is large has its places until its client has taken it, or is refused where there are none.
pub(crate) fn json(api: &Api, peer: Peer, view: &impl Serialize) -> Result<Response, ApiError> {
    answer(api, peer, serde_json::to_vec(view).expect("a view is JSON"))
}

fn answer(api: &Api, peer: Peer, body: Vec<u8>) -> Result<Response, ApiError> {
    let length = body.len();
    let body = if length <= SMALL {
        Body::from(body)
    } else {
        let places = api.inner.answers.try_acquire_many(peer.0.ip(), length.div_ceil(1 << 20));
        let places = places.ok_or_else(ApiError::too_many_answers)?;
        // Pieces of their own: one that waits in a socket's buffer keeps none of the others.
        let pieces = stream::unfold((body, 0, places), move |(body, at, places)| async move {
            let piece = body.get(at..length.min(at + SMALL)).filter(|piece| !piece.is_empty());
            let piece = Ok::<_, Infallible>(Bytes::copy_from_slice(piece?));
            Some((piece, (body, at + SMALL, places)))
        });
        Body::from_stream(pieces)
    };
    let headers = [(CONTENT_TYPE, HeaderValue::from_static("application/json")), (CONTENT_LENGTH, length.into())];
    Ok((headers, body).into_response())
}
