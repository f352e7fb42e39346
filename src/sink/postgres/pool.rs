//! Connections: opened as they are needed, kept, bounded in number, and thrown away after any doubt.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use tracing::debug;

use super::config::Settings;
use super::failure::{Failure, Kind};

/// How long saying goodbye to the server may take.
const CLOSE_TIME: Duration = Duration::from_secs(1);
/// How much longer an answer may take than the server lets a statement run: who gives up first is the server.
const MARGIN: Duration = Duration::from_millis(500);

/// The connections of one sink.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) settings: Settings,
    permits: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

/// A connection in someone's hands. It is closed when this is dropped, and kept when it is given back.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pool: &'a Pool,
    connection: Connection,
    /// Whether it was idle before, so that it may have been lost since.
    pub(super) is_used: bool,
    _permit: SemaphorePermit<'a>,
}

struct Connection {
    client: Client,
    insert: Option<Statement>,
    /// Reads and writes the socket; ends with this value.
    driver: JoinSet<()>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("is_closed", &self.client.is_closed()).finish_non_exhaustive()
    }
}

impl Pool {
    pub(super) fn new(settings: Settings, connections: usize) -> Self {
        Self { settings, permits: Semaphore::new(connections), idle: Mutex::default() }
    }

    /// A connection: an idle one, or else a new one. Waits while all are in use.
    pub(super) async fn session(&self) -> Result<Session<'_>, Failure> {
        let permit = self.permit().await?;
        let idle = {
            let mut idle = self.lock();
            idle.retain(|connection| !connection.client.is_closed());
            idle.pop()
        };
        let (connection, is_used) = match idle {
            Some(connection) => (connection, true),
            None => (self.connect().await?, false),
        };
        Ok(Session { pool: self, connection, is_used, _permit: permit })
    }

    /// A connection that was made now.
    pub(super) async fn fresh_session(&self) -> Result<Session<'_>, Failure> {
        let permit = self.permit().await?;
        // What was opened to a server that is gone is not worth a try each.
        self.lock().clear();
        Ok(Session { pool: self, connection: self.connect().await?, is_used: false, _permit: permit })
    }

    /// Ends idle connections; no session can be had any more.
    pub(super) async fn close(&self) {
        self.permits.close();
        let idle = std::mem::take(&mut *self.lock());
        for Connection { client, insert, mut driver } in idle {
            // The driver says goodbye once nobody can ask it for anything.
            drop((client, insert));
            timeout(CLOSE_TIME, driver.join_next()).await.ok();
        }
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, Failure> {
        self.permits.acquire().await.map_err(|_closed| Failure::new(Kind::Passing, "the sink is closed"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let bound = self.settings.timeout;
        timeout(bound, self.try_to_connect()).await.unwrap_or_else(|_elapsed| Err(Failure::late(bound)))
    }

    async fn try_to_connect(&self) -> Result<Connection, Failure> {
        let Settings { server, password_file, tls, timeout, .. } = &self.settings;
        let mut server = server.clone();
        if let Some(path) = password_file {
            let password = tokio::fs::read_to_string(path).await.map_err(|error| {
                Failure::new(Kind::Passing, format!("cannot read {} (password_file): {error}", path.display()))
            })?;
            server.password(password.trim_end_matches(['\r', '\n']));
        }
        let (client, connection) = server.connect(tls.clone()).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            if let Err(error) = connection.await {
                debug!(error = %error, "a connection to PostgreSQL ended");
            }
        });
        // A statement that nobody waits for any more must not keep its locks. What is acknowledged must survive a
        // crash of the server, whatever the user's defaults are.
        let setup = format!(
            "SET statement_timeout = {}; SELECT set_config('synchronous_commit', 'on', false) WHERE \
             current_setting('synchronous_commit') = 'off'",
            timeout.as_millis()
        );
        client.batch_execute(&setup).await?;
        Ok(Connection { client, insert: None, driver })
    }
}

impl Session<'_> {
    /// Asks the server something, within the sink's time-out.
    pub(super) async fn ask<T>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Failure> {
        self.bounded(async { Ok(question(&self.connection.client).await?) }).await
    }

    /// The statement, prepared once for each connection.
    pub(super) async fn prepared(&mut self, sql: &str) -> Result<Statement, Failure> {
        if let Some(statement) = &self.connection.insert {
            return Ok(statement.clone());
        }
        let statement = self.ask(async |client| client.prepare(sql).await).await?;
        self.connection.insert = Some(statement.clone());
        Ok(statement)
    }

    /// Keeps the connection for the next one.
    pub(super) fn give_back(self) {
        let Self { pool, connection, .. } = self;
        pool.lock().push(connection);
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let bound = self.pool.settings.timeout;
        timeout(bound + MARGIN, work).await.unwrap_or_else(|_elapsed| Err(Failure::late(bound)))
    }
}
