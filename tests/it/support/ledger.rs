//! The ledger: every event that was accepted, and its fate.
//!
//! Events have names. A publish records the name when the event is accepted. A sink, or the log of a daemon with the
//! sink `log`, shows the names of the handled events and the number of times. [`Ledger::balance`] then reads the rest
//! from the store: dead, pending and undelivered events. An event in none of these was lost; the balance names it.

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

/// The accepted and the handled events.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    next: AtomicU64,
    /// Entry ids by the names of the accepted events.
    accepted: Mutex<BTreeMap<String, String>>,
    /// Attempts by the names of the handled events, one for each time that an event was handled.
    handled: Mutex<BTreeMap<String, Vec<u32>>>,
}

/// An event and its name.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) payload: String,
}

/// The stream, the group and the dead-letter stream of a balance.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    pub(crate) stream: StreamName,
    pub(crate) group: GroupName,
    pub(crate) dead_letter: StreamName,
}

/// The number of events by fate, and the names of the wrong ones.
#[derive(Debug, Default)]
pub(crate) struct Balance {
    pub(crate) accepted: usize,
    pub(crate) handled: usize,
    /// Number of times that a sink received an event that it had handled already.
    pub(crate) repeated: usize,
    pub(crate) dead: usize,
    pub(crate) pending: usize,
    pub(crate) undelivered: usize,
    /// Accepted, and nowhere.
    pub(crate) missing: Vec<String>,
    /// Acknowledged, although no sink handled them and they are not dead.
    pub(crate) unaccounted: Vec<String>,
    /// More than once in the stream or in the dead letters.
    pub(crate) duplicated: Vec<String>,
    /// Error of the group's account in the store; `None` while the store cannot know it.
    pub(crate) difference: Option<i64>,
}

impl Balance {
    /// Fails if an event is lost or stored twice.
    #[track_caller]
    pub(crate) fn assert_nothing_lost(&self) {
        assert!(self.accepted > 0, "nothing was accepted at all");
        let is_complete = self.missing.is_empty() && self.unaccounted.is_empty() && self.duplicated.is_empty();
        assert!(is_complete, "{self:#?}");
    }

    /// Fails also if an event is neither handled nor dead, or if the store's account differs.
    #[track_caller]
    pub(crate) fn assert_settled(&self) {
        self.assert_nothing_lost();
        assert_eq!(self.difference, Some(0), "{self:#?}");
        assert_eq!((self.pending, self.undelivered), (0, 0), "{self:#?}");
    }
}

impl Account {
    /// Makes an account from names, with the default dead-letter stream.
    pub(crate) fn new(stream: &str, group: &str) -> Self {
        let stream: StreamName = stream.parse().expect("a valid name");
        Self { dead_letter: stream.default_dead_letter(), group: group.parse().expect("a valid name"), stream }
    }

    /// Returns a cursor for queries, of a consumer that fetches nothing.
    pub(crate) fn cursor(&self) -> Cursor {
        let consumer = "auditor".parse().expect("a valid name");
        let claim_idle = Duration::from_mins(1);
        Cursor { stream: self.stream.clone(), group: self.group.clone(), consumer, claim_idle, lease: None }
    }
}

impl Ledger {
    /// Returns new events, each of about `pad` bytes.
    pub(crate) fn events(&self, count: u64, pad: usize) -> Vec<Event> {
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        let event = |number| {
            let name = format!("e-{number}");
            let payload = json!({ "id": name, "title": name, "severity": "high", "pad": "x".repeat(pad) }).to_string();
            Event { name, payload }
        };
        (first..first + count).map(event).collect()
    }

    /// Publishes events to a daemon with their ids as idempotency keys.
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
            self.record_accepted(&event.name, &id);
        }
        Ok(())
    }

    /// Publishes events and retries until they are accepted.
    pub(crate) async fn publish_until_accepted(&self, daemon: &Daemon, stream: &StreamName, events: &[Event]) {
        until("accepted events", BOUND, async || self.publish(daemon, stream, events).await.ok()).await;
    }

    /// Appends events to a store, as a producer that bypasses the daemon.
    pub(crate) async fn append(&self, store: &dyn Store, stream: &StreamName, events: &[Event]) {
        let entries = events.iter().map(|event| {
            let mut fields = Fields::default();
            fields.push(field::ID, event.name.clone());
            fields.push(field::DATA, event.payload.clone());
            NewEntry { fields, idempotency: None }
        });
        let appended = store.append(stream, entries.collect()).await.expect("the store responds");
        for (event, appended) in events.iter().zip(appended) {
            self.record_accepted(&event.name, &appended.id.to_string());
        }
    }

    /// Records that an event was accepted as this entry.
    pub(crate) fn record_accepted(&self, name: &str, id: &str) {
        let known = lock(&self.accepted).insert(name.to_owned(), id.to_owned());
        assert!(known.is_none_or(|known| known == id), "{name} was accepted twice, as {id} as well");
    }

    /// Records that a sink handled an event.
    pub(crate) fn record_handled(&self, name: &str, attempt: u32) {
        lock(&self.handled).entry(name.to_owned()).or_default().push(attempt);
    }

    /// Records the log lines of a daemon's sink `log` since the last call. Returns all other lines.
    pub(crate) fn read_log(&self, daemon: &Daemon) -> Vec<String> {
        let mut others = Vec::new();
        for line in daemon.take_log() {
            match serde_json::from_str::<Value>(&line) {
                Ok(record) if record["sink"] == "log" && record["title"].is_string() => {
                    let attempt = record["attempt"].as_u64().and_then(|n| u32::try_from(n).ok()).expect("an attempt");
                    self.record_handled(record["title"].as_str().expect("a title"), attempt);
                }
                _ => others.push(line),
            }
        }
        others
    }

    /// Waits until the sink has handled `count` different events. Returns the other lines of the daemon's log.
    pub(crate) async fn wait_handled(&self, daemon: &Daemon, count: usize) -> Vec<String> {
        let mut others = Vec::new();
        let what = format!("{count} handled events");
        until(&what, BOUND, async || {
            others.extend(self.read_log(daemon));
            (self.handled_count() >= count).then_some(())
        })
        .await;
        others
    }

    /// Returns the number of different events that were handled.
    pub(crate) fn handled_count(&self) -> usize {
        lock(&self.handled).len()
    }

    /// Returns the number of accepted events.
    pub(crate) fn accepted_count(&self) -> usize {
        lock(&self.accepted).len()
    }

    /// Returns the names of the accepted events.
    pub(crate) fn accepted_names(&self) -> BTreeSet<String> {
        lock(&self.accepted).keys().cloned().collect()
    }

    /// Removes all accepted events, because the test itself has deleted the stream.
    pub(crate) fn forget_accepted(&self) {
        lock(&self.accepted).clear();
    }

    /// Compares the accepted events with the handled ones and with the store. Nothing may be published meanwhile.
    pub(crate) async fn balance(&self, store: &dyn Store, account: &Account) -> Balance {
        let everything = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
        // Pending entries are read first. If one ends meanwhile, it is then found in its new state.
        let status = store.describe(&account.stream).await.expect("the store responds");
        let group = status
            .as_ref()
            .zip(status.as_ref().and_then(|status| status.groups.iter().find(|group| group.name == account.group)));
        let delivered = group.map_or(EntryId::MIN, |(_, group)| group.last_delivered);
        let counted = group.map(|(stream, group)| store::Balance::of(stream, group, Consumption::Inside));
        let pending = pending_ids(store, &account.cursor()).await;
        let entries = read_all(store, &account.stream, everything).await;
        let dead_letters = read_all(store, &account.dead_letter, everything).await;
        let dead_letters: Vec<DeadLetter> = dead_letters.iter().filter_map(DeadLetter::from_entry).collect();

        let handled = lock(&self.handled);
        let mut balance = Balance {
            handled: handled.len(),
            repeated: handled.values().map(|attempts| attempts.len() - 1).sum(),
            pending: pending.len(),
            dead: dead_letters.len(),
            difference: counted.and_then(|counted| counted.difference),
            ..Balance::default()
        };
        let mut dead: BTreeSet<String> = BTreeSet::new();
        for dead_letter in dead_letters.iter().filter(|dead_letter| dead_letter.stream == account.stream) {
            let name = name_of(&dead_letter.fields, dead_letter.id);
            if !dead.insert(name.clone()) {
                balance.duplicated.push(name);
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
                balance.duplicated.push(name);
            }
        }
        let accepted = lock(&self.accepted);
        balance.accepted = accepted.len();
        for name in accepted.keys() {
            let is_waiting = stored.get(name).is_some_and(|id| *id > delivered || pending.contains(id));
            if !is_waiting && !handled.contains_key(name) && !dead.contains(name) {
                balance.missing.push(name.clone());
            }
        }
        balance
    }
}

/// Returns the name of an event, or its entry id if it has none.
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
        // A missing group has no pending entries.
        let page = store.pending(cursor, false, from, 1000).await.unwrap_or_default();
        let Some(last) = page.last() else { return all };
        from = last.id.next();
        all.extend(page.into_iter().map(|pending| pending.id));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
