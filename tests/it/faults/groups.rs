//! Groups and streams that are removed while readers wait on them.

use std::time::{Duration, Instant};

use aurora_bus::store::StoreErrorKind;
use reqwest::StatusCode;

use super::{GROUP, MAX_IN_FLIGHT, OTHER_STREAM, STREAM, Site, assert_quiet, on_every_product};
use crate::support::app::BOUND;
use crate::support::redis::Product;
use crate::support::until;

on_every_product! {
    flush_while_readers_wait_loses_no_later_event
    key_removed_while_readers_wait_is_followed_again
    foreign_key_affects_its_stream_only_and_recovers
    destroyed_group_resumes_with_unhandled_entries
    late_daemon_handles_existing_entries
}

async fn flush_while_readers_wait_loses_no_later_event(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 50).await;
    site.settled().await.assert_settled();
    site.readers_wait(3).await;

    let flushed = Instant::now();
    site.server.cli(&["FLUSHALL"]);
    site.ledger.forget_accepted();
    // No producer makes the stream again: the worker itself must find out.
    until("the group again", Duration::from_secs(3), async || {
        site.server.cli(&["XINFO", "GROUPS", STREAM]).contains("alert-processor").then_some(())
    })
    .await;
    site.publish(&daemon, 1000).await;
    let lines = site.ledger.wait_handled(&daemon, 1050).await;
    assert_quiet(&lines, flushed);
    site.settled().await.assert_settled();
    assert!(daemon.metric("aurora_bus_groups_recreated_total").await >= 1);
    assert_eq!(daemon.metric("aurora_bus_dead_letters_total").await, 0);
    daemon.ready(StatusCode::OK).await;
    daemon.stop().await;
}

async fn key_removed_while_readers_wait_is_followed_again(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    let faults: [&[&str]; 4] =
        [&["DEL", STREAM], &["RENAME", STREAM, "elsewhere"], &["PEXPIRE", STREAM, "1"], &["SWAPDB", "0", "1"]];
    for fault in faults {
        site.readers_wait(3).await;
        let begun = Instant::now();
        site.server.cli(fault);
        // The removed entries were handled before.
        site.ledger.forget_accepted();
        until("removed key", BOUND, async || (site.server.cli(&["XLEN", STREAM]) == "0").then_some(())).await;
        let lines = site.publish_and_handle_more(&daemon, 20).await;
        assert_quiet(&lines, begun);
        daemon.ready(StatusCode::OK).await;
        site.settled().await.assert_settled();
    }
    daemon.stop().await;
}

async fn foreign_key_affects_its_stream_only_and_recovers(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    site.readers_wait(3).await;
    let begun = Instant::now();
    site.server.cli(&["SET", STREAM, "in the way"]);
    site.ledger.forget_accepted();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    until("readiness of that stream only", BOUND, async || {
        let parts = reqwest::get(daemon.url("/ready")).await.ok()?.text().await.ok()?;
        let parts: serde_json::Value = serde_json::from_str(&parts).expect("JSON");
        let parts = parts.to_string();
        (parts.contains("not a stream") && parts.contains(STREAM)).then_some(())
    })
    .await;
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    let error = site.store.describe(&site.account.stream).await.expect_err("no stream");
    assert_eq!(error.kind(), StoreErrorKind::WrongType);

    let other = OTHER_STREAM.parse().expect("a valid name");
    let events = site.ledger.events(20, 10);
    site.ledger.publish_until_accepted(&daemon, &other, &events).await;
    let mut lines = site.ledger.wait_handled(&daemon, 30).await;
    site.ledger.forget_accepted();

    site.server.cli(&["DEL", STREAM]);
    lines.extend(site.publish_and_handle_more(&daemon, 20).await);
    assert_quiet(&lines, begun);
    daemon.ready(StatusCode::OK).await;
    site.settled().await.assert_settled();
    daemon.stop().await;
}

async fn destroyed_group_resumes_with_unhandled_entries(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 900).await;
    site.settled().await.assert_settled();
    // Each search for idle entries ends with a note of the group's progress. The second one shows the end of the first.
    site.server.note_commands();
    until("two searches", BOUND, async || (site.server.commands(&[STREAM, GROUP, "from"]) >= 2).then_some(())).await;

    daemon.signal("STOP");
    let events = site.ledger.events(100, 10);
    site.ledger.append(&*site.store, &site.account.stream, &events).await;
    assert_eq!(site.server.cli(&["XGROUP", "DESTROY", STREAM, "alert-processor"]), "1");
    daemon.signal("CONT");
    site.ledger.wait_handled(&daemon, 1000).await;
    let balance = site.settled().await;
    // If a group starts in the middle of its stream, the server may not know its lag.
    balance.assert_nothing_lost();
    assert!(balance.difference.is_none_or(|difference| difference == 0), "{balance:?}");
    // At most the entries in hand when the daemon was stopped.
    assert!(balance.repeated <= MAX_IN_FLIGHT, "{balance:?}");
    daemon.stop().await;
}

async fn late_daemon_handles_existing_entries(product: Product) {
    let site = Site::new(product).await;
    let events = site.ledger.events(500, 100);
    site.ledger.append(&*site.store, &site.account.stream, &events).await;
    let daemon = site.home.start().await;
    site.ledger.wait_handled(&daemon, 500).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated), (500, 0));
    until("the counter", BOUND, async || (daemon.metric("aurora_bus_acknowledged_total").await == 500).then_some(()))
        .await;
    daemon.stop().await;
}
