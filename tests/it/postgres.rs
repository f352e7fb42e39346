//! Rows in a real `PostgreSQL`: each entry once, whatever is killed, and a clear message for every error.
//!
//! Every test run kills a daemon ten times. `cargo test --release --test it -- --ignored --nocapture fifty_kills` kills
//! it fifty times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aurora_bus::event::{Delivery, Entry, EntryId};
use aurora_bus::sink::{Origin, PostgresConfig, PostgresSink, Sink as _, SinkError, SinkErrorClass};
use bytes::Bytes;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::crash::SmallDisk;
use crate::support::app::{BOUND, Daemon, Home};
use crate::support::postgres::{PostgresServer, hand_over, new_table, url_by};
use crate::support::proxy::Proxy;
use crate::support::{random_below, until};

const STREAM: &str = "aurora:agent:results";
const GROUP: &str = "api-agent-results";
const DEAD_LETTERS: &str = "aurora:agent:dead_letter";

fn config(url: &str, more: &str) -> PostgresConfig {
    toml::from_str(&format!("url = \"{url}\"\n{more}")).expect("every key is known")
}

fn open(url: &str, table: &str, more: &str) -> PostgresSink {
    // A second installation in this process has no effect.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    PostgresSink::open("results", &config(url, &format!("table = \"{table}\"\n{more}")))
        .expect("a usable configuration")
}

fn origin() -> Origin {
    Origin { stream: STREAM.parse().expect("a name"), group: GROUP.parse().expect("a name") }
}

fn delivery(ms: u64, data: &str) -> Delivery {
    delivery_with(ms, data, &[])
}

fn delivery_with(ms: u64, data: &str, fields: &[(&'static str, &str)]) -> Delivery {
    let mut all = vec![(Bytes::from("data"), Bytes::from(data.to_owned()))];
    all.extend(fields.iter().map(|(name, value)| (Bytes::from(*name), Bytes::from((*value).to_owned()))));
    let entry = Entry { id: EntryId::new(ms, 0), fields: all.into_iter().collect() };
    Delivery { entry, attempt: 1, delivered_at: Instant::now() }
}

fn batch(ids: impl IntoIterator<Item = u64>) -> Vec<Delivery> {
    ids.into_iter().map(|ms| delivery(ms, &json!({ "task_id": format!("t{ms}") }).to_string())).collect()
}

fn full_text(error: &SinkError) -> String {
    let source = std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
    format!("{error}{source}")
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_becomes_rows_with_all_columns() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "");
    sink.check().await.expect("it could make the table");
    let data = r#"{"task_id":"t1","agent_type":"triage","case_id":7,"alert_id":"a","verdict":{"malicious":true}}"#;
    let fields = [("id", "e1"), ("timestamp", "2026-01-02T03:04:05.5Z"), ("severity", "high"), ("traceparent", "00-x")];
    let mut deliveries = batch([2, 1]);
    deliveries.push(delivery_with(1_700_000_000_000, data, &fields));
    sink.deliver(&origin(), &deliveries).await.expect("written");
    sink.check().await.expect("it can write");

    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table} WHERE stream = '{STREAM}'")), "3");
    let columns = "event_id, severity, task_id, agent_type, case_id, alert_id, traceparent, tenant IS NULL, \
                   data->'verdict'->>'malicious', received_at = '2026-01-02T03:04:05.5Z', written_at > now() - interval '1 h'";
    let row = server.sql(&format!("SELECT {columns} FROM {table} WHERE entry_id = '1700000000000-0'"));
    assert_eq!(row, "e1|high|t1|triage|7|a|00-x|t|true|t|t");
    let stored =
        server.sql(&format!("SELECT extract(epoch FROM received_at) * 1000 FROM {table} WHERE entry_id = '2-0'"));
    assert_eq!(stored.split('.').next(), Some("2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn redelivered_entry_stays_one_row() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "");
    sink.deliver(&origin(), &batch(1..=10)).await.expect("written");
    sink.deliver(&origin(), &batch(5..=15)).await.expect("written");
    // A replayed entry, and an entry that is in the batch twice.
    let again = [delivery_with(99, "{}", &[("replay.of", "3-0")]), delivery(100, "{}"), delivery(100, "{}")];
    sink.deliver(&origin(), &again).await.expect("written");
    let counts = server.sql(&format!("SELECT count(*), count(DISTINCT entry_id), count(task_id) FROM {table}"));
    assert_eq!(counts, "16|16|15");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_overlapping_batches_write_rows_once() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = Arc::new(open(&server.url(), &table, "connections = 3"));
    let mut calls = JoinSet::new();
    for n in 0..12_u64 {
        let sink = Arc::clone(&sink);
        calls.spawn(async move {
            let mut ids: Vec<u64> = (n * 20 + 1..=n * 20 + 100).collect();
            if n % 2 == 0 {
                ids.reverse();
            }
            sink.deliver(&origin(), &batch(ids)).await
        });
    }
    while let Some(done) = calls.join_next().await {
        done.expect("no panic").expect("written");
    }
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "320");
    let open = server.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'aurora-bus'");
    assert!(open.parse::<u64>().expect("a count") > 0);
    sink.close().await;
    assert!(sink.deliver(&origin(), &batch([1])).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password_is_reported_and_never_shown() {
    let server = PostgresServer::shared().await;
    let url = server.url().replace("open-sesame", "hunter2");
    let sink = open(&url, &new_table(), "");
    let error = sink.check().await.expect_err("nobody lets it in");
    assert!(full_text(&error).contains("password authentication failed"), "{}", full_text(&error));
    let refused = sink.deliver(&origin(), &batch([1])).await.expect_err("nobody lets it in");
    assert_eq!(refused.class(), SinkErrorClass::Transient);
    for shown in [format!("{error:?}"), full_text(&error), full_text(&refused), format!("{sink:?}")] {
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_file_is_read_for_each_connection() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let file = TempDir::new().expect("a temporary folder");
    let path = file.path().join("password");
    std::fs::write(&path, "wrong\n").expect("a writable folder");
    let url = server.url().replace(":open-sesame", "");
    let sink = open(&url, &table, &format!("password_file = \"{}\"", path.display()));
    sink.check().await.expect_err("the password is wrong");
    std::fs::write(&path, "open-sesame\n").expect("a writable folder");
    sink.check().await.expect("the password is right");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_table_is_reported_and_loses_no_entry() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "create_table = false");
    let error = full_text(&sink.check().await.expect_err("there is no table"));
    assert!(error.contains(&format!("table `{table}` does not exist")), "{error}");
    let refused = sink.deliver(&origin(), &batch([1])).await.expect_err("there is no table");
    assert_eq!(refused.class(), SinkErrorClass::Transient);

    // The statement in the message makes it work.
    let (_, statement) = error.split_once("create it: ").expect("the way out");
    server.sql(statement);
    sink.check().await.expect("the table is there");
    sink.deliver(&origin(), &batch([1])).await.expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_table_is_created_again() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "");
    sink.deliver(&origin(), &batch([1])).await.expect("written");
    server.sql(&format!("DROP TABLE {table}"));
    let refused = sink.deliver(&origin(), &batch([2])).await.expect_err("the table is gone");
    assert_eq!(refused.class(), SinkErrorClass::Transient);
    sink.check().await.expect("it could make the table");
    assert_eq!(server.sql(&format!("SELECT to_regclass('{table}') IS NULL")), "t", "a check has no effect");
    sink.deliver(&origin(), &batch([2])).await.expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_column_is_reported_with_its_repair() {
    let server = PostgresServer::shared().await;
    let flaws = [
        ("DROP COLUMN task_id", "task_id"),
        ("ALTER COLUMN data TYPE json", "data"),
        ("ALTER COLUMN received_at TYPE text", "received_at"),
        ("ALTER COLUMN tenant SET NOT NULL", "tenant"),
        ("ADD COLUMN mine integer NOT NULL", "mine"),
    ];
    for (flaw, column) in flaws {
        let table = new_table();
        let maker = open(&server.url(), &table, "");
        until("table", BOUND, async || {
            (server.sql(&format!("SELECT to_regclass('{table}') IS NOT NULL")) == "t").then_some(())
        })
        .await;
        drop(maker);
        server.sql(&format!("ALTER TABLE {table} {flaw}"));
        let sink = open(&server.url(), &table, "");
        let error = full_text(&sink.check().await.expect_err(flaw));
        assert!(error.contains(&format!("`{column}`")), "{error}");
        let refused = sink.deliver(&origin(), &batch([1])).await.expect_err(flaw);
        assert_eq!(refused.class(), SinkErrorClass::Transient, "{flaw}");
        let (_, statement) = error.split_once(": ALTER TABLE").expect("the way out");
        server.sql(&format!("ALTER TABLE {statement}"));
        sink.check().await.unwrap_or_else(|error| panic!("{flaw}, mended: {}", full_text(&error)));
        sink.deliver(&origin(), &batch([1])).await.expect("written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_key_and_missing_rights_are_reported() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    open(&server.url(), &table, "").deliver(&origin(), &batch([1])).await.expect("written");
    server.sql(&format!("ALTER TABLE {table} DROP CONSTRAINT {table}_pkey"));
    let error = full_text(&open(&server.url(), &table, "").check().await.expect_err("there is no key"));
    assert!(error.contains("ADD PRIMARY KEY (stream, entry_id)"), "{error}");
    server.sql(&format!("ALTER TABLE {table} ADD PRIMARY KEY (stream, entry_id)"));

    let user = format!("user_of_{table}");
    server.sql(&format!("CREATE ROLE {user} LOGIN PASSWORD 'open-sesame'"));
    let sink = open(&server.url().replace("//aurora:", &format!("//{user}:")), &table, "");
    let error = full_text(&sink.check().await.expect_err("it has no rights"));
    assert!(error.contains("permission denied") && error.contains("grant"), "{error}");
    server.sql(&format!("GRANT SELECT, INSERT ON {table} TO {user}"));
    sink.check().await.expect("it has the rights");
    sink.deliver(&origin(), &batch([2])).await.expect("written");
}

#[tokio::test(flavor = "multi_thread")]
async fn value_refused_by_the_server_is_permanent() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "");
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for bad in ["[1e999999]".to_owned(), deep] {
        let mut deliveries = batch([1, 2]);
        deliveries.push(delivery(3, &bad));
        for part in [&deliveries[..], &deliveries[2..]] {
            let error = sink.deliver(&origin(), part).await.expect_err("no jsonb");
            assert_eq!(error.class(), SinkErrorClass::Permanent, "{}", full_text(&error));
        }
    }
    sink.deliver(&origin(), &batch([1, 2])).await.expect("the others are fine");
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn required_tls_verifies_the_server() {
    let server = PostgresServer::with_tls().await;
    let ca = format!("ca_file = \"{}\"", server.ca_file().display());
    let url = |mode: &str| format!("{}?sslmode={mode}", server.url());
    for mode in ["require", "verify-full", "prefer"] {
        let sink = open(&url(mode), "agent_results", &ca);
        sink.deliver(&origin(), &batch([1])).await.unwrap_or_else(|error| panic!("{mode}: {}", full_text(&error)));
        let with_tls = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
                        WHERE application_name = 'aurora-bus'";
        assert_eq!(server.sql(with_tls), "t", "{mode}");
    }
    let disabled = open(&url("disable"), "agent_results", "").check().await.expect_err("the server wants TLS");
    assert!(full_text(&disabled).contains("no encryption"), "{}", full_text(&disabled));

    // Another authority, and a host name that the certificate does not have.
    let other = PostgresServer::with_tls().await;
    let stranger = format!("ca_file = \"{}\"", other.ca_file().display());
    let error = open(&url("require"), "agent_results", &stranger).check().await.expect_err("an unknown authority");
    assert!(full_text(&error).contains("certificate"), "{}", full_text(&error));
    let misnamed = url("require").replace("127.0.0.1", "localhost");
    let error = open(&misnamed, "agent_results", &ca).check().await.expect_err("another name");
    assert!(full_text(&error).contains("certificate"), "{}", full_text(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_required_tls_is_refused() {
    let server = PostgresServer::shared().await;
    let other = PostgresServer::with_tls().await;
    let ca = format!("ca_file = \"{}\"", other.ca_file().display());
    let error = open(&format!("{}?sslmode=require", server.url()), "x", &ca).check().await.expect_err("no TLS there");
    assert!(full_text(&error).contains("TLS"), "{}", full_text(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn locked_table_is_waited_for_until_the_timeout() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let sink = open(&server.url(), &table, "timeout = \"3s\"");
    sink.deliver(&origin(), &batch([1])).await.expect("written");
    let lock = format!("LOCK TABLE {table}; SELECT pg_sleep(60)");
    let locker = tokio::task::spawn_blocking({
        let (server, sql) = (Arc::clone(&server), format!("BEGIN; {lock}; COMMIT"));
        move || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| server.sql(&sql))).is_err()
    });
    let holders = format!("SELECT count(*) FROM pg_locks WHERE relation = '{table}'::regclass AND granted");
    until("lock", BOUND, async || (server.sql(&holders) != "0").then_some(())).await;

    let asked = Instant::now();
    let error = sink.deliver(&origin(), &batch([2])).await.expect_err("the table is locked");
    assert_eq!(error.class(), SinkErrorClass::Transient);
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    sink.check().await.expect_err("the table is locked");
    server.sql(&format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%{table}; SELECT pg_sleep%' AND \
         pid <> pg_backend_pid()"
    ));
    assert!(locker.await.expect("no panic"), "the lock was broken");
    sink.check().await.expect("the lock is gone");
    sink.deliver(&origin(), &batch([2])).await.expect("written");
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_while_idle_lose_nothing() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let proxy = Proxy::start(server.port()).await;
    let sink = open(&url_by(proxy.port()), &table, "");
    sink.deliver(&origin(), &batch([1])).await.expect("written");
    proxy.reset();
    sink.deliver(&origin(), &batch([2])).await.expect("written on another connection");
    // The response to a commit is lost. The write is repeated, and each row is there once.
    proxy.drop_reply_to(b"t3");
    sink.deliver(&origin(), &batch([3])).await.expect("written on another connection");
    assert_eq!(proxy.dropped(), 1);
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connection_is_given_up_in_time() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let proxy = Proxy::start(server.port()).await;
    let sink = open(&url_by(proxy.port()), &table, "timeout = \"3s\"");
    sink.deliver(&origin(), &batch([1])).await.expect("written");
    proxy.black_hole_existing();
    let asked = Instant::now();
    sink.deliver(&origin(), &batch([2])).await.expect("written on another connection");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_pauses_the_sink_until_there_is_room() {
    let disk = SmallDisk::new(8);
    hand_over(disk.path());
    let server = PostgresServer::start().await;
    server.sql(&format!("CREATE TABLESPACE small LOCATION '{}'", disk.path().display()));
    server.sql("ALTER ROLE aurora SET default_tablespace = small");
    server.sql("CREATE TABLE ballast AS SELECT repeat(md5(n::text), 20) FROM generate_series(1, 4000) n");
    let sink = open(&server.url(), "agent_results", "");
    let large = |from: u64| -> Vec<Delivery> {
        // Texts that cannot be compressed, or the server would compress them.
        let text = || (0..40).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect::<String>();
        (from..from + 200).map(|ms| delivery(ms, &json!({ "text": text() }).to_string())).collect()
    };
    let mut next = 1;
    let error = until("full disk", BOUND, async || {
        let written = sink.deliver(&origin(), &large(next)).await;
        next += 200;
        written.err()
    })
    .await;
    assert_eq!(error.class(), SinkErrorClass::Transient, "{}", full_text(&error));
    assert!(full_text(&error).contains("No space left"), "{}", full_text(&error));
    let told = full_text(&sink.check().await.expect_err("there is no room yet"));
    assert!(told.contains("No space left"), "{told}");
    server.sql("DROP TABLE ballast");
    server.sql("CHECKPOINT");
    sink.check().await.expect("there is room");
    sink.deliver(&origin(), &large(next)).await.expect("written");
    assert_eq!(server.sql("SELECT count(*) FROM agent_results WHERE stream LIKE '%probe%'"), "0");
    sink.close().await;
    drop(server);
}

/// A daemon with a group that writes agent results to a table.
fn home(url: &str, table: &str, more: &str) -> Home {
    Home::new(&format!(
        r#"
[[streams]]
name = "{STREAM}"
retention = {{ max_len = 900_000 }}
[[streams.groups]]
name = "{GROUP}"
sink = "results"
claim_idle = "6s"
handler_timeout = "4s"
retry = {{ max_attempts = 5, base = "50ms", cap = "1s" }}
{more}

[sinks.results]
type = "postgres"
url = "{url}"
table = "{table}"
timeout = "2s"
"#
    ))
}

/// Publishes results numbered from `first` until stopped. Returns the number of accepted ones.
async fn publish(daemon: &Daemon, first: u64, count: u64) -> u64 {
    let payload = |n: u64| json!({ "task_id": format!("t{n}"), "n": n, "pad": "x".repeat(300) }).to_string();
    let events: Vec<String> = (first..first + count).map(payload).collect();
    daemon.publish(STREAM, &events).await.expect("accepted");
    count
}

async fn every_row_is_there_once(server: &PostgresServer, table: &str, daemon: &Daemon) {
    daemon.handled(STREAM, GROUP).await;
    let stored = daemon.events(STREAM).await;
    let rows = server.sql(&format!("SELECT entry_id FROM {table} ORDER BY received_at, entry_id"));
    let mut rows: Vec<&str> = rows.lines().collect();
    rows.sort_unstable();
    let stored: Vec<&str> = stored.keys().map(String::as_str).collect();
    assert!(rows == stored, "{} rows for {} entries", rows.len(), stored.len());
    let dead = daemon.events(DEAD_LETTERS).await;
    assert!(dead.is_empty(), "{dead:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn entry_invalid_for_jsonb_is_dead_lettered_alone() {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let home = home(&server.url(), &table, "");
    let daemon = home.start().await;
    let mut events: Vec<String> = (0..20).map(|n| json!({ "n": n }).to_string()).collect();
    events[7] = r#"{"n":7,"text":"a\u0000b"}"#.to_owned();
    events[12] = r#"{"n":1e999999}"#.to_owned();
    let accepted = daemon.publish(STREAM, &events).await.expect("accepted");
    daemon.handled(STREAM, GROUP).await;
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {table}")), "18");
    let dead = daemon.get(&format!("/api/v1/streams/{DEAD_LETTERS}/events")).await;
    for place in [7, 12] {
        assert!(dead.contains(&accepted[place].id), "{dead}");
    }
    assert_eq!(daemon.events(DEAD_LETTERS).await.len(), 2);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_killed_under_load_keeps_each_row_once() {
    let mut server = PostgresServer::start().await;
    let home = home(&server.url(), "agent_results", "concurrency = 2");
    let daemon = home.start().await;
    let mut published = 0;
    for _ in 0..3 {
        let before = published;
        for _ in 0..10 {
            published += publish(&daemon, published, 100).await;
        }
        until("row", BOUND, async || {
            let rows = server.sql("SELECT count(*) FROM agent_results").parse::<u64>().expect("a count");
            (rows > before).then_some(())
        })
        .await;
        server.crash();
        published += publish(&daemon, published, 500).await;
        until("sink that is down", BOUND, async || daemon.body("/ready").await.contains("is down").then_some(())).await;
        server.restart().await;
        daemon.ready(reqwest::StatusCode::OK).await;
    }
    every_row_is_there_once(&server, "agent_results", &daemon).await;
    assert_eq!(server.sql("SELECT count(*) FROM agent_results"), published.to_string());
    daemon.stop().await;
}

/// Kills a daemon repeatedly, after commits that it may not have been notified of.
async fn survives_kills_after_commits(kills: u64) {
    let (server, table) = (PostgresServer::shared().await, new_table());
    let proxy = Proxy::start(server.port()).await;
    let home = home(&url_by(proxy.port()), &table, "");
    let count = || server.sql(&format!("SELECT count(*) FROM {table}")).parse::<u64>().expect("a count");
    let mut daemon = home.start().await;
    let mut published = publish(&daemon, 0, 50).await;
    daemon.handled(STREAM, GROUP).await;
    // Triggers see every inserted row, even if it conflicts with an existing one.
    server.sql(&format!(
        "CREATE SEQUENCE {table}_brought; CREATE FUNCTION {table}_count() RETURNS trigger LANGUAGE plpgsql AS \
         $$BEGIN PERFORM nextval('{table}_brought'); RETURN NEW; END$$; CREATE TRIGGER count BEFORE INSERT ON {table} \
         FOR EACH ROW EXECUTE FUNCTION {table}_count()"
    ));
    for kill in 1..=kills {
        // To connect through many slow responses would exceed the timeout of the sink.
        let is_connected = |line: &String| line.contains("table ready");
        until("connection", BOUND, async || daemon.take_log().iter().any(is_connected).then_some(())).await;
        let before = count();
        // The server itself waits, because starting a client repeatedly could exceed the timeout of the daemon.
        let wait = format!(
            "DO $$BEGIN FOR n IN 1..20000 LOOP IF (SELECT count(*) FROM {table}) > {before} THEN RETURN; END IF; \
             PERFORM pg_sleep(0.003); END LOOP; RAISE 'no row'; END$$"
        );
        let brought = tokio::task::spawn_blocking({
            let server = Arc::clone(&server);
            move || server.sql(&wait)
        });
        // Rows are committed some time before the daemon receives the response.
        proxy.delay(Duration::from_millis(150));
        published += publish(&daemon, published, 20 + random_below(80)).await;
        brought.await.expect("a row");
        daemon.crash();
        proxy.delay(Duration::ZERO);
        daemon = home.start().await;
        if kill % 10 == 0 {
            tell(&format!("{kill} kills, {published} events"));
        }
    }
    every_row_is_there_once(&server, &table, &daemon).await;
    assert_eq!(count(), published);
    let brought = server.sql(&format!("SELECT last_value FROM {table}_brought")).parse::<u64>().expect("a count");
    let again = brought.saturating_sub(published - 50);
    tell(&format!("{kills} kills: {published} events, {published} rows, {again} of them brought again"));
    assert!(again > 0, "no row was brought a second time: the kills came at the wrong time");
    daemon.stop().await;
}

#[expect(clippy::print_stderr, reason = "who runs dozens of kills wants to know what came of them")]
fn tell(text: &str) {
    eprintln!("{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_between_commit_and_ack_keep_each_row_once() {
    survives_kills_after_commits(10).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: cargo test --release --test it -- --ignored --nocapture fifty_kills"]
async fn fifty_kills_between_commit_and_ack_keep_each_row_once() {
    survives_kills_after_commits(50).await;
}
