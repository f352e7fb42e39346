//! Groups of families whose consumers live outside the daemon: one guard for all members, on every kind of store.

mod partly;

use std::sync::Arc;
use std::time::Duration;

use aurora_bus::delivery::{FamilyGroup, GroupConfig, Patrol};
use aurora_bus::event::{DeadLetter, DeadLetterReason, Delivery, EntryId, Family, StreamName, field};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::store::{
    Cursor, Families, GroupStatus, Metered, Order, Outcome, Range, Settlement, Store, StoreErrorKind,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::stores::{on_stores, own_redis};
use crate::support::until;

const PATIENCE: Duration = Duration::from_secs(30);
const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

/// A family with the group `agents`, which is consumed from outside, and its patrols.
struct Guarded {
    store: Arc<dyn Store>,
    spec: FamilyGroup,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Guarded {
    fn new(store: Arc<dyn Store>, max_deliveries: u32) -> Self {
        let family: Family = format!("{}:{{tenant}}:tasks", unique_stream()).parse().expect("a family");
        let (metrics, readiness) = (Metrics::new(), Readiness::default());
        let families = Families::new([(family.clone(), 100)]);
        let store: Arc<dyn Store> = Arc::new(Metered::new(store, metrics.clone()).with_families(families.clone()));
        let mut config = GroupConfig::new("agents".parse().expect("a valid name"));
        // Longer than anything takes that a consumer does here, also on a slow machine.
        config.claim_idle = Duration::from_secs(3);
        config.max_deliveries = max_deliveries;
        let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn(families.clone().run(store.clone(), families.parts(&readiness), stop.clone()));
        let roster = Arc::clone(families.named(family.name()).expect("declared"));
        let dead_letter = format!("{}:dead_letter", family.name()).parse().expect("a pattern");
        let spec = FamilyGroup { roster, dead_letter, config };
        Self { store, spec, metrics, readiness, stop, tasks }
    }

    /// Starts a patrol, as each daemon has one.
    fn patrol(&mut self, name: &str) {
        let (part, name) = (self.readiness.part(name, None), name.parse().expect("a valid name"));
        let patrol = Patrol::new(self.store.clone(), self.spec.clone(), name, self.metrics.clone(), part);
        self.tasks.spawn(patrol.run(self.stop.clone()));
    }

    async fn publish(&self, key: &str, text: &str) -> StreamName {
        let stream = self.spec.roster.family().member(key).expect("a key");
        self.spec.roster.join(&*self.store, &stream).await.expect("room for one more");
        self.store.append(&stream, vec![new_entry(text)]).await.expect("appended");
        stream
    }

    /// Waits until a consumer outside is given an entry. The group may have still to be made.
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

    /// Ends the patrols; what they are about to do, they finish.
    async fn end(&mut self) {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no panic");
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let text = self.metrics.render();
        let label = format!("stream=\"{}\"", self.spec.roster.family().name());
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

async fn what_is_left_at_any_member_reaches_another_consumer_of_it_once(store: Arc<dyn Store>) {
    let mut guarded = Guarded::new(store, 15);
    guarded.patrol("soc-a-guard");
    guarded.patrol("soc-b-guard");
    let keys: Vec<String> = (0..12).map(|n| format!("t{n}")).collect();
    let mut streams = Vec::new();
    for key in &keys {
        streams.push(guarded.publish(key, key).await);
    }
    for stream in &streams {
        guarded.take(stream, "agent-1").await;
    }
    for (stream, key) in streams.iter().zip(&keys) {
        let again = guarded.take(stream, "agent-2").await;
        assert_eq!(text(&again), key.as_bytes());
        assert_eq!(again.entry.fields.text(field::REPLAY_ATTEMPTS), Some("1"));
        guarded.acknowledge(stream, "agent-2", again).await;
        guarded.is_settled(stream).await;
        assert_eq!(guarded.store.range(stream, EVERYTHING, 10).await.expect("read").len(), 2, "{stream}");
    }
    // Its count comes after the entry does.
    let redelivered = async || {
        let count = guarded.counter("aurora_bus_redelivered_total");
        (count >= keys.len() as u64).then_some(count)
    };
    let redelivered = until("the count", PATIENCE, redelivered).await;
    assert_eq!(redelivered, keys.len() as u64, "each by one of the two");
    guarded.end().await;
    for stream in &streams {
        let group = guarded.group(stream).await.expect("the group exists");
        assert!(group.consumers.iter().all(|consumer| !consumer.name.as_str().ends_with("guard")), "{group:?}");
    }
}

async fn what_nobody_can_handle_is_in_the_dead_letters_of_its_member(store: Arc<dyn Store>) {
    let mut guarded = Guarded::new(store, 2);
    guarded.patrol("soc-a-guard");
    let (acme, globex) = (guarded.publish("acme", "poison").await, guarded.publish("globex", "fine").await);
    let delivery = guarded.take(&globex, "agent-1").await;
    guarded.acknowledge(&globex, "agent-1", delivery).await;
    for consumer in ["agent-1", "agent-2"] {
        assert_eq!(text(&guarded.take(&acme, consumer).await), b"poison");
    }
    let letters = until("dead letter", PATIENCE, async || {
        let letters = guarded.store.range(&acme.default_dead_letter(), EVERYTHING, 10).await.expect("read");
        Some(letters).filter(|letters| !letters.is_empty())
    })
    .await;
    let letter = DeadLetter::from_entry(&letters[0]).expect("a dead letter");
    assert_eq!((letters.len(), letter.reason, letter.attempts), (1, DeadLetterReason::Crashed, 2));
    assert_eq!((&letter.stream, letter.group.as_str()), (&acme, "agents"));
    guarded.is_settled(&acme).await;
    assert_eq!(guarded.store.range(&globex.default_dead_letter(), EVERYTHING, 10).await.expect("read"), []);
    until("the count", PATIENCE, async || (guarded.counter("aurora_bus_dead_letters_total") == 1).then_some(())).await;
    guarded.end().await;
    let consumers = guarded.group(&acme).await.expect("the group exists").consumers;
    assert!(consumers.iter().all(|consumer| consumer.name.as_str() != "soc-a-guard"), "{consumers:?}");
}

async fn members_that_an_earlier_life_knew_are_guarded_from_the_start(store: Arc<dyn Store>) {
    let mut first = Guarded::new(store.clone(), 15);
    first.patrol("soc-a-guard");
    let stream = first.publish("acme", "left").await;
    first.take(&stream, "agent-1").await;
    // Neither is told anything of the other but by the store.
    let mut second = Guarded::new(store, 15);
    second.spec.roster = {
        let families = Families::new([(first.spec.roster.family().clone(), 100)]);
        second.tasks.spawn(families.clone().run(
            second.store.clone(),
            families.parts(&second.readiness),
            second.stop.clone(),
        ));
        Arc::clone(families.named(first.spec.roster.family().name()).expect("declared"))
    };
    first.end().await;
    second.patrol("soc-a-guard");
    assert_eq!(text(&second.take(&stream, "agent-2").await), b"left");
    second.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_a_member_that_was_destroyed_or_deleted_with_it_is_made_again() {
    let (server, store) = own_redis().await;
    let mut guarded = Guarded::new(store, 15);
    guarded.patrol("soc-a-guard");
    let acme = guarded.publish("acme", "one").await;
    let one = guarded.take(&acme, "agent-1").await;
    guarded.acknowledge(&acme, "agent-1", one).await;
    // Each search ends with a note of how far the group has come; the second shows the end of the first.
    server.note_commands();
    let searches = || server.commands(&[acme.as_str(), field::REPLAY_OF]);
    until("two searches", PATIENCE, async || (searches() >= 2).then_some(())).await;
    assert_eq!(server.cli(&["XGROUP", "DESTROY", acme.as_str(), "agents"]), "1");
    guarded.publish("acme", "two").await;
    assert_eq!(text(&guarded.take(&acme, "agent-1").await), b"two", "what was handled is not given again");

    assert_eq!(server.cli(&["DEL", acme.as_str()]), "1");
    until("the group", PATIENCE, async || guarded.group(&acme).await).await;
    server.cli(&["XADD", acme.as_str(), "*", "data", "three"]);
    assert_eq!(text(&guarded.take(&acme, "agent-1").await), b"three");
    guarded.end().await;
}

on_stores! { embedded redis valkey: [
    what_is_left_at_any_member_reaches_another_consumer_of_it_once
    what_nobody_can_handle_is_in_the_dead_letters_of_its_member
    members_that_an_earlier_life_knew_are_guarded_from_the_start
] }
