//! Connections to the server: one by one, as a link that heals, and as a pool of readers.
//!
//! A connection is used only as long as nothing about it is in doubt. After a timeout, a cancelled call or a reply of
//! the wrong shape it is closed and another one is opened: what may still come on it can then never be taken for
//! the answer to something else. No command is ever sent twice from here.

use std::fmt::Write as _;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::{ClusterHash, CustomCommand, Value};
use fred::util::redis_keyslot;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::config::Settings;
use super::failure::Failure;
use super::reply::Reply;
use super::script::Script;
use crate::event::EntryId;

/// How long a reader that no one uses is kept.
const IDLE_READER_KEPT: Duration = Duration::from_secs(30);
/// What a blocking read may take beyond the time it blocks.
const READ_MARGIN: Duration = Duration::from_millis(1500);
/// How long the first attempt to connect is waited for at start, and by calls that come before its outcome.
const FIRST_ATTEMPT: Duration = Duration::from_secs(2);
const RECONNECT_MIN: Duration = Duration::from_millis(100);

/// The arguments of a command, collected.
#[derive(Debug, Default)]
pub(super) struct Arguments(Vec<Value>);

impl Arguments {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    pub(super) fn reserve(&mut self, more: usize) {
        self.0.reserve(more);
    }

    pub(super) fn text(&mut self, text: &'static str) -> &mut Self {
        self.bytes(Bytes::from_static(text.as_bytes()))
    }

    pub(super) fn bytes(&mut self, bytes: impl Into<Bytes>) -> &mut Self {
        self.0.push(Value::Bytes(bytes.into()));
        self
    }

    pub(super) fn shown(&mut self, shown: &impl ToString) -> &mut Self {
        self.bytes(shown.to_string())
    }

    pub(super) fn name(&mut self, name: &str) -> &mut Self {
        self.bytes(Bytes::copy_from_slice(name.as_bytes()))
    }

    /// Many ids, in one piece of memory.
    pub(super) fn ids(&mut self, ids: &[EntryId]) -> &mut Self {
        let mut texts = BytesMut::with_capacity(ids.len() * 20);
        for id in ids {
            write!(texts, "{id}").expect("a buffer that grows takes everything");
            self.bytes(texts.split().freeze());
        }
        self
    }

    pub(super) fn append(&mut self, other: Self) -> &mut Self {
        self.0.extend(other.0);
        self
    }
}

/// One connection, closed when dropped.
#[derive(Debug)]
struct Connection {
    client: Client,
    router: AbortHandle,
    doubted: CancellationToken,
}

/// The task that drives a connection; what it ends with is why the connection ended.
type Router = JoinHandle<Result<(), fred::error::Error>>;

impl Drop for Connection {
    fn drop(&mut self) {
        self.router.abort();
    }
}

impl Connection {
    async fn open(settings: &Settings) -> Result<(Self, Router), Failure> {
        let client = Client::new(
            settings.config.clone(),
            Some(settings.performance.clone()),
            Some(settings.connection.clone()),
            None,
        );
        let mut connected = pin!(client.wait_for_connect());
        // Its first poll subscribes to the outcome, which must not come before.
        let is_ready = std::future::poll_fn(|context| Poll::Ready(connected.as_mut().poll(context).is_ready())).await;
        debug_assert!(!is_ready, "the client is new");
        let router = client.connect();
        let connection =
            Self { router: router.abort_handle(), client: client.clone(), doubted: CancellationToken::new() };
        match timeout(settings.command_timeout, connected).await {
            Ok(Ok(())) => Ok((connection, router)),
            Ok(Err(error)) => Err(Failure::from(error)),
            Err(_) => Err(Failure::timeout()),
        }
    }

    fn is_usable(&self) -> bool {
        !self.router.is_finished() && !self.doubted.is_cancelled() && self.client.is_connected()
    }

    /// Sends one command and takes its reply. Calls may overlap and may be dropped: replies come in order, and those
    /// that no one waits for any more are dropped.
    async fn call(
        &self,
        command: &'static str,
        key: &[u8],
        arguments: Arguments,
        limit: Duration,
        is_blocking: bool,
    ) -> Result<Reply, Failure> {
        let command = CustomCommand::new_static(command, ClusterHash::Custom(redis_keyslot(key)), is_blocking);
        let answer = tokio::select! {
            biased;
            answer = timeout(limit, self.client.custom_raw(command, arguments.0)) => match answer {
                Ok(Ok(frame)) => Reply::accept(frame),
                Ok(Err(error)) => Err(Failure::from(error)),
                Err(_) => Err(Failure::timeout()),
            },
            () = self.doubted.cancelled() => Err(Failure::unavailable("the connection to the server was lost")),
        };
        if answer.as_ref().is_err_and(|failure| failure.breaks_connection) {
            self.doubted.cancel();
        }
        answer
    }
}

/// How a link is.
#[derive(Debug, Clone)]
enum State {
    Starting,
    Connected(Arc<Connection>),
    Down(Failure),
}

/// A connection that is opened again whenever it is lost, for commands that don't block.
///
/// While it is down, calls fail at once.
#[derive(Debug, Clone)]
pub(super) struct Link {
    state: watch::Receiver<State>,
    command_timeout: Duration,
}

impl Link {
    /// The link, and the task that keeps it up until `stop` is cancelled.
    pub(super) fn new(
        purpose: &'static str,
        settings: Arc<Settings>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, state) = watch::channel(State::Starting);
        let link = Self { state, command_timeout: settings.command_timeout };
        (link, keep_up(purpose, settings, sender, stop))
    }

    /// Waits for the outcome of the first attempt to connect, within bounds.
    pub(super) async fn first_attempt(&self) {
        let mut state = self.state.clone();
        let outcome = timeout(FIRST_ATTEMPT, state.wait_for(|state| !matches!(state, State::Starting))).await;
        // Without an outcome in time, calls will tell.
        drop(outcome);
    }

    /// The link's connection, or why there is none.
    async fn connection(&self) -> Result<Arc<Connection>, Failure> {
        if matches!(*self.state.borrow(), State::Starting) {
            self.first_attempt().await;
        }
        match &*self.state.borrow() {
            State::Connected(connection) => Ok(Arc::clone(connection)),
            State::Down(failure) => Err(failure.clone()),
            State::Starting => Err(Failure::unavailable("the server has not answered yet")),
        }
    }

    /// Why the link is down, if it is.
    pub(super) async fn up(&self) -> Result<(), Failure> {
        self.connection().await.map(|_| ())
    }

    /// Sends one command, once. Cancel-safe, though the server may then have run it.
    pub(super) async fn call(&self, command: &'static str, key: &[u8], arguments: Arguments) -> Result<Reply, Failure> {
        let connection = self.connection().await?;
        connection.call(command, key, arguments, self.command_timeout, false).await
    }

    /// Runs a script, loading it where the server does not know it. The first key tells the cluster's node.
    pub(super) async fn run(&self, script: &Script, keys: &[Bytes], arguments: Arguments) -> Result<Reply, Failure> {
        let again = |all: &mut Arguments| {
            all.append(Arguments(arguments.0.clone()));
        };
        self.run_with(script, keys, again).await
    }

    /// The same with arguments that are made when they are needed: copying many costs more than making them again.
    pub(super) async fn run_with(
        &self,
        script: &Script,
        keys: &[Bytes],
        add: impl Fn(&mut Arguments),
    ) -> Result<Reply, Failure> {
        let first = keys.first().map_or(&b""[..], AsRef::as_ref);
        let arguments = || {
            let mut all = Arguments::with_capacity(16);
            all.bytes(script.sha().clone()).shown(&keys.len());
            for key in keys {
                all.bytes(key.clone());
            }
            add(&mut all);
            all
        };
        match self.call("EVALSHA", first, arguments()).await {
            Err(failure) if failure.is_unknown_script => {
                let mut load = Arguments::with_capacity(2);
                load.text("LOAD").text(script.source());
                self.call("SCRIPT", first, load).await?;
                self.call("EVALSHA", first, arguments()).await
            }
            answer => answer,
        }
    }
}

async fn keep_up(purpose: &'static str, settings: Arc<Settings>, state: watch::Sender<State>, stop: CancellationToken) {
    let mut pause = RECONNECT_MIN;
    let mut is_reported_down = false;
    while !stop.is_cancelled() {
        let began = Instant::now();
        let opened = tokio::select! {
            () = stop.cancelled() => break,
            opened = Connection::open(&settings) => opened,
        };
        let failure = match opened {
            Ok((connection, router)) => {
                tracing::info!(purpose, server = %settings.address, "connected to the server");
                is_reported_down = false;
                let connection = Arc::new(connection);
                state.send_replace(State::Connected(Arc::clone(&connection)));
                let failure = tokio::select! {
                    () = stop.cancelled() => break,
                    () = connection.doubted.cancelled() => Failure::timeout(),
                    ended = router => match ended {
                        Ok(Err(error)) => Failure::from(error),
                        Ok(Ok(())) | Err(_) => Failure::unavailable("the connection to the server was lost"),
                    },
                };
                // Calls that still wait on it fail now.
                connection.doubted.cancel();
                connection.router.abort();
                failure
            }
            Err(failure) => failure,
        };
        if !is_reported_down {
            tracing::warn!(purpose, server = %settings.address, reason = %failure.reason, "no connection to the server");
            is_reported_down = true;
        }
        state.send_replace(State::Down(failure));
        // A server that takes connections and then fails every command must not be asked without pause.
        let was_stable = began.elapsed() > settings.reconnect_max * 2;
        pause = if was_stable { RECONNECT_MIN } else { (pause * 2).min(settings.reconnect_max) };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(jittered(pause)) => {}
        }
    }
    state.send_replace(State::Down(Failure::unavailable("the store is closed")));
}

/// Between half of the pause and all of it, so that many instances don't come back together.
fn jittered(pause: Duration) -> Duration {
    let [byte, ..] = uuid::Uuid::new_v4().into_bytes();
    pause.mul_f64(0.5 + f64::from(byte) / 510.0)
}

/// Connections for blocking reads: each read has one to itself while it runs.
#[derive(Debug)]
pub(super) struct Readers {
    settings: Settings,
    /// Tells whether it makes sense to open a connection.
    link: Link,
    /// The one used last is at the end.
    idle: Mutex<Vec<(Connection, Instant)>>,
    permits: Arc<Semaphore>,
}

impl Readers {
    pub(super) fn new(settings: &Settings, link: Link) -> Self {
        let permits = Arc::new(Semaphore::new(settings.max_readers));
        let mut settings = settings.clone();
        // The client's own limit would end long waits; each read has its own.
        settings.performance.default_command_timeout = Duration::ZERO;
        Self { settings, link, idle: Mutex::default(), permits }
    }

    /// Runs one command that blocks for up to `wait`. A call that is dropped costs its connection, nothing else.
    pub(super) async fn read(
        &self,
        command: &'static str,
        key: &[u8],
        arguments: Arguments,
        wait: Duration,
    ) -> Result<Reply, Failure> {
        let (connection, permit) = self.take().await?;
        let limit = if wait.is_zero() { self.settings.command_timeout } else { wait + READ_MARGIN };
        let answer = connection.call(command, key, arguments, limit, !wait.is_zero()).await;
        if answer.as_ref().map_or_else(|failure| !failure.breaks_connection, |_| true) {
            self.give_back(connection);
        }
        drop(permit);
        answer
    }

    /// Closes what is idle.
    pub(super) fn close(&self) {
        self.permits.close();
        self.lock().clear();
    }

    async fn take(&self) -> Result<(Connection, OwnedSemaphorePermit), Failure> {
        self.link.up().await?;
        let permit = match timeout(READ_MARGIN, Arc::clone(&self.permits).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(Failure::unavailable("the store is closed")),
            Err(_) => {
                let reason = format!("{} blocking reads run already (max_readers)", self.settings.max_readers);
                return Err(Failure::unavailable(reason));
            }
        };
        let idle = {
            let mut idle = self.lock();
            std::iter::from_fn(|| idle.pop()).map(|(connection, _)| connection).find(Connection::is_usable)
        };
        match idle {
            Some(connection) => Ok((connection, permit)),
            None => Ok((Connection::open(&self.settings).await?.0, permit)),
        }
    }

    fn give_back(&self, connection: Connection) {
        let now = Instant::now();
        let mut idle = self.lock();
        idle.retain(|(_, used)| now.duration_since(*used) < IDLE_READER_KEPT);
        if !self.permits.is_closed() {
            idle.push((connection, now));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Connection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
