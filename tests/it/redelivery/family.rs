//! Groups of families with external consumers: one redeliverer for all members, on every kind of store.

mod denied;

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::delivery::{FamilyGroup, GroupConfig, Redeliverer};
use aurora_bus::event::{DeadLetter, DeadLetterReason, Delivery, EntryId, Family, StreamName, field};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{
    Cursor, Families, GroupStatus, MeteredStore, Order, Outcome, Range, Settlement, Store, StoreErrorKind,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::{on_stores, own_redis};
use crate::support::until;

const PATIENCE: Duration = Duration::from_secs(30);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// A family with the group `agents` for external consumers, and its redeliverers.
struct FamilySetup {
    store: Arc<dyn Store>,
    spec: FamilyGroup,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl FamilySetup {
    fn new(store: Arc<dyn Store>, max_deliveries: u32) -> Self {
        let family: Family = format!("{}:{{tenant}}:tasks", unique_stream()).parse().expect("a family");
        let (metrics, readiness) = (Metrics::new(), Readiness::default());
        let families = Families::new([(family.clone(), 100)]);
        let store: Arc<dyn Store> = Arc::new(MeteredStore::new(store, metrics.clone()).with_families(families.clone()));
        let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
        // Longer than each step of a consumer here, also on a slow machine.
        config.claim_idle = Duration::from_secs(3);
        config.max_deliveries = max_deliveries;
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn(families.clone().run(store.clone(), families.parts(&readiness), stop.clone()));
        let family_members = Arc::clone(families.named(family.name()).expect("declared"));
        let dead_letter = format!("{}:dead_letter", family.name()).parse().expect("a pattern");
        let spec = FamilyGroup { family_members, dead_letter, config };
        Self { store, spec, metrics, readiness, stop, tasks }
    }

    /// Starts the redeliverer of one daemon.
    fn start_redeliverer(&mut self, name: &str) {
        let (part, name) = (self.readiness.part(name, None), name.parse().expect("a valid name"));
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        let redeliverer = Redeliverer::of_family(store, self.spec.clone(), name, metrics, part);
        self.tasks.spawn(redeliverer.run(self.stop.clone()));
    }

    async fn publish(&self, key: &str, text: &str) -> StreamName {
        let stream = self.spec.family_members.family().member(key).expect("a key");
        self.spec.family_members.join(&*self.store, &stream).await.expect("room for a member");
        self.store.append(&stream, vec![new_entry(text)]).await.expect("appended");
        stream
    }

    /// Waits until an external consumer receives an entry. The group may not exist yet.
    async fn take(&self, stream: &StreamName, consumer: &str) -> Delivery {
        let cursor = consumer_of(stream, consumer);
        until("an entry", PATIENCE, async || match self.store.fetch(&cursor, 1, Duration::ZERO).await {
            Ok(fetched) => fetched.into_iter().next(),
            Err(error) if error.kind() == StoreErrorKind::NoGroup => None,
            Err(error) => panic!("{error}"),
        })
        .await
    }

    async fn acknowledge(&self, stream: &StreamName, consumer: &str, delivery: Delivery) {
        let settlement = Settlement { delivery, outcome: Outcome::Acknowledge };
        let settled = self.store.settle(&consumer_of(stream, consumer), &[settlement]).await.expect("settled");
        assert_eq!(settled.settled, 1);
    }

    async fn group(&self, stream: &StreamName) -> Option<GroupStatus> {
        self.store.describe(stream).await.expect("described")?.groups.into_iter().next()
    }

    async fn is_settled(&self, stream: &StreamName) {
        until("end of pending entries", PATIENCE, async || {
            let group = self.group(stream).await.expect("the group exists");
            (group.pending == 0 && group.lag == Some(0)).then_some(())
        })
        .await;
    }

    /// Stops the redeliverers, which finish the check that is under way.
    async fn end(&mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic");
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.metrics.render();
        let label = format!("stream=\"{}\"", self.spec.family_members.family().name());
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(&label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }
}

fn consumer_of(stream: &StreamName, consumer: &str) -> Cursor {
    cursor(stream, "agents", consumer)
}

fn text(delivery: &Delivery) -> &[u8] {
    delivery.entry.data().expect("a payload")
}

async fn abandoned_entry_of_a_member_reaches_another_consumer_once(store: Arc<dyn Store>) {
    let mut setup = FamilySetup::new(store, 15);
    setup.start_redeliverer("soc-a-guard");
    setup.start_redeliverer("soc-b-guard");
    let keys: Vec<String> = (0..12).map(|n| format!("t{n}")).collect();
    let mut streams = Vec::new();
    for key in &keys {
        streams.push(setup.publish(key, key).await);
    }
    for stream in &streams {
        setup.take(stream, "agent-1").await;
    }
    for (stream, key) in streams.iter().zip(&keys) {
        let again = setup.take(stream, "agent-2").await;
        assert_eq!(text(&again), key.as_bytes());
        assert_eq!(again.entry.fields.text(field::REPLAY_ATTEMPTS), Some("1"));
        setup.acknowledge(stream, "agent-2", again).await;
        setup.is_settled(stream).await;
        assert_eq!(setup.store.range(stream, EVERYTHING, 10).await.expect("read").len(), 2, "{stream}");
    }
    // The counter follows the entry.
    let redelivered = async || {
        let count = setup.counter("aurora_bus_redelivered_total");
        (count >= keys.len() as u64).then_some(count)
    };
    let redelivered = until("the count", PATIENCE, redelivered).await;
    assert_eq!(redelivered, keys.len() as u64, "each by one of the two");
    setup.end().await;
    for stream in &streams {
        let group = setup.group(stream).await.expect("the group exists");
        assert!(group.consumers.iter().all(|consumer| !consumer.name.as_str().ends_with("guard")), "{group:?}");
    }
}

async fn exhausted_entry_is_in_the_dead_letters_of_its_member(store: Arc<dyn Store>) {
    let mut setup = FamilySetup::new(store, 2);
    setup.start_redeliverer("soc-a-guard");
    let (acme, globex) = (setup.publish("acme", "poison").await, setup.publish("globex", "fine").await);
    let delivery = setup.take(&globex, "agent-1").await;
    setup.acknowledge(&globex, "agent-1", delivery).await;
    for consumer in ["agent-1", "agent-2"] {
        assert_eq!(text(&setup.take(&acme, consumer).await), b"poison");
    }
    let letters = until("dead letter", PATIENCE, async || {
        let letters = setup.store.range(&acme.default_dead_letter(), EVERYTHING, 10).await.expect("read");
        Some(letters).filter(|letters| !letters.is_empty())
    })
    .await;
    let letter = DeadLetter::from_entry(&letters[0]).expect("a dead letter");
    assert_eq!((letters.len(), letter.reason, letter.attempts), (1, DeadLetterReason::Crashed, 2));
    assert_eq!((&letter.stream, letter.group.as_str()), (&acme, "agents"));
    setup.is_settled(&acme).await;
    assert_eq!(setup.store.range(&globex.default_dead_letter(), EVERYTHING, 10).await.expect("read"), []);
    until("the count", PATIENCE, async || (setup.counter("aurora_bus_dead_letters_total") == 1).then_some(())).await;
    setup.end().await;
    let consumers = setup.group(&acme).await.expect("the group exists").consumers;
    assert!(consumers.iter().all(|consumer| consumer.name.as_str() != "soc-a-guard"), "{consumers:?}");
}

async fn members_of_an_earlier_run_are_checked_from_the_start(store: Arc<dyn Store>) {
    let mut first = FamilySetup::new(store.clone(), 15);
    first.start_redeliverer("soc-a-guard");
    let stream = first.publish("acme", "left").await;
    first.take(&stream, "agent-1").await;
    // The two share nothing but the store.
    let mut second = FamilySetup::new(store, 15);
    second.spec.family_members = {
        let families = Families::new([(first.spec.family_members.family().clone(), 100)]);
        second.tasks.spawn(families.clone().run(
            second.store.clone(),
            families.parts(&second.readiness),
            second.stop.clone(),
        ));
        Arc::clone(families.named(first.spec.family_members.family().name()).expect("declared"))
    };
    first.end().await;
    second.start_redeliverer("soc-a-guard");
    assert_eq!(text(&second.take(&stream, "agent-2").await), b"left");
    second.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_group_of_a_member_is_created_again() {
    let (server, store) = own_redis().await;
    let mut setup = FamilySetup::new(store, 15);
    setup.start_redeliverer("soc-a-guard");
    let acme = setup.publish("acme", "one").await;
    let one = setup.take(&acme, "agent-1").await;
    setup.acknowledge(&acme, "agent-1", one).await;
    // Each search ends with a read of the ack floor; the second search shows that the first one has ended.
    server.note_commands();
    let searches = || server.commands(&[acme.as_str(), field::REPLAY_OF]);
    until("two searches", PATIENCE, async || (searches() >= 2).then_some(())).await;
    assert_eq!(server.cli(&["XGROUP", "DESTROY", acme.as_str(), "agents"]), "1");
    setup.publish("acme", "two").await;
    assert_eq!(text(&setup.take(&acme, "agent-1").await), b"two", "settled entries do not return");

    assert_eq!(server.cli(&["DEL", acme.as_str()]), "1");
    until("the group", PATIENCE, async || setup.group(&acme).await).await;
    server.cli(&["XADD", acme.as_str(), "*", "data", "three"]);
    assert_eq!(text(&setup.take(&acme, "agent-1").await), b"three");
    setup.end().await;
}

on_stores! { embedded redis valkey: [
    abandoned_entry_of_a_member_reaches_another_consumer_once
    exhausted_entry_is_in_the_dead_letters_of_its_member
    members_of_an_earlier_run_are_checked_from_the_start
] }
