//! Undecodable entries, and entries that kill the process that handles them.

use std::sync::Arc;

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, GroupSpec, Quarantine, Worker};
use aurora_bus::event::{DeadLetter, DeadLetterReason, Delivery, EntryId};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::sink::{Origin, Sink, SinkError};
use aurora_bus::store::redis::Config;
use aurora_bus::store::{Order, Range, Store, embedded};
use reqwest::StatusCode;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{STREAM, Site, on_every_product};
use crate::support::app::{BOUND, client};
use crate::support::ledger::{Account, Ledger};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    undecodable_entries_are_dead_lettered_unchanged
    entry_that_kills_its_handler_is_dead_lettered
}

const EVERYTHING: Range = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };

async fn undecodable_entries_are_dead_lettered_unchanged(product: Product) {
    let site = Site::new(product).await;
    let long = "x".repeat(100_000);
    // Fields as a foreign producer may write them. The group's filter must read the payload.
    let bad: [&[&str]; 8] = [
        &["data", "not json"],
        &["data", ""],
        &["data", "[1, 2]"],
        &["payload", "{}"],
        &["", ""],
        &["data", "nul\u{0}", "data", "{}"],
        &["twice", "1", "twice", "2", "data", "{\"severity\":"],
        &["data", &long],
    ];
    for (place, fields) in bad.iter().enumerate() {
        let events = site.ledger.events(5, 10);
        site.ledger.append(&*site.store, &site.account.stream, &events).await;
        // redis-cli cannot pass a zero byte or bytes that are not UTF-8, so a script makes them.
        let script = "local f = {} for i, v in ipairs(ARGV) do f[i] = v:gsub('nul', '\\0\\255') end \
                      return redis.call('XADD', KEYS[1], '*', unpack(f))";
        let fields: Vec<String> = fields.iter().map(|text| text.replace('\u{0}', "")).collect();
        let command: Vec<&str> =
            ["EVAL", script, "1", STREAM].into_iter().chain(fields.iter().map(String::as_str)).collect();
        assert!(site.server.cli(&command).contains('-'), "{place} was not added");
    }
    let originals = site.store.range(&site.account.stream, EVERYTHING, 1000).await.expect("read");
    let daemon = site.home.start().await;
    site.ledger.wait_handled(&daemon, 40).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated, balance.dead), (40, 0, 8), "{balance:?}");
    for entry in site.store.range(&site.account.dead_letter, EVERYTHING, 1000).await.expect("read") {
        let letter = DeadLetter::from_entry(&entry).expect("a dead letter");
        assert_eq!((letter.reason, letter.attempts), (DeadLetterReason::Undecodable, 1));
        let original = originals.iter().find(|original| original.id == letter.id).expect("it was in the stream");
        assert_eq!(letter.fields, original.fields);
    }

    // A request that is too large is rejected, and the connection stays usable.
    let url = daemon.url(&format!("/api/v1/streams/{STREAM}/events"));
    let large = format!("{{\"pad\":\"{}\"}}", "x".repeat(1 << 20));
    let answer = client().post(&url).body(large).send().await.expect("a response");
    assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
    site.publish_and_handle(&daemon, 20).await;
    site.settled().await.assert_settled();
    assert_eq!(daemon.metric("aurora_bus_dead_letters_total").await, 8);
    daemon.stop().await;
}

/// A sink that handles all events but one. For that one it never returns, like a process that is about to die.
#[derive(Debug)]
struct Deadly {
    ledger: Arc<Ledger>,
    victim: String,
    dying: mpsc::Sender<()>,
}

#[async_trait]
impl Sink for Deadly {
    fn max_batch(&self) -> usize {
        10
    }

    async fn check(&self) -> Result<(), SinkError> {
        Ok(())
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        for delivery in batch {
            let name = delivery.entry.fields.text("id").expect("the ledger's events have ids");
            if name == self.victim {
                self.dying.send(()).await.expect("the test waits for it");
                std::future::pending::<()>().await;
            }
            self.ledger.record_handled(name, delivery.attempt);
        }
        Ok(())
    }
}

const MAX_DELIVERIES: u32 = 4;

/// Kills a worker at one event until that event is dead-lettered. All other events are handled.
async fn survives_a_deadly_entry(open: impl AsyncFn() -> Arc<dyn Store>) {
    let account = Account::new("test:deadly", "siem");
    let ledger = Arc::new(Ledger::default());
    let store = open().await;
    let events = ledger.events(100, 10);
    ledger.append(&*store, &account.stream, &events).await;
    store.close().await;
    drop(store);
    let (dying, mut deaths) = mpsc::channel(1);
    let sink = Arc::new(Deadly { ledger: ledger.clone(), victim: events[42].name.clone(), dying });
    let metrics = Metrics::new();
    let mut crashes = 0;
    let store = loop {
        let store = open().await;
        let mut config = GroupConfig::new(account.group.clone());
        config.sink = Some("deadly".to_owned());
        config.max_deliveries = MAX_DELIVERIES;
        config.retry.max_attempts = MAX_DELIVERIES;
        let spec = GroupSpec { stream: account.stream.clone(), dead_letter: account.dead_letter.clone(), config };
        let part = Readiness::default().part("worker", None);
        let consumer = "soc-a-0".parse().expect("a valid name");
        let (quarantine, metrics) = (Quarantine::default(), metrics.clone());
        let worker = Worker::new(store.clone(), sink.clone(), spec, consumer, quarantine, metrics, part);
        let mut running = JoinSet::new();
        running.spawn(worker.run(CancellationToken::new()));
        let dead_letters = until("a death or the end", BOUND, async || {
            if deaths.try_recv().is_ok() {
                return Some(0);
            }
            let dead_letters = store.range(&account.dead_letter, EVERYTHING, 10).await.expect("read").len();
            (dead_letters > 0 && ledger.handled_count() >= 99).then_some(dead_letters)
        })
        .await;
        if dead_letters > 0 {
            until("a settled account", BOUND, async || {
                let balance = ledger.balance(&*store, &account).await;
                (balance.pending + balance.undelivered == 0).then_some(())
            })
            .await;
            break store;
        }
        crashes += 1;
        running.abort_all();
        drop(running);
        store.close().await;
    };
    let balance = ledger.balance(&*store, &account).await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.dead), (99, 1));
    let letter = store.range(&account.dead_letter, EVERYTHING, 10).await.expect("read").remove(0);
    let letter = DeadLetter::from_entry(&letter).expect("a dead letter");
    assert_eq!((letter.reason, letter.fields.text("id")), (DeadLetterReason::Crashed, Some(&*events[42].name)));
    assert!(crashes <= MAX_DELIVERIES, "{crashes} processes died");
    store.close().await;
}

async fn entry_that_kills_its_handler_is_dead_lettered(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    survives_a_deadly_entry(async || {
        let config = Config { url: server.url().into(), ..Config::default() };
        Arc::new(config.connect().await.expect("a valid configuration")) as Arc<dyn Store>
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entry_that_kills_its_handler_is_dead_lettered_on_embedded() {
    let folder = tempfile::tempdir().expect("a folder");
    survives_a_deadly_entry(async || {
        let config = embedded::Config { path: folder.path().to_owned(), ..embedded::Config::default() };
        // The aborted worker may hold the last reference to the store for a moment.
        let store = until("a free folder", BOUND, async || config.clone().open().await.ok()).await;
        Arc::new(store) as Arc<dyn Store>
    })
    .await;
}
