//! Accounts of groups, on every backend. Each case covers one term of the account and ends with a balanced account.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{EntryId, Fields, StreamName};
use aurora_bus::store::embedded::Config;
use aurora_bus::store::{
    Account, Balance, Consumption, Cursor, LostReason, Outcome, Settlement, Start, Store, StreamStatus, Trim,
};

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;

on_stores! { embedded redis valkey: [
    account_counts_every_outcome_of_an_entry
    entry_settled_twice_is_counted_once
    new_account_counts_entries_from_group_start
    account_survives_second_ensure_group
    drop_counts_lost_entries_per_group
    drop_in_steps_reaches_the_limit
    drop_of_handled_entries_counts_no_loss
    missing_entries_are_written_off_once
    trim_removes_undelivered_entries_of_ignored_groups
] }

async fn fill(store: &dyn Store, stream: &StreamName, count: usize) -> Vec<EntryId> {
    let entries = (0..count).map(|n| new_entry(&n.to_string())).collect();
    store.append(stream, entries).await.expect("appended").into_iter().map(|one| one.id).collect()
}

async fn grouped(store: &dyn Store, count: usize) -> Cursor {
    let cursor = cursor(&unique_stream(), "g", "a");
    fill(store, &cursor.stream, count).await;
    store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await.expect("a group");
    cursor
}

async fn describe(store: &dyn Store, stream: &StreamName) -> StreamStatus {
    store.describe(stream).await.expect("described").expect("the stream exists")
}

/// Returns the account of the cursor's group, and its balance for a group that only the daemon consumes.
async fn account(store: &dyn Store, cursor: &Cursor) -> (Account, Balance) {
    let status = describe(store, &cursor.stream).await;
    let group = status.groups.iter().find(|group| group.name == cursor.group).expect("the group exists");
    (group.account.expect("an account"), Balance::of(&status, group, Consumption::Inside))
}

async fn settle(store: &dyn Store, cursor: &Cursor, outcomes: impl IntoIterator<Item = Outcome>) {
    let outcomes: Vec<Outcome> = outcomes.into_iter().collect();
    let delivered = store.fetch(cursor, outcomes.len(), Duration::ZERO).await.expect("fetched");
    assert_eq!(delivered.len(), outcomes.len());
    let settlements: Vec<Settlement> =
        delivered.into_iter().zip(outcomes).map(|(delivery, outcome)| Settlement { delivery, outcome }).collect();
    store.settle(cursor, &settlements).await.expect("settled");
}

fn dead(cursor: &Cursor) -> Outcome {
    let mut fields = Fields::default();
    fields.push("dead.reason", "rejected");
    Outcome::DeadLetter { to: format!("{}:dead", cursor.stream).parse().expect("a valid name"), fields }
}

async fn account_counts_every_outcome_of_an_entry(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 20).await;
    let lost = store.fetch(&cursor, 2, Duration::ZERO).await.expect("fetched");
    let lost: Vec<EntryId> = lost.iter().map(|delivery| delivery.entry.id).collect();
    let ways = [Outcome::Acknowledge, Outcome::Acknowledge, Outcome::Filter, dead(&cursor), Outcome::Release];
    settle(&*store, &cursor, ways).await;
    // Some stores settle old deliveries in a different way.
    let old = Cursor { claim_idle: Duration::ZERO, ..cursor.clone() };
    settle(&*store, &old, [Outcome::Acknowledge, Outcome::Filter, Outcome::Filter]).await;
    assert_eq!(store.discard(&cursor.stream, &lost).await.expect("discarded"), 2);
    for _ in 0..2 {
        store.claim(&cursor, &lost, Duration::ZERO).await.expect("claimed");
    }
    let (account, balance) = account(&*store, &cursor).await;
    assert_eq!((account.acknowledged, account.filtered, account.dead), (3, 3, 1));
    assert_eq!(account.lost(LostReason::TrimmedPending), 2);
    assert_eq!((balance.published, balance.undelivered, balance.difference), (Some(20), Some(10), Some(0)));
}

async fn entry_settled_twice_is_counted_once(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 4).await;
    let delivered = store.fetch(&cursor, 4, Duration::ZERO).await.expect("fetched");
    let outcomes = [Outcome::Acknowledge, Outcome::Filter, dead(&cursor), Outcome::Acknowledge];
    let settlements: Vec<Settlement> =
        delivered.into_iter().zip(outcomes).map(|(delivery, outcome)| Settlement { delivery, outcome }).collect();
    for _ in 0..3 {
        store.settle(&cursor, &settlements).await.expect("settled");
    }
    let (account, balance) = account(&*store, &cursor).await;
    assert_eq!((account.acknowledged, account.filtered, account.dead), (2, 1, 1));
    assert_eq!(balance.difference, Some(0));
}

async fn new_account_counts_entries_from_group_start(store: Arc<dyn Store>) {
    for name in ["oldest", "new", "after"] {
        let stream = unique_stream();
        let ids = fill(&*store, &stream, 300).await;
        store.trim(&stream, Trim::ToLength(100)).await.expect("trimmed");
        let length = describe(&*store, &stream).await.length;
        let (start, published) = match name {
            "oldest" => (Start::Oldest, length),
            "new" => (Start::New, 0),
            _ => (Start::After(ids[279]), 20),
        };
        let cursor = cursor(&stream, name, "a");
        store.ensure_group(&stream, &cursor.group, start).await.expect("a group");
        let status = describe(&*store, &stream).await;
        let group = status.groups.iter().find(|group| group.name == cursor.group).expect("the group");
        let balance = Balance::of(&status, group, Consumption::Inside);
        if balance.published.is_none() {
            // If a group starts in the middle, a server knows its lag only after the group has reached the end.
            assert_eq!(name, "after");
            let rest = store.fetch(&cursor, 100, Duration::ZERO).await.expect("fetched");
            assert_eq!(rest.len(), 20);
            store.ensure_group(&stream, &cursor.group, start).await.expect("a group");
        }
        let (_, balance) = account(&*store, &cursor).await;
        assert_eq!((balance.published, balance.difference), (Some(published), Some(0)), "{name}");
        fill(&*store, &stream, 5).await;
        let (_, balance) = account(&*store, &cursor).await;
        assert_eq!(balance.published, Some(published + 5), "{name}");
    }
}

async fn account_survives_second_ensure_group(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 10).await;
    settle(&*store, &cursor, [Outcome::Acknowledge, Outcome::Filter, dead(&cursor)]).await;
    store.ensure_group(&cursor.stream, &cursor.group, Start::New).await.expect("ensured");
    let (account, balance) = account(&*store, &cursor).await;
    assert_eq!((account.base, account.done()), (Some(0), 3));
    assert_eq!((balance.published, balance.difference), (Some(10), Some(0)));
}

/// Drops until `keep` entries are left. Returns the number of dropped entries and the losses per group.
async fn drop_to(store: &dyn Store, stream: &StreamName, keep: u64) -> (u64, BTreeMap<String, (u64, u64)>) {
    let (mut removed, mut losses) = (0, BTreeMap::new());
    loop {
        let step = store.drop_oldest(stream, keep).await.expect("dropped");
        removed += step.removed;
        for loser in step.losses {
            let sums: &mut (u64, u64) = losses.entry(loser.group.to_string()).or_default();
            sums.0 += loser.pending;
            sums.1 += loser.undelivered;
        }
        if !step.is_more {
            return (removed, losses);
        }
    }
}

async fn drop_counts_lost_entries_per_group(store: Arc<dyn Store>) {
    let slow = grouped(&*store, 300).await;
    let fast = cursor(&slow.stream, "fast", "a");
    store.ensure_group(&fast.stream, &fast.group, Start::Oldest).await.expect("a group");
    settle(&*store, &fast, (0..300).map(|_| Outcome::Acknowledge)).await;
    settle(&*store, &slow, [Outcome::Acknowledge, Outcome::Filter]).await;
    let held = store.fetch(&slow, 8, Duration::ZERO).await.expect("fetched");
    let (removed, losses) = drop_to(&*store, &slow.stream, 100).await;
    assert!((100..=200).contains(&removed), "{removed}");
    assert_eq!(losses, BTreeMap::from([("g".to_owned(), (8, removed - 10))]));
    // Dropped entries are not pending any more, so that a late result is not counted.
    let late = held.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge });
    assert_eq!(store.settle(&slow, &late.collect::<Vec<_>>()).await.expect("settled").settled, 0);
    for (cursor, lost) in [(&slow, removed - 2), (&fast, 0)] {
        let (account, balance) = account(&*store, cursor).await;
        assert_eq!(account.lost(LostReason::Dropped), lost);
        assert_eq!((balance.published, balance.difference), (Some(300), Some(0)));
    }
    // The account stays correct when the group continues after the gap.
    let left = usize::try_from(300 - removed).expect("a small number");
    settle(&*store, &slow, (0..left / 2).map(|_| Outcome::Acknowledge)).await;
    assert_eq!(account(&*store, &slow).await.1.difference, Some(0));
    settle(&*store, &slow, (left / 2..left).map(|_| Outcome::Acknowledge)).await;
    let (_, balance) = account(&*store, &slow).await;
    assert_eq!((balance.undelivered, balance.difference), (Some(0), Some(0)));
    assert_eq!(describe(&*store, &slow.stream).await.removed_by_others.unwrap_or(0), 0);
}

async fn drop_in_steps_reaches_the_limit(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 0).await;
    for _ in 0..10 {
        fill(&*store, &cursor.stream, 500).await;
    }
    let (removed, losses) = drop_to(&*store, &cursor.stream, 250).await;
    assert!((4650..=4750).contains(&removed), "{removed}");
    assert_eq!(losses, BTreeMap::from([("g".to_owned(), (0, removed))]));
    assert_eq!(drop_to(&*store, &cursor.stream, 5000).await, (0, BTreeMap::new()));
    let (_, balance) = account(&*store, &cursor).await;
    assert_eq!((balance.undelivered, balance.difference), (Some(5000 - removed), Some(0)));
}

async fn drop_of_handled_entries_counts_no_loss(store: Arc<dyn Store>) {
    assert_eq!(drop_to(&*store, &unique_stream(), 1).await, (0, BTreeMap::new()));
    let cursor = grouped(&*store, 200).await;
    settle(&*store, &cursor, (0..200).map(|_| Outcome::Acknowledge)).await;
    let (removed, losses) = drop_to(&*store, &cursor.stream, 50).await;
    assert!((50..=150).contains(&removed) && losses.is_empty(), "{removed}, {losses:?}");
    assert_eq!(account(&*store, &cursor).await.0.lost, [0; 4]);
}

async fn missing_entries_are_written_off_once(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 10).await;
    let (stream, group) = (&cursor.stream, &cursor.group);
    assert!(store.write_off(stream, group, 0, 3).await.expect("counted"));
    assert!(!store.write_off(stream, group, 0, 3).await.expect("searched"));
    assert!(store.write_off(stream, group, 3, 2).await.expect("counted"));
    assert_eq!(account(&*store, &cursor).await.0.lost(LostReason::TrimmedUndelivered), 5);
}

async fn trim_removes_undelivered_entries_of_ignored_groups(store: Arc<dyn Store>) {
    let cursor = grouped(&*store, 500).await;
    let (stream, to_length) = (&cursor.stream, Trim::ToLength(100));
    let other = ["other".parse().expect("a valid name")];
    assert_eq!(store.trim_past(stream, to_length, &other).await.expect("trimmed"), 0);
    let removed = store.trim_past(stream, to_length, std::slice::from_ref(&cursor.group)).await.expect("trimmed");
    assert!((300..=400).contains(&removed), "{removed}");
}

#[tokio::test]
async fn folder_without_accounts_is_upgraded() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config { path: folder.path().to_owned(), ..Config::default() };
    let store = config.clone().open().await.expect("opened");
    let cursor = grouped(&store, 30).await;
    settle(&store, &cursor, [Outcome::Acknowledge, Outcome::Retry(Duration::ZERO)]).await;
    store.close().await;
    let database = rusqlite::Connection::open(folder.path().join("bus.sqlite3")).expect("a database");
    database.execute_batch("DROP TABLE accounts; UPDATE meta SET value = 1 WHERE key = 'format'").expect("changed");
    drop(database);
    let store = config.clone().open().await.expect("opened");
    let (counted, balance) = account(&store, &cursor).await;
    assert_eq!((counted.done(), balance.published, balance.difference), (0, Some(29), Some(0)));
    settle(&store, &cursor, [Outcome::Acknowledge]).await;
    store.close().await;
    let store = config.open().await.expect("opened");
    let (counted, balance) = account(&store, &cursor).await;
    assert_eq!((counted.acknowledged, balance.published, balance.difference), (1, Some(29), Some(0)));
}
