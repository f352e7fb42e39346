//! The protocol `aurora.v1`: requests of the client and their replies.
//!
//! Each request may carry an `id`, a number that its reply repeats. Unknown properties are ignored, and so are unknown
//! requests without an `id`.

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
use crate::event::{Filter, Position, StreamName};
use crate::relay::hub::{Channel, Hub};
use crate::relay::session::admission::{Admission, ConnectError, RenewalError, deadline};
use crate::relay::session::commands;
use crate::relay::session::commands::CommandHandler;
use crate::relay::subscription::batching::{BatchOptions, EventBatcher};
use crate::relay::subscription::params::{MAX_SNAPSHOT, SubscribeParams};
use crate::relay::subscription::set::SubscriptionSet;
use crate::relay::subscription::{Subscription, params};
use crate::relay::wire::encoding::Encoding;

/// The name of the protocol in the handshake.
pub const PROTOCOL: &str = "aurora.v1";

/// A request of any kind.
#[derive(Debug, Deserialize)]
struct ClientRequest<'a> {
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

/// The options to batch events.
#[derive(Debug, Clone, Copy, Deserialize)]
struct BatchRequest {
    max: Option<usize>,
    ms: Option<u64>,
}

/// The maximum number of events in one message, and the maximum time that they may wait for others, in ms.
const MAX_BATCH: usize = 1_000;
const MAX_BATCH_MS: u64 = 5_000;

/// The parts of a session that requests use.
pub(crate) struct RequestContext<'a> {
    pub(crate) subscriptions: &'a mut SubscriptionSet,
    pub(crate) admission: &'a Admission,
    /// The check of a newer token, one at a time.
    pub(crate) token_refresh: &'a mut Option<TokenRefresh>,
    /// The client's command handler, from its first command on.
    pub(crate) handler: &'a mut Option<Box<dyn CommandHandler>>,
}

/// The check of a newer token in progress.
pub(crate) struct TokenRefresh {
    id: Option<u64>,
    renewal: BoxFuture<'static, Result<Option<SystemTime>, RenewalError>>,
}

/// The result of a token check, with the reply.
pub(crate) enum RefreshResult {
    /// The client may stay until then, or without limit.
    Accepted { reply: String, expires_at: Option<Instant> },
    /// The token changes nothing.
    Rejected { reply: String },
}

impl Future for TokenRefresh {
    type Output = RefreshResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RefreshResult> {
        let id = self.id;
        self.renewal.as_mut().poll(cx).map(|outcome| match outcome {
            Ok(until) => {
                let reply = json!({"t": "ok", "id": id, "exp": until.map(seconds)}).to_string();
                RefreshResult::Accepted { reply, expires_at: until.map(deadline) }
            }
            Err(error) => {
                let code = match error {
                    RenewalError::Unauthenticated(_) => 401,
                    RenewalError::Forbidden(_) => 403,
                    RenewalError::Unavailable(_) => 503,
                };
                RefreshResult::Rejected { reply: error_frame(id, code, &error.to_string(), code == 503) }
            }
        })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn error_frame(id: Option<u64>, code: u16, message: &str, may_retry: bool) -> String {
    json!({"t": "error", "id": id, "code": code, "msg": message, "retry": may_retry}).to_string()
}

/// The reason why a request failed. The codes are those of HTTP.
struct RequestError {
    code: u16,
    message: String,
}

impl RequestError {
    fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Returns the first frame for a client.
pub(crate) fn welcome_frame(hub: &Hub, channel: &Channel, expires_at: Option<SystemTime>) -> String {
    let streams: Vec<_> = channel.rings.iter().map(|ring| ring.stream().as_str()).collect();
    let epochs: serde_json::Map<String, serde_json::Value> = channel
        .rings
        .iter()
        .filter_map(|ring| Some((ring.stream().to_string(), ring.snapshot()?.epoch.to_string().into())))
        .collect();
    let mut frame = json!({
        "t": "welcome",
        "v": 1,
        "streams": streams,
        "epoch": epochs,
        "ping": hub.config.ping_interval.as_secs(),
        "max": hub.config.max_message_bytes.as_u64(),
        "now": now_ms(),
    });
    if let Some(expires_at) = expires_at {
        frame["exp"] = seconds(expires_at).into();
    }
    frame.to_string()
}

/// Handles a text message. Returns the reply, if there is one.
pub(crate) fn handle(text: &str, context: &mut RequestContext<'_>, hub: &Hub, channel: &Channel) -> Option<String> {
    let (id, outcome) = match serde_json::from_str::<ClientRequest<'_>>(text) {
        Ok(request) if commands::OPS.contains(&&*request.op) => (request.id, pass_to_handler(&request, text, context)),
        Ok(request) => (request.id, perform(&request, context, hub, channel)),
        Err(error) => {
            let id =
                serde_json::from_str::<serde_json::Value>(text).ok().and_then(|request| request.get("id")?.as_u64());
            (id, Err(RequestError::new(400, format!("not a request: {error}"))))
        }
    };
    match outcome {
        Ok(reply) => reply.map(|reply| reply.to_string()),
        Err(error) => Some(error_frame(id, error.code, &error.message, error.code == 429)),
    }
}

/// Passes a command to the client's handler.
fn pass_to_handler(
    request: &ClientRequest<'_>,
    text: &str,
    context: &mut RequestContext<'_>,
) -> Result<Option<serde_json::Value>, RequestError> {
    let Some(commands) = &context.admission.commands else {
        return Err(RequestError::new(400, format!("there is no op `{}` on this server", request.op)));
    };
    context.handler.get_or_insert_with(|| commands.handler()).handle(text);
    Ok(None)
}

fn perform(
    request: &ClientRequest<'_>,
    context: &mut RequestContext<'_>,
    hub: &Hub,
    channel: &Channel,
) -> Result<Option<serde_json::Value>, RequestError> {
    let (subscriptions, admission) = (&mut *context.subscriptions, context.admission);
    let ok = |properties: serde_json::Value| {
        let mut reply = json!({"t": "ok", "id": request.id});
        if let (Some(reply), serde_json::Value::Object(properties)) = (reply.as_object_mut(), properties) {
            reply.extend(properties);
        }
        Ok(Some(reply))
    };
    match &*request.op {
        "subscribe" => {
            let stream = stream_of(request, channel)?;
            if subscriptions.get(&stream).is_some() {
                return Err(RequestError::new(
                    409,
                    format!("already subscribed to `{stream}`; change its filter or unsubscribe first"),
                ));
            }
            let rings = channel.rings_of(Some(&stream), admission.tenant.as_deref());
            let rings = rings.map_err(|error| RequestError::new(status_of(&error), error.to_string()))?;
            let mut params = params_of(request)?;
            params.narrow(admission.filter.clone());
            let reply_id = Some(request.id.unwrap_or_default());
            let options = batch_options_of(request)?;
            let encoding = if options.is_some() { Encoding::BatchItem } else { Encoding::Rich };
            let batcher = options.map(|options| Box::new(EventBatcher::new(options, stream)));
            subscriptions.add_batched(Subscription::new(rings, params, encoding, reply_id, hub, channel), batcher);
            // The subscription itself replies, in order among its events, when its start is known.
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
            let position =
                position.ok_or_else(|| RequestError::new(422, "`p` must be the position of the last entry seen"))?;
            // Members of families are not in the channel: only the subscription knows their rings.
            let subscription = subscriptions.get(&stream);
            let member = subscription.as_ref().and_then(|subscription| subscription.ring_of(&stream));
            let ring = member.or_else(|| channel.rings.iter().find(|ring| *ring.stream() == stream));
            let snapshot = ring.and_then(|ring| ring.snapshot()).filter(|snapshot| snapshot.epoch == position.epoch);
            if snapshot.is_none_or(|snapshot| snapshot.last < position.id) {
                return Err(RequestError::new(410, format!("`p` is not a position of `{stream}`")));
            }
            let seconds = Duration::from_millis(now_ms().saturating_sub(position.id.ms)).as_secs_f64();
            channel.ack_delay.observe(seconds);
            request.id.map_or(Ok(None), |_| ok(json!({})))
        }
        "auth" => {
            let token = request.token.as_deref().ok_or_else(|| RequestError::new(400, "`token` is missing"))?;
            let renewal = admission.renewal.as_ref();
            let renewal = renewal.ok_or_else(|| RequestError::new(400, "this session needs no token"))?;
            if context.token_refresh.is_some() {
                return Err(RequestError::new(429, "another token is being checked; wait for its reply"));
            }
            *context.token_refresh = Some(TokenRefresh { id: request.id, renewal: renewal.renew(token.to_owned()) });
            Ok(None)
        }
        "ping" => Ok(Some(json!({"t": "pong", "id": request.id, "now": now_ms()}))),
        _ if request.id.is_none() => Ok(None),
        other => Err(RequestError::new(400, format!("there is no op `{other}`"))),
    }
}

fn status_of(error: &ConnectError) -> u16 {
    match error {
        ConnectError::Forbidden(_) => 403,
        ConnectError::TooManyKeys(_) => 507,
        _ => 404,
    }
}

fn not_subscribed(stream: &StreamName) -> RequestError {
    RequestError::new(404, format!("not subscribed to `{stream}`"))
}

/// Returns the stream of a request. It may be left out if the channel has one stream.
fn stream_of(request: &ClientRequest<'_>, channel: &Channel) -> Result<StreamName, RequestError> {
    stream_named(request.stream.as_deref(), channel)
}

fn stream_named(stream: Option<&str>, channel: &Channel) -> Result<StreamName, RequestError> {
    let families = || channel.families.iter().map(|family_members| family_members.family().name());
    let names =
        || channel.rings.iter().map(|ring| ring.stream().as_str()).chain(families()).collect::<Vec<_>>().join(", ");
    match (stream, &*channel.rings) {
        (Some(name), rings) => {
            let named = rings.iter().find(|ring| ring.stream().as_str() == name).map(|ring| ring.stream().clone());
            let is_member = |stream: &StreamName| channel.families.iter().any(|r| r.family().key_of(stream).is_some());
            let named = named.or_else(|| name.parse().ok().filter(is_member));
            named.ok_or_else(|| RequestError::new(404, format!("`stream` must be one of this channel's: {}", names())))
        }
        (None, [ring]) if channel.families.is_empty() => Ok(ring.stream().clone()),
        (None, _) => Err(RequestError::new(422, format!("`stream` is missing: one of {}", names()))),
    }
}

fn filter_of(request: &ClientRequest<'_>) -> Result<Filter, RequestError> {
    match request.filter {
        None => Ok(Filter::default()),
        Some(filter) => {
            Filter::parse(filter.get()).map_err(|error| RequestError::new(422, format!("`filter` {error}")))
        }
    }
}

fn batch_options_of(request: &ClientRequest<'_>) -> Result<Option<BatchOptions>, RequestError> {
    let Some(batch) = request.batch else { return Ok(None) };
    let (max, ms) = (batch.max.unwrap_or(64), batch.ms.unwrap_or(50));
    if !(1..=MAX_BATCH).contains(&max) || ms > MAX_BATCH_MS {
        let problem = format!("`batch` must have a `max` from 1 to {MAX_BATCH} and `ms` up to {MAX_BATCH_MS}");
        return Err(RequestError::new(422, problem));
    }
    Ok(Some(BatchOptions { max, wait: Duration::from_millis(ms) }))
}

fn params_of(request: &ClientRequest<'_>) -> Result<SubscribeParams, RequestError> {
    let invalid = |name: &str, problem: &str| RequestError::new(422, format!("`{name}` {problem}"));
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
            .map_or(Ok(true), params::parse_lane)
            .map_err(|problem| invalid("lane", &problem))?,
        is_strict: request.strict,
    })
}
