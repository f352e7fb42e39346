//! Pull handlers: lease entries of a group, and settle them by their lease tokens.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};

use crate::auth::Principal;
use crate::event::ConsumerName;
use crate::http::api::Api;
use crate::http::body::read_json;
use crate::http::extract::{Peer, Segments};
use crate::http::problem::{ApiError, ItemError};
use crate::http::pulling::{self, DeliveryView, MAX_TOKENS, existing_consumer, expires, open_consumer, pull_group};
use crate::pull::{PullConsumer, PullRequest, SettleError, Token};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PullBody {
    consumer: String,
    max: Option<usize>,
    lease_ms: Option<u64>,
    #[serde(default)]
    wait_ms: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AckBody {
    tokens: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NackBody {
    tokens: Vec<String>,
    #[serde(default)]
    delay_ms: u64,
    reason: Option<String>,
    #[serde(default)]
    permanent: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExtendBody {
    tokens: Vec<String>,
    lease_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct DeliveriesView {
    deliveries: Vec<DeliveryView>,
}

#[derive(Debug, Serialize)]
struct TokenResultsView {
    results: Vec<TokenResultView>,
}

#[derive(Debug, Serialize)]
struct TokenResultView {
    token: String,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ItemError>,
}

/// `POST /api/v1/streams/{stream}/groups/{group}/pull`: leases entries. Waits up to `wait_ms` for the first one.
pub(crate) async fn pull(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<DeliveriesView>, ApiError> {
    pull_group(&api, &stream, &group)?;
    let body: PullBody = read_json(&api, request).await?;
    let config = api.services().pull.config();
    let consumer: ConsumerName =
        body.consumer.parse().map_err(|error| ApiError::bad_parameter("consumer", format!("{error}")))?;
    let max = body.max.unwrap_or(1);
    if !(1..=config.max_batch).contains(&max) {
        let detail = format!("must be from 1 to {} (pull.max_batch)", config.max_batch);
        return Err(ApiError::bad_parameter("max", detail));
    }
    let wait = Duration::from_millis(body.wait_ms);
    if wait > config.max_wait {
        let detail = format!("must be at most {} (pull.max_wait)", config.max_wait.as_millis());
        return Err(ApiError::bad_parameter("wait_ms", detail));
    }
    if api.is_draining() {
        return Err(ApiError::draining());
    }
    let _permit = if wait.is_zero() {
        None
    } else {
        Some(api.limits().pulls.try_acquire(peer.limit_key(&principal)).ok_or_else(ApiError::too_many_pulls)?)
    };
    let pull_consumer = open_consumer(&api, &stream, &group).await?;
    let lease = body.lease_ms.map_or(pull_consumer.max_lease(), Duration::from_millis);
    let entries =
        pull_consumer.pull(PullRequest { consumer, max, lease, wait }).await.map_err(|error| ApiError::from(&error))?;
    Ok(Json(DeliveriesView { deliveries: entries.iter().map(DeliveryView::from).collect() }))
}

/// `POST …/ack`: acknowledges entries.
pub(crate) async fn acknowledge(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let pull_consumer = existing_consumer(&api, &stream, &group).await?;
    let AckBody { tokens } = read_json(&api, request).await?;
    let presented = PresentedTokens::parse(&pull_consumer, tokens)?;
    let results = pull_consumer.acknowledge(&presented.valid).await;
    presented.respond(results, None)
}

/// `POST …/nack`: returns entries for another delivery after a delay, or dead-letters them.
pub(crate) async fn nack(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let pull_consumer = existing_consumer(&api, &stream, &group).await?;
    let NackBody { tokens, delay_ms, reason, permanent } = read_json(&api, request).await?;
    let nack = pulling::nack(&pull_consumer, delay_ms, reason, permanent)?;
    let presented = PresentedTokens::parse(&pull_consumer, tokens)?;
    let results = pull_consumer.nack(&presented.valid, &nack).await;
    presented.respond(results, None)
}

/// `POST …/extend`: extends the leases of entries.
pub(crate) async fn extend(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let pull_consumer = existing_consumer(&api, &stream, &group).await?;
    let ExtendBody { tokens, lease_ms } = read_json(&api, request).await?;
    let lease = lease_ms.map_or(pull_consumer.max_lease(), Duration::from_millis);
    let presented = PresentedTokens::parse(&pull_consumer, tokens)?;
    let results = pull_consumer.extend(&presented.valid, lease).await.map_err(|error| ApiError::from(&error))?;
    presented.respond(results, Some(&expires(lease)))
}

/// The tokens of a request.
struct PresentedTokens {
    texts: Vec<String>,
    /// The tokens of the group, and the index of each in `texts`.
    valid: Vec<Token>,
    indexes: Vec<usize>,
}

impl PresentedTokens {
    fn parse(pull_consumer: &PullConsumer, texts: Vec<String>) -> Result<Self, ApiError> {
        if !(1..=MAX_TOKENS).contains(&texts.len()) {
            return Err(ApiError::bad_parameter("tokens", format!("must be from 1 to {MAX_TOKENS} tokens")));
        }
        let (mut valid, mut indexes) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for (index, text) in texts.iter().enumerate() {
            if let Some(token) = text.parse().ok().filter(|token| pull_consumer.has_issued(token)) {
                valid.push(token);
                indexes.push(index);
            }
        }
        Ok(Self { texts, valid, indexes })
    }

    /// Returns a result for each token in order, with status 200 if all succeeded and 207 otherwise.
    ///
    /// Fails if the store failed for all tokens: a client that checks only the status must not count them as settled.
    fn respond(self, results: Vec<Result<(), SettleError>>, expires: Option<&str>) -> Result<Response, ApiError> {
        let has_store_failed = |result: &Result<(), SettleError>| matches!(result, Err(SettleError::Store(_)));
        if let Some(Err(failure)) = results.first()
            && results.iter().all(has_store_failed)
        {
            return Err(ApiError::from(failure));
        }
        let not_leased = || Err(ApiError::from(&SettleError::NotLeased));
        let mut all: Vec<Result<(), ApiError>> = self.texts.iter().map(|_| not_leased()).collect();
        for (index, result) in self.indexes.into_iter().zip(results) {
            all[index] = result.map_err(|refused| ApiError::from(&refused));
        }
        let have_all_succeeded = all.iter().all(Result::is_ok);
        let view = |(token, result): (String, Result<(), ApiError>)| match result {
            Ok(()) => TokenResultView { token, status: 200, expires: expires.map(str::to_owned), error: None },
            Err(error) => {
                let status = error.status().as_u16();
                TokenResultView { token, status, expires: None, error: Some((&error).into()) }
            }
        };
        let results = self.texts.into_iter().zip(all).map(view).collect();
        let status = if have_all_succeeded { StatusCode::OK } else { StatusCode::MULTI_STATUS };
        Ok((status, Json(TokenResultsView { results })).into_response())
    }
}
