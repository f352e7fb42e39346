//! Streams, groups and ranges of entries, as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::auth::{Action, Principal, TENANT};
use crate::bus::StreamCatalog;
use crate::clock::now_ms;
use crate::event::Filter;
use crate::event::{Entry, EntryId, StreamName, field};
use crate::http::extract::{Query, Segment};
use crate::http::limit_key;
use crate::http::middleware::large_response;
use crate::http::{Api, ApiError, Peer};
use crate::store::{
    Balance, Consumption, GroupStatus, LostReason, Order, Range, Roster, Store, StoreError, StreamStatus,
};

/// The longest time a reader may wait for new entries.
const MAX_WAIT: Duration = Duration::from_secs(20);
/// The most entries in one answer.
const MAX_LIMIT: usize = 1_000;
/// How long entries are looked through that don't pass, or may not be shown to whoever asks, until one is found.
const MAX_SEARCH: Duration = Duration::from_secs(2);
/// Bytes of an answer after which no further entry is added.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// How many entries are read at first, when their size is not known yet, and about how many bytes a read should have then.
const FIRST_READ: usize = 16;
const READ_BYTES: usize = 4 * 1024 * 1024;

/// A stream as callers see it.
#[derive(Debug, Serialize)]
pub(crate) struct StreamView {
    name: String,
    /// Of all entries, like everything here that may be absent: not shown to those who may see some of them alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<u64>,
    first_id: Option<String>,
    last_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries_added: Option<u64>,
    /// Entries that others than the bus removed; absent where no one counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    removed_by_others: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    groups: Option<Vec<GroupView>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_letters: Option<crate::http::handlers::dead_letters::LevelView>,
    /// Where the name is that of a family of streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    family: Option<FamilyView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// A family, as far as whoever asks may see it.
#[derive(Debug, Serialize)]
struct FamilyView {
    max_keys: usize,
    /// How many streams it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    keys: Option<usize>,
    /// Their names, where they are asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    streams: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each with its own name in the answer")]
struct GroupView {
    name: String,
    lag: Option<u64>,
    lag_known: bool,
    pending: u64,
    oldest_pending_seconds: Option<f64>,
    last_delivered_id: String,
    /// Whether the configuration names it.
    declared: bool,
    /// Whether it is not declared, keeps old entries from being trimmed, and has had no consumer for a long time.
    abandoned: bool,
    /// Entries published to the group since its account began, and what became of them.
    published: Option<u64>,
    acknowledged: u64,
    filtered: u64,
    dead: u64,
    lost: u64,
    lost_by_reason: BTreeMap<&'static str, u64>,
    undelivered: Option<u64>,
    /// Whether all of that adds up; absent while it can't be told.
    balanced: Option<bool>,
    /// Published and nowhere to be found; negative where more is found than was published.
    difference: Option<i64>,
    /// Whether consumers outside of the daemon settle entries as well: then `acknowledged` is what is left over.
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

/// `?from=&to=&limit=&order=asc|desc&wait_ms=`, and what filters as for dashboards
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
    /// What to pass as `from` (as `to` when the order is `desc`) to go on; absent at the end of a backward range.
    next: Option<String>,
}

/// An entry as callers see it. `data` is the payload as JSON; a payload that is none is in `data_text`, or, where it
/// is not even text, in `data_hex`.
#[derive(Debug, Serialize)]
pub(crate) struct EventView {
    pub(crate) id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_hex: Option<String>,
    /// Every other field, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) fields: Vec<(String, String)>,
}

/// `GET /api/v1/streams`: every declared stream that may be read, and every family. One that can't be read now tells its error in its
/// place.
pub(crate) async fn list(State(api): State<Api>, principal: Principal) -> Json<StreamsView> {
    let mut streams = Vec::new();
    let catalogue = api.inner.bus.catalog();
    for name in catalogue.streams().filter(|name| principal.may(Action::Read(name.as_str()))) {
        let mut stream = match api.inner.store.describe(name).await {
            Ok(status) => view(catalogue, name, status),
            Err(error) => failed(catalogue, name, &error),
        };
        stream.dead_letters = crate::http::handlers::dead_letters::level_of(&api, name).await;
        streams.push(stream.for_eyes_of(&principal));
    }
    for roster in catalogue.families().iter().filter(|roster| principal.may(Action::Read(roster.family().name()))) {
        streams.push(family(roster, &principal, false));
    }
    Json(StreamsView { streams })
}

/// `GET /api/v1/streams/{stream}`; with a family's name, the streams that it has.
pub(crate) async fn show(
    State(api): State<Api>,
    Segment(name): Segment,
    principal: Principal,
) -> Result<Json<StreamView>, ApiError> {
    if let Some(roster) = api.inner.bus.catalog().families().named(&name) {
        return Ok(Json(family(roster, &principal, true)));
    }
    let name = readable(&api, &name)?;
    let status = api.inner.store.describe(&name).await.map_err(|error| ApiError::from(&error))?;
    let dead_letters = crate::http::handlers::dead_letters::level_of(&api, &name).await;
    let view = view(api.inner.bus.catalog(), &name, status);
    Ok(Json(StreamView { dead_letters, ..view }.for_eyes_of(&principal)))
}

/// `GET /api/v1/streams/{stream}/events`: a range, both ends included; with `wait_ms` waits for the first entry.
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
    let store = &api.inner.store;
    let failed = |error: StoreError| ApiError::from(&error);
    let mut found = Answer::new(range, &principal, &filter);
    let reading = api.inner.reads.acquire().await;
    found.search(&**store, &name, limit).await.map_err(failed)?;
    drop(reading);
    let deadline = tokio::time::Instant::now() + wait;
    let can_wait = range.order == Order::Forward && range.to == EntryId::MAX && !wait.is_zero();
    // Each one that waits holds a blocking read of the store, of which workers and dashboards need theirs.
    let _waiting = if can_wait && found.events.is_empty() {
        let own = api
            .inner
            .waits_of_each
            .try_acquire(limit_key(&principal, peer))
            .ok_or_else(ApiError::too_many_own_waits)?;
        Some((own, api.inner.waits.try_acquire().map_err(|_error| ApiError::too_many_waiting())?))
    } else {
        None
    };
    while found.events.is_empty() && can_wait && !api.is_draining() {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let Some(rest) = found.rest().filter(|_| !left.is_zero()) else { break };
        let after = rest.from.previous();
        let wanted = found.at_a_time.min(limit);
        found.add(store.tail(&name, after, wanted, left.min(Duration::from_secs(1))).await.map_err(failed)?);
    }
    large_response::json(&api, peer, &EventsView { next: found.next(), events: found.events })
}

/// What was found of a range so far.
struct Answer<'a> {
    range: Range,
    principal: &'a Principal,
    filter: &'a Filter,
    events: Vec<EventView>,
    bytes: usize,
    /// The last entry that was looked at, shown or not.
    seen: Option<EntryId>,
    is_full: bool,
    /// How many entries to read next, by the size of those before.
    at_a_time: usize,
}

impl<'a> Answer<'a> {
    fn new(range: Range, principal: &'a Principal, filter: &'a Filter) -> Self {
        let (bytes, seen, at_a_time) = (0, None, FIRST_READ);
        Self { range, principal, filter, events: Vec::new(), bytes, seen, is_full: false, at_a_time }
    }

    /// Reads page after page of `limit` entries, as many at a time as their size allows, until something is found.
    async fn search(&mut self, store: &dyn Store, stream: &StreamName, limit: usize) -> Result<(), StoreError> {
        let until = tokio::time::Instant::now() + MAX_SEARCH;
        let mut looked_at = 0;
        while let Some(rest) = self.rest() {
            let wanted = self.at_a_time.min(limit - looked_at);
            let entries = store.range(stream, rest, wanted).await?;
            let is_end = entries.len() < wanted;
            looked_at += entries.len();
            self.add(entries);
            if is_end || self.is_full {
                break;
            }
            if looked_at == limit {
                if !self.events.is_empty() || tokio::time::Instant::now() >= until {
                    break;
                }
                looked_at = 0;
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
        self.at_a_time = fitting.clamp(1, self.at_a_time * 4);
        for entry in entries {
            if self.is_full {
                break;
            }
            self.seen = Some(entry.id);
            if self.principal.sees(&entry) && self.filter.passes(&entry) {
                self.bytes += entry.fields.size_bytes();
                self.is_full = self.bytes > MAX_ANSWER_BYTES;
                self.events.push(event(&entry));
            }
        }
    }

    /// What of the range was not looked at; nothing at its end.
    fn rest(&self) -> Option<Range> {
        let Range { from, to, order } = self.range;
        match (self.seen, order) {
            (None, _) => Some(self.range),
            (Some(seen), Order::Forward) => (seen < to).then(|| Range { from: seen.next(), to, order }),
            (Some(seen), Order::Backward) => (seen > from).then(|| Range { from, to: seen.previous(), order }),
        }
    }

    /// Where to go on: after the end too when the order is forward, since more may come.
    fn next(&self) -> Option<String> {
        match (self.seen, self.range.order) {
            (None, Order::Forward) => Some(self.range.from.to_string()),
            (None, Order::Backward) => None,
            (Some(seen), Order::Forward) => Some(seen.next().to_string()),
            (Some(seen), Order::Backward) => (seen > self.range.from).then(|| seen.previous().to_string()),
        }
    }
}

/// A stream that may be read, by its name in the path.
fn readable(api: &Api, name: &str) -> Result<StreamName, ApiError> {
    let catalogue = api.inner.bus.catalog();
    let stream: Option<StreamName> = name.parse().ok();
    stream
        .filter(|stream| catalogue.is_readable(stream))
        .ok_or_else(|| ApiError::no_such_stream(name, catalogue.names()))
}

fn range(params: &RangeParams) -> Result<Range, ApiError> {
    let order = match params.order.as_deref() {
        None | Some("asc") => Order::Forward,
        Some("desc") => Order::Backward,
        Some(other) => return Err(ApiError::bad_parameter("order", format!("must be asc or desc, not `{other}`"))),
    };
    let from = bound(params.from.as_deref(), "from", EntryId::MIN, 0)?;
    let to = bound(params.to.as_deref(), "to", EntryId::MAX, u64::MAX)?;
    Ok(Range { from, to, order })
}

/// An entry id, or a time in milliseconds that stands for all its entries.
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

fn view(catalogue: &StreamCatalog, stream: &StreamName, status: Option<StreamStatus>) -> StreamView {
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
        groups: Some(status.groups.iter().map(|one| group(catalogue, stream, &status, one)).collect()),
        dead_letters: None,
        family: None,
        error: None,
    }
}

/// A family; its streams as far as they may be seen.
fn family(roster: &Roster, principal: &Principal, with_streams: bool) -> StreamView {
    let family = roster.family();
    let is_own = |stream: &StreamName| {
        let is_by_tenant = family.placeholder() == TENANT;
        principal.tenant().is_none_or(|tenant| !is_by_tenant || family.key_of(stream) == Some(tenant))
    };
    let is_shown = |stream: &StreamName| is_own(stream) && principal.may(Action::Read(stream.as_str()));
    let names = || roster.members().into_iter().filter(is_shown).map(String::from).collect();
    let keys = (!principal.is_bounded()).then(|| roster.len());
    let view = FamilyView { max_keys: roster.max_keys(), keys, streams: with_streams.then(names) };
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
    /// Without what is of all entries, for those who may see some of them alone.
    fn for_eyes_of(self, principal: &Principal) -> Self {
        if !principal.is_bounded() {
            return self;
        }
        Self { length: None, entries_added: None, removed_by_others: None, groups: None, dead_letters: None, ..self }
    }
}

fn failed(catalogue: &StreamCatalog, name: &StreamName, error: &StoreError) -> StreamView {
    StreamView { error: Some(error.to_string()), ..view(catalogue, name, None) }
}

fn group(catalogue: &StreamCatalog, name: &StreamName, stream: &StreamStatus, group: &GroupStatus) -> GroupView {
    let declared = catalogue.consumption(name, &group.name);
    let is_abandoned = |after| group.is_abandoned(stream, after, now_ms());
    let abandoned = declared.is_none() && catalogue.abandoned_after(name).is_some_and(is_abandoned);
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

/// How long ago an entry was added, by its id.
fn age_seconds(id: EntryId) -> f64 {
    Duration::from_millis(now_ms().saturating_sub(id.ms)).as_secs_f64()
}

pub(crate) fn event(entry: &Entry) -> EventView {
    let text = |name| entry.fields.text(name).map(str::to_owned);
    let data = entry.data();
    let data_text = data.and_then(|data| std::str::from_utf8(data).ok());
    let data_json = data_text.and_then(|text| serde_json::from_str::<Box<RawValue>>(text).ok());
    let is_shown =
        |name: &[u8]| [field::ID, field::TIMESTAMP, field::DATA].iter().any(|shown| shown.as_bytes() == name);
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    EventView {
        id: entry.id.to_string(),
        event_id: text(field::ID),
        timestamp: text(field::TIMESTAMP),
        data_hex: data.filter(|_| data_text.is_none()).map(|data| format!("{data:x}")),
        data_text: data_text.filter(|_| data_json.is_none()).map(str::to_owned),
        data: data_json,
        fields: entry.fields.iter().filter(|(n, _)| !is_shown(n)).map(|(n, v)| (lossy(n), lossy(v))).collect(),
    }
}
