//! No accepted event is lost when a process is killed or stopped, or a disk is full. These tests run the real binary.

mod kills;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::support::app::{BOUND, Daemon, Home, next_text};
use crate::support::redis::RedisServer;
use crate::support::{random_below, until};

const STREAM: &str = "aurora:audit";
const GROUP: &str = "audit-logger";

/// A stream with an audit sink.
const AUDITED: &str = r#"
[[streams]]
name = "aurora:audit"
relay = true
retention = { max_len = 900_000 }

[[streams.groups]]
name = "audit-logger"
sink = "audit"

[sinks.audit]
type = "audit"
path = "data/audit"
"#;

fn on_embedded() -> Home {
    Home::new(AUDITED)
}

fn on_redis(server: &RedisServer) -> Home {
    Home::new(&format!("{AUDITED}\n[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", server.url()))
}

/// Producers that load a daemon and record the accepted events.
#[derive(Debug, Default)]
struct Load {
    number: AtomicU64,
    stopped: AtomicBool,
    /// Number of refused batches by status.
    refusals: Mutex<BTreeMap<String, u64>>,
    /// Payloads of the accepted events by entry id.
    accepted: Mutex<BTreeMap<String, String>>,
}

impl Load {
    /// Returns some new events.
    fn batch(&self, pad: usize) -> Vec<String> {
        let size = 1 + random_below(20);
        let event = |_| {
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            json!({ "number": number, "pad": "x".repeat(pad) }).to_string()
        };
        (0..size).map(event).collect()
    }

    async fn publish_one_batch(&self, daemon: &Daemon, pad: usize) -> Result<(), Option<StatusCode>> {
        let batch = self.batch(pad);
        match daemon.publish(STREAM, &batch).await {
            Ok(results) => {
                assert!(results.iter().all(|accepted| !accepted.duplicate), "{results:?}");
                let ids = results.into_iter().map(|accepted| accepted.id);
                let mut accepted = self.accepted.lock().await;
                for (id, payload) in ids.zip(batch) {
                    assert!(accepted.insert(id, payload).is_none(), "an entry id was assigned twice");
                }
                Ok(())
            }
            Err(refused) => {
                let reason = refused.map_or_else(|| "no answer".to_owned(), |status| status.as_u16().to_string());
                *self.refusals.lock().await.entry(reason).or_default() += 1;
                Err(refused)
            }
        }
    }

    /// Publishes until it is stopped, or until the daemon has ended.
    async fn run(self: Arc<Self>, daemon: Arc<Daemon>) {
        while !self.stopped.load(Ordering::Relaxed) {
            match self.publish_one_batch(&daemon, 300).await {
                Err(Some(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(None) if daemon.status("/health").await.is_none() => return,
                Ok(()) | Err(None) => {}
            }
        }
    }

    fn start(self: &Arc<Self>, daemon: &Arc<Daemon>) -> JoinSet<()> {
        (0..4).map(|_| Arc::clone(self).run(Arc::clone(daemon))).collect()
    }

    async fn finish(&self, publishers: &mut JoinSet<()>) {
        self.stopped.store(true, Ordering::Relaxed);
        join_publishers(publishers).await;
    }

    async fn accepted_count(&self) -> usize {
        self.accepted.lock().await.len()
    }

    async fn refusals(&self, reason: &str) -> u64 {
        self.refusals.lock().await.get(reason).copied().unwrap_or_default()
    }

    /// Waits until another event is accepted.
    async fn wait_for_progress(&self) {
        let before = self.accepted_count().await;
        until("accepted event", BOUND, async || (self.accepted_count().await > before).then_some(())).await;
    }
}

/// Waits until the producers have ended by themselves.
async fn join_publishers(publishers: &mut JoinSet<()>) {
    while let Some(ended) = publishers.join_next().await {
        ended.expect("a publisher");
    }
}

/// Returns the entry ids of all audit records, in file order. Fails if a record is not JSON.
fn audited_ids(folder: &Path) -> Vec<String> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .expect("the audit folder")
        .map(|entry| entry.expect("the audit folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
        .collect();
    files.sort();
    let lines = files.iter().flat_map(|file| {
        let text = fs::read_to_string(file).expect("an audit file");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    // Each file begins with a record about the file itself, without an entry.
    let id = |line: String| {
        let record: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("no record: {e}: {line}"));
        let id = record["id"].as_str().map(str::to_owned);
        assert!(id.is_some() || record["file"].is_u64(), "a record without an entry: {line}");
        id
    };
    lines.filter_map(id).collect()
}

/// Checks that every accepted event is stored unchanged and audited exactly once, and that the audit files verify.
async fn assert_nothing_lost(home: &Home, load: &Load) {
    let daemon = home.start().await;
    daemon.handled(STREAM, GROUP).await;
    let stored = daemon.events(STREAM).await;
    daemon.stop().await;

    let accepted = load.accepted.lock().await;
    assert!(!accepted.is_empty(), "nothing was accepted at all");
    for (id, payload) in accepted.iter() {
        assert_eq!(stored.get(id), Some(payload), "entry {id}");
    }
    let mut times: BTreeMap<String, u64> = BTreeMap::new();
    for id in audited_ids(&home.path("data/audit")) {
        *times.entry(id).or_default() += 1;
    }
    let repeated: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert!(repeated.is_empty(), "audited more than once: {repeated:?}");
    let missing: Vec<_> = stored.keys().filter(|id| !times.contains_key(*id)).collect();
    assert!(missing.is_empty(), "never audited: {missing:?}");

    let verified = home.run(&["audit", "verify", "data/audit"]);
    assert!(verified.status.success(), "{verified:?}");
}

async fn survives_twenty_kills(home: &Home) {
    let load = Arc::new(Load::default());
    for life in 0..20 {
        let daemon = Arc::new(home.start().await);
        let mut publishers = load.start(&daemon);
        load.wait_for_progress().await;
        // On Redis a worker waits until the name of the killed worker is free. Some daemons are killed before.
        if life % 5 == 4 {
            until("deliveries", BOUND, async || {
                let metrics = daemon.get("/metrics").await;
                let has_any = |line: &str| line.starts_with("aurora_bus_acknowledged_total{") && !line.ends_with(" 0");
                metrics.lines().any(has_any).then_some(())
            })
            .await;
        }
        tokio::time::sleep(Duration::from_millis(random_below(400))).await;
        daemon.signal("KILL");
        join_publishers(&mut publishers).await;
    }
    assert_nothing_lost(home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_under_load_lose_nothing_on_the_embedded_store() {
    survives_twenty_kills(&on_embedded()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_under_load_lose_nothing_on_redis() {
    let server = RedisServer::durable().await;
    survives_twenty_kills(&on_redis(&server)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_killed_under_load_loses_no_accepted_event() {
    let mut server = RedisServer::durable().await;
    let home = on_redis(&server);
    let daemon = Arc::new(home.start().await);
    let load = Arc::new(Load::default());
    let mut publishers = load.start(&daemon);
    for _ in 0..3 {
        load.wait_for_progress().await;
        server.crash();
        daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
        assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
        let refused = load.refusals("503").await;
        until("503", BOUND, async || (load.refusals("503").await > refused).then_some(())).await;
        server.restart().await;
        load.wait_for_progress().await;
        daemon.ready(StatusCode::OK).await;
    }
    load.finish(&mut publishers).await;
    Arc::into_inner(daemon).expect("the last reference").stop().await;
    assert_nothing_lost(&home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_hanging_under_load_loses_no_accepted_event() {
    let server = RedisServer::durable().await;
    let home = on_redis(&server);
    let daemon = Arc::new(home.start().await);
    let load = Arc::new(Load::default());
    let mut publishers = load.start(&daemon);
    load.wait_for_progress().await;

    server.signal("STOP");
    let hung = Instant::now();
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    until("10 s of a hanging Redis", BOUND, async || (hung.elapsed() > Duration::from_secs(10)).then_some(())).await;
    assert!(load.refusals("503").await > 0, "no request was rejected");
    server.signal("CONT");

    load.wait_for_progress().await;
    daemon.ready(StatusCode::OK).await;
    load.finish(&mut publishers).await;
    Arc::into_inner(daemon).expect("the last reference").stop().await;
    assert_nothing_lost(&home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemon_started_before_its_redis_recovers() {
    let mut server = RedisServer::durable().await;
    server.crash();
    let home = on_redis(&server);
    let daemon = home.spawn().await.expect("the daemon waits for its store");
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    let load = Load::default();
    let refused = load.publish_one_batch(&daemon, 300).await;
    assert_eq!(refused, Err(Some(StatusCode::SERVICE_UNAVAILABLE)));
    server.restart().await;
    daemon.ready(StatusCode::OK).await;
    load.publish_one_batch(&daemon, 300).await.expect("the store is available");
    daemon.stop().await;
    assert_nothing_lost(&home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn second_daemon_on_same_folder_is_refused() {
    let home = on_embedded();
    let first = home.start().await;
    let second = home.spawn().await.expect_err("the second daemon must not run");
    assert_eq!(second.status.code(), Some(1), "{}", second.log);
    assert!(second.log.contains("another"), "the log does not say why:\n{}", second.log);
    assert_eq!(first.status("/ready").await, Some(StatusCode::OK));
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unwritable_folder_is_refused_with_its_name() {
    // A file in place of the folder stops root as well.
    let home = on_embedded();
    fs::write(home.path("data"), "").expect("a writable folder");
    let ended = home.spawn().await.expect_err("the folder is not writable");
    assert_eq!(ended.status.code(), Some(1), "{}", ended.log);
    assert!(ended.log.contains("data"), "the log does not name the folder:\n{}", ended.log);
}

/// A small file system, unmounted on drop.
#[derive(Debug)]
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn new(mebibytes: u32) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        let mounted = mounted.expect("mount runs");
        assert!(mounted.status.success(), "a small file system cannot be mounted (are you root?): {mounted:?}");
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A lazy unmount, because a daemon that is being killed may still use it.
        drop(Command::new("umount").arg("--lazy").arg(self.0.path()).status());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disk_refuses_events_and_keeps_accepted_ones() {
    let disk = SmallDisk::new(64);
    let home = Home::at(disk.0.path(), AUDITED);
    let ballast = home.path("ballast");
    fs::write(&ballast, vec![0; 24 << 20]).expect("room for the ballast");
    let load = Load::default();

    let daemon = home.start().await;
    until("507", BOUND, async || {
        let outcome = load.publish_one_batch(&daemon, 20_000).await;
        (outcome == Err(Some(StatusCode::INSUFFICIENT_STORAGE))).then_some(())
    })
    .await;
    assert_eq!(daemon.status("/health").await, Some(StatusCode::OK));
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;

    // A crash on the full disk, then free space again.
    daemon.crash();
    fs::remove_file(ballast).expect("the ballast");
    assert_nothing_lost(&home, &load).await;
    let daemon = home.start().await;
    load.publish_one_batch(&daemon, 300).await.expect("room again");
}

#[tokio::test(flavor = "multi_thread")]
async fn freed_disk_space_recovers_daemon_without_restart() {
    let disk = SmallDisk::new(64);
    let home = Home::at(disk.0.path(), AUDITED);
    let ballast = home.path("ballast");
    fs::write(&ballast, vec![0; 24 << 20]).expect("room for the ballast");
    let load = Load::default();

    let daemon = home.start().await;
    until("507", BOUND, async || {
        let outcome = load.publish_one_batch(&daemon, 20_000).await;
        (outcome == Err(Some(StatusCode::INSUFFICIENT_STORAGE))).then_some(())
    })
    .await;
    fs::remove_file(ballast).expect("the ballast");
    until("accepted event", BOUND, async || load.publish_one_batch(&daemon, 300).await.ok()).await;
    daemon.ready(StatusCode::OK).await;
    daemon.stop().await;
    assert_nothing_lost(&home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_under_load_fails_ready_and_exits_with_0() {
    let home = on_embedded();
    let daemon = Arc::new(home.start().await);
    let load = Arc::new(Load::default());
    let mut publishers = load.start(&daemon);
    load.wait_for_progress().await;

    // A dashboard without a close response keeps the drain waiting.
    let mut socket = daemon.watch("/api/v1/ws/agent-thoughts").await;
    next_text(&mut socket).await;
    daemon.signal("TERM");
    daemon.ready(StatusCode::SERVICE_UNAVAILABLE).await;
    join_publishers(&mut publishers).await;
    let ended = Arc::into_inner(daemon).expect("the last reference").ended().await;
    assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    assert_nothing_lost(&home, &load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_ends_the_daemon_at_once() {
    let home = on_embedded();
    let daemon = home.start().await;
    // A request without its body keeps the drain waiting. The handler reads it after the status 100.
    let address = daemon.url("").replacen("http://", "", 1);
    let mut request = TcpStream::connect(address).await.expect("a connection");
    let head = "host: localhost\r\ncontent-length: 10\r\nexpect: 100-continue";
    let head = format!("POST /api/v1/streams/{STREAM}/events HTTP/1.1\r\n{head}\r\n\r\n");
    request.write_all(head.as_bytes()).await.expect("a connection");
    let mut go_on = [0; 12];
    request.read_exact(&mut go_on).await.expect("a response");
    assert_eq!(&go_on, b"HTTP/1.1 100");

    daemon.signal("TERM");
    until("drain", BOUND, async || (daemon.status("/ready").await != Some(StatusCode::OK)).then_some(())).await;
    let signalled = Instant::now();
    daemon.signal("TERM");
    let ended = daemon.ended().await;
    assert!(signalled.elapsed() < Duration::from_secs(2), "{}", ended.log);
    assert_ne!(ended.status.code(), Some(0), "an interrupted drain is no success:\n{}", ended.log);
}
