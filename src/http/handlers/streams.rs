//! Stream handlers: streams with their groups, and ranges of entries.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};

use crate::auth::{Action, Principal, TENANT};
use crate::bus::StreamCatalog;
use crate::clock::now_ms;
use crate::event::{Entry, EntryId, Filter, StreamName};
use crate::http::api::Api;
use crate::http::extract::{Peer, Query, Segment};
use crate::http::middleware::large_response;
use crate::http::problem::ApiError;
use crate::http::views::{EventView, FillLevelView};
use crate::store::{
    Balance, Consumption, GroupStatus, LostReason, Order, Range, FamilyMembers, Store, StoreError, StreamStatus,
};

/// The maximum time to wait for new entries.
const MAX_WAIT: Duration = Duration::from_secs(20);
/// The maximum number of entries in one response.
const MAX_LIMIT: usize = 1_000;
/// The time limit for skipping entries that the filter or the principal excludes.
const MAX_SEARCH_TIME: Duration = Duration::from_secs(2);
/// The size at which a response is full.
const MAX_RESPONSE_BYTES: usize = 8 * 1024 * 1024;
/// The entries of the first read, when their size is unknown, and the approximate size of later reads.
const FIRST_READ_ENTRIES: usize = 16;
const READ_BYTES: usize = 4 * 1024 * 1024;

/// A stream or a family.
///
/// Properties that cover all entries are absent for restricted principals.
#[derive(Debug, Serialize)]
pub(crate) struct StreamView {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<u64>,
    first_id: Option<String>,
    last_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries_added: Option<u64>,
    /// Entries that other programs removed. Absent if the store does not count them.
    #[serde(skip_serializing_if = "Option::is_none")]
    removed_by_others: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<GroupView>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letters: Option<FillLevelView>,
    /// Present if the name is that of a family.
    #[serde(skip_serializing_if = "Option::is_none")]
    family: Option<FamilyView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A family, as far as the principal may see it.
#[derive(Debug, Serialize)]
struct FamilyView {
    max_keys: usize,
    /// The number of members.
    #[serde(skip_serializing_if = "Option::is_none")]
    keys: Option<usize>,
    /// The names of the members, if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    streams: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each with its own property")]
struct GroupView {
    name: String,
    lag: Option<u64>,
    lag_known: bool,
    pending: u64,
    oldest_pending_seconds: Option<f64>,
    last_delivered_id: String,
    /// Whether the configuration declares the group.
    declared: bool,
    /// Whether the group is undeclared, blocks trimming, and has had no consumer for a long time.
    abandoned: bool,
    /// Entries published to the group since its account began, and their outcomes.
    published: Option<u64>,
    acknowledged: u64,
    filtered: u64,
    dead: u64,
    lost: u64,
    lost_by_reason: BTreeMap<&'static str, u64>,
    undelivered: Option<u64>,
    /// Whether the account adds up. Absent if this is unknown.
    balanced: Option<bool>,
    /// Published entries that are not accounted for. Negative if more are accounted for than were published.
    difference: Option<i64>,
    /// Whether external consumers settle entries too. Then `acknowledged` is the remainder of the other counters.
    consumed_outside: bool,
    consumers: Vec<ConsumerView>,
}

#[derive(Debug, Serialize)]
struct ConsumerView {
    name: String,
    pending: u64,
    idle_seconds: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct StreamsView {
    streams: Vec<StreamView>,
}

/// `?from=&to=&limit=&order=asc|desc&wait_ms=`, and the filter parameters of dashboards.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RangeParams {
    from: Option<String>,
    to: Option<String>,
    limit: Option<String>,
    order: Option<String>,
    wait_ms: Option<String>,
}

#[derive(Debug, Serialize)]
struct EventsView {
    events: Vec<EventView>,
    /// The `from` of the next request, or its `to` if the order is `desc`. Absent at the end of a backward range.
    next: Option<String>,
}

/// `GET /api/v1/streams`: the declared streams and families that the principal may read.
///
/// A stream that the store cannot describe has an `error`.
pub(crate) async fn list(State(api): State<Api>, principal: Principal) -> Json<StreamsView> {
    let mut streams = Vec::new();
    let catalog = api.services().bus.catalog();
    for name in catalog.streams().filter(|name| principal.may(Action::Read(name.as_str()))) {
        let mut stream = match api.services().store.describe(name).await {
            Ok(status) => stream_view(catalog, name, status),
            Err(error) => failed_view(catalog, name, &error),
        };
        stream.dead_letters = FillLevelView::of_source(&api, name).await;
        streams.push(stream.restricted_for(&principal));
    }
    for family_members in catalog.families().iter().filter(|family_members| principal.may(Action::Read(family_members.family().name()))) {
        streams.push(family_view(family_members, &principal, false));
    }
    Json(StreamsView { streams })
}

/// `GET /api/v1/streams/{stream}`: a stream, or a family with its members.
pub(crate) async fn show(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
) -> Result<Json<StreamView>, ApiError> {
    if let Some(family_members) = api.services().bus.catalog().families().named(&name) {
        return Ok(Json(family_view(family_members, &principal, true)));
    }
    let name = readable(&api, &name)?;
    let status = api.services().store.describe(&name).await.map_err(|error| ApiError::from(&error))?;
    let dead_letters = FillLevelView::of_source(&api, &name).await;
    let view = stream_view(api.services().bus.catalog(), &name, status);
    Ok(Json(StreamView { dead_letters, ..view }.restricted_for(&principal)))
}

/// `GET /api/v1/streams/{stream}/events`: a range, including both ends. Waits up to `wait_ms` for the first entry.
pub(crate) async fn events(
    State(api): State<Api>,
    Segment(name): Segment,
    Query(params): Query<RangeParams>,
    RawQuery(query): RawQuery,
    principal: Principal,
    peer: Peer,
) -> Result<Response, ApiError> {
    let name = readable(&api, &name)?;
    let filter = Filter::of_query(query.as_deref().unwrap_or_default());
    let filter = filter.map_err(|bad| ApiError::bad_parameter(bad.name, bad.to_string()))?;
    let range = range(&params)?;
    let limit = number(params.limit.as_deref(), "limit", 100)?.clamp(1, MAX_LIMIT as u64);
    let limit = usize::try_from(limit).unwrap_or(MAX_LIMIT);
    let wait = Duration::from_millis(number(params.wait_ms.as_deref(), "wait_ms", 0)?).min(MAX_WAIT);
    let store = &api.services().store;
    let failed = |error: StoreError| ApiError::from(&error);
    let mut search = RangeSearch::new(range, &principal, &filter);
    let reading = api.limits().reads.acquire().await;
    search.run(&**store, &name, limit).await.map_err(failed)?;
    drop(reading);
    let deadline = tokio::time::Instant::now() + wait;
    let can_wait = range.order == Order::Forward && range.to == EntryId::MAX && !wait.is_zero();
    // Each wait holds a blocking read of the store. Workers and dashboards need such reads too.
    let _permits = if can_wait && search.events.is_empty() {
        let own = api.limits().waits_per_key.try_acquire(peer.limit_key(&principal));
        let own = own.ok_or_else(ApiError::too_many_own_waits)?;
        Some((own, api.limits().waits.try_acquire().map_err(|_error| ApiError::too_many_waiting())?))
    } else {
        None
    };
    while search.events.is_empty() && can_wait && !api.is_draining() {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let Some(rest) = search.rest().filter(|_| !left.is_zero()) else { break };
        let after = rest.from.previous();
        let count = search.read_entries.min(limit);
        search.add(store.tail(&name, after, count, left.min(Duration::from_secs(1))).await.map_err(failed)?);
    }
    large_response::json(&api, peer, &EventsView { next: search.next(), events: search.events })
}

/// The matching entries of a range, read page by page.
struct RangeSearch<'a> {
    range: Range,
    principal: &'a Principal,
    filter: &'a Filter,
    events: Vec<EventView>,
    bytes: usize,
    /// The last entry that was read, whether it matched or not.
    last_read: Option<EntryId>,
    is_full: bool,
    /// The number of entries to read next, by the size of the previous ones.
    read_entries: usize,
}

impl<'a> RangeSearch<'a> {
    fn new(range: Range, principal: &'a Principal, filter: &'a Filter) -> Self {
        let (bytes, last_read, read_entries) = (0, None, FIRST_READ_ENTRIES);
        Self { range, principal, filter, events: Vec::new(), bytes, last_read, is_full: false, read_entries }
    }

    /// Reads `limit` entries, or more until one matches. Each read has as many entries as their size allows.
    async fn run(&mut self, store: &dyn Store, stream: &StreamName, limit: usize) -> Result<(), StoreError> {
        let until = tokio::time::Instant::now() + MAX_SEARCH_TIME;
        let mut read = 0;
        while let Some(rest) = self.rest() {
            let count = self.read_entries.min(limit - read);
            let entries = store.range(stream, rest, count).await?;
            let is_end = entries.len() < count;
            read += entries.len();
            self.add(entries);
            if is_end || self.is_full {
                break;
            }
            if read == limit {
                if !self.events.is_empty() || tokio::time::Instant::now() >= until {
                    break;
                }
                read = 0;
            }
        }
        Ok(())
    }

    fn add(&mut self, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let bytes: usize = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        let fitting = READ_BYTES / (bytes / entries.len()).max(1);
        self.read_entries = fitting.clamp(1, self.read_entries * 4);
        for entry in entries {
            if self.is_full {
                break;
            }
            self.last_read = Some(entry.id);
            if self.principal.sees(&entry) && self.filter.passes(&entry) {
                self.bytes += entry.fields.size_bytes();
                self.is_full = self.bytes > MAX_RESPONSE_BYTES;
                self.events.push(EventView::from(&entry));
            }
        }
    }

    /// Returns the unread part of the range, or `None` at its end.
    fn rest(&self) -> Option<Range> {
        let Range { from, to, order } = self.range;
        match (self.last_read, order) {
            (None, _) => Some(self.range),
            (Some(last), Order::Forward) => (last < to).then(|| Range { from: last.next(), to, order }),
            (Some(last), Order::Backward) => (last > from).then(|| Range { from, to: last.previous(), order }),
        }
    }

    /// Returns the start of the next request. A forward range always has one, because new entries may follow.
    fn next(&self) -> Option<String> {
        match (self.last_read, self.range.order) {
            (None, Order::Forward) => Some(self.range.from.to_string()),
            (None, Order::Backward) => None,
            (Some(last), Order::Forward) => Some(last.next().to_string()),
            (Some(last), Order::Backward) => (last > self.range.from).then(|| last.previous().to_string()),
        }
    }
}

/// Returns the readable stream with this name.
fn readable(api: &Api, name: &str) -> Result<StreamName, ApiError> {
    let catalog = api.services().bus.catalog();
    let stream: Option<StreamName> = name.parse().ok();
    stream.filter(|stream| catalog.is_readable(stream)).ok_or_else(|| ApiError::no_such_stream(name, catalog.names()))
}

fn range(params: &RangeParams) -> Result<Range, ApiError> {
    let order = match params.order.as_deref() {
        None | Some("asc") => Order::Forward,
        Some("desc") => Order::Backward,
        Some(other) => return Err(ApiError::bad_parameter("order", format!("must be `asc` or `desc`, not `{other}`"))),
    };
    let from = bound(params.from.as_deref(), "from", EntryId::MIN, 0)?;
    let to = bound(params.to.as_deref(), "to", EntryId::MAX, u64::MAX)?;
    Ok(Range { from, to, order })
}

/// Parses an entry id, or a time in milliseconds, which includes all entries of that time.
fn bound(text: Option<&str>, name: &str, default: EntryId, seq: u64) -> Result<EntryId, ApiError> {
    let Some(text) = text else { return Ok(default) };
    if let Ok(ms) = text.parse() {
        return Ok(EntryId::new(ms, seq));
    }
    text.parse().map_err(|_error| {
        let detail = format!("must be an entry id such as 1741076109120-0, or a time in milliseconds, not `{text}`");
        ApiError::bad_parameter(name, detail)
    })
}

fn number(text: Option<&str>, name: &str, default: u64) -> Result<u64, ApiError> {
    let Some(text) = text else { return Ok(default) };
    text.parse().map_err(|_error| ApiError::bad_parameter(name, format!("must be a number, not `{text}`")))
}

fn stream_view(catalog: &StreamCatalog, stream: &StreamName, status: Option<StreamStatus>) -> StreamView {
    let name = stream.to_string();
    let Some(status) = status else {
        return StreamView {
            name,
            length: Some(0),
            first_id: None,
            last_id: None,
            entries_added: Some(0),
            removed_by_others: None,
            groups: Some(Vec::new()),
            dead_letters: None,
            family: None,
            error: None,
        };
    };
    StreamView {
        name,
        length: Some(status.length),
        first_id: status.first_id.map(|id| id.to_string()),
        last_id: (status.last_id > EntryId::MIN).then(|| status.last_id.to_string()),
        entries_added: Some(status.entries_added),
        removed_by_others: status.removed_by_others,
        groups: Some(status.groups.iter().map(|group| group_view(catalog, stream, &status, group)).collect()),
        dead_letters: None,
        family: None,
        error: None,
    }
}

/// Returns the view of a family, with the members that the principal may read.
fn family_view(family_members: &FamilyMembers, principal: &Principal, with_streams: bool) -> StreamView {
    let family = family_members.family();
    let is_own = |stream: &StreamName| {
        let is_by_tenant = family.placeholder() == TENANT;
        principal.tenant().is_none_or(|tenant| !is_by_tenant || family.key_of(stream) == Some(tenant))
    };
    let is_shown = |stream: &StreamName| is_own(stream) && principal.may(Action::Read(stream.as_str()));
    let names = || family_members.members().into_iter().filter(is_shown).map(String::from).collect();
    let keys = (!principal.is_restricted()).then(|| family_members.len());
    let view = FamilyView { max_keys: family_members.max_keys(), keys, streams: with_streams.then(names) };
    StreamView {
        name: family.to_string(),
        length: None,
        first_id: None,
        last_id: None,
        entries_added: None,
        removed_by_others: None,
        groups: None,
        dead_letters: None,
        family: Some(view),
        error: None,
    }
}

impl StreamView {
    /// Removes properties that cover all entries if the principal is restricted.
    fn restricted_for(self, principal: &Principal) -> Self {
        if !principal.is_restricted() {
            return self;
        }
        Self { length: None, entries_added: None, removed_by_others: None, groups: None, dead_letters: None, ..self }
    }
}

fn failed_view(catalog: &StreamCatalog, name: &StreamName, error: &StoreError) -> StreamView {
    StreamView { error: Some(error.to_string()), ..stream_view(catalog, name, None) }
}

fn group_view(catalog: &StreamCatalog, name: &StreamName, stream: &StreamStatus, group: &GroupStatus) -> GroupView {
    let declared = catalog.consumption(name, &group.name);
    let is_abandoned = |after| group.is_abandoned(stream, after, now_ms());
    let abandoned = declared.is_none() && catalog.abandoned_after(name).is_some_and(is_abandoned);
    let consumption = declared.unwrap_or(Consumption::Outside);
    let balance = Balance::of(stream, group, consumption);
    let account = group.account.unwrap_or_default();
    let lag = group.undelivered.or(group.lag);
    GroupView {
        name: group.name.to_string(),
        lag,
        lag_known: lag.is_some(),
        pending: group.pending,
        oldest_pending_seconds: group.oldest_pending.map(age_seconds),
        last_delivered_id: group.last_delivered.to_string(),
        declared: declared.is_some(),
        abandoned,
        published: balance.published,
        acknowledged: balance.acknowledged,
        filtered: account.filtered,
        dead: account.dead,
        lost: account.lost.iter().sum(),
        lost_by_reason: LostReason::ALL.iter().map(|reason| (reason.as_str(), account.lost(*reason))).collect(),
        undelivered: balance.undelivered,
        balanced: balance.is_balanced(),
        difference: balance.difference,
        consumed_outside: consumption == Consumption::Outside,
        consumers: group
            .consumers
            .iter()
            .map(|consumer| ConsumerView {
                name: consumer.name.to_string(),
                pending: consumer.pending,
                idle_seconds: consumer.idle.as_secs_f64(),
            })
            .collect(),
    }
}

/// Returns the age of an entry by its id.
fn age_seconds(id: EntryId) -> f64 {
    Duration::from_millis(now_ms().saturating_sub(id.ms)).as_secs_f64()
}
