//! What agents do over a WebSocket in rich mode: `pull`, `done`, `nack`, `extend` and `publish`.
//!
//! The same desks as over HTTP. What an agent has leased on its socket goes to others when the socket closes.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::time::Instant;
use uuid::Uuid;

use crate::auth::{Action, AuthError, Principal};
use crate::bus::{Dedup, PublishOptions};
use crate::event::{ConsumerName, NewEvent, StreamName};
use crate::http::handlers::publish;
use crate::http::handlers::pull::{back, open_desk, view};
use crate::http::{Api, ApiError};
use crate::pull::{LeasedEntry, Nack, PullConsumer, PullError, PullRequest, SettleError, Token};
use crate::relay::{CommandHandler, CommandHandlerFactory};

/// The most requests of one client that are under way, those that wait for entries among them.
const MAX_UNDER_WAY: usize = 16;
/// The most tokens in one request.
const MAX_TOKENS: usize = 1_000;
/// How long giving back may take when a socket has closed.
const END_TIME: Duration = Duration::from_secs(5);

/// Gives clients whoever runs their errands, in the name of a principal.
pub(crate) struct Agents {
    api: Api,
    principal: Principal,
}

impl Agents {
    pub(crate) fn new(api: Api, principal: Principal) -> Self {
        Self { api, principal }
    }
}

impl fmt::Debug for Agents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Agents")
    }
}

impl CommandHandlerFactory for Agents {
    fn handler(&self) -> Box<dyn CommandHandler> {
        let name = format!("ws-{}", Uuid::new_v4().simple()).parse().expect("a valid name");
        Box::new(Agent {
            api: self.api.clone(),
            principal: self.principal.clone(),
            name,
            under_way: FuturesUnordered::new(),
            frames: VecDeque::new(),
            unsent: VecDeque::new(),
            held: HashMap::new(),
        })
    }
}

/// The errands of one client.
struct Agent {
    api: Api,
    principal: Principal,
    /// The consumer's name, where the client gives none.
    name: ConsumerName,
    under_way: FuturesUnordered<BoxFuture<'static, Step>>,
    frames: VecDeque<String>,
    /// What was leased on this socket and has yet to be sent, each with its frame.
    unsent: VecDeque<(Token, Held, String)>,
    /// What was sent and not settled.
    held: HashMap<Token, Held>,
}

/// The desk of a lease, and the lease's end.
type Held = (Arc<PullConsumer>, Instant);

#[derive(Debug, Deserialize)]
struct Request {
    op: String,
    id: Option<u64>,
    stream: Option<String>,
    group: Option<String>,
    consumer: Option<String>,
    n: Option<usize>,
    lease_s: Option<f64>,
    token: Option<String>,
    tokens: Option<Vec<String>>,
    delay_s: Option<f64>,
    reason: Option<String>,
    #[serde(default)]
    permanent: bool,
    data: Option<Box<RawValue>>,
    key: Option<String>,
}

/// What has become of a request.
enum Step {
    /// It is over.
    Answer(Option<String>),
    /// It waits for entries from now on.
    Opened(Pulling),
    /// It has got some, and may get more.
    Tasks(Pulling, Vec<LeasedEntry>),
    /// Something was settled, or leased for longer.
    Settled { answer: Option<String>, gone: Vec<Token>, extended: Vec<Token>, lease: Duration },
}

/// A client that takes entries as they come.
struct Pulling {
    id: Option<u64>,
    desk: Arc<PullConsumer>,
    wanted: PullRequest,
}

impl CommandHandler for Agent {
    fn handle(&mut self, request: &str) {
        match serde_json::from_str::<Request>(request) {
            Ok(request) => {
                let id = request.id;
                if let Err(error) = self.begin(request) {
                    self.frames.push_back(refusal(id, &error, &[]));
                }
            }
            Err(error) => {
                let error = ApiError::bad_parameter("request", error.to_string());
                self.frames.push_back(refusal(None, &error, &[]));
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(frame);
            }
            if let Some((token, held, frame)) = self.unsent.pop_front() {
                self.held.insert(token, held);
                return Poll::Ready(frame);
            }
            match self.under_way.poll_next_unpin(cx) {
                Poll::Ready(Some(step)) => self.step(step),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn end(self: Box<Self>, will_reconnect: bool) -> BoxFuture<'static, ()> {
        let Self { mut held, unsent, mut under_way, .. } = *self;
        if will_reconnect {
            held.clear();
        }
        held.extend(unsent.into_iter().map(|(token, held, _)| (token, held)));
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(step)) = under_way.poll_next_unpin(&mut cx) {
            if let Step::Tasks(Pulling { desk, .. }, tasks) = step {
                let until = Instant::now();
                held.extend(tasks.into_iter().map(|task| (task.token, (Arc::clone(&desk), until + task.lease))));
            }
        }
        drop(under_way);
        Box::pin(async move {
            let mut by_desk: Vec<(Arc<PullConsumer>, Vec<Token>)> = Vec::new();
            for (token, (desk, _)) in held {
                match by_desk.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &desk)) {
                    Some((_, tokens)) => tokens.push(token),
                    None => by_desk.push((desk, vec![token])),
                }
            }
            let reason = Some("the connection of its worker has closed".to_owned());
            let how = Nack { reason, ..Nack::default() };
            let giving_back = async {
                for (desk, tokens) in by_desk {
                    desk.nack(&tokens, &how).await;
                }
            };
            // What is not given back in time comes back with the end of its lease.
            drop(tokio::time::timeout(END_TIME, giving_back).await);
        })
    }
}

impl Agent {
    fn begin(&mut self, request: Request) -> Result<(), ApiError> {
        if self.under_way.len() >= MAX_UNDER_WAY {
            return Err(ApiError::too_many_requests(MAX_UNDER_WAY));
        }
        if request.op == "publish" {
            return self.publish(request);
        }
        if self.principal.is_bounded() {
            return Err(ApiError::from(&AuthError::AllEntries));
        }
        match request.op.as_str() {
            "pull" => self.pull(request),
            _ => self.settle(request),
        }
    }

    fn pull(&mut self, request: Request) -> Result<(), ApiError> {
        let missing = |name: &str| ApiError::bad_parameter(name, format!("`{name}` is missing"));
        let stream = request.stream.ok_or_else(|| missing("stream"))?;
        self.permit(Action::Consume(&stream))?;
        let group = request.group.or_else(|| self.only_group(&stream)).ok_or_else(|| missing("group"))?;
        let consumer = match request.consumer {
            Some(name) => name.parse().map_err(|error| ApiError::bad_parameter("consumer", format!("{error}")))?,
            None => self.name.clone(),
        };
        let config = self.api.inner.pull.config();
        let max = request.n.unwrap_or(1);
        if !(1..=config.max_batch).contains(&max) {
            let detail = format!("must be from 1 to {} (pull.max_batch)", config.max_batch);
            return Err(ApiError::bad_parameter("n", detail));
        }
        if self.api.is_draining() {
            return Err(ApiError::draining());
        }
        let lease = request.lease_s.map(|lease| seconds("lease_s", lease)).transpose()?;
        let (api, id, wait) = (self.api.clone(), request.id, config.max_wait);
        self.under_way.push(Box::pin(async move {
            match open_desk(&api, &stream, &group).await {
                Ok(desk) => {
                    let lease = lease.unwrap_or(desk.max_lease());
                    Step::Opened(Pulling { id, wanted: PullRequest { consumer, max, lease, wait }, desk })
                }
                Err(error) => Step::Answer(Some(refusal(id, &error, &[]))),
            }
        }));
        Ok(())
    }

    /// Waits for what comes next; also after a time in which nothing came.
    fn go_on(&mut self, pulling: Pulling) {
        let api = self.api.clone();
        self.under_way.push(Box::pin(async move {
            loop {
                match pulling.desk.pull(pulling.wanted.clone()).await {
                    Ok(tasks) if tasks.is_empty() && !api.is_draining() => {}
                    // The frame `drain` tells it.
                    Ok(tasks) if tasks.is_empty() => return Step::Answer(None),
                    Err(PullError::Stopping) => return Step::Answer(None),
                    Ok(tasks) => return Step::Tasks(pulling, tasks),
                    Err(error) => return Step::Answer(Some(refusal(pulling.id, &ApiError::from(&error), &[]))),
                }
            }
        }));
    }

    fn settle(&mut self, request: Request) -> Result<(), ApiError> {
        let texts = request.tokens.unwrap_or_else(|| request.token.into_iter().collect());
        if !(1..=MAX_TOKENS).contains(&texts.len()) {
            return Err(ApiError::bad_parameter(
                "token",
                format!("must be one token, or `tokens`, up to {MAX_TOKENS}"),
            ));
        }
        let desk = match (&request.stream, &request.group) {
            (Some(stream), Some(group)) => {
                self.permit(Action::Consume(stream))?;
                self.named_desk(stream, group)
            }
            _ => texts.iter().find_map(|text| self.desk_of(&text.parse().ok()?)),
        };
        let Some(desk) = desk else {
            self.frames.push_back(refusal(request.id, &ApiError::from(&SettleError::NotLeased), &texts));
            return Ok(());
        };
        self.permit(Action::Consume(desk.stream().as_str()))?;
        let (mut tokens, mut strange) = (Vec::with_capacity(texts.len()), Vec::new());
        for text in texts {
            match text.parse::<Token>().ok().filter(|token| desk.has_issued(token)) {
                Some(token) => tokens.push(token),
                None => strange.push(text),
            }
        }
        let lease = request.lease_s.map_or(Ok(desk.max_lease()), |lease| seconds("lease_s", lease))?;
        let delay = request.delay_s.map_or(Ok(Duration::ZERO), |delay| seconds("delay_s", delay))?;
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let how = back(&desk, delay_ms, request.reason, request.permanent)?;
        let (op, id) = (request.op, request.id);
        self.under_way.push(Box::pin(async move {
            let is_extension = op == "extend";
            let results = match op.as_str() {
                "done" => Ok(desk.acknowledge(&tokens).await),
                "nack" => Ok(desk.nack(&tokens, &how).await),
                _ => desk.extend(&tokens, lease).await,
            };
            let results = match results {
                Ok(results) => results,
                Err(error) => return Step::Answer(Some(refusal(id, &ApiError::from(&error), &[]))),
            };
            let mut worst = (!strange.is_empty()).then_some(SettleError::NotLeased);
            let (mut gone, mut extended, mut refused) = (Vec::new(), Vec::new(), strange);
            for (token, result) in tokens.into_iter().zip(results) {
                match result {
                    Ok(()) if is_extension => extended.push(token),
                    Ok(()) => gone.push(token),
                    Err(error) => {
                        refused.push(token.to_string());
                        if matches!(error, SettleError::NotLeased) {
                            gone.push(token);
                        }
                        worst = Some(error);
                    }
                }
            }
            let answer = match worst {
                Some(error) => Some(refusal(id, &ApiError::from(&error), &refused)),
                None => id.map(|id| json!({"t": "ok", "id": id}).to_string()),
            };
            Step::Settled { answer, gone, extended, lease }
        }));
        Ok(())
    }

    fn publish(&mut self, request: Request) -> Result<(), ApiError> {
        let missing = |name: &str| ApiError::bad_parameter(name, format!("`{name}` is missing"));
        let name = request.stream.ok_or_else(|| missing("stream"))?;
        self.permit(Action::Publish(&name))?;
        let catalogue = self.api.inner.bus.catalog();
        let stream: Option<StreamName> = name.parse().ok().filter(|stream| catalogue.contains(stream));
        let unknown = || ApiError::no_such_stream(&name, catalogue.names());
        let stream = stream.ok_or_else(unknown)?;
        let data = request.data.ok_or_else(|| missing("data"))?;
        let event = NewEvent::parse(Bytes::copy_from_slice(data.get().as_bytes()));
        let event = event.map_err(|error| ApiError::invalid_event(error.to_string()))?;
        let (_, event) = publish::admit(&self.api, &self.principal, event, |_| &stream)?;
        let dedup = request.key.map_or(Dedup::Off, Dedup::Key);
        let dedup = publish::within_tenant(dedup, &event, &self.principal);
        let (bus, id) = (self.api.inner.bus.clone(), request.id);
        self.under_way.push(Box::pin(async move {
            let result = bus.publish(&stream, vec![(dedup, event)], PublishOptions::default()).await.pop();
            Step::Answer(match result {
                Some(Ok(appended)) => id.map(|id| {
                    let event_id = String::from_utf8_lossy(&appended.event_id);
                    let (entry, duplicate) = (appended.id.to_string(), appended.duplicate);
                    json!({"t": "ok", "id": id, "entry": entry, "event_id": event_id, "duplicate": duplicate})
                        .to_string()
                }),
                Some(Err(error)) => Some(refusal(id, &ApiError::from(&error), &[])),
                None => Some(refusal(id, &ApiError::internal(), &[])),
            })
        }));
        Ok(())
    }

    fn permit(&self, deed: Action<'_>) -> Result<(), ApiError> {
        if self.principal.may(deed) { Ok(()) } else { Err(ApiError::from(&AuthError::Scope(deed.to_string()))) }
    }

    /// The desk that gave a token: of a member of a family, where it was given on this socket.
    fn desk_of(&self, token: &Token) -> Option<Arc<PullConsumer>> {
        let held = self.held.get(token).map(|(desk, _)| Arc::clone(desk));
        held.or_else(|| self.api.inner.pull.consumer_of(token))
    }

    fn named_desk(&self, stream: &str, group: &str) -> Option<Arc<PullConsumer>> {
        self.api.inner.pull.consumer(&stream.parse().ok()?, &group.parse().ok()?)
    }

    /// The group of a stream that can be pulled from, where there is one only.
    fn only_group(&self, stream: &str) -> Option<String> {
        let stream: StreamName = stream.parse().ok()?;
        let mut groups = self.api.inner.pull.groups(&stream);
        groups.next().filter(|_| groups.next().is_none()).map(ToString::to_string)
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Answer(answer) => self.frames.extend(answer),
            Step::Opened(pulling) => {
                let accepted = pulling.id.map(|id| json!({"t": "ok", "id": id}).to_string());
                self.frames.extend(accepted);
                self.go_on(pulling);
            }
            Step::Settled { answer, gone, extended, lease } => {
                for token in &gone {
                    self.held.remove(token);
                }
                for token in &extended {
                    if let Some((_, until)) = self.held.get_mut(token) {
                        *until = Instant::now() + lease;
                    }
                }
                self.frames.extend(answer);
            }
            Step::Tasks(mut pulling, tasks) => {
                let now = Instant::now();
                self.held.retain(|_, (_, until)| *until > now);
                pulling.wanted.max = pulling.wanted.max.saturating_sub(tasks.len());
                for task in tasks {
                    let frame = frame(pulling.id, &pulling.desk, &task);
                    self.unsent.push_back((task.token, (Arc::clone(&pulling.desk), now + task.lease), frame));
                }
                if pulling.wanted.max > 0 {
                    self.go_on(pulling);
                }
            }
        }
    }
}

fn frame(id: Option<u64>, desk: &PullConsumer, task: &LeasedEntry) -> String {
    #[derive(serde::Serialize)]
    struct Frame<'a> {
        t: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
        s: &'a str,
        g: &'a str,
        lease_s: f64,
        task: crate::http::handlers::pull::DeliveryView,
    }
    let frame = Frame {
        t: "task",
        id,
        s: desk.stream().as_str(),
        g: desk.group().as_str(),
        lease_s: task.lease.as_secs_f64(),
        task: view(task),
    };
    serde_json::to_string(&frame).expect("a task is JSON")
}

fn seconds(name: &str, seconds: f64) -> Result<Duration, ApiError> {
    let seconds = Duration::try_from_secs_f64(seconds);
    seconds.map_err(|_error| ApiError::bad_parameter(name, "must be a number of seconds, 0 or more"))
}

fn refusal(id: Option<u64>, error: &ApiError, tokens: &[String]) -> String {
    let wait = error.retry_after();
    let mut answer = json!({
        "t": "error",
        "id": id,
        "code": error.status().as_u16(),
        "msg": error.detail(),
        "retry": wait.is_some(),
    });
    if let Some(wait) = wait {
        answer["after_ms"] = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).into();
    }
    if !tokens.is_empty() {
        answer["tokens"] = tokens.into();
    }
    answer.to_string()
}
