//! Limits on concurrent connections: in total, per address and per principal.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntGauge;

use crate::limiter::counted_address;

/// Counts connections against their limits.
#[derive(Debug)]
pub(crate) struct ConnectionLimiter {
    limits: ConnectionLimits,
    counts: Mutex<ConnectionCounts>,
}

/// The maximum numbers of connections; 0 means no limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionLimits {
    pub(crate) total: usize,
    pub(crate) per_address: usize,
    pub(crate) per_principal: usize,
}

#[derive(Debug, Default)]
struct ConnectionCounts {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    by_principal: HashMap<Arc<str>, usize>,
}

/// The permit of one connection, returned when dropped.
#[derive(Debug)]
pub(crate) struct ConnectionPermit {
    limiter: Arc<ConnectionLimiter>,
    address: IpAddr,
    principal: Option<Arc<str>>,
    connections: IntGauge,
}

impl ConnectionLimiter {
    /// Creates a limiter without connections.
    pub(crate) fn new(limits: ConnectionLimits) -> Arc<Self> {
        let unlimited = |limit: usize| if limit == 0 { usize::MAX } else { limit };
        let limits = ConnectionLimits {
            total: unlimited(limits.total),
            per_address: unlimited(limits.per_address),
            per_principal: unlimited(limits.per_principal),
        };
        Arc::new(Self { limits, counts: Mutex::default() })
    }

    /// Returns a permit for a client of that address and principal, or `None` if a limit is reached. It counts in
    /// `connections` too.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        address: IpAddr,
        principal: Option<&Arc<str>>,
        connections: &IntGauge,
    ) -> Option<ConnectionPermit> {
        let address = counted_address(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = counts.by_address.get(&address).copied().unwrap_or(0);
        let of_principal = principal.and_then(|principal| counts.by_principal.get(principal)).copied().unwrap_or(0);
        let ConnectionLimits { total, per_address, per_principal } = self.limits;
        if counts.total >= total || of_address >= per_address || of_principal >= per_principal {
            return None;
        }
        counts.total += 1;
        counts.by_address.insert(address, of_address + 1);
        if let Some(principal) = principal {
            counts.by_principal.insert(principal.clone(), of_principal + 1);
        }
        connections.inc();
        Some(ConnectionPermit {
            limiter: self.clone(),
            address,
            principal: principal.cloned(),
            connections: connections.clone(),
        })
    }

    /// Returns the number of connections.
    pub(crate) fn total(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).total
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut counts = self.limiter.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total -= 1;
        decrement(&mut counts.by_address, &self.address);
        if let Some(principal) = &self.principal {
            decrement(&mut counts.by_principal, principal);
        }
        self.connections.dec();
    }
}

/// Counts one connection less, and removes counts of zero.
fn decrement<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_limited_and_returned_on_drop() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let limiter = ConnectionLimiter::new(ConnectionLimits { total: 3, per_address: 2, per_principal: 0 });
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = limiter.acquire(a, None, &gauge).expect("the first");
        let _second = limiter.acquire(a, None, &gauge).expect("the second");
        assert!(limiter.acquire(a, None, &gauge).is_none(), "two per address");
        let _third = limiter.acquire(b, None, &gauge).expect("another address");
        assert!(limiter.acquire(b, None, &gauge).is_none(), "three in total");
        assert_eq!((limiter.total(), gauge.get()), (3, 3));
        drop(first);
        assert!(limiter.acquire(a, None, &gauge).is_some());
        assert_eq!((limiter.total(), gauge.get()), (2, 2), "a dropped permit is returned");
    }

    #[test]
    fn principal_limit_counts_all_addresses() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let limiter = ConnectionLimiter::new(ConnectionLimits { total: 0, per_address: 0, per_principal: 2 });
        let (ops, soc): (Arc<str>, Arc<str>) = ("key:ops".into(), "key:soc".into());
        let take = |last: u8, key: &Arc<str>| limiter.acquire(IpAddr::from([10, 0, 0, last]), Some(key), &gauge);
        let first = take(1, &ops).expect("the first");
        let _second = take(2, &ops).expect("the second");
        assert!(take(3, &ops).is_none());
        let _other = take(3, &soc).expect("another principal");
        drop(first);
        assert!(take(4, &ops).is_some());
    }

    #[test]
    fn zero_means_no_limit() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let limiter = ConnectionLimiter::new(ConnectionLimits { total: 0, per_address: 0, per_principal: 0 });
        let permits: Vec<ConnectionPermit> =
            (0..100).filter_map(|_| limiter.acquire(IpAddr::from([1; 4]), None, &gauge)).collect();
        assert_eq!(permits.len(), 100);
    }
}
