//! Random histories of clients that disconnect and resume, against one invariant: each client sees every entry once
//! and in order. Every entry that it does not see is gone, and was reported in a gap.
//!
//! Two relays share a store. Meanwhile alerts are published, the stream is trimmed, lost and created again, and relays
//! restart. Clients of every kind disconnect after some frames and resume from their last position at either relay.
//! The entries that they saw are compared with the entries published.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aurora_bus::event::EntryId;
use aurora_bus::relay::Config;
use aurora_bus::store::{Store as _, Trim, redis};
use futures_util::{SinkExt as _, StreamExt as _};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{self, TestRunner};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::server::{Server, TEST_TIMEOUT, alerts, publish};
use super::store::FaultyStore;
use crate::support::redis::{Product, RedisServer};

const RELAYS: usize = 2;

#[derive(Debug, Clone)]
enum HistoryStep {
    Publish(u64),
    Trim(u64),
    /// A relay is gone at once, and another one starts with a ring of this many entries.
    Restart(usize, usize),
    /// The stream is lost and start again.
    Lose,
    /// While the relays cannot reach the store, this many entries are published and the stream is trimmed to this
    /// length.
    Outage(u64, u64),
    Pass(u64),
}

fn history_step() -> impl Strategy<Value = HistoryStep> {
    prop_oneof![
        8 => (1_u64..150).prop_map(HistoryStep::Publish),
        3 => (0_u64..80).prop_map(HistoryStep::Trim),
        3 => (0..RELAYS, 1_usize..120).prop_map(|(relay, ring)| HistoryStep::Restart(relay, ring)),
        1 => Just(HistoryStep::Lose),
        1 => (1_u64..150, 0_u64..80).prop_map(|(count, length)| HistoryStep::Outage(count, length)),
        3 => (1_u64..20).prop_map(HistoryStep::Pass),
    ]
}

/// The behaviour of a client.
#[derive(Debug, Clone)]
struct Behaviour {
    kind: Kind,
    filter: TestFilter,
    start: FirstStart,
    /// It disconnects after these numbers of messages, and stays at last.
    patience: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Rich { has_lane: bool },
}

#[derive(Debug, Clone, Copy)]
enum TestFilter {
    Everything,
    Severe,
    OfSource,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FirstStart {
    Earliest,
    Snapshot(usize),
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    let kind = prop_oneof![Just(Kind::Plain), any::<bool>().prop_map(|has_lane| Kind::Rich { has_lane })];
    let filter = prop_oneof![Just(TestFilter::Everything), Just(TestFilter::Severe), Just(TestFilter::OfSource)];
    let start = prop_oneof![Just(FirstStart::Earliest), (1_usize..60).prop_map(FirstStart::Snapshot)];
    (kind, filter, start, vec(1_usize..120, 0..6)).prop_map(|(kind, filter, start, patience)| Behaviour {
        kind,
        filter,
        start,
        patience,
    })
}

fn severity(n: u64) -> &'static str {
    match n {
        _ if n % 29 == 7 => "critical",
        _ if n.is_multiple_of(5) => "high",
        _ => "low",
    }
}

fn source(n: u64) -> &'static str {
    if n.is_multiple_of(3) { "zeek" } else { "falco" }
}

fn alert(n: u64) -> String {
    json!({"n": n, "severity": severity(n), "source": source(n)}).to_string()
}

/// The last alert of a history passes all filters, and is not critical, so that it is not sent early.
fn is_last(n: u64) -> bool {
    n >= 1_000_000
}

fn last_number() -> u64 {
    let is_fit = |n: &u64| severity(*n) == "high" && source(*n) == "zeek";
    (1_000_000..2_000_000).find(is_fit).expect("there is one")
}

impl TestFilter {
    fn passes(self, n: u64) -> bool {
        match self {
            Self::Everything => true,
            Self::Severe => severity(n) != "low",
            Self::OfSource => source(n) == "zeek",
        }
    }

    fn query(self) -> &'static str {
        match self {
            Self::Everything => "",
            Self::Severe => "&min_severity=high",
            Self::OfSource => "&source=zeek",
        }
    }

    fn tree(self) -> Option<Value> {
        match self {
            Self::Everything => None,
            Self::Severe => Some(json!({"key": "severity", "cmp": "gte", "val": "high"})),
            Self::OfSource => Some(json!({"key": "source", "cmp": "eq", "val": "zeek"})),
        }
    }
}

/// A position: an epoch and an id.
type StreamPosition = (String, EntryId);

fn parse_position(position: &Value) -> StreamPosition {
    let text = position.as_str().expect("a position");
    let (epoch, id) = text.split_once(':').expect("an epoch and an id");
    (epoch.to_owned(), id.parse().expect("an id"))
}

/// An observation of a client.
#[derive(Debug, Clone)]
enum Observation {
    Connected,
    /// It starts here, with or without all requested entries.
    Started(StreamPosition, bool),
    /// Its position is here, without an entry.
    At(StreamPosition),
    Alert(StreamPosition, u64),
    Early(StreamPosition, u64),
    Gap {
        after: Option<StreamPosition>,
        before: Option<StreamPosition>,
        reason: String,
    },
}

fn observe(kind: Kind, text: &str) -> Option<Observation> {
    let frame: Value = serde_json::from_str(text).expect("JSON");
    let number = |alert: &Value| alert["n"].as_u64().expect("a number");
    if kind == Kind::Plain {
        return Some(Observation::Alert(parse_position(&frame["_pos"]), number(&frame)));
    }
    match frame["t"].as_str().expect("a type") {
        "event" if frame["lane"] == "critical" => {
            Some(Observation::Early(parse_position(&frame["p"]), number(&frame["d"])))
        }
        "event" => Some(Observation::Alert(parse_position(&frame["p"]), number(&frame["d"]))),
        "mark" => Some(Observation::At(parse_position(&frame["p"]))),
        "subscribed" => Some(Observation::Started(parse_position(&frame["from"]), frame["recovered"] == true)),
        "gap" => {
            let bound = |name: &str| frame.get(name).map(parse_position);
            let reason = frame["reason"].as_str().expect("a reason").to_owned();
            Some(Observation::Gap { after: bound("after"), before: bound("before"), reason })
        }
        "error" => panic!("{text}"),
        _ => None,
    }
}

/// Connects and disconnects until it has seen the last alert. Returns its observations.
async fn watch(behaviour: Behaviour, relays: Arc<Mutex<Vec<String>>>) -> Vec<Observation> {
    let (mut seen, mut position) = (Vec::new(), None::<StreamPosition>);
    for visit in 0.. {
        let most = behaviour.patience.get(visit).copied().unwrap_or(usize::MAX);
        let address = relays.lock().expect("unpoisoned")[visit % RELAYS].clone();
        seen.push(Observation::Connected);
        let is_over = connect_once(&behaviour, &address, most, &mut position, &mut seen).await;
        if is_over {
            return seen;
        }
        // If its relay is gone, there is another one soon.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    unreachable!("visits do not end")
}

/// Stays for one connection. Returns whether it has seen the last alert.
async fn connect_once(
    behaviour: &Behaviour,
    address: &str,
    most: usize,
    position: &mut Option<StreamPosition>,
    seen: &mut Vec<Observation>,
) -> bool {
    let start = match (&position, behaviour.start) {
        (Some((epoch, id)), _) => ("since", json!(format!("{epoch}:{id}"))),
        (None, FirstStart::Earliest) => ("since", json!("earliest")),
        (None, FirstStart::Snapshot(count)) => ("snapshot", json!(count)),
    };
    let query = match behaviour.kind {
        Kind::Plain => {
            let value = start.1.as_str().map_or_else(|| start.1.to_string(), ToOwned::to_owned);
            format!("meta=1&{}={value}{}", start.0, behaviour.filter.query())
        }
        Kind::Rich { .. } => "v=1".to_owned(),
    };
    let Ok((mut socket, _)) = tokio_tungstenite::connect_async(format!("ws://{address}/alerts?{query}")).await else {
        return false;
    };
    if let Kind::Rich { has_lane } = behaviour.kind {
        let lane = if has_lane { "critical" } else { "off" };
        let mut request = json!({"op": "subscribe", "id": 1, "lane": lane, "filter": behaviour.filter.tree()});
        request[start.0] = start.1;
        if socket.send(Message::text(request.to_string())).await.is_err() {
            return false;
        }
    }
    for _ in 0..most {
        let observation = match timeout(TEST_TIMEOUT, socket.next()).await.expect("something in time") {
            Some(Ok(Message::Text(text))) => observe(behaviour.kind, &text),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => None,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return false,
            Some(Ok(other)) => panic!("unexpected {other:?}"),
        };
        if let Some(Observation::Alert(last, _) | Observation::At(last) | Observation::Started(last, _)) = &observation
        {
            *position = Some(last.clone());
        }
        let is_over = matches!(observation, Some(Observation::Alert(_, n)) if is_last(n));
        seen.extend(observation);
        if is_over {
            return true;
        }
    }
    false
}

/// The entries that were published, and those that are gone.
#[derive(Debug, Default)]
struct Truth {
    /// The epochs of the stream, in order.
    epochs: Vec<String>,
    numbers: BTreeMap<(usize, EntryId), u64>,
    gone: BTreeSet<(usize, EntryId)>,
}

impl Truth {
    fn resolve(&self, (epoch, id): &StreamPosition) -> Result<(usize, EntryId), TestCaseError> {
        let epoch_index = self.epochs.iter().position(|known| known == epoch);
        epoch_index
            .map(|epoch_index| (epoch_index, *id))
            .ok_or_else(|| TestCaseError::fail(format!("unknown epoch {epoch}")))
    }

    /// Checks the observations of a client.
    fn check(&self, behaviour: &Behaviour, seen: &[Observation]) -> Result<(), TestCaseError> {
        let is_rich = behaviour.kind != Kind::Plain;
        let mut at = None::<(usize, EntryId)>;
        let (mut early, mut early_here) = (BTreeSet::new(), BTreeSet::new());
        let (mut gaps, mut was_lost, mut was_recovered) = (Vec::new(), false, true);
        for (index, observation) in seen.iter().enumerate() {
            let (here, number) = match observation {
                Observation::Connected => {
                    early_here.clear();
                    continue;
                }
                Observation::Early(position, n) => {
                    let position = self.resolve(position)?;
                    prop_assert_eq!(self.numbers.get(&position), Some(n));
                    prop_assert!(behaviour.filter.passes(*n) && severity(*n) == "critical", "{n} was early");
                    prop_assert!(at.is_none_or(|at| position > at), "{n} was sent early after its order");
                    prop_assert!(early_here.insert(position), "{n} was sent early twice");
                    early.insert(position);
                    continue;
                }
                Observation::Gap { after, before, reason } if reason == "trimmed" => {
                    let after = self.resolve(after.as_ref().expect("a bound"))?;
                    let before = before.as_ref().map(|before| self.resolve(before)).transpose()?;
                    prop_assert!(at.is_none_or(|at| after >= at), "a gap of entries that were sent");
                    prop_assert!(before.is_none_or(|before| self.numbers.contains_key(&before)));
                    let end = before.unwrap_or((after.0, EntryId::MAX));
                    let is_there =
                        |(position, _): &(&(usize, EntryId), &u64)| **position > after && !self.gone.contains(position);
                    let there = self.numbers.range(after..end).find(is_there);
                    prop_assert!(before.is_none() || there.is_none(), "a gap where there is {there:?}");
                    gaps.push((after, end));
                    continue;
                }
                Observation::Gap { reason, .. } => {
                    prop_assert!(reason == "state_lost" || reason == "epoch", "{reason}");
                    was_lost = true;
                    continue;
                }
                Observation::Started(position, is_recovered) => {
                    was_recovered &= *is_recovered;
                    (self.resolve(position)?, None)
                }
                Observation::At(position) => (self.resolve(position)?, None),
                Observation::Alert(position, n) => (self.resolve(position)?, Some(*n)),
            };
            if let Some(n) = number {
                prop_assert_eq!(self.numbers.get(&here), Some(&n), "at {:?}", here);
                prop_assert!(behaviour.filter.passes(n), "{n} does not pass");
                prop_assert!(at.is_none_or(|at| here > at), "{n} at {here:?} after {at:?}");
                prop_assert!(!early_here.contains(&here), "{n} came twice on one connection");
            } else {
                prop_assert!(at.is_none_or(|at| here >= at), "position {here:?} after {at:?}");
            }
            let is_new_epoch = at.is_some_and(|at| at.0 < here.0);
            prop_assert!(
                !is_new_epoch || was_lost || !was_recovered || !is_rich,
                "the loss of the stream was not reported: {:?}",
                &seen[index.saturating_sub(10)..=index]
            );
            let from = match at {
                Some(at) if !is_new_epoch => Some(at),
                Some(_) => Some((here.0, EntryId::MIN)),
                // At first, the oldest entry or the snapshot is the start.
                None if behaviour.start == FirstStart::Earliest && number.is_some() => Some((here.0, EntryId::MIN)),
                None => None,
            };
            let is_first = at.is_none() || is_new_epoch;
            let passed =
                from.into_iter().flat_map(|from| self.numbers.range(from..here).filter(move |(p, _)| **p > from));
            for (position, n) in passed.filter(|(_, n)| behaviour.filter.passes(**n)) {
                let is_told = !is_rich
                    || is_first
                    || was_lost
                    || gaps.iter().any(|(after, end)| position > after && position < end);
                let is_excused = early.contains(position) || (self.gone.contains(position) && is_told);
                let before = &seen[index.saturating_sub(10)..=index];
                prop_assert!(
                    is_excused,
                    "unreported gap at {n}, {position:?}, between {at:?} and {here:?}: {before:?}, {gaps:?}"
                );
            }
            // While the position stays the same, a reported gap applies to the next entries.
            let has_moved = at != Some(here);
            at = Some(here);
            if has_moved && !matches!(observation, Observation::Started(..)) {
                (gaps, was_lost, was_recovered) = (Vec::new(), false, true);
            }
        }
        Ok(())
    }
}

/// A store that can be lost.
pub(super) enum TestStore {
    Embedded,
    Redis(RedisServer),
}

impl TestStore {
    pub(super) async fn fresh(&self) -> Arc<FaultyStore> {
        match self {
            Self::Embedded => FaultyStore::open().await,
            Self::Redis(server) => {
                server.cli(&["FLUSHALL"]);
                let config = redis::Config { url: server.url().into(), ..redis::Config::default() };
                FaultyStore::around(Arc::new(config.connect().await.expect("a valid configuration")))
            }
        }
    }

    async fn lose(&self, store: &FaultyStore) {
        match self {
            Self::Embedded => store.lose_all_data().await,
            Self::Redis(server) => {
                server.cli(&["FLUSHALL"]);
            }
        }
    }
}

struct History {
    store: Arc<FaultyStore>,
    relays: Vec<Server>,
    addresses: Arc<Mutex<Vec<String>>>,
    truth: Truth,
    published: u64,
    last: EntryId,
}

impl History {
    async fn new(store: Arc<FaultyStore>) -> Self {
        let (mut relays, mut addresses) = (Vec::new(), Vec::new());
        for relay in 0..RELAYS {
            let server = Server::start(store.clone(), config(1 + 50 * relay)).await;
            addresses.push(server.address.to_string());
            relays.push(server);
        }
        let epoch = store.epoch(&alerts()).await.expect("an epoch").to_string();
        let truth = Truth { epochs: vec![epoch], ..Truth::default() };
        Self { store, relays, addresses: Arc::new(Mutex::new(addresses)), truth, published: 0, last: EntryId::MIN }
    }

    async fn apply(&mut self, history_step: &HistoryStep, test_store: &TestStore) {
        match history_step {
            HistoryStep::Publish(count) => self.publish(self.published..self.published + count).await,
            HistoryStep::Trim(length) => {
                // Entries that are gone before the relays read them cannot be checked.
                self.relayed().await;
                self.trim(*length).await;
            }
            HistoryStep::Outage(count, length) => {
                self.wait_for_outage().await;
                self.publish(self.published..self.published + count).await;
                self.trim(*length).await;
                self.store.set_unavailable(false);
            }
            HistoryStep::Restart(relay, ring) => {
                let server = Server::start(self.store.clone(), config(*ring)).await;
                self.addresses.lock().expect("unpoisoned")[*relay] = server.address.to_string();
                self.relays[*relay] = server;
            }
            HistoryStep::Lose => {
                // After an outage the tail compares the stream with the store at once.
                self.wait_for_outage().await;
                test_store.lose(&self.store).await;
                self.store.set_unavailable(false);
                let epoch = self.store.epoch(&alerts()).await.expect("an epoch");
                for relay in &self.relays {
                    let is_in = || relay.relay.status().streams.iter().all(|s| s.epoch.as_ref() == Some(&epoch));
                    relay.until("the new epoch is noticed", is_in).await;
                }
                let epoch_index = self.truth.epochs.len() - 1;
                let gone = self.truth.numbers.range((epoch_index, EntryId::MIN)..).map(|(position, _)| *position);
                self.truth.gone.extend(gone);
                self.truth.epochs.push(epoch.to_string());
                self.last = EntryId::MIN;
            }
            HistoryStep::Pass(ms) => tokio::time::sleep(Duration::from_millis(*ms)).await,
        }
    }

    /// Waits until the relays know that the store is away.
    async fn wait_for_outage(&self) {
        self.store.set_unavailable(true);
        for relay in &self.relays {
            let is_out = || relay.readiness.report().iter().all(|part| part.reason.is_some());
            relay.until("the outage is noticed", is_out).await;
        }
    }

    async fn trim(&mut self, length: u64) {
        let store = self.store.inner_store();
        store.trim(&alerts(), Trim::ToLength(length)).await.expect("trimmed");
        let status = store.describe(&alerts()).await.expect("described");
        let first = status.and_then(|status| status.first_id);
        if first.is_none() {
            // The stream has no entry that could be read.
            self.last = EntryId::MIN;
        }
        let first = first.unwrap_or(EntryId::MAX);
        let epoch_index = self.truth.epochs.len() - 1;
        let gone =
            self.truth.numbers.range((epoch_index, EntryId::MIN)..(epoch_index, first)).map(|(position, _)| *position);
        self.truth.gone.extend(gone);
    }

    async fn publish(&mut self, numbers: impl Iterator<Item = u64> + Clone) {
        let appended = publish(&*self.store.inner_store(), &alerts(), numbers.clone().map(alert)).await;
        let epoch_index = self.truth.epochs.len() - 1;
        self.last = appended.last().expect("some").id;
        self.published += appended.len() as u64;
        self.truth.numbers.extend(appended.iter().map(|one| (epoch_index, one.id)).zip(numbers));
    }

    async fn relayed(&self) {
        for relay in &self.relays {
            relay
                .until("everything is read", || relay.relay.status().streams.iter().all(|s| s.last >= self.last))
                .await;
        }
    }
}

fn config(ring_entries: usize) -> Config {
    let channels = [("alerts".to_owned(), vec![alerts().into()])].into();
    Config { ring_entries, channels, drain_window: Duration::from_millis(1), ..Config::default() }
}

async fn play(test_store: &TestStore, steps: &[HistoryStep], clients: &[Behaviour]) -> Result<(), TestCaseError> {
    let store = test_store.fresh().await;
    let mut history = History::new(store.clone()).await;
    let mut watching = JoinSet::new();
    for (index, behaviour) in clients.iter().enumerate() {
        let (behaviour, addresses) = (behaviour.clone(), history.addresses.clone());
        watching.spawn(async move { (index, watch(behaviour, addresses).await) });
    }
    for history_step in steps {
        history.apply(history_step, test_store).await;
    }
    let last = last_number();
    history.publish(last..=last).await;
    while let Some(watched) =
        timeout(2 * TEST_TIMEOUT, watching.join_next()).await.expect("every client sees the last alert")
    {
        let (index, seen) = watched.expect("no client panics");
        history.truth.check(&clients[index], &seen)?;
    }
    drop(history);
    store.close().await;
    Ok(())
}

fn check(test_store: impl AsyncFn() -> TestStore, cases: u32) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let test_store = runtime.block_on(test_store());
    let config = test_runner::Config {
        cases,
        max_shrink_iters: 20,
        max_shrink_time: 30_000,
        failure_persistence: None,
        ..test_runner::Config::default()
    };
    let histories = (vec(history_step(), 4..24), vec(behaviour(), 3..8));
    let outcome = TestRunner::new(config)
        .run(&histories, |(steps, clients)| runtime.block_on(play(&test_store, &steps, &clients)));
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn resuming_clients_see_every_entry_once_embedded() {
    check(async || TestStore::Embedded, 12);
}

#[test]
fn resuming_clients_see_every_entry_once_redis() {
    check(async || TestStore::Redis(RedisServer::start(Product::Redis, &[]).await), 6);
}

#[test]
fn resuming_clients_see_every_entry_once_valkey() {
    check(async || TestStore::Redis(RedisServer::start(Product::Valkey, &[]).await), 4);
}
