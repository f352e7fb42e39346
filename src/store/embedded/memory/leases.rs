//! Leases, in memory only: one process uses the folder, and when it ends its lease holders are gone too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::event::StreamName;
use crate::store::{Cursor, Lease, Leased, StoreError, StoreErrorKind};

/// All leases of the store.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<LeaseTable>>);

#[derive(Debug, Default)]
struct LeaseTable {
    taken: u64,
    held: HashMap<(StreamName, String), HeldLease>,
}

#[derive(Debug)]
struct HeldLease {
    lease: Lease,
    until: Instant,
}

impl Leases {
    pub(crate) fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Leased {
        let now = Instant::now();
        let mut leases = self.lock();
        leases.held.retain(|_, held| held.until > now);
        let key = (stream.clone(), name.to_owned());
        match leases.held.get_mut(&key) {
            Some(held) if held.lease.holder != holder => {
                Leased::Taken { by: held.lease.holder.clone(), expires_in: held.until - now }
            }
            Some(held) => {
                held.until = now + ttl;
                Leased::Held(held.lease.clone())
            }
            None => {
                leases.taken += 1;
                let lease = Lease { name: name.to_owned(), holder: holder.to_owned(), fence: leases.taken };
                leases.held.insert(key, HeldLease { lease: lease.clone(), until: now + ttl });
                Leased::Held(lease)
            }
        }
    }

    pub(crate) fn release(&self, stream: &StreamName, lease: &Lease) -> bool {
        let mut leases = self.lock();
        let is_held = leases.holds(stream, lease);
        if is_held {
            leases.held.remove(&(stream.clone(), lease.name.clone()));
        }
        is_held
    }

    /// Returns a check that fails after the cursor's lease was lost.
    ///
    /// Run the check on the writer's thread: there, an operation that passes it runs before any call of a later holder.
    pub(crate) fn lease_check(&self, cursor: &Cursor) -> impl Fn() -> Result<(), StoreError> + Send + 'static {
        let required = cursor.lease.clone().map(|lease| (self.clone(), cursor.stream.clone(), lease));
        move || match &required {
            Some((leases, stream, lease)) if !leases.lock().holds(stream, lease) => {
                let message = format!("the lease `{}` of stream `{stream}` is no longer held", lease.name);
                Err(StoreError::new(StoreErrorKind::LeaseLost, message))
            }
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LeaseTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LeaseTable {
    fn holds(&self, stream: &StreamName, lease: &Lease) -> bool {
        let held = self.held.get(&(stream.clone(), lease.name.clone()));
        held.is_some_and(|held| held.lease == *lease && held.until > Instant::now())
    }
}
