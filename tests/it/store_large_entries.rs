//! Entries with thousands of fields from foreign producers, on every backend: appended, redelivered and dead-lettered.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{DeadLetter, DeadLetterReason, Entry, EntryId, Fields, IdempotencyKey, NewEntry, field};
use aurora_bus::store::{Cursor, Order, Outcome, Range, Redelivery, Settlement, Start, Store};
use jiff::Timestamp;
use tokio::task::JoinSet;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;

const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
const LARGE: usize = 12_000;

fn large(key: Option<&'static str>) -> NewEntry {
    let mut fields: Fields = (0..LARGE).map(|n| (format!("name-{n}").into(), n.to_string().into())).collect();
    fields.push(field::ID, "large");
    let idempotency = key.map(|key| IdempotencyKey { key: key.into(), window: Duration::from_hours(1) });
    NewEntry { fields, idempotency }
}

async fn group(store: &dyn Store) -> Cursor {
    let cursor = cursor(&unique_stream(), "g", "a");
    store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await.expect("a group");
    cursor
}

async fn entries(store: &dyn Store, cursor: &Cursor) -> Vec<Entry> {
    store.range(&cursor.stream, EVERYTHING, 100).await.expect("read")
}

async fn large_entries_are_appended_once_and_in_order(store: Arc<dyn Store>) {
    let a = group(&*store).await;
    let batch = vec![new_entry("first"), large(Some("w")), large(Some("w")), large(None), new_entry("last")];
    let appended = store.append(&a.stream, batch).await.expect("appended");
    assert_eq!(appended.iter().map(|one| one.duplicate).collect::<Vec<_>>(), [false, false, true, false, false]);
    assert_eq!(appended[1].id, appended[2].id);
    let again = store.append(&a.stream, vec![large(Some("w")), new_entry("more")]).await.expect("appended");
    assert_eq!((again[0].id, again[0].duplicate, again[1].duplicate), (appended[1].id, true, false));
    assert_eq!(again[0].event_id, "large");
    let stored: Vec<(EntryId, usize)> = entries(&*store, &a).await.iter().map(|e| (e.id, e.fields.len())).collect();
    let few = new_entry("x").fields.len();
    let ids = [appended[0].id, appended[1].id, appended[3].id, appended[4].id, again[1].id];
    assert_eq!(stored, ids.into_iter().zip([few, LARGE + 1, LARGE + 1, few, few]).collect::<Vec<_>>());
    assert!(ids.is_sorted());
}

async fn concurrent_appends_of_one_key_store_one_entry(store: Arc<dyn Store>) {
    let a = group(&*store).await;
    let mut appends = JoinSet::new();
    for _ in 0..8 {
        let (store, stream) = (Arc::clone(&store), a.stream.clone());
        appends.spawn(async move { store.append(&stream, vec![large(Some("w"))]).await.expect("appended")[0].clone() });
    }
    let appended = appends.join_all().await;
    assert_eq!(appended.iter().filter(|one| !one.duplicate).count(), 1);
    assert_eq!(entries(&*store, &a).await.len(), 1);
}

async fn large_entry_is_dead_lettered_and_replayed_unchanged(store: Arc<dyn Store>) {
    let a = group(&*store).await;
    store.append(&a.stream, vec![large(None)]).await.expect("appended");
    let delivery = store.fetch(&a, 1, Duration::ZERO).await.expect("fetched").remove(0);
    let (id, original) = (delivery.entry.id, delivery.entry.fields.clone());
    let now = Timestamp::from_millisecond(1_000).expect("in range");
    let record = DeadLetter {
        stream: a.stream.clone(),
        id,
        group: a.group.clone(),
        reason: DeadLetterReason::Rejected,
        error: "no".to_owned(),
        attempts: 1,
        first_failure: now,
        last_failure: now,
        replays: 0,
        fields: original.clone(),
    };
    let to = a.stream.default_dead_letter();
    let outcome = Outcome::DeadLetter { to: to.clone(), fields: record.to_fields() };
    let settled = store.settle(&a, &[Settlement { delivery, outcome }]).await.expect("settled");
    assert_eq!((settled.settled, settled.not_owned), (1, 0));
    let read = store.range(&to, EVERYTHING, 10).await.expect("read").remove(0);
    let read = DeadLetter::from_entry(&read).expect("a dead letter");
    assert_eq!(read, record);
    let replay = NewEntry { fields: read.to_replay(Some(&a.group)), idempotency: large(Some("r")).idempotency };
    store.append(&a.stream, vec![replay]).await.expect("appended");
    let replayed = store.fetch(&a, 1, Duration::ZERO).await.expect("fetched").remove(0).entry.fields;
    assert_eq!(replayed.len(), original.len() + 3);
    assert!(original.iter().zip(replayed.iter()).all(|(before, now)| before == now));
}

async fn large_entry_of_external_consumer_is_redelivered(store: Arc<dyn Store>) {
    let worker = group(&*store).await;
    store.append(&worker.stream, vec![new_entry("x"), large(None), new_entry("y")]).await.expect("appended");
    let mut first = Vec::new();
    while first.len() < 3 {
        first.extend(store.fetch(&worker, 3, Duration::ZERO).await.expect("fetched"));
    }
    let redeliverer = cursor(&worker.stream, "g", "redeliverer");
    let at_once = Redelivery { idle: Duration::ZERO, max_deliveries: 3 };
    let done = store.redeliver(&redeliverer, at_once, EntryId::MIN, 100).await.expect("redelivered");
    assert_eq!((done.redelivered, done.exhausted.len(), done.next), (3, 0, EntryId::MIN));
    assert!(store.pending(&redeliverer, false, EntryId::MIN, 10).await.expect("listed").is_empty());
    let again = entries(&*store, &worker).await.split_off(3);
    let again = again.iter().find(|entry| entry.fields.len() > LARGE).expect("the large one");
    assert_eq!(again.fields.len(), LARGE + 4);
    assert_eq!(again.fields.text(field::REPLAY_OF), Some(&*first[1].entry.id.to_string()));
    assert_eq!(again.fields.text(field::REPLAY_ATTEMPTS), Some("1"));
}

on_stores! { embedded redis valkey cluster: [
    large_entries_are_appended_once_and_in_order
    concurrent_appends_of_one_key_store_one_entry
    large_entry_is_dead_lettered_and_replayed_unchanged
    large_entry_of_external_consumer_is_redelivered
] }
