//! Connections that one call has to itself while it runs: blocking reads, and appends that are waited for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::store::redis::config::Settings;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::connection::{Connection, Purpose};
use crate::store::redis::net::error::Failure;

/// How long a connection that no one uses is kept.
const IDLE_KEPT: Duration = Duration::from_secs(30);
/// How long to wait for a connection to come back when all are in use.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Connections to any server, a bounded number at a time.
#[derive(Debug)]
pub(crate) struct Pool {
    settings: Arc<Settings>,
    /// The one used last is at the end.
    idle: Mutex<HashMap<Address, Vec<(Connection, Instant)>>>,
    permits: Arc<Semaphore>,
}

/// A connection that is in use. It is closed when dropped; [`Pool::give_back`] keeps it.
#[derive(Debug)]
pub(crate) struct Leased {
    pub(crate) connection: Connection,
    address: Address,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(crate) fn new(settings: Arc<Settings>) -> Self {
        let permits = Arc::new(Semaphore::new(settings.max_readers));
        Self { settings, idle: Mutex::default(), permits }
    }

    pub(crate) async fn take(&self, address: &Address) -> Result<Leased, Failure> {
        let permit = match timeout(PATIENCE, Arc::clone(&self.permits).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(Failure::unavailable("the store is closed")),
            Err(_) => {
                let max = self.settings.max_readers;
                let reason = format!("{max} calls that take long run already (store.redis.max_readers)");
                return Err(Failure::unavailable(reason));
            }
        };
        let idle = {
            let mut idle = self.lock();
            let idle = idle.get_mut(address);
            idle.and_then(|idle| std::iter::from_fn(|| idle.pop()).map(|(c, _)| c).find(Connection::is_usable))
        };
        let connection = match idle {
            Some(connection) => connection,
            None => Connection::open(&self.settings, address, Purpose::Exclusive).await?.0,
        };
        Ok(Leased { connection, address: address.clone(), _permit: permit })
    }

    /// Keeps a connection on which nothing is under way any more.
    pub(crate) fn give_back(&self, leased: Leased) {
        let Leased { connection, address, .. } = leased;
        let now = Instant::now();
        let mut idle = self.lock();
        idle.retain(|_, connections| {
            connections.retain(|(_, used)| now.duration_since(*used) < IDLE_KEPT);
            !connections.is_empty()
        });
        if !self.permits.is_closed() && connection.is_usable() {
            idle.entry(address).or_default().push((connection, now));
        }
    }

    /// Closes what is idle.
    pub(crate) fn close(&self) {
        self.permits.close();
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Address, Vec<(Connection, Instant)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
