//! The `PostgreSQL` sink: inserts entries into a table.
//!
//! Owns the table, the connections, and the meaning of the server's errors. Promises that an entry is one row, however
//! often it is delivered. The key is stream and entry id, and an existing row is never changed. A batch is one
//! statement, and so one transaction. The rows are committed when [`Sink::deliver`] returns.

mod config;
mod error;
mod pool;
mod rows;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinSet;
use tracing::{info, warn};

pub use config::PostgresConfig;
pub use table::{InvalidTableName, TableName};

use self::error::{PostgresError, PostgresErrorKind};
use self::pool::{PooledSession, PostgresPool};
use self::rows::InsertRows;
use self::table::TableColumn;
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::{Delivery, StreamName};

/// Maximum pause between attempts to prepare the table at start.
const MAX_PAUSE: Duration = Duration::from_secs(30);
/// Size of a row of a probe, in bytes. Below the size from which the server compresses or moves values.
const PROBE_ROW: usize = 1024;
/// Maximum number of rows of a probe.
const MAX_PROBE_ROWS: usize = 16 * 1024;

/// Selects the columns of the table. Returns no row if there is no table.
const INSPECT: &str = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), \
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = '', a.attnotnull \
    FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = pg_catalog.to_regclass($1::text) AND a.attnum > 0 AND NOT a.attisdropped";

/// Keeps daemons that start together from creating the table at the same time. The number belongs to this sink.
const LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(4702111234474983745)";

/// Inserts entries into a table.
#[derive(Debug)]
pub struct PostgresSink {
    table: Arc<Table>,
    batch: usize,
    /// Prepares the table. Ends with the sink.
    _preparing: JoinSet<()>,
}

#[derive(Debug)]
struct Table {
    sink: String,
    name: TableName,
    create: bool,
    insert: String,
    pool: PostgresPool,
    /// Whether the table exists, as far as known.
    is_ready: AtomicBool,
    /// Size of the last batch that did not fit into the server, in bytes; 0 if it fitted.
    rejected_bytes: AtomicUsize,
}

impl PostgresSink {
    /// Checks the configuration and reads the files that it names. Then connects in the background, and creates the
    /// table if that is configured and it is missing.
    pub fn open(name: &str, config: &PostgresConfig) -> Result<Self, SinkError> {
        let settings = config.settings().map_err(|error| {
            let message = format!("the configuration of sink `{name}` is not valid");
            SinkError::new(SinkErrorClass::Permanent, message).with_source(error)
        })?;
        let table = Arc::new(Table {
            sink: name.to_owned(),
            name: config.table.clone(),
            create: config.create_table,
            insert: config.table.insert(),
            pool: PostgresPool::new(settings, config.connections),
            is_ready: AtomicBool::new(false),
            rejected_bytes: AtomicUsize::new(0),
        });
        let mut preparing = JoinSet::new();
        preparing.spawn(prepare(Arc::clone(&table)));
        Ok(Self { table, batch: config.batch, _preparing: preparing })
    }
}

#[async_trait]
impl Sink for PostgresSink {
    fn max_batch(&self) -> usize {
        self.batch
    }

    async fn check(&self) -> Result<(), SinkError> {
        let mut session = self.table.pool.session().await.map_err(|error| self.table.unreachable(error))?;
        let checked = match self.table.check(&mut session).await {
            Err(error) if error.kind == PostgresErrorKind::Lost && session.is_used => {
                drop(session);
                session = self.table.pool.fresh_session().await.map_err(|error| self.table.unreachable(error))?;
                self.table.check(&mut session).await
            }
            checked => checked,
        };
        checked.map_err(|error| self.table.unusable(error))?;
        session.give_back();
        Ok(())
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let rows = InsertRows::read(&origin.stream, batch)?;
        let written = self.table.write(&rows).await;
        let is_full = written.as_ref().is_err_and(|error| error.kind == PostgresErrorKind::Full);
        self.table.rejected_bytes.store(if is_full { rows.bytes().max(1) } else { 0 }, Ordering::Relaxed);
        written.map_err(|error| self.table.unusable(error))
    }

    async fn close(&self) {
        self.table.pool.close().await;
    }
}

/// Creates or checks the table as soon as the server is reachable, so that problems show at start and not with the
/// first entry.
async fn prepare(table: Arc<Table>) {
    let mut pause = Duration::from_millis(500);
    let mut is_told = false;
    loop {
        let error = match table.ensure_ready().await {
            Ok(()) => return info!(sink = table.sink, table = %table.name, "table ready"),
            Err(error) => table.unusable(error),
        };
        if !std::mem::replace(&mut is_told, true) {
            warn!(sink = table.sink, error = %error, "sink not ready, trying again");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

impl Table {
    /// Writes rows in one transaction. If an idle connection was lost, the write is repeated on a new one, which
    /// inserts no row twice.
    async fn write(&self, rows: &InsertRows<'_>) -> Result<(), PostgresError> {
        let session = self.pool.session().await?;
        let is_used = session.is_used;
        match self.write_by(session, rows).await {
            Err(error) if error.kind == PostgresErrorKind::Lost && is_used => {
                self.write_by(self.pool.fresh_session().await?, rows).await
            }
            written => written,
        }
    }

    /// Writes rows on one connection. After any failure the connection is closed, because its state is unknown.
    async fn write_by(&self, mut session: PooledSession<'_>, rows: &InsertRows<'_>) -> Result<(), PostgresError> {
        if !self.is_ready.load(Ordering::Acquire) {
            self.inspect_or_create(&session).await.map_err(PostgresError::without_row)?;
        }
        let written = async {
            let statement = session.prepared(&self.insert).await?;
            session.run(async |client| client.execute(&statement, &rows.parameters()).await).await
        };
        match written.await {
            Ok(_) => {
                session.give_back();
                Ok(())
            }
            Err(error) => {
                if error.kind == PostgresErrorKind::NoTable {
                    self.is_ready.store(false, Ordering::Release);
                }
                Err(error)
            }
        }
    }

    /// Checks the table if it is not known to exist.
    async fn ensure_ready(&self) -> Result<(), PostgresError> {
        if self.is_ready.load(Ordering::Acquire) {
            return Ok(());
        }
        let session = self.pool.session().await?;
        self.inspect_or_create(&session).await.map_err(PostgresError::without_row)?;
        session.give_back();
        Ok(())
    }

    async fn inspect_or_create(&self, session: &PooledSession<'_>) -> Result<(), PostgresError> {
        if self.inspect(session).await? {
            self.is_ready.store(true, Ordering::Release);
            return Ok(());
        }
        if !self.create {
            return Err(self.table_missing());
        }
        self.create(session, "COMMIT").await?;
        info!(sink = self.sink, table = %self.name, "table created");
        self.is_ready.store(true, Ordering::Release);
        Ok(())
    }

    /// Returns whether the table exists. Fails if its columns are not as required.
    async fn inspect(&self, session: &PooledSession<'_>) -> Result<bool, PostgresError> {
        let name = self.name.quoted();
        let rows = session.run(async |client| client.query(INSPECT, &[&name]).await).await?;
        let found = rows.iter().map(|row| {
            let (name, kind) = (row.try_get(0)?, row.try_get(1)?);
            Ok(TableColumn { name, kind, needs_value: row.try_get(2)?, is_not_null: row.try_get(3)? })
        });
        let found: Vec<TableColumn> = found.collect::<Result<_, tokio_postgres::Error>>()?;
        if found.is_empty() {
            return Ok(false);
        }
        self.name.fault(&found).map_or(Ok(true), |fault| Err(PostgresError::new(PostgresErrorKind::Temporary, fault)))
    }

    /// Creates the table unless another daemon has done so. `end` is `COMMIT`, or `ROLLBACK` for a trial.
    async fn create(&self, session: &PooledSession<'_>, end: &str) -> Result<(), PostgresError> {
        let create = self.name.create().replacen("CREATE TABLE", "CREATE TABLE IF NOT EXISTS", 1);
        let sql = format!("BEGIN; {LOCK}; {create}; {end}");
        session.run(async |client| client.batch_execute(&sql).await).await
    }

    /// Checks whether a delivery could succeed now. Leaves no trace.
    async fn check(&self, session: &mut PooledSession<'_>) -> Result<(), PostgresError> {
        if !self.inspect(session).await? {
            self.is_ready.store(false, Ordering::Release);
            return if self.create { self.create(session, "ROLLBACK").await } else { Err(self.table_missing()) };
        }
        // An insert of no rows also needs the right to insert, a table with the right key, and no lock on the table.
        let statement = session.prepared(&self.insert).await?;
        let stream: StreamName = "-".parse().expect("a valid name");
        let nothing = InsertRows::read(&stream, &[]).expect("no deliveries have no errors");
        session.run(async |client| client.execute(&statement, &nothing.parameters()).await).await?;
        match self.rejected_bytes.load(Ordering::Relaxed) {
            0 => Ok(()),
            bytes => self.probe(session, bytes).await,
        }
    }

    /// Writes as many bytes as did not fit before, and rolls back.
    async fn probe(&self, session: &PooledSession<'_>, bytes: usize) -> Result<(), PostgresError> {
        let rows = (bytes / PROBE_ROW + 1).min(MAX_PROBE_ROWS);
        let sql = format!(
            "BEGIN; INSERT INTO {} (stream, entry_id, received_at, data) SELECT 'aurora-bus probe', \
             pg_catalog.txid_current() || '-' || n, now(), pg_catalog.to_jsonb(pg_catalog.repeat('x', {PROBE_ROW})) \
             FROM pg_catalog.generate_series(1, {rows}) n; ROLLBACK",
            self.name.quoted()
        );
        session.run(async |client| client.batch_execute(&sql).await).await
    }

    fn table_missing(&self) -> PostgresError {
        let text = format!(
            "table `{}` does not exist: set create_table = true, or create it: {}",
            self.name,
            self.name.create()
        );
        PostgresError::new(PostgresErrorKind::NoTable, text)
    }

    fn unreachable(&self, error: PostgresError) -> SinkError {
        error.into_error(&format!("cannot reach PostgreSQL at {}", self.pool.settings.address))
    }

    fn unusable(&self, error: PostgresError) -> SinkError {
        error.into_error(&format!("cannot write to table `{}` at {}", self.name, self.pool.settings.address))
    }
}
