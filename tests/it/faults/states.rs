//! Servers that load their data, and servers that are full.

use std::time::{Duration, Instant};

use reqwest::StatusCode;

use super::{MAX_IN_FLIGHT, STREAM, Site, assert_quiet, on_every_product};
use crate::support::app::BOUND;
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

on_every_product! {
    a_server_that_is_killed_and_loads_for_seconds_costs_nothing
    a_full_server_goes_on_with_what_needs_no_room_and_heals
}

async fn a_server_that_is_killed_and_loads_for_seconds_costs_nothing(product: Product) {
    let options = ["--appendonly", "yes", "--appendfsync", "always", "--key-load-delay", "200"];
    let options = [&options[..], &["--aof-use-rdb-preamble", "no"]].concat();
    let mut site = Site::with(RedisServer::start(product, &options).await).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 100).await;
    // Of 200 microseconds each.
    site.server.cli(&["EVAL", "for i = 1, 40000 do redis.call('SET', 'key' .. i, i) end", "0"]);
    site.publish(&daemon, 500).await;
    site.server.crash();
    let killed = Instant::now();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    site.server.restart().await;
    until("word of loading", BOUND, async || {
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
    let lines = site.ledger.has_handled(&daemon, 620).await;
    assert_quiet(&lines, killed);
    let balance = site.settled().await;
    balance.assert_settled();
    // At most what was in hand when the server was killed.
    assert!(balance.repeated <= MAX_IN_FLIGHT, "{balance:?}");
    daemon.stop().await;
}

/// Half of what comes is to be buried, for which there is no room: it stays pending, and holds nothing else up.
async fn a_full_server_goes_on_with_what_needs_no_room_and_heals(product: Product) {
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
    site.ledger.has_handled(&daemon, 110).await;
    let balance = until("the rest in hand", BOUND, async || {
        let balance = site.balance().await;
        (balance.pending == 100 && balance.undelivered == 0).then_some(balance)
    })
    .await;
    balance.assert_kept();
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
    assert!(raised.elapsed() <= Duration::from_secs(5), "healed after {:?}", raised.elapsed());
    site.ledger.has_handled(&daemon, 120).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated, balance.dead), (120, 0, 100), "{balance:?}");
    daemon.stop().await;
}
