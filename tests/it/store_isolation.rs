//! Isolation limits of a search for idle entries, on every backend.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{EntryId, NewEntry};
use aurora_bus::store::{Cursor, IsolationLimits, Start, Store};

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;

const LIMITS: IsolationLimits = IsolationLimits { in_hand: 0, most: [5, 2, 1] };

/// Returns a stream with one entry per number in `attempts`, delivered that many times.
async fn delivered(store: &dyn Store, attempts: &[u32]) -> (Cursor, Vec<EntryId>) {
    let cursor = cursor(&unique_stream(), "g", "dead");
    store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await.expect("a group");
    let entries: Vec<NewEntry> = attempts.iter().map(|_| new_entry("x")).collect();
    let appended = store.append(&cursor.stream, entries).await.expect("appended");
    let ids: Vec<EntryId> = appended.into_iter().map(|appended| appended.id).collect();
    store.fetch(&cursor, ids.len(), Duration::ZERO).await.expect("fetched");
    for (id, attempts) in ids.iter().zip(attempts) {
        for _ in 1..*attempts {
            store.claim(&cursor, &[*id], Duration::ZERO).await.expect("claimed");
        }
    }
    (Cursor { consumer: "alive".parse().expect("a name"), ..cursor }, ids)
}

async fn search(
    store: &dyn Store,
    cursor: &Cursor,
    from: EntryId,
    limits: IsolationLimits,
) -> (usize, EntryId, Option<u32>) {
    let found = store.reclaim_isolated(cursor, Duration::ZERO, from, 100, limits).await.expect("searched");
    (found.claimed.deliveries.len(), found.next, found.held_back)
}

async fn reclaim_limits_batch_by_delivery_count(store: Arc<dyn Store>) {
    let (cursor, ids) = delivered(&*store, &[1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 9, 1]).await;
    let mut from = EntryId::MIN;
    for (taken, left, attempts) in [(5, 5, 1), (2, 7, 2), (2, 9, 3), (1, 10, 9), (1, 11, 1)] {
        let expected = (taken, ids[left], Some(attempts));
        assert_eq!(search(&*store, &cursor, from, LIMITS).await, expected);
        from = ids[left];
    }
    assert_eq!(search(&*store, &cursor, from, LIMITS).await, (1, EntryId::MIN, None));
}

async fn entries_in_hand_count_toward_the_limit(store: Arc<dyn Store>) {
    let (cursor, ids) = delivered(&*store, &[1, 1, 2]).await;
    let limits = |in_hand| IsolationLimits { in_hand, ..LIMITS };
    assert_eq!(search(&*store, &cursor, EntryId::MIN, limits(7)).await, (0, ids[0], Some(1)));
    assert_eq!(search(&*store, &cursor, EntryId::MIN, limits(4)).await, (1, ids[1], Some(1)));
    assert_eq!(search(&*store, &cursor, ids[2], limits(2)).await, (0, ids[2], Some(2)));
    assert_eq!(search(&*store, &cursor, ids[2], limits(1)).await, (1, EntryId::MIN, None));
}

async fn reclaim_without_limits_takes_all_entries(store: Arc<dyn Store>) {
    let (cursor, _) = delivered(&*store, &[9, 9, 1]).await;
    assert_eq!(search(&*store, &cursor, EntryId::MIN, IsolationLimits::NONE).await, (3, EntryId::MIN, None));
}

on_stores! { embedded redis valkey: [
    reclaim_limits_batch_by_delivery_count
    entries_in_hand_count_toward_the_limit
    reclaim_without_limits_takes_all_entries
] }
