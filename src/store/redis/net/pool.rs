//! Connections for exclusive use by one call: blocking reads, and appends that wait for replicas or the disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::store::redis::config::Settings;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::connection::{Connection, Purpose};
use crate::store::redis::net::error::Failure;

/// The time that an idle connection is kept.
const IDLE_KEPT: Duration = Duration::from_secs(30);
/// The time to wait for a free connection while all are in use.
const ACQUIRE_TIMEOUT: Duration = Duration::from_millis(1500);

/// A pool with a bounded number of connections to all servers.
#[derive(Debug)]
pub(crate) struct Pool {
    settings: Arc<Settings>,
    /// The most recently used connection is at the end.
    idle: Mutex<HashMap<Address, Vec<(Connection, Instant)>>>,
    permits: Arc<Semaphore>,
}

/// A leased connection. Dropping it closes it; [`Pool::release`] keeps it.
#[derive(Debug)]
pub(crate) struct LeasedConnection {
    pub(crate) connection: Connection,
    address: Address,
    _permit: OwnedSemaphorePermit,
}

impl Pool {
    pub(crate) fn new(settings: Arc<Settings>) -> Self {
        let permits = Arc::new(Semaphore::new(settings.max_readers));
        Self { settings, idle: Mutex::default(), permits }
    }

    pub(crate) async fn take(&self, address: &Address) -> Result<LeasedConnection, Failure> {
        let permit = match timeout(ACQUIRE_TIMEOUT, Arc::clone(&self.permits).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(Failure::unavailable("the store is closed")),
            Err(_) => {
                let max = self.settings.max_readers;
                let reason = format!("all {max} connections for blocking calls are in use (store.redis.max_readers)");
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
        Ok(LeasedConnection { connection, address: address.clone(), _permit: permit })
    }

    /// Returns a connection to the pool. No command may be in flight on it.
    pub(crate) fn release(&self, leased: LeasedConnection) {
        let LeasedConnection { connection, address, .. } = leased;
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

    /// Closes the idle connections.
    pub(crate) fn close(&self) {
        self.permits.close();
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Address, Vec<(Connection, Instant)>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
