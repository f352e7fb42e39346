//! The protocol `aurora.v1`: what a client asks for in its text messages, and what it is answered.
//!
//! Every request may carry an `id`, a number that its answer repeats. Members that are not known are ignored, and so
//! are requests that are not known and carry no `id`.

use std::borrow::Cow;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use tokio::time::Instant;

use crate::clock::now_ms;
use crate::event::Filter;
use crate::event::{Position, StreamName};
use crate::relay::session::admission::deadline;
use crate::relay::session::commands;
use crate::relay::subscription::Subscription;
use crate::relay::subscription::batching::{Batching, Gathering};
use crate::relay::subscription::params;
use crate::relay::subscription::set::Subscriptions;
use crate::relay::wire::encoding::Form;
use crate::relay::{Admission, Channel, Hub, MAX_SNAPSHOT, NotRenewed, Refused, Runner, SubscribeParams};

/// The name of the protocol in the handshake.
pub const PROTOCOL: &str = "aurora.v1";

/// A request, before it is known what it asks for.
#[derive(Debug, Deserialize)]
struct Request<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    id: Option<u64>,
    stream: Option<String>,
    since: Option<String>,
    #[serde(default)]
    snapshot: usize,
    #[serde(borrow)]
    filter: Option<&'a RawValue>,
    mode: Option<String>,
    lane: Option<String>,
    #[serde(default)]
    strict: bool,
    token: Option<String>,
    s: Option<String>,
    p: Option<String>,
    batch: Option<BatchRequest>,
}

/// How events are to be gathered.
#[derive(Debug, Clone, Copy, Deserialize)]
struct BatchRequest {
    max: Option<usize>,
    ms: Option<u64>,
}

/// The most events in one message, and how long they may wait for others, in ms.
const MAX_BATCH: usize = 1_000;
const MAX_BATCH_MS: u64 = 5_000;

/// Whoever asks.
pub(crate) struct Asker<'a> {
    pub(crate) subscriptions: &'a mut Subscriptions,
    pub(crate) admission: &'a Admission,
    /// The token that is being looked at, of which there is one at a time.
    pub(crate) renewing: &'a mut Option<Renewing>,
    /// Who runs the client's errands, from the first one on.
    pub(crate) runner: &'a mut Option<Box<dyn Runner>>,
}

/// A token that is being looked at.
pub(crate) struct Renewing {
    id: Option<u64>,
    work: BoxFuture<'static, Result<Option<SystemTime>, NotRenewed>>,
}

/// A token that was looked at, with what to answer.
pub(crate) enum Renewed {
    /// It lets the client stay until then, or for as long as it likes.
    Good { answer: String, expires_at: Option<Instant> },
    /// It changes nothing.
    Bad { answer: String },
}

impl Future for Renewing {
    type Output = Renewed;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Renewed> {
        let id = self.id;
        self.work.as_mut().poll(cx).map(|outcome| match outcome {
            Ok(until) => {
                let answer = json!({"t": "ok", "id": id, "exp": until.map(seconds)}).to_string();
                Renewed::Good { answer, expires_at: until.map(deadline) }
            }
            Err(error) => {
                let code = match error {
                    NotRenewed::Unauthenticated(_) => 401,
                    NotRenewed::Forbidden(_) => 403,
                    NotRenewed::Unavailable(_) => 503,
                };
                Renewed::Bad { answer: refusal(id, code, &error.to_string(), code == 503) }
            }
        })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn refusal(id: Option<u64>, code: u16, message: &str, may_retry: bool) -> String {
    json!({"t": "error", "id": id, "code": code, "msg": message, "retry": may_retry}).to_string()
}

/// Why a request is not done. The codes are those of HTTP, where it has one.
struct Failure {
    code: u16,
    message: String,
}

impl Failure {
    fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The first thing that a client is told.
pub(crate) fn welcome(hub: &Hub, channel: &Channel, expires_at: Option<SystemTime>) -> String {
    let streams: Vec<_> = channel.rings.iter().map(|ring| ring.stream().as_str()).collect();
    let epochs: serde_json::Map<String, serde_json::Value> = channel
        .rings
        .iter()
        .filter_map(|ring| Some((ring.stream().to_string(), ring.mark()?.epoch.to_string().into())))
        .collect();
    let mut welcome = json!({
        "t": "welcome",
        "v": 1,
        "streams": streams,
        "epoch": epochs,
        "ping": hub.config.ping_interval.as_secs(),
        "max": hub.config.max_message_bytes.as_u64(),
        "now": now_ms(),
    });
    if let Some(expires_at) = expires_at {
        welcome["exp"] = seconds(expires_at).into();
    }
    welcome.to_string()
}

/// Does what a text message asks for. Says what to answer, if anything.
pub(crate) fn handle(text: &str, asker: &mut Asker<'_>, hub: &Hub, channel: &Channel) -> Option<String> {
    let (id, outcome) = match serde_json::from_str::<Request<'_>>(text) {
        Ok(request) if commands::OPS.contains(&&*request.op) => (request.id, take_on(&request, text, asker)),
        Ok(request) => (request.id, perform(&request, asker, hub, channel)),
        Err(error) => {
            let id =
                serde_json::from_str::<serde_json::Value>(text).ok().and_then(|request| request.get("id")?.as_u64());
            (id, Err(Failure::new(400, format!("not a request: {error}"))))
        }
    };
    match outcome {
        Ok(answer) => answer.map(|answer| answer.to_string()),
        Err(failure) => Some(refusal(id, failure.code, &failure.message, failure.code == 429)),
    }
}

/// Has an errand run.
fn take_on(request: &Request<'_>, text: &str, asker: &mut Asker<'_>) -> Result<Option<serde_json::Value>, Failure> {
    let Some(errands) = &asker.admission.errands else {
        return Err(Failure::new(400, format!("there is no op `{}` here", request.op)));
    };
    asker.runner.get_or_insert_with(|| errands.runner()).take(text);
    Ok(None)
}

fn perform(
    request: &Request<'_>,
    asker: &mut Asker<'_>,
    hub: &Hub,
    channel: &Channel,
) -> Result<Option<serde_json::Value>, Failure> {
    let (subscriptions, admission) = (&mut *asker.subscriptions, asker.admission);
    let ok = |members: serde_json::Value| {
        let mut answer = json!({"t": "ok", "id": request.id});
        if let (Some(answer), serde_json::Value::Object(members)) = (answer.as_object_mut(), members) {
            answer.extend(members);
        }
        Ok(Some(answer))
    };
    match &*request.op {
        "subscribe" => {
            let stream = stream_of(request, channel)?;
            if subscriptions.of(&stream).is_some() {
                return Err(Failure::new(
                    409,
                    format!("already subscribed to `{stream}`; change its filter, or unsubscribe"),
                ));
            }
            let rings = channel.rings_of(Some(&stream), admission.tenant.as_deref());
            let rings = rings.map_err(|refused| Failure::new(code_of(&refused), refused.to_string()))?;
            let mut params = params_of(request)?;
            params.narrow(admission.filter.clone());
            let answers = Some(request.id.unwrap_or_default());
            let batching = batching_of(request)?;
            let form = if batching.is_some() { Form::Item } else { Form::Rich };
            let gathering = batching.map(|batching| Box::new(Gathering::new(batching, stream)));
            subscriptions.add_gathered(Subscription::new(rings, params, form, answers, hub, channel), gathering);
            // Answered in its place among the alerts, once it is known where it begins.
            Ok(None)
        }
        "unsubscribe" => {
            let stream = stream_of(request, channel)?;
            let position = subscriptions.remove(&stream).ok_or_else(|| not_subscribed(&stream))?;
            ok(json!({"s": stream.as_str(), "p": position}))
        }
        "filter" => {
            let stream = stream_of(request, channel)?;
            let filter = admission.filter.clone().and(filter_of(request)?);
            let position = subscriptions.replace_filter(&stream, filter).ok_or_else(|| not_subscribed(&stream))?;
            ok(json!({"s": stream.as_str(), "p": position}))
        }
        "ack" => {
            let stream = stream_named(request.s.as_deref().or(request.stream.as_deref()), channel)?;
            let position = request.p.as_deref().and_then(|position| position.parse::<Position>().ok());
            let position = position.ok_or_else(|| Failure::new(422, "`p` must be the position of what was seen"))?;
            // Members of families are of no channel, but for those who watch them.
            let subscription = subscriptions.of(&stream);
            let watched = subscription.as_ref().and_then(|subscription| subscription.ring_of(&stream));
            let ring = watched.or_else(|| channel.rings.iter().find(|ring| *ring.stream() == stream));
            let mark = ring.and_then(|ring| ring.mark()).filter(|mark| mark.epoch == position.epoch);
            if mark.is_none_or(|mark| mark.last < position.id) {
                return Err(Failure::new(410, format!("`{stream}` has no such position")));
            }
            let seconds = Duration::from_millis(now_ms().saturating_sub(position.id.ms)).as_secs_f64();
            channel.seen.observe(seconds);
            request.id.map_or(Ok(None), |_| ok(json!({})))
        }
        "auth" => {
            let token = request.token.as_deref().ok_or_else(|| Failure::new(400, "`token` is missing"))?;
            let renewal = admission.renewal.as_ref();
            let renewal = renewal.ok_or_else(|| Failure::new(400, "no token is asked for here"))?;
            if asker.renewing.is_some() {
                return Err(Failure::new(429, "another token is being looked at: wait for its answer"));
            }
            *asker.renewing = Some(Renewing { id: request.id, work: renewal.renew(token.to_owned()) });
            Ok(None)
        }
        "ping" => Ok(Some(json!({"t": "pong", "id": request.id, "now": now_ms()}))),
        _ if request.id.is_none() => Ok(None),
        other => Err(Failure::new(400, format!("there is no op `{other}`"))),
    }
}

fn code_of(refused: &Refused) -> u16 {
    match refused {
        Refused::Forbidden(_) => 403,
        Refused::TooManyKeys(_) => 507,
        _ => 404,
    }
}

fn not_subscribed(stream: &StreamName) -> Failure {
    Failure::new(404, format!("not subscribed to `{stream}`"))
}

/// The stream that a request names; with one stream in the channel it need not.
fn stream_of(request: &Request<'_>, channel: &Channel) -> Result<StreamName, Failure> {
    stream_named(request.stream.as_deref(), channel)
}

fn stream_named(stream: Option<&str>, channel: &Channel) -> Result<StreamName, Failure> {
    let families = || channel.families.iter().map(|roster| roster.family().name());
    let names =
        || channel.rings.iter().map(|ring| ring.stream().as_str()).chain(families()).collect::<Vec<_>>().join(", ");
    match (stream, &*channel.rings) {
        (Some(name), rings) => {
            let named = rings.iter().find(|ring| ring.stream().as_str() == name).map(|ring| ring.stream().clone());
            let is_member = |stream: &StreamName| channel.families.iter().any(|r| r.family().key_of(stream).is_some());
            let named = named.or_else(|| name.parse().ok().filter(is_member));
            named.ok_or_else(|| Failure::new(404, format!("`stream` must be one of this channel's: {}", names())))
        }
        (None, [ring]) if channel.families.is_empty() => Ok(ring.stream().clone()),
        (None, _) => Err(Failure::new(422, format!("`stream` is missing: one of {}", names()))),
    }
}

fn filter_of(request: &Request<'_>) -> Result<Filter, Failure> {
    match request.filter {
        None => Ok(Filter::default()),
        Some(filter) => Filter::parse(filter.get()).map_err(|error| Failure::new(422, format!("`filter` {error}"))),
    }
}

fn batching_of(request: &Request<'_>) -> Result<Option<Batching>, Failure> {
    let Some(batch) = request.batch else { return Ok(None) };
    let (max, ms) = (batch.max.unwrap_or(64), batch.ms.unwrap_or(50));
    if !(1..=MAX_BATCH).contains(&max) || ms > MAX_BATCH_MS {
        let problem = format!("`batch` must have a `max` from 1 to {MAX_BATCH} and `ms` up to {MAX_BATCH_MS}");
        return Err(Failure::new(422, problem));
    }
    Ok(Some(Batching { max, wait: Duration::from_millis(ms) }))
}

fn params_of(request: &Request<'_>) -> Result<SubscribeParams, Failure> {
    let invalid = |name: &str, problem: &str| Failure::new(422, format!("`{name}` {problem}"));
    let is_latest = match request.mode.as_deref() {
        None | Some("lossless") => false,
        Some("latest") => true,
        Some(_) => return Err(invalid("mode", "must be lossless or latest")),
    };
    if request.snapshot > MAX_SNAPSHOT {
        return Err(invalid("snapshot", &format!("must be a number from 0 to {MAX_SNAPSHOT}")));
    }
    Ok(SubscribeParams {
        since: request
            .since
            .as_deref()
            .map(str::parse)
            .transpose()
            .map_err(|problem: String| invalid("since", &problem))?,
        snapshot: request.snapshot,
        filter: filter_of(request)?,
        meta: false,
        stream: None,
        key: None,
        is_latest,
        has_lane: request
            .lane
            .as_deref()
            .map_or(Ok(true), params::lane)
            .map_err(|problem| invalid("lane", &problem))?,
        is_strict: request.strict,
    })
}
