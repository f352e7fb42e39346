//! Servers that stand still, connections that swallow, replies that are lost, readers that wait.

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
    a_server_that_stands_still_costs_nothing_and_doubles_nothing
    each_connection_that_swallows_everything_is_replaced_in_time
    lost_replies_double_nothing_and_lose_nothing
    readers_that_wait_do_not_hold_up_publishers
}

/// How long it may take to heal: a fetch blocks for 1 s, and 4 s later all is to be well.
const HEALED: Duration = Duration::from_secs(5);

async fn a_server_that_stands_still_costs_nothing_and_doubles_nothing(product: Product) {
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
        assert!(answer.is_err(), "accepted by a server that stands still");
        assert!(asked.elapsed() < Duration::from_secs(6), "answered after {:?}", asked.elapsed());
        waiting.push(events);
    }
    site.server.signal("CONT");
    for events in waiting {
        site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    }
    let lines = site.ledger.has_handled(&daemon, site.ledger.promised()).await;
    assert_quiet(&lines, stopped);
    site.settled().await.assert_settled();
    daemon.stop().await;
}

async fn each_connection_that_swallows_everything_is_replaced_in_time(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    let publisher = site.ledger.events(1, 10);
    // The reader of the stream, the connection that acknowledges, and the one that appends.
    for part in [FETCH, ACKNOWLEDGEMENT, publisher[0].name.as_bytes()] {
        let begun = Instant::now();
        site.publish_and_handle(&daemon, 20).await;
        site.settled().await.assert_settled();
        // What takes this long while all is well takes longer on a busy machine.
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
        assert!(site.proxy.has_black_hole(), "nothing was swallowed");
        assert!(begun.elapsed() < limit, "healed after {:?}, not {limit:?}", begun.elapsed());
        balance.assert_settled();
        assert_quiet(&lines, begun);
        let opened = site.proxy.connections() - connections;
        assert!((1..=3).contains(&opened), "{opened} connections were opened in place of one");
    }
    daemon.stop().await;
}

async fn lost_replies_double_nothing_and_lose_nothing(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;

    // An append: the publisher is told that nothing is known, and asks again.
    let events = site.ledger.events(3, 10);
    site.proxy.drop_reply_to(events[1].name.as_bytes());
    site.ledger.publish(&daemon, &site.account.stream, &events).await.expect_err("the answer was lost");
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    site.ledger.has_handled(&daemon, 13).await;

    // A fetch with entries in it, and an acknowledgement.
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
    assert_eq!((balance.handled, balance.dead), (balance.promised, 1));
    assert_eq!(site.server.cli(&["XLEN", STREAM]), (balance.promised + 1).to_string());
    assert_eq!(site.server.cli(&["XLEN", site.account.dead_letter.as_str()]), "1");

    // Its replay: the operator is told that nothing is known, and asks again. It dies again, and once.
    site.proxy.drop_reply_to(b"lost-letter");
    let url = daemon.url(&format!("/api/v1/dead-letters/{STREAM}/replay"));
    let letters = site.server.cli(&["XRANGE", site.account.dead_letter.as_str(), "-", "+"]);
    let body = format!(r#"{{"ids":["{}"]}}"#, letters.lines().next().expect("a letter"));
    let replay = async || client().post(&url).body(body.clone()).send().await.expect("an answer");
    assert_eq!(replay().await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let done =
        until("a replay", BOUND, async || replay().await.json::<Value>().await.ok().filter(|v| v["code"].is_null()));
    let done = done.await;
    assert_eq!((&done["replayed"], &done["repeated"]), (&0.into(), &1.into()), "{done}");
    let buried = async || daemon.metric("aurora_bus_dead_letters_total").await;
    until("another dead letter", BOUND, async || (buried().await == 2).then_some(())).await;
    assert_eq!(site.server.cli(&["XLEN", STREAM]), (balance.promised + 2).to_string());
    assert_eq!(site.server.cli(&["XLEN", site.account.dead_letter.as_str()]), "1");
    daemon.stop().await;
}

/// How long the slowest but one of a hundred appends takes: one slow answer may have other reasons.
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

async fn readers_that_wait_do_not_hold_up_publishers(product: Product) {
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
    // Beside a server of the same kind without readers, for the machine may be busy; of many rounds the best: whoever is
    // held up by readers is so in each.
    let quiet = RedisServer::start(product, &[]).await;
    let config = Config { url: quiet.url().into(), ..Config::default() };
    let alone = config.connect().await.expect("a valid configuration");
    let (mut with_readers, mut without) = (Duration::MAX, Duration::MAX);
    let is_held_up = |with_readers, without| with_readers >= without + Duration::from_millis(10);
    for round in 0..40 {
        with_readers = with_readers.min(slow_append(&*store).await);
        without = without.min(slow_append(&alone).await);
        if round >= 5 && !is_held_up(with_readers, without) {
            break;
        }
    }
    let is_held_up = is_held_up(with_readers, without);
    assert!(!is_held_up, "an append took {with_readers:?}, and {without:?} where no readers wait");
    readers.abort_all();
}
