//! The contract of [`Store`] about news of many streams, as cases that every backend must pass.

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

/// The longest any test waits for a state.
const PATIENCE: Duration = Duration::from_mins(1);

on_stores! { embedded redis valkey cluster: [
    news_name_each_stream_that_has_them_with_its_newest_entry
    news_are_waited_for_and_the_wait_has_an_end
    a_family_has_the_same_members_for_everyone_and_no_more_than_it_may
] }

async fn append(store: &dyn Store, stream: &StreamName, count: usize) -> EntryId {
    let entries = (0..count).map(|_| new_entry("x")).collect();
    store.append(stream, entries).await.expect("appended").last().expect("one").id
}

async fn wait_any(store: &dyn Store, places: &[(StreamName, EntryId)], wait: Duration) -> BTreeMap<StreamName, EntryId> {
    store.wait_any(places, wait).await.expect("news").into_iter().collect()
}

async fn news_name_each_stream_that_has_them_with_its_newest_entry(store: Arc<dyn Store>) {
    let streams: Vec<StreamName> = std::iter::repeat_with(unique_stream).take(20).collect();
    let mut expected = BTreeMap::new();
    for stream in streams.iter().step_by(3) {
        expected.insert(stream.clone(), append(&*store, stream, 3).await);
    }
    let places: Vec<_> = streams.iter().map(|stream| (stream.clone(), EntryId::MIN)).collect();
    assert_eq!(news(&*store, &places, Duration::from_secs(5)).await, expected);
    let seen: Vec<_> = expected.iter().map(|(stream, last)| (stream.clone(), *last)).collect();
    assert_eq!(news(&*store, &seen, Duration::ZERO).await, BTreeMap::new(), "nothing is after the newest");
    assert_eq!(news(&*store, &[], Duration::ZERO).await, BTreeMap::new());
}

async fn news_are_waited_for_and_the_wait_has_an_end(store: Arc<dyn Store>) {
    let streams: Vec<StreamName> = std::iter::repeat_with(unique_stream).take(50).collect();
    let places: Vec<_> = streams.iter().map(|stream| (stream.clone(), EntryId::MIN)).collect();
    let began = Instant::now();
    assert_eq!(news(&*store, &places, Duration::from_millis(300)).await, BTreeMap::new());
    assert!(began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
    let (found, last) = tokio::join!(news(&*store, &places, Duration::from_secs(5)), async {
        tokio::task::yield_now().await;
        append(&*store, &streams[33], 1).await
    });
    assert_eq!(found, [(streams[33].clone(), last)].into());
}

async fn a_family_has_the_same_members_for_everyone_and_no_more_than_it_may(store: Arc<dyn Store>) {
    let family: Family = format!("{}:{{key}}:x", unique_stream()).parse().expect("a family");
    let instances: Vec<Families> = (0..3).map(|_| Families::new([(family.clone(), 5)])).collect();
    let stop = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    for families in &instances {
        let parts = families.parts(&Readiness::default());
        tasks.spawn(families.clone().run(store.clone(), parts, stop.clone()));
    }
    // Each wants other members than the next, all at once, and only some of them fit.
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
        until("the same members", PATIENCE, async || (family_members.members() == joined).then_some(())).await;
    }
    // News of one made through any of them are heard by all.
    let last = append(&*store, &joined[2], 2).await;
    for families in &instances {
        let family_members = families.named(family.name()).expect("declared");
        until("news", PATIENCE, async || family_members.newest().contains(&(joined[2].clone(), last)).then_some(())).await;
    }
    stop.cancel();
    tasks.join_all().await;
}
