//! How many connections there are, in all and per address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntGauge;

/// Counts connections against their limits.
#[derive(Debug)]
pub(super) struct Slots {
    max: usize,
    max_per_address: usize,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// One connection's place, free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    address: IpAddr,
    connections: IntGauge,
}

impl Slots {
    /// At most `max` connections, of which at most `max_per_address` from one address; 0 means without limit.
    pub(super) fn new(max: usize, max_per_address: usize) -> Arc<Self> {
        let unlimited = |limit: usize| if limit == 0 { usize::MAX } else { limit };
        let (max, max_per_address) = (unlimited(max), unlimited(max_per_address));
        Arc::new(Self { max, max_per_address, counts: Mutex::default() })
    }

    /// A place for a client of that address, counted in `connections` too; nothing where there is none left.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr, connections: &IntGauge) -> Option<Slot> {
        let address = counted_address(address);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = counts.by_address.get(&address).copied().unwrap_or(0);
        if counts.total >= self.max || of_address >= self.max_per_address {
            return None;
        }
        counts.total += 1;
        counts.by_address.insert(address, of_address + 1);
        connections.inc();
        Some(Slot { slots: self.clone(), address, connections: connections.clone() })
    }

    /// How many connections there are.
    pub(super) fn total(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).total
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.slots.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.total -= 1;
        if let Some(of_address) = counts.by_address.get_mut(&self.address) {
            *of_address -= 1;
            if *of_address == 0 {
                counts.by_address.remove(&self.address);
            }
        }
        self.connections.dec();
    }
}

/// The address that a client counts under: whole for IPv4, the /64 network for IPv6, of which one machine has many.
pub fn counted_address(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let slots = Slots::new(3, 2);
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = slots.take(a, &gauge).expect("the first");
        let _second = slots.take(a, &gauge).expect("the second");
        assert!(slots.take(a, &gauge).is_none(), "two per address");
        let _third = slots.take(b, &gauge).expect("another address");
        assert!(slots.take(b, &gauge).is_none(), "three in all");
        assert_eq!((slots.total(), gauge.get()), (3, 3));
        drop(first);
        assert!(slots.take(a, &gauge).is_some());
        assert_eq!((slots.total(), gauge.get()), (2, 2), "a dropped place is free");
    }

    #[test]
    fn zero_means_without_limit() {
        let gauge = IntGauge::new("x", "x").expect("a valid name");
        let slots = Slots::new(0, 0);
        let held: Vec<Slot> = (0..100).filter_map(|_| slots.take(IpAddr::from([1; 4]), &gauge)).collect();
        assert_eq!(held.len(), 100);
    }

    #[test]
    fn one_ipv6_network_counts_as_one_address() {
        let address = |text: &str| counted_address(text.parse().expect("an address"));
        assert_eq!(address("2001:db8:1:2::1"), address("2001:db8:1:2:ffff::9"));
        assert_ne!(address("2001:db8:1:2::1"), address("2001:db8:1:3::1"));
        assert_eq!(address("::ffff:10.0.0.1"), address("10.0.0.1"));
    }
}
