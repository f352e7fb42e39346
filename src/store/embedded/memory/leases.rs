//! Leases. One process has the folder, so memory is enough: with the process its holders are gone too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::event::StreamName;
use crate::store::{Cursor, Lease, Leased, StoreError, StoreErrorKind};

/// All leases of the store.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    taken: u64,
    held: HashMap<(StreamName, String), Held>,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    until: Instant,
}

impl Leases {
    pub(crate) fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Leased {
        let now = Instant::now();
        let mut book = self.lock();
        book.held.retain(|_, held| held.until > now);
        let key = (stream.clone(), name.to_owned());
        match book.held.get_mut(&key) {
            Some(held) if held.lease.holder != holder => {
                Leased::Taken { by: held.lease.holder.clone(), expires_in: held.until - now }
            }
            Some(held) => {
                held.until = now + ttl;
                Leased::Held(held.lease.clone())
            }
            None => {
                book.taken += 1;
                let lease = Lease { name: name.to_owned(), holder: holder.to_owned(), fence: book.taken };
                book.held.insert(key, Held { lease: lease.clone(), until: now + ttl });
                Leased::Held(lease)
            }
        }
    }

    pub(crate) fn release(&self, stream: &StreamName, lease: &Lease) -> bool {
        let mut book = self.lock();
        let is_held = book.holds(stream, lease);
        if is_held {
            book.held.remove(&(stream.clone(), lease.name.clone()));
        }
        is_held
    }

    /// Says, when asked, whether the cursor may still work. To be asked on the writer's thread: what was let through
    /// there is done before anything that a later holder asks for.
    pub(crate) fn guard(&self, cursor: &Cursor) -> impl Fn() -> Result<(), StoreError> + Send + 'static {
        let asked = cursor.lease.clone().map(|lease| (self.clone(), cursor.stream.clone(), lease));
        move || match &asked {
            Some((leases, stream, lease)) if !leases.lock().holds(stream, lease) => {
                let message = format!("the lease `{}` of stream `{stream}` is not held any more", lease.name);
                Err(StoreError::new(StoreErrorKind::LeaseLost, message))
            }
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn holds(&self, stream: &StreamName, lease: &Lease) -> bool {
        let held = self.held.get(&(stream.clone(), lease.name.clone()));
        held.is_some_and(|held| held.lease == *lease && held.until > Instant::now())
    }
}
