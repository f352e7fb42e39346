//! The contract of [`Store::settle_by_receipt`], on every backend.

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::event::{ConsumerName, EntryId, GroupName};
use aurora_bus::store::{Cursor, Outcome, Receipt, Redelivery, ReceiptAction, Settlement, Start, Store, StoreErrorKind};

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::on_stores;
use crate::support::until;

const HOUR: Duration = Duration::from_hours(1);
const PATIENCE: Duration = Duration::from_mins(1);

/// A stream with so many entries, all of them pending on `worker` of the group `agents`, and their receipts.
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

async fn settle_by_receipt(store: &dyn Store, cursor: &Cursor, receipt: &Receipt, redemption: ReceiptAction) -> bool {
    let good = store.settle_by_receipt(cursor, &[(receipt.clone(), redemption)]).await.expect("answered");
    assert_eq!(good.len(), 1);
    good[0]
}

async fn pending(store: &dyn Store, cursor: &Cursor) -> Vec<(EntryId, String, u32)> {
    let pending = store.pending(cursor, false, EntryId::MIN, 1000).await.expect("listed");
    pending.into_iter().map(|one| (one.id, one.consumer.to_string(), one.attempts)).collect()
}

async fn a_good_receipt_acknowledges_once_and_is_counted(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 3).await;
    let anyone = cursor(&worker.stream, "agents", "whoever");
    let acks: Vec<_> = receipts.iter().map(|receipt| (receipt.clone(), ReceiptAction::Acknowledge)).collect();
    assert_eq!(store.settle_by_receipt(&anyone, &acks[..2]).await.expect("answered"), [true, true]);
    assert_eq!(store.settle_by_receipt(&anyone, &acks).await.expect("answered"), [false, false, true]);
    let status = store.describe(&worker.stream).await.expect("described").expect("the stream exists");
    assert_eq!(status.groups[0].pending, 0);
    assert_eq!(status.groups[0].account.expect("an account").acknowledged, 3);
}

async fn a_receipt_of_another_consumer_or_delivery_is_no_good(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let own = &receipts[0];
    let others = [
        Receipt { consumer: name("someone-else"), ..own.clone() },
        Receipt { attempt: 2, ..own.clone() },
        Receipt { id: own.id.next(), ..own.clone() },
    ];
    for other in &others {
        assert!(!redeem(&*store, &worker, other, ReceiptAction::Acknowledge).await, "{other:?}");
        assert!(!redeem(&*store, &worker, other, hold("thief", HOUR)).await, "{other:?}");
    }
    let thief = cursor(&worker.stream, "agents", "thief");
    let claimed = store.claim(&thief, &[own.id], Duration::ZERO).await.expect("claimed").deliveries;
    assert_eq!(claimed[0].attempt, 2);
    assert!(!redeem(&*store, &worker, own, ReceiptAction::Acknowledge).await, "it went to another");
    let again = store.claim(&worker, &[own.id], Duration::ZERO).await.expect("claimed").deliveries;
    assert_eq!(again[0].attempt, 3);
    assert!(!redeem(&*store, &worker, own, ReceiptAction::Acknowledge).await, "it came back, and was delivered anew");
    let last = Receipt { attempt: 3, ..own.clone() };
    assert!(redeem(&*store, &worker, &last, ReceiptAction::Acknowledge).await);
}

async fn a_lease_ends_when_it_should_and_its_receipt_with_it(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 2).await;
    let (short, long) = (&receipts[0], &receipts[1]);
    assert!(redeem(&*store, &worker, short, hold("worker", Duration::from_secs(2))).await);
    assert!(redeem(&*store, &worker, long, hold("worker", HOUR)).await);
    let guard = cursor(&worker.stream, "agents", "guard");
    let redelivery = Redelivery { idle: HOUR, max_deliveries: 15 };
    let early = store.redeliver(&guard, redelivery, EntryId::MIN, 100).await.expect("looked");
    assert_eq!(early.redelivered, 0, "nobody gets what is leased");
    until("end of the lease", PATIENCE, async || {
        let listed = store.pending(&worker, false, short.id, 1).await.expect("listed");
        (listed[0].idle >= worker.claim_idle).then_some(())
    })
    .await;
    assert!(!redeem(&*store, &worker, short, ReceiptAction::Acknowledge).await, "too late");
    let late = store.redeliver(&guard, redelivery, EntryId::MIN, 100).await.expect("looked");
    assert_eq!(late.redelivered, 1, "after it, others do");
    assert!(redeem(&*store, &worker, long, ReceiptAction::Acknowledge).await);
    assert_eq!(pending(&*store, &worker).await, []);
}

async fn holding_on_counts_no_attempt_and_may_change_hands(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let own = &receipts[0];
    let twice = [(own.clone(), hold("worker", HOUR)), (own.clone(), hold("worker", HOUR))];
    assert_eq!(store.settle_by_receipt(&worker, &twice).await.expect("answered"), [true, true]);
    assert_eq!(pending(&*store, &worker).await, [(own.id, "worker".to_owned(), 1)]);
    assert!(redeem(&*store, &worker, own, hold("other", HOUR)).await);
    assert_eq!(pending(&*store, &worker).await, [(own.id, "other".to_owned(), 1)]);
    assert!(!redeem(&*store, &worker, own, ReceiptAction::Acknowledge).await, "it is the other's now");
    let others = Receipt { consumer: name("other"), ..own.clone() };
    let both = [(others.clone(), ReceiptAction::Acknowledge), (others, hold("other", HOUR))];
    assert_eq!(store.settle_by_receipt(&worker, &both).await.expect("answered"), [true, false]);
}

async fn a_lease_is_no_longer_than_the_claim_limit(store: Arc<dyn Store>) {
    let (mut worker, receipts) = pulled(&*store, 1).await;
    worker.claim_idle = Duration::from_millis(200);
    assert!(redeem(&*store, &worker, &receipts[0], hold("worker", HOUR)).await);
    until("end of the lease", PATIENCE, async || {
        let listed = store.pending(&worker, false, EntryId::MIN, 1).await.expect("listed");
        (listed[0].idle >= worker.claim_idle).then_some(())
    })
    .await;
    assert!(!redeem(&*store, &worker, &receipts[0], ReceiptAction::Acknowledge).await);
}

async fn an_entry_whose_body_is_gone_can_be_acknowledged_but_not_held(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 2).await;
    let ids: Vec<_> = receipts.iter().map(|receipt| receipt.id).collect();
    assert_eq!(store.discard(&worker.stream, &ids).await.expect("discarded"), 2);
    assert!(!redeem(&*store, &worker, &receipts[0], hold("worker", HOUR)).await);
    assert_eq!(pending(&*store, &worker).await.len(), 2, "a search is to find it");
    assert!(redeem(&*store, &worker, &receipts[1], ReceiptAction::Acknowledge).await);
}

async fn what_was_given_away_can_be_given_up_by_its_new_holder(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    assert!(redeem(&*store, &worker, &receipts[0], hold("guard", HOUR)).await);
    let guard = cursor(&worker.stream, "agents", "guard");
    let claimed = store.claim(&guard, &[receipts[0].id], Duration::ZERO).await.expect("claimed").deliveries;
    let to = worker.stream.default_dead_letter();
    let bury = |delivery| Settlement {
        delivery,
        outcome: Outcome::DeadLetter { to: to.clone(), fields: new_entry("record").fields },
    };
    let settlements: Vec<_> = claimed.into_iter().map(bury).collect();
    assert_eq!(store.settle(&guard, &settlements).await.expect("settled").settled, 1);
    assert_eq!(pending(&*store, &worker).await, []);
}

async fn more_receipts_than_fit_a_script_are_answered_in_order(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 510).await;
    let redemption = |(n, receipt): (usize, &Receipt)| {
        let attempt = if n % 3 == 0 { 2 } else { 1 };
        (Receipt { attempt, ..receipt.clone() }, ReceiptAction::Acknowledge)
    };
    let all: Vec<_> = receipts.iter().enumerate().map(redemption).collect();
    let good = store.settle_by_receipt(&worker, &all).await.expect("answered");
    assert_eq!(good, (0..510).map(|n| n % 3 != 0).collect::<Vec<_>>());
    assert_eq!(pending(&*store, &worker).await.len(), 170);
}

async fn a_missing_group_is_told(store: Arc<dyn Store>) {
    let (worker, receipts) = pulled(&*store, 1).await;
    let group: GroupName = "absent".parse().expect("a valid name");
    let absent = Cursor { group, ..worker };
    let error = store.settle_by_receipt(&absent, &[(receipts[0].clone(), ReceiptAction::Acknowledge)]).await;
    assert_eq!(error.expect_err("there is none").kind(), StoreErrorKind::NoGroup);
}

on_stores! { embedded redis valkey: [
    a_good_receipt_acknowledges_once_and_is_counted
    a_receipt_of_another_consumer_or_delivery_is_no_good
    a_lease_ends_when_it_should_and_its_receipt_with_it
    holding_on_counts_no_attempt_and_may_change_hands
    a_lease_is_no_longer_than_the_claim_limit
    an_entry_whose_body_is_gone_can_be_acknowledged_but_not_held
    what_was_given_away_can_be_given_up_by_its_new_holder
    more_receipts_than_fit_a_script_are_answered_in_order
    a_missing_group_is_told
] }
