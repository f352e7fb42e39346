//! So many at a time from one address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::relay::counted_address;

/// Places for what an address does at a time, so that no address takes all there are.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    /// Those of each address that has a place or waits for one.
    addresses: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
}

/// A place, or the wait for one. Free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    address: IpAddr,
    of_address: Option<Arc<Semaphore>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, addresses: Mutex::default() })
    }

    /// A place, if the address has one left.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        self.take_some(address, 1)
    }

    /// So many places as one, or all there are where that is fewer, if the address has them left.
    pub(super) fn take_some(self: &Arc<Self>, address: IpAddr, count: usize) -> Option<Place> {
        let (mut place, of_address) = self.stand_by(address);
        let count = u32::try_from(count.min(self.most)).ok()?;
        place.permit = Some(of_address.try_acquire_many_owned(count).ok()?);
        Some(place)
    }

    /// A place, as soon as the address has one left; first come, first served. Cancel-safe: the turn is lost.
    pub(super) async fn wait(self: &Arc<Self>, address: IpAddr) -> Place {
        let (mut place, of_address) = self.stand_by(address);
        place.permit = of_address.acquire_owned().await.ok();
        place
    }

    fn stand_by(self: &Arc<Self>, address: IpAddr) -> (Place, Arc<Semaphore>) {
        let address = counted_address(address);
        let new = || Arc::new(Semaphore::new(self.most));
        let of_address = Arc::clone(self.lock().entry(address).or_insert_with(new));
        let place =
            Place { places: Arc::clone(self), address, of_address: Some(Arc::clone(&of_address)), permit: None };
        (place, of_address)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, Arc<Semaphore>>> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.permit = None;
        let mut addresses = self.places.lock();
        // Only with the lock: whoever goes last must see that nobody else is left.
        self.of_address = None;
        if addresses.get(&self.address).is_some_and(|of_address| Arc::strong_count(of_address) == 1) {
            addresses.remove(&self.address);
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
    fn an_address_has_so_many_places_and_leaves_no_trace() {
        let places = Places::new(2);
        let take = |last| places.take(address(last));
        let (first, second) = (take(1).expect("the first"), take(1).expect("the second"));
        assert!(take(1).is_none(), "two per address");
        let other = take(2).expect("another address");
        drop(first);
        drop(take(1).expect("a place again"));
        drop(other);
        assert_eq!(places.lock().len(), 1);
        drop(second);
        assert_eq!(places.lock().len(), 0);
    }

    #[test]
    fn what_takes_several_places_gives_them_back_and_has_all_where_it_needs_more() {
        let places = Places::new(3);
        let two = places.take_some(address(1), 2).expect("two places");
        assert!(places.take_some(address(1), 2).is_none());
        let one = places.take(address(1)).expect("the third");
        drop(two);
        assert!(places.take_some(address(1), 100).is_none(), "not all are free");
        drop(one);
        drop(places.take_some(address(1), 100).expect("all there are"));
        assert_eq!(places.lock().len(), 0);
    }

    #[test]
    fn who_waits_has_a_turn_and_who_gives_up_leaves_no_trace() {
        let places = Places::new(1);
        let first = places.take(address(1)).expect("the first");
        let mut second = Box::pin(places.wait(address(1)));
        let mut third = Box::pin(places.wait(address(1)));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
        assert!(places.wait(address(2)).now_or_never().is_some(), "another address");
        drop(first);
        let second = second.now_or_never().expect("its turn");
        assert!((&mut third).now_or_never().is_none());
        drop(second);
        drop(third);
        assert_eq!(places.lock().len(), 0);
    }
}
