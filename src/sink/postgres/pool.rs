//! The connections: opened on demand, limited in number, and closed after any doubt.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};
use tracing::debug;

use super::config::PostgresSettings;
use super::error::{PostgresError, PostgresErrorKind};

/// Timeout of an orderly disconnect.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Margin by which the client waits longer than the server lets a statement run, so that the server gives up first.
const MARGIN: Duration = Duration::from_millis(500);

/// The connections of one sink.
#[derive(Debug)]
pub(super) struct PostgresPool {
    pub(super) settings: PostgresSettings,
    permits: Semaphore,
    idle: Mutex<Vec<PostgresConnection>>,
}

/// A connection in use. It is closed on drop, and kept by [`PooledSession::give_back`].
#[derive(Debug)]
pub(super) struct PooledSession<'a> {
    pool: &'a PostgresPool,
    connection: PostgresConnection,
    /// Whether it was idle before, and so may have been lost.
    pub(super) is_used: bool,
    _permit: SemaphorePermit<'a>,
}

struct PostgresConnection {
    client: Client,
    insert: Option<Statement>,
    /// Reads and writes the socket. Ends with this value.
    driver: JoinSet<()>,
}

impl std::fmt::Debug for PostgresConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresConnection").field("is_closed", &self.client.is_closed()).finish_non_exhaustive()
    }
}

impl PostgresPool {
    pub(super) fn new(settings: PostgresSettings, connections: usize) -> Self {
        Self { settings, permits: Semaphore::new(connections), idle: Mutex::default() }
    }

    /// Returns an idle connection, or else a new one. Waits while all are in use.
    pub(super) async fn session(&self) -> Result<PooledSession<'_>, PostgresError> {
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
        Ok(PooledSession { pool: self, connection, is_used, _permit: permit })
    }

    /// Opens a new connection.
    pub(super) async fn fresh_session(&self) -> Result<PooledSession<'_>, PostgresError> {
        let permit = self.permit().await?;
        // The other idle connections lead to a server that is gone.
        self.lock().clear();
        Ok(PooledSession { pool: self, connection: self.connect().await?, is_used: false, _permit: permit })
    }

    /// Closes idle connections. From then on sessions fail.
    pub(super) async fn close(&self) {
        self.permits.close();
        let idle = std::mem::take(&mut *self.lock());
        for PostgresConnection { client, insert, mut driver } in idle {
            // The driver disconnects when it has no client left.
            drop((client, insert));
            timeout(CLOSE_TIMEOUT, driver.join_next()).await.ok();
        }
    }

    async fn permit(&self) -> Result<SemaphorePermit<'_>, PostgresError> {
        self.permits
            .acquire()
            .await
            .map_err(|_closed| PostgresError::new(PostgresErrorKind::Temporary, "the sink is closed"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<PostgresConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connect(&self) -> Result<PostgresConnection, PostgresError> {
        let bound = self.settings.timeout;
        timeout(bound, self.try_to_connect()).await.unwrap_or_else(|_elapsed| Err(PostgresError::late(bound)))
    }

    async fn try_to_connect(&self) -> Result<PostgresConnection, PostgresError> {
        let PostgresSettings { server, password_file, tls, timeout, .. } = &self.settings;
        let mut server = server.clone();
        if let Some(path) = password_file {
            let password = tokio::fs::read_to_string(path).await.map_err(|error| {
                PostgresError::new(
                    PostgresErrorKind::Temporary,
                    format!("cannot read {} (password_file): {error}", path.display()),
                )
            })?;
            server.password(password.trim_end_matches(['\r', '\n']));
        }
        let (client, connection) = server.connect(tls.clone()).await?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            if let Err(error) = connection.await {
                debug!(error = %error, "PostgreSQL connection ended");
            }
        });
        // An abandoned statement must not keep its locks. Acknowledged rows must survive a crash of the server, whatever
        // the defaults of the user are.
        let setup = format!(
            "SET statement_timeout = {}; SELECT set_config('synchronous_commit', 'on', false) WHERE \
             current_setting('synchronous_commit') = 'off'",
            timeout.as_millis()
        );
        client.batch_execute(&setup).await?;
        Ok(PostgresConnection { client, insert: None, driver })
    }
}

impl PooledSession<'_> {
    /// Runs an operation within the timeout of the sink.
    pub(super) async fn run<T>(
        &self,
        question: impl AsyncFnOnce(&Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, PostgresError> {
        self.bounded(async { Ok(question(&self.connection.client).await?) }).await
    }

    /// Returns the prepared statement. Each connection prepares it once.
    pub(super) async fn prepared(&mut self, sql: &str) -> Result<Statement, PostgresError> {
        if let Some(statement) = &self.connection.insert {
            return Ok(statement.clone());
        }
        let statement = self.run(async |client| client.prepare(sql).await).await?;
        self.connection.insert = Some(statement.clone());
        Ok(statement)
    }

    /// Returns the connection to the pool.
    pub(super) fn give_back(self) {
        let Self { pool, connection, .. } = self;
        pool.lock().push(connection);
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, PostgresError>>) -> Result<T, PostgresError> {
        let bound = self.pool.settings.timeout;
        timeout(bound + MARGIN, work).await.unwrap_or_else(|_elapsed| Err(PostgresError::late(bound)))
    }
}
