//! So many at a time for one who asks.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Peer;
use super::auth::Principal;
use crate::relay::counted_address;

/// Places for what somebody does at a time, so that nobody takes all there are.
#[derive(Debug)]
pub(super) struct Places {
    most: usize,
    /// Those of each who has a place or waits for one.
    all: Mutex<HashMap<Who, Arc<Semaphore>>>,
}

/// Whose places they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Who {
    /// As it is counted.
    Address(IpAddr),
    Principal(Arc<str>),
}

impl Who {
    /// The principal, or the address where nobody is asked for credentials: behind a proxy all have the same address.
    pub(super) fn of(principal: &Principal, peer: Peer) -> Self {
        principal.shared_id().map_or_else(|| peer.0.ip().into(), Self::Principal)
    }
}

impl From<IpAddr> for Who {
    fn from(address: IpAddr) -> Self {
        Self::Address(counted_address(address))
    }
}

/// A place, or the wait for one. Free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    who: Who,
    own: Option<Arc<Semaphore>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, all: Mutex::default() })
    }

    /// A place, if there is one left for whoever asks.
    pub(super) fn take(self: &Arc<Self>, who: impl Into<Who>) -> Option<Place> {
        self.take_some(who, 1)
    }

    /// So many places as one, or all there are where that is fewer, if they are left for whoever asks.
    pub(super) fn take_some(self: &Arc<Self>, who: impl Into<Who>, count: usize) -> Option<Place> {
        let (mut place, own) = self.stand_by(who.into());
        let count = u32::try_from(count.min(self.most)).ok()?;
        place.permit = Some(own.try_acquire_many_owned(count).ok()?);
        Some(place)
    }

    /// A place, as soon as there is one left for whoever asks; first come, first served. Cancel-safe: the turn is lost.
    pub(super) async fn wait(self: &Arc<Self>, who: impl Into<Who>) -> Place {
        let (mut place, own) = self.stand_by(who.into());
        place.permit = own.acquire_owned().await.ok();
        place
    }

    fn stand_by(self: &Arc<Self>, who: Who) -> (Place, Arc<Semaphore>) {
        let new = || Arc::new(Semaphore::new(self.most));
        let own = Arc::clone(self.lock().entry(who.clone()).or_insert_with(new));
        let place = Place { places: Arc::clone(self), who, own: Some(Arc::clone(&own)), permit: None };
        (place, own)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Who, Arc<Semaphore>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.permit = None;
        let mut all = self.places.lock();
        // Only with the lock: whoever goes last must see that nobody else is left.
        self.own = None;
        if all.get(&self.who).is_some_and(|own| Arc::strong_count(own) == 1) {
            all.remove(&self.who);
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
    fn principals_are_counted_by_themselves_and_addresses_as_networks() {
        let places = Places::new(1);
        let principal = |id: &str| Who::Principal(id.into());
        let network = |last: &str| IpAddr::V6(format!("2001:db8:1:2::{last}").parse().expect("an address"));
        let _held = [places.take(principal("key:a")), places.take(principal("key:b")), places.take(network("1"))]
            .map(|place| place.expect("the first of each"));
        assert!(places.take(principal("key:a")).is_none() && places.take(network("2")).is_none());
        assert_eq!(places.lock().len(), 3);
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
