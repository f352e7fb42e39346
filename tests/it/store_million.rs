//! A million pending entries in the embedded store. No call may block the writer for long.

use std::time::{Duration, Instant};

use aurora_bus::event::EntryId;
use aurora_bus::store::embedded::{Config, SyncMode};
use aurora_bus::store::{Cursor, Outcome, Settlement, Start, Store};

use crate::store_contract::{cursor, new_entry, unique_stream};

/// The limit for a call: the shortest of a few, because the machine may be busy and the build is not optimized.
const LONGEST: Duration = Duration::from_millis(50);
const ENTRIES: usize = 1_000_000;

/// Returns the shortest duration of a few calls.
async fn shortest(mut call: impl AsyncFnMut()) -> Duration {
    let mut shortest = Duration::MAX;
    for _ in 0..5 {
        let started = Instant::now();
        call().await;
        shortest = shortest.min(started.elapsed());
    }
    shortest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn million_pending_entries_delay_no_call() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config { path: folder.path().join("data"), durability: SyncMode::Interval, ..Config::default() };
    let store = config.open().await.expect("opened");
    let stream = unique_stream();
    let first = Cursor { claim_idle: Duration::ZERO, ..cursor(&stream, "g", "first") };
    let of = |consumer: &str| Cursor { consumer: consumer.parse().expect("a valid name"), ..first.clone() };
    store.ensure_group(&stream, &first.group, Start::Oldest).await.expect("a group");
    for _ in 0..ENTRIES / 500 {
        store.append(&stream, (0..500).map(|_| new_entry("x")).collect()).await.expect("appended");
    }
    // One consumer holds the first and the last few entries, another one all entries in between.
    let mut held = 0;
    while held < ENTRIES {
        let by = if (1000..ENTRIES - 1000).contains(&held) { of("second") } else { first.clone() };
        held += store.fetch(&by, 1000, Duration::ZERO).await.expect("fetched").len();
    }
    let third = of("third");
    let described = shortest(async || {
        let status = store.describe(&stream).await.expect("described").expect("the stream");
        assert_eq!(status.groups[0].pending, ENTRIES as u64);
    });
    let mut timed = vec![("describe", described.await)];
    for (name, by) in [("pending of the first", &first), ("pending of the third", &third)] {
        let page = shortest(async || drop(store.pending(by, true, EntryId::MIN, 1000).await.expect("listed")));
        timed.push((name, page.await));
    }
    let own = store.pending(&first, true, EntryId::MIN, 2000).await.expect("listed");
    assert!(own.iter().all(|one| one.consumer == first.consumer) && !own.is_empty());
    let searched = shortest(async || {
        let found = store.reclaim(&third, Duration::from_hours(1), EntryId::MIN, 100).await.expect("searched");
        assert!(found.claimed.deliveries.is_empty());
    });
    timed.push(("search", searched.await));
    let claimed =
        shortest(async || drop(store.reclaim(&third, Duration::ZERO, EntryId::MIN, 100).await.expect("taken")));
    timed.push(("claim", claimed.await));
    let settled = shortest(async || {
        let taken = store.reclaim(&third, Duration::ZERO, EntryId::MIN, 100).await.expect("taken").claimed.deliveries;
        let settle = |delivery| Settlement { delivery, outcome: Outcome::Acknowledge };
        store.settle(&third, &taken.into_iter().map(settle).collect::<Vec<_>>()).await.expect("settled");
    });
    timed.push(("claim and settle", settled.await));
    let dropped = shortest(async || drop(store.drop_oldest(&stream, 500_000).await.expect("dropped")));
    timed.push(("drop", dropped.await));
    let slow: Vec<_> = timed.iter().filter(|(_, took)| *took > LONGEST).collect();
    assert!(slow.is_empty(), "{slow:?} of {timed:?}");
}
