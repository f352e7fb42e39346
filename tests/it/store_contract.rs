//! The contract of [`Store`], sentence by sentence, as cases for every backend.
//!
//! Each case uses its own streams, so that all cases can share one server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{Delivery, Entry, EntryId, Fields, IdempotencyKey, NewEntry, StreamName, field};
use aurora_bus::store::{
    Claimed, Cursor, GroupStatus, MAX_APPEND, Order, Outcome, Range, Settled, Settlement, Start, Store, StoreErrorKind,
    StreamStatus, Trim,
};
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::support::stores::on_stores;

on_stores! { embedded embedded_from_disk redis valkey cluster: [
    ids_grow_strictly_in_append_order
    append_of_maximum_size_keeps_its_order
    empty_append_returns_nothing
    append_over_maximum_is_rejected_whole
    concurrent_appends_stay_contiguous_and_ordered
    idempotency_key_stores_entry_once
    idempotency_key_applies_within_one_append
    idempotency_key_is_scoped_to_its_stream
    idempotency_key_expires_after_its_window
    arbitrary_bytes_are_returned_unchanged
    value_of_one_mebibyte_is_returned_unchanged
    range_includes_both_ends_and_respects_limit
    backward_range_starts_with_newest_entry
    missing_stream_reads_as_empty
    tail_returns_existing_entries_at_once
    tail_wakes_on_new_entry
    tail_wakes_when_stream_is_created
    tail_without_new_entry_returns_nothing
    every_tail_receives_every_entry
    tail_has_no_gap_or_duplicate
    group_starts_at_requested_position
    second_ensure_group_changes_nothing
    ensure_group_creates_the_stream
    fetch_delivers_each_entry_once
    fetch_wakes_on_new_entry
    fetch_without_new_entry_returns_nothing
    concurrent_fetches_share_the_entries
    groups_are_independent
    operations_on_missing_group_return_no_group
    pending_is_listed_by_consumer_and_page
    claim_takes_named_entries_and_counts_attempt
    claim_skips_entries_not_idle_or_not_pending
    reclaim_reaches_the_end_page_by_page
    reclaim_skips_entries_that_are_not_idle
    acknowledged_entries_are_settled_once
    settlement_of_claimed_delivery_is_not_owned
    retry_is_claimable_when_due
    retry_delay_is_capped_at_claim_idle
    dead_letter_is_moved_atomically_and_once
    dead_letter_of_claimed_delivery_is_not_written
    release_is_claimable_and_counts_no_attempt
    settle_accepts_all_outcomes_in_one_call
    extend_resets_idle_time_without_attempt
    extend_returns_entries_not_owned
    trim_to_length_keeps_newest_entries
    trim_by_id_keeps_newer_entries
    trim_keeps_undelivered_entries
    trim_keeps_pending_entries
    discard_removes_entry_once
    discarded_entry_is_not_delivered
    claim_reports_lost_pending_entry_once
    reclaim_reports_lost_pending_entry_once
    consumer_with_pending_entries_is_not_removed
    describe_returns_correct_counts
    epoch_is_stable_and_creates_no_stream
    check_describes_the_store
    closed_store_is_unavailable
] }

/// A claim idle that no test reaches by waiting.
const HOUR: Duration = Duration::from_hours(1);
/// The longest wait for a state.
const BOUND: Duration = Duration::from_mins(1);

pub(crate) fn unique_stream() -> StreamName {
    format!("contract:{}", uuid::Uuid::new_v4().simple()).parse().expect("a valid name")
}

pub(crate) fn cursor(stream: &StreamName, group: &str, consumer: &str) -> Cursor {
    Cursor {
        stream: stream.clone(),
        group: group.parse().expect("a valid name"),
        consumer: consumer.parse().expect("a valid name"),
        claim_idle: HOUR,
        lease: None,
    }
}

pub(crate) fn new_entry(text: &str) -> NewEntry {
    let mut fields = Fields::default();
    fields.push(Bytes::from_static(field::ID.as_bytes()), format!("id-{text}"));
    fields.push(Bytes::from_static(field::DATA.as_bytes()), text.to_owned());
    NewEntry { fields, idempotency: None }
}

pub(crate) fn keyed(text: &str, key: &str, window: Duration) -> NewEntry {
    let idempotency = IdempotencyKey { key: Bytes::copy_from_slice(key.as_bytes()), window };
    NewEntry { idempotency: Some(idempotency), ..new_entry(text) }
}

fn numbered(numbers: std::ops::Range<usize>) -> Vec<NewEntry> {
    numbers.map(|n| new_entry(&n.to_string())).collect()
}

/// Appends entries with the numbers as payload, and returns their ids.
async fn fill(store: &dyn Store, stream: &StreamName, count: usize) -> Vec<EntryId> {
    let mut ids = Vec::with_capacity(count);
    for start in (0..count).step_by(MAX_APPEND) {
        let entries = numbered(start..count.min(start + MAX_APPEND));
        let appended = store.append(stream, entries).await.expect("appended");
        ids.extend(appended.iter().map(|one| one.id));
    }
    ids
}

fn payloads(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| entry.fields.text(field::DATA).expect("text").to_owned()).collect()
}

fn ids(deliveries: &[Delivery]) -> Vec<EntryId> {
    deliveries.iter().map(|delivery| delivery.entry.id).collect()
}

fn everything() -> Range {
    Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward }
}

async fn all(store: &dyn Store, stream: &StreamName) -> Vec<Entry> {
    store.range(stream, everything(), 10_000).await.expect("read")
}

async fn fetch(store: &dyn Store, cursor: &Cursor, limit: usize) -> Vec<Delivery> {
    store.fetch(cursor, limit, Duration::ZERO).await.expect("fetched")
}

async fn settle_one(store: &dyn Store, cursor: &Cursor, delivery: Delivery, outcome: Outcome) -> Settled {
    store.settle(cursor, &[Settlement { delivery, outcome }]).await.expect("settled")
}

async fn acknowledge(store: &dyn Store, cursor: &Cursor, deliveries: Vec<Delivery>) -> Settled {
    let settlements: Vec<Settlement> =
        deliveries.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge }).collect();
    store.settle(cursor, &settlements).await.expect("settled")
}

/// Copies a delivery, as held by a worker that does not know that it is settled.
fn copy_of(delivery: &Delivery) -> Delivery {
    Delivery { entry: delivery.entry.clone(), attempt: delivery.attempt, delivered_at: delivery.delivered_at }
}

async fn describe(store: &dyn Store, stream: &StreamName) -> StreamStatus {
    store.describe(stream).await.expect("described").expect("the stream exists")
}

async fn group_status(store: &dyn Store, cursor: &Cursor) -> GroupStatus {
    let status = describe(store, &cursor.stream).await;
    status.groups.into_iter().find(|group| group.name == cursor.group).expect("the group exists")
}

async fn pending_ids(store: &dyn Store, cursor: &Cursor) -> Vec<EntryId> {
    let pending = store.pending(cursor, false, EntryId::MIN, 10_000).await.expect("listed");
    pending.into_iter().map(|one| one.id).collect()
}

/// Returns a stream of `count` entries and a group at its beginning.
async fn grouped(store: &dyn Store, count: usize) -> (Cursor, Vec<EntryId>) {
    let stream = unique_stream();
    let cursor = cursor(&stream, "g", "a");
    let ids = fill(store, &stream, count).await;
    store.ensure_group(&stream, &cursor.group, Start::Oldest).await.expect("a group");
    (cursor, ids)
}

fn as_consumer(cursor: &Cursor, consumer: &str) -> Cursor {
    Cursor { consumer: consumer.parse().expect("a valid name"), ..cursor.clone() }
}

fn is_growing(ids: &[EntryId]) -> bool {
    ids.windows(2).all(|pair| pair[0] < pair[1])
}

async fn ids_grow_strictly_in_append_order(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let mut ids = Vec::new();
    for n in 0..50 {
        let appended = store.append(&stream, numbered(n..n + 1)).await.expect("appended");
        assert_eq!(appended.len(), 1);
        assert_eq!(appended[0].event_id, format!("id-{n}"));
        assert!(!appended[0].duplicate);
        ids.push(appended[0].id);
    }
    assert!(is_growing(&ids), "{ids:?}");
    assert!(ids[0] > EntryId::MIN);
    let entries = all(&*store, &stream).await;
    assert_eq!(entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids);
    assert_eq!(payloads(&entries), (0..50).map(|n| n.to_string()).collect::<Vec<_>>());

    let mut nameless = Fields::default();
    nameless.push("data", "x");
    let entry = NewEntry { fields: nameless, idempotency: None };
    let appended = store.append(&stream, vec![entry]).await.expect("appended");
    assert!(appended[0].event_id.is_empty(), "an entry without `id` has no event id");
}

async fn append_of_maximum_size_keeps_its_order(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, MAX_APPEND).await;
    assert_eq!(ids.len(), MAX_APPEND);
    assert!(is_growing(&ids));
    let entries = all(&*store, &stream).await;
    assert_eq!(payloads(&entries), (0..MAX_APPEND).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids);
}

async fn empty_append_returns_nothing(store: Arc<dyn Store>) {
    let stream = unique_stream();
    assert_eq!(store.append(&stream, Vec::new()).await.expect("appended"), Vec::new());
}

async fn append_over_maximum_is_rejected_whole(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let error = store.append(&stream, numbered(0..MAX_APPEND + 1)).await.expect_err("too many");
    assert_eq!(error.kind(), StoreErrorKind::Internal);
    assert!(all(&*store, &stream).await.is_empty());
}

async fn concurrent_appends_stay_contiguous_and_ordered(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let (store, stream) = (store.clone(), stream.clone());
        tasks.spawn(async move {
            for batch in 0..10 {
                let entries = (0..7).map(|n| new_entry(&format!("{task}/{}", batch * 7 + n))).collect();
                store.append(&stream, entries).await.expect("appended");
            }
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.expect("no panic");
    }
    let entries = all(&*store, &stream).await;
    assert_eq!(entries.len(), 8 * 70);
    assert!(is_growing(&entries.iter().map(|entry| entry.id).collect::<Vec<_>>()));
    let mut next: BTreeMap<String, usize> = BTreeMap::new();
    let mut last_task = String::new();
    for text in payloads(&entries) {
        let (task, n) = text.split_once('/').expect("task and number");
        let (n, expected) = (n.parse::<usize>().expect("a number"), next.entry(task.to_owned()).or_default());
        assert_eq!(n, *expected, "the order of task {task}");
        assert!(n.is_multiple_of(7) || last_task == task, "the append of {text} was interleaved");
        *expected += 1;
        task.clone_into(&mut last_task);
    }
}

async fn idempotency_key_stores_entry_once(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let first = store.append(&stream, vec![keyed("one", "k1", HOUR)]).await.expect("appended");
    let second = store
        .append(&stream, vec![new_entry("two"), keyed("three", "k1", HOUR), keyed("four", "k2", HOUR)])
        .await
        .expect("appended");
    assert!(!first[0].duplicate);
    assert_eq!(second.iter().map(|one| one.duplicate).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(second[1].id, first[0].id);
    assert_eq!(second[1].event_id, "id-one");
    assert!(first[0].id < second[0].id && second[0].id < second[2].id);
    assert_eq!(payloads(&all(&*store, &stream).await), ["one", "two", "four"]);
    assert_eq!(describe(&*store, &stream).await.entries_added, 3);
}

async fn idempotency_key_applies_within_one_append(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let appended = store
        .append(&stream, vec![keyed("one", "k", HOUR), keyed("two", "k", HOUR), new_entry("three")])
        .await
        .expect("appended");
    assert_eq!(appended.iter().map(|one| one.duplicate).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!(appended[1].id, appended[0].id);
    assert_eq!(appended[1].event_id, "id-one");
    assert_eq!(payloads(&all(&*store, &stream).await), ["one", "three"]);
    let appended = store.append(&stream, vec![keyed("four", "k", HOUR)]).await.expect("appended");
    assert!(appended[0].duplicate, "an append of duplicates alone stores nothing");
    assert_eq!(all(&*store, &stream).await.len(), 2);
}

async fn idempotency_key_is_scoped_to_its_stream(store: Arc<dyn Store>) {
    let (one, other) = (unique_stream(), unique_stream());
    store.append(&one, vec![keyed("x", "k", HOUR)]).await.expect("appended");
    let appended = store.append(&other, vec![keyed("x", "k", HOUR)]).await.expect("appended");
    assert!(!appended[0].duplicate);
    let binary = IdempotencyKey { key: Bytes::from(vec![0xff; 256]), window: HOUR };
    for expected in [false, true] {
        let entry = NewEntry { idempotency: Some(binary.clone()), ..new_entry("y") };
        let appended = store.append(&one, vec![entry]).await.expect("appended");
        assert_eq!(appended[0].duplicate, expected, "keys are any bytes");
    }
}

async fn idempotency_key_expires_after_its_window(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let window = Duration::from_millis(300);
    let begun = Instant::now();
    let first = store.append(&stream, vec![keyed("one", "k", window)]).await.expect("appended");
    loop {
        let appended = store.append(&stream, vec![keyed("again", "k", window)]).await.expect("appended");
        if !appended[0].duplicate {
            assert!(begun.elapsed() >= Duration::from_millis(250), "expired too early");
            assert!(appended[0].id > first[0].id);
            return;
        }
        assert_eq!(appended[0].id, first[0].id);
        assert!(begun.elapsed() < BOUND, "the key does not expire");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn arbitrary_bytes_are_returned_unchanged(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let mut fields = Fields::default();
    fields.push("data", Bytes::from_static(b"\xff\xfe not utf-8 \0 \r\n"));
    fields.push("data", "twice");
    fields.push(Bytes::from_static(b"na\xffme\0"), "");
    fields.push("", "a value without a name");
    fields.push("severity", "nonsense");
    for name in [field::ID, field::TIMESTAMP, field::SOURCE, field::CATEGORY, field::TENANT, field::TRACEPARENT] {
        fields.push(name, Bytes::from(name.bytes().rev().collect::<Vec<u8>>()));
    }
    let entry = NewEntry { fields: fields.clone(), idempotency: None };
    let appended = store.append(&stream, vec![entry.clone(), entry]).await.expect("appended");
    assert_eq!(appended[0].event_id, "di");
    for entry in all(&*store, &stream).await {
        assert_eq!(entry.fields, fields);
    }
    let tailed = store.tail(&stream, EntryId::MIN, 1, Duration::ZERO).await.expect("tailed");
    assert_eq!(tailed[0].fields, fields);
    let cursor = cursor(&stream, "g", "a");
    store.ensure_group(&stream, &cursor.group, Start::Oldest).await.expect("a group");
    let delivered = fetch(&*store, &cursor, 1).await;
    assert_eq!(delivered[0].entry.fields, fields);
    let claimed = store.claim(&as_consumer(&cursor, "b"), &[appended[0].id], Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries[0].entry.fields, fields);
}

async fn value_of_one_mebibyte_is_returned_unchanged(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let value: Bytes = (0..1_u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let big = |n: usize| {
        let mut fields = Fields::default();
        fields.push("data", value.slice(..value.len() - n));
        NewEntry { fields, idempotency: None }
    };
    store.append(&stream, vec![new_entry("small"), big(0), big(1), new_entry("small")]).await.expect("appended");
    let entries = all(&*store, &stream).await;
    assert_eq!(entries.len(), 4);
    assert!(entries[1].data() == Some(&value), "the first big value changed");
    assert!(entries[2].data() == Some(&value.slice(..value.len() - 1)), "the second big value changed");
    let cursor = cursor(&stream, "g", "a");
    store.ensure_group(&stream, &cursor.group, Start::Oldest).await.expect("a group");
    let mut delivered = Vec::new();
    while delivered.len() < 4 {
        let more = fetch(&*store, &cursor, 10).await;
        assert!(!more.is_empty(), "a fetch stopped after {} entries", delivered.len());
        delivered.extend(more);
    }
    assert!(delivered[1].entry.data() == Some(&value), "the delivered value changed");
}

async fn range_includes_both_ends_and_respects_limit(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 200).await;
    let read = async |from, to, limit| {
        let range = Range { from, to, order: Order::Forward };
        let entries = store.range(&stream, range, limit).await.expect("read");
        entries.into_iter().map(|entry| entry.id).collect::<Vec<_>>()
    };
    assert_eq!(read(ids[10], ids[150], 1000).await, ids[10..=150]);
    assert_eq!(read(ids[10], ids[150], 100).await, ids[10..110]);
    assert_eq!(read(ids[10], ids[10], 100).await, ids[10..=10]);
    assert_eq!(read(ids[10].next(), ids[12], 100).await, ids[11..=12]);
    assert_eq!(read(ids[12], ids[10], 100).await, []);
    assert_eq!(read(ids[199].next(), EntryId::MAX, 100).await, []);
    assert_eq!(read(EntryId::MIN, EntryId::MAX, 0).await, []);
    assert_eq!(read(EntryId::MIN, ids[0].previous(), 100).await, []);
    let after = store.range(&stream, Range::after(ids[190]), 1000).await.expect("read");
    assert_eq!(payloads(&after), (191..200).map(|n| n.to_string()).collect::<Vec<_>>());
}

async fn backward_range_starts_with_newest_entry(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 200).await;
    let read = async |from, to, limit| {
        let range = Range { from, to, order: Order::Backward };
        let entries = store.range(&stream, range, limit).await.expect("read");
        entries.into_iter().map(|entry| entry.id).collect::<Vec<_>>()
    };
    let reversed = |range: std::ops::RangeInclusive<usize>| range.rev().map(|n| ids[n]).collect::<Vec<_>>();
    assert_eq!(read(EntryId::MIN, EntryId::MAX, 3).await, reversed(197..=199));
    assert_eq!(read(EntryId::MIN, EntryId::MAX, 1000).await, reversed(0..=199));
    assert_eq!(read(ids[20], ids[100], 1000).await, reversed(20..=100));
    assert_eq!(read(ids[20], ids[100], 70).await, reversed(31..=100));
    assert_eq!(read(ids[100], ids[20], 1000).await, []);
}

async fn missing_stream_reads_as_empty(store: Arc<dyn Store>) {
    let stream = unique_stream();
    assert!(all(&*store, &stream).await.is_empty());
    assert!(store.tail(&stream, EntryId::MIN, 10, Duration::ZERO).await.expect("tailed").is_empty());
    assert_eq!(store.describe(&stream).await.expect("described"), None);
    assert_eq!(store.trim(&stream, Trim::ToLength(0)).await.expect("trimmed"), 0);
    assert_eq!(store.discard(&stream, &[EntryId::new(1, 0)]).await.expect("discarded"), 0);
    assert_eq!(store.describe(&stream).await.expect("described"), None, "reading made the stream");
}

async fn tail_returns_existing_entries_at_once(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 150).await;
    let begun = Instant::now();
    let tailed = store.tail(&stream, EntryId::MIN, 100, Duration::from_secs(5)).await.expect("tailed");
    assert_eq!(tailed.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[..100]);
    let tailed = store.tail(&stream, ids[99], 100, Duration::from_secs(5)).await.expect("tailed");
    assert_eq!(tailed.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[100..]);
    assert!(begun.elapsed() < Duration::from_secs(4), "the tail waited though there were entries");
}

async fn tail_wakes_on_new_entry(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 3).await;
    let begun = Instant::now();
    let tail = store.tail(&stream, ids[2], 10, Duration::from_secs(5));
    let append = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        store.append(&stream, vec![new_entry("new")]).await.expect("appended")
    };
    let (tailed, appended) = tokio::join!(tail, append);
    let tailed = tailed.expect("tailed");
    assert_eq!(tailed.len(), 1);
    assert_eq!(tailed[0].id, appended[0].id);
    assert!(begun.elapsed() < Duration::from_millis(4500), "the tail did not wake on the entry");
}

async fn tail_wakes_when_stream_is_created(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let begun = Instant::now();
    let tail = store.tail(&stream, EntryId::MIN, 10, Duration::from_secs(5));
    let append = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        store.append(&stream, vec![new_entry("first")]).await.expect("appended")
    };
    let (tailed, _) = tokio::join!(tail, append);
    assert_eq!(payloads(&tailed.expect("tailed")), ["first"]);
    assert!(begun.elapsed() < Duration::from_millis(4500), "the tail did not wake on the entry");
}

async fn tail_without_new_entry_returns_nothing(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 3).await;
    let begun = Instant::now();
    let tailed = store.tail(&stream, ids[2], 10, Duration::from_millis(200)).await.expect("tailed");
    assert!(tailed.is_empty());
    assert!((Duration::from_millis(150)..Duration::from_secs(4)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let after_the_end = EntryId::new(ids[2].ms + 3_600_000, 0);
    let tailed = store.tail(&stream, after_the_end, 10, Duration::ZERO).await.expect("tailed");
    assert!(tailed.is_empty());
}

async fn every_tail_receives_every_entry(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let mut tails = JoinSet::new();
    for _ in 0..4 {
        let (store, stream) = (store.clone(), stream.clone());
        tails.spawn(async move {
            let tailed = store.tail(&stream, EntryId::MIN, 10, Duration::from_secs(5)).await.expect("tailed");
            payloads(&tailed)
        });
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.append(&stream, numbered(0..5)).await.expect("appended");
    while let Some(tailed) = tails.join_next().await {
        assert_eq!(tailed.expect("no panic"), ["0", "1", "2", "3", "4"]);
    }
}

async fn tail_has_no_gap_or_duplicate(store: Arc<dyn Store>) {
    const COUNT: usize = 2000;
    let stream = unique_stream();
    let writer = async {
        for start in (0..COUNT).step_by(20) {
            store.append(&stream, numbered(start..start + 20)).await.expect("appended");
        }
    };
    let reader = async {
        let (mut position, mut seen, begun) = (EntryId::MIN, Vec::new(), Instant::now());
        while seen.len() < COUNT {
            let tailed = store.tail(&stream, position, 33, Duration::from_secs(2)).await.expect("tailed");
            position = tailed.last().map_or(position, |entry| entry.id);
            seen.extend(payloads(&tailed));
            assert!(begun.elapsed() < BOUND * 3, "only {} entries were returned", seen.len());
        }
        seen
    };
    let ((), seen) = tokio::join!(writer, reader);
    assert_eq!(seen, (0..COUNT).map(|n| n.to_string()).collect::<Vec<_>>());
}

async fn group_starts_at_requested_position(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 10).await;
    let starts = [
        ("oldest", Start::Oldest, 0),
        ("new", Start::New, 10),
        ("after", Start::After(ids[3]), 4),
        ("zero", Start::After(EntryId::MIN), 0),
    ];
    for (group, start, _) in starts {
        let cursor = cursor(&stream, group, "a");
        assert!(store.ensure_group(&stream, &cursor.group, start).await.expect("a group"));
    }
    store.append(&stream, vec![new_entry("10")]).await.expect("appended");
    for (group, _, first) in starts {
        let delivered = fetch(&*store, &cursor(&stream, group, "a"), 100).await;
        let entries: Vec<Entry> = delivered.into_iter().map(|delivery| delivery.entry).collect();
        assert_eq!(payloads(&entries), (first..=10).map(|n| n.to_string()).collect::<Vec<_>>(), "group {group}");
    }
}

async fn second_ensure_group_changes_nothing(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 10).await;
    let delivered = fetch(&*store, &cursor, 4).await;
    assert_eq!(delivered.len(), 4);
    for start in [Start::Oldest, Start::New, Start::After(ids[8])] {
        assert!(!store.ensure_group(&cursor.stream, &cursor.group, start).await.expect("a group"));
    }
    assert_eq!(pending_ids(&*store, &cursor).await, ids[..4]);
    assert_eq!(self::ids(&fetch(&*store, &cursor, 100).await), ids[4..]);
}

async fn ensure_group_creates_the_stream(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let cursor = cursor(&stream, "g", "a");
    assert!(store.ensure_group(&stream, &cursor.group, Start::New).await.expect("a group"));
    let status = describe(&*store, &stream).await;
    assert_eq!((status.length, status.first_id, status.entries_added), (0, None, 0));
    assert_eq!(status.groups.len(), 1);
    let appended = store.append(&stream, vec![new_entry("x")]).await.expect("appended");
    assert_eq!(ids(&fetch(&*store, &cursor, 10).await), [appended[0].id]);
}

async fn fetch_delivers_each_entry_once(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 150).await;
    let b = as_consumer(&a, "b");
    let before = Instant::now();
    let first = fetch(&*store, &a, 60).await;
    let second = fetch(&*store, &b, 50).await;
    let third = fetch(&*store, &a, 100).await;
    assert_eq!(self::ids(&first), ids[..60]);
    assert_eq!(self::ids(&second), ids[60..110]);
    assert_eq!(self::ids(&third), ids[110..]);
    assert!(fetch(&*store, &a, 100).await.is_empty());
    for (n, delivery) in first.iter().chain(&second).chain(&third).enumerate() {
        assert_eq!(delivery.attempt, 1);
        assert!(delivery.delivered_at >= before && delivery.delivered_at <= Instant::now());
        assert_eq!(delivery.entry.fields, numbered(n..n + 1)[0].fields);
    }
    let pending = store.pending(&a, false, EntryId::MIN, 1000).await.expect("listed");
    assert_eq!(pending.iter().map(|one| one.id).collect::<Vec<_>>(), ids);
    assert!(pending.iter().all(|one| one.attempts == 1 && one.idle < BOUND));
    assert_eq!(pending.iter().filter(|one| one.consumer == b.consumer).count(), 50);
}

async fn fetch_wakes_on_new_entry(store: Arc<dyn Store>) {
    let (cursor, _) = grouped(&*store, 0).await;
    // On a busy machine an append may take longer than a fetch waits. One fetch that wakes in time is enough.
    for _ in 0..10 {
        let begun = Instant::now();
        let fetched = store.fetch(&cursor, 10, Duration::from_secs(2));
        let append = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            store.append(&cursor.stream, vec![new_entry("new")]).await.expect("appended")
        };
        let (fetched, appended) = tokio::join!(fetched, append);
        let mut fetched = fetched.expect("fetched");
        if fetched.is_empty() {
            fetched = fetch(&*store, &cursor, 10).await;
        }
        assert_eq!(ids(&fetched), [appended[0].id]);
        if begun.elapsed() < Duration::from_millis(1800) {
            return;
        }
    }
    panic!("no fetch woke on its entry");
}

async fn fetch_without_new_entry_returns_nothing(store: Arc<dyn Store>) {
    let (cursor, _) = grouped(&*store, 2).await;
    assert_eq!(fetch(&*store, &cursor, 10).await.len(), 2);
    let begun = Instant::now();
    assert!(store.fetch(&cursor, 10, Duration::from_millis(200)).await.expect("fetched").is_empty());
    assert!((Duration::from_millis(150)..Duration::from_secs(4)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
}

async fn concurrent_fetches_share_the_entries(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 1000).await;
    let mut tasks = JoinSet::new();
    for n in 0..4 {
        let (store, cursor) = (store.clone(), as_consumer(&cursor, &format!("c{n}")));
        tasks.spawn(async move {
            let mut mine = Vec::new();
            loop {
                let delivered = fetch(&*store, &cursor, 17).await;
                if delivered.is_empty() {
                    return mine;
                }
                mine.extend(self::ids(&delivered));
            }
        });
    }
    let mut delivered = Vec::new();
    while let Some(mine) = tasks.join_next().await {
        let mine = mine.expect("no panic");
        assert!(is_growing(&mine), "a consumer sees entries in order");
        delivered.extend(mine);
    }
    delivered.sort_unstable();
    assert_eq!(delivered, ids, "each entry goes to exactly one consumer");
}

async fn groups_are_independent(store: Arc<dyn Store>) {
    let (one, ids) = grouped(&*store, 10).await;
    let other = cursor(&one.stream, "other", "a");
    store.ensure_group(&one.stream, &other.group, Start::Oldest).await.expect("a group");
    let delivered = fetch(&*store, &one, 10).await;
    assert_eq!(self::ids(&fetch(&*store, &other, 10).await), ids);
    acknowledge(&*store, &one, delivered).await;
    assert_eq!(pending_ids(&*store, &one).await, []);
    assert_eq!(pending_ids(&*store, &other).await, ids);
}

async fn operations_on_missing_group_return_no_group(store: Arc<dyn Store>) {
    let stream = unique_stream();
    for fill_it in [false, true] {
        if fill_it {
            fill(&*store, &stream, 3).await;
        }
        let cursor = cursor(&stream, "missing", "a");
        let fetched = store.fetch(&cursor, 1, Duration::ZERO).await.map(|_| ());
        let claimed = store.claim(&cursor, &[EntryId::new(1, 1)], Duration::ZERO).await.map(|_| ());
        let reclaimed = store.reclaim(&cursor, Duration::ZERO, EntryId::MIN, 10).await.map(|_| ());
        let listed = store.pending(&cursor, false, EntryId::MIN, 10).await.map(|_| ());
        for result in [fetched, claimed, reclaimed, listed] {
            assert_eq!(result.expect_err("no such group").kind(), StoreErrorKind::NoGroup);
        }
    }
}

async fn pending_is_listed_by_consumer_and_page(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 30).await;
    let b = as_consumer(&a, "b");
    fetch(&*store, &a, 10).await;
    fetch(&*store, &b, 10).await;
    fetch(&*store, &a, 10).await;
    let list = async |cursor: &Cursor, own_only, from, limit| {
        let pending = store.pending(cursor, own_only, from, limit).await.expect("listed");
        pending.into_iter().map(|one| one.id).collect::<Vec<_>>()
    };
    assert_eq!(list(&a, false, EntryId::MIN, 100).await, ids);
    assert_eq!(list(&a, true, EntryId::MIN, 100).await, [&ids[..10], &ids[20..]].concat());
    assert_eq!(list(&b, true, EntryId::MIN, 100).await, ids[10..20]);
    assert_eq!(list(&as_consumer(&a, "nobody"), true, EntryId::MIN, 100).await, []);
    assert_eq!(list(&a, false, ids[5], 10).await, ids[5..15]);
    assert_eq!(list(&a, true, ids[5], 10).await, [&ids[5..10], &ids[20..25]].concat());
    assert_eq!(list(&a, false, ids[29].next(), 10).await, []);
}

async fn claim_takes_named_entries_and_counts_attempt(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 10).await;
    let b = as_consumer(&a, "b");
    fetch(&*store, &a, 10).await;
    let claimed = store.claim(&b, &[ids[7], ids[2], ids[3]], Duration::ZERO).await.expect("claimed");
    let mut taken = self::ids(&claimed.deliveries);
    taken.sort_unstable();
    assert_eq!(taken, [ids[2], ids[3], ids[7]]);
    assert!(claimed.lost.is_empty());
    for delivery in &claimed.deliveries {
        assert_eq!(delivery.attempt, 2);
        let n = ids.iter().position(|id| *id == delivery.entry.id).expect("one of ours");
        assert_eq!(delivery.entry.fields, numbered(n..n + 1)[0].fields);
    }
    let pending = store.pending(&b, true, EntryId::MIN, 100).await.expect("listed");
    assert_eq!(
        pending.iter().map(|one| (one.id, one.attempts)).collect::<Vec<_>>(),
        [(ids[2], 2), (ids[3], 2), (ids[7], 2)]
    );
    let claimed = store.claim(&b, &[ids[3]], Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries[0].attempt, 3, "its own entries can be claimed as well");
    let others = store.pending(&a, true, EntryId::MIN, 100).await.expect("listed");
    assert_eq!(others.len(), 7);
    assert!(others.iter().all(|one| one.attempts == 1), "the others are unchanged");
    assert_eq!(pending_ids(&*store, &a).await, ids);
}

async fn claim_skips_entries_not_idle_or_not_pending(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 10).await;
    let b = as_consumer(&a, "b");
    let delivered = fetch(&*store, &a, 5).await;
    let claimed = store.claim(&b, &ids, HOUR).await.expect("claimed");
    assert!(claimed.deliveries.is_empty() && claimed.lost.is_empty(), "nothing is idle for an hour");
    acknowledge(&*store, &a, delivered.into_iter().take(2).collect()).await;
    let claimed = store.claim(&b, &ids, Duration::ZERO).await.expect("claimed");
    assert_eq!(self::ids(&claimed.deliveries), ids[2..5], "settled and undelivered entries are left out");
    assert!(claimed.lost.is_empty());
    let claimed = store.claim(&b, &[], Duration::ZERO).await.expect("claimed");
    assert!(claimed.deliveries.is_empty());
}

async fn reclaim_reaches_the_end_page_by_page(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 250).await;
    let b = as_consumer(&a, "b");
    assert_eq!(fetch(&*store, &a, 250).await.len(), 250);
    let (mut from, mut taken, mut calls) = (EntryId::MIN, Vec::new(), 0);
    loop {
        let reclaimed = store.reclaim(&b, Duration::ZERO, from, 40).await.expect("reclaimed");
        assert!(reclaimed.claimed.deliveries.len() <= 40);
        assert!(reclaimed.claimed.deliveries.iter().all(|delivery| delivery.attempt == 2));
        taken.extend(self::ids(&reclaimed.claimed.deliveries));
        calls += 1;
        assert!(calls < 100, "the search does not end");
        if reclaimed.next == EntryId::MIN {
            break;
        }
        assert!(reclaimed.next > from, "the search goes forward");
        from = reclaimed.next;
    }
    assert_eq!(taken, ids);
    assert_eq!(store.pending(&b, true, EntryId::MIN, 1000).await.expect("listed").len(), 250);
}

async fn reclaim_skips_entries_that_are_not_idle(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 60).await;
    let b = as_consumer(&a, "b");
    let mut delivered = fetch(&*store, &a, 60).await;
    let due = delivered.remove(50);
    settle_one(&*store, &a, due, Outcome::Retry(Duration::ZERO)).await;
    let (mut from, mut taken) = (EntryId::MIN, Vec::new());
    loop {
        let reclaimed = store.reclaim(&b, HOUR, from, 10).await.expect("reclaimed");
        assert!(reclaimed.claimed.lost.is_empty());
        taken.extend(self::ids(&reclaimed.claimed.deliveries));
        if reclaimed.next == EntryId::MIN {
            break;
        }
        from = reclaimed.next;
    }
    assert_eq!(taken, [ids[50]]);
}

async fn acknowledged_entries_are_settled_once(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 300).await;
    let mut delivered = Vec::new();
    while delivered.len() < 300 {
        delivered.extend(fetch(&*store, &cursor, 100).await);
    }
    let copies: Vec<Delivery> = delivered.iter().skip(1).map(copy_of).collect();
    let left = delivered.remove(0);
    assert_eq!(acknowledge(&*store, &cursor, delivered).await, Settled { settled: 299, not_owned: 0 });
    assert_eq!(pending_ids(&*store, &cursor).await, [ids[0]]);
    assert_eq!(acknowledge(&*store, &cursor, copies).await, Settled { settled: 0, not_owned: 299 });
    assert_eq!(acknowledge(&*store, &cursor, vec![left]).await, Settled { settled: 1, not_owned: 0 });
    assert_eq!(pending_ids(&*store, &cursor).await, []);
    assert!(fetch(&*store, &cursor, 10).await.is_empty(), "settled entries are not delivered again");
    assert_eq!(store.settle(&cursor, &[]).await.expect("settled"), Settled::default());
}

async fn settlement_of_claimed_delivery_is_not_owned(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 4).await;
    // With a claim idle of zero, every settlement checks the owner of its delivery.
    let a = Cursor { claim_idle: Duration::ZERO, ..a };
    let b = as_consumer(&a, "b");
    let delivered = fetch(&*store, &a, 4).await;
    let claimed = store.claim(&b, &ids, Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries.len(), 4);
    let outcomes = [Outcome::Acknowledge, Outcome::Retry(HOUR), Outcome::Release, Outcome::Acknowledge];
    let settlements: Vec<Settlement> =
        delivered.into_iter().zip(outcomes).map(|(delivery, outcome)| Settlement { delivery, outcome }).collect();
    let settled = store.settle(&a, &settlements).await.expect("settled");
    assert_eq!(settled, Settled { settled: 0, not_owned: 4 });
    let pending = store.pending(&b, true, EntryId::MIN, 10).await.expect("listed");
    assert_eq!(
        pending.iter().map(|one| (one.id, one.attempts)).collect::<Vec<_>>(),
        ids.iter().map(|id| (*id, 2)).collect::<Vec<_>>()
    );
    assert_eq!(acknowledge(&*store, &b, claimed.deliveries).await, Settled { settled: 4, not_owned: 0 });
}

async fn retry_is_claimable_when_due(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 3).await;
    let mut delivered = fetch(&*store, &a, 3).await;
    let (later, now) = (delivered.remove(1), delivered.remove(0));
    let settled = settle_one(&*store, &a, now, Outcome::Retry(Duration::ZERO)).await;
    assert_eq!(settled, Settled { settled: 1, not_owned: 0 });
    let begun = Instant::now();
    settle_one(&*store, &a, later, Outcome::Retry(Duration::from_secs(2))).await;
    let pending = store.pending(&a, true, EntryId::MIN, 10).await.expect("listed");
    assert_eq!(
        pending.iter().map(|one| (one.id, one.attempts)).collect::<Vec<_>>(),
        ids.iter().map(|id| (*id, 1)).collect::<Vec<_>>()
    );

    let claimed = store.claim(&as_consumer(&a, "b"), &ids, HOUR).await.expect("claimed");
    assert_eq!(self::ids(&claimed.deliveries), [ids[0]], "due at once, any consumer may claim it");
    assert_eq!(claimed.deliveries[0].attempt, 2);
    loop {
        let claimed = store.claim(&a, &ids, HOUR).await.expect("claimed");
        if !claimed.deliveries.is_empty() {
            assert_eq!(self::ids(&claimed.deliveries), [ids[1]]);
            assert_eq!(claimed.deliveries[0].attempt, 2);
            assert!(begun.elapsed() >= Duration::from_millis(1950), "due too early: {:?}", begun.elapsed());
            return;
        }
        assert!(begun.elapsed() < BOUND, "the entry does not become due");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn retry_delay_is_capped_at_claim_idle(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 1).await;
    let a = Cursor { claim_idle: Duration::from_millis(300), ..a };
    let delivered = fetch(&*store, &a, 1).await.remove(0);
    let begun = Instant::now();
    settle_one(&*store, &a, delivered, Outcome::Retry(HOUR)).await;
    loop {
        let claimed = store.claim(&as_consumer(&a, "b"), &ids, a.claim_idle).await.expect("claimed");
        if !claimed.deliveries.is_empty() {
            assert!(begun.elapsed() >= Duration::from_millis(250), "due too early: {:?}", begun.elapsed());
            return;
        }
        assert!(begun.elapsed() < BOUND, "the entry does not become due");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn dead_letter(to: &StreamName, text: &str) -> Outcome {
    let mut fields = Fields::default();
    fields.push("data", Bytes::from_static(b"\xff\0"));
    fields.push("data", text.to_owned());
    fields.push("dead.reason", "rejected");
    Outcome::DeadLetter { to: to.clone(), fields }
}

async fn dead_letter_is_moved_atomically_and_once(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 3).await;
    let dead = format!("{}:dead", cursor.stream).parse::<StreamName>().expect("a valid name");
    let delivered = fetch(&*store, &cursor, 3).await;
    let outcome = dead_letter(&dead, "why");
    let Outcome::DeadLetter { fields, .. } = outcome.clone() else { unreachable!("made above") };
    for (round, expected) in [(0, Settled { settled: 1, not_owned: 0 }), (1, Settled { settled: 0, not_owned: 1 })] {
        let settled = settle_one(&*store, &cursor, copy_of(&delivered[1]), outcome.clone()).await;
        assert_eq!(settled, expected, "round {round}");
        let letters = all(&*store, &dead).await;
        assert_eq!(letters.len(), 1, "round {round}");
        assert_eq!(letters[0].fields, fields);
        assert_eq!(pending_ids(&*store, &cursor).await, [ids[0], ids[2]]);
    }
    assert_eq!(describe(&*store, &dead).await.length, 1);
    assert_eq!(all(&*store, &cursor.stream).await.len(), 3, "the entry itself stays in its stream");
}

async fn dead_letter_of_claimed_delivery_is_not_written(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 1).await;
    let dead = format!("{}:dead", a.stream).parse::<StreamName>().expect("a valid name");
    let delivered = fetch(&*store, &a, 1).await.remove(0);
    let taken = store.claim(&as_consumer(&a, "b"), &ids, Duration::ZERO).await.expect("claimed");
    assert_eq!(taken.deliveries.len(), 1);
    let settled = settle_one(&*store, &a, delivered, dead_letter(&dead, "late")).await;
    assert_eq!(settled, Settled { settled: 0, not_owned: 1 });
    assert!(all(&*store, &dead).await.is_empty());
    assert_eq!(pending_ids(&*store, &a).await, ids);
}

async fn release_is_claimable_and_counts_no_attempt(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 2).await;
    let b = as_consumer(&a, "b");
    let mut delivered = fetch(&*store, &a, 2).await;
    let settled = settle_one(&*store, &a, delivered.remove(0), Outcome::Release).await;
    assert_eq!(settled, Settled { settled: 1, not_owned: 0 });
    let claimed = store.claim(&b, &ids, a.claim_idle).await.expect("claimed");
    assert_eq!(self::ids(&claimed.deliveries), [ids[0]], "only the released entry is claimable");
    assert_eq!(claimed.deliveries[0].attempt, 1);
    settle_one(&*store, &b, copy_of(&claimed.deliveries[0]), Outcome::Retry(Duration::ZERO)).await;
    let reclaimed = store.reclaim(&a, a.claim_idle, EntryId::MIN, 10).await.expect("reclaimed");
    assert_eq!(reclaimed.claimed.deliveries[0].attempt, 2);
    settle_one(&*store, &a, copy_of(&reclaimed.claimed.deliveries[0]), Outcome::Release).await;
    let claimed = store.claim(&b, &ids, a.claim_idle).await.expect("claimed");
    assert_eq!(claimed.deliveries[0].attempt, 2, "only the failed delivery is counted, not the released one");
}

async fn settle_accepts_all_outcomes_in_one_call(store: Arc<dyn Store>) {
    const COUNT: usize = 400;
    let (a, ids) = grouped(&*store, COUNT).await;
    let dead = format!("{}:dead", a.stream).parse::<StreamName>().expect("a valid name");
    let mut settlements = Vec::new();
    while settlements.len() < COUNT {
        for delivery in fetch(&*store, &a, 100).await {
            let outcome = match settlements.len() % 4 {
                0 => Outcome::Acknowledge,
                1 => Outcome::Retry(Duration::ZERO),
                2 => dead_letter(&dead, &settlements.len().to_string()),
                _ => Outcome::Release,
            };
            settlements.push(Settlement { delivery, outcome });
        }
    }
    let settled = store.settle(&a, &settlements).await.expect("settled");
    assert_eq!(settled, Settled { settled: COUNT, not_owned: 0 });
    assert_eq!(all(&*store, &dead).await.len(), COUNT / 4);
    let expected: Vec<EntryId> = (0..COUNT).filter(|n| n % 2 == 1).map(|n| ids[n]).collect();
    assert_eq!(pending_ids(&*store, &a).await, expected);
    let (mut from, mut attempts) = (EntryId::MIN, BTreeMap::new());
    loop {
        let reclaimed = store.reclaim(&as_consumer(&a, "b"), a.claim_idle, from, 100).await.expect("reclaimed");
        attempts.extend(reclaimed.claimed.deliveries.iter().map(|delivery| (delivery.entry.id, delivery.attempt)));
        from = reclaimed.next;
        if from == EntryId::MIN {
            break;
        }
    }
    assert_eq!(attempts.keys().copied().collect::<Vec<_>>(), expected);
    for (n, id) in ids.iter().enumerate().filter(|(n, _)| n % 2 == 1) {
        assert_eq!(attempts[id], if n % 4 == 1 { 2 } else { 1 });
    }
}

async fn extend_resets_idle_time_without_attempt(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 2).await;
    for delivery in fetch(&*store, &a, 2).await {
        settle_one(&*store, &a, delivery, Outcome::Retry(Duration::ZERO)).await;
    }
    let idle = store.pending(&a, true, EntryId::MIN, 10).await.expect("listed");
    assert!(idle.iter().all(|one| one.idle >= HOUR), "{idle:?}");
    assert_eq!(store.extend(&a, &ids[..1]).await.expect("extended"), []);
    let pending = store.pending(&a, true, EntryId::MIN, 10).await.expect("listed");
    assert!(pending[0].idle < BOUND && pending[1].idle >= HOUR, "{pending:?}");
    assert!(pending.iter().all(|one| one.attempts == 1));
    let claimed = store.claim(&as_consumer(&a, "b"), &ids, HOUR).await.expect("claimed");
    assert_eq!(self::ids(&claimed.deliveries), [ids[1]]);
}

async fn extend_returns_entries_not_owned(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 5).await;
    let b = as_consumer(&a, "b");
    let delivered = fetch(&*store, &a, 4).await;
    store.claim(&b, &ids[1..2], Duration::ZERO).await.expect("claimed");
    acknowledge(&*store, &a, delivered.into_iter().skip(2).take(1).collect()).await;
    let mut foreign = store.extend(&a, &ids).await.expect("extended");
    foreign.sort_unstable();
    assert_eq!(foreign, [ids[1], ids[2], ids[4]], "claimed, settled and undelivered ones");
    let pending = store.pending(&a, false, EntryId::MIN, 10).await.expect("listed");
    let expected = [(ids[0], &a, 1), (ids[1], &b, 2), (ids[3], &a, 1)];
    assert_eq!(pending.len(), expected.len());
    for (one, (id, owner, attempts)) in pending.iter().zip(expected) {
        assert_eq!((one.id, &one.consumer, one.attempts), (id, &owner.consumer, attempts));
    }
}

async fn trim_to_length_keeps_newest_entries(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 1000).await;
    let removed = store.trim(&stream, Trim::ToLength(300)).await.expect("trimmed");
    let left = all(&*store, &stream).await;
    assert!((300..=400).contains(&left.len()), "{} are left", left.len());
    assert_eq!(removed, 1000 - left.len() as u64);
    assert_eq!(left.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids[1000 - left.len()..]);
    let status = describe(&*store, &stream).await;
    assert_eq!(status.length, left.len() as u64);
    assert_eq!((status.first_id, status.last_id, status.entries_added), (Some(left[0].id), ids[999], 1000));
    let again = store.trim(&stream, Trim::ToLength(2000)).await.expect("trimmed");
    assert_eq!(again, 0, "the stream is shorter than the limit");

    store.trim(&stream, Trim::ToLength(0)).await.expect("trimmed");
    let status = describe(&*store, &stream).await;
    assert!(status.length <= 100, "{} are left", status.length);
    assert_eq!((status.last_id, status.entries_added), (ids[999], 1000));
    let appended = store.append(&stream, vec![new_entry("later")]).await.expect("appended");
    assert!(appended[0].id > ids[999], "ids grow across trims");
}

async fn trim_by_id_keeps_newer_entries(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 1000).await;
    let removed = store.trim(&stream, Trim::Before(ids[600])).await.expect("trimmed");
    let left = all(&*store, &stream).await;
    assert!((400..=500).contains(&left.len()), "{} are left", left.len());
    assert_eq!(removed, 1000 - left.len() as u64);
    assert_eq!(left.last().map(|entry| entry.id), Some(ids[999]));
    assert_eq!(store.trim(&stream, Trim::Before(EntryId::MIN)).await.expect("trimmed"), 0);
    store.trim(&stream, Trim::Before(EntryId::MAX)).await.expect("trimmed");
    assert!(describe(&*store, &stream).await.length <= 100);
}

async fn trim_keeps_undelivered_entries(store: Arc<dyn Store>) {
    let (slow, ids) = grouped(&*store, 1000).await;
    let quick = cursor(&slow.stream, "quick", "a");
    store.ensure_group(&slow.stream, &quick.group, Start::New).await.expect("a group");
    let delivered = fetch(&*store, &slow, 400).await;
    let read = delivered.len();
    acknowledge(&*store, &slow, delivered).await;
    for trim in [Trim::ToLength(10), Trim::Before(EntryId::MAX)] {
        store.trim(&slow.stream, trim).await.expect("trimmed");
        let left = describe(&*store, &slow.stream).await.length;
        assert!((1000 - read as u64..=1100 - read as u64).contains(&left), "{trim:?} left {left}");
    }
    let mut delivered = Vec::new();
    while delivered.len() < 1000 - read {
        let more = fetch(&*store, &slow, 100).await;
        assert!(!more.is_empty(), "an entry is missing");
        delivered.extend(self::ids(&more));
    }
    assert_eq!(delivered, ids[read..]);
}

async fn trim_keeps_pending_entries(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 1000).await;
    let mut delivered = Vec::new();
    while delivered.len() < 1000 {
        delivered.extend(fetch(&*store, &cursor, 100).await);
    }
    let kept = delivered.remove(300);
    acknowledge(&*store, &cursor, delivered).await;
    store.trim(&cursor.stream, Trim::ToLength(0)).await.expect("trimmed");
    let left = describe(&*store, &cursor.stream).await.length;
    assert!((700..=800).contains(&left), "{left} are left");
    let claimed = store.claim(&as_consumer(&cursor, "b"), &[ids[300]], Duration::ZERO).await.expect("claimed");
    assert_eq!(claimed.deliveries.len(), 1, "the pending entry still has its body");
    acknowledge(&*store, &cursor, vec![kept]).await;
    let by_b = as_consumer(&cursor, "b");
    acknowledge(&*store, &by_b, claimed.deliveries).await;
    store.trim(&cursor.stream, Trim::ToLength(0)).await.expect("trimmed");
    assert!(describe(&*store, &cursor.stream).await.length <= 100);
}

async fn discard_removes_entry_once(store: Arc<dyn Store>) {
    let stream = unique_stream();
    let ids = fill(&*store, &stream, 200).await;
    let gone = [ids[0], ids[63], ids[64], ids[150], ids[199], ids[199].next()];
    assert_eq!(store.discard(&stream, &gone).await.expect("discarded"), 5);
    assert_eq!(store.discard(&stream, &gone).await.expect("discarded"), 0);
    let left: Vec<EntryId> = ids.iter().copied().filter(|id| !gone.contains(id)).collect();
    let read: Vec<EntryId> = all(&*store, &stream).await.iter().map(|entry| entry.id).collect();
    assert_eq!(read, left);
    let backward = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Backward };
    let newest = store.range(&stream, backward, 2).await.expect("read");
    assert_eq!(newest.iter().map(|entry| entry.id).collect::<Vec<_>>(), [ids[198], ids[197]]);
    let tailed = store.tail(&stream, ids[198], 10, Duration::ZERO).await.expect("tailed");
    assert!(tailed.is_empty());
    let status = describe(&*store, &stream).await;
    assert_eq!(
        (status.length, status.first_id, status.last_id, status.entries_added),
        (195, Some(ids[1]), ids[199], 200)
    );
    let appended = store.append(&stream, vec![new_entry("later")]).await.expect("appended");
    assert!(appended[0].id > ids[199]);
    let all_ids: Vec<EntryId> = left.iter().copied().chain([appended[0].id]).collect();
    assert_eq!(store.discard(&stream, &all_ids).await.expect("discarded"), 196);
    assert!(all(&*store, &stream).await.is_empty());
    let status = describe(&*store, &stream).await;
    assert_eq!((status.length, status.first_id, status.last_id), (0, None, appended[0].id));
    let appended_later = store.append(&stream, vec![new_entry("last")]).await.expect("appended");
    assert!(appended_later[0].id > appended[0].id);
    assert_eq!(payloads(&all(&*store, &stream).await), ["last"]);
}

async fn discarded_entry_is_not_delivered(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 10).await;
    assert_eq!(store.discard(&cursor.stream, &[ids[0], ids[4], ids[9]]).await.expect("discarded"), 3);
    let expected = [&ids[1..4], &ids[5..9]].concat();
    assert_eq!(self::ids(&fetch(&*store, &cursor, 10).await), expected);
    assert_eq!(pending_ids(&*store, &cursor).await, expected);
}

async fn assert_lost_once(store: &dyn Store, cursor: &Cursor, lost: EntryId, claimed: Claimed, taken: &[EntryId]) {
    assert_eq!(claimed.lost, [lost]);
    let mut delivered = ids(&claimed.deliveries);
    delivered.sort_unstable();
    assert_eq!(delivered, taken);
    assert_eq!(pending_ids(store, cursor).await, taken, "the lost entry is not pending any more");
    let again = store.claim(cursor, &[lost], Duration::ZERO).await.expect("claimed");
    assert!(again.lost.is_empty() && again.deliveries.is_empty(), "a loss is reported once");
}

async fn claim_reports_lost_pending_entry_once(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 5).await;
    fetch(&*store, &cursor, 5).await;
    assert_eq!(store.discard(&cursor.stream, &[ids[2]]).await.expect("discarded"), 1);
    assert_eq!(pending_ids(&*store, &cursor).await, ids, "still pending until a claim finds it");
    let claimed = store.claim(&as_consumer(&cursor, "b"), &ids, Duration::ZERO).await.expect("claimed");
    let taken = [&ids[..2], &ids[3..]].concat();
    assert_lost_once(&*store, &cursor, ids[2], claimed, &taken).await;
}

async fn reclaim_reports_lost_pending_entry_once(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 5).await;
    fetch(&*store, &cursor, 5).await;
    assert_eq!(store.discard(&cursor.stream, &[ids[4]]).await.expect("discarded"), 1);
    let (mut from, mut all_claimed) = (EntryId::MIN, Claimed::default());
    loop {
        let reclaimed = store.reclaim(&as_consumer(&cursor, "b"), Duration::ZERO, from, 100).await.expect("reclaimed");
        all_claimed.deliveries.extend(reclaimed.claimed.deliveries);
        all_claimed.lost.extend(reclaimed.claimed.lost);
        from = reclaimed.next;
        if from == EntryId::MIN {
            break;
        }
    }
    assert_lost_once(&*store, &cursor, ids[4], all_claimed, &ids[..4]).await;
}

async fn consumer_with_pending_entries_is_not_removed(store: Arc<dyn Store>) {
    let (a, _) = grouped(&*store, 2).await;
    let b = as_consumer(&a, "b");
    let delivered = fetch(&*store, &a, 1).await;
    fetch(&*store, &b, 1).await;
    assert!(!store.remove_consumer(&a).await.expect("the store responds"));
    acknowledge(&*store, &a, delivered).await;
    assert!(store.remove_consumer(&a).await.expect("the store responds"));
    let consumers = group_status(&*store, &a).await.consumers;
    assert_eq!(consumers.iter().map(|one| &one.name).collect::<Vec<_>>(), [&b.consumer]);
    assert!(!store.remove_consumer(&b).await.expect("the store responds"));
    assert_eq!(group_status(&*store, &b).await.pending, 1);
}

async fn describe_returns_correct_counts(store: Arc<dyn Store>) {
    let (a, ids) = grouped(&*store, 100).await;
    let b = as_consumer(&a, "b");
    let idle_group = cursor(&a.stream, "at-the-end", "x");
    store.ensure_group(&a.stream, &idle_group.group, Start::New).await.expect("a group");
    let delivered = fetch(&*store, &a, 30).await;
    assert_eq!(fetch(&*store, &b, 20).await.len(), 20);
    acknowledge(&*store, &a, delivered.into_iter().take(10).collect()).await;

    let status = describe(&*store, &a.stream).await;
    assert_eq!((status.length, status.entries_added), (100, 100));
    assert_eq!((status.first_id, status.last_id), (Some(ids[0]), ids[99]));
    assert_eq!(status.groups.iter().map(|group| group.name.as_str()).collect::<Vec<_>>(), ["at-the-end", "g"]);
    let group = &status.groups[1];
    assert_eq!(group.last_delivered, ids[49]);
    assert_eq!(group.entries_read, Some(50));
    assert_eq!(group.lag, Some(50));
    assert_eq!(group.pending, 40);
    assert_eq!(group.oldest_pending, Some(ids[10]));
    let consumers: Vec<_> = group.consumers.iter().map(|one| (one.name.as_str(), one.pending)).collect();
    assert_eq!(consumers, [("a", 20), ("b", 20)]);
    assert!(group.consumers.iter().all(|one| one.idle < BOUND));
    let at_the_end = &status.groups[0];
    assert_eq!((at_the_end.lag, at_the_end.pending, at_the_end.oldest_pending), (Some(0), 0, None));
    assert_eq!(at_the_end.last_delivered, ids[99]);

    fill(&*store, &a.stream, 7).await;
    let status = describe(&*store, &a.stream).await;
    assert_eq!(status.groups[0].lag, Some(7));
    assert_eq!(status.groups[1].lag, Some(57));
    assert_eq!((status.length, status.entries_added), (107, 107));
}

async fn epoch_is_stable_and_creates_no_stream(store: Arc<dyn Store>) {
    let (one, other) = (unique_stream(), unique_stream());
    let epoch = store.epoch(&one).await.expect("an epoch");
    assert_eq!(store.describe(&one).await.expect("described"), None);
    fill(&*store, &one, 100).await;
    assert_eq!(store.epoch(&one).await.expect("an epoch"), epoch);
    store.trim(&one, Trim::ToLength(0)).await.expect("trimmed");
    fill(&*store, &one, 1).await;
    let epochs: BTreeSet<String> = [
        store.epoch(&one).await.expect("an epoch").to_string(),
        store.epoch(&one).await.expect("an epoch").to_string(),
        epoch.to_string(),
    ]
    .into();
    assert_eq!(epochs.len(), 1, "{epochs:?}");
    assert_ne!(store.epoch(&other).await.expect("an epoch"), epoch);
}

async fn check_describes_the_store(store: Arc<dyn Store>) {
    let status = store.check().await.expect("a store that works");
    assert!(!status.description.is_empty());
}

async fn closed_store_is_unavailable(store: Arc<dyn Store>) {
    let (cursor, ids) = grouped(&*store, 3).await;
    store.close().await;
    store.close().await;
    let stream = &cursor.stream;
    let results = [
        store.append(stream, numbered(0..1)).await.map(|_| ()),
        store.range(stream, everything(), 10).await.map(|_| ()),
        store.tail(stream, EntryId::MIN, 10, Duration::ZERO).await.map(|_| ()),
        store.ensure_group(stream, &cursor.group, Start::New).await.map(|_| ()),
        store.fetch(&cursor, 10, Duration::ZERO).await.map(|_| ()),
        store.claim(&cursor, &ids, Duration::ZERO).await.map(|_| ()),
        store.pending(&cursor, false, EntryId::MIN, 10).await.map(|_| ()),
        store.describe(stream).await.map(|_| ()),
        store.check().await.map(|_| ()),
    ];
    for (n, result) in results.into_iter().enumerate() {
        let error = result.expect_err("the store is closed");
        assert_eq!(error.kind(), StoreErrorKind::Unavailable, "operation {n}");
    }
}
