//! The commands of external workers over a WebSocket in rich mode: `pull`, `done`, `nack`, `extend` and `publish`.
//!
//! They use the same pull consumers as HTTP requests. If a socket closes, the entries that it has leased are released
//! for other workers.

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
use crate::http::api::Api;
use crate::http::problem::ApiError;
use crate::http::publishing::{authorize_event, within_tenant};
use crate::http::pulling::{self, DeliveryView, MAX_TOKENS, open_consumer};
use crate::pull::{LeasedEntry, Nack, PullConsumer, PullError, PullRequest, SettleError, Token};
use crate::relay::{CommandHandler, CommandHandlerFactory};

/// The maximum number of commands in progress per client, including pulls that wait for entries.
const MAX_IN_PROGRESS: usize = 16;
/// The time limit for releasing the leases of a closed socket.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// Makes the command handlers of a principal's connections.
pub(crate) struct WorkerCommandsFactory {
    api: Api,
    principal: Principal,
}

impl WorkerCommandsFactory {
    pub(crate) fn new(api: Api, principal: Principal) -> Self {
        Self { api, principal }
    }
}

impl fmt::Debug for WorkerCommandsFactory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkerCommandsFactory")
    }
}

impl CommandHandlerFactory for WorkerCommandsFactory {
    fn handler(&self) -> Box<dyn CommandHandler> {
        let consumer = format!("ws-{}", Uuid::new_v4().simple()).parse().expect("a valid name");
        Box::new(WorkerCommands {
            api: self.api.clone(),
            principal: self.principal.clone(),
            consumer,
            in_progress: FuturesUnordered::new(),
            frames: VecDeque::new(),
            unsent: VecDeque::new(),
            leases: HashMap::new(),
        })
    }
}

/// Runs the commands of one client.
struct WorkerCommands {
    api: Api,
    principal: Principal,
    /// The default consumer name.
    consumer: ConsumerName,
    in_progress: FuturesUnordered<BoxFuture<'static, Progress>>,
    frames: VecDeque<String>,
    /// Leased entries that are not yet sent, with their frames.
    unsent: VecDeque<(Token, SocketLease, String)>,
    /// Leased entries that are sent and not settled.
    leases: HashMap<Token, SocketLease>,
}

/// The pull consumer that gave a lease, and the end of the lease.
type SocketLease = (Arc<PullConsumer>, Instant);

#[derive(Debug, Deserialize)]
struct CommandRequest {
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

/// The progress of a command.
enum Progress {
    /// The command has ended, with a response unless the client wants none.
    Ended(Option<String>),
    /// A pull waits for entries from now on.
    PullOpened(OpenPull),
    /// A pull has leased entries, and may lease more.
    Leased(OpenPull, Vec<LeasedEntry>),
    /// Leases were settled or extended.
    Settled { response: Option<String>, ended: Vec<Token>, extended: Vec<Token>, lease: Duration },
}

/// A pull that leases entries as they come.
struct OpenPull {
    id: Option<u64>,
    pull_consumer: Arc<PullConsumer>,
    wanted: PullRequest,
}

impl CommandHandler for WorkerCommands {
    fn handle(&mut self, request: &str) {
        match serde_json::from_str::<CommandRequest>(request) {
            Ok(request) => {
                let id = request.id;
                if let Err(error) = self.start(request) {
                    self.frames.push_back(error_frame(id, &error, &[]));
                }
            }
            Err(error) => {
                let error = ApiError::bad_parameter("request", error.to_string());
                self.frames.push_back(error_frame(None, &error, &[]));
            }
        }
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(frame);
            }
            if let Some((token, lease, frame)) = self.unsent.pop_front() {
                self.leases.insert(token, lease);
                return Poll::Ready(frame);
            }
            match self.in_progress.poll_next_unpin(cx) {
                Poll::Ready(Some(progress)) => self.on_progress(progress),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn end(self: Box<Self>, will_reconnect: bool) -> BoxFuture<'static, ()> {
        let Self { mut leases, unsent, mut in_progress, .. } = *self;
        if will_reconnect {
            leases.clear();
        }
        leases.extend(unsent.into_iter().map(|(token, lease, _)| (token, lease)));
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(progress)) = in_progress.poll_next_unpin(&mut cx) {
            if let Progress::Leased(OpenPull { pull_consumer, .. }, entries) = progress {
                let now = Instant::now();
                leases.extend(
                    entries.into_iter().map(|leased| (leased.token, (Arc::clone(&pull_consumer), now + leased.lease))),
                );
            }
        }
        drop(in_progress);
        Box::pin(async move {
            let mut by_consumer: Vec<(Arc<PullConsumer>, Vec<Token>)> = Vec::new();
            for (token, (pull_consumer, _)) in leases {
                match by_consumer.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &pull_consumer)) {
                    Some((_, tokens)) => tokens.push(token),
                    None => by_consumer.push((pull_consumer, vec![token])),
                }
            }
            let reason = Some("the connection of its worker has closed".to_owned());
            let nack = Nack { reason, ..Nack::default() };
            let release = async {
                for (pull_consumer, tokens) in by_consumer {
                    pull_consumer.nack(&tokens, &nack).await;
                }
            };
            // Entries that are not released in time become free at the end of their lease.
            drop(tokio::time::timeout(RELEASE_TIMEOUT, release).await);
        })
    }
}

impl WorkerCommands {
    fn start(&mut self, request: CommandRequest) -> Result<(), ApiError> {
        if self.in_progress.len() >= MAX_IN_PROGRESS {
            return Err(ApiError::too_many_requests(MAX_IN_PROGRESS));
        }
        if request.op == "publish" {
            return self.publish(request);
        }
        if self.principal.is_restricted() {
            return Err(ApiError::from(&AuthError::AllEntries));
        }
        match request.op.as_str() {
            "pull" => self.pull(request),
            _ => self.settle(request),
        }
    }

    fn pull(&mut self, request: CommandRequest) -> Result<(), ApiError> {
        let stream = request.stream.ok_or_else(|| missing_parameter("stream"))?;
        self.require(Action::Consume(&stream))?;
        let group = request.group.or_else(|| self.only_group(&stream)).ok_or_else(|| missing_parameter("group"))?;
        let consumer = match request.consumer {
            Some(name) => name.parse().map_err(|error| ApiError::bad_parameter("consumer", format!("{error}")))?,
            None => self.consumer.clone(),
        };
        let config = self.api.services().pull.config();
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
        self.in_progress.push(Box::pin(async move {
            match open_consumer(&api, &stream, &group).await {
                Ok(pull_consumer) => {
                    let lease = lease.unwrap_or(pull_consumer.max_lease());
                    Progress::PullOpened(OpenPull {
                        id,
                        wanted: PullRequest { consumer, max, lease, wait },
                        pull_consumer,
                    })
                }
                Err(error) => Progress::Ended(Some(error_frame(id, &error, &[]))),
            }
        }));
        Ok(())
    }

    /// Waits for the next entries, and again if none came within the maximum wait.
    fn wait_for_entries(&mut self, pull: OpenPull) {
        let api = self.api.clone();
        self.in_progress.push(Box::pin(async move {
            loop {
                match pull.pull_consumer.pull(pull.wanted.clone()).await {
                    Ok(entries) if entries.is_empty() && !api.is_draining() => {}
                    // The frame `drain` informs the client.
                    Ok(entries) if entries.is_empty() => return Progress::Ended(None),
                    Err(PullError::Stopping) => return Progress::Ended(None),
                    Ok(entries) => return Progress::Leased(pull, entries),
                    Err(error) => return Progress::Ended(Some(error_frame(pull.id, &ApiError::from(&error), &[]))),
                }
            }
        }));
    }

    fn settle(&mut self, request: CommandRequest) -> Result<(), ApiError> {
        let texts = request.tokens.unwrap_or_else(|| request.token.into_iter().collect());
        if !(1..=MAX_TOKENS).contains(&texts.len()) {
            return Err(ApiError::bad_parameter(
                "token",
                format!("must be one token; or set `tokens`, up to {MAX_TOKENS}"),
            ));
        }
        let pull_consumer = match (&request.stream, &request.group) {
            (Some(stream), Some(group)) => {
                self.require(Action::Consume(stream))?;
                self.named_consumer(stream, group)
            }
            _ => texts.iter().find_map(|text| self.consumer_of_token(&text.parse().ok()?)),
        };
        let Some(pull_consumer) = pull_consumer else {
            self.frames.push_back(error_frame(request.id, &ApiError::from(&SettleError::NotLeased), &texts));
            return Ok(());
        };
        self.require(Action::Consume(pull_consumer.stream().as_str()))?;
        let (mut tokens, mut foreign) = (Vec::with_capacity(texts.len()), Vec::new());
        for text in texts {
            match text.parse::<Token>().ok().filter(|token| pull_consumer.has_issued(token)) {
                Some(token) => tokens.push(token),
                None => foreign.push(text),
            }
        }
        let lease = request.lease_s.map_or(Ok(pull_consumer.max_lease()), |lease| seconds("lease_s", lease))?;
        let delay = request.delay_s.map_or(Ok(Duration::ZERO), |delay| seconds("delay_s", delay))?;
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let nack = pulling::nack(&pull_consumer, delay_ms, request.reason, request.permanent)?;
        let (op, id) = (request.op, request.id);
        self.in_progress.push(Box::pin(async move {
            let is_extension = op == "extend";
            let results = match op.as_str() {
                "done" => Ok(pull_consumer.acknowledge(&tokens).await),
                "nack" => Ok(pull_consumer.nack(&tokens, &nack).await),
                _ => pull_consumer.extend(&tokens, lease).await,
            };
            let results = match results {
                Ok(results) => results,
                Err(error) => return Progress::Ended(Some(error_frame(id, &ApiError::from(&error), &[]))),
            };
            let mut last_error = (!foreign.is_empty()).then_some(SettleError::NotLeased);
            let (mut ended, mut extended, mut refused) = (Vec::new(), Vec::new(), foreign);
            for (token, result) in tokens.into_iter().zip(results) {
                match result {
                    Ok(()) if is_extension => extended.push(token),
                    Ok(()) => ended.push(token),
                    Err(error) => {
                        refused.push(token.to_string());
                        if matches!(error, SettleError::NotLeased) {
                            ended.push(token);
                        }
                        last_error = Some(error);
                    }
                }
            }
            let response = match last_error {
                Some(error) => Some(error_frame(id, &ApiError::from(&error), &refused)),
                None => id.map(|id| json!({"t": "ok", "id": id}).to_string()),
            };
            Progress::Settled { response, ended, extended, lease }
        }));
        Ok(())
    }

    fn publish(&mut self, request: CommandRequest) -> Result<(), ApiError> {
        let name = request.stream.ok_or_else(|| missing_parameter("stream"))?;
        self.require(Action::Publish(&name))?;
        let catalog = self.api.services().bus.catalog();
        let stream: Option<StreamName> = name.parse().ok().filter(|stream| catalog.contains(stream));
        let unknown = || ApiError::no_such_stream(&name, catalog.names());
        let stream = stream.ok_or_else(unknown)?;
        let data = request.data.ok_or_else(|| missing_parameter("data"))?;
        let event = NewEvent::parse(Bytes::copy_from_slice(data.get().as_bytes()));
        let event = event.map_err(|error| ApiError::invalid_event(error.to_string()))?;
        let (_, event) = authorize_event(&self.api, &self.principal, event, |_| &stream)?;
        let dedup = request.key.map_or(Dedup::Off, Dedup::Key);
        let dedup = within_tenant(dedup, &event, &self.principal);
        let (bus, id) = (self.api.services().bus.clone(), request.id);
        self.in_progress.push(Box::pin(async move {
            let result = bus.publish(&stream, vec![(dedup, event)], PublishOptions::default()).await.pop();
            Progress::Ended(match result {
                Some(Ok(appended)) => id.map(|id| {
                    let event_id = String::from_utf8_lossy(&appended.event_id);
                    let (entry, duplicate) = (appended.id.to_string(), appended.duplicate);
                    json!({"t": "ok", "id": id, "entry": entry, "event_id": event_id, "duplicate": duplicate})
                        .to_string()
                }),
                Some(Err(error)) => Some(error_frame(id, &ApiError::from(&error), &[])),
                None => Some(error_frame(id, &ApiError::internal(), &[])),
            })
        }));
        Ok(())
    }

    fn require(&self, action: Action<'_>) -> Result<(), ApiError> {
        if self.principal.may(action) { Ok(()) } else { Err(ApiError::from(&AuthError::Scope(action.to_string()))) }
    }

    /// Returns the pull consumer that gave a token. For members of families only if it was given on this socket.
    fn consumer_of_token(&self, token: &Token) -> Option<Arc<PullConsumer>> {
        let own = self.leases.get(token).map(|(pull_consumer, _)| Arc::clone(pull_consumer));
        own.or_else(|| self.api.services().pull.consumer_of(token))
    }

    fn named_consumer(&self, stream: &str, group: &str) -> Option<Arc<PullConsumer>> {
        self.api.services().pull.consumer(&stream.parse().ok()?, &group.parse().ok()?)
    }

    /// Returns the pull group of a stream if it has exactly one.
    fn only_group(&self, stream: &str) -> Option<String> {
        let stream: StreamName = stream.parse().ok()?;
        let mut groups = self.api.services().pull.groups(&stream);
        groups.next().filter(|_| groups.next().is_none()).map(ToString::to_string)
    }

    fn on_progress(&mut self, progress: Progress) {
        match progress {
            Progress::Ended(response) => self.frames.extend(response),
            Progress::PullOpened(pull) => {
                let accepted = pull.id.map(|id| json!({"t": "ok", "id": id}).to_string());
                self.frames.extend(accepted);
                self.wait_for_entries(pull);
            }
            Progress::Settled { response, ended, extended, lease } => {
                for token in &ended {
                    self.leases.remove(token);
                }
                for token in &extended {
                    if let Some((_, until)) = self.leases.get_mut(token) {
                        *until = Instant::now() + lease;
                    }
                }
                self.frames.extend(response);
            }
            Progress::Leased(mut pull, entries) => {
                let now = Instant::now();
                self.leases.retain(|_, (_, until)| *until > now);
                pull.wanted.max = pull.wanted.max.saturating_sub(entries.len());
                for leased in entries {
                    let frame = task_frame(pull.id, &pull.pull_consumer, &leased);
                    self.unsent.push_back((leased.token, (Arc::clone(&pull.pull_consumer), now + leased.lease), frame));
                }
                if pull.wanted.max > 0 {
                    self.wait_for_entries(pull);
                }
            }
        }
    }
}

fn task_frame(id: Option<u64>, pull_consumer: &PullConsumer, leased: &LeasedEntry) -> String {
    #[derive(serde::Serialize)]
    struct TaskFrame<'a> {
        t: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
        s: &'a str,
        g: &'a str,
        lease_s: f64,
        task: DeliveryView,
    }
    let frame = TaskFrame {
        t: "task",
        id,
        s: pull_consumer.stream().as_str(),
        g: pull_consumer.group().as_str(),
        lease_s: leased.lease.as_secs_f64(),
        task: DeliveryView::from(leased),
    };
    serde_json::to_string(&frame).expect("a task is JSON")
}

fn missing_parameter(name: &str) -> ApiError {
    ApiError::bad_parameter(name, format!("`{name}` is required"))
}

fn seconds(name: &str, seconds: f64) -> Result<Duration, ApiError> {
    let seconds = Duration::try_from_secs_f64(seconds);
    seconds.map_err(|_error| ApiError::bad_parameter(name, "must be a number of seconds, 0 or more"))
}

fn error_frame(id: Option<u64>, error: &ApiError, tokens: &[String]) -> String {
    let wait = error.retry_after();
    let mut frame = json!({
        "t": "error",
        "id": id,
        "code": error.status().as_u16(),
        "msg": error.detail(),
        "retry": wait.is_some(),
    });
    if let Some(wait) = wait {
        frame["after_ms"] = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).into();
    }
    if !tokens.is_empty() {
        frame["tokens"] = tokens.into();
    }
    frame.to_string()
}
