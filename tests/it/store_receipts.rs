//! The contract of [`Store::settle_by_receipt`], on every backend.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{ConsumerName, EntryId, GroupName};
use aurora_bus::store::{
    Cursor, Outcome, Receipt, ReceiptAction, Redelivery, Settlement, Start, Store, StoreErrorKind,
};

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;
use crate::support::until;

const HOUR: Duration = Duration::from_hours(1);
const BOUND: Duration = Duration::from_mins(1);

/// Returns a stream with `count` entries, all pending on `worker` of the group `agents`, and their receipts.
async fn pulled(store: &dyn Store, count: usize) -> (Cursor, Vec<Receipt>) {
    let worker = cursor(&unique_stream(), "agents", "worker");
    store.ensure_group(&worker.stream, &worker.group, Start::Oldest).await.expect("a group");
    let entries = (0..count).map(|n| new_entry(&n.to_string())).collect();
    store.append(&worker.stream, entries).await.expect("appended");
    let fetched = store.fetch(&worker, count, Duration::ZERO).await.expect("fetched");
    assert_eq!(fetched.len(), count);
    let receipt = |id| Receipt { id, consumer: worker.consumer.clone(), attempt: 1 };
    let receipts = fetched.iter().map(|delivery| receipt(delivery.entry.id)).collect();
    (worker, receipts)
}

fn name(text: &str) -> ConsumerName {
    text.parse().expect("a valid name")
}

fn hold(by: &str, lease: Duration) -> ReceiptAction {
    ReceiptAction::Hold { by: name(by), lease }
}

async fn settle_one(store: &dyn Store, cursor: &Cursor, receipt: &Receipt, action: ReceiptAction) -> bool {
    let good = store.settle_by_receipt(cursor, &[(receipt.clone(), action)]).await.expect("settled");
    assert_eq!(good.len(), 1);
    good[0]
}

async fn pending(store: &dyn Store, cursor: &Cursor) -> Vec<(EntryId, String, u32)> {
    let pending = store.pending(cursor, false, EntryId::MIN, 1000).await.expect("listed");
    pending.into_iter().map(|one| (one.id, one.consumer.to_string(), one.attempts)).collect()
}

async fn valid_receipt_acknowledges_once_and_is_counted(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 3).await;
    let other = cursor(&worker.stream, "agents", "other");
    let acks: Vec<_> = receipts.iter().map(|receipt| (receipt.clone(), ReceiptAction::Acknowledge)).collect();
    assert_eq!(store.settle_by_receipt(&other, &acks[..2]).await.expect("settled"), [true, true]);
    assert_eq!(store.settle_by_receipt(&other, &acks).await.expect("settled"), [false, false, true]);
    let status = store.describe(&worker.stream).await.expect("described").expect("the stream exists");
    assert_eq!(status.groups[0].pending, 0);
    assert_eq!(status.groups[0].account.expect("an account").acknowledged, 3);
}

async fn receipt_of_other_consumer_or_delivery_is_invalid(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let own = &receipts[0];
    let others = [
        Receipt { consumer: name("someone-else"), ..own.clone() },
        Receipt { attempt: 2, ..own.clone() },
        Receipt { id: own.id.next(), ..own.clone() },
    ];
    for other in &others {
        assert!(!settle_one(&*store, &worker, other, ReceiptAction::Acknowledge).await, "{other:?}");
        assert!(!settle_one(&*store, &worker, other, hold("other", HOUR)).await, "{other:?}");
    }
    let claimer = cursor(&worker.stream, "agents", "other");
    let claimed = store.claim(&claimer, &[own.id], Duration::ZERO).await.expect("claimed").deliveries;
    assert_eq!(claimed[0].attempt, 2);
    assert!(!settle_one(&*store, &worker, own, ReceiptAction::Acknowledge).await, "another consumer has claimed it");
    let again = store.claim(&worker, &[own.id], Duration::ZERO).await.expect("claimed").deliveries;
    assert_eq!(again[0].attempt, 3);
    assert!(
        !settle_one(&*store, &worker, own, ReceiptAction::Acknowledge).await,
        "it was claimed back, with a new attempt"
    );
    let last = Receipt { attempt: 3, ..own.clone() };
    assert!(settle_one(&*store, &worker, &last, ReceiptAction::Acknowledge).await);
}

async fn lease_expires_in_time_and_invalidates_its_receipt(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 2).await;
    let (short, long) = (&receipts[0], &receipts[1]);
    assert!(settle_one(&*store, &worker, short, hold("worker", Duration::from_secs(2))).await);
    assert!(settle_one(&*store, &worker, long, hold("worker", HOUR)).await);
    let redeliverer = cursor(&worker.stream, "agents", "redeliverer");
    let redelivery = Redelivery { idle: HOUR, max_deliveries: 15 };
    let early = store.redeliver(&redeliverer, redelivery, EntryId::MIN, 100).await.expect("searched");
    assert_eq!(early.redelivered, 0, "a leased entry is not redelivered");
    until("end of the lease", BOUND, async || {
        let listed = store.pending(&worker, false, short.id, 1).await.expect("listed");
        (listed[0].idle >= worker.claim_idle).then_some(())
    })
    .await;
    assert!(!settle_one(&*store, &worker, short, ReceiptAction::Acknowledge).await, "too late");
    let late = store.redeliver(&redeliverer, redelivery, EntryId::MIN, 100).await.expect("searched");
    assert_eq!(late.redelivered, 1, "it is redelivered after the lease");
    assert!(settle_one(&*store, &worker, long, ReceiptAction::Acknowledge).await);
    assert_eq!(pending(&*store, &worker).await, []);
}

async fn extension_counts_no_attempt_and_may_change_consumer(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let own = &receipts[0];
    let twice = [(own.clone(), hold("worker", HOUR)), (own.clone(), hold("worker", HOUR))];
    assert_eq!(store.settle_by_receipt(&worker, &twice).await.expect("settled"), [true, true]);
    assert_eq!(pending(&*store, &worker).await, [(own.id, "worker".to_owned(), 1)]);
    assert!(settle_one(&*store, &worker, own, hold("other", HOUR)).await);
    assert_eq!(pending(&*store, &worker).await, [(own.id, "other".to_owned(), 1)]);
    assert!(
        !settle_one(&*store, &worker, own, ReceiptAction::Acknowledge).await,
        "it belongs to the other consumer now"
    );
    let others = Receipt { consumer: name("other"), ..own.clone() };
    let both = [(others.clone(), ReceiptAction::Acknowledge), (others, hold("other", HOUR))];
    assert_eq!(store.settle_by_receipt(&worker, &both).await.expect("settled"), [true, false]);
}

async fn lease_is_capped_at_claim_idle(store: Arc<dyn Store>) {
    let (mut worker, receipts) = pulled(&*store, 1).await;
    worker.claim_idle = Duration::from_millis(200);
    assert!(settle_one(&*store, &worker, &receipts[0], hold("worker", HOUR)).await);
    until("end of the lease", BOUND, async || {
        let listed = store.pending(&worker, false, EntryId::MIN, 1).await.expect("listed");
        (listed[0].idle >= worker.claim_idle).then_some(())
    })
    .await;
    assert!(!settle_one(&*store, &worker, &receipts[0], ReceiptAction::Acknowledge).await);
}

async fn removed_entry_can_be_acknowledged_not_extended(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 2).await;
    let ids: Vec<_> = receipts.iter().map(|receipt| receipt.id).collect();
    assert_eq!(store.discard(&worker.stream, &ids).await.expect("discarded"), 2);
    assert!(!settle_one(&*store, &worker, &receipts[0], hold("worker", HOUR)).await);
    assert_eq!(pending(&*store, &worker).await.len(), 2, "a search must find it");
    assert!(settle_one(&*store, &worker, &receipts[1], ReceiptAction::Acknowledge).await);
}

async fn transferred_entry_is_dead_lettered_by_new_holder(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    assert!(settle_one(&*store, &worker, &receipts[0], hold("redeliverer", HOUR)).await);
    let redeliverer = cursor(&worker.stream, "agents", "redeliverer");
    let claimed = store.claim(&redeliverer, &[receipts[0].id], Duration::ZERO).await.expect("claimed").deliveries;
    let to = worker.stream.default_dead_letter();
    let dead_letter = |delivery| Settlement {
        delivery,
        outcome: Outcome::DeadLetter { to: to.clone(), fields: new_entry("record").fields },
    };
    let settlements: Vec<_> = claimed.into_iter().map(dead_letter).collect();
    assert_eq!(store.settle(&redeliverer, &settlements).await.expect("settled").settled, 1);
    assert_eq!(pending(&*store, &worker).await, []);
}

async fn receipts_over_script_limit_return_in_order(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 510).await;
    let action = |(n, receipt): (usize, &Receipt)| {
        let attempt = if n % 3 == 0 { 2 } else { 1 };
        (Receipt { attempt, ..receipt.clone() }, ReceiptAction::Acknowledge)
    };
    let all: Vec<_> = receipts.iter().enumerate().map(action).collect();
    let good = store.settle_by_receipt(&worker, &all).await.expect("settled");
    assert_eq!(good, (0..510).map(|n| n % 3 != 0).collect::<Vec<_>>());
    assert_eq!(pending(&*store, &worker).await.len(), 170);
}

async fn missing_group_is_reported(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let group: GroupName = "absent".parse().expect("a valid name");
    let absent = Cursor { group, ..worker };
    let error = store.settle_by_receipt(&absent, &[(receipts[0].clone(), ReceiptAction::Acknowledge)]).await;
    assert_eq!(error.expect_err("the group is missing").kind(), StoreErrorKind::NoGroup);
}

on_stores! { embedded redis valkey: [
    valid_receipt_acknowledges_once_and_is_counted
    receipt_of_other_consumer_or_delivery_is_invalid
    lease_expires_in_time_and_invalidates_its_receipt
    extension_counts_no_attempt_and_may_change_consumer
    lease_is_capped_at_claim_idle
    removed_entry_can_be_acknowledged_not_extended
    transferred_entry_is_dead_lettered_by_new_holder
    receipts_over_script_limit_return_in_order
    missing_group_is_reported
] }
