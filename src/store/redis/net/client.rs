//! Links: the way of a command to the server that has its key, and to the one which that server names instead.
//!
//! A command that a server has sent elsewhere was not run, so it is sent again, there. Nothing else is ever sent twice.

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
use crate::store::redis::net::pool::{Leased, Pool};
use crate::store::redis::net::reconnect::Line;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::net::script::Script;
use crate::store::redis::net::topology::{Map, Route, Servers};

/// What a blocking read may take beyond the time it blocks.
const READ_MARGIN: Duration = Duration::from_millis(1500);

/// A line to each server that is needed, for one purpose.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    /// What scripts that append wait for, each on a connection of its own.
    durability: Durability,
    /// Whether they wait for replicas as far as there are any.
    is_spreading: bool,
}

#[derive(Debug)]
struct Shared {
    purpose: &'static str,
    settings: Arc<Settings>,
    servers: Servers,
    lines: Mutex<Lines>,
    /// For what needs a connection to itself.
    pool: Arc<Pool>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug, Default)]
struct Lines {
    by_server: HashMap<Address, Line>,
    /// The map by which lines were given up last.
    pruned_by: Option<Arc<Map>>,
}

impl Link {
    /// A link whose lines are kept up by `tasks` until `stop` is cancelled.
    pub(crate) fn new(
        purpose: &'static str,
        settings: Arc<Settings>,
        servers: Servers,
        pool: Arc<Pool>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let shared = Shared { purpose, settings, servers, lines: Mutex::default(), pool, tasks, stop };
        Self { shared: Arc::new(shared), durability: Durability::MEMORY, is_spreading: false }
    }

    /// The same, but scripts return only when what they wrote is as durable as that.
    pub(crate) fn waiting_for(&self, durability: Durability) -> Self {
        Self { shared: Arc::clone(&self.shared), durability, is_spreading: false }
    }

    /// The same, but scripts return only when replicas have what they wrote, as far as there are any and they are not
    /// slow: an answer is then no promise, but a server that dies before is an error.
    pub(crate) fn spreading(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), durability: Durability::MEMORY, is_spreading: true }
    }

    /// Waits for the outcome of the first attempt to connect, within bounds.
    pub(crate) async fn first_attempt(&self) {
        if let Ok(map) = self.shared.servers.map().await {
            for (server, _) in map.servers() {
                self.line(&server).first_attempt().await;
            }
        }
    }

    /// Why the line to this server is down, if it is.
    pub(crate) async fn up(&self, server: &Address) -> Result<(), Failure> {
        self.line(server).connection().await.map(|_| ())
    }

    /// A connection of its own to the server of this key, to be given back once nothing is under way on it.
    pub(crate) async fn alone(&self, key: &[u8]) -> Result<Leased, Failure> {
        let route = self.shared.servers.route(key).await?;
        self.lease(&route).await
    }

    pub(crate) fn give_back(&self, leased: Leased) {
        self.shared.pool.give_back(leased);
    }

    /// A failure on such a connection, and what it tells of the servers.
    pub(crate) fn judged(&self, failure: Failure) -> Failure {
        self.shared.servers.judged(failure)
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Sends one command, once. Cancel-safe, though the server may then have run it.
    pub(crate) async fn call(&self, command: &'static str, key: &[u8], arguments: Arguments) -> Result<Reply, Failure> {
        let mut route = self.shared.servers.route(key).await?;
        if !self.shared.servers.is_cluster() {
            let answer = self.call_at(&route, command, arguments).await;
            return answer.map_err(|failure| self.shared.servers.judged(failure));
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
        answer.map_err(|failure| self.shared.servers.judged(failure))
    }

    /// Runs a script, loading it where the server does not know it. The first key tells the cluster's node.
    pub(crate) async fn run(&self, script: &Script, keys: &[Bytes], arguments: Arguments) -> Result<Reply, Failure> {
        let again = |all: &mut Arguments| {
            all.append(arguments.clone());
        };
        self.run_with(script, keys, again).await
    }

    /// The same with arguments that are made when they are needed: copying many costs more than making them again.
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
        route: &Route,
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
        // A connection that broke is not kept.
        self.shared.pool.give_back(leased);
        match confirmed {
            Ok(()) => answer,
            Err(failure) => Err(Failure { unconfirmed: answer.ok().map(Box::new), ..failure }),
        }
    }

    async fn call_at(&self, route: &Route, command: &'static str, arguments: Arguments) -> Result<Reply, Failure> {
        let limit = self.shared.settings.command_timeout;
        if !route.is_asking {
            let connection = self.line(&route.address).connection().await?;
            return connection.call(command, arguments, limit, false).await;
        }
        let leased = self.lease(route).await?;
        let answer = leased.connection.ask(true, command, arguments, limit, false).await;
        self.shared.pool.give_back(leased);
        answer
    }

    async fn lease(&self, route: &Route) -> Result<Leased, Failure> {
        self.up(&route.address).await?;
        self.shared.pool.take(&route.address).await
    }

    /// The line to a server. Lines to servers that the newest map does not have are given up.
    fn line(&self, server: &Address) -> Line {
        let shared = &self.shared;
        let mut lines = shared.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = shared.servers.known()
            && lines.pruned_by.as_ref().is_none_or(|by| !Arc::ptr_eq(by, &map))
        {
            lines.by_server.retain(|address, line| {
                let is_needed = map.has(address) || address == server;
                if !is_needed {
                    line.give_up();
                }
                is_needed
            });
            lines.pruned_by = Some(map);
        }
        if let Some(line) = lines.by_server.get(server) {
            return line.clone();
        }
        let (line, keep_up) = Line::new(
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

/// Blocking reads: each has a connection to itself while it runs.
#[derive(Debug)]
pub(crate) struct Readers {
    pool: Pool,
    /// Tells whether it makes sense to open a connection.
    link: Link,
}

impl Readers {
    pub(crate) fn new(settings: Arc<Settings>, link: Link) -> Self {
        Self { pool: Pool::new(settings), link }
    }

    /// Runs one command that blocks for up to `wait`. A call that is dropped costs its connection, nothing else.
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
            let answer =
                leased.connection.ask(route.is_asking, command, arguments.clone(), limit, !wait.is_zero()).await;
            self.pool.give_back(leased);
            match answer {
                Err(failure) => route = shared.servers.after(&route, failure)?,
                answer => return answer,
            }
        }
    }

    /// Closes what is idle.
    pub(crate) fn close(&self) {
        self.pool.close();
    }
}
