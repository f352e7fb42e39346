//! The contract of [`Store`] about leases, as cases that every backend must pass.

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
/// The longest any test waits for a state.
const PATIENCE: Duration = Duration::from_mins(1);

on_stores! { embedded redis valkey: [
    a_lease_has_one_holder_until_it_is_given_up
    a_lease_that_is_not_renewed_runs_out
    leases_of_other_names_and_streams_do_not_matter
    a_cursor_whose_lease_is_lost_can_do_nothing
    a_settlement_under_a_lease_asks_for_the_owner_however_young
    a_fetch_under_a_lease_wakes_when_an_entry_comes
] }

async fn take(
    store: &dyn Store,
    stream: &StreamName,
    holder: &str,
    ttl: Duration,
) -> Result<Lease, (String, Duration)> {
    match store.lease(stream, "group/siem", holder, ttl).await.expect("the store answers") {
        Leased::Held(lease) => {
            assert_eq!((lease.name.as_str(), lease.holder.as_str()), ("group/siem", holder));
            Ok(lease)
        }
        Leased::Taken { by, expires_in } => Err((by, expires_in)),
    }
}

async fn a_lease_has_one_holder_until_it_is_given_up(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let first = take(&*store, &stream, "soc-a 1", HOUR).await.expect("free");
    assert_eq!(take(&*store, &stream, "soc-a 1", HOUR).await, Ok(first.clone()), "renewed");
    let (by, expires_in) = take(&*store, &stream, "soc-b 2", HOUR).await.expect_err("taken");
    assert_eq!(by, "soc-a 1");
    assert!(expires_in <= HOUR && expires_in > HOUR / 2, "{expires_in:?}");
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(true));
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false));
    let second = take(&*store, &stream, "soc-b 2", HOUR).await.expect("given up");
    assert!(second.fence > first.fence);
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false), "it is another's now");
    assert!(take(&*store, &stream, "soc-a 1", HOUR).await.is_err());
}

async fn a_lease_that_is_not_renewed_runs_out(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ttl = Duration::from_millis(300);
    let began = Instant::now();
    let first = take(&*store, &stream, "soc-a 1", ttl).await.expect("free");
    let second = crate::support::until("end of the lease", PATIENCE, async || {
        take(&*store, &stream, "soc-b 2", HOUR).await.ok()
    });
    let second = second.await;
    assert!(began.elapsed() >= ttl, "after {:?}", began.elapsed());
    assert!(second.fence > first.fence);
    assert_eq!(store.release_lease(&stream, &first).await.ok(), Some(false));
}

async fn leases_of_other_names_and_streams_do_not_matter(store: Arc<dyn Store>) {
    let (stream, other) = (unique_stream(), unique_stream());
    take(&*store, &stream, "soc-a 1", HOUR).await.expect("free");
    take(&*store, &other, "soc-b 2", HOUR).await.expect("free");
    let leased = store.lease(&stream, "consumer/siem/soc-a-0", "soc-b 2", HOUR).await.expect("the store answers");
    assert!(matches!(leased, Leased::Held(_)), "{leased:?}");
}

fn is_lost<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert_eq!(result.expect_err("the lease is lost").kind(), StoreErrorKind::LeaseLost);
}

/// A group with five entries, and its cursors of two consumers, the first one under a lease.
async fn group(store: &dyn Store) -> (Cursor, Cursor) {
    let stream = unique_stream();
    store.ensure_group(&stream, &"siem".parse().expect("a name"), Start::Oldest).await.expect("made");
    store.append(&stream, (0..5).map(|n| new_entry(&n.to_string())).collect()).await.expect("appended");
    let lease = take(store, &stream, "soc-a 1", HOUR).await.expect("free");
    let (a, b) = (cursor(&stream, "siem", "soc-a-0"), cursor(&stream, "siem", "soc-b-0"));
    (Cursor { lease: Some(lease), ..a }, b)
}

/// Has the lease go from the first cursor to the second.
async fn hand_over(store: &dyn Store, a: &Cursor, b: Cursor) -> Cursor {
    assert!(store.release_lease(&a.stream, a.lease.as_ref().expect("a lease")).await.expect("the store answers"));
    let lease = take(store, &b.stream, "soc-b 2", HOUR).await.expect("free");
    Cursor { lease: Some(lease), ..b }
}

async fn a_cursor_whose_lease_is_lost_can_do_nothing(store: Arc<dyn Store>) {
    let (a, b) = group(&*store).await;
    let mut fetched = store.fetch(&a, 3, Duration::ZERO).await.expect("held");
    let ids: Vec<EntryId> = fetched.iter().map(|delivery| delivery.entry.id).collect();
    assert_eq!(store.extend(&a, &ids).await.expect("held"), []);
    let settle = |delivery, outcome| [Settlement { delivery, outcome }];
    let settled = store.settle(&a, &settle(fetched.remove(0), Outcome::Acknowledge)).await.expect("held");
    assert_eq!(settled, Settled { settled: 1, not_owned: 0 });

    let b = hand_over(&*store, &a, b).await;
    is_lost(store.fetch(&a, 1, Duration::ZERO).await);
    is_lost(store.claim(&a, &ids, Duration::ZERO).await);
    is_lost(store.reclaim(&a, Duration::ZERO, EntryId::MIN, 10).await);
    is_lost(store.extend(&a, &ids).await);
    is_lost(store.settle(&a, &settle(fetched.remove(0), Outcome::Acknowledge)).await);
    let dead: StreamName = format!("{}:dead", a.stream).parse().expect("a name");
    let fields = new_entry("a").fields;
    let bury = Outcome::DeadLetter { to: dead.clone(), fields };
    is_lost(store.settle(&a, &settle(fetched.remove(0), bury)).await);
    let all = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    assert_eq!(store.range(&dead, all, 10).await.expect("the store answers"), []);
    let pending = store.pending(&b, false, EntryId::MIN, 10).await.expect("the store answers");
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

async fn a_settlement_under_a_lease_asks_for_the_owner_however_young(store: Arc<dyn Store>) {
    let (a, b) = group(&*store).await;
    let fetched = store.fetch(&a, 1, Duration::ZERO).await.expect("held");
    let id = fetched[0].entry.id;
    let b = hand_over(&*store, &a, b).await;
    assert_eq!(store.claim(&b, &[id], Duration::ZERO).await.expect("held").deliveries.len(), 1);
    let a = hand_over(&*store, &b, a).await;
    let late = fetched.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge });
    let settled = store.settle(&a, &late.collect::<Vec<_>>()).await.expect("held again");
    assert_eq!(settled, Settled { settled: 0, not_owned: 1 });
    assert_eq!(store.pending(&a, false, EntryId::MIN, 10).await.expect("the store answers").len(), 1);
}

async fn a_fetch_under_a_lease_wakes_when_an_entry_comes(store: Arc<dyn Store>) {
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
