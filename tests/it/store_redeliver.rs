//! The contract of [`Store::redeliver`], on every backend.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{Delivery, Entry, EntryId, Fields, NewEntry, field};
use aurora_bus::store::{
    Cursor, Order, Outcome, Range, Redelivered, Redelivery, Settlement, Start, Store, StoreErrorKind,
};
use tokio::task::JoinSet;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;

const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
const HOUR: Duration = Duration::from_hours(1);
const AT_ONCE: Redelivery = Redelivery { idle: Duration::ZERO, max_deliveries: 15 };

/// Returns a stream with these entries, all pending on `worker` of the group `agents`.
async fn abandoned(store: &dyn Store, entries: Vec<NewEntry>) -> (Cursor, Vec<Delivery>) {
    let worker = cursor(&unique_stream(), "agents", "worker");
    store.ensure_group(&worker.stream, &worker.group, Start::Oldest).await.expect("a group");
    let count = entries.len();
    store.append(&worker.stream, entries).await.expect("appended");
    let mut fetched = Vec::new();
    while fetched.len() < count {
        fetched.extend(store.fetch(&worker, count - fetched.len(), Duration::ZERO).await.expect("fetched"));
    }
    (worker, fetched)
}

fn redeliverer(worker: &Cursor) -> Cursor {
    cursor(&worker.stream, worker.group.as_str(), "redeliverer")
}

async fn redeliver(store: &dyn Store, redeliverer: &Cursor, redelivery: Redelivery) -> Redelivered {
    store.redeliver(redeliverer, redelivery, EntryId::MIN, 100).await.expect("redelivered")
}

async fn entries(store: &dyn Store, cursor: &Cursor) -> Vec<Entry> {
    store.range(&cursor.stream, EVERYTHING, 10_000).await.expect("read")
}

async fn pending(store: &dyn Store, cursor: &Cursor) -> u64 {
    let status = store.describe(&cursor.stream).await.expect("described").expect("the stream exists");
    status.groups.iter().find(|group| group.name == cursor.group).expect("the group exists").pending
}

fn with(mut entry: NewEntry, fields: &[(&'static str, &'static str)]) -> NewEntry {
    for (name, value) in fields {
        entry.fields.push(*name, *value);
    }
    entry
}

fn replay_fields(fields: &Fields) -> [Option<&str>; 3] {
    [field::REPLAY_GROUP, field::REPLAY_OF, field::REPLAY_ATTEMPTS].map(|name| fields.text(name))
}

async fn abandoned_entry_is_appended_again_for_its_group(store: Arc<dyn Store>) {
    let (worker, fetched) = abandoned(&*store, vec![new_entry("task")]).await;
    let redeliverer = redeliverer(&worker);
    let done = redeliver(&*store, &redeliverer, AT_ONCE).await;
    assert_eq!((done.redelivered, done.foreign, done.exhausted.len(), done.next), (1, 0, 0, EntryId::MIN));
    assert_eq!(pending(&*store, &worker).await, 0);
    let other = cursor(&worker.stream, "agents", "other");
    let first = fetched[0].entry.id.to_string();
    for deliveries in 1..=3 {
        let again = store.fetch(&other, 10, Duration::ZERO).await.expect("fetched");
        assert_eq!((again.len(), again[0].attempt), (1, 1));
        let fields = &again[0].entry.fields;
        assert_eq!(replay_fields(fields), [Some("agents"), Some(first.as_str()), Some(&*deliveries.to_string())]);
        assert_eq!(fields.len(), fetched[0].entry.fields.len() + 3);
        let original = fetched[0].entry.fields.iter();
        assert!(original.zip(fields.iter()).all(|(before, now)| before == now), "byte for byte, in order");
        assert_eq!(redeliver(&*store, &redeliverer, AT_ONCE).await.redelivered, 1);
    }
    assert_eq!(entries(&*store, &worker).await.len(), 5);
}

async fn entry_in_progress_is_not_redelivered(store: Arc<dyn Store>) {
    let (worker, _) = abandoned(&*store, vec![new_entry("a"), new_entry("b")]).await;
    let done = redeliver(&*store, &redeliverer(&worker), Redelivery { idle: HOUR, ..AT_ONCE }).await;
    assert_eq!((done.redelivered, done.exhausted.len(), done.next), (0, 0, EntryId::MIN));
    assert_eq!(pending(&*store, &worker).await, 2);
    assert_eq!(entries(&*store, &worker).await.len(), 2);
}

async fn exhausted_entry_is_claimed_for_dead_lettering(store: Arc<dyn Store>) {
    let carried = with(new_entry("carried"), &[(field::REPLAY_GROUP, "agents"), (field::REPLAY_ATTEMPTS, "2")]);
    let odd = with(new_entry("odd"), &[(field::REPLAY_ATTEMPTS, "1e9")]);
    let (worker, fetched) = abandoned(&*store, vec![carried, new_entry("fresh"), odd]).await;
    let redeliverer = redeliverer(&worker);
    for _ in 0..2 {
        let again = store.claim(&worker, &[fetched[1].entry.id], Duration::ZERO).await.expect("claimed");
        assert_eq!(again.deliveries.len(), 1);
    }
    let limit = Redelivery { max_deliveries: 3, ..AT_ONCE };
    let done = redeliver(&*store, &redeliverer, limit).await;
    let attempts: Vec<_> = done.exhausted.iter().map(|d| (d.entry.id, d.attempt)).collect();
    assert_eq!(attempts, [(fetched[0].entry.id, 3), (fetched[1].entry.id, 3)]);
    assert_eq!(done.redelivered, 1, "a value that is not a plain number is ignored");
    let held = store.pending(&redeliverer, true, EntryId::MIN, 10).await.expect("listed");
    assert_eq!(held.iter().map(|p| p.attempts).collect::<Vec<_>>(), [1, 3], "a claim counts no attempt");

    let again = redeliver(&*store, &redeliverer, limit).await.exhausted;
    assert_eq!(again.iter().map(|d| d.attempt).collect::<Vec<_>>(), [3, 3], "also without a settlement before");
    let to = worker.stream.default_dead_letter();
    let dead_letter = |delivery: Delivery| {
        let fields = new_entry("record").fields;
        Settlement { delivery, outcome: Outcome::DeadLetter { to: to.clone(), fields } }
    };
    let settlements: Vec<_> = again.into_iter().map(dead_letter).collect();
    assert_eq!(store.settle(&redeliverer, &settlements).await.expect("settled").settled, 2);
    assert_eq!(pending(&*store, &worker).await, 0);
    assert_eq!(store.range(&to, EVERYTHING, 10).await.expect("read").len(), 2);
}

async fn entry_for_another_group_is_acknowledged(store: Arc<dyn Store>) {
    let other = with(new_entry("other"), &[(field::REPLAY_GROUP, "someone-else")]);
    let (worker, _) = abandoned(&*store, vec![other]).await;
    let done = redeliver(&*store, &redeliverer(&worker), AT_ONCE).await;
    assert_eq!((done.redelivered, done.foreign), (0, 1));
    assert_eq!((pending(&*store, &worker).await, entries(&*store, &worker).await.len()), (0, 1));
}

async fn lost_entry_is_reported_once(store: Arc<dyn Store>) {
    let (worker, fetched) = abandoned(&*store, vec![new_entry("a"), new_entry("b")]).await;
    store.discard(&worker.stream, &[fetched[0].entry.id]).await.expect("discarded");
    let redeliverer = redeliverer(&worker);
    let done = redeliver(&*store, &redeliverer, AT_ONCE).await;
    assert_eq!((done.lost, done.redelivered), (vec![fetched[0].entry.id], 1));
    assert_eq!(redeliver(&*store, &redeliverer, AT_ONCE).await.lost, []);
}

async fn concurrent_redeliverers_redeliver_each_entry_once(store: Arc<dyn Store>) {
    let (worker, _) = abandoned(&*store, (0..100).map(|n| new_entry(&n.to_string())).collect()).await;
    let mut redeliverers = JoinSet::new();
    for _ in 0..4 {
        let (store, redeliverer) = (store.clone(), redeliverer(&worker));
        redeliverers.spawn(async move { redeliver(&*store, &redeliverer, AT_ONCE).await.redelivered });
    }
    assert_eq!(redeliverers.join_all().await.into_iter().sum::<usize>(), 100);
    assert_eq!((pending(&*store, &worker).await, entries(&*store, &worker).await.len()), (0, 200));
}

async fn many_entries_are_redelivered_page_by_page(store: Arc<dyn Store>) {
    let large = "x".repeat(200_000);
    let payloads = (0..60).map(|n| new_entry(&format!("{n} {large}")));
    let (worker, _) = abandoned(&*store, payloads.collect()).await;
    let redeliverer = redeliverer(&worker);
    let (mut from, mut pages, mut redelivered) = (EntryId::MIN, 0, 0);
    loop {
        let done = store.redeliver(&redeliverer, AT_ONCE, from, 25).await.expect("redelivered");
        assert!(done.redelivered <= 25);
        redelivered += done.redelivered;
        pages += 1;
        from = done.next;
        if from == EntryId::MIN {
            break;
        }
    }
    assert_eq!(redelivered, 60);
    assert!(pages >= 3, "{pages} pages: count and bytes of a page are limited");
    assert_eq!(pending(&*store, &worker).await, 0);
}

async fn missing_group_is_reported(store: Arc<dyn Store>) {
    let absent = cursor(&unique_stream(), "agents", "redeliverer");
    let error = store.redeliver(&absent, AT_ONCE, EntryId::MIN, 10).await.expect_err("the group is missing");
    assert_eq!(error.kind(), StoreErrorKind::NoGroup);
}

on_stores! { embedded redis valkey: [
    abandoned_entry_is_appended_again_for_its_group
    entry_in_progress_is_not_redelivered
    exhausted_entry_is_claimed_for_dead_lettering
    entry_for_another_group_is_acknowledged
    lost_entry_is_reported_once
    concurrent_redeliverers_redeliver_each_entry_once
    many_entries_are_redelivered_page_by_page
    missing_group_is_reported
] }
