//! A clock that steps: entries in hand stay in hand, and the order is kept.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use aurora_bus::delivery::{GroupConfig, GroupSpec, Quarantine, Worker};
use aurora_bus::event::{Delivery, EntryId};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::sink::{Origin, Sink, SinkError};
use aurora_bus::store::redis::Config;
use aurora_bus::store::{Order, Range, Store, embedded};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{CONFIG, GROUP, STREAM};
use crate::support::app::{BOUND, Home};
use crate::support::ledger::{Account, Ledger};
use crate::support::redis::{RedisServer, faketime_library};
use crate::support::until;

const HOUR: i64 = 3600;

/// A sink that blocks every delivery until the test releases it.
#[derive(Debug)]
struct BlockingSink {
    ledger: Arc<Ledger>,
    begun: Mutex<Vec<String>>,
    is_released: watch::Receiver<bool>,
}

#[async_trait]
impl Sink for BlockingSink {
    fn max_batch(&self) -> usize {
        1
    }

    async fn check(&self) -> Result<(), SinkError> {
        Ok(())
    }

    async fn deliver(&self, _: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let name = batch[0].entry.fields.text("id").expect("the ledger's events have ids").to_owned();
        self.begun.lock().expect("unpoisoned").push(name.clone());
        let mut is_released = self.is_released.clone();
        is_released.wait_for(|is_released| *is_released).await.expect("the test keeps the sender");
        self.ledger.record_handled(&name, batch[0].attempt);
        Ok(())
    }
}

/// On the embedded store, the clock is the daemon's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemon_clock_step_keeps_ids_growing_and_repeats_none() {
    let mut home = Home::new(&CONFIG.replace("redis", "embedded").replace("command_timeout", "#"));
    let clock = home.path("clock");
    let set_clock = |seconds: i64| {
        let new = clock.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).expect("a writable folder");
        fs::rename(new, &clock).expect("a writable folder");
    };
    set_clock(0);
    let library = faketime_library();
    home.set_env("LD_PRELOAD", library.to_str().expect("a path in UTF-8"));
    home.set_env("FAKETIME_TIMESTAMP_FILE", clock.to_str().expect("a path in UTF-8"));
    home.set_env("FAKETIME_NO_CACHE", "1");
    home.set_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let (ledger, account) = (Ledger::default(), Account::new(STREAM, GROUP));
    let mut daemon = home.start().await;
    for (round, step) in [0, -HOUR, 2 * HOUR, -2 * HOUR, -3 * HOUR].into_iter().enumerate() {
        set_clock(step);
        for events in ledger.events(50, 10).chunks(10) {
            ledger.publish_until_accepted(&daemon, &account.stream, events).await;
        }
        ledger.wait_handled(&daemon, (round + 1) * 50).await;
        if round == 3 {
            // Ids continue where they were, also after a restart with an earlier clock.
            daemon.handled(STREAM, GROUP).await;
            daemon.stop().await;
            daemon = home.start().await;
        }
    }
    daemon.handled(STREAM, GROUP).await;
    daemon.stop().await;
    let config = embedded::Config { path: home.path("data"), ..embedded::Config::default() };
    let store = config.open().await.expect("opened");
    let last = store.describe(&account.stream).await.expect("described").expect("it exists").last_id;
    let now = u64::try_from(jiff::Timestamp::now().as_millisecond()).expect("after 1970");
    assert!(last.ms > now + 3_600_000, "the clock did not step: {last}");
    let balance = ledger.balance(&store, &account).await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated), (250, 0));
    assert!(names_in_order(&store, &account).await.eq((0..250).map(|n| format!("e-{n}"))));
    store.close().await;
}

/// Returns the names of all events of a stream, in id order.
async fn names_in_order(store: &dyn Store, account: &Account) -> impl Iterator<Item = String> {
    let everything = Range { from: EntryId::MIN, to: EntryId::MAX, order: Order::Forward };
    let entries = store.range(&account.stream, everything, 1000).await.expect("read");
    entries.into_iter().map(|entry| {
        let data: serde_json::Value = serde_json::from_slice(entry.data().expect("a payload")).expect("JSON");
        data["id"].as_str().expect("an id").to_owned()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_clock_step_claims_nothing_and_keeps_order() {
    let server = RedisServer::with_clock(&[]).await;
    let config = Config { url: server.url().into(), ..Config::default() };
    let store: Arc<dyn Store> = Arc::new(config.connect().await.expect("a valid configuration"));
    let account = Account::new("test:clock", "siem");
    let ledger = Arc::new(Ledger::default());
    let (release, is_released) = watch::channel(false);
    let sink = Arc::new(BlockingSink { ledger: ledger.clone(), begun: Mutex::default(), is_released });
    let metrics = Metrics::new();
    let mut workers = JoinSet::new();
    ledger.append(&*store, &account.stream, &ledger.events(10, 10)).await;
    for consumer in ["soc-a-0", "soc-b-0"] {
        let mut config = GroupConfig::new(account.group.clone());
        config.sink = Some("holding".to_owned());
        config.claim_idle = Duration::from_secs(20);
        config.handler_timeout = Duration::from_mins(2);
        config.concurrency = 4;
        let spec = GroupSpec { stream: account.stream.clone(), dead_letter: account.dead_letter.clone(), config };
        let part = Readiness::default().part(consumer, None);
        let consumer = consumer.parse().expect("a valid name");
        let (quarantine, metrics) = (Quarantine::default(), metrics.clone());
        let worker = Worker::new(store.clone(), sink.clone(), spec, consumer, quarantine, metrics, part);
        workers.spawn(worker.run(CancellationToken::new()));
    }
    // After a step backward, entries in hand seem just delivered. After a step forward, they seem idle for hours.
    for (step, more) in [(-HOUR, 5), (2 * HOUR, 5)] {
        server.set_clock(step);
        server.note_commands();
        ledger.append(&*store, &account.stream, &ledger.events(more, 10)).await;
        let searches = |consumer| server.commands(&[consumer, "from"]);
        let have_searched = || ["soc-a-0", "soc-b-0"].into_iter().all(|consumer| searches(consumer) >= 1);
        until("searches by both workers", BOUND, async || have_searched().then_some(())).await;
    }
    release.send_replace(true);
    until("everything handled", BOUND, async || (ledger.handled_count() == 20).then_some(())).await;
    until("a settled account", BOUND, async || {
        let balance = ledger.balance(&*store, &account).await;
        (balance.pending + balance.undelivered == 0).then_some(())
    })
    .await;
    let balance = ledger.balance(&*store, &account).await;
    balance.assert_settled();
    assert_eq!(balance.repeated, 0, "handled twice");
    assert_eq!(sink.begun.lock().expect("unpoisoned").len(), 20, "begun twice");
    let names = names_in_order(&*store, &account).await;
    assert!(names.eq((0..20).map(|n| format!("e-{n}"))), "the order of publishing is the order of the stream");
}
