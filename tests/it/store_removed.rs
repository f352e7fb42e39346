//! The number of removed entries before the oldest one, on every backend.

use std::sync::Arc;

use aurora_bus::event::{EntryId, NewEntry, StreamName};
use aurora_bus::store::{Order, Range, Store, StreamStatus, Trim};

use crate::store_contract::{new_entry, unique_stream};
use crate::support::stores::on_stores;

async fn append(store: &dyn Store, stream: &StreamName, count: usize) -> Vec<EntryId> {
    let entries: Vec<NewEntry> = (0..count).map(|_| new_entry("x")).collect();
    let appended = store.append(stream, entries).await.expect("appended");
    appended.into_iter().map(|appended| appended.id).collect()
}

async fn status(store: &dyn Store, stream: &StreamName) -> StreamStatus {
    store.describe(stream).await.expect("described").expect("it exists")
}

async fn removed_entries_before_the_oldest_are_counted(store: Arc<dyn Store>) {
    let stream = unique_stream();
    for _ in 0..10 {
        append(&*store, &stream, 100).await;
    }
    assert_eq!(status(&*store, &stream).await.before_first, Some(0));
    store.trim(&stream, Trim::ToLength(300)).await.expect("trimmed");
    let trimmed = status(&*store, &stream).await;
    assert!((300..=400).contains(&trimmed.length), "{trimmed:?}");
    assert_eq!(trimmed.before_first, Some(1000 - trimmed.length));
    store.trim(&stream, Trim::Before(EntryId::MAX)).await.expect("trimmed");
    // A trim is not exact, so the remaining entries are discarded one by one.
    let all = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    let left = store.range(&stream, all, 1000).await.expect("read");
    let ids: Vec<EntryId> = left.iter().map(|entry| entry.id).collect();
    store.discard(&stream, &ids).await.expect("discarded");
    assert_eq!(status(&*store, &stream).await.before_first, Some(1000));
    append(&*store, &stream, 5).await;
    assert!(status(&*store, &stream).await.before_first.is_none_or(|before| before == 1000));
}

async fn uncertain_count_before_the_oldest_is_none(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = append(&*store, &stream, 10).await;
    store.discard(&stream, &[ids[0]]).await.expect("discarded");
    assert!(status(&*store, &stream).await.before_first.is_none_or(|before| before == 1));
    store.discard(&stream, &[ids[5]]).await.expect("discarded");
    assert_eq!(status(&*store, &stream).await.before_first, None, "one of them was before the oldest");
}

on_stores! { embedded redis valkey: [
    removed_entries_before_the_oldest_are_counted
    uncertain_count_before_the_oldest_is_none
] }
