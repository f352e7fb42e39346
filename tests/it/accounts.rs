//! Retention and accounts of running daemons: losses are counted once, a full stream rejects or drops, and
//! `aurora-bus reconcile` checks the accounts.

use reqwest::StatusCode;
use serde_json::Value;

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAM: &str = "aurora:ledger";

/// Returns a configuration with two groups: `siem` with a sink, and `agents` without one.
fn config(store: &str, instance: &str, retention: &str) -> String {
    format!(
        "{store}\n\
         [log]\nformat = \"json\"\n\
         [[streams]]\nname = \"{STREAM}\"\nretention = {{ {retention} }}\n\
         [[streams.groups]]\nname = \"siem\"\nsink = \"{instance}\"\nclaim_idle = \"1s\"\nhandler_timeout = \"500ms\"\n\
         [[streams.groups]]\nname = \"agents\"\n\
         [sinks.{instance}]\ntype = \"log\"\n"
    )
}

fn on(server: &RedisServer) -> String {
    format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"", server.url())
}

/// Returns a configuration with only the group without a sink.
fn outside_only(store: &str, retention: &str) -> String {
    format!(
        "{store}\n[[streams]]\nname = \"{STREAM}\"\nretention = {{ {retention} }}\n\
         [[streams.groups]]\nname = \"agents\"\n"
    )
}

fn payloads(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{{\"n\":{n}}}")).collect()
}

async fn group(daemon: &Daemon, name: &str) -> Value {
    let text = daemon.get(&format!("/api/v1/streams/{STREAM}")).await;
    let stream: Value = serde_json::from_str(&text).expect("the state of a stream");
    let groups = stream["groups"].as_array().expect("groups").clone();
    groups.into_iter().find(|group| group["name"] == name).unwrap_or_default()
}

async fn lost(daemon: &Daemon, name: &str, reason: &str) -> u64 {
    group(daemon, name).await["lost_by_reason"][reason].as_u64().unwrap_or_default()
}

/// Returns the sum of the samples of a metric with these labels, over daemons.
async fn counted(daemons: &[&Daemon], metric: &str, labels: &[&str]) -> u64 {
    let mut sum = 0;
    for daemon in daemons {
        let text = daemon.get("/metrics").await;
        let samples = text.lines().filter(|line| line.starts_with(metric));
        let samples = samples.filter(|line| labels.iter().all(|label| line.contains(label)));
        let values = samples.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small count")]
        let value = values.sum::<f64>() as u64;
        sum += value;
    }
    sum
}

async fn is_lost(daemon: &Daemon, name: &str, reason: &str, entries: u64) {
    until(&format!("{entries} {reason}"), BOUND, async || (lost(daemon, name, reason).await == entries).then_some(()))
        .await;
}

/// Runs `aurora-bus reconcile` with a long wait. Returns the exit code and standard output.
fn reconcile(home: &Home, daemon: &Daemon, more: &[&str]) -> (Option<i32>, String) {
    reconcile_within("60s", home, daemon, more)
}

fn reconcile_within(wait: &str, home: &Home, daemon: &Daemon, more: &[&str]) -> (Option<i32>, String) {
    let url = daemon.url("");
    let output = home.run(&[&["reconcile", "--url", &url, "--wait", wait], more].concat());
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn wait_for_warning(daemon: &Daemon, words: &str) {
    until(&format!("warning: {words}"), BOUND, async || {
        let text = daemon.get("/ready").await;
        let report: Value = serde_json::from_str(&text).expect("a report");
        (report["status"] == "degraded" && report["ready"] == true && text.contains(words)).then_some(())
    })
    .await;
}

/// Another program trims pending and undelivered entries, with two daemons that detect it.
async fn trimmed_by_others(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    let first = Home::new(&outside_only(&on(&server), "max_len = 1000"));
    let second = Home::new(&outside_only(&on(&server), "max_len = 1000"));
    let daemons = [first.start().await, second.start().await];
    let both = [&daemons[0], &daemons[1]];
    daemons[0].publish(STREAM, &payloads(20)).await.expect("published");
    let read = ["XREADGROUP", "GROUP", "agents", "worker", "COUNT", "10", "STREAMS", STREAM, ">"];
    server.cli(&read);
    until("check of the group", BOUND, async || {
        (counted(&both, "aurora_bus_account_entries", &["agents", "term=\"pending\""]).await == 20).then_some(())
    })
    .await;
    // Removes ten pending and five undelivered entries.
    server.cli(&["XTRIM", STREAM, "MAXLEN", "5"]);
    is_lost(&daemons[0], "agents", "trimmed_undelivered", 5).await;
    for daemon in &daemons {
        wait_for_warning(daemon, "another program removes entries").await;
        wait_for_warning(daemon, "group `agents` lost 5 entries").await;
        wait_for_warning(daemon, "pending entries that another program removed").await;
    }
    assert_eq!(counted(&both, "aurora_bus_lost_total", &["agents", "trimmed_undelivered"]).await, 5);
    // Reads past the gap, so that the server corrects its own count, and acknowledges all remaining entries.
    let rest = server.cli(&["XREADGROUP", "GROUP", "agents", "worker", "COUNT", "10", "STREAMS", STREAM, ">"]);
    let is_number = |text: &str| text.parse::<u64>().is_ok();
    let is_id = |line: &&str| line.split_once('-').is_some_and(|(ms, seq)| is_number(ms) && is_number(seq));
    let mut acknowledge = vec!["XACK", STREAM, "agents"];
    acknowledge.extend(rest.lines().map(str::trim).filter(is_id));
    assert_eq!(server.cli(&acknowledge), "5");
    until("another check", BOUND, async || {
        (counted(&both, "aurora_bus_account_entries", &["agents", "term=\"acknowledged\""]).await == 10).then_some(())
    })
    .await;
    assert_eq!(lost(&daemons[0], "agents", "trimmed_undelivered").await, 5, "counted once");
    let agents = group(&daemons[0], "agents").await;
    assert_eq!((&agents["published"], &agents["undelivered"], &agents["pending"]), (&20.into(), &0.into(), &10.into()));
    let (code, output) = reconcile(&first, &daemons[1], &[STREAM]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("5 lost: trimmed_undelivered"), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_trim_is_counted_once_by_two_daemons_on_redis() {
    trimmed_by_others(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_trim_is_counted_once_by_two_daemons_on_valkey() {
    trimmed_by_others(Product::Valkey).await;
}

/// A group with a sink finds pending and undelivered losses by itself, and keeps their count over a restart.
async fn lost_with_a_worker(product: Product) {
    let server = RedisServer::start(product, &[]).await;
    let home = Home::new(&config(&on(&server), "files", "max_len = 1000"));
    // A consumer reads ten entries and dies while no daemon runs.
    for n in 0..20 {
        server.cli(&["XADD", STREAM, "*", "data", &format!("{{\"n\":{n}}}")]);
    }
    server.cli(&["XGROUP", "CREATE", STREAM, "siem", "0"]);
    let daemon = home.start().await;
    daemon.handled(STREAM, "siem").await;
    daemon.stop().await;
    for n in 0..20 {
        server.cli(&["XADD", STREAM, "*", "data", &format!("{{\"n\":{n}}}")]);
    }
    server.cli(&["XREADGROUP", "GROUP", "siem", "dead", "COUNT", "10", "STREAMS", STREAM, ">"]);
    server.cli(&["XTRIM", STREAM, "MAXLEN", "5"]);
    let daemon = home.start().await;
    is_lost(&daemon, "siem", "trimmed_pending", 10).await;
    is_lost(&daemon, "siem", "trimmed_undelivered", 5).await;
    daemon.handled(STREAM, "siem").await;
    let siem = group(&daemon, "siem").await;
    assert_eq!((&siem["published"], &siem["acknowledged"], &siem["lost"]), (&40.into(), &25.into(), &15.into()));
    assert_eq!(siem["balanced"], true);
    daemon.crash();
    let daemon = home.start().await;
    assert_eq!(lost(&daemon, "siem", "trimmed_pending").await, 10);
    let (code, output) = reconcile(&home, &daemon, &["--json", STREAM]);
    assert_eq!(code, Some(0), "{output}");
    let lines: Value = serde_json::from_str(&output).expect("JSON");
    assert!(lines.as_array().expect("lines").iter().all(|line| line["balanced"] == true), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_counts_losses_of_its_downtime_on_redis() {
    lost_with_a_worker(Product::Redis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_counts_losses_of_its_downtime_on_valkey() {
    lost_with_a_worker(Product::Valkey).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconcile_exit_code_shows_whether_accounts_add_up() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let home = Home::new(&config(&on(&server), "files", "max_len = 1000"));
    let daemon = home.start().await;
    daemon.publish(STREAM, &payloads(30)).await.expect("published");
    daemon.handled(STREAM, "siem").await;
    let (code, output) = reconcile(&home, &daemon, &[]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("siem") && output.contains("agents"), "{output}");
    // An operator resets the group, so it handles every entry twice.
    server.cli(&["XGROUP", "SETID", STREAM, "siem", "0"]);
    until("second handling", BOUND, async || (group(&daemon, "siem").await["acknowledged"] == 60).then_some(())).await;
    let (code, output) = reconcile_within("7s", &home, &daemon, &[STREAM]);
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("-30 surplus entries: the group was set back"), "{output}");
    wait_for_warning(&daemon, "the account of group `siem` is off by -30").await;
    assert_eq!(reconcile(&home, &daemon, &["aurora:unknown"]).0, Some(2));
    assert_eq!(home.run(&["reconcile", "--url", "http://127.0.0.1:1"]).status.code(), Some(2));
    assert_eq!(home.run(&["reconcile", "--surely"]).status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_restart_after_the_server_lost_all_data() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    let home = Home::new(&config(&on(&server), "files", "max_len = 1000"));
    let daemon = home.start().await;
    daemon.publish(STREAM, &payloads(30)).await.expect("published");
    daemon.handled(STREAM, "siem").await;
    until("check", BOUND, async || {
        (counted(&[&daemon], "aurora_bus_account_entries", &["agents", "undelivered"]).await == 30).then_some(())
    })
    .await;
    server.cli(&["FLUSHALL"]);
    daemon.publish(STREAM, &payloads(7)).await.expect("published");
    until("7 handled", BOUND, async || {
        let siem = group(&daemon, "siem").await;
        (siem["acknowledged"] == 7 && siem["published"] == 7).then_some(())
    })
    .await;
    wait_for_warning(&daemon, "group `agents` lost 30 entries").await;
    assert_eq!(reconcile(&home, &daemon, &[]).0, Some(0));
}

/// A full stream rejects events, with the group that keeps entries in the detail.
async fn rejects_when_full(store: &str) {
    let home = Home::new(&outside_only(store, "max_len = 10, hard_max_len = 200"));
    let daemon = home.start().await;
    daemon.publish(STREAM, &payloads(199)).await.expect("published");
    assert_eq!(daemon.publish(STREAM, &payloads(2)).await.expect_err("full"), Some(StatusCode::INSUFFICIENT_STORAGE));
    // Events that were published during the first check may count twice until the next one.
    until("room for one", BOUND, async || daemon.publish(STREAM, &payloads(1)).await.ok()).await;
    let client = crate::support::app::client();
    let detail = until("group in the detail", BOUND, async || {
        let url = daemon.url(&format!("/api/v1/streams/{STREAM}/events"));
        let response = client.post(url).body("{}").send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::INSUFFICIENT_STORAGE);
        let problem: Value = response.json().await.expect("a problem");
        problem["detail"].as_str().filter(|detail| detail.contains("`agents`")).map(str::to_owned)
    })
    .await;
    assert!(detail.contains("holds 200 of at most 200 entries (retention.hard_max_len)"), "{detail}");
    assert!(detail.contains(STREAM), "{detail}");
    wait_for_warning(&daemon, "holds 200 entries of 200").await;
    assert_eq!(reconcile(&home, &daemon, &[]).0, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_stream_of_the_embedded_store_rejects_events() {
    rejects_when_full("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_stream_on_redis_rejects_events_until_there_is_room() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    rejects_when_full(&on(&server)).await;
    let home = Home::new(&outside_only(&on(&server), "max_len = 10, hard_max_len = 200"));
    let daemon = home.start().await;
    until("rejection", BOUND, async || daemon.publish(STREAM, &payloads(1)).await.err()).await;
    server.cli(&["XGROUP", "DESTROY", STREAM, "agents"]);
    server.cli(&["XGROUP", "CREATE", STREAM, "agents", "$"]);
    until("room", BOUND, async || daemon.publish(STREAM, &payloads(1)).await.ok()).await;
}

/// A full stream drops its oldest entries, and counts them as lost for the group.
async fn drops_when_full(store: &str) {
    let home = Home::new(&outside_only(store, "max_len = 10, hard_max_len = 300, when_full = \"drop_oldest\""));
    let daemon = home.start().await;
    for _ in 0..5 {
        daemon.publish(STREAM, &payloads(200)).await.expect("published");
    }
    let agents = until("dropped entries", BOUND, async || {
        let agents = group(&daemon, "agents").await;
        let lost = agents["lost_by_reason"]["dropped"].as_u64()?;
        // Entries are dropped in steps, and counted in the metric after the last one.
        let is_counted = counted(&[&daemon], "aurora_bus_lost_total", &["agents", "dropped"]).await == lost;
        (lost >= 637 && is_counted).then_some(agents)
    })
    .await;
    let dropped = agents["lost_by_reason"]["dropped"].as_u64().expect("a count");
    assert!((637..=700).contains(&dropped), "{agents}");
    let (code, output) = reconcile(&home, &daemon, &[]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("lost: dropped"), "{output}");
    daemon.stop().await;
    let daemon = home.start().await;
    assert_eq!(lost(&daemon, "agents", "dropped").await, dropped, "known after a restart");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_stream_of_the_embedded_store_counts_dropped_entries() {
    drops_when_full("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_stream_on_valkey_counts_dropped_entries() {
    let server = RedisServer::start(Product::Valkey, &[]).await;
    drops_when_full(&on(&server)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abandoned_group_is_reported_and_ignored_if_configured() {
    let server = RedisServer::start(Product::Redis, &[]).await;
    let long_ago = "1700000000000-0";
    server.cli(&["XADD", STREAM, long_ago, "data", "{}"]);
    server.cli(&["XGROUP", "CREATE", STREAM, "forgotten", "0"]);
    let home = Home::new(&outside_only(&on(&server), "max_len = 10, max_age = \"1h\""));
    let daemon = home.start().await;
    wait_for_warning(&daemon, "group `forgotten` is abandoned").await;
    assert_eq!(group(&daemon, "forgotten").await["abandoned"], true);
    assert_eq!(group(&daemon, "agents").await["abandoned"], false);
    let gauge = ["forgotten"];
    until("gauge", BOUND, async || {
        (counted(&[&daemon], "aurora_bus_group_abandoned", &gauge).await == 1).then_some(())
    })
    .await;
    assert_eq!(server.cli(&["XLEN", STREAM]), "1");
    for _ in 0..3 {
        daemon.publish(STREAM, &payloads(100)).await.expect("published");
    }
    server.cli(&["XGROUP", "SETID", STREAM, "agents", "$"]);
    daemon.stop().await;
    let home = Home::new(&outside_only(&on(&server), "max_len = 10, max_age = \"1h\", ignore_abandoned = true"));
    let daemon = home.start().await;
    until("trim", BOUND, async || {
        let first = daemon.get(&format!("/api/v1/streams/{STREAM}/events?limit=1")).await;
        (!first.contains(long_ago)).then_some(())
    })
    .await;
}

/// A server that restores its append-only file may count the read entries of groups from an older number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_add_up_after_a_restart_of_the_server() {
    let mut server = RedisServer::durable().await;
    let home = Home::new(&config(&on(&server), "files", "max_len = 1000"));
    let daemon = home.start().await;
    daemon.publish(STREAM, &payloads(50)).await.expect("published");
    daemon.handled(STREAM, "siem").await;
    // The state of a group that was created at the end of its stream.
    let last = server.cli(&["XINFO", "STREAM", STREAM]);
    let id = last.lines().skip_while(|line| *line != "last-generated-id").nth(1).expect("an id").to_owned();
    server.cli(&["XGROUP", "SETID", STREAM, "siem", &id, "ENTRIESREAD", "50"]);
    daemon.publish(STREAM, &payloads(30)).await.expect("published");
    daemon.handled(STREAM, "siem").await;
    server.cli(&["XDEL", STREAM, &id]);
    server.crash();
    server.restart().await;
    until("publishing again", BOUND, async || daemon.publish(STREAM, &payloads(20)).await.ok()).await;
    // Publishing uses other connections.
    let path = format!("/api/v1/streams/{STREAM}");
    until("reading again", BOUND, async || (daemon.status(&path).await? == 200).then_some(())).await;
    until("100 handled", BOUND, async || (group(&daemon, "siem").await["acknowledged"] == 100).then_some(())).await;
    let (code, output) = reconcile(&home, &daemon, &[]);
    assert_eq!(code, Some(0), "{output}");
    for name in ["siem", "agents"] {
        assert_eq!(group(&daemon, name).await["lost"], 0, "{name}: {output}");
    }
}
