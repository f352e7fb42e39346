//! Workers on a Redis server that fails, loses data or is changed by others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use aurora_bus::sink::SinkErrorClass;
use aurora_bus::store::Store;
use aurora_bus::store::redis::Config;

use super::{Bus, PATIENCE, Reaction, TestSink, firsts, group};
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer};
use crate::support::stores::own_redis;
use crate::support::until;

/// Starts a server with `count` entries.
async fn with_entries(count: u64) -> (RedisServer, Bus) {
    let (server, store) = own_redis().await;
    let bus = Bus::new(store).await;
    bus.publish(1..=count).await;
    (server, bus)
}

/// Starts the same with a worker that has delivered 100 entries.
async fn settled() -> (RedisServer, Bus, Arc<TestSink>) {
    let (server, mut bus) = with_entries(100).await;
    let sink = TestSink::takes_all(10);
    let mut config = group();
    config.claim_idle = Duration::from_secs(2);
    config.handler_timeout = Duration::from_secs(1);
    bus.start("soc-a-0", &sink, config);
    sink.has_taken(100).await;
    bus.is_settled().await;
    (server, bus, sink)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn group_is_made_again_after_a_flush_without_a_gap() {
    let (server, bus, sink) = settled().await;
    server.cli(&["FLUSHALL"]);
    bus.publish(101..=200).await;
    let mut taken = sink.has_taken(200).await;
    taken.sort_unstable();
    assert_eq!(taken, firsts(1..=200));
    assert_eq!(bus.counter("aurora_bus_groups_recreated_total"), 1);
    bus.is_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destroyed_group_continues_at_its_ack_floor() {
    let (server, bus, sink) = settled().await;
    // Each search ends with a read of the ack floor. The second search shows that the first one has ended.
    server.note_commands();
    let searches = || server.commands(&[bus.stream.as_str(), "from"]);
    until("two searches", PATIENCE, async || (searches() >= 2).then_some(())).await;
    assert_eq!(server.cli(&["XGROUP", "DESTROY", bus.stream.as_str(), "siem"]), "1");
    bus.publish(101..=150).await;
    let taken = sink.has_taken(150).await;
    assert_eq!(taken, firsts(1..=150));
    assert_eq!(bus.counter("aurora_bus_groups_recreated_total"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unwritable_dead_letters_wait_and_block_no_ack() {
    let (server, mut bus) = with_entries(20).await;
    server.cli(&["SET", bus.dead_letters.as_str(), "in the way"]);
    let sink = TestSink::new(5, |n, _| if n == 4 { Reaction::Fail(SinkErrorClass::Permanent) } else { Reaction::Take });
    bus.start("soc-a-0", &sink, group());
    sink.has_taken(19).await;
    until("one pending entry", PATIENCE, async || (bus.group().await.pending == 1).then_some(())).await;
    until("reason", PATIENCE, async || bus.readiness.report()[0].reason.clone()).await;
    server.cli(&["DEL", bus.dead_letters.as_str()]);
    assert_eq!(bus.has_dead_letters(1).await[0].fields, super::entry(4, &[("data", "{}")]).fields);
    bus.is_settled().await;
    until("ready worker", PATIENCE, async || bus.readiness.report()[0].reason.is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_waits_for_a_crashed_server() {
    let mut server = RedisServer::durable().await;
    let config = Config { url: server.url().into(), ..Config::default() };
    let store: Arc<dyn Store> = Arc::new(config.connect().await.expect("a valid configuration"));
    let mut bus = Bus::new(store).await;
    bus.publish(1..=500).await;
    let sink = TestSink::new(1, |_, _| Reaction::Sleep(Duration::from_millis(1)));
    let worker = bus.start("soc-a-0", &sink, group());
    sink.has_taken(100).await;
    server.crash();
    until("reason", PATIENCE, async || bus.readiness.report()[0].reason.clone()).await;
    server.restart().await;
    has_taken_all(&sink, 500).await;
    bus.is_settled().await;
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
    bus.stop(worker).await;
}

/// Waits until each of the entries 1 to `last` was taken.
async fn has_taken_all(sink: &TestSink, last: u64) {
    until("all entries", PATIENCE, async || {
        let numbers: BTreeSet<u64> = sink.taken().into_iter().map(|(number, _)| number).collect();
        numbers.iter().copied().eq(1..=last).then_some(())
    })
    .await;
}

async fn through_proxy() -> (RedisServer, Proxy, Bus) {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let proxy = Proxy::start(server.port()).await;
    let config = Config { url: proxy.url().into(), command_timeout: Duration::from_secs(1), ..Config::default() };
    let store: Arc<dyn Store> = Arc::new(config.connect().await.expect("a valid configuration"));
    (server, proxy, Bus::new(store).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_of_a_lost_fetch_reply_are_delivered_soon() {
    let (_server, proxy, mut bus) = through_proxy().await;
    bus.publish(1..=30).await;
    proxy.drop_reply_to(b"XREADGROUP");
    let sink = TestSink::takes_all(50);
    bus.start("soc-a-0", &sink, group());
    let taken = sink.has_taken(30).await;
    assert_eq!((proxy.dropped(), taken), (1, (1..=30).map(|number| (number, 2)).collect()));
    bus.is_settled().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_network_failures_lose_no_entry() {
    let (server, proxy, mut bus) = through_proxy().await;
    bus.publish(1..=600).await;
    let sink = TestSink::new(1, |_, _| Reaction::Sleep(Duration::from_millis(2)));
    bus.start("soc-a-0", &sink, group());
    bus.start("soc-a-1", &sink, group());
    for taken in [50, 150, 250] {
        sink.has_taken(taken).await;
        proxy.reset();
    }
    sink.has_taken(350).await;
    proxy.black_hole_existing();
    has_taken_all(&sink, 600).await;
    until("end of pending entries", PATIENCE, async || {
        let summary = server.cli(&["XPENDING", bus.stream.as_str(), "siem"]);
        summary.starts_with('0').then_some(())
    })
    .await;
    assert_eq!(bus.counter("aurora_bus_dead_letters_total"), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ack_of_an_entry_claimed_by_another_does_not_count() {
    let (server, mut bus) = with_entries(1).await;
    // Longer than half of `claim_idle`: an entry that is settled sooner is settled without a check of its owner.
    let sink = TestSink::new(1, |_, _| Reaction::Sleep(Duration::from_secs(5)));
    let mut config = group();
    config.claim_idle = Duration::from_secs(8);
    bus.start("soc-a-0", &sink, config);
    sink.has_begun(1).await;
    let first = server.cli(&["XRANGE", bus.stream.as_str(), "-", "+", "COUNT", "1"]);
    let id = first.lines().next().expect("an entry");
    server.cli(&["XCLAIM", bus.stream.as_str(), "siem", "soc-b-0", "0", id]);
    sink.has_taken(1).await;
    bus.counts("aurora_bus_not_owned_total", 1).await;
    assert_eq!(bus.counter("aurora_bus_acknowledged_total"), 0);
    let pending = server.cli(&["XPENDING", bus.stream.as_str(), "siem", "-", "+", "1", "soc-b-0"]);
    assert!(pending.starts_with(id), "the other consumer still owns it: {pending}");
}
