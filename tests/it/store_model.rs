//! Random operations on a store and on a small model of it. Both must agree after every step.
//!
//! The model is the contract in a few maps. It knows two values of time: an entry is idle for the claim idle ("aged":
//! re-armed for now, or released), or it is not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{Delivery, Entry, EntryId, Fields, IdempotencyKey, NewEntry, StreamName};
use aurora_bus::store::{
    Account, Balance, Consumption, Cursor, GroupStatus, LostReason, Order, Outcome, Range, Settlement, Start, Store,
    StoreErrorKind, StreamStatus, Trim,
};
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use crate::store_contract::{cursor, unique_stream};

/// The differences between stores.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Traits {
    /// Number of operation sequences to run.
    pub(crate) cases: u32,
    /// Whether the lag is correct after any removal.
    pub(crate) is_lag_exact: bool,
    /// Whether a pending entry without a body can be re-armed, released and extended like any other. If not, it stays
    /// unchanged until a claim reports it as lost.
    pub(crate) rearms_lost: bool,
}

const HOUR: Duration = Duration::from_hours(1);
const GROUPS: [&str; 2] = ["g", "h"];
const CONSUMERS: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Ending {
    Acknowledge,
    Filter,
    RetryNow,
    RetryLater,
    Release,
    DeadLetter,
}

#[derive(Debug, Clone)]
enum Operation {
    Append { sizes: Vec<u16>, key: Option<u8> },
    Ensure { group: usize, start: u8, after: Index },
    Fetch { group: usize, consumer: usize, limit: usize },
    Claim { group: usize, consumer: usize, picks: Vec<Index>, aged_only: bool },
    Reclaim { group: usize, consumer: usize, limit: usize, aged_only: bool },
    Settle { group: usize, consumer: usize, endings: Vec<(Index, Ending)> },
    Extend { group: usize, consumer: usize, picks: Vec<Index> },
    TrimTo { length: u64 },
    TrimBefore { pick: Index },
    Discard { picks: Vec<Index> },
    RemoveConsumer { group: usize, consumer: usize },
    Range { from: Index, to: Index, backward: bool, limit: usize },
    Tail { after: Index, limit: usize },
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    let (group, consumer) = (0..GROUPS.len(), 0..CONSUMERS.len());
    let ending = prop_oneof![
        4 => Just(Ending::Acknowledge),
        1 => Just(Ending::Filter),
        1 => Just(Ending::RetryNow),
        1 => Just(Ending::RetryLater),
        1 => Just(Ending::Release),
        1 => Just(Ending::DeadLetter),
    ];
    let picks = vec(any::<Index>(), 0..20);
    prop_oneof![
        6 => (vec(0..600_u16, 1..90), proptest::option::weighted(0.3, 0..6_u8))
            .prop_map(|(sizes, key)| Operation::Append { sizes, key }),
        2 => (vec(0..100_u16, 1..3), Just(None)).prop_map(|(sizes, key)| Operation::Append { sizes, key }),
        2 => (group.clone(), 0..3_u8, any::<Index>())
            .prop_map(|(group, start, after)| Operation::Ensure { group, start, after }),
        6 => (group.clone(), consumer.clone(), 1..120_usize)
            .prop_map(|(group, consumer, limit)| Operation::Fetch { group, consumer, limit }),
        3 => (group.clone(), consumer.clone(), vec(any::<Index>(), 1..20), any::<bool>())
            .prop_map(|(group, consumer, picks, aged_only)| Operation::Claim { group, consumer, picks, aged_only }),
        2 => (group.clone(), consumer.clone(), 1..60_usize, any::<bool>())
            .prop_map(|(group, consumer, limit, aged_only)| Operation::Reclaim { group, consumer, limit, aged_only }),
        6 => (group.clone(), consumer.clone(), vec((any::<Index>(), ending), 1..60))
            .prop_map(|(group, consumer, endings)| Operation::Settle { group, consumer, endings }),
        1 => (group.clone(), consumer.clone(), picks.clone())
            .prop_map(|(group, consumer, picks)| Operation::Extend { group, consumer, picks }),
        2 => (0..200_u64).prop_map(|length| Operation::TrimTo { length }),
        1 => any::<Index>().prop_map(|pick| Operation::TrimBefore { pick }),
        2 => picks.prop_map(|picks| Operation::Discard { picks }),
        1 => (group, consumer).prop_map(|(group, consumer)| Operation::RemoveConsumer { group, consumer }),
        2 => (any::<Index>(), any::<Index>(), any::<bool>(), 0..200_usize)
            .prop_map(|(from, to, backward, limit)| Operation::Range { from, to, backward, limit }),
        2 => (any::<Index>(), 1..200_usize).prop_map(|(after, limit)| Operation::Tail { after, limit }),
        1 => Just(Operation::Reopen),
    ]
}

#[derive(Debug)]
struct PendingEntry {
    consumer: usize,
    attempts: u32,
    is_aged: bool,
}

#[derive(Debug, Default)]
struct Group {
    cursor: EntryId,
    pending: BTreeMap<EntryId, PendingEntry>,
    consumers: BTreeSet<usize>,
    /// Whether `entries_read` and the lag start from a known position on every store.
    read: u64,
    /// The settled entries by outcome. The store decides the start of the account.
    account: Account,
}

#[derive(Debug)]
struct Model {
    stream: StreamName,
    dead: StreamName,
    entries: BTreeMap<EntryId, Fields>,
    /// Every id assigned so far.
    ids: Vec<EntryId>,
    keys: BTreeMap<u8, EntryId>,
    groups: BTreeMap<usize, Group>,
    dead_letters: Vec<Fields>,
    is_made: bool,
    counter: u64,
}

impl Model {
    fn cursor(&self, group: usize, consumer: usize) -> Cursor {
        Cursor { claim_idle: HOUR, ..cursor(&self.stream, GROUPS[group], CONSUMERS[consumer]) }
    }

    /// Returns an id that was assigned, or the minimum, which no entry has.
    fn pick(&self, pick: Index) -> EntryId {
        if self.ids.is_empty() { EntryId::MIN } else { self.ids[pick.index(self.ids.len())] }
    }

    /// Returns the first id that a group has not settled.
    fn floor(&self) -> EntryId {
        let floor = |group: &Group| {
            group.pending.first_key_value().map_or(EntryId::MAX, |(id, _)| *id).min(group.cursor.next())
        };
        self.groups.values().map(floor).min().unwrap_or(EntryId::MAX)
    }

    /// Returns entries with content and number that are new to the stream.
    fn new_entries(&mut self, sizes: &[u16], key: Option<u8>) -> Vec<NewEntry> {
        let window = HOUR;
        let entries = sizes.iter().enumerate().map(|(place, size)| {
            self.counter += 1;
            let mut fields = Fields::default();
            fields.push("id", format!("e{}", self.counter));
            fields.push("data", Bytes::from(vec![self.counter.to_le_bytes()[0]; usize::from(*size)]));
            let key = key.filter(|_| place == 0).map(|key| IdempotencyKey { key: Bytes::from(vec![key]), window });
            NewEntry { fields, idempotency: key }
        });
        entries.collect()
    }

    fn check_entries<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) {
        for entry in entries {
            assert_eq!(self.entries.get(&entry.id), Some(&entry.fields), "entry {}", entry.id);
        }
    }
}

/// Runs random sequences of operations on a store. `reopen` closes and opens an embedded store; for other stores it may
/// return the same one.
pub(crate) fn check<R>(runtime: &tokio::runtime::Runtime, store: Arc<dyn Store>, reopen: R, traits: Traits)
where
    R: AsyncFn(Arc<dyn Store>) -> Arc<dyn Store>,
{
    let store = std::cell::RefCell::new(store);
    let config = Config { cases: traits.cases, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&vec(operation(), 1..60), |operations| {
        runtime.block_on(async {
            let stream = unique_stream();
            let mut model = Model {
                dead: format!("{stream}:dead").parse().expect("a valid name"),
                stream,
                entries: BTreeMap::new(),
                ids: Vec::new(),
                keys: BTreeMap::new(),
                groups: BTreeMap::new(),
                dead_letters: Vec::new(),
                is_made: false,
                counter: 0,
            };
            for operation in operations {
                let current = store.borrow().clone();
                if matches!(operation, Operation::Reopen) {
                    let reopened = reopen(current).await;
                    compare(&*reopened, &model, traits).await;
                    store.replace(reopened);
                } else {
                    step(&*current, &mut model, operation, traits).await;
                }
            }
            let current = store.borrow().clone();
            compare(&*current, &model, traits).await;
        });
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

async fn step(store: &dyn Store, model: &mut Model, operation: Operation, traits: Traits) {
    match operation {
        Operation::Append { sizes, key } => append(store, model, &sizes, key).await,
        Operation::Ensure { group, start, after } => {
            let (start, from) = match start {
                0 => (Start::Oldest, EntryId::MIN),
                1 => (Start::New, model.ids.last().copied().unwrap_or(EntryId::MIN)),
                _ => (Start::After(model.pick(after)), model.pick(after)),
            };
            let name = model.cursor(group, 0).group;
            let made = store.ensure_group(&model.stream, &name, start).await.expect("ensured");
            assert_eq!(made, !model.groups.contains_key(&group));
            model.groups.entry(group).or_insert_with(|| Group { cursor: from, ..Group::default() });
            model.is_made = true;
        }
        Operation::Fetch { group, consumer, limit } => fetch(store, model, group, consumer, limit).await,
        Operation::Claim { group, consumer, picks, aged_only } => {
            let ids: Vec<EntryId> = picks.into_iter().map(|pick| model.pick(pick)).collect();
            let idle = if aged_only { HOUR } else { Duration::ZERO };
            let result = store.claim(&model.cursor(group, consumer), &ids, idle).await;
            let Some(claimed) = unless_no_group(model, group, result) else { return };
            let asked: BTreeSet<EntryId> = ids.into_iter().collect();
            apply_claim(model, group, consumer, &claimed.deliveries, &claimed.lost, &asked, aged_only);
        }
        Operation::Reclaim { group, consumer, limit, aged_only } => {
            let idle = if aged_only { HOUR } else { Duration::ZERO };
            let (mut from, mut deliveries, mut lost) = (EntryId::MIN, Vec::new(), Vec::new());
            let asked = model.groups.get(&group).map(|group| group.pending.keys().copied().collect());
            loop {
                let result = store.reclaim(&model.cursor(group, consumer), idle, from, limit).await;
                let Some(reclaimed) = unless_no_group(model, group, result) else { return };
                assert!(reclaimed.claimed.deliveries.len() <= limit);
                deliveries.extend(reclaimed.claimed.deliveries);
                lost.extend(reclaimed.claimed.lost);
                if reclaimed.next == EntryId::MIN {
                    break;
                }
                assert!(reclaimed.next > from, "the search goes forward");
                from = reclaimed.next;
            }
            let asked: BTreeSet<EntryId> = asked.expect("the group exists");
            apply_claim(model, group, consumer, &deliveries, &lost, &asked, aged_only);
        }
        Operation::Settle { group, consumer, endings } => settle(store, model, group, consumer, endings, traits).await,
        Operation::Extend { group, consumer, picks } => {
            if !model.groups.contains_key(&group) {
                return;
            }
            let ids: BTreeSet<EntryId> = picks.into_iter().map(|pick| model.pick(pick)).collect();
            let ids: Vec<EntryId> = ids.into_iter().collect();
            let mut foreign = store.extend(&model.cursor(group, consumer), &ids).await.expect("extended");
            foreign.sort_unstable();
            let group = model.groups.get_mut(&group).expect("checked above");
            let (mine, others): (Vec<EntryId>, Vec<EntryId>) =
                ids.into_iter().partition(|id| group.pending.get(id).is_some_and(|held| held.consumer == consumer));
            assert_eq!(foreign, others);
            for id in mine.into_iter().filter(|id| traits.rearms_lost || model.entries.contains_key(id)) {
                group.pending.get_mut(&id).expect("it is pending").is_aged = false;
            }
        }
        Operation::TrimTo { length } => trim(store, model, Trim::ToLength(length)).await,
        Operation::TrimBefore { pick } => trim(store, model, Trim::Before(model.pick(pick))).await,
        Operation::Discard { picks } => {
            let ids: BTreeSet<EntryId> = picks.into_iter().map(|pick| model.pick(pick)).collect();
            let asked: Vec<EntryId> = ids.iter().copied().collect();
            let before = model.entries.len();
            for group in model.groups.values_mut() {
                let undelivered = model.entries.range(group.cursor.next()..).filter(|(id, _)| ids.contains(id));
                *group.account.lost_mut(LostReason::TrimmedUndelivered) += undelivered.count() as u64;
            }
            model.entries.retain(|id, _| !ids.contains(id));
            let removed = store.discard(&model.stream, &asked).await.expect("discarded");
            assert_eq!(removed, (before - model.entries.len()) as u64);
        }
        Operation::RemoveConsumer { group, consumer } => {
            let cursor = model.cursor(group, consumer);
            let Some(group) = model.groups.get_mut(&group).filter(|group| group.consumers.contains(&consumer)) else {
                return;
            };
            let is_free = group.pending.values().all(|held| held.consumer != consumer);
            assert_eq!(store.remove_consumer(&cursor).await.expect("the store responds"), is_free);
            if is_free {
                group.consumers.remove(&consumer);
            }
        }
        Operation::Range { from, to, backward, limit } => {
            let (from, to) = (model.pick(from), model.pick(to));
            let order = if backward { Order::Backward } else { Order::Forward };
            let range = Range { from, to, order };
            let entries = store.range(&model.stream, range, limit).await.expect("read");
            let mut expected: Vec<EntryId> =
                model.entries.keys().copied().filter(|id| (from..=to).contains(id)).collect();
            if backward {
                expected.reverse();
            }
            expected.truncate(limit);
            assert_same(&entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), &expected);
            model.check_entries(&entries);
        }
        Operation::Tail { after, limit } => {
            let after = model.pick(after);
            let entries = store.tail(&model.stream, after, limit, Duration::ZERO).await.expect("read");
            let expected: Vec<EntryId> = model.entries.range(after.next()..).map(|(id, _)| *id).take(limit).collect();
            assert_same(&entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), &expected);
            model.check_entries(&entries);
        }
        Operation::Reopen => {}
    }
}

/// Returns the result, or `None` if the group does not exist and the store reports that.
fn unless_no_group<T>(model: &Model, group: usize, result: Result<T, aurora_bus::store::StoreError>) -> Option<T> {
    if model.groups.contains_key(&group) {
        return Some(result.expect("the group exists"));
    }
    assert_eq!(result.map(|_| ()).expect_err("the group does not exist").kind(), StoreErrorKind::NoGroup);
    None
}

async fn append(store: &dyn Store, model: &mut Model, sizes: &[u16], key: Option<u8>) {
    let entries = model.new_entries(sizes, key);
    let appended = store.append(&model.stream, entries.clone()).await.expect("appended");
    assert_eq!(appended.len(), entries.len());
    model.is_made = true;
    for (entry, appended) in entries.into_iter().zip(appended) {
        let key = entry.idempotency.as_ref().map(|key| key.key[0]);
        let first = key.and_then(|key| model.keys.get(&key));
        assert_eq!(appended.duplicate, first.is_some());
        if let Some(first) = first {
            assert_eq!(appended.id, *first);
            continue;
        }
        assert!(model.ids.last().is_none_or(|last| appended.id > *last), "ids grow");
        assert_eq!(Some(&appended.event_id), entry.fields.get("id"));
        model.ids.push(appended.id);
        model.keys.extend(key.map(|key| (key, appended.id)));
        model.entries.insert(appended.id, entry.fields);
    }
}

async fn fetch(store: &dyn Store, model: &mut Model, group: usize, consumer: usize, limit: usize) {
    let result = store.fetch(&model.cursor(group, consumer), limit, Duration::ZERO).await;
    let Some(delivered) = unless_no_group(model, group, result) else { return };
    model.check_entries(delivered.iter().map(|delivery| &delivery.entry));
    let group = model.groups.get_mut(&group).expect("checked above");
    // Some stores list a consumer only after its first delivery.
    if !delivered.is_empty() {
        group.consumers.insert(consumer);
    }
    let expected: Vec<EntryId> =
        model.entries.range(group.cursor.next()..).map(|(id, _)| *id).take(delivered.len().max(1)).collect();
    assert_same(&delivered.iter().map(|delivery| delivery.entry.id).collect::<Vec<_>>(), &expected);
    assert!(delivered.len() <= limit);
    for delivery in delivered {
        assert_eq!(delivery.attempt, 1);
        group.cursor = delivery.entry.id;
        group.read += 1;
        group.pending.insert(delivery.entry.id, PendingEntry { consumer, attempts: 1, is_aged: false });
    }
}

/// Checks the result of a claim of `asked`, and applies it to the model.
fn apply_claim(
    model: &mut Model,
    group: usize,
    consumer: usize,
    deliveries: &[Delivery],
    lost: &[EntryId],
    asked: &BTreeSet<EntryId>,
    aged_only: bool,
) {
    model.check_entries(deliveries.iter().map(|delivery| &delivery.entry));
    let entries = &model.entries;
    let group = model.groups.get_mut(&group).expect("checked by the caller");
    let mut expected = BTreeMap::new();
    let mut must_be_lost = BTreeSet::new();
    for (id, held) in group.pending.iter().filter(|(id, _)| asked.contains(id)) {
        let is_due = held.is_aged || !aged_only;
        match entries.contains_key(id) {
            true if is_due => {
                expected.insert(*id, held.attempts + 1);
            }
            false if is_due => {
                must_be_lost.insert(*id);
            }
            _ => {}
        }
    }
    let got: BTreeMap<EntryId, u32> = deliveries.iter().map(|delivery| (delivery.entry.id, delivery.attempt)).collect();
    assert_eq!(got.len(), deliveries.len(), "an entry was claimed twice");
    assert_eq!(got, expected);
    // A store may find a loss before the entry is idle.
    let found: BTreeSet<EntryId> = lost.iter().copied().collect();
    assert_eq!(found.len(), lost.len(), "a loss was reported twice");
    assert!(found.is_superset(&must_be_lost), "{must_be_lost:?} are lost, reported were {found:?}");
    for id in &found {
        assert!(!entries.contains_key(id) && asked.contains(id), "{id} is not lost");
        assert!(group.pending.remove(id).is_some(), "{id} was not pending");
        *group.account.lost_mut(LostReason::TrimmedPending) += 1;
    }
    for (id, attempts) in expected {
        group.pending.insert(id, PendingEntry { consumer, attempts, is_aged: false });
        group.consumers.insert(consumer);
    }
}

async fn settle(
    store: &dyn Store,
    model: &mut Model,
    group: usize,
    consumer: usize,
    endings: Vec<(Index, Ending)>,
    traits: Traits,
) {
    let cursor = model.cursor(group, consumer);
    let (dead, mut settlements, mut expected) = (model.dead.clone(), Vec::new(), (0, 0));
    let picked: Vec<(EntryId, Ending)> = endings.into_iter().map(|(pick, ending)| (model.pick(pick), ending)).collect();
    let Some(state) = model.groups.get_mut(&group) else { return };
    let mut seen = BTreeSet::new();
    for (id, ending) in picked {
        let held = state.pending.get(&id);
        let is_owned = held.is_some_and(|held| held.consumer == consumer);
        // A young delivery may be acknowledged without a check of its owner.
        let is_vague = held.is_some() && !is_owned && matches!(ending, Ending::Acknowledge | Ending::Filter);
        // A claimable entry already counts as released. The store cannot know whether this is the same release.
        let is_repeated = held.is_some_and(|held| held.is_aged) && matches!(ending, Ending::Release);
        if !seen.insert(id) || is_vague || is_repeated {
            continue;
        }
        let attempt = held.map_or(1, |held| held.attempts);
        let fields = model.entries.get(&id).cloned().unwrap_or_default();
        let delivery = Delivery { entry: Entry { id, fields: fields.clone() }, attempt, delivered_at: Instant::now() };
        if is_owned {
            expected.0 += 1;
        } else {
            expected.1 += 1;
        }
        let outcome = match ending {
            Ending::Acknowledge => Outcome::Acknowledge,
            Ending::Filter => Outcome::Filter,
            Ending::RetryNow => Outcome::Retry(Duration::ZERO),
            Ending::RetryLater => Outcome::Retry(HOUR * 2),
            Ending::Release => Outcome::Release,
            Ending::DeadLetter => {
                let mut dead_letter = fields;
                dead_letter.push("dead.id", id.to_string());
                Outcome::DeadLetter { to: dead.clone(), fields: dead_letter }
            }
        };
        if is_owned {
            let held = state.pending.get_mut(&id).expect("owned");
            let is_frozen = !traits.rearms_lost && !model.entries.contains_key(&id);
            match &outcome {
                Outcome::Retry(_) | Outcome::Release if is_frozen => {}
                Outcome::Retry(due) => held.is_aged = due.is_zero(),
                Outcome::Release => {
                    // An entry that is due already may be released twice, as a repetition of one settlement.
                    held.attempts = held.attempts.saturating_sub(u32::from(!held.is_aged));
                    held.is_aged = true;
                }
                Outcome::Acknowledge => {
                    state.pending.remove(&id);
                    state.account.acknowledged += 1;
                }
                Outcome::Filter => {
                    state.pending.remove(&id);
                    state.account.filtered += 1;
                }
                Outcome::DeadLetter { fields, .. } => {
                    state.pending.remove(&id);
                    state.account.dead += 1;
                    model.dead_letters.push(fields.clone());
                }
            }
        }
        settlements.push(Settlement { delivery, outcome });
    }
    let settled = store.settle(&cursor, &settlements).await.expect("settled");
    assert_eq!((settled.settled, settled.not_owned), expected);
}

async fn trim(store: &dyn Store, model: &mut Model, trim: Trim) {
    let removed = store.trim(&model.stream, trim).await.expect("trimmed");
    let removed = usize::try_from(removed).expect("a small number");
    assert!(removed <= model.entries.len());
    let kept = model.entries.len() - removed;
    let floor = model.floor();
    let needed = model.entries.range(floor..).count();
    let asked = match trim {
        Trim::ToLength(length) => usize::try_from(length).expect("a small number").min(model.entries.len()),
        Trim::Before(id) => model.entries.range(id..).count(),
    };
    let must_stay = asked.max(needed);
    assert!(kept >= must_stay, "{kept} entries are left, but {must_stay} must stay");
    assert!(kept <= must_stay + 100, "{kept} entries are left of which only {must_stay} must stay");
    let gone: Vec<EntryId> = model.entries.keys().copied().take(removed).collect();
    for id in gone {
        model.entries.remove(&id);
    }
}

/// Compares two lists and shows only their first difference.
#[track_caller]
fn assert_same<T: PartialEq + std::fmt::Debug>(got: &[T], expected: &[T]) {
    let place = got.iter().zip(expected).take_while(|(got, expected)| got == expected).count();
    assert_eq!(got.get(place), expected.get(place), "at {place} of {} and {}", got.len(), expected.len());
}

/// Compares the account of a group with the model, and checks that it adds up.
fn compare_accounts(status: &StreamStatus, actual: &GroupStatus, group: &Group, traits: Traits) {
    let mut account = actual.account.unwrap_or_default();
    let undelivered = *account.lost_mut(LostReason::TrimmedUndelivered);
    if !traits.is_lag_exact {
        // Losses are counted only when a search finds them.
        *account.lost_mut(LostReason::TrimmedUndelivered) = group.account.lost(LostReason::TrimmedUndelivered);
    }
    assert_eq!(account, Account { base: account.base, ..group.account });
    if traits.is_lag_exact {
        assert_eq!(Balance::of(status, actual, Consumption::Inside).difference, Some(0), "{actual:?}");
        assert_eq!(undelivered, group.account.lost(LostReason::TrimmedUndelivered));
    }
}

/// Compares the whole visible state of the stream.
async fn compare(store: &dyn Store, model: &Model, traits: Traits) {
    let everything = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    let entries = store.range(&model.stream, everything, 100_000).await.expect("read");
    let ids: Vec<EntryId> = entries.iter().map(|entry| entry.id).collect();
    assert_same(&ids, &model.entries.keys().copied().collect::<Vec<_>>());
    model.check_entries(&entries);
    let dead_letters = store.range(&model.dead, everything, 100_000).await.expect("read");
    assert_eq!(dead_letters.into_iter().map(|dead_letter| dead_letter.fields).collect::<Vec<_>>(), model.dead_letters);

    let status = store.describe(&model.stream).await.expect("described");
    assert_eq!(status.is_some(), model.is_made);
    let Some(status) = status else { return };
    assert_eq!(status.length, model.entries.len() as u64);
    assert_eq!(status.first_id, model.entries.keys().next().copied());
    assert_eq!(status.last_id, model.ids.last().copied().unwrap_or(EntryId::MIN));
    assert_eq!(status.entries_added, model.ids.len() as u64);
    assert_eq!(status.groups.len(), model.groups.len());
    for (group, actual) in model.groups.iter().zip(&status.groups) {
        let (number, group) = group;
        compare_accounts(&status, actual, group, traits);
        assert_eq!(actual.name.as_str(), GROUPS[*number]);
        assert_eq!(actual.last_delivered, group.cursor);
        assert_eq!(actual.pending, group.pending.len() as u64);
        assert_eq!(actual.oldest_pending, group.pending.keys().next().copied());
        let lag = model.entries.range(group.cursor.next()..).count() as u64;
        if traits.is_lag_exact {
            assert_eq!(actual.lag, Some(lag), "the lag of {}", actual.name);
            assert_eq!(actual.entries_read, Some(group.read));
        }
        for consumer in &actual.consumers {
            let number = CONSUMERS.iter().position(|name| *name == consumer.name.as_str()).expect("one of ours");
            let held = group.pending.values().filter(|held| held.consumer == number).count();
            assert_eq!(consumer.pending, held as u64, "pending on {}", consumer.name);
        }
        let cursor = model.cursor(*number, 0);
        let pending = store.pending(&cursor, false, EntryId::MIN, 100_000).await.expect("listed");
        let actual: Vec<_> = pending
            .iter()
            .map(|one| (one.id, one.consumer.as_str().to_owned(), one.attempts, one.idle >= HOUR))
            .collect();
        let expected: Vec<_> = group
            .pending
            .iter()
            .map(|(id, held)| (*id, CONSUMERS[held.consumer].to_owned(), held.attempts, held.is_aged))
            .collect();
        assert_same(&actual, &expected);
    }
}
