//! Routed clients: send a command to the server of its key, and follow redirects to another server.
//!
//! A redirected command did not run, so it is sent again to the named server. No other command is ever sent twice.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store::Durability;
use crate::store::redis::config::Settings;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::durability;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::pool::{LeasedConnection, Pool};
use crate::store::redis::net::reconnect::ReconnectingConnection;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::net::script::Script;
use crate::store::redis::net::topology::{CommandRoute, SlotMap, TopologyWatcher};

/// The time that a blocking read may take beyond its blocking time.
const READ_MARGIN: Duration = Duration::from_millis(1500);

/// A client with one connection per server, for one purpose.
#[derive(Debug, Clone)]
pub(crate) struct RoutedClient {
    shared: Arc<Shared>,
    /// The durability that appending scripts wait for, each on a connection of its own.
    durability: Durability,
    /// Whether they wait for the replicas that exist.
    is_spreading: bool,
}

#[derive(Debug)]
struct Shared {
    purpose: &'static str,
    settings: Arc<Settings>,
    servers: TopologyWatcher,
    lines: Mutex<ConnectionMap>,
    /// The connections for exclusive use.
    pool: Arc<Pool>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct ConnectionMap {
    by_server: HashMap<Address, ReconnectingConnection>,
    /// The slot map by which connections were last removed.
    pruned_by: Option<Arc<SlotMap>>,
}

impl RoutedClient {
    /// Creates a client. `tasks` keep its connections open until `stop` is cancelled.
    pub(crate) fn new(
        purpose: &'static str,
        settings: Arc<Settings>,
        servers: TopologyWatcher,
        pool: Arc<Pool>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let shared = Shared { purpose, settings, servers, lines: Mutex::default(), pool, tasks, stop };
        Self { shared: Arc::new(shared), durability: Durability::MEMORY, is_spreading: false }
    }

    /// Returns a client whose scripts return after their writes have this durability.
    pub(crate) fn waiting_for(&self, durability: Durability) -> Self {
        Self { shared: Arc::clone(&self.shared), durability, is_spreading: false }
    }

    /// Returns a client whose scripts wait for the replicas that exist, within a time limit.
    ///
    /// A result is then no promise of replication, but the loss of the server before it is an error.
    pub(crate) fn waiting_for_replicas(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), durability: Durability::MEMORY, is_spreading: true }
    }

    /// Waits for the first attempt to connect, within a time limit.
    pub(crate) async fn first_attempt(&self) {
        if let Ok(map) = self.shared.servers.map().await {
            for (server, _) in map.servers() {
                self.line(&server).first_attempt().await;
            }
        }
    }

    /// Returns why the connection to this server is down, or `None` if it is up.
    pub(crate) async fn up(&self, server: &Address) -> Result<(), Failure> {
        self.line(server).connection().await.map(|_| ())
    }

    /// Leases a connection for exclusive use to the server of this key. Return it when no command is in flight.
    pub(crate) async fn lease_connection(&self, key: &[u8]) -> Result<LeasedConnection, Failure> {
        let route = self.shared.servers.route(key).await?;
        self.lease(&route).await
    }

    pub(crate) fn release(&self, leased: LeasedConnection) {
        self.shared.pool.release(leased);
    }

    /// Handles a failure on a leased connection: the slot map may be out of date.
    pub(crate) fn classify(&self, failure: Failure) -> Failure {
        self.shared.servers.classify(failure)
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Sends one command, once. Cancel-safe, but the server may have run a cancelled command.
    pub(crate) async fn call(&self, command: &'static str, key: &[u8], arguments: Arguments) -> Result<Reply, Failure> {
        let mut route = self.shared.servers.route(key).await?;
        if !self.shared.servers.is_cluster() {
            let answer = self.call_at(&route, command, arguments).await;
            return answer.map_err(|failure| self.shared.servers.classify(failure));
        }
        loop {
            match self.call_at(&route, command, arguments.clone()).await {
                Err(failure) => route = self.shared.servers.after(&route, failure)?,
                answer => return answer,
            }
        }
    }

    /// Sends one command to this server.
    pub(crate) async fn call_server(
        &self,
        server: &Address,
        command: &'static str,
        arguments: Arguments,
    ) -> Result<Reply, Failure> {
        let connection = self.line(server).connection().await?;
        let answer = connection.call(command, arguments, self.shared.settings.command_timeout, false).await;
        answer.map_err(|failure| self.shared.servers.classify(failure))
    }

    /// Runs a script, and loads it if the server does not know it. The first key decides the node of a cluster.
    pub(crate) async fn run(&self, script: &Script, keys: &[Bytes], arguments: Arguments) -> Result<Reply, Failure> {
        let again = |all: &mut Arguments| {
            all.append(arguments.clone());
        };
        self.run_with(script, keys, again).await
    }

    /// Runs a script with arguments that are built on demand: copying many costs more than building them again.
    pub(crate) async fn run_with(
        &self,
        script: &Script,
        keys: &[Bytes],
        add: impl Fn(&mut Arguments),
    ) -> Result<Reply, Failure> {
        let mut route = self.shared.servers.route(keys.first().map_or(&b""[..], AsRef::as_ref)).await?;
        loop {
            match self.run_at(&route, script, keys, &add).await {
                Err(failure) => route = self.shared.servers.after(&route, failure)?,
                answer => return answer,
            }
        }
    }

    async fn run_at(
        &self,
        route: &CommandRoute,
        script: &Script,
        keys: &[Bytes],
        add: impl Fn(&mut Arguments),
    ) -> Result<Reply, Failure> {
        let settings = &self.shared.settings;
        if !route.is_asking && self.durability == Durability::MEMORY && !self.is_spreading {
            let connection = self.line(&route.address).connection().await?;
            return connection.evaluate(false, script, keys, add, settings.command_timeout).await;
        }
        let leased = self.lease(route).await?;
        durability::prepare(&leased.connection, self.durability, settings).await?;
        let answer = leased.connection.evaluate(route.is_asking, script, keys, add, settings.command_timeout).await;
        let confirmed = match &answer {
            Ok(_) if self.is_spreading => durability::spread(&leased.connection, settings).await,
            Ok(_) => durability::confirm(&leased.connection, self.durability, keys, route.is_asking, settings).await,
            Err(_) => Ok(()),
        };
        // A broken connection is not kept.
        self.shared.pool.release(leased);
        match confirmed {
            Ok(()) => answer,
            Err(failure) => Err(Failure { unconfirmed: answer.ok().map(Box::new), ..failure }),
        }
    }

    async fn call_at(
        &self,
        route: &CommandRoute,
        command: &'static str,
        arguments: Arguments,
    ) -> Result<Reply, Failure> {
        let limit = self.shared.settings.command_timeout;
        if !route.is_asking {
            let connection = self.line(&route.address).connection().await?;
            return connection.call(command, arguments, limit, false).await;
        }
        let leased = self.lease(route).await?;
        let answer = leased.connection.call_asking(true, command, arguments, limit, false).await;
        self.shared.pool.release(leased);
        answer
    }

    async fn lease(&self, route: &CommandRoute) -> Result<LeasedConnection, Failure> {
        self.up(&route.address).await?;
        self.shared.pool.take(&route.address).await
    }

    /// Returns the connection to a server. Removes connections to servers that the newest slot map does not contain.
    fn line(&self, server: &Address) -> ReconnectingConnection {
        let shared = &self.shared;
        let mut lines = shared.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = shared.servers.known()
            && lines.pruned_by.as_ref().is_none_or(|by| !Arc::ptr_eq(by, &map))
        {
            lines.by_server.retain(|address, line| {
                let is_needed = map.has(address) || address == server;
                if !is_needed {
                    line.close();
                }
                is_needed
            });
            lines.pruned_by = Some(map);
        }
        if let Some(line) = lines.by_server.get(server) {
            return line.clone();
        }
        let (line, keep_up) = ReconnectingConnection::new(
            shared.purpose,
            server.clone(),
            Arc::clone(&shared.settings),
            shared.servers.clone(),
            &shared.stop,
        );
        shared.tasks.spawn(keep_up);
        lines.by_server.insert(server.clone(), line.clone());
        line
    }
}

/// Runs blocking reads, each on a connection of its own.
#[derive(Debug)]
pub(crate) struct Readers {
    pool: Pool,
    /// The client that knows whether the server is reachable.
    link: RoutedClient,
}

impl Readers {
    pub(crate) fn new(settings: Arc<Settings>, link: RoutedClient) -> Self {
        Self { pool: Pool::new(settings), link }
    }

    /// Runs one command that blocks for up to `wait`. A cancelled call closes its connection and has no other effect.
    pub(crate) async fn read(
        &self,
        command: &'static str,
        key: &[u8],
        arguments: Arguments,
        wait: Duration,
    ) -> Result<Reply, Failure> {
        let shared = &self.link.shared;
        let limit = if wait.is_zero() { shared.settings.command_timeout } else { wait + READ_MARGIN };
        let mut route = shared.servers.route(key).await?;
        loop {
            self.link.up(&route.address).await?;
            let leased = self.pool.take(&route.address).await?;
            let answer = leased
                .connection
                .call_asking(route.is_asking, command, arguments.clone(), limit, !wait.is_zero())
                .await;
            self.pool.release(leased);
            match answer {
                Err(failure) => route = shared.servers.after(&route, failure)?,
                answer => return answer,
            }
        }
    }

    /// Closes the idle connections.
    pub(crate) fn close(&self) {
        self.pool.close();
    }
}
