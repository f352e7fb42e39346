//! Publishing the events of a request: parsing, access per event, idempotency keys, and the results.

use std::fmt;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde::de::{Deserializer as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::auth::{Action, AuthError, Principal, TENANT};
use crate::bus::{Dedup, PublishError, PublishOptions};
use crate::event::{NewEvent, StreamName};
use crate::http::api::Api;
use crate::http::body;
use crate::http::middleware::authorize::require_tenant;
use crate::http::problem::{ApiError, ItemError};
use crate::store::{Appended, Durability};

/// `?dedup=id`, `?dedup_window=10m` and `?durability=replicated`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PublishParams {
    dedup: Option<String>,
    dedup_window: Option<String>,
    durability: Option<String>,
}

/// The result of one event.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum EventResultView {
    Accepted { id: String, event_id: String, duplicate: bool },
    Rejected { error: ItemError },
}

#[derive(Debug, Serialize)]
struct PublishResultsView {
    results: Vec<EventResultView>,
}

/// The events of one request, each parsed or rejected on its own.
struct EventBatch {
    events: Vec<Result<NewEvent, ApiError>>,
    /// Whether the body is one object. Then its error is the error of the request.
    is_single: bool,
}

/// Publishes the events of a request, each to the stream that `route` returns.
pub(super) async fn publish<'a>(
    api: &Api,
    params: &PublishParams,
    principal: &Principal,
    request: Request,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<Response, ApiError> {
    let _permit = api.limits().publishes.try_acquire().map_err(|_error| ApiError::too_many_in_flight())?;
    let (head, body) = request.into_parts();
    let options = PublishOptions { window: dedup_window(params)?, durability: durability(params)? };
    let dedup = dedup(params, &head.headers)?;
    let traceparent = head.headers.get("traceparent").and_then(|value| value.to_str().ok());
    let body = body::read(api, &head, body).await?;
    let mut batch = parse(&body, head.headers.get(CONTENT_TYPE), api.config().max_batch)?;
    if let Some(traceparent) = traceparent {
        batch.events.iter_mut().flatten().for_each(|event| event.set_traceparent(traceparent));
    }
    append(api, batch, principal, &dedup, options, route).await
}

fn dedup(params: &PublishParams, headers: &HeaderMap) -> Result<Dedup, ApiError> {
    let key = headers.get("idempotency-key").map(HeaderValue::to_str).transpose();
    let key = key.map_err(|_error| ApiError::bad_parameter("Idempotency-Key", "must be visible ASCII text"))?;
    match (params.dedup.as_deref(), key) {
        (None, None) => Ok(Dedup::Off),
        (None, Some(key)) => Ok(Dedup::Key(key.to_owned())),
        (Some("id"), None) => Ok(Dedup::OwnId),
        (Some("id"), Some(_)) => {
            Err(ApiError::bad_parameter("dedup", "must not be set together with the header Idempotency-Key"))
        }
        (Some(other), _) => Err(ApiError::bad_parameter("dedup", format!("must be `id`, not `{other}`"))),
    }
}

fn dedup_window(params: &PublishParams) -> Result<Option<Duration>, ApiError> {
    let parse = |text: &String| {
        let detail = "must be a time such as 10m or 24h, at least 1s";
        humantime_serde::re::humantime::parse_duration(text)
            .ok()
            .filter(|window| *window >= Duration::from_secs(1))
            .ok_or_else(|| ApiError::bad_parameter("dedup_window", detail))
    };
    params.dedup_window.as_ref().map(parse).transpose()
}

fn durability(params: &PublishParams) -> Result<Durability, ApiError> {
    let text = params.durability.as_deref();
    let durability = text.map(str::parse).transpose();
    // In a query, `+` encodes a space.
    let durability = durability.or_else(|_| text.map(|text| text.replace(' ', "+").parse()).transpose());
    durability.map(Option::unwrap_or_default).map_err(|detail: String| ApiError::bad_parameter("durability", detail))
}

fn parse(body: &Bytes, content_type: Option<&HeaderValue>, max_batch: usize) -> Result<EventBatch, ApiError> {
    let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_ndjson = content_type.contains("ndjson") || content_type.contains("jsonl");
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    match first {
        None => Err(ApiError::invalid_event("the body is empty; send a JSON object, an array of objects, or NDJSON")),
        Some(_) if is_ndjson => parse_ndjson(body, max_batch),
        Some(b'[') => parse_array(body, max_batch),
        Some(_) => {
            let event = NewEvent::parse(body.clone()).map_err(|error| {
                let hint = "; for several events send an array, or NDJSON with content-type application/x-ndjson";
                ApiError::invalid_event(format!("{error}{hint}"))
            });
            Ok(EventBatch { events: vec![event], is_single: true })
        }
    }
}

fn parse_ndjson(body: &Bytes, max_batch: usize) -> Result<EventBatch, ApiError> {
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
    Ok(EventBatch { events, is_single: false })
}

fn parse_array(body: &Bytes, max_batch: usize) -> Result<EventBatch, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let items = json.deserialize_seq(ArrayVisitor { max_items: max_batch + 1 });
    // Anything after the array would be lost silently.
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
    Ok(EventBatch { events: items.iter().enumerate().map(event).collect(), is_single: false })
}

/// Collects up to `max_items` of an array. Millions of tiny items would need many times the memory of the body.
struct ArrayVisitor {
    max_items: usize,
}

impl<'de> Visitor<'de> for ArrayVisitor {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while items.len() < self.max_items {
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
    let detail = format!("a request must have at most {max_batch} events (http.max_batch); send several requests");
    Err(ApiError::too_large("batch_too_large", detail))
}

/// The events of a request for one stream.
struct StreamEvents<'a> {
    stream: &'a StreamName,
    /// The index of each event in the request.
    indexes: Vec<usize>,
    events: Vec<(Dedup, NewEvent)>,
}

/// Appends the valid events, per stream, and returns a result for each event in the order of the request.
async fn append<'a>(
    api: &Api,
    batch: EventBatch,
    principal: &Principal,
    dedup: &Dedup,
    options: PublishOptions,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<Response, ApiError> {
    let is_single = batch.is_single;
    let mut results: Vec<Option<Result<Appended, ApiError>>> = Vec::with_capacity(batch.events.len());
    let mut by_stream: Vec<StreamEvents<'_>> = Vec::with_capacity(2);
    for (index, event) in batch.events.into_iter().enumerate() {
        match event.and_then(|event| authorize_event(api, principal, event, &route)) {
            Ok((stream, event)) => {
                let position = by_stream.iter().position(|known| known.stream == stream).unwrap_or_else(|| {
                    by_stream.push(StreamEvents { stream, indexes: Vec::new(), events: Vec::new() });
                    by_stream.len() - 1
                });
                let dedup = within_tenant(dedup_of_event(dedup, index, is_single), &event, principal);
                by_stream[position].indexes.push(index);
                by_stream[position].events.push((dedup, event));
                results.push(None);
            }
            Err(error) => results.push(Some(Err(error))),
        }
    }
    let mut accepted = 0_usize;
    for StreamEvents { stream, indexes, events } in by_stream {
        let published = api.services().bus.publish(stream, events, options).await;
        for (index, result) in indexes.into_iter().zip(published) {
            accepted += usize::from(result.is_ok());
            results[index] = Some(result.map_err(|error| log_failure(stream, &error)));
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
        api.count_rejected(error.code());
    }
    let view = PublishResultsView { results: results.iter().map(EventResultView::from).collect() };
    let body = serde_json::to_vec(&view).expect("a view is JSON");
    let content_type = (CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok((status, [content_type], body).into_response())
}

/// Checks that the principal may publish the event to its stream, and sets the tenant of the event.
///
/// An event gets the tenant of the principal, or else that of the stream.
pub(super) fn authorize_event<'a>(
    api: &Api,
    principal: &Principal,
    mut event: NewEvent,
    route: impl Fn(&NewEvent) -> &'a StreamName,
) -> Result<(&'a StreamName, NewEvent), ApiError> {
    let stream = route(&event);
    let action = Action::Publish(stream.as_str());
    if !principal.may(action) {
        return Err(ApiError::from(&AuthError::Scope(action.to_string())));
    }
    require_tenant(api, principal, stream).map_err(|error| ApiError::from(&error))?;
    principal.assign_tenant(&mut event).map_err(ApiError::forbidden_tenant)?;
    if let Some((TENANT, tenant)) = api.services().bus.catalog().binding(stream) {
        event.set_tenant(tenant);
        if event.tenant() != Some(tenant) {
            return Err(ApiError::foreign_tenant(tenant));
        }
    }
    Ok((stream, event))
}

/// Returns the idempotency key within the tenant of the principal.
///
/// With shared keys, one tenant could detect the events of another, and block them.
pub(super) fn within_tenant(dedup: Dedup, event: &NewEvent, principal: &Principal) -> Dedup {
    let Some(tenant) = principal.tenant() else { return dedup };
    let within = |key: &str| Dedup::Key(format!("{}:{tenant}/{key}", tenant.len()));
    match (&dedup, &event.own_id) {
        // Empty keys stay empty, so that the bus rejects them.
        (Dedup::Key(key), _) if !key.is_empty() => within(key),
        (Dedup::OwnId, Some(id)) if !id.is_empty() => within(id),
        _ => dedup,
    }
}

/// Returns the idempotency key of one event of a request.
///
/// It contains the index in the request. So a client that corrects one event can send the whole batch again, and the
/// other events are duplicates.
fn dedup_of_event(dedup: &Dedup, index: usize, is_single: bool) -> Dedup {
    match dedup {
        // Empty keys stay empty, so that the bus rejects them. Otherwise all batches with one would be duplicates.
        Dedup::Key(key) if !is_single && !key.is_empty() => Dedup::Key(format!("{key}/{index}")),
        other => other.clone(),
    }
}

fn log_failure(stream: &StreamName, error: &PublishError) -> ApiError {
    if let PublishError::Store(cause) = error {
        let source = std::error::Error::source(cause.as_ref()).map(ToString::to_string);
        tracing::debug!(stream = %stream, error = %cause, cause = source, "publish failed");
    }
    error.into()
}

impl From<&Result<Appended, ApiError>> for EventResultView {
    fn from(result: &Result<Appended, ApiError>) -> Self {
        match result {
            Ok(appended) => Self::Accepted {
                id: appended.id.to_string(),
                event_id: String::from_utf8_lossy(&appended.event_id).into_owned(),
                duplicate: appended.duplicate,
            },
            Err(error) => Self::Rejected { error: error.into() },
        }
    }
}
