//! The sink that writes entries into a table of `PostgreSQL`.
//!
//! Owns the table's shape, the connections, and what the server's refusals mean. It promises that an entry is one row,
//! however often it is delivered: the key is stream and entry id, and what is there already is left alone. A batch is
//! one statement, and so one transaction; the row is committed when [`Sink::deliver`] returns.

mod config;
mod failure;
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

use self::failure::{Failure, Kind};
use self::pool::{Pool, Session};
use self::rows::Rows;
use self::table::Found;
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::{Delivery, StreamName};

/// Longest pause between attempts to prepare the table at start.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Bytes of a probe's row, below what the server would compress or move out of line.
const PROBE_ROW: usize = 1024;
/// The most rows of a probe.
const MAX_PROBE_ROWS: usize = 16 * 1024;

/// The table's columns as the server has them; no row where there is no table.
const INSPECT: &str = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), \
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND a.attgenerated = '', a.attnotnull \
    FROM pg_catalog.pg_attribute a \
    WHERE a.attrelid = pg_catalog.to_regclass($1::text) AND a.attnum > 0 AND NOT a.attisdropped";

/// Daemons that start together must not create the table at the same time; the number is this sink's own.
const LOCK: &str = "SELECT pg_catalog.pg_advisory_xact_lock(4702111234474983745)";

/// Writes entries into a table.
#[derive(Debug)]
pub struct PostgresSink {
    table: Arc<Table>,
    batch: usize,
    /// Prepares the table; ends with the sink.
    _preparing: JoinSet<()>,
}

#[derive(Debug)]
struct Table {
    sink: String,
    name: TableName,
    create: bool,
    insert: String,
    pool: Pool,
    /// Whether the table was seen, or made, since it was last found missing.
    is_there: AtomicBool,
    /// Bytes of the last batch that the server had no room for; 0 when it had.
    no_room_for: AtomicUsize,
}

impl PostgresSink {
    /// Checks the configuration and reads the files it names. Connects on its own from then on, and creates the table
    /// where it is missing and wanted.
    pub fn open(name: &str, config: &PostgresConfig) -> Result<Self, SinkError> {
        let settings = config.settings().map_err(|error| {
            let message = format!("the configuration of the sink `{name}` can't be used");
            SinkError::new(SinkErrorClass::Permanent, message).with_source(error)
        })?;
        let table = Arc::new(Table {
            sink: name.to_owned(),
            name: config.table.clone(),
            create: config.create_table,
            insert: config.table.insert(),
            pool: Pool::new(settings, config.connections),
            is_there: AtomicBool::new(false),
            no_room_for: AtomicUsize::new(0),
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
        let mut session = self.table.pool.session().await.map_err(|failure| self.table.unreachable(failure))?;
        let checked = match self.table.check(&mut session).await {
            Err(failure) if failure.kind == Kind::Lost && session.is_used => {
                drop(session);
                session = self.table.pool.fresh_session().await.map_err(|failure| self.table.unreachable(failure))?;
                self.table.check(&mut session).await
            }
            checked => checked,
        };
        checked.map_err(|failure| self.table.unusable(failure))?;
        session.give_back();
        Ok(())
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let rows = Rows::read(&origin.stream, batch)?;
        let written = self.table.write(&rows).await;
        let is_full = written.as_ref().is_err_and(|failure| failure.kind == Kind::Full);
        self.table.no_room_for.store(if is_full { rows.bytes().max(1) } else { 0 }, Ordering::Relaxed);
        written.map_err(|failure| self.table.unusable(failure))
    }

    async fn close(&self) {
        self.table.pool.close().await;
    }
}

/// Creates the table, or looks at it, as soon as the server is there: who starts the daemon learns at once what is
/// wrong, not with the first entry.
async fn prepare(table: Arc<Table>) {
    let mut pause = Duration::from_millis(500);
    let mut is_told = false;
    loop {
        let error = match table.see().await {
            Ok(()) => return info!(sink = table.sink, table = %table.name, "the table is there"),
            Err(failure) => table.unusable(failure),
        };
        if !std::mem::replace(&mut is_told, true) {
            warn!(sink = table.sink, error = %error, "the sink can't be used yet; trying again");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl Table {
    /// Writes rows in one transaction. A connection that was lost while it was idle is replaced: who writes twice
    /// writes once.
    async fn write(&self, rows: &Rows<'_>) -> Result<(), Failure> {
        let session = self.pool.session().await?;
        let is_used = session.is_used;
        match self.write_by(session, rows).await {
            Err(failure) if failure.kind == Kind::Lost && is_used => {
                self.write_by(self.pool.fresh_session().await?, rows).await
            }
            written => written,
        }
    }

    /// The session is given back when all is well; after any failure its connection is closed, which is cheaper than
    /// to find out what can still be said on it.
    async fn write_by(&self, mut session: Session<'_>, rows: &Rows<'_>) -> Result<(), Failure> {
        if !self.is_there.load(Ordering::Acquire) {
            self.look(&session).await.map_err(Failure::of_no_row)?;
        }
        let written = async {
            let statement = session.prepared(&self.insert).await?;
            session.ask(async |client| client.execute(&statement, &rows.parameters()).await).await
        };
        match written.await {
            Ok(_) => {
                session.give_back();
                Ok(())
            }
            Err(failure) => {
                if failure.kind == Kind::NoTable {
                    self.is_there.store(false, Ordering::Release);
                }
                Err(failure)
            }
        }
    }

    /// Makes sure that the table is there and can be written to.
    async fn see(&self) -> Result<(), Failure> {
        if self.is_there.load(Ordering::Acquire) {
            return Ok(());
        }
        let session = self.pool.session().await?;
        self.look(&session).await.map_err(Failure::of_no_row)?;
        session.give_back();
        Ok(())
    }

    async fn look(&self, session: &Session<'_>) -> Result<(), Failure> {
        if self.inspect(session).await? {
            self.is_there.store(true, Ordering::Release);
            return Ok(());
        }
        if !self.create {
            return Err(self.missing());
        }
        self.create(session, "COMMIT").await?;
        info!(sink = self.sink, table = %self.name, "the table was created");
        self.is_there.store(true, Ordering::Release);
        Ok(())
    }

    /// Whether the table is there; fails where its columns are not as they should be.
    async fn inspect(&self, session: &Session<'_>) -> Result<bool, Failure> {
        let name = self.name.quoted();
        let rows = session.ask(async |client| client.query(INSPECT, &[&name]).await).await?;
        let found = rows.iter().map(|row| {
            let (name, kind) = (row.try_get(0)?, row.try_get(1)?);
            Ok(Found { name, kind, needs_value: row.try_get(2)?, is_not_null: row.try_get(3)? })
        });
        let found: Vec<Found> = found.collect::<Result<_, tokio_postgres::Error>>()?;
        if found.is_empty() {
            return Ok(false);
        }
        self.name.flaw(&found).map_or(Ok(true), |flaw| Err(Failure::new(Kind::Passing, flaw)))
    }

    /// Creates the table unless another has meanwhile; `end` is `COMMIT`, or `ROLLBACK` to try it only.
    async fn create(&self, session: &Session<'_>, end: &str) -> Result<(), Failure> {
        let create = self.name.create().replacen("CREATE TABLE", "CREATE TABLE IF NOT EXISTS", 1);
        let sql = format!("BEGIN; {LOCK}; {create}; {end}");
        session.ask(async |client| client.batch_execute(&sql).await).await
    }

    /// Whether a delivery could succeed now; leaves nothing behind.
    async fn check(&self, session: &mut Session<'_>) -> Result<(), Failure> {
        if !self.inspect(session).await? {
            self.is_there.store(false, Ordering::Release);
            return if self.create { self.create(session, "ROLLBACK").await } else { Err(self.missing()) };
        }
        // No rows are inserted too only by who may insert them, into a table with the right key, that is not locked.
        let statement = session.prepared(&self.insert).await?;
        let stream: StreamName = "-".parse().expect("a valid name");
        let nothing = Rows::read(&stream, &[]).expect("nothing is wrong with nothing");
        session.ask(async |client| client.execute(&statement, &nothing.parameters()).await).await?;
        match self.no_room_for.load(Ordering::Relaxed) {
            0 => Ok(()),
            bytes => self.probe(session, bytes).await,
        }
    }

    /// Writes as much as did not fit, and takes it back.
    async fn probe(&self, session: &Session<'_>, bytes: usize) -> Result<(), Failure> {
        let rows = (bytes / PROBE_ROW + 1).min(MAX_PROBE_ROWS);
        let sql = format!(
            "BEGIN; INSERT INTO {} (stream, entry_id, received_at, data) SELECT 'aurora-bus probe', \
             pg_catalog.txid_current() || '-' || n, now(), pg_catalog.to_jsonb(pg_catalog.repeat('x', {PROBE_ROW})) \
             FROM pg_catalog.generate_series(1, {rows}) n; ROLLBACK",
            self.name.quoted()
        );
        session.ask(async |client| client.batch_execute(&sql).await).await
    }

    fn missing(&self) -> Failure {
        let text =
            format!("there is no table `{}`: set create_table = true, or create it: {}", self.name, self.name.create());
        Failure::new(Kind::NoTable, text)
    }

    fn unreachable(&self, failure: Failure) -> SinkError {
        failure.into_error(&format!("cannot reach PostgreSQL at {}", self.pool.settings.address))
    }

    fn unusable(&self, failure: Failure) -> SinkError {
        failure.into_error(&format!("cannot write to table `{}` at {}", self.name, self.pool.settings.address))
    }
}
