//! So many at a time from one address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::relay::counted_address;

/// Places for what an address does at a time, so that no address takes all there are.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    taken: Mutex<HashMap<IpAddr, usize>>,
}

/// A place, free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default() })
    }

    /// A place, if the address has one left.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let address = counted_address(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.get(&address).copied().unwrap_or(0);
        if count >= self.most {
            return None;
        }
        taken.insert(address, count + 1);
        Some(Place { places: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.remove(&self.address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_places_and_leaves_no_trace() {
        let places = Places::new(2);
        let take = |last: u8| places.take(IpAddr::from([10, 0, 0, last]));
        let (first, _second) = (take(1).expect("the first"), take(1).expect("the second"));
        assert!(take(1).is_none(), "two per address");
        let other = take(2).expect("another address");
        drop(first);
        assert!(take(1).is_some());
        drop(other);
        assert_eq!(places.taken.lock().expect("no test panics here").len(), 1);
    }
}
