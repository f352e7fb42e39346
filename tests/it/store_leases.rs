//! The contract of [`Store`] about leases, as cases for every backend.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{EntryId, StreamName};
use aurora_bus::store::{
    Cursor, Lease, Leased, Order, Outcome, Range, Settled, Settlement, Start, Store, StoreError, StoreErrorKind,
};
use tokio::time::timeout;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;

/// A time that no test reaches by waiting.
const HOUR: Duration = Duration::from_hours(1);
/// The longest wait for a state.
const BOUND: Duration = Duration::from_mins(1);

on_stores! { embedded redis valkey: [
    lease_has_one_holder_until_release
    lease_without_renewal_expires
    leases_of_other_names_and_streams_are_independent
    cursor_with_lost_lease_is_rejected
    settlement_under_lease_checks_owner_at_any_age
    fetch_under_lease_wakes_on_new_entry
] }

async fn acquire(
    store: &dyn Store,
    stream: &StreamName,
    holder: &str,
    ttl: Duration,
) -> Result<Lease, (String, Duration)> {
    match store.lease(stream, "group/siem", holder, ttl).await.expect("the store responds") {
        Leased::Held(lease) => {
            assert_eq!((lease.name.as_str(), lease.holder.as_str()), ("group/siem", holder));
            Ok(lease)
        }
        Leased::Taken { by, expires_in } => Err((by, expires_in)),
    }
}

async fn lease_has_one_holder_until_release(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let first = acquire(&*store, &stream, "soc-a 1", HOUR).await.expect("free");
    assert_eq!(acquire(&*store, &stream, "soc-a 1", HOUR).await, Ok(first.clone()), "renewed");
    let (by, expires_in) = acquire(&*store, &stream, "soc-b 2", HOUR).await.expect_err("taken");
    assert_eq!(by, "soc-a 1");
    assert!(expires_in <= HOUR && expires_in > HOUR / 2, "{expires_in:?}");
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(true));
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false));
    let second = acquire(&*store, &stream, "soc-b 2", HOUR).await.expect("released");
    assert!(second.fence > first.fence);
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false), "another holder has it");
    assert!(acquire(&*store, &stream, "soc-a 1", HOUR).await.is_err());
}

async fn lease_without_renewal_expires(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ttl = Duration::from_millis(300);
    let began = Instant::now();
    let first = acquire(&*store, &stream, "soc-a 1", ttl).await.expect("free");
    let second = crate::support::until("end of the lease", BOUND, async || {
        acquire(&*store, &stream, "soc-b 2", HOUR).await.ok()
    });
    let second = second.await;
    assert!(began.elapsed() >= ttl, "after {:?}", began.elapsed());
    assert!(second.fence > first.fence);
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false));
}

async fn leases_of_other_names_and_streams_are_independent(store: Arc<dyn Store>) {
    let (stream, other) = (unique_stream(), unique_stream());
    acquire(&*store, &stream, "soc-a 1", HOUR).await.expect("free");
    acquire(&*store, &other, "soc-b 2", HOUR).await.expect("free");
    let leased = store.lease(&stream, "consumer/siem/soc-a-0", "soc-b 2", HOUR).await.expect("the store responds");
    assert!(matches!(leased, Leased::Held(_)), "{leased:?}");
}

fn assert_lease_lost<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert_eq!(result.expect_err("the lease is lost").kind(), StoreErrorKind::LeaseLost);
}

/// Returns two cursors of a group with five entries. The first one has a lease.
async fn group(store: &dyn Store) -> (Cursor, Cursor) {
    let stream = unique_stream();
    store.ensure_group(&stream, &"siem".parse().expect("a name"), Start::Oldest).await.expect("made");
    store.append(&stream, (0..5).map(|n| new_entry(&n.to_string())).collect()).await.expect("appended");
    let lease = acquire(store, &stream, "soc-a 1", HOUR).await.expect("free");
    let (a, b) = (cursor(&stream, "siem", "soc-a-0"), cursor(&stream, "siem", "soc-b-0"));
    (Cursor { lease: Some(lease), ..a }, b)
}

/// Moves the lease from the first cursor to the second.
async fn transfer_lease(store: &dyn Store, a: &Cursor, b: Cursor) -> Cursor {
    assert!(store.release_lease(&a.stream, a.lease.as_ref().expect("a lease")).await.expect("the store responds"));
    let lease = acquire(store, &b.stream, "soc-b 2", HOUR).await.expect("free");
    Cursor { lease: Some(lease), ..b }
}

async fn cursor_with_lost_lease_is_rejected(store: Arc<dyn Store>) {
    let (a, b) = group(&*store).await;
    let mut fetched = store.fetch(&a, 3, Duration::ZERO).await.expect("held");
    let ids: Vec<EntryId> = fetched.iter().map(|delivery| delivery.entry.id).collect();
    assert_eq!(store.extend(&a, &ids).await.expect("held"), []);
    let settle = |delivery, outcome| [Settlement { delivery, outcome }];
    let settled = store.settle(&a, &settle(fetched.remove(0), Outcome::Acknowledge)).await.expect("held");
    assert_eq!(settled, Settled { settled: 1, not_owned: 0 });

    let b = transfer_lease(&*store, &a, b).await;
    assert_lease_lost(store.fetch(&a, 1, Duration::ZERO).await);
    assert_lease_lost(store.claim(&a, &ids, Duration::ZERO).await);
    assert_lease_lost(store.reclaim(&a, Duration::ZERO, EntryId::MIN, 10).await);
    assert_lease_lost(store.extend(&a, &ids).await);
    assert_lease_lost(store.settle(&a, &settle(fetched.remove(0), Outcome::Acknowledge)).await);
    let dead: StreamName = format!("{}:dead", a.stream).parse().expect("a name");
    let fields = new_entry("a").fields;
    let dead_letter = Outcome::DeadLetter { to: dead.clone(), fields };
    assert_lease_lost(store.settle(&a, &settle(fetched.remove(0), dead_letter)).await);
    let all = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    assert_eq!(store.range(&dead, all, 10).await.expect("the store responds"), []);
    let pending = store.pending(&b, false, EntryId::MIN, 10).await.expect("the store responds");
    assert_eq!(
        pending.iter().map(|pending| (pending.id, pending.attempts)).collect::<Vec<_>>(),
        [(ids[1], 1), (ids[2], 1)]
    );

    let claimed = store.claim(&b, &ids, Duration::ZERO).await.expect("held").deliveries;
    assert_eq!(claimed.iter().map(|delivery| delivery.entry.id).collect::<Vec<_>>(), ids[1..]);
    let fetched = store.fetch(&b, 10, Duration::ZERO).await.expect("held");
    let settlements =
        claimed.into_iter().chain(fetched).map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge });
    let settled = store.settle(&b, &settlements.collect::<Vec<_>>()).await.expect("held");
    assert_eq!(settled, Settled { settled: 4, not_owned: 0 });
}

async fn settlement_under_lease_checks_owner_at_any_age(store: Arc<dyn Store>) {
    let (a, b) = group(&*store).await;
    let fetched = store.fetch(&a, 1, Duration::ZERO).await.expect("held");
    let id = fetched[0].entry.id;
    let b = transfer_lease(&*store, &a, b).await;
    assert_eq!(store.claim(&b, &[id], Duration::ZERO).await.expect("held").deliveries.len(), 1);
    let a = transfer_lease(&*store, &b, a).await;
    let late = fetched.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge });
    let settled = store.settle(&a, &late.collect::<Vec<_>>()).await.expect("held again");
    assert_eq!(settled, Settled { settled: 0, not_owned: 1 });
    assert_eq!(store.pending(&a, false, EntryId::MIN, 10).await.expect("the store responds").len(), 1);
}

async fn fetch_under_lease_wakes_on_new_entry(store: Arc<dyn Store>) {
    let (a, _) = group(&*store).await;
    assert_eq!(store.fetch(&a, 10, Duration::ZERO).await.expect("held").len(), 5);
    let began = Instant::now();
    assert!(store.fetch(&a, 10, Duration::from_millis(100)).await.expect("held").is_empty());
    assert!(began.elapsed() >= Duration::from_millis(100), "after {:?}", began.elapsed());
    let wait = Duration::from_secs(4);
    let mut fetch = pin!(store.fetch(&a, 10, wait));
    timeout(Duration::from_millis(100), &mut fetch).await.expect_err("there is nothing to fetch yet");
    let appended = store.append(&a.stream, vec![new_entry("6")]).await.expect("appended");
    let appended_at = Instant::now();
    let ids: Vec<EntryId> = fetch.await.expect("held").into_iter().map(|delivery| delivery.entry.id).collect();
    assert_eq!(ids, [appended[0].id]);
    assert!(appended_at.elapsed() < wait / 2, "after {:?}", appended_at.elapsed());
}
