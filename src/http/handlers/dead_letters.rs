//! Dead letters over HTTP: list, show, replay, discard.
//!
//! `{stream}` is a declared stream, for its own dead letters, or a stream of dead letters, for all that are in it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::USER_AGENT;
use axum::http::request::Parts;
use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::auth::{AuthError, Principal};
use crate::clock::since_epoch;
use crate::dead_letters::{
    BulkRequest, BulkResult, DeadLetterCursor, DeadLetterEntry, DeadLetterScope, FOREIGN, FillLevel, ReplayOptions,
    ReplayTarget, RequestedFilter, Selection, SharedStoreError,
};
use crate::event::Filter;
use crate::event::{Entry, EntryId, StreamName};
use crate::http::extract::{Query, Segment, Segments};
use crate::http::handlers::publish::read;
use crate::http::handlers::streams::{EventView, event};
use crate::http::middleware::large_response;
use crate::http::{Api, ApiError, Peer};
use crate::relay::Since;
use crate::store::StoreError;

/// How a client of ours names itself, so that the audit trail tells it from others.
pub const CLI_AGENT: &str = concat!("aurora-bus-cli/", env!("CARGO_PKG_VERSION"));

/// The most dead letters in one answer, and how many there are unless the request says otherwise.
const MAX_LIST: usize = 1_000;
const DEFAULT_LIST: usize = 100;
/// The most that one request replays or discards, and how many it does unless it says otherwise.
const MAX_BULK: usize = 5_000;
const DEFAULT_BULK: usize = 1_000;
/// The most ids in one request.
const MAX_IDS: usize = 500;

#[derive(Debug, Serialize)]
pub(crate) struct StreamsView {
    dead_letters: Vec<LevelView>,
}

/// A stream of dead letters.
#[derive(Debug, Serialize)]
pub(crate) struct LevelView {
    stream: String,
    /// The streams whose dead letters it holds.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    of: Vec<String>,
    length: u64,
    max_len: u64,
    first_id: Option<String>,
    last_id: Option<String>,
    /// In words, that it is filling up, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    alarm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
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

/// What to replay or discard. Unknown members are refused: a filter with a slip of the pen must not mean everything.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct BulkBody {
    group: Option<String>,
    reason: Option<String>,
    since: Option<String>,
    /// The tree itself.
    filter: Option<serde_json::Value>,
    ids: Option<Vec<String>>,
    /// Needed where nothing narrows the choice.
    all: bool,
    limit: Option<usize>,
    cursor: Option<String>,
    dry_run: bool,
    /// Replay only.
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

/// How to replay one.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ReplayBody {
    to: Option<String>,
    force: bool,
}

#[derive(Debug, Serialize)]
struct ListView {
    dead_letters: Vec<LetterView>,
    /// What to pass as `cursor` to go on; absent at the end. A page may be short, or empty, before the end.
    next: Option<String>,
}

/// A dead letter. What the bus did not write has `foreign` and no members but its id and entry.
#[derive(Debug, Serialize)]
pub(crate) struct LetterView {
    /// Its id in the stream of dead letters.
    id: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    foreign: bool,
    #[serde(flatten)]
    record: Option<RecordView>,
    /// The entry as it was, with the id it had.
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

/// What was done, or would be.
#[derive(Debug, Serialize)]
pub(crate) struct DoneView {
    dry_run: bool,
    matched: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    replayed: Option<u64>,
    /// Were in their stream already, by a replay that was broken off; they are not there twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    repeated: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    discarded: Option<u64>,
    /// Were asked for by id, or found, and are not there any more.
    gone: u64,
    refused: BTreeMap<&'static str, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<String>,
    by_group: BTreeMap<String, u64>,
    by_reason: BTreeMap<&'static str, u64>,
    first_id: Option<String>,
    last_id: Option<String>,
    audited: bool,
    /// What to pass as `cursor` to go on; absent when all is done.
    next: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct ReplayedView {
    /// The stream that has it again.
    stream: String,
    /// Its id there.
    id: String,
    /// Whether it was there already, by a replay that was broken off.
    repeated: bool,
    audited: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct DiscardedView {
    discarded: u64,
    audited: bool,
}

/// `GET /api/v1/dead-letters`: the streams of dead letters, and how full they are.
pub(crate) async fn streams(State(api): State<Api>, principal: Principal) -> Result<Json<StreamsView>, ApiError> {
    if principal.is_bounded() {
        return Err(ApiError::from(&AuthError::AllEntries));
    }
    let mut views = Vec::new();
    for (stream, of) in api.inner.dead_letters.streams() {
        let mut view = level(&api, &stream).await;
        view.of = of.iter().map(ToString::to_string).collect();
        views.push(view);
    }
    Ok(Json(StreamsView { dead_letters: views }))
}

/// How full the dead letters of a declared stream are.
pub(crate) async fn level_of(api: &Api, stream: &StreamName) -> Option<LevelView> {
    let dead_letter = api.inner.dead_letters.stream_of(stream)?;
    Some(level(api, &dead_letter).await)
}

async fn level(api: &Api, stream: &StreamName) -> LevelView {
    let found = api.inner.dead_letters.fill_level(stream).await;
    let error = found.as_ref().err().map(ToString::to_string);
    let level = found.unwrap_or(FillLevel { length: 0, max_len: 0, first_id: None, last_id: None, alarm: None });
    LevelView {
        stream: stream.to_string(),
        of: Vec::new(),
        length: level.length,
        max_len: level.max_len,
        first_id: level.first_id.map(|id| id.to_string()),
        last_id: level.last_id.map(|id| id.to_string()),
        alarm: level.alarm,
        error,
    }
}

/// `GET /api/v1/dead-letters/{stream}`: those that match, oldest first.
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
    let _reading = api.inner.reads.acquire().await;
    let page = api.inner.dead_letters.list(&scope, &selection, cursor, limit).await;
    let page = page.map_err(|error| ApiError::from(&error))?;
    let next = page.next.map(|next| next.to_string());
    large_response::json(&api, peer, &ListView { dead_letters: page.found.into_iter().map(letter).collect(), next })
}

/// `GET /api/v1/dead-letters/{stream}/{id}`
pub(crate) async fn show(
    State(api): State<Api>,
    Segments(name, id): Segments,
    principal: Principal,
) -> Result<Json<LetterView>, ApiError> {
    let scope = scope(&api, &name, &principal)?;
    let found = api.inner.dead_letters.get(&scope, entry_id(&id)?).await.map_err(|error| ApiError::from(&error))?;
    found.map(|found| Json(letter(found))).ok_or_else(|| ApiError::no_such_dead_letter(&id))
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
    let body: ReplayBody = json(&api, &head, body).await?;
    let scope = scope(&api, &name, &principal)?;
    let how = ReplayOptions { to: target(body.to.as_deref())?, force: body.force };
    let place = entry_id(&id)?;
    let found = api.inner.dead_letters.get(&scope, place).await.map_err(|error| ApiError::from(&error))?;
    let stream = found.and_then(|found| found.dead_letter).map(|letter| letter.stream.to_string());
    let actor = actor(&principal, peer, &head.headers);
    let done =
        api.inner.dead_letters.replay(&scope, &one(place), &how, &actor).await.map_err(|failure| failed(&failure))?;
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
        .inner
        .dead_letters
        .discard(&scope, &one(entry_id(&id)?), &actor)
        .await
        .map_err(|failure| failed(&failure))?;
    if done.done == 0 {
        return Err(ApiError::no_such_dead_letter(&id));
    }
    Ok(Json(DiscardedView { discarded: done.done, audited: done.is_audited }))
}

/// `POST /api/v1/dead-letters/{stream}/replay`: those that match, a bounded number of them.
pub(crate) async fn replay(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<DoneView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: BulkBody = json(&api, &head, body).await?;
    let scope = scope(&api, &name, &principal)?;
    let how = ReplayOptions { to: target(body.to.as_deref())?, force: body.force.unwrap_or(false) };
    let bulk = bulk(&api, &scope, body).await?;
    let _reading = api.inner.reads.acquire().await;
    let done = api.inner.dead_letters.replay(&scope, &bulk, &how, &actor(&principal, peer, &head.headers)).await;
    let done = done.map_err(|failure| failed(&failure))?;
    let (replayed, repeated) = (Some(done.done), Some(done.repeated));
    Ok(Json(DoneView { replayed, repeated, ..view(done, bulk.is_dry_run) }))
}

/// `POST /api/v1/dead-letters/{stream}/discard`: those that match, a bounded number of them.
pub(crate) async fn discard(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
    peer: Peer,
    request: Request,
) -> Result<Json<DoneView>, ApiError> {
    let (head, body) = request.into_parts();
    let body: BulkBody = json(&api, &head, body).await?;
    for (member, is_there) in [("to", body.to.is_some()), ("force", body.force.is_some())] {
        if is_there {
            return Err(ApiError::bad_parameter(member, "is for replays; what is discarded goes nowhere"));
        }
    }
    discard_bulk(&api, &name, body, &principal, &actor(&principal, peer, &head.headers)).await
}

/// `DELETE /api/v1/dead-letters/{stream}`: the same, by a query.
pub(crate) async fn discard_matching(
    State(api): State<Api>,
    Segment(name): Segment,
    Query(params): Query<DiscardParams>,
    principal: Principal,
    peer: Peer,
    headers: HeaderMap,
) -> Result<Json<DoneView>, ApiError> {
    let DiscardParams { group, reason, since, filter, all, limit, cursor, dry_run } = params;
    let filter = filter.map(|text| serde_json::from_str(&text)).transpose();
    let filter = filter.map_err(|error| ApiError::bad_parameter("filter", format!("`filter` is no JSON: {error}")))?;
    let body = BulkBody { group, reason, since, filter, all, limit, cursor, dry_run, ..BulkBody::default() };
    discard_bulk(&api, &name, body, &principal, &actor(&principal, peer, &headers)).await
}

async fn discard_bulk(
    api: &Api,
    name: &str,
    body: BulkBody,
    principal: &Principal,
    actor: &str,
) -> Result<Json<DoneView>, ApiError> {
    let scope = scope(api, name, principal)?;
    let bulk = bulk(api, &scope, body).await?;
    let _reading = api.inner.reads.acquire().await;
    let done = api.inner.dead_letters.discard(&scope, &bulk, actor).await.map_err(|failure| failed(&failure))?;
    let discarded = Some(done.done);
    Ok(Json(DoneView { discarded, ..view(done, bulk.is_dry_run) }))
}

fn view(done: BulkResult, dry_run: bool) -> DoneView {
    DoneView {
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

fn letter(found: DeadLetterEntry) -> LetterView {
    let DeadLetterEntry { entry, dead_letter } = found;
    let id = entry.id.to_string();
    let Some(letter) = dead_letter else {
        return LetterView { id, foreign: true, record: None, entry: event(&entry) };
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
    let entry = event(&Entry { id: letter.id, fields: letter.fields });
    LetterView { id, foreign: false, record: Some(record), entry }
}

fn one(id: EntryId) -> BulkRequest {
    BulkRequest {
        selection: Selection { ids: Some(vec![id]), ..Selection::default() },
        limit: 1,
        ..BulkRequest::default()
    }
}

fn scope(api: &Api, name: &str, principal: &Principal) -> Result<DeadLetterScope, ApiError> {
    let known = || api.inner.bus.catalog().names();
    let scope = api.inner.dead_letters.scope(name).ok_or_else(|| ApiError::no_such_stream(name, known()))?;
    Ok(DeadLetterScope { visible: principal.sight().clone(), ..scope })
}

async fn bulk(api: &Api, scope: &DeadLetterScope, body: BulkBody) -> Result<BulkRequest, ApiError> {
    let (group, reason, since) = (body.group.as_deref(), body.reason.as_deref(), body.since.as_deref());
    let filter = body.filter.map(|tree| tree.to_string());
    let mut selection = selection(api, scope, group, reason, since, filter).await?;
    if let Some(ids) = body.ids {
        if ids.len() > MAX_IDS {
            return Err(ApiError::bad_parameter(
                "ids",
                format!("must not be more than {MAX_IDS}: send several requests"),
            ));
        }
        let mut ids: Vec<EntryId> = ids.iter().map(|id| entry_id(id)).collect::<Result<_, _>>()?;
        ids.sort_unstable();
        ids.dedup();
        selection.ids = Some(ids);
    }
    if selection.is_everything() && !body.all && !body.dry_run {
        let detail =
            format!("is needed where no ids, group, reason (one of them may be {FOREIGN}), since or filter narrow it");
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
        group: group.map_err(|error| ApiError::bad_parameter("group", format!("is no group name: {error}")))?,
        reason: reason.map_err(|error: String| ApiError::bad_parameter("reason", error))?,
        after,
        filter: filter.map(requested_filter).transpose()?,
        ids: None,
    })
}

fn requested_filter(text: String) -> Result<RequestedFilter, ApiError> {
    let filter = Filter::parse(&text)
        .map_err(|error| ApiError::bad_parameter("filter", format!("`filter` is refused: {error}")))?;
    Ok(RequestedFilter { text, filter })
}

/// After which dead letter to begin.
async fn after(api: &Api, scope: &DeadLetterScope, since: &str) -> Result<EntryId, ApiError> {
    let bad = |detail: String| ApiError::bad_parameter("since", detail);
    let at = |ms: u64| EntryId::new(ms, 0).previous();
    match since.parse::<Since>().map_err(bad)? {
        Since::Earliest => Ok(EntryId::MIN),
        Since::Ago(ago) => Ok(at(u64::try_from(since_epoch().saturating_sub(ago).as_millis()).unwrap_or(u64::MAX))),
        Since::Time(time) => Ok(at(u64::try_from(time.as_millisecond()).unwrap_or(0))),
        Since::Positions(positions) => {
            let [position] = positions.as_slice() else {
                return Err(bad("must be one position: this is one stream".to_owned()));
            };
            let epoch = api.inner.store.epoch(&scope.dead_letter).await;
            if epoch.map_err(|error: StoreError| ApiError::from(&error))? != position.epoch {
                return Err(bad("is a position of an earlier life of the stream".to_owned()));
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

/// The body as JSON; the default where there is none.
async fn json<T: Default + serde::de::DeserializeOwned>(api: &Api, head: &Parts, body: Body) -> Result<T, ApiError> {
    let body = read(api, head, body).await?;
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    serde_json::from_slice(&body).map_err(|error| ApiError::bad_parameter("body", error.to_string()))
}

fn failed(failure: &SharedStoreError) -> ApiError {
    ApiError::from(&**failure)
}

/// Who asks: through what, and by which credentials; where none are asked for, from how near.
fn actor(principal: &Principal, peer: Peer, headers: &HeaderMap) -> String {
    let agent = headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    let through = if agent.starts_with("aurora-bus-cli/") { "cli" } else { "http" };
    if let Some(id) = principal.id() {
        return format!("{through}:{id}");
    }
    let near = match peer.0.ip().to_canonical() {
        address if address.is_loopback() => "loopback",
        IpAddr::V4(v4) if v4.is_private() || v4.is_link_local() => "private",
        IpAddr::V6(v6) if v6.is_unique_local() || v6.is_unicast_link_local() => "private",
        _ => "public",
    };
    format!("{through}:{near}")
}
