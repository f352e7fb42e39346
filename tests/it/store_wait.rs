//! The contract of [`Store`] for waits on many streams, as cases for every backend.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{EntryId, Family, StreamName};
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{Families, JoinError, Store};
use tokio_util::sync::CancellationToken;

use crate::store_contract::{new_entry, unique_stream};
use crate::support::stores::on_stores;
use crate::support::until;

/// The longest wait for a state.
const BOUND: Duration = Duration::from_mins(1);

on_stores! { embedded redis valkey cluster: [
    wait_returns_newest_entry_of_each_stream
    wait_ends_on_new_entry_or_timeout
    family_members_agree_and_respect_the_limit
] }

async fn append(store: &dyn Store, stream: &StreamName, count: usize) -> EntryId {
    let entries = (0..count).map(|_| new_entry("x")).collect();
    store.append(stream, entries).await.expect("appended").last().expect("one").id
}

async fn wait_any(
    store: &dyn Store,
    positions: &[(StreamName, EntryId)],
    wait: Duration,
) -> BTreeMap<StreamName, EntryId> {
    store.wait_any(positions, wait).await.expect("a result").into_iter().collect()
}

async fn wait_returns_newest_entry_of_each_stream(store: Arc<dyn Store>) {
    let streams: Vec<StreamName> = std::iter::repeat_with(unique_stream).take(20).collect();
    let mut expected = BTreeMap::new();
    for stream in streams.iter().step_by(3) {
        expected.insert(stream.clone(), append(&*store, stream, 3).await);
    }
    let positions: Vec<_> = streams.iter().map(|stream| (stream.clone(), EntryId::MIN)).collect();
    assert_eq!(wait_any(&*store, &positions, Duration::from_secs(5)).await, expected);
    let seen: Vec<_> = expected.iter().map(|(stream, last)| (stream.clone(), *last)).collect();
    assert_eq!(wait_any(&*store, &seen, Duration::ZERO).await, BTreeMap::new(), "nothing is after the newest");
    assert_eq!(wait_any(&*store, &[], Duration::ZERO).await, BTreeMap::new());
}

async fn wait_ends_on_new_entry_or_timeout(store: Arc<dyn Store>) {
    let streams: Vec<StreamName> = std::iter::repeat_with(unique_stream).take(50).collect();
    let positions: Vec<_> = streams.iter().map(|stream| (stream.clone(), EntryId::MIN)).collect();
    let began = Instant::now();
    assert_eq!(wait_any(&*store, &positions, Duration::from_millis(300)).await, BTreeMap::new());
    assert!(began.elapsed() < BOUND / 2, "{:?}", began.elapsed());
    let (found, last) = tokio::join!(wait_any(&*store, &positions, Duration::from_secs(5)), async {
        tokio::task::yield_now().await;
        append(&*store, &streams[33], 1).await
    });
    assert_eq!(found, [(streams[33].clone(), last)].into());
}

async fn family_members_agree_and_respect_the_limit(store: Arc<dyn Store>) {
    let family: Family = format!("{}:{{key}}:x", unique_stream()).parse().expect("a family");
    let instances: Vec<Families> = (0..3).map(|_| Families::new([(family.clone(), 5)])).collect();
    let stop = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    for families in &instances {
        let parts = families.parts(&Readiness::default());
        tasks.spawn(families.clone().run(store.clone(), parts, stop.clone()));
    }
    // Each instance adds different members at the same time, and only some of them fit.
    let mut joins = tokio::task::JoinSet::new();
    for (place, families) in instances.iter().enumerate() {
        for n in 0..4 {
            let (families, store) = (families.clone(), store.clone());
            let stream = family.member(&format!("k{}", (place * 3 + n) % 10)).expect("a key");
            joins.spawn(async move {
                let family_members = families.of(&stream).expect("of the family");
                (stream.clone(), family_members.join(&*store, &stream).await)
            });
        }
    }
    let mut joined = Vec::new();
    for (stream, outcome) in joins.join_all().await {
        match outcome {
            Ok(()) => joined.push(stream),
            Err(JoinError::Full { max_keys: 5, .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    joined.sort();
    joined.dedup();
    assert_eq!(joined.len(), 5, "{joined:?}");
    for families in &instances {
        let family_members = families.named(family.name()).expect("declared");
        until("the same members", BOUND, async || (family_members.members() == joined).then_some(())).await;
    }
    // A wait through any instance ends at a new entry of a member, whichever instance added it.
    let last = append(&*store, &joined[2], 2).await;
    for families in &instances {
        let family_members = families.named(family.name()).expect("declared");
        until("the new entry", BOUND, async || {
            family_members.newest().contains(&(joined[2].clone(), last)).then_some(())
        })
        .await;
    }
    stop.cancel();
    tasks.join_all().await;
}
