//! Dead-letter handlers: list, show, replay, discard.
//!
//! `{stream}` is a declared stream, for its own dead letters, or a stream of dead letters, for all of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::USER_AGENT;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::auth::{AuthError, Principal};
use crate::clock::since_epoch;
use crate::dead_letters::{
    BulkRequest, BulkResult, DeadLetterCursor, DeadLetterEntry, DeadLetterScope, FOREIGN, ReplayOptions, ReplayTarget,
    RequestedFilter, Selection, SharedStoreError,
};
use crate::event::{Entry, EntryId, Filter};
use crate::http::api::Api;
use crate::http::body::read_json_or_default;
use crate::http::extract::{Peer, Query, Segment, Segments};
use crate::http::middleware::large_response;
use crate::http::problem::ApiError;
use crate::http::views::{EventView, FillLevelView};
use crate::relay::Since;
use crate::store::StoreError;

/// The user agent of the command line. The audit trail records it as `cli`.
pub const CLI_AGENT: &str = concat!("aurora-bus-cli/", env!("CARGO_PKG_VERSION"));

/// The maximum and default number of dead letters in one response.
const MAX_LIST: usize = 1_000;
const DEFAULT_LIST: usize = 100;
/// The maximum and default number of dead letters that one request replays or discards.
const MAX_BULK: usize = 5_000;
const DEFAULT_BULK: usize = 1_000;
/// The maximum number of ids in one request.
const MAX_IDS: usize = 500;

#[derive(Debug, Serialize)]
pub(crate) struct DeadLetterStreamsView {
    dead_letters: Vec<FillLevelView>,
}

/// `?group=&reason=&since=&filter=&limit=&cursor=`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ListParams {
    group: Option<String>,
    reason: Option<String>,
    since: Option<String>,
    filter: Option<String>,
    limit: Option<usize>,
    cursor: Option<String>,
}

/// The dead letters to replay or discard. A misspelled filter must not select all, so unknown properties are rejected.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct BulkBody {
    group: Option<String>,
    reason: Option<String>,
    since: Option<String>,
    /// The filter as JSON, not as text.
    filter: Option<serde_json::Value>,
    ids: Option<Vec<String>>,
    /// Required if no other property narrows the selection.
    all: bool,
    limit: Option<usize>,
    cursor: Option<String>,
    dry_run: bool,
    /// Allowed for replays only, like `force`.
    to: Option<String>,
    force: Option<bool>,
}

/// `?group=&reason=&since=&filter=&all=&limit=&cursor=&dry_run=`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct DiscardParams {
    group: Option<String>,
    reason: Option<String>,
    since: Option<String>,
    filter: Option<String>,
    all: bool,
    limit: Option<usize>,
    cursor: Option<String>,
    dry_run: bool,
}

/// The options of a replay.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ReplayBody {
    to: Option<String>,
    force: bool,
}

#[derive(Debug, Serialize)]
struct ListView {
    dead_letters: Vec<DeadLetterView>,
    /// The `cursor` of the next request. Absent at the end. Earlier pages may be short or empty.
    next: Option<String>,
}

/// A dead letter. One that the bus did not write has only `id`, `foreign` and `entry`.
#[derive(Debug, Serialize)]
pub(crate) struct DeadLetterView {
    /// The id in the stream of dead letters.
    id: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    foreign: bool,
    #[serde(flatten)]
    record: Option<RecordView>,
    /// The original entry with its original id.
    entry: EventView,
}

#[derive(Debug, Serialize)]
struct RecordView {
    stream: String,
    group: String,
    reason: &'static str,
    error: String,
    attempts: u32,
    replays: u32,
    first_failure: String,
    last_failure: String,
}

/// The result of a bulk action, or of its dry run.
#[derive(Debug, Serialize)]
pub(crate) struct BulkResultView {
    dry_run: bool,
    matched: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    replayed: Option<u64>,
    /// Dead letters that an interrupted replay had appended already. They are not appended twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    repeated: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    discarded: Option<u64>,
    /// Selected dead letters that no longer exist.
    gone: u64,
    refused: BTreeMap<&'static str, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
    by_group: BTreeMap<String, u64>,
    by_reason: BTreeMap<&'static str, u64>,
    first_id: Option<String>,
    last_id: Option<String>,
    audited: bool,
    /// The `cursor` of the next request. Absent at the end.
    next: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ReplayedView {
    /// The stream with the new entry.
    stream: String,
    /// The id of the new entry.
    id: String,
    /// Whether an interrupted replay had appended the entry already.
    repeated: bool,
    audited: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct DiscardedView {
    discarded: u64,
    audited: bool,
}

/// `GET /api/v1/dead-letters`: the streams of dead letters with their fill levels.
pub(crate) async fn streams(
    State(api): State<Api>,
    principal: Principal,
) -> Result<Json<DeadLetterStreamsView>, ApiError> {
    if principal.is_restricted() {
        return Err(ApiError::from(&AuthError::AllEntries));
    }
    let mut views = Vec::new();
    for (stream, of) in api.services().dead_letters.streams() {
        let mut view = FillLevelView::of_stream(&api, &stream).await;
        view.of = of.iter().map(ToString::to_string).collect();
        views.push(view);
    }
    Ok(Json(DeadLetterStreamsView { dead_letters: views }))
}

/// `GET /api/v1/dead-letters/{stream}`: the matching dead letters, oldest first.
pub(crate) async fn list(
    State(api): State<Api>,
    Segment(name): Segment,
    Query(params): Query<ListParams>,
    principal: Principal,
    peer: Peer,
) -> Result<Response, ApiError> {
    let scope = scope(&api, &name, &principal)?;
    let (group, reason, since) = (params.group.as_deref(), params.reason.as_deref(), params.since.as_deref());
    let selection = selection(&api, &scope, group, reason, since, params.filter).await?;
    let cursor = cursor(params.cursor.as_deref())?;
    let limit = params.limit.unwrap_or(DEFAULT_LIST).clamp(1, MAX_LIST);
    let _permit = api.limits().reads.acquire().await;
    let page = api.services().dead_letters.list(&scope, &selection, cursor, limit).await;
    let page = page.map_err(|error| ApiError::from(&error))?;
    let next = page.next.map(|next| next.to_string());
    large_response::json(
        &api,
        peer,
        &ListView { dead_letters: page.found.into_iter().map(dead_letter_view).collect(), next },
    )
}

/// `GET /api/v1/dead-letters/{stream}/{id}`
pub(crate) async fn show(
    State(api): State<Api>,
    Segments(name, id): Segments,
    principal: Principal,
) -> Result<Json<DeadLetterView>, ApiError> {
    let scope = scope(&api, &name, &principal)?;
    let found =
        api.services().dead_letters.get(&scope, entry_id(&id)?).await.map_err(|error| ApiError::from(&error))?;
    found.map(|found| Json(dead_letter_view(found))).ok_or_else(|| ApiError::no_such_dead_letter(&id))
}

/// `POST /api/v1/dead-letters/{stream}/{id}/replay`
pub(crate) async fn replay_one(
    State(api): State<Api>,
    Segments(name, id): Segments,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<ReplayedView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: ReplayBody = read_json_or_default(&api, &head, body).await?;
    let scope = scope(&api, &name, &principal)?;
    let options = ReplayOptions { to: target(body.to.as_deref())?, force: body.force };
    let dead_letter_id = entry_id(&id)?;
    let found =
        api.services().dead_letters.get(&scope, dead_letter_id).await.map_err(|error| ApiError::from(&error))?;
    let stream = found.and_then(|found| found.dead_letter).map(|dead_letter| dead_letter.stream.to_string());
    let actor = actor(&principal, peer, &head.headers);
    let done = api
        .services()
        .dead_letters
        .replay(&scope, &only(dead_letter_id), &options, &actor)
        .await
        .map_err(|failure| failed(&failure))?;
    if let (Some((code, _)), Some(refusal)) = (done.refused.first_key_value(), &done.refusal) {
        return Err(ApiError::not_replayable(code, refusal));
    }
    match (stream, done.new_id) {
        (Some(stream), Some(new)) => {
            let repeated = done.repeated > 0;
            Ok(Json(ReplayedView { stream, id: new.to_string(), repeated, audited: done.is_audited }))
        }
        _ => Err(ApiError::no_such_dead_letter(&id)),
    }
}

/// `DELETE /api/v1/dead-letters/{stream}/{id}`
pub(crate) async fn discard_one(
    State(api): State<Api>,
    Segments(name, id): Segments,
    principal: Principal,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Json<DiscardedView>, ApiError> {
    let scope = scope(&api, &name, &principal)?;
    let actor = actor(&principal, peer, &headers);
    let done = api
        .services()
        .dead_letters
        .discard(&scope, &only(entry_id(&id)?), &actor)
        .await
        .map_err(|failure| failed(&failure))?;
    if done.done == 0 {
        return Err(ApiError::no_such_dead_letter(&id));
    }
    Ok(Json(DiscardedView { discarded: done.done, audited: done.is_audited }))
}

/// `POST /api/v1/dead-letters/{stream}/replay`: replays the matching dead letters, up to `limit`.
pub(crate) async fn replay(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<BulkResultView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: BulkBody = read_json_or_default(&api, &head, body).await?;
    let scope = scope(&api, &name, &principal)?;
    let options = ReplayOptions { to: target(body.to.as_deref())?, force: body.force.unwrap_or(false) };
    let bulk = bulk(&api, &scope, body).await?;
    let _permit = api.limits().reads.acquire().await;
    let done =
        api.services().dead_letters.replay(&scope, &bulk, &options, &actor(&principal, peer, &head.headers)).await;
    let done = done.map_err(|failure| failed(&failure))?;
    let (replayed, repeated) = (Some(done.done), Some(done.repeated));
    Ok(Json(BulkResultView { replayed, repeated, ..bulk_result_view(done, bulk.is_dry_run) }))
}

/// `POST /api/v1/dead-letters/{stream}/discard`: discards the matching dead letters, up to `limit`.
pub(crate) async fn discard(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<BulkResultView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: BulkBody = read_json_or_default(&api, &head, body).await?;
    for (property, is_present) in [("to", body.to.is_some()), ("force", body.force.is_some())] {
        if is_present {
            return Err(ApiError::bad_parameter(property, "is allowed for replays only"));
        }
    }
    discard_bulk(&api, &name, body, &principal, &actor(&principal, peer, &head.headers)).await
}

/// `DELETE /api/v1/dead-letters/{stream}`: discards like `discard`, with parameters in the query.
pub(crate) async fn discard_matching(
    State(api): State<Api>,
    Segment(name): Segment,
    Query(params): Query<DiscardParams>,
    principal: Principal,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Json<BulkResultView>, ApiError> {
    let DiscardParams { group, reason, since, filter, all, limit, cursor, dry_run } = params;
    let filter = filter.map(|text| serde_json::from_str(&text)).transpose();
    let filter = filter.map_err(|error| ApiError::bad_parameter("filter", format!("`filter` is not JSON: {error}")))?;
    let body = BulkBody { group, reason, since, filter, all, limit, cursor, dry_run, ..BulkBody::default() };
    discard_bulk(&api, &name, body, &principal, &actor(&principal, peer, &headers)).await
}

async fn discard_bulk(
    api: &Api,
    name: &str,
    body: BulkBody,
    principal: &Principal,
    actor: &str,
) -> Result<Json<BulkResultView>, ApiError> {
    let scope = scope(api, name, principal)?;
    let bulk = bulk(api, &scope, body).await?;
    let _permit = api.limits().reads.acquire().await;
    let done = api.services().dead_letters.discard(&scope, &bulk, actor).await.map_err(|failure| failed(&failure))?;
    let discarded = Some(done.done);
    Ok(Json(BulkResultView { discarded, ..bulk_result_view(done, bulk.is_dry_run) }))
}

fn bulk_result_view(done: BulkResult, dry_run: bool) -> BulkResultView {
    BulkResultView {
        dry_run,
        matched: done.matched,
        replayed: None,
        repeated: None,
        discarded: None,
        gone: done.missing,
        refused: done.refused,
        refusal: done.refusal,
        by_group: done.by_group,
        by_reason: done.by_reason,
        first_id: done.first_id.map(|id| id.to_string()),
        last_id: done.last_id.map(|id| id.to_string()),
        audited: done.is_audited,
        next: done.next.map(|next| next.to_string()),
    }
}

fn dead_letter_view(found: DeadLetterEntry) -> DeadLetterView {
    let DeadLetterEntry { entry, dead_letter } = found;
    let id = entry.id.to_string();
    let Some(letter) = dead_letter else {
        return DeadLetterView { id, foreign: true, record: None, entry: EventView::from(&entry) };
    };
    let record = RecordView {
        stream: letter.stream.to_string(),
        group: letter.group.to_string(),
        reason: letter.reason.as_str(),
        error: letter.error,
        attempts: letter.attempts,
        replays: letter.replays,
        first_failure: format!("{:.3}", letter.first_failure),
        last_failure: format!("{:.3}", letter.last_failure),
    };
    let entry = EventView::from(&Entry { id: letter.id, fields: letter.fields });
    DeadLetterView { id, foreign: false, record: Some(record), entry }
}

fn only(id: EntryId) -> BulkRequest {
    BulkRequest {
        selection: Selection { ids: Some(vec![id]), ..Selection::default() },
        limit: 1,
        ..BulkRequest::default()
    }
}

fn scope(api: &Api, name: &str, principal: &Principal) -> Result<DeadLetterScope, ApiError> {
    let known = || api.services().bus.catalog().names();
    let scope = api.services().dead_letters.scope(name).ok_or_else(|| ApiError::no_such_stream(name, known()))?;
    Ok(DeadLetterScope { visible: principal.filter().clone(), ..scope })
}

async fn bulk(api: &Api, scope: &DeadLetterScope, body: BulkBody) -> Result<BulkRequest, ApiError> {
    let (group, reason, since) = (body.group.as_deref(), body.reason.as_deref(), body.since.as_deref());
    let filter = body.filter.map(|tree| tree.to_string());
    let mut selection = selection(api, scope, group, reason, since, filter).await?;
    if let Some(ids) = body.ids {
        if ids.len() > MAX_IDS {
            return Err(ApiError::bad_parameter(
                "ids",
                format!("must be at most {MAX_IDS} ids; send several requests"),
            ));
        }
        let mut ids: Vec<EntryId> = ids.iter().map(|id| entry_id(id)).collect::<Result<_, _>>()?;
        ids.sort_unstable();
        ids.dedup();
        selection.ids = Some(ids);
    }
    if selection.is_everything() && !body.all && !body.dry_run {
        let detail = format!("is required without ids, group, reason (such as {FOREIGN}), since or filter");
        return Err(ApiError::bad_parameter("all", detail));
    }
    let limit = body.limit.unwrap_or(DEFAULT_BULK).clamp(1, MAX_BULK);
    Ok(BulkRequest { selection, cursor: cursor(body.cursor.as_deref())?, limit, is_dry_run: body.dry_run })
}

async fn selection(
    api: &Api,
    scope: &DeadLetterScope,
    group: Option<&str>,
    reason: Option<&str>,
    since: Option<&str>,
    filter: Option<String>,
) -> Result<Selection, ApiError> {
    let group = group.map(str::parse).transpose();
    let reason = reason.map(str::parse).transpose();
    let after = match since {
        Some(since) => after(api, scope, since).await?,
        None => EntryId::MIN,
    };
    Ok(Selection {
        group: group.map_err(|error| ApiError::bad_parameter("group", format!("is not a group name: {error}")))?,
        reason: reason.map_err(|error: String| ApiError::bad_parameter("reason", error))?,
        after,
        filter: filter.map(requested_filter).transpose()?,
        ids: None,
    })
}

fn requested_filter(text: String) -> Result<RequestedFilter, ApiError> {
    let filter = Filter::parse(&text)
        .map_err(|error| ApiError::bad_parameter("filter", format!("`filter` is not valid: {error}")))?;
    Ok(RequestedFilter { text, filter })
}

/// Returns the id after which the selection begins.
async fn after(api: &Api, scope: &DeadLetterScope, since: &str) -> Result<EntryId, ApiError> {
    let bad = |detail: String| ApiError::bad_parameter("since", detail);
    let at = |ms: u64| EntryId::new(ms, 0).previous();
    match since.parse::<Since>().map_err(bad)? {
        Since::Earliest => Ok(EntryId::MIN),
        Since::Ago(ago) => Ok(at(u64::try_from(since_epoch().saturating_sub(ago).as_millis()).unwrap_or(u64::MAX))),
        Since::Time(time) => Ok(at(u64::try_from(time.as_millisecond()).unwrap_or(0))),
        Since::Positions(positions) => {
            let [position] = positions.as_slice() else {
                return Err(bad("must be one position, because this is one stream".to_owned()));
            };
            let epoch = api.services().store.epoch(&scope.dead_letter).await;
            if epoch.map_err(|error: StoreError| ApiError::from(&error))? != position.epoch {
                return Err(bad("is a position of an earlier epoch of the stream".to_owned()));
            }
            Ok(position.id)
        }
    }
}

fn cursor(text: Option<&str>) -> Result<DeadLetterCursor, ApiError> {
    let cursor = text.map(str::parse).transpose();
    Ok(cursor.map_err(|error: String| ApiError::bad_parameter("cursor", error))?.unwrap_or_default())
}

fn target(text: Option<&str>) -> Result<ReplayTarget, ApiError> {
    let target = text.map(str::parse).transpose();
    Ok(target.map_err(|error: String| ApiError::bad_parameter("to", error))?.unwrap_or_default())
}

fn entry_id(text: &str) -> Result<EntryId, ApiError> {
    text.parse().map_err(|error: crate::event::InvalidEntryId| ApiError::bad_parameter("id", error.to_string()))
}

fn failed(failure: &SharedStoreError) -> ApiError {
    ApiError::from(&**failure)
}

/// Returns the actor for the audit trail: the program, and the principal or the kind of network.
fn actor(principal: &Principal, peer: Peer, headers: &HeaderMap) -> String {
    let agent = headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    let program = if agent.starts_with("aurora-bus-cli/") { "cli" } else { "http" };
    if let Some(id) = principal.id() {
        return format!("{program}:{id}");
    }
    let network = match peer.0.ip().to_canonical() {
        address if address.is_loopback() => "loopback",
        IpAddr::V4(v4) if v4.is_private() || v4.is_link_local() => "private",
        IpAddr::V6(v6) if v6.is_unique_local() || v6.is_unicast_link_local() => "private",
        _ => "public",
    };
    format!("{program}:{network}")
}
