//! Paused servers, black holes, lost replies and waiting readers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::store::redis::Config;
use aurora_bus::store::{Start, Store};
use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;

use super::{ACKNOWLEDGEMENT, FETCH, STREAM, Site, assert_quiet, on_every_product};
use crate::store_contract::{cursor, new_entry, unique_stream};
use crate::support::app::{BOUND, client};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    paused_server_loses_and_duplicates_nothing
    each_black_hole_connection_is_replaced_in_time
    lost_replies_lose_and_duplicate_nothing
    waiting_readers_do_not_delay_producers
}

/// The limit for a recovery: a fetch blocks for 1 s, and all must work 4 s later.
const HEALED: Duration = Duration::from_secs(5);

async fn paused_server_loses_and_duplicates_nothing(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 100).await;
    site.server.signal("STOP");
    let stopped = Instant::now();
    let mut waiting = Vec::new();
    while stopped.elapsed() < Duration::from_secs(15) {
        let events = site.ledger.events(20, 10);
        let asked = Instant::now();
        let answer = site.ledger.publish(&daemon, &site.account.stream, &events).await;
        assert!(answer.is_err(), "accepted by a paused server");
        assert!(asked.elapsed() < Duration::from_secs(6), "answered after {:?}", asked.elapsed());
        waiting.push(events);
    }
    site.server.signal("CONT");
    for events in waiting {
        site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    }
    let lines = site.ledger.wait_handled(&daemon, site.ledger.accepted_count()).await;
    assert_quiet(&lines, stopped);
    site.settled().await.assert_settled();
    daemon.stop().await;
}

async fn each_black_hole_connection_is_replaced_in_time(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    let publisher = site.ledger.events(1, 10);
    // The reader of the stream, the connection of acknowledgements, and the connection of appends.
    for part in [FETCH, ACKNOWLEDGEMENT, publisher[0].name.as_bytes()] {
        let begun = Instant::now();
        site.publish_and_handle(&daemon, 20).await;
        site.settled().await.assert_settled();
        // A busy machine may need longer even without a fault.
        let limit = HEALED + 5 * begun.elapsed();
        let connections = site.proxy.connections();
        site.proxy.black_hole_at(part);
        if part == FETCH {
            until("a black hole", BOUND, async || site.proxy.has_black_hole().then_some(())).await;
        }
        let begun = Instant::now();
        if part == publisher[0].name.as_bytes() {
            site.ledger.publish_until_accepted(&daemon, &site.account.stream, &publisher).await;
        }
        let lines = site.publish_and_handle(&daemon, 20).await;
        let balance = site.settled().await;
        assert!(site.proxy.has_black_hole(), "no black hole");
        assert!(begun.elapsed() < limit, "recovered after {:?}, not {limit:?}", begun.elapsed());
        balance.assert_settled();
        assert_quiet(&lines, begun);
        let opened = site.proxy.connections() - connections;
        assert!((1..=3).contains(&opened), "{opened} connections were opened in place of one");
    }
    daemon.stop().await;
}

async fn lost_replies_lose_and_duplicate_nothing(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;

    // An append: the producer gets no result, and retries.
    let events = site.ledger.events(3, 10);
    site.proxy.drop_reply_to(events[1].name.as_bytes());
    site.ledger.publish(&daemon, &site.account.stream, &events).await.expect_err("the answer was lost");
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    site.ledger.wait_handled(&daemon, 13).await;

    // A fetch with entries, and an acknowledgement.
    for part in [FETCH, ACKNOWLEDGEMENT] {
        let dropped = site.proxy.dropped();
        site.proxy.drop_reply_to(part);
        until("a lost reply", BOUND, async || {
            site.publish_and_handle(&daemon, 20).await;
            (site.proxy.dropped() > dropped).then_some(())
        })
        .await;
    }
    site.settled().await.assert_settled();

    // A dead letter.
    let dropped = site.proxy.dropped();
    site.proxy.drop_reply_to(b"lost-letter");
    site.server.cli(&["XADD", STREAM, "*", "no-data", "lost-letter"]);
    until("a lost reply", BOUND, async || (site.proxy.dropped() > dropped).then_some(())).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.dead), (balance.accepted, 1));
    assert_eq!(site.server.cli(&["XLEN", STREAM]), (balance.accepted + 1).to_string());
    assert_eq!(site.server.cli(&["XLEN", site.account.dead_letter.as_str()]), "1");

    // Its replay: the operator gets no result, and retries. The entry is dead-lettered again, once.
    site.proxy.drop_reply_to(b"lost-letter");
    let url = daemon.url(&format!("/api/v1/dead-letters/{STREAM}/replay"));
    let dead_letters = site.server.cli(&["XRANGE", site.account.dead_letter.as_str(), "-", "+"]);
    let body = format!(r#"{{"ids":["{}"]}}"#, dead_letters.lines().next().expect("a dead letter"));
    let replay = async || client().post(&url).body(body.clone()).send().await.expect("a response");
    assert_eq!(replay().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let done =
        until("a replay", BOUND, async || replay().await.json::<Value>().await.ok().filter(|v| v["code"].is_null()));
    let done = done.await;
    assert_eq!((&done["replayed"], &done["repeated"]), (&0.into(), &1.into()), "{done}");
    let dead_letter_count = async || daemon.metric("aurora_bus_dead_letters_total").await;
    until("another dead letter", BOUND, async || (dead_letter_count().await == 2).then_some(())).await;
    assert_eq!(site.server.cli(&["XLEN", STREAM]), (balance.accepted + 2).to_string());
    assert_eq!(site.server.cli(&["XLEN", site.account.dead_letter.as_str()]), "1");
    daemon.stop().await;
}

/// Returns the time of the second slowest of a hundred appends. One slow append may have other reasons.
async fn slow_append(store: &dyn Store) -> Duration {
    let stream = unique_stream();
    let mut times = Vec::new();
    for n in 0..100 {
        let asked = Instant::now();
        store.append(&stream, vec![new_entry(&n.to_string())]).await.expect("appended");
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    times[98]
}

async fn waiting_readers_do_not_delay_producers(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    let config = Config { url: server.url().into(), ..Config::default() };
    let store: Arc<dyn Store> = Arc::new(config.connect().await.expect("a valid configuration"));
    let stream = unique_stream();
    let mut readers = JoinSet::new();
    for n in 0..16 {
        let of = cursor(&stream, "g", &format!("reader-{n}"));
        store.ensure_group(&stream, &of.group, Start::Oldest).await.expect("a group");
        let store = Arc::clone(&store);
        readers.spawn(async move {
            loop {
                store.fetch(&of, 1, Duration::from_secs(2)).await.expect("fetched");
            }
        });
    }
    until("waiting readers", BOUND, async || {
        server.cli(&["INFO", "clients"]).contains("blocked_clients:16").then_some(())
    })
    .await;
    // Compared with a server without readers, because the machine may be busy. The best of many rounds counts: readers
    // that delay an append do so in each.
    let quiet = RedisServer::start(product, &[]).await;
    let config = Config { url: quiet.url().into(), ..Config::default() };
    let alone = config.connect().await.expect("a valid configuration");
    let (mut with_readers, mut without) = (Duration::MAX, Duration::MAX);
    let is_delayed = |with_readers, without| with_readers >= without + Duration::from_millis(10);
    for round in 0..40 {
        with_readers = with_readers.min(slow_append(&*store).await);
        without = without.min(slow_append(&alone).await);
        if round >= 5 && !is_delayed(with_readers, without) {
            break;
        }
    }
    let is_delayed = is_delayed(with_readers, without);
    assert!(!is_delayed, "an append took {with_readers:?}, and {without:?} without readers");
    readers.abort_all();
}
