//! The soak test: two daemons on one Redis at 2000 events a second, with a fault every few seconds.
//!
//! It is too long for every test run. It runs for two minutes or half an hour, prints its progress every five seconds,
//! and its result at the end:
//!
//! ```text
//! cargo test --release --test it -- --ignored --nocapture soak_of_two_minutes
//! cargo test --release --test it -- --ignored --nocapture soak_of_half_an_hour
//! ```
//!
//! The faults are random: `kill -9` of a daemon or of Redis, a paused Redis, connections that are cut, refused, delayed
//! or black holes, and lost replies. The result must be: every accepted event was handled and stored once; each
//! repetition had a higher attempt; `aurora-bus reconcile` finds balanced accounts; the memory of the surviving daemon,
//! the number of consumers and the length of the stream stay bounded.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::faults::{ACKNOWLEDGEMENT, FETCH};
use crate::support::app::{BOUND, Daemon, Home, client};
use crate::support::proxy::Proxy;
use crate::support::redis::{Product, RedisServer};
use crate::support::{random_below, until};

const STREAM: &str = "aurora:alerts";
const GROUP: &str = "alert-processor";
const PER_SECOND: u64 = 2000;
const BATCH: u64 = 20;
const PUBLISHERS: usize = 16;
const MAX_LEN: u64 = 50_000;

const CONFIG: &str = r#"
[http]
rate_limit = 1_000_000

[publish]
dedup_window = "2m"

[[streams]]
name = "aurora:alerts"
relay = true
retention = { max_len = 50_000 }
[[streams.groups]]
name = "alert-processor"
sink = "log"
claim_idle = "5s"
handler_timeout = "2s"

[sinks.log]
type = "log"

[store]
backend = "redis"
[store.redis]
command_timeout = "3s"
"#;

/// The state of each event by its number, in one byte each, because there are millions.
struct Tally {
    accepted: Vec<AtomicBool>,
    handled: Vec<AtomicU8>,
    /// Number of times that an event was handled at its first attempt.
    firsts: Vec<AtomicU8>,
    next: AtomicU64,
    accepted_count: AtomicU64,
    handled_count: AtomicU64,
    repeated_count: AtomicU64,
}

impl Tally {
    fn new(events: u64) -> Self {
        let events = usize::try_from(events).expect("fits");
        Self {
            accepted: (0..events).map(|_| AtomicBool::new(false)).collect(),
            handled: (0..events).map(|_| AtomicU8::new(0)).collect(),
            firsts: (0..events).map(|_| AtomicU8::new(0)).collect(),
            next: AtomicU64::new(0),
            accepted_count: AtomicU64::new(0),
            handled_count: AtomicU64::new(0),
            repeated_count: AtomicU64::new(0),
        }
    }

    /// Counts the events in a daemon's log.
    fn read_log(&self, daemon: &Daemon) {
        for line in daemon.take_log() {
            let Ok(record) = serde_json::from_str::<Value>(&line) else { continue };
            let Some(title) = record["title"].as_str().filter(|_| record["sink"] == "log") else { continue };
            let number: usize = title.parse().expect("titles are numbers");
            if record["attempt"] == 1 {
                self.firsts[number].fetch_add(1, Ordering::Relaxed);
            }
            if self.handled[number].fetch_add(1, Ordering::Relaxed) == 0 {
                self.handled_count.fetch_add(1, Ordering::Relaxed);
            } else {
                self.repeated_count.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Publishes a share of the events. Each batch is retried until one of the daemons accepts it.
async fn publish(tally: Arc<Tally>, daemons: Arc<Mutex<[String; 2]>>, begun: Instant) {
    let client = client();
    loop {
        let first = tally.next.fetch_add(BATCH, Ordering::Relaxed);
        let numbers = first..(first + BATCH).min(tally.accepted.len() as u64);
        if numbers.is_empty() {
            return;
        }
        let due = begun + Duration::from_millis(first * 1000 / PER_SECOND);
        tokio::time::sleep_until(due.into()).await;
        let event =
            |number| format!(r#"{{"id":"{number}","title":"{number}","severity":"high","pad":"{:0>300}"}}"#, "");
        let body = numbers.clone().map(event).collect::<Vec<_>>().join("\n");
        for round in 0.. {
            let base = daemons.lock().expect("unpoisoned")[usize::from((first / BATCH + round) % 2 == 1)].clone();
            let request = client
                .post(format!("{base}/api/v1/streams/{STREAM}/events?dedup=id"))
                .header("content-type", "application/x-ndjson")
                .timeout(Duration::from_secs(10))
                .body(body.clone());
            // A response without its whole body counts as no response.
            let is_accepted = match request.send().await {
                Ok(answer) if answer.status() == StatusCode::CREATED => answer.bytes().await.is_ok(),
                _ => false,
            };
            if is_accepted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for number in numbers {
            tally.accepted[usize::try_from(number).expect("fits")].store(true, Ordering::Relaxed);
            tally.accepted_count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A fault.
#[derive(Debug, Clone, Copy)]
enum Fault {
    KillDaemon,
    KillRedis,
    StopRedis,
    Cut,
    Refuse,
    Delay,
    BlackHole,
    LoseFetch,
    LoseScript,
    LoseAcknowledgement,
}

const FAULTS: [Fault; 10] = [
    Fault::KillDaemon,
    Fault::KillRedis,
    Fault::StopRedis,
    Fault::Cut,
    Fault::Refuse,
    Fault::Delay,
    Fault::BlackHole,
    Fault::LoseFetch,
    Fault::LoseScript,
    Fault::LoseAcknowledgement,
];

struct Soak {
    server: RedisServer,
    proxy: Proxy,
    /// Its daemon is killed from time to time.
    mortal_home: Home,
    mortal: Daemon,
    survivor_home: Home,
    /// Runs for the whole test.
    survivor: Daemon,
    tally: Arc<Tally>,
    urls: Arc<Mutex<[String; 2]>>,
    faults: u64,
    /// Memory of the surviving daemon over time, in KiB.
    memory: Vec<u64>,
    /// Number of consumers of the group over time.
    consumers: Vec<usize>,
}

impl Soak {
    async fn new(events: u64) -> Self {
        let server = RedisServer::start(Product::Redis, &["--appendonly", "yes"]).await;
        let proxy = Proxy::start(server.port()).await;
        let home = |instance: &str| {
            let mut home = Home::new(&format!("{CONFIG}\nurl = \"{}\"\n", proxy.url()));
            home.set_env("AURORA_BUS__INSTANCE", instance);
            home
        };
        let (mortal_home, survivor_home) = (home("mortal"), home("survivor"));
        let (mortal, survivor) = (mortal_home.start().await, survivor_home.start().await);
        let urls = Arc::new(Mutex::new([mortal.url(""), survivor.url("")]));
        let tally = Arc::new(Tally::new(events));
        Self {
            server,
            proxy,
            mortal_home,
            mortal,
            survivor_home,
            survivor,
            tally,
            urls,
            faults: 0,
            memory: Vec::new(),
            consumers: Vec::new(),
        }
    }

    async fn break_something(&mut self) -> Fault {
        self.faults += 1;
        // Random, because a fixed cycle would be too regular.
        let fault = FAULTS[usize::try_from(random_below(FAULTS.len() as u64)).expect("fits")];
        match fault {
            Fault::KillDaemon => {
                self.mortal.signal("KILL");
                until("the end of the log", BOUND, async || self.mortal.is_silent().then_some(())).await;
                self.tally.read_log(&self.mortal);
                self.mortal = self.mortal_home.spawn().await.expect("it starts again");
                self.urls.lock().expect("unpoisoned")[0] = self.mortal.url("");
            }
            Fault::KillRedis => {
                self.server.crash();
                tokio::time::sleep(Duration::from_millis(random_below(2000))).await;
                self.server.restart().await;
            }
            Fault::StopRedis => {
                self.server.signal("STOP");
                tokio::time::sleep(Duration::from_millis(500 + random_below(4000))).await;
                self.server.signal("CONT");
            }
            Fault::Cut => self.proxy.reset(),
            Fault::Refuse => {
                self.proxy.refuse(true);
                self.proxy.reset();
                tokio::time::sleep(Duration::from_millis(random_below(2000))).await;
                self.proxy.refuse(false);
            }
            Fault::Delay => {
                self.proxy.delay(Duration::from_millis(random_below(60)));
                tokio::time::sleep(Duration::from_secs(3)).await;
                self.proxy.delay(Duration::ZERO);
            }
            Fault::BlackHole => self.proxy.black_hole_existing(),
            Fault::LoseFetch => self.proxy.drop_reply_to(FETCH),
            Fault::LoseScript => self.proxy.drop_reply_to(b"EVALSHA"),
            Fault::LoseAcknowledgement => self.proxy.drop_reply_to(ACKNOWLEDGEMENT),
        }
        fault
    }

    fn record_memory(&mut self) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.survivor.pid())).expect("it lives");
        let memory = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
        self.memory.push(memory.trim().trim_end_matches(" kB").parse().expect("a number"));
    }

    fn count_consumers(&self) -> usize {
        let consumers = self.server.cli(&["XINFO", "CONSUMERS", STREAM, GROUP]);
        consumers.lines().filter(|line| *line == "name").count()
    }

    /// Checks that the accounts add up, with the command for operators.
    fn reconcile(&self) {
        let output = self.survivor_home.run(&["reconcile", "--url", &self.survivor.url(""), "--wait", "30s"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }

    fn read_logs(&self) {
        self.tally.read_log(&self.mortal);
        self.tally.read_log(&self.survivor);
    }

    fn number(&self, command: &[&str]) -> u64 {
        let answer = self.server.cli(command);
        answer.lines().next().and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("{command:?}: {answer}"))
    }

    fn stream_info(&self, name: &str) -> u64 {
        let info = self.server.cli(&["XINFO", "STREAM", STREAM]);
        let mut lines = info.lines().skip_while(|line| *line != name);
        lines.nth(1).and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("no {name}: {info}"))
    }
}

#[expect(clippy::print_stderr, reason = "the long run prints its progress")]
async fn soak(duration: Duration, fault_every: Duration, may_repeat_percent: u64) {
    let events = duration.as_secs() * PER_SECOND;
    let mut soak = Soak::new(events).await;
    let tally = Arc::clone(&soak.tally);
    let begun = Instant::now();
    let mut publishers: JoinSet<()> =
        (0..PUBLISHERS).map(|_| publish(tally.clone(), soak.urls.clone(), begun)).collect();
    let mut next_fault = begun + fault_every;
    let mut next_line = begun;
    let mut last_fault = None;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut at_rest_since: Option<Instant> = None;
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        soak.read_logs();
        if let Some(ended) = publishers.try_join_next() {
            ended.expect("a publisher");
        }
        if Instant::now() >= next_fault && begun.elapsed() < duration {
            last_fault = Some(soak.break_something().await);
            next_fault = Instant::now() + fault_every;
        }
        if Instant::now() >= next_line {
            next_line += Duration::from_secs(5);
            soak.record_memory();
            soak.consumers.push(soak.count_consumers());
            eprintln!(
                "{:>5} s: {} accepted, {} handled, {} repeated, {} faults (last: {last_fault:?}), {} MiB",
                begun.elapsed().as_secs(),
                count(&tally.accepted_count),
                count(&tally.handled_count),
                count(&tally.repeated_count),
                soak.faults,
                soak.memory.last().expect("noted just now") / 1024,
            );
        }
        if publishers.is_empty() && begun.elapsed() >= duration {
            let since = *at_rest_since.get_or_insert_with(Instant::now);
            let is_at_rest =
                count(&tally.handled_count) >= events && soak.server.cli(&["XPENDING", STREAM, GROUP]).starts_with('0');
            if is_at_rest {
                break;
            }
            assert!(since.elapsed() < Duration::from_mins(2), "not settled: {} handled", count(&tally.handled_count));
        }
    }

    let is_unhandled = |number: &usize| {
        tally.accepted[*number].load(Ordering::Relaxed) && tally.handled[*number].load(Ordering::Relaxed) == 0
    };
    let unhandled: Vec<usize> = (0..tally.accepted.len()).filter(is_unhandled).collect();
    assert!(unhandled.is_empty(), "accepted and never handled: {unhandled:?}");
    assert_eq!(soak.stream_info("entries-added"), events, "each event is stored once");
    let unexplained = tally.firsts.iter().filter(|firsts| firsts.load(Ordering::Relaxed) > 1).count();
    assert_eq!(unexplained, 0, "handled twice as if it were the first time");
    let repeated = count(&tally.repeated_count);
    assert!(repeated * 100 < events * may_repeat_percent, "{repeated} of {events} were handled again");
    let dead = soak.number(&["XLEN", &format!("{STREAM}:dead_letter")]);
    assert_eq!(dead, 0, "there are dead letters");
    // One consumer of each daemon, at any time.
    let consumers = *soak.consumers.iter().max().expect("noted");
    assert!(consumers <= 2 && soak.count_consumers() <= 2, "{:?}", soak.consumers);
    soak.reconcile();
    until("a trimmed stream", BOUND, async || (soak.stream_info("length") <= 2 * MAX_LEN).then_some(())).await;
    // The first half of the time is for warming up.
    let (early, late) = soak.memory.split_at(soak.memory.len() / 2);
    let (early, late) = (early.iter().max().expect("noted"), late.iter().max().expect("noted"));
    assert!(*late < early + early / 4 + 20 * 1024, "memory grew from {early} to {late} KiB");
    eprintln!(
        "balanced: {events} accepted, all handled, {repeated} of them again, {} faults, {consumers} consumers at most, \
         memory at most {} MiB in the first half and {} MiB in the second",
        soak.faults,
        early / 1024,
        late / 1024
    );
    soak.mortal.stop().await;
    soak.survivor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes: cargo test --release --test it -- --ignored --nocapture soak_of_two_minutes"]
async fn soak_of_two_minutes() {
    soak(Duration::from_mins(2), Duration::from_secs(10), 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half an hour: cargo test --release --test it -- --ignored --nocapture soak_of_half_an_hour"]
async fn soak_of_half_an_hour() {
    soak(Duration::from_mins(30), Duration::from_secs(20), 1).await;
}
