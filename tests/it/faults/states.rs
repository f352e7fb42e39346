//! Servers that load their data, and servers that are full.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use super::{MAX_IN_FLIGHT, STREAM, Site, assert_quiet, on_every_product};
use crate::support::app::BOUND;
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    killed_server_with_slow_load_loses_nothing
    full_server_serves_other_calls_and_recovers
}

async fn killed_server_with_slow_load_loses_nothing(product: Product) {
    let options = ["--appendonly", "yes", "--appendfsync", "always", "--key-load-delay", "200"];
    let options = [&options[..], &["--aof-use-rdb-preamble", "no"]].concat();
    let mut site = Site::with(RedisServer::start(product, &options).await).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 100).await;
    // Each takes 200 microseconds to load.
    site.server.cli(&["EVAL", "for i = 1, 40000 do redis.call('SET', 'key' .. i, i) end", "0"]);
    site.publish(&daemon, 500).await;
    site.server.crash();
    let killed = Instant::now();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    site.server.restart().await;
    until("readiness while loading", BOUND, async || {
        daemon.body("/ready").await.contains("the server is loading its data").then_some(())
    })
    .await;
    let events = site.ledger.events(20, 10);
    let refused = site.ledger.publish(&daemon, &site.account.stream, &events).await;
    assert_eq!(refused, Err(Some(StatusCode::SERVICE_UNAVAILABLE)));
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    assert!(killed.elapsed() > Duration::from_secs(4), "loaded within {:?}", killed.elapsed());
    daemon.ready(StatusCode::OK).await;
    let lines = site.ledger.wait_handled(&daemon, 620).await;
    assert_quiet(&lines, killed);
    let balance = site.settled().await;
    balance.assert_settled();
    // At most the entries in hand when the server was killed.
    assert!(balance.repeated <= MAX_IN_FLIGHT, "{balance:?}");
    daemon.stop().await;
}

/// Half of the entries must become dead letters, for which there is no room. They stay pending and block nothing else.
async fn full_server_serves_other_calls_and_recovers(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    daemon.signal("STOP");
    for _ in 0..10 {
        let events = site.ledger.events(10, 10);
        site.ledger.append(&*site.store, &site.account.stream, &events).await;
        let unreadable = "for i = 1, 10 do redis.call('XADD', KEYS[1], '*', 'data', 'not json') end";
        site.server.cli(&["EVAL", unreadable, "1", STREAM]);
    }
    site.server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    daemon.signal("CONT");
    site.ledger.wait_handled(&daemon, 110).await;
    let balance = until("handled rest", BOUND, async || {
        let balance = site.balance().await;
        (balance.pending == 100 && balance.undelivered == 0).then_some(balance)
    })
    .await;
    balance.assert_nothing_lost();
    assert_eq!((balance.handled, balance.dead), (110, 0), "{balance:?}");
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    let events = site.ledger.events(10, 10);
    let refused = site.ledger.publish(&daemon, &site.account.stream, &events).await;
    assert_eq!(refused, Err(Some(StatusCode::INSUFFICIENT_STORAGE)));

    site.server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    let raised = Instant::now();
    site.ledger.publish_until_accepted(&daemon, &site.account.stream, &events).await;
    daemon.ready(StatusCode::OK).await;
    assert!(raised.elapsed() <= Duration::from_secs(5), "recovered after {:?}", raised.elapsed());
    site.ledger.wait_handled(&daemon, 120).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated, balance.dead), (120, 0, 100), "{balance:?}");
    daemon.stop().await;
}
