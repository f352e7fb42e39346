//! The ledger: every event that was answered with success, and what became of it.
//!
//! Events have names. Publishing notes the name once it is accepted; a sink, or the log of a daemon whose sink is
//! `log`, tells which names were handled and how often. [`Ledger::balance`] then asks the store for the rest: what is
//! dead, pending or not delivered yet. Whatever is in none of these was lost, and says so by name.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aurora_bus::event::{DeadLetter, Entry, EntryId, Fields, GroupName, NewEntry, StreamName, field};
use aurora_bus::store::{self, Consumption, Cursor, Order, Range, Store};
use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::app::{Accepted, BOUND, Daemon, Refused, client};
use super::until;

/// What was promised and what was done.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    next: AtomicU64,
    /// Entry ids by the names of the accepted events.
    promised: Mutex<BTreeMap<String, String>>,
    /// Attempts by the names of the handled events, one for each time.
    handled: Mutex<BTreeMap<String, Vec<u32>>>,
}

/// An event under its name.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) payload: String,
}

/// The stream, group and dead letters that a balance is made of.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    pub(crate) stream: StreamName,
    pub(crate) group: GroupName,
    pub(crate) dead_letter: StreamName,
}

/// Where the promised events are now.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    pub(crate) promised: usize,
    pub(crate) handled: usize,
    /// How often a sink was given something that it had taken before.
    pub(crate) repeated: usize,
    pub(crate) dead: usize,
    pub(crate) pending: usize,
    pub(crate) undelivered: usize,
    /// Promised, and nowhere.
    pub(crate) missing: Vec<String>,
    /// Acknowledged, though no sink took them and they are not dead.
    pub(crate) unaccounted: Vec<String>,
    /// In the stream, or in the dead letters, more than once.
    pub(crate) doubled: Vec<String>,
    /// By how much the store's own account of the group is off; absent while it can't be known.
    pub(crate) difference: Option<i64>,
}

impl Balance {
    /// Fails unless every promise is kept and nothing is there twice.
    #[track_caller]
    pub(crate) fn assert_kept(&self) {
        assert!(self.promised > 0, "nothing was accepted at all");
        let is_kept = self.missing.is_empty() && self.unaccounted.is_empty() && self.doubled.is_empty();
        assert!(is_kept, "{self:#?}");
    }

    /// The same, and fails unless everything was handled or is dead, and the store has counted it so.
    #[track_caller]
    pub(crate) fn assert_settled(&self) {
        self.assert_kept();
        assert_eq!(self.difference, Some(0), "{self:#?}");
        assert_eq!((self.pending, self.undelivered), (0, 0), "{self:#?}");
    }
}

impl Account {
    /// An account by names; dead letters are where they are by default.
    pub(crate) fn new(stream: &str, group: &str) -> Self {
        let stream: StreamName = stream.parse().expect("a valid name");
        Self { dead_letter: stream.default_dead_letter(), group: group.parse().expect("a valid name"), stream }
    }

    /// A cursor of a consumer that never consumes, to ask with.
    pub(crate) fn cursor(&self) -> Cursor {
        let consumer = "auditor".parse().expect("a valid name");
        let claim_idle = Duration::from_mins(1);
        Cursor { stream: self.stream.clone(), group: self.group.clone(), consumer, claim_idle, lease: None }
    }
}

impl Ledger {
    /// Events that no one has published yet, each of about `pad` bytes.
    pub(crate) fn events(&self, count: u64, pad: usize) -> Vec<Event> {
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        let event = |number| {
            let name = format!("e-{number}");
            let payload = json!({ "id": name, "title": name, "severity": "high", "pad": "x".repeat(pad) }).to_string();
            Event { name, payload }
        };
        (first..first + count).map(event).collect()
    }

    /// Publishes events to a daemon once, under their ids: repeating them makes no second entry.
    pub(crate) async fn publish(&self, daemon: &Daemon, stream: &StreamName, events: &[Event]) -> Result<(), Refused> {
        #[derive(Deserialize)]
        struct Reply {
            results: Vec<Accepted>,
        }
        let url = daemon.url(&format!("/api/v1/streams/{stream}/events?dedup=id"));
        let body = events.iter().map(|event| event.payload.as_str()).collect::<Vec<_>>().join("\n");
        let request = client().post(url).header("content-type", "application/x-ndjson").body(body);
        let response = request.send().await.map_err(|error| error.status())?;
        if response.status() != StatusCode::CREATED {
            return Err(Some(response.status()));
        }
        let reply: Reply = response.json().await.map_err(|_cut_off| None)?;
        assert_eq!(reply.results.len(), events.len(), "one result per event");
        let ids = reply.results.into_iter().map(|accepted| accepted.id);
        for (event, id) in events.iter().zip(ids) {
            self.promise(&event.name, &id);
        }
        Ok(())
    }

    /// The same again and again until it is accepted.
    pub(crate) async fn publish_until_accepted(&self, daemon: &Daemon, stream: &StreamName, events: &[Event]) {
        until("accepted events", BOUND, async || self.publish(daemon, stream, events).await.ok()).await;
    }

    /// Appends events to a store, as a publisher beside the daemon does.
    pub(crate) async fn append(&self, store: &dyn Store, stream: &StreamName, events: &[Event]) {
        let entries = events.iter().map(|event| {
            let mut fields = Fields::default();
            fields.push(field::ID, event.name.clone());
            fields.push(field::DATA, event.payload.clone());
            NewEntry { fields, idempotency: None }
        });
        let appended = store.append(stream, entries.collect()).await.expect("the store answers");
        for (event, appended) in events.iter().zip(appended) {
            self.promise(&event.name, &appended.id.to_string());
        }
    }

    /// An event was accepted as this entry.
    pub(crate) fn promise(&self, name: &str, id: &str) {
        let known = lock(&self.promised).insert(name.to_owned(), id.to_owned());
        assert!(known.is_none_or(|known| known == id), "{name} was accepted twice, as {id} as well");
    }

    /// A sink took an event.
    pub(crate) fn handle(&self, name: &str, attempt: u32) {
        lock(&self.handled).entry(name.to_owned()).or_default().push(attempt);
    }

    /// Notes what a daemon's sink `log` has told since the last time; gives the other lines of its log.
    pub(crate) fn read_log(&self, daemon: &Daemon) -> Vec<String> {
        let mut others = Vec::new();
        for line in daemon.take_log() {
            match serde_json::from_str::<Value>(&line) {
                Ok(told) if told["sink"] == "log" && told["title"].is_string() => {
                    let attempt = told["attempt"].as_u64().and_then(|n| u32::try_from(n).ok()).expect("an attempt");
                    self.handle(told["title"].as_str().expect("a title"), attempt);
                }
                _ => others.push(line),
            }
        }
        others
    }

    /// Waits until the sink of a daemon has taken so many different events in all; gives the other lines of its log.
    pub(crate) async fn has_handled(&self, daemon: &Daemon, count: usize) -> Vec<String> {
        let mut others = Vec::new();
        let what = format!("{count} handled events");
        until(&what, BOUND, async || {
            others.extend(self.read_log(daemon));
            (self.handled() >= count).then_some(())
        })
        .await;
        others
    }

    /// How many different events were handled.
    pub(crate) fn handled(&self) -> usize {
        lock(&self.handled).len()
    }

    /// How many events were accepted.
    pub(crate) fn promised(&self) -> usize {
        lock(&self.promised).len()
    }

    /// The events that were accepted.
    pub(crate) fn promised_names(&self) -> BTreeSet<String> {
        lock(&self.promised).keys().cloned().collect()
    }

    /// Forgets promises: the store was emptied by an operator, and what it held is not owed any more.
    pub(crate) fn forgive(&self) {
        lock(&self.promised).clear();
    }

    /// Compares the promises with what was handled, and with what the store holds. Nobody may be publishing.
    pub(crate) async fn balance(&self, store: &dyn Store, account: &Account) -> Balance {
        let everything = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
        // What is pending comes first: what ends meanwhile is then found where it has gone.
        let status = store.describe(&account.stream).await.expect("the store answers");
        let group = status
            .as_ref()
            .zip(status.as_ref().and_then(|status| status.groups.iter().find(|group| group.name == account.group)));
        let delivered = group.map_or(EntryId::MIN, |(_, group)| group.last_delivered);
        let counted = group.map(|(stream, group)| store::Balance::of(stream, group, Consumption::Inside));
        let pending = pending_ids(store, &account.cursor()).await;
        let entries = read_all(store, &account.stream, everything).await;
        let letters = read_all(store, &account.dead_letter, everything).await;
        let letters: Vec<DeadLetter> = letters.iter().filter_map(DeadLetter::from_entry).collect();

        let handled = lock(&self.handled);
        let mut balance = Balance {
            handled: handled.len(),
            repeated: handled.values().map(|attempts| attempts.len() - 1).sum(),
            pending: pending.len(),
            dead: letters.len(),
            difference: counted.and_then(|counted| counted.difference),
            ..Balance::default()
        };
        let mut dead: BTreeSet<String> = BTreeSet::new();
        for letter in letters.iter().filter(|letter| letter.stream == account.stream) {
            let name = name_of(&letter.fields, letter.id);
            if !dead.insert(name.clone()) {
                balance.doubled.push(name);
            }
        }
        let mut stored: BTreeMap<String, EntryId> = BTreeMap::new();
        for entry in &entries {
            let name = name_of(&entry.fields, entry.id);
            let is_done = handled.contains_key(&name) || dead.contains(&name);
            if entry.id > delivered {
                balance.undelivered += 1;
            } else if !is_done && !pending.contains(&entry.id) {
                balance.unaccounted.push(name.clone());
            }
            if stored.insert(name.clone(), entry.id).is_some() {
                balance.doubled.push(name);
            }
        }
        let promised = lock(&self.promised);
        balance.promised = promised.len();
        for name in promised.keys() {
            let is_waiting = stored.get(name).is_some_and(|id| *id > delivered || pending.contains(id));
            if !is_waiting && !handled.contains_key(name) && !dead.contains(name) {
                balance.missing.push(name.clone());
            }
        }
        balance
    }
}

/// The name of an event, or else where it is.
fn name_of(fields: &Fields, id: EntryId) -> String {
    let data = fields.get(field::DATA).and_then(|data| serde_json::from_slice::<Value>(data).ok());
    data.and_then(|data| Some(data["id"].as_str()?.to_owned())).unwrap_or_else(|| format!("entry {id}"))
}

async fn read_all(store: &dyn Store, stream: &StreamName, mut range: Range) -> Vec<Entry> {
    let mut all = Vec::new();
    loop {
        let page = until("a page", BOUND, async || store.range(stream, range, 1000).await.ok()).await;
        let Some(last) = page.last() else { return all };
        range.from = last.id.next();
        all.extend(page);
    }
}

async fn pending_ids(store: &dyn Store, cursor: &Cursor) -> BTreeSet<EntryId> {
    let (mut all, mut from) = (BTreeSet::new(), EntryId::MIN);
    loop {
        // Without its group, nothing is pending.
        let page = store.pending(cursor, false, from, 1000).await.unwrap_or_default();
        let Some(last) = page.last() else { return all };
        from = last.id.next();
        all.extend(page.into_iter().map(|pending| pending.id));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
