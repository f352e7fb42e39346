//! Publishing over HTTP: one JSON object, an array, or NDJSON.

use std::fmt;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use serde::de::{Deserializer as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::auth::{Action, AuthError, Principal, TENANT};
use crate::bus::{Dedup, PublishError, PublishOptions};
use crate::event::{NewEvent, StreamName};
use crate::http::extract::{Query, Segment};
use crate::http::problem::ItemError;
use crate::http::routes::keep_to_tenant;
use crate::http::{Api, ApiError, Peer};
use crate::store::{Appended, Durability};

/// How much of a body that is too large is read before the answer.
const MAX_DROPPED_BYTES: usize = 64 * 1024 * 1024;

/// `?dedup=id`, `?dedup_window=10m` and `?durability=replicated`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Params {
    dedup: Option<String>,
    dedup_window: Option<String>,
    durability: Option<String>,
}

/// One event's result.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Item {
    Accepted { id: String, event_id: String, duplicate: bool },
    Refused { error: ItemError },
}

#[derive(Debug, Serialize)]
struct Answer {
    results: Vec<Item>,
}

/// What came in one request, each event parsed or refused on its own.
struct Batch {
    events: Vec<Result<NewEvent, ApiError>>,
    /// Whether it was one bare object, whose error is the request's.
    is_single: bool,
}

/// `POST /api/v1/streams/{stream}/events`
pub(crate) async fn to_stream(
    State(api): State<Api>,
    Segment(stream): Segment,
    Query(params): Query<Params>,
    principal: Principal,
    request: Request,
) -> Result<Response, ApiError> {
    let known = || api.inner.bus.catalog().names();
    let stream = stream
        .parse()
        .ok()
        .filter(|stream| api.inner.bus.catalog().contains(stream))
        .ok_or_else(|| ApiError::no_such_stream(&stream, known()));
    let answer = match stream {
        Ok(stream) => publish(&api, &params, &principal, request, |_| &stream).await,
        Err(error) => Err(error),
    };
    count_refused(&api, answer)
}

/// `POST /api/v1/alerts`: CPS alerts to their stream, all others to `aurora:alerts`.
pub(crate) async fn alerts(
    State(api): State<Api>,
    Query(params): Query<Params>,
    principal: Principal,
    request: Request,
) -> Result<Response, ApiError> {
    let alerts: StreamName = "aurora:alerts".parse().expect("a valid name");
    let cps_alerts: StreamName = "aurora:cps:alerts".parse().expect("a valid name");
    let catalogue = api.inner.bus.catalog();
    let missing = [&alerts, &cps_alerts].into_iter().find(|stream| !catalogue.contains(stream));
    let answer = if let Some(stream) = missing {
        Err(ApiError::no_such_stream(stream.as_str(), catalogue.names()))
    } else {
        let route = |event: &NewEvent| if event.category() == Some("cps") { &cps_alerts } else { &alerts };
        publish(&api, &params, &principal, request, route).await
    };
    count_refused(&api, answer)
}

fn count_refused(api: &Api, answer: Result<Response, ApiError>) -> Result<Response, ApiError> {
    answer.inspect_err(|error| api.inner.metrics.rejected.with_label_values(&[error.code()]).inc())
}

async fn publish<'a>(
    api: &Api,
    params: &Params,
    principal: &Principal,
    request: Request,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<Response, ApiError> {
    let _slot = api.inner.publishes.try_acquire().map_err(|_error| ApiError::too_many_in_flight())?;
    let (head, body) = request.into_parts();
    let promise = PublishOptions { window: dedup_window(params)?, durability: durability(params)? };
    let dedup = dedup(params, &head.headers)?;
    let traceparent = head.headers.get("traceparent").and_then(|value| value.to_str().ok());
    let body = read(api, &head, body).await?;
    let mut batch = parse(&body, head.headers.get(CONTENT_TYPE), api.inner.config.max_batch)?;
    if let Some(traceparent) = traceparent {
        batch.events.iter_mut().flatten().for_each(|event| event.set_traceparent(traceparent));
    }
    store(api, batch, principal, &dedup, promise, route).await
}

fn dedup(params: &Params, headers: &HeaderMap) -> Result<Dedup, ApiError> {
    let key = headers.get("idempotency-key").map(HeaderValue::to_str).transpose();
    let key = key.map_err(|_error| ApiError::bad_parameter("Idempotency-Key", "must be visible ASCII text"))?;
    match (params.dedup.as_deref(), key) {
        (None, None) => Ok(Dedup::Off),
        (None, Some(key)) => Ok(Dedup::Key(key.to_owned())),
        (Some("id"), None) => Ok(Dedup::OwnId),
        (Some("id"), Some(_)) => {
            Err(ApiError::bad_parameter("dedup", "use either the header Idempotency-Key or dedup=id, not both"))
        }
        (Some(other), _) => Err(ApiError::bad_parameter("dedup", format!("must be `id`, not `{other}`"))),
    }
}

fn dedup_window(params: &Params) -> Result<Option<Duration>, ApiError> {
    let parse = |text: &String| {
        let detail = "must be a time such as 10m or 24h, at least 1s";
        humantime_serde::re::humantime::parse_duration(text)
            .ok()
            .filter(|window| *window >= Duration::from_secs(1))
            .ok_or_else(|| ApiError::bad_parameter("dedup_window", detail))
    };
    params.dedup_window.as_ref().map(parse).transpose()
}

fn durability(params: &Params) -> Result<Durability, ApiError> {
    let wanted = params.durability.as_deref().map(str::parse).transpose();
    // A plus sign in a query means a space.
    let wanted = wanted.or_else(|_| params.durability.as_deref().map(|d| d.replace(' ', "+").parse()).transpose());
    wanted.map(Option::unwrap_or_default).map_err(|detail: String| ApiError::bad_parameter("durability", detail))
}

/// The whole body, within its limits of size and time, and of how many one address has on their way.
pub(crate) async fn read(api: &Api, head: &Parts, body: Body) -> Result<Bytes, ApiError> {
    let peer = head.extensions.get::<Peer>().ok_or_else(ApiError::internal)?;
    let _place = api.inner.bodies.try_acquire(peer.0.ip()).ok_or_else(ApiError::too_many_bodies)?;
    let config = &api.inner.config;
    let max = config.max_body.as_u64();
    let too_large =
        || ApiError::too_large("body_too_large", format!("the body has more than {max} bytes (http.max_body)"));
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

/// Reads a body, keeping about `limit` bytes of it. What comes beyond is read and dropped for a while: a client that
/// still sends would otherwise see a broken connection instead of the answer.
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

fn parse(body: &Bytes, content_type: Option<&HeaderValue>, max_batch: usize) -> Result<Batch, ApiError> {
    let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_ndjson = content_type.contains("ndjson") || content_type.contains("jsonl");
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    match first {
        None => Err(ApiError::invalid_event("the body is empty: send a JSON object, an array of objects, or NDJSON")),
        Some(_) if is_ndjson => ndjson(body, max_batch),
        Some(b'[') => array(body, max_batch),
        Some(_) => {
            let event = NewEvent::parse(body.clone()).map_err(|error| {
                let hint = "; for several events send an array, or NDJSON with content-type application/x-ndjson";
                ApiError::invalid_event(format!("{error}{hint}"))
            });
            Ok(Batch { events: vec![event], is_single: true })
        }
    }
}

fn ndjson(body: &Bytes, max_batch: usize) -> Result<Batch, ApiError> {
    let mut events = Vec::with_capacity(max_batch.min(512));
    for (number, line) in body.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        check_count(events.len() + 1, max_batch)?;
        let event = NewEvent::parse(body.slice_ref(line));
        events.push(event.map_err(|error| ApiError::invalid_event(format!("line {}: {error}", number + 1))));
    }
    Ok(Batch { events, is_single: false })
}

fn array(body: &Bytes, max_batch: usize) -> Result<Batch, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let items = json.deserialize_seq(Items { max: max_batch + 1 });
    // What comes after the array would be lost without a word.
    let items = items.and_then(|items| json.end().map(|()| items));
    let items: Vec<&RawValue> =
        items.map_err(|error| ApiError::invalid_event(format!("the body is not one JSON array: {error}")))?;
    check_count(items.len(), max_batch)?;
    if items.is_empty() {
        return Err(ApiError::invalid_event("the array is empty"));
    }
    let event = |(index, item): (usize, &&RawValue)| {
        let parsed = NewEvent::parse(body.slice_ref(item.get().as_bytes()));
        parsed.map_err(|error| ApiError::invalid_event(format!("item {index}: {error}")))
    };
    Ok(Batch { events: items.iter().enumerate().map(event).collect(), is_single: false })
}

/// The items of an array, no more than `max` kept: millions of tiny ones would take many times the body's memory.
struct Items {
    max: usize,
}

impl<'de> Visitor<'de> for Items {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while items.len() < self.max {
            match seq.next_element()? {
                Some(item) => items.push(item),
                None => return Ok(items),
            }
        }
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(items)
    }
}

fn check_count(count: usize, max_batch: usize) -> Result<(), ApiError> {
    if count <= max_batch {
        return Ok(());
    }
    let detail = format!("the request has more than {max_batch} events (http.max_batch): send several requests");
    Err(ApiError::too_large("batch_too_large", detail))
}

/// What of a request goes to one stream.
struct Share<'a> {
    stream: &'a StreamName,
    /// Where each event stood in the request.
    places: Vec<usize>,
    events: Vec<(Dedup, NewEvent)>,
}

/// Appends what is sound, per stream, and answers for each event in its place.
async fn store<'a>(
    api: &Api,
    batch: Batch,
    principal: &Principal,
    dedup: &Dedup,
    promise: PublishOptions,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<Response, ApiError> {
    let is_single = batch.is_single;
    let mut results: Vec<Option<Result<Appended, ApiError>>> = Vec::with_capacity(batch.events.len());
    let mut by_stream: Vec<Share<'_>> = Vec::with_capacity(2);
    for (index, event) in batch.events.into_iter().enumerate() {
        match event.and_then(|event| admit(api, principal, event, &route)) {
            Ok((stream, event)) => {
                let place = by_stream.iter().position(|share| share.stream == stream).unwrap_or_else(|| {
                    by_stream.push(Share { stream, places: Vec::new(), events: Vec::new() });
                    by_stream.len() - 1
                });
                by_stream[place].places.push(index);
                let dedup = within_tenant(dedup_of(dedup, index, is_single), &event, principal);
                by_stream[place].events.push((dedup, event));
                results.push(None);
            }
            Err(error) => results.push(Some(Err(error))),
        }
    }
    let mut accepted = 0_usize;
    for Share { stream, places, events } in by_stream {
        let published = api.inner.bus.publish(stream, events, promise).await;
        for (place, result) in places.into_iter().zip(published) {
            accepted += usize::from(result.is_ok());
            results[place] = Some(result.map_err(|error| refused(stream, &error)));
        }
    }
    let results: Vec<_> = results.into_iter().flatten().collect();
    let all_failed_in_store =
        || results.iter().all(|result| result.as_ref().is_err_and(|e| e.status().is_server_error()));
    if accepted == 0
        && (is_single || all_failed_in_store())
        && let Some(Err(error)) = results.first()
    {
        return Err(error.clone());
    }
    let status = if accepted == results.len() { StatusCode::CREATED } else { StatusCode::MULTI_STATUS };
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        api.inner.metrics.rejected.with_label_values(&[error.code()]).inc();
    }
    let answer = Answer { results: results.iter().map(item).collect() };
    let body = serde_json::to_vec(&answer).expect("an answer is JSON");
    let content_type = (CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok((status, [content_type], body).into_response())
}

/// The event's stream, where the principal may publish to it, and the event, which is its tenant's then, or the tenant's
/// whose stream it is.
pub(crate) fn admit<'a>(
    api: &Api,
    principal: &Principal,
    mut event: NewEvent,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<(&'a StreamName, NewEvent), ApiError> {
    let stream = route(&event);
    let deed = Action::Publish(stream.as_str());
    if !principal.may(deed) {
        return Err(ApiError::from(&AuthError::Scope(deed.to_string())));
    }
    keep_to_tenant(api, principal, stream).map_err(|denied| ApiError::from(&denied))?;
    principal.claim(&mut event).map_err(ApiError::forbidden_tenant)?;
    if let Some((TENANT, tenant)) = api.inner.bus.catalog().binding(stream) {
        event.set_tenant(tenant);
        if event.tenant() != Some(tenant) {
            return Err(ApiError::foreign_tenant(tenant));
        }
    }
    Ok((stream, event))
}

/// Keys of one tenant are not those of another, or one could learn of the other's events, and hold them up.
pub(crate) fn within_tenant(dedup: Dedup, event: &NewEvent, principal: &Principal) -> Dedup {
    let Some(tenant) = principal.tenant() else { return dedup };
    let within = |key: &str| Dedup::Key(format!("{}:{tenant}/{key}", tenant.len()));
    match (&dedup, &event.own_id) {
        // An empty key is refused as one.
        (Dedup::Key(key), _) if !key.is_empty() => within(key),
        (Dedup::OwnId, Some(id)) if !id.is_empty() => within(id),
        _ => dedup,
    }
}

/// How to recognise one event of a request. A key counts the places of the request itself, so that a client that mends
/// one event and sends all again finds the others recognised.
fn dedup_of(dedup: &Dedup, index: usize, is_single: bool) -> Dedup {
    match dedup {
        // An empty key is refused as one, or the batches of all who send one would be taken for the same.
        Dedup::Key(key) if !is_single && !key.is_empty() => Dedup::Key(format!("{key}/{index}")),
        other => other.clone(),
    }
}

fn refused(stream: &StreamName, error: &PublishError) -> ApiError {
    if let PublishError::Store(cause) = error {
        let source = std::error::Error::source(cause.as_ref()).map(ToString::to_string);
        tracing::debug!(stream = %stream, error = %cause, cause = source, "publish failed");
    }
    error.into()
}

fn item(result: &Result<Appended, ApiError>) -> Item {
    match result {
        Ok(appended) => Item::Accepted {
            id: appended.id.to_string(),
            event_id: String::from_utf8_lossy(&appended.event_id).into_owned(),
            duplicate: appended.duplicate,
        },
        Err(error) => Item::Refused { error: error.into() },
    }
}
