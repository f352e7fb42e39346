//! Groups and streams that vanish under their readers.

use std::time::{Duration, Instant};

use aurora_bus::store::StoreErrorKind;
use reqwest::StatusCode;

use super::{GROUP, MAX_IN_FLIGHT, OTHER_STREAM, STREAM, Site, assert_quiet, on_every_product};
use crate::support::app::BOUND;
use crate::support::redis::Product;
use crate::support::until;

on_every_product! {
    a_flush_while_readers_wait_costs_no_later_event
    a_key_that_is_taken_away_while_readers_wait_is_followed_anew
    a_stream_whose_name_is_taken_concerns_that_stream_only_and_heals
    a_destroyed_group_goes_on_with_what_it_had_not_handled
    a_daemon_that_starts_late_handles_what_was_there_before
}

async fn a_flush_while_readers_wait_costs_no_later_event(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 50).await;
    site.settled().await.assert_settled();
    site.readers_wait(3).await;

    let flushed = Instant::now();
    site.server.cli(&["FLUSHALL"]);
    site.ledger.forgive();
    // No publisher makes the stream anew: the worker itself finds out.
    until("the group again", Duration::from_secs(3), async || {
        site.server.cli(&["XINFO", "GROUPS", STREAM]).contains("alert-processor").then_some(())
    })
    .await;
    site.publish(&daemon, 1000).await;
    let lines = site.ledger.has_handled(&daemon, 1050).await;
    assert_quiet(&lines, flushed);
    site.settled().await.assert_settled();
    assert!(daemon.metric("aurora_bus_groups_recreated_total").await >= 1);
    assert_eq!(daemon.metric("aurora_bus_dead_letters_total").await, 0);
    daemon.ready(StatusCode::OK).await;
    daemon.stop().await;
}

async fn a_key_that_is_taken_away_while_readers_wait_is_followed_anew(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    let faults: [&[&str]; 4] =
        [&["DEL", STREAM], &["RENAME", STREAM, "elsewhere"], &["PEXPIRE", STREAM, "1"], &["SWAPDB", "0", "1"]];
    for fault in faults {
        site.readers_wait(3).await;
        let begun = Instant::now();
        site.server.cli(fault);
        // What it held was handled before.
        site.ledger.forgive();
        until("the key is away", BOUND, async || (site.server.cli(&["XLEN", STREAM]) == "0").then_some(())).await;
        let lines = site.publish_and_handle_more(&daemon, 20).await;
        assert_quiet(&lines, begun);
        daemon.ready(StatusCode::OK).await;
        site.settled().await.assert_settled();
    }
    daemon.stop().await;
}

async fn a_stream_whose_name_is_taken_concerns_that_stream_only_and_heals(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 10).await;
    site.readers_wait(3).await;
    let begun = Instant::now();
    site.server.cli(&["SET", STREAM, "in the way"]);
    site.ledger.forgive();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    until("word of the stream and of no other", BOUND, async || {
        let parts = reqwest::get(daemon.url("/ready")).await.ok()?.text().await.ok()?;
        let parts: serde_json::Value = serde_json::from_str(&parts).expect("JSON");
        let told = parts.to_string();
        (told.contains("no stream") && told.contains(STREAM)).then_some(())
    })
    .await;
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    let error = site.store.describe(&site.account.stream).await.expect_err("no stream");
    assert_eq!(error.kind(), StoreErrorKind::WrongType);

    let other = OTHER_STREAM.parse().expect("a valid name");
    let events = site.ledger.events(20, 10);
    site.ledger.publish_until_accepted(&daemon, &other, &events).await;
    let mut lines = site.ledger.has_handled(&daemon, 30).await;
    site.ledger.forgive();

    site.server.cli(&["DEL", STREAM]);
    lines.extend(site.publish_and_handle_more(&daemon, 20).await);
    assert_quiet(&lines, begun);
    daemon.ready(StatusCode::OK).await;
    site.settled().await.assert_settled();
    daemon.stop().await;
}

async fn a_destroyed_group_goes_on_with_what_it_had_not_handled(product: Product) {
    let site = Site::new(product).await;
    let daemon = site.home.start().await;
    site.publish_and_handle(&daemon, 900).await;
    site.settled().await.assert_settled();
    // Each search for idle entries ends with a note of how far the group has come; the second shows the end of the first.
    site.server.note_commands();
    until("two searches", BOUND, async || (site.server.commands(&[STREAM, GROUP, "from"]) >= 2).then_some(())).await;

    daemon.signal("STOP");
    let events = site.ledger.events(100, 10);
    site.ledger.append(&*site.store, &site.account.stream, &events).await;
    assert_eq!(site.server.cli(&["XGROUP", "DESTROY", STREAM, "alert-processor"]), "1");
    daemon.signal("CONT");
    site.ledger.has_handled(&daemon, 1000).await;
    let balance = site.settled().await;
    // Of a group that was made in the middle of its stream the server may not know how much it is still to be given.
    balance.assert_kept();
    assert!(balance.difference.is_none_or(|difference| difference == 0), "{balance:?}");
    // At most what was in hand when the daemon was stopped.
    assert!(balance.repeated <= MAX_IN_FLIGHT, "{balance:?}");
    daemon.stop().await;
}

async fn a_daemon_that_starts_late_handles_what_was_there_before(product: Product) {
    let site = Site::new(product).await;
    let events = site.ledger.events(500, 100);
    site.ledger.append(&*site.store, &site.account.stream, &events).await;
    let daemon = site.home.start().await;
    site.ledger.has_handled(&daemon, 500).await;
    let balance = site.settled().await;
    balance.assert_settled();
    assert_eq!((balance.handled, balance.repeated), (500, 0));
    until("the counter", BOUND, async || (daemon.metric("aurora_bus_acknowledged_total").await == 500).then_some(()))
        .await;
    daemon.stop().await;
}
