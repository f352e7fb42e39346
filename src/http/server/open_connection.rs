//! The counts of a connection: among all open ones, and among the idle ones of its address.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntGauge;
use tokio::sync::OwnedSemaphorePermit;

use crate::limiter::{KeyedLimiter, KeyedPermit};

/// Counts a connection as open until its socket is dropped. A WebSocket outlives its request.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    _count: Box<OpenCount>,
}

#[derive(Debug)]
struct OpenCount {
    _permit: OwnedSemaphorePermit,
    gauge: IntGauge,
}

impl OpenConnection {
    pub(super) fn new(permit: OwnedSemaphorePermit, gauge: IntGauge) -> Self {
        gauge.inc();
        Self { _count: Box::new(OpenCount { _permit: permit, gauge }) }
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Counts a connection as idle while it has no request.
///
/// So one address cannot take all connections with silent or slow ones. Connections with a request have other limits.
#[derive(Debug)]
pub(super) struct IdleConnection {
    limiter: Arc<KeyedLimiter>,
    address: IpAddr,
    /// `None` while a request is handled.
    permit: Mutex<Option<KeyedPermit>>,
}

impl IdleConnection {
    /// Returns `None` if the address has too many idle connections.
    pub(super) fn new(limiter: &Arc<KeyedLimiter>, address: IpAddr) -> Option<Arc<Self>> {
        let permit = limiter.try_acquire(address)?;
        Some(Arc::new(Self { limiter: Arc::clone(limiter), address, permit: Mutex::new(Some(permit)) }))
    }

    /// Marks the connection as busy with a request.
    pub(super) fn set_busy(&self) {
        self.set(None);
    }

    /// Marks the connection as idle. Returns whether the address may have one more idle connection.
    pub(super) fn try_set_idle(&self) -> bool {
        let permit = self.limiter.try_acquire(self.address);
        let is_allowed = permit.is_some();
        self.set(permit);
        is_allowed
    }

    fn set(&self, permit: Option<KeyedPermit>) {
        *self.permit.lock().unwrap_or_else(PoisonError::into_inner) = permit;
    }
}
