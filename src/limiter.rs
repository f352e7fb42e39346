//! Concurrency limits per address or principal.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Limits how many permits each address or principal holds at a time, so that none of them takes all.
#[derive(Debug)]
pub(crate) struct KeyedLimiter {
    limit: usize,
    /// The semaphore of each key that holds a permit or waits for one.
    semaphores: Mutex<HashMap<LimitKey, Arc<Semaphore>>>,
}

/// The address or principal that permits are counted under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum LimitKey {
    /// As [`counted_address`] returns it.
    Address(IpAddr),
    Principal(Arc<str>),
}

impl From<IpAddr> for LimitKey {
    fn from(address: IpAddr) -> Self {
        Self::Address(counted_address(address))
    }
}

/// Returns the address that a client counts under: all of it for IPv4, the /64 network for IPv6.
///
/// One machine has a whole /64 network of IPv6 addresses.
pub(crate) fn counted_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// One or more permits of a key, or the wait for one. Dropping it releases them.
#[derive(Debug)]
pub(crate) struct KeyedPermit {
    limiter: Arc<KeyedLimiter>,
    key: LimitKey,
    semaphore: Option<Arc<Semaphore>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl KeyedLimiter {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, semaphores: Mutex::default() })
    }

    /// Returns a permit, or `None` if the key has none left.
    pub(crate) fn try_acquire(self: &Arc<Self>, key: impl Into<LimitKey>) -> Option<KeyedPermit> {
        self.try_acquire_many(key, 1)
    }

    /// Returns `count` permits as one, or `None` if the key has fewer left. A count above the limit takes all of them.
    pub(crate) fn try_acquire_many(self: &Arc<Self>, key: impl Into<LimitKey>, count: usize) -> Option<KeyedPermit> {
        let (mut permit, semaphore) = self.register(key.into());
        let count = u32::try_from(count.min(self.limit)).ok()?;
        permit.permit = Some(semaphore.try_acquire_many_owned(count).ok()?);
        Some(permit)
    }

    /// Waits for a permit, first come, first served. Cancel-safe: a cancelled wait loses its turn.
    pub(crate) async fn acquire(self: &Arc<Self>, key: impl Into<LimitKey>) -> KeyedPermit {
        let (mut permit, semaphore) = self.register(key.into());
        permit.permit = semaphore.acquire_owned().await.ok();
        permit
    }

    fn register(self: &Arc<Self>, key: LimitKey) -> (KeyedPermit, Arc<Semaphore>) {
        let new = || Arc::new(Semaphore::new(self.limit));
        let semaphore = Arc::clone(self.lock().entry(key.clone()).or_insert_with(new));
        let permit =
            KeyedPermit { limiter: Arc::clone(self), key, semaphore: Some(Arc::clone(&semaphore)), permit: None };
        (permit, semaphore)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<LimitKey, Arc<Semaphore>>> {
        self.semaphores.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for KeyedPermit {
    fn drop(&mut self) {
        self.permit = None;
        let mut semaphores = self.limiter.lock();
        // Dropped under the lock: the last holder of a key must see a count of one and remove the key.
        self.semaphore = None;
        if semaphores.get(&self.key).is_some_and(|semaphore| Arc::strong_count(semaphore) == 1) {
            semaphores.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn limiter_counts_per_address_and_forgets_idle_keys() {
        let limiter = KeyedLimiter::new(2);
        let take = |last| limiter.try_acquire(address(last));
        let (first, second) = (take(1).expect("the first"), take(1).expect("the second"));
        assert!(take(1).is_none(), "two per address");
        let other = take(2).expect("another address");
        drop(first);
        drop(take(1).expect("a permit again"));
        drop(other);
        assert_eq!(limiter.lock().len(), 1);
        drop(second);
        assert_eq!(limiter.lock().len(), 0);
    }

    #[test]
    fn many_permits_are_released_together_and_capped_at_limit() {
        let limiter = KeyedLimiter::new(3);
        let two = limiter.try_acquire_many(address(1), 2).expect("two permits");
        assert!(limiter.try_acquire_many(address(1), 2).is_none());
        let one = limiter.try_acquire(address(1)).expect("the third");
        drop(two);
        assert!(limiter.try_acquire_many(address(1), 100).is_none(), "not all are free");
        drop(one);
        drop(limiter.try_acquire_many(address(1), 100).expect("all permits"));
        assert_eq!(limiter.lock().len(), 0);
    }

    #[test]
    fn principals_count_apart_and_ipv6_counts_as_networks() {
        let limiter = KeyedLimiter::new(1);
        let principal = |id: &str| LimitKey::Principal(id.into());
        let network = |last: &str| IpAddr::V6(format!("2001:db8:1:2::{last}").parse().expect("an address"));
        let _held = [
            limiter.try_acquire(principal("key:a")),
            limiter.try_acquire(principal("key:b")),
            limiter.try_acquire(network("1")),
        ]
        .map(|permit| permit.expect("the first of each"));
        assert!(limiter.try_acquire(principal("key:a")).is_none() && limiter.try_acquire(network("2")).is_none());
        assert_eq!(limiter.lock().len(), 3);
    }

    #[test]
    fn waiters_take_turns_and_a_cancelled_wait_is_forgotten() {
        let limiter = KeyedLimiter::new(1);
        let first = limiter.try_acquire(address(1)).expect("the first");
        let mut second = Box::pin(limiter.acquire(address(1)));
        let mut third = Box::pin(limiter.acquire(address(1)));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        assert!(limiter.acquire(address(2)).now_or_never().is_some(), "another address");
        drop(first);
        let second = second.now_or_never().expect("its turn");
        assert!((&mut third).now_or_never().is_none());
        drop(second);
        drop(third);
        assert_eq!(limiter.lock().len(), 0);
    }

    #[test]
    fn ipv6_network_counts_as_one_address() {
        let address = |text: &str| counted_address(text.parse().expect("an address"));
        assert_eq!(address("2001:db8:1:2::1"), address("2001:db8:1:2:ffff::9"));
        assert_ne!(address("2001:db8:1:2::1"), address("2001:db8:1:3::1"));
        assert_eq!(address("::ffff:10.0.0.1"), address("10.0.0.1"));
    }
}
