//! Pulling over HTTP: workers lease entries of a group, and settle them by tokens.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::auth::Principal;
use crate::bus::PublishError;
use crate::event::{ConsumerName, GroupName, StreamName};
use crate::http::extract::Segments;
use crate::http::handlers::publish::read;
use crate::http::handlers::streams::{EventView, event};
use crate::http::limit_key;
use crate::http::problem::ItemError;
use crate::http::{Api, ApiError, Peer};
use crate::pull::{LeasedEntry, Nack, PullConsumer, PullRequest, SettleError, Token};

/// The most tokens in one request.
const MAX_TOKENS: usize = 1_000;
/// The longest reason that is kept.
const MAX_REASON_BYTES: usize = 2_048;

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

/// An entry as its worker sees it. `id` is the same each time the entry is delivered.
#[derive(Debug, Serialize)]
pub(crate) struct DeliveryView {
    token: String,
    attempt: u32,
    lease_ms: u64,
    expires: String,
    #[serde(flatten)]
    entry: EventView,
}

#[derive(Debug, Serialize)]
struct ResultsView {
    results: Vec<ItemView>,
}

#[derive(Debug, Serialize)]
struct ItemView {
    token: String,
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ItemError>,
}

/// `POST /api/v1/streams/{stream}/groups/{group}/pull`: leases entries, waiting for the first one for a while.
pub(crate) async fn pull(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<DeliveriesView>, ApiError> {
    pulled_from(&api, &stream, &group)?;
    let body: PullBody = json(&api, request).await?;
    let config = api.inner.pull.config();
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
    let _waiting = if wait.is_zero() {
        None
    } else {
        Some(api.inner.pulls.try_acquire(limit_key(&principal, peer)).ok_or_else(ApiError::too_many_pulls)?)
    };
    let desk = open_desk(&api, &stream, &group).await?;
    let lease = body.lease_ms.map_or(desk.max_lease(), Duration::from_millis);
    let tasks = desk.pull(PullRequest { consumer, max, lease, wait }).await.map_err(|error| ApiError::from(&error))?;
    Ok(Json(DeliveriesView { deliveries: tasks.iter().map(view).collect() }))
}

/// `POST …/ack`: the entries are handled.
pub(crate) async fn acknowledge(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let desk = desk_of(&api, &stream, &group).await?;
    let AckBody { tokens } = json(&api, request).await?;
    let shown = PresentedCredentials::read(&desk, tokens)?;
    let results = desk.acknowledge(&shown.good).await;
    shown.answer(results, None)
}

/// `POST …/nack`: the entries are given back, for others to have after a time, or for good.
pub(crate) async fn give_back(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let desk = desk_of(&api, &stream, &group).await?;
    let NackBody { tokens, delay_ms, reason, permanent } = json(&api, request).await?;
    let how = back(&desk, delay_ms, reason, permanent)?;
    let shown = PresentedCredentials::read(&desk, tokens)?;
    let results = desk.nack(&shown.good, &how).await;
    shown.answer(results, None)
}

/// `POST …/extend`: the entries are leased for longer.
pub(crate) async fn extend(
    State(api): State<Api>,
    Segments(stream, group): Segments,
    request: Request,
) -> Result<Response, ApiError> {
    let desk = desk_of(&api, &stream, &group).await?;
    let ExtendBody { tokens, lease_ms } = json(&api, request).await?;
    let lease = lease_ms.map_or(desk.max_lease(), Duration::from_millis);
    let shown = PresentedCredentials::read(&desk, tokens)?;
    let results = desk.extend(&shown.good, lease).await.map_err(|error| ApiError::from(&error))?;
    shown.answer(results, Some(&expires(lease)))
}

/// How something is to be given back, within bounds.
pub(crate) fn back(
    desk: &PullConsumer,
    delay_ms: u64,
    reason: Option<String>,
    is_permanent: bool,
) -> Result<Nack, ApiError> {
    let delay = Duration::from_millis(delay_ms);
    if delay > desk.max_lease() {
        let detail = format!("must be at most {} (claim_idle of the group)", desk.max_lease().as_millis());
        return Err(ApiError::bad_parameter("delay_ms", detail));
    }
    let reason = reason.map(|mut reason| {
        reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
        reason
    });
    Ok(Nack { delay, reason, is_permanent })
}

/// The desk of a group that is declared without a sink, for someone who shows what was leased there.
async fn desk_of(api: &Api, stream: &str, group: &str) -> Result<Arc<PullConsumer>, ApiError> {
    let (stream, group) = pulled_from(api, stream, group)?;
    let catalogue = api.inner.bus.catalog();
    if let Some(roster) = catalogue.families().of(&stream) {
        roster.finds(&*api.inner.store, &stream).await.map_err(|error| ApiError::from(&error))?;
    }
    api.inner.pull.consumer(&stream, &group).ok_or_else(|| ApiError::no_such_stream(stream.as_str(), catalogue.names()))
}

/// The same for someone who pulls. A stream of a family becomes a member by that.
pub(crate) async fn open_desk(api: &Api, stream: &str, group: &str) -> Result<Arc<PullConsumer>, ApiError> {
    let (stream, group) = pulled_from(api, stream, group)?;
    if let Some(roster) = api.inner.bus.catalog().families().of(&stream) {
        let joined = roster.join(&*api.inner.store, &stream).await;
        joined.map_err(|error| ApiError::from(&PublishError::from(error)))?;
    }
    api.inner.pull.consumer(&stream, &group).ok_or_else(ApiError::internal)
}

/// What a path or a request names, where that can be pulled from.
fn pulled_from(api: &Api, stream: &str, group: &str) -> Result<(StreamName, GroupName), ApiError> {
    let catalogue = api.inner.bus.catalog();
    let known = stream.parse::<StreamName>().ok().filter(|stream| catalogue.contains(stream));
    let known = known.ok_or_else(|| ApiError::no_such_stream(stream, catalogue.names()))?;
    let named = group.parse().ok().filter(|group| api.inner.pull.groups(&known).any(|known| known == group));
    let named =
        named.ok_or_else(|| ApiError::no_such_group(group, api.inner.pull.groups(&known).map(GroupName::as_str)))?;
    Ok((known, named))
}

async fn json<T: DeserializeOwned>(api: &Api, request: Request) -> Result<T, ApiError> {
    let (head, body) = request.into_parts();
    let body = read(api, &head, body).await?;
    serde_json::from_slice(&body).map_err(|error| ApiError::bad_parameter("body", error.to_string()))
}

pub(crate) fn view(task: &LeasedEntry) -> DeliveryView {
    let mut entry = event(&task.entry);
    if task.entry.is_for_one_group() {
        entry.id = task.entry.first_id().to_string();
        entry.fields.retain(|(name, _)| !name.starts_with("replay."));
    }
    DeliveryView {
        token: task.token.to_string(),
        attempt: task.token.attempt(),
        lease_ms: u64::try_from(task.lease.as_millis()).unwrap_or(u64::MAX),
        expires: expires(task.lease),
        entry,
    }
}

/// When a lease ends that begins now, by this machine's clock.
fn expires(lease: Duration) -> String {
    let at = Timestamp::now().checked_add(lease).unwrap_or(Timestamp::MAX);
    format!("{at:.3}")
}

/// The tokens of a request.
struct PresentedCredentials {
    texts: Vec<String>,
    /// Those that are tokens of the group, each with its place.
    places: Vec<usize>,
    good: Vec<Token>,
}

impl PresentedCredentials {
    fn read(desk: &PullConsumer, texts: Vec<String>) -> Result<Self, ApiError> {
        if !(1..=MAX_TOKENS).contains(&texts.len()) {
            return Err(ApiError::bad_parameter("tokens", format!("must be from 1 to {MAX_TOKENS} tokens")));
        }
        let (mut places, mut good) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for (place, text) in texts.iter().enumerate() {
            if let Some(token) = text.parse().ok().filter(|token| desk.has_issued(token)) {
                places.push(place);
                good.push(token);
            }
        }
        Ok(Self { texts, places, good })
    }

    /// A result for each token, in order; 200 where all are good, else 207. Where the store has failed for all of them, so
    /// has the request: whoever looks at its status alone must not take them for settled.
    fn answer(self, results: Vec<Result<(), SettleError>>, expires: Option<&str>) -> Result<Response, ApiError> {
        let has_failed = |result: &Result<(), SettleError>| matches!(result, Err(SettleError::Store(_)));
        if let Some(Err(failure)) = results.first()
            && results.iter().all(has_failed)
        {
            return Err(ApiError::from(failure));
        }
        let foreign = || Err(ApiError::from(&SettleError::NotLeased));
        let mut all: Vec<Result<(), ApiError>> = self.texts.iter().map(|_| foreign()).collect();
        for (place, result) in self.places.into_iter().zip(results) {
            all[place] = result.map_err(|refused| ApiError::from(&refused));
        }
        let are_all_good = all.iter().all(Result::is_ok);
        let item = |(token, result): (String, Result<(), ApiError>)| match result {
            Ok(()) => ItemView { token, status: 200, expires: expires.map(str::to_owned), error: None },
            Err(error) => {
                ItemView { token, status: error.status().as_u16(), expires: None, error: Some((&error).into()) }
            }
        };
        let results = self.texts.into_iter().zip(all).map(item).collect();
        let status = if are_all_good { StatusCode::OK } else { StatusCode::MULTI_STATUS };
        Ok((status, Json(ResultsView { results })).into_response())
    }
}
