//! Random histories of clients that come and go, against one invariant: whoever resumes sees everything once and in order,
//! and what it does not see was gone, and told to be.
//!
//! Two relays share a store. While alerts are published, the stream trimmed, lost and begun anew, and relays restarted,
//! clients of every kind break off after some frames and resume with the last position they know, at either relay. What
//! they saw is compared with what was published.

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

use super::server::{PATIENCE, Server, alerts, publish};
use super::store::Fragile;
use crate::support::redis::{Product, RedisServer};

const RELAYS: usize = 2;

#[derive(Debug, Clone)]
enum Happening {
    Publish(u64),
    Trim(u64),
    /// A relay is gone at once, and another one begins with a ring of so many entries.
    Restart(usize, usize),
    /// The stream is lost and begins anew.
    Lose,
    /// While the relays can't reach the store, others publish so much to it and trim it to so much.
    Outage(u64, u64),
    Pass(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        8 => (1_u64..150).prop_map(Happening::Publish),
        3 => (0_u64..80).prop_map(Happening::Trim),
        3 => (0..RELAYS, 1_usize..120).prop_map(|(relay, ring)| Happening::Restart(relay, ring)),
        1 => Just(Happening::Lose),
        1 => (1_u64..150, 0_u64..80).prop_map(|(count, length)| Happening::Outage(count, length)),
        3 => (1_u64..20).prop_map(Happening::Pass),
    ]
}

/// What a client does.
#[derive(Debug, Clone)]
struct Habits {
    kind: Kind,
    sieve: Sieve,
    begins: Begins,
    /// After so many messages it breaks off; at last it stays.
    patience: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Rich { has_lane: bool },
}

#[derive(Debug, Clone, Copy)]
enum Sieve {
    Everything,
    Severe,
    OfSource,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Earliest,
    Snapshot(usize),
}

fn habits() -> impl Strategy<Value = Habits> {
    let kind = prop_oneof![Just(Kind::Plain), any::<bool>().prop_map(|has_lane| Kind::Rich { has_lane })];
    let sieve = prop_oneof![Just(Sieve::Everything), Just(Sieve::Severe), Just(Sieve::OfSource)];
    let begins = prop_oneof![Just(Begins::Earliest), (1_usize..60).prop_map(Begins::Snapshot)];
    (kind, sieve, begins, vec(1_usize..120, 0..6)).prop_map(|(kind, sieve, begins, patience)| Habits {
        kind,
        sieve,
        begins,
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

/// The last alert of a history is for everybody, and nothing that would be given before its turn.
fn is_last(n: u64) -> bool {
    n >= 1_000_000
}

fn last_number() -> u64 {
    let is_fit = |n: &u64| severity(*n) == "high" && source(*n) == "zeek";
    (1_000_000..2_000_000).find(is_fit).expect("there is one")
}

impl Sieve {
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

/// A place in one life of the stream.
type Place = (String, EntryId);

fn place(position: &Value) -> Place {
    let text = position.as_str().expect("a position");
    let (epoch, id) = text.split_once(':').expect("an epoch and an id");
    (epoch.to_owned(), id.parse().expect("an id"))
}

/// What a client was told.
#[derive(Debug, Clone)]
enum Told {
    Connected,
    /// It goes on from here, with all of what it asked for or not.
    Begins(Place, bool),
    /// It stands here: nothing was told with it.
    Stands(Place),
    Alert(Place, u64),
    Early(Place, u64),
    Gap {
        after: Option<Place>,
        before: Option<Place>,
        reason: String,
    },
}

fn told(kind: Kind, text: &str) -> Option<Told> {
    let frame: Value = serde_json::from_str(text).expect("JSON");
    let number = |alert: &Value| alert["n"].as_u64().expect("a number");
    if kind == Kind::Plain {
        return Some(Told::Alert(place(&frame["_pos"]), number(&frame)));
    }
    match frame["t"].as_str().expect("a type") {
        "event" if frame["lane"] == "critical" => Some(Told::Early(place(&frame["p"]), number(&frame["d"]))),
        "event" => Some(Told::Alert(place(&frame["p"]), number(&frame["d"]))),
        "mark" => Some(Told::Stands(place(&frame["p"]))),
        "subscribed" => Some(Told::Begins(place(&frame["from"]), frame["recovered"] == true)),
        "gap" => {
            let bound = |name: &str| frame.get(name).map(place);
            let reason = frame["reason"].as_str().expect("a reason").to_owned();
            Some(Told::Gap { after: bound("after"), before: bound("before"), reason })
        }
        "error" => panic!("{text}"),
        _ => None,
    }
}

/// Comes and goes until it has seen the last alert. Says what it was told.
async fn watch(habits: Habits, relays: Arc<Mutex<Vec<String>>>) -> Vec<Told> {
    let (mut seen, mut position) = (Vec::new(), None::<Place>);
    for visit in 0.. {
        let most = habits.patience.get(visit).copied().unwrap_or(usize::MAX);
        let address = relays.lock().expect("unpoisoned")[visit % RELAYS].clone();
        seen.push(Told::Connected);
        let is_over = stay(&habits, &address, most, &mut position, &mut seen).await;
        if is_over {
            return seen;
        }
        // Where its relay is gone, there is another soon.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    unreachable!("visits don't end")
}

/// One visit; says whether it has seen the last alert.
async fn stay(habits: &Habits, address: &str, most: usize, position: &mut Option<Place>, seen: &mut Vec<Told>) -> bool {
    let begins = match (&position, habits.begins) {
        (Some((epoch, id)), _) => ("since", json!(format!("{epoch}:{id}"))),
        (None, Begins::Earliest) => ("since", json!("earliest")),
        (None, Begins::Snapshot(count)) => ("snapshot", json!(count)),
    };
    let query = match habits.kind {
        Kind::Plain => {
            let value = begins.1.as_str().map_or_else(|| begins.1.to_string(), ToOwned::to_owned);
            format!("meta=1&{}={value}{}", begins.0, habits.sieve.query())
        }
        Kind::Rich { .. } => "v=1".to_owned(),
    };
    let Ok((mut socket, _)) = tokio_tungstenite::connect_async(format!("ws://{address}/alerts?{query}")).await else {
        return false;
    };
    if let Kind::Rich { has_lane } = habits.kind {
        let lane = if has_lane { "critical" } else { "off" };
        let mut request = json!({"op": "subscribe", "id": 1, "lane": lane, "filter": habits.sieve.tree()});
        request[begins.0] = begins.1;
        if socket.send(Message::text(request.to_string())).await.is_err() {
            return false;
        }
    }
    for _ in 0..most {
        let message = match timeout(PATIENCE, socket.next()).await.expect("something in time") {
            Some(Ok(Message::Text(text))) => told(habits.kind, &text),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => None,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return false,
            Some(Ok(other)) => panic!("unexpected {other:?}"),
        };
        if let Some(Told::Alert(place, _) | Told::Stands(place) | Told::Begins(place, _)) = &message {
            *position = Some(place.clone());
        }
        let is_over = matches!(message, Some(Told::Alert(_, n)) if is_last(n));
        seen.extend(message);
        if is_over {
            return true;
        }
    }
    false
}

/// What was published, and what of it is gone.
#[derive(Debug, Default)]
struct Truth {
    /// The lives of the stream in their order.
    lives: Vec<String>,
    numbers: BTreeMap<(usize, EntryId), u64>,
    gone: BTreeSet<(usize, EntryId)>,
}

impl Truth {
    fn place(&self, (epoch, id): &Place) -> Result<(usize, EntryId), TestCaseError> {
        let life = self.lives.iter().position(|life| life == epoch);
        life.map(|life| (life, *id)).ok_or_else(|| TestCaseError::fail(format!("unknown epoch {epoch}")))
    }

    /// What is wrong with what a client was told, if anything is.
    fn check(&self, habits: &Habits, seen: &[Told]) -> Result<(), TestCaseError> {
        let is_rich = habits.kind != Kind::Plain;
        let mut at = None::<(usize, EntryId)>;
        let (mut early, mut early_here) = (BTreeSet::new(), BTreeSet::new());
        let (mut gaps, mut was_lost, mut was_recovered) = (Vec::new(), false, true);
        for (index, told) in seen.iter().enumerate() {
            let (here, number) = match told {
                Told::Connected => {
                    early_here.clear();
                    continue;
                }
                Told::Early(place, n) => {
                    let place = self.place(place)?;
                    prop_assert_eq!(self.numbers.get(&place), Some(n));
                    prop_assert!(habits.sieve.passes(*n) && severity(*n) == "critical", "{n} was early");
                    prop_assert!(at.is_none_or(|at| place > at), "{n} came before its turn, after it");
                    prop_assert!(early_here.insert(place), "{n} came before its turn, twice");
                    early.insert(place);
                    continue;
                }
                Told::Gap { after, before, reason } if reason == "trimmed" => {
                    let after = self.place(after.as_ref().expect("a bound"))?;
                    let before = before.as_ref().map(|before| self.place(before)).transpose()?;
                    prop_assert!(at.is_none_or(|at| after >= at), "a gap of what was given");
                    prop_assert!(before.is_none_or(|before| self.numbers.contains_key(&before)));
                    let end = before.unwrap_or((after.0, EntryId::MAX));
                    let is_there =
                        |(place, _): &(&(usize, EntryId), &u64)| **place > after && !self.gone.contains(place);
                    let there = self.numbers.range(after..end).find(is_there);
                    prop_assert!(before.is_none() || there.is_none(), "a gap where there is {there:?}");
                    gaps.push((after, end));
                    continue;
                }
                Told::Gap { reason, .. } => {
                    prop_assert!(reason == "state_lost" || reason == "epoch", "{reason}");
                    was_lost = true;
                    continue;
                }
                Told::Begins(place, is_recovered) => {
                    was_recovered &= *is_recovered;
                    (self.place(place)?, None)
                }
                Told::Stands(place) => (self.place(place)?, None),
                Told::Alert(place, n) => (self.place(place)?, Some(*n)),
            };
            if let Some(n) = number {
                prop_assert_eq!(self.numbers.get(&here), Some(&n), "at {:?}", here);
                prop_assert!(habits.sieve.passes(n), "{n} does not pass");
                prop_assert!(at.is_none_or(|at| here > at), "{n} at {here:?} after {at:?}");
                prop_assert!(!early_here.contains(&here), "{n} came twice on one connection");
            } else {
                prop_assert!(at.is_none_or(|at| here >= at), "stands at {here:?} after {at:?}");
            }
            let is_new_life = at.is_some_and(|at| at.0 < here.0);
            prop_assert!(
                !is_new_life || was_lost || !was_recovered || !is_rich,
                "nobody told that the stream was lost: {:?}",
                &seen[index.saturating_sub(10)..=index]
            );
            let from = match at {
                Some(at) if !is_new_life => Some(at),
                Some(_) => Some((here.0, EntryId::MIN)),
                // What there was at first, is there from the oldest on, or is a snapshot.
                None if habits.begins == Begins::Earliest && number.is_some() => Some((here.0, EntryId::MIN)),
                None => None,
            };
            let is_first = at.is_none() || is_new_life;
            let passed =
                from.into_iter().flat_map(|from| self.numbers.range(from..here).filter(move |(p, _)| **p > from));
            for (place, n) in passed.filter(|(_, n)| habits.sieve.passes(**n)) {
                let is_told =
                    !is_rich || is_first || was_lost || gaps.iter().any(|(after, end)| place > after && place < end);
                let is_excused = early.contains(place) || (self.gone.contains(place) && is_told);
                let before = &seen[index.saturating_sub(10)..=index];
                prop_assert!(is_excused, "a hole at {n}, {place:?}, between {at:?} and {here:?}: {before:?}, {gaps:?}");
            }
            // Where it still stands at the same place, a gap that was told is before what comes.
            let has_moved = at != Some(here);
            at = Some(here);
            if has_moved && !matches!(told, Told::Begins(..)) {
                (gaps, was_lost, was_recovered) = (Vec::new(), false, true);
            }
        }
        Ok(())
    }
}

/// A store that can be lost.
pub(super) enum Ground {
    Embedded,
    Redis(RedisServer),
}

impl Ground {
    pub(super) async fn fresh(&self) -> Arc<Fragile> {
        match self {
            Self::Embedded => Fragile::open().await,
            Self::Redis(server) => {
                server.cli(&["FLUSHALL"]);
                let config = redis::Config { url: server.url().into(), ..redis::Config::default() };
                Fragile::around(Arc::new(config.connect().await.expect("a valid configuration")))
            }
        }
    }

    async fn lose(&self, store: &Fragile) {
        match self {
            Self::Embedded => store.lose_everything().await,
            Self::Redis(server) => {
                server.cli(&["FLUSHALL"]);
            }
        }
    }
}

struct History {
    store: Arc<Fragile>,
    relays: Vec<Server>,
    addresses: Arc<Mutex<Vec<String>>>,
    truth: Truth,
    published: u64,
    last: EntryId,
}

impl History {
    async fn new(store: Arc<Fragile>) -> Self {
        let (mut relays, mut addresses) = (Vec::new(), Vec::new());
        for relay in 0..RELAYS {
            let server = Server::start(store.clone(), config(1 + 50 * relay)).await;
            addresses.push(server.address.to_string());
            relays.push(server);
        }
        let epoch = store.epoch(&alerts()).await.expect("an epoch").to_string();
        let truth = Truth { lives: vec![epoch], ..Truth::default() };
        Self { store, relays, addresses: Arc::new(Mutex::new(addresses)), truth, published: 0, last: EntryId::MIN }
    }

    async fn happen(&mut self, happening: &Happening, ground: &Ground) {
        match happening {
            Happening::Publish(count) => self.publish(self.published..self.published + count).await,
            Happening::Trim(length) => {
                // What is gone before it was read, nobody can be shown.
                self.relayed().await;
                self.trim(*length).await;
            }
            Happening::Outage(count, length) => {
                self.cut_off().await;
                self.publish(self.published..self.published + count).await;
                self.trim(*length).await;
                self.store.set_away(false);
            }
            Happening::Restart(relay, ring) => {
                let server = Server::start(self.store.clone(), config(*ring)).await;
                self.addresses.lock().expect("unpoisoned")[*relay] = server.address.to_string();
                self.relays[*relay] = server;
            }
            Happening::Lose => {
                // An outage brings the comparison with the store forward.
                self.cut_off().await;
                ground.lose(&self.store).await;
                self.store.set_away(false);
                let epoch = self.store.epoch(&alerts()).await.expect("an epoch");
                for relay in &self.relays {
                    let is_in = || relay.relay.status().streams.iter().all(|s| s.epoch.as_ref() == Some(&epoch));
                    relay.until("the new life is noticed", is_in).await;
                }
                let life = self.truth.lives.len() - 1;
                let gone = self.truth.numbers.range((life, EntryId::MIN)..).map(|(place, _)| *place);
                self.truth.gone.extend(gone);
                self.truth.lives.push(epoch.to_string());
                self.last = EntryId::MIN;
            }
            Happening::Pass(ms) => tokio::time::sleep(Duration::from_millis(*ms)).await,
        }
    }

    /// The relays know that the store is away.
    async fn cut_off(&self) {
        self.store.set_away(true);
        for relay in &self.relays {
            let is_out = || relay.readiness.report().iter().all(|part| part.reason.is_some());
            relay.until("the outage is noticed", is_out).await;
        }
    }

    async fn trim(&mut self, length: u64) {
        let store = self.store.beneath();
        store.trim(&alerts(), Trim::ToLength(length)).await.expect("trimmed");
        let status = store.describe(&alerts()).await.expect("described");
        let first = status.and_then(|status| status.first_id);
        if first.is_none() {
            // There is nothing left that could be read.
            self.last = EntryId::MIN;
        }
        let first = first.unwrap_or(EntryId::MAX);
        let life = self.truth.lives.len() - 1;
        let gone = self.truth.numbers.range((life, EntryId::MIN)..(life, first)).map(|(place, _)| *place);
        self.truth.gone.extend(gone);
    }

    async fn publish(&mut self, numbers: impl Iterator<Item = u64> + Clone) {
        let appended = publish(&*self.store.beneath(), &alerts(), numbers.clone().map(alert)).await;
        let life = self.truth.lives.len() - 1;
        self.last = appended.last().expect("some").id;
        self.published += appended.len() as u64;
        self.truth.numbers.extend(appended.iter().map(|one| (life, one.id)).zip(numbers));
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

async fn play(ground: &Ground, happenings: &[Happening], clients: &[Habits]) -> Result<(), TestCaseError> {
    let store = ground.fresh().await;
    let mut history = History::new(store.clone()).await;
    let mut watching = JoinSet::new();
    for (index, habits) in clients.iter().enumerate() {
        let (habits, addresses) = (habits.clone(), history.addresses.clone());
        watching.spawn(async move { (index, watch(habits, addresses).await) });
    }
    for happening in happenings {
        history.happen(happening, ground).await;
    }
    let last = last_number();
    history.publish(last..=last).await;
    while let Some(watched) = timeout(2 * PATIENCE, watching.join_next()).await.expect("everybody sees the last alert")
    {
        let (index, seen) = watched.expect("no client panics");
        history.truth.check(&clients[index], &seen)?;
    }
    drop(history);
    store.close().await;
    Ok(())
}

fn check(ground: impl AsyncFn() -> Ground, cases: u32) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let ground = runtime.block_on(ground());
    let config = test_runner::Config {
        cases,
        max_shrink_iters: 20,
        max_shrink_time: 30_000,
        failure_persistence: None,
        ..test_runner::Config::default()
    };
    let histories = (vec(happening(), 4..24), vec(habits(), 3..8));
    let outcome = TestRunner::new(config)
        .run(&histories, |(happenings, clients)| runtime.block_on(play(&ground, &happenings, &clients)));
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn whoever_resumes_sees_everything_once_on_the_embedded_store() {
    check(async || Ground::Embedded, 12);
}

#[test]
fn whoever_resumes_sees_everything_once_on_redis() {
    check(async || Ground::Redis(RedisServer::start(Product::Redis, &[]).await), 6);
}

#[test]
fn whoever_resumes_sees_everything_once_on_valkey() {
    check(async || Ground::Redis(RedisServer::start(Product::Valkey, &[]).await), 4);
}
