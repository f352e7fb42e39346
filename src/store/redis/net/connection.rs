//! One connection to one server.
//!
//! A connection is used while its state is certain. After a timeout, a cancelled blocking call or a malformed reply it is
//! closed and another one is opened, so that a late reply can never be taken for the reply to another command. No
//! command is sent twice.

use std::fmt::Write as _;
use std::pin::pin;
use std::sync::OnceLock;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::{Server, ServerConfig};
use fred::types::{ClusterHash, CustomCommand, Value};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::event::EntryId;
use crate::store::StoreErrorKind;
use crate::store::redis::config::Settings;
use crate::store::redis::net::address::{Address, Topology};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::net::script::Script;

/// The arguments of a command.
#[derive(Debug, Clone, Default)]
pub(crate) struct Arguments(Vec<Value>);

impl Arguments {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    pub(crate) fn reserve(&mut self, more: usize) {
        self.0.reserve(more);
    }

    pub(crate) fn text(&mut self, text: &'static str) -> &mut Self {
        self.bytes(Bytes::from_static(text.as_bytes()))
    }

    pub(crate) fn bytes(&mut self, bytes: impl Into<Bytes>) -> &mut Self {
        self.0.push(Value::Bytes(bytes.into()));
        self
    }

    pub(crate) fn display(&mut self, value: &impl ToString) -> &mut Self {
        self.bytes(value.to_string())
    }

    pub(crate) fn name(&mut self, name: &str) -> &mut Self {
        self.bytes(Bytes::copy_from_slice(name.as_bytes()))
    }

    /// Adds many ids in one allocation.
    pub(crate) fn ids(&mut self, ids: &[EntryId]) -> &mut Self {
        let mut texts = BytesMut::with_capacity(ids.len() * 20);
        for id in ids {
            write!(texts, "{id}").expect("writing to a growing buffer cannot fail");
            self.bytes(texts.split().freeze());
        }
        self
    }

    pub(crate) fn append(&mut self, other: Self) -> &mut Self {
        self.0.extend(other.0);
        self
    }
}

/// The purpose of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Many calls at a time.
    Shared,
    /// One call at a time, which may take long.
    Exclusive,
    /// Requests to a sentinel.
    Sentinel,
}

/// One connection, closed when dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    client: Client,
    router: AbortHandle,
    address: Address,
    /// Cancelled when the connection must not be used any more.
    pub(crate) poisoned: CancellationToken,
    /// Cancelled when the connection works but leads to the wrong server.
    pub(crate) wrong_server: CancellationToken,
    /// Set when the server is known to support waiting for its disk.
    pub(crate) reaches_disk: OnceLock<()>,
}

/// The task that drives a connection. Its result is the reason for the end.
pub(crate) type Router = JoinHandle<Result<(), fred::error::Error>>;

impl Drop for Connection {
    fn drop(&mut self) {
        self.router.abort();
    }
}

impl Connection {
    /// Connects, within the command timeout. A server found by sentinels must be a primary.
    pub(crate) async fn open(
        settings: &Settings,
        address: &Address,
        purpose: Purpose,
    ) -> Result<(Self, Router), Failure> {
        let config = if purpose == Purpose::Sentinel { &settings.sentinel } else { &settings.config };
        let mut config = config.clone();
        let server = Server::new_with_tls(&*address.host, address.port, settings.tls_server_name.clone());
        config.server = ServerConfig::Centralized { server };
        let mut performance = settings.performance.clone();
        if purpose != Purpose::Shared {
            // The client's own timeout would end long waits. Each call has a timeout instead.
            performance.default_command_timeout = Duration::ZERO;
        }
        let client = Client::new(config, Some(performance), Some(settings.connection.clone()), None);
        let mut connected = pin!(client.wait_for_connect());
        // The first poll subscribes to the result, so poll before connecting.
        let is_ready = std::future::poll_fn(|context| Poll::Ready(connected.as_mut().poll(context).is_ready())).await;
        debug_assert!(!is_ready, "the client is new");
        let router = client.connect();
        let connection = Self {
            router: router.abort_handle(),
            client: client.clone(),
            address: address.clone(),
            poisoned: CancellationToken::new(),
            wrong_server: CancellationToken::new(),
            reaches_disk: OnceLock::new(),
        };
        match timeout(settings.command_timeout, connected).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Failure::from(error)),
            Err(_) => return Err(Failure::timeout()),
        }
        if purpose != Purpose::Sentinel && matches!(settings.topology, Topology::Sentinel { .. }) {
            connection.check_is_primary(settings.command_timeout).await?;
        }
        Ok((connection, router))
    }

    /// Checks that the server is a primary. Without permission for ROLE, the first write detects a replica.
    async fn check_is_primary(&self, limit: Duration) -> Result<(), Failure> {
        let role = match self.call("ROLE", Arguments::default(), limit, false).await {
            Err(failure) if failure.kind == StoreErrorKind::Denied => return Ok(()),
            answer => answer?.list()?.into_iter().next().ok_or_else(|| Failure::unexpected("no role"))?.bytes()?,
        };
        if role.as_ref() == b"master" {
            return Ok(());
        }
        let reason = format!("{} is still a replica, although the sentinels name it as the primary", self.address);
        Err(Failure { is_wrong_server: true, ..Failure::unavailable(reason) })
    }

    pub(crate) fn is_usable(&self) -> bool {
        let is_given_up = self.poisoned.is_cancelled() || self.wrong_server.is_cancelled();
        !self.router.is_finished() && !is_given_up && self.client.is_connected()
    }

    /// Closes it for all callers.
    pub(crate) fn end(&self) {
        self.poisoned.cancel();
        self.router.abort();
    }

    /// Sends one command and returns its reply. Calls may overlap and may be cancelled: replies arrive in order, and the
    /// replies of cancelled calls are dropped.
    pub(crate) async fn call(
        &self,
        command: &'static str,
        arguments: Arguments,
        limit: Duration,
        is_blocking: bool,
    ) -> Result<Reply, Failure> {
        // A connection leads to one server, so the slot does not matter.
        let command = CustomCommand::new_static(command, ClusterHash::Custom(0), is_blocking);
        let answer = tokio::select! {
            biased;
            answer = timeout(limit, self.client.custom_raw(command, arguments.0)) => match answer {
                Ok(Ok(frame)) => Reply::accept(&self.address, frame),
                Ok(Err(error)) => Err(Failure::from(error)),
                Err(_) => Err(Failure::timeout()),
            },
            () = self.poisoned.cancelled() => Err(Failure::unavailable("the connection to the server was lost")),
        };
        if let Err(failure) = &answer {
            if failure.breaks_connection {
                self.poisoned.cancel();
            }
            if failure.is_wrong_server {
                self.wrong_server.cancel();
            }
        }
        answer
    }

    /// Sends one command, after ASKING if the server requires it. No other command may be sent in between.
    pub(crate) async fn call_asking(
        &self,
        is_asking: bool,
        command: &'static str,
        arguments: Arguments,
        limit: Duration,
        is_blocking: bool,
    ) -> Result<Reply, Failure> {
        if is_asking {
            self.call("ASKING", Arguments::default(), limit, false).await?;
        }
        self.call(command, arguments, limit, is_blocking).await
    }

    /// Runs a script, and loads it if the server does not know it. The arguments are built on demand: copying many costs
    /// more than building them again.
    pub(crate) async fn evaluate(
        &self,
        is_asking: bool,
        script: &Script,
        keys: &[Bytes],
        add: impl Fn(&mut Arguments),
        limit: Duration,
    ) -> Result<Reply, Failure> {
        let arguments = || {
            let mut all = Arguments::with_capacity(16);
            all.bytes(script.sha().clone()).display(&keys.len());
            for key in keys {
                all.bytes(key.clone());
            }
            add(&mut all);
            all
        };
        match self.call_asking(is_asking, "EVALSHA", arguments(), limit, false).await {
            Err(failure) if failure.is_unknown_script => {
                let mut load = Arguments::with_capacity(2);
                load.text("LOAD").name(script.source());
                self.call("SCRIPT", load, limit, false).await?;
                self.call_asking(is_asking, "EVALSHA", arguments(), limit, false).await
            }
            answer => answer,
        }
    }
}
