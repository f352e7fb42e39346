//! How many connections there are, in all, per address and per principal.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntGauge;

use crate::limiter::counted_address;

/// Counts connections against their limits.
#[derive(Debug)]
pub(crate) struct Slots {
    most: Most,
    counts: Mutex<Counts>,
}

/// How many connections there may be; 0 means without limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most {
    pub(crate) total: usize,
    pub(crate) per_address: usize,
    pub(crate) per_principal: usize,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    by_principal: HashMap<Arc<str>, usize>,
}

/// One connection's place, free again when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    address: IpAddr,
    principal: Option<Arc<str>>,
    connections: IntGauge,
}

impl Slots {
    /// No connections yet, of as many as that.
    pub(crate) fn new(most: Most) -> Arc<Self> {
        let unlimited = |limit: usize| if limit == 0 { usize::MAX } else { limit };
        let most = Most {
            total: unlimited(most.total),
            per_address: unlimited(most.per_address),
            per_principal: unlimited(most.per_principal),
        };
        Arc::new(Self { most, counts: Mutex::default() })
    }

    /// A place for a client of that address and principal, counted in `connections` too; nothing where there is none
    /// left.
    pub(crate) fn take(
        self: &Arc<Self>,
        address: IpAddr,
        principal: Option<&Arc<str>>,
        connections: &IntGauge,
    ) -> Option<Slot> {
        let address = counted_address(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = counts.by_address.get(&address).copied().unwrap_or(0);
        let of_principal = principal.and_then(|principal| counts.by_principal.get(principal)).copied().unwrap_or(0);
        let Most { total, per_address, per_principal } = self.most;
        if counts.total >= total || of_address >= per_address || of_principal >= per_principal {
            return None;
        }
        counts.total += 1;
        counts.by_address.insert(address, of_address + 1);
        if let Some(principal) = principal {
            counts.by_principal.insert(principal.clone(), of_principal + 1);
        }
        connections.inc();
        Some(Slot { slots: self.clone(), address, principal: principal.cloned(), connections: connections.clone() })
    }

    /// How many connections there are.
    pub(crate) fn total(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).total
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.slots.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total -= 1;
        leave(&mut counts.by_address, &self.address);
        if let Some(principal) = &self.principal {
            leave(&mut counts.by_principal, principal);
        }
        self.connections.dec();
    }
}

/// One less, and no trace of who has none.
fn leave<K: Hash + Eq>(counts: &mut HashMap<K, usize>, who: &K) {
    if let Some(count) = counts.get_mut(who) {
        *count -= 1;
        if *count == 0 {
            counts.remove(who);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let slots = Slots::new(Most { total: 3, per_address: 2, per_principal: 0 });
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = slots.take(a, None, &gauge).expect("the first");
        let _second = slots.take(a, None, &gauge).expect("the second");
        assert!(slots.take(a, None, &gauge).is_none(), "two per address");
        let _third = slots.take(b, None, &gauge).expect("another address");
        assert!(slots.take(b, None, &gauge).is_none(), "three in all");
        assert_eq!((slots.total(), gauge.get()), (3, 3));
        drop(first);
        assert!(slots.take(a, None, &gauge).is_some());
        assert_eq!((slots.total(), gauge.get()), (2, 2), "a dropped place is free");
    }

    #[test]
    fn a_principal_has_its_places_wherever_it_comes_from() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let slots = Slots::new(Most { total: 0, per_address: 0, per_principal: 2 });
        let (ops, soc): (Arc<str>, Arc<str>) = ("key:ops".into(), "key:soc".into());
        let take = |last: u8, who: &Arc<str>| slots.take(IpAddr::from([10, 0, 0, last]), Some(who), &gauge);
        let first = take(1, &ops).expect("the first");
        let _second = take(2, &ops).expect("the second");
        assert!(take(3, &ops).is_none());
        let _other = take(3, &soc).expect("another principal");
        drop(first);
        assert!(take(4, &ops).is_some());
    }

    #[test]
    fn zero_means_without_limit() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let slots = Slots::new(Most { total: 0, per_address: 0, per_principal: 0 });
        let held: Vec<Slot> = (0..100).filter_map(|_| slots.take(IpAddr::from([1; 4]), None, &gauge)).collect();
        assert_eq!(held.len(), 100);
    }
}
