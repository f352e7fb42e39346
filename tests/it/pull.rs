//! Pulling over HTTP: consumers that die, are late, nack, or wait, on every kind of store, with real clients.

mod disconnected;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::app::{BOUND, Daemon, Home};
use crate::support::python::Python;
use crate::support::redis::{Product, RedisServer};
use crate::support::until;

const STREAM: &str = "aurora:agent:tasks";
const STREAMS: &str = r#"
[[streams]]
name = "aurora:agent:tasks"
[[streams.groups]]
name = "agents"
claim_idle = "3s"
max_deliveries = 3
[[streams.groups]]
name = "logged"
sink = "log"
"#;

/// The store of a test.
struct Site {
    server: Option<RedisServer>,
}

impl Site {
    async fn embedded() -> Self {
        std::future::ready(Self { server: None }).await
    }

    async fn redis() -> Self {
        Self { server: Some(RedisServer::start(Product::Redis, &[]).await) }
    }

    async fn valkey() -> Self {
        Self { server: Some(RedisServer::start(Product::Valkey, &[]).await) }
    }

    fn home(&self, config: &str) -> Home {
        self.named("it", config)
    }

    fn named(&self, instance: &str, config: &str) -> Home {
        let server = self.server.as_ref();
        let store = server.map(|s| format!("[store]\nbackend = \"redis\"\n[store.redis]\nurl = \"{}\"\n", s.url()));
        Home::named(instance, &format!("{config}\n{STREAMS}\n{}", store.unwrap_or_default()))
    }

    /// Returns a home with another `claim_idle`. The redeliverer searches at a quarter of it.
    fn with_claim_idle(&self, claim_idle: &str) -> Home {
        let home = self.home("");
        let file = home.path("aurora-bus.toml");
        let config = std::fs::read_to_string(&file).expect("the configuration");
        std::fs::write(&file, config.replace("\"3s\"", &format!("{claim_idle:?}"))).expect("a writable folder");
        home
    }
}

async fn post(daemon: &Daemon, what: &str, body: &Value) -> (StatusCode, Value) {
    daemon.post(&format!("/api/v1/streams/{STREAM}/groups/agents/{what}"), body).await
}

/// Pulls entries, waiting for them for a while.
async fn pull(daemon: &Daemon, consumer: &str, max: usize, lease_ms: u64, wait_ms: u64) -> Vec<Value> {
    let body = json!({"consumer": consumer, "max": max, "lease_ms": lease_ms, "wait_ms": wait_ms});
    let (status, answer) = post(daemon, "pull", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["deliveries"].as_array().expect("a list").clone()
}

/// Pulls one entry.
async fn pull_one(daemon: &Daemon, consumer: &str, lease_ms: u64) -> Value {
    let mut tasks = pull(daemon, consumer, 1, lease_ms, 10_000).await;
    assert_eq!(tasks.len(), 1, "a task for {consumer}");
    tasks.remove(0)
}

/// Settles entries and returns the status of each result.
async fn settle(daemon: &Daemon, what: &str, tasks: &[&Value], more: Value) -> Vec<u64> {
    let tokens: Vec<&Value> = tasks.iter().map(|task| &task["token"]).collect();
    let mut body = json!({"tokens": tokens});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let (status, answer) = post(daemon, what, &body).await;
    let results: Vec<u64> =
        answer["results"].as_array().expect("a list").iter().map(|r| r["status"].as_u64().expect("a status")).collect();
    let expected = if results.iter().all(|status| *status == 200) { StatusCode::OK } else { StatusCode::MULTI_STATUS };
    assert_eq!(status, expected, "{answer}");
    results
}

async fn ack(daemon: &Daemon, task: &Value) -> u64 {
    settle(daemon, "ack", &[task], json!({})).await[0]
}

async fn publish(daemon: &Daemon, count: usize) {
    let payloads: Vec<String> = (0..count).map(|n| format!("{{\"task_id\":\"t{n}\"}}")).collect();
    daemon.publish(STREAM, &payloads).await.expect("accepted");
}

fn task_id(task: &Value) -> String {
    task["data"]["task_id"].as_str().expect("a task").to_owned()
}

async fn dead_letters(daemon: &Daemon, count: usize) -> Vec<Value> {
    until("dead letters", BOUND, async || {
        let page = daemon.get(&format!("/api/v1/dead-letters/{STREAM}")).await;
        let page: Value = serde_json::from_str(&page).expect("JSON");
        let letters = page["dead_letters"].as_array().expect("a list").clone();
        (letters.len() >= count).then_some(letters)
    })
    .await
}

async fn entry_is_leased_to_one_consumer_until_its_ack(site: Site) {
    let home = site.home("");
    let daemon = home.start().await;
    publish(&daemon, 2).await;
    let task = pull_one(&daemon, "agent-1", 3_000).await;
    assert_eq!((task_id(&task).as_str(), &task["attempt"], &task["lease_ms"]), ("t0", &json!(1), &json!(3_000)));
    assert!(task["id"].is_string() && task["event_id"].is_string() && task["expires"].is_string(), "{task}");
    let other = pull_one(&daemon, "agent-2", 3_000).await;
    assert_eq!(task_id(&other), "t1");
    assert_eq!(pull(&daemon, "agent-3", 10, 3_000, 0).await, Vec::<Value>::new(), "both are leased");
    assert_eq!(settle(&daemon, "extend", &[&task, &other], json!({"lease_ms": 3_000})).await, [200, 200]);
    let mut forged = task.clone();
    let token = task["token"].as_str().expect("a text");
    forged["token"] = token.replace("agent-1", "agent-2").into();
    let nonsense = json!({"token": "nonsense"});
    assert_eq!(settle(&daemon, "ack", &[&forged, &task, &nonsense], json!({})).await, [409, 200, 409]);
    assert_eq!(ack(&daemon, &task).await, 409, "once is enough");
    assert_eq!(ack(&daemon, &other).await, 200);
    daemon.handled(STREAM, "agents").await;
    assert_eq!(daemon.metric("aurora_bus_pull_deliveries_total").await, 2);
    assert_eq!(daemon.metric("aurora_bus_pull_leases").await, 0);
    assert_eq!(daemon.metric("aurora_bus_pull_expired_total").await, 0);
    daemon.stop().await;
}

async fn late_consumer_is_rejected_and_the_next_undisturbed(site: Site) {
    // No regular search of the redeliverer comes in time: the end of the lease triggers the redelivery.
    let home = site.with_claim_idle("60s");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let late = pull_one(&daemon, "agent-1", 300).await;
    let again = pull_one(&daemon, "agent-2", 30_000).await;
    assert_eq!((task_id(&again), &again["attempt"]), (task_id(&late), &json!(2)));
    assert_eq!(again["id"], late["id"], "it is the same task");
    assert_eq!(again.get("fields"), None, "internal fields are not shown to consumers");
    for what in ["ack", "nack", "extend"] {
        assert_eq!(settle(&daemon, what, &[&late], json!({})).await, [409], "{what}");
    }
    assert_eq!(ack(&daemon, &again).await, 200);
    daemon.handled(STREAM, "agents").await;
    assert_eq!(daemon.metric("aurora_bus_pull_expired_total").await, 1);
    daemon.stop().await;
}

async fn extended_entry_stays_with_its_consumer(site: Site) {
    let home = site.with_claim_idle("12s");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let task = pull_one(&daemon, "agent-1", 3_000).await;
    assert_eq!(settle(&daemon, "extend", &[&task], json!({"lease_ms": 12_000})).await, [200]);
    assert_eq!(pull(&daemon, "agent-2", 1, 3_000, 5_000).await, Vec::<Value>::new(), "its first lease has ended");
    assert_eq!(settle(&daemon, "extend", &[&task], json!({"lease_ms": 12_000})).await, [200], "once more");
    assert_eq!(ack(&daemon, &task).await, 200);
    daemon.stop().await;
}

async fn nacked_entry_returns_after_its_delay(site: Site) {
    let home = site.home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let task = pull_one(&daemon, "agent-1", 3_000).await;
    let began = Instant::now();
    assert_eq!(settle(&daemon, "nack", &[&task], json!({"delay_ms": 700})).await, [200]);
    assert_eq!(ack(&daemon, &task).await, 409, "its lease has ended");
    let again = pull_one(&daemon, "agent-1", 3_000).await;
    assert!(began.elapsed() >= Duration::from_millis(700), "after {:?}", began.elapsed());
    assert_eq!(again["attempt"], 2);
    assert_eq!(settle(&daemon, "nack", &[&again], json!({"reason": "the model is down"})).await, [200]);
    let last = pull_one(&daemon, "agent-2", 3_000).await;
    assert_eq!(last["attempt"], 3);
    assert_eq!(settle(&daemon, "nack", &[&last], json!({"reason": "the model is still down"})).await, [200]);
    let letters = dead_letters(&daemon, 1).await;
    assert_eq!((&letters[0]["reason"], &letters[0]["attempts"]), (&json!("exhausted"), &json!(3)), "{letters:?}");
    assert_eq!(letters[0]["error"], "the model is still down");
    daemon.handled(STREAM, "agents").await;
    daemon.stop().await;
}

async fn permanent_nack_dead_letters_the_entry_at_once(site: Site) {
    let home = site.home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let task = pull_one(&daemon, "agent-1", 3_000).await;
    let how = json!({"permanent": true, "reason": "no such agent type"});
    assert_eq!(settle(&daemon, "nack", &[&task], how).await, [200]);
    let letters = dead_letters(&daemon, 1).await;
    assert_eq!((&letters[0]["reason"], &letters[0]["error"]), (&json!("rejected"), &json!("no such agent type")));
    daemon.handled(STREAM, "agents").await;
    daemon.stop().await;
}

async fn entry_that_kills_every_consumer_is_dead_lettered(site: Site) {
    let home = site.home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let base = daemon.url("");
    for attempt in 1..=3 {
        let worker = Python::start(WORKER, &[&base, &format!("agent-{attempt}"), "die"]);
        worker.wait_for_line(&format!("got t0 {attempt}")).await;
    }
    let letters = dead_letters(&daemon, 1).await;
    assert_eq!((&letters[0]["reason"], &letters[0]["attempts"]), (&json!("crashed"), &json!(3)));
    daemon.handled(STREAM, "agents").await;
    daemon.stop().await;
}

/// A typical consumer. By its mode it works, or dies of an entry.
const WORKER: &str = r#"
import json, os, sys, urllib.request
base, name, mode = sys.argv[1:]
group = base + "/api/v1/streams/aurora:agent:tasks/groups/agents"
def ask(what, body):
    request = urllib.request.Request(f"{group}/{what}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
while True:
    body = {"consumer": name, "max": 5, "lease_ms": 500, "wait_ms": 5000}
    for task in ask("pull", body)["deliveries"]:
        print("got", task["data"]["task_id"], task["attempt"], flush=True)
        if mode == "die":
            os.kill(os.getpid(), 9)
        result = ask("ack", {"tokens": [task["token"]]})["results"][0]["status"]
        print("done", task["data"]["task_id"], result, flush=True)
"#;

async fn entry_of_a_killed_consumer_returns_after_its_lease(site: Site) {
    let home = site.home("");
    let daemon = home.start().await;
    publish(&daemon, 1).await;
    let base = daemon.url("");
    let killed = Python::start(WORKER, &[&base, "agent-1", "die"]);
    killed.wait_for_line("got t0 1").await;
    let other = Python::start(WORKER, &[&base, "agent-2", "work"]);
    other.wait_for_line("got t0 2").await;
    other.wait_for_line("done t0 200").await;
    daemon.handled(STREAM, "agents").await;
    drop(other);
    daemon.stop().await;
}

async fn leases_and_tokens_survive_a_crash_of_the_daemon(site: Site) {
    let home = site.with_claim_idle("12s");
    let daemon = home.start().await;
    publish(&daemon, 2).await;
    let kept = pull_one(&daemon, "agent-1", 12_000).await;
    let left = pull_one(&daemon, "agent-2", 2_000).await;
    daemon.crash();
    let daemon = home.start().await;
    assert_eq!(settle(&daemon, "extend", &[&kept], json!({})).await, [200]);
    let again = pull_one(&daemon, "agent-3", 12_000).await;
    assert_eq!((task_id(&again), &again["attempt"]), (task_id(&left), &json!(2)));
    assert_eq!(ack(&daemon, &left).await, 409);
    assert_eq!(settle(&daemon, "ack", &[&kept, &again], json!({})).await, [200, 200]);
    daemon.handled(STREAM, "agents").await;
    daemon.stop().await;
}

async fn waiting_pulls_are_served_in_order_and_end_at_the_stop(site: Site) {
    let home = site.home("");
    let daemon = Arc::new(home.start().await);
    let mut polls = JoinSet::new();
    for n in 0..30 {
        let polling = Arc::clone(&daemon);
        polls.spawn(async move { pull(&polling, &format!("agent-{n}"), 1, 3_000, 20_000).await });
    }
    let waiting = "aurora_bus_pull_waiting";
    until("30 polls", BOUND, async || (daemon.metric(waiting).await == 30).then_some(())).await;
    if let Some(server) = &site.server {
        let clients = server.cli(&["CLIENT", "LIST"]);
        let blocked = clients.lines().filter(|line| line.contains("cmd=xreadgroup")).count();
        assert!(blocked <= 3, "one reader for all waiting pulls, not {blocked}:\n{clients}");
    }
    publish(&daemon, 20).await;
    let mut given: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..20 {
        let tasks = polls.join_next().await.expect("a poll").expect("no panic");
        assert_eq!(tasks.len(), 1);
        *given.entry(task_id(&tasks[0])).or_default() += 1;
    }
    assert_eq!((given.len(), given.values().max()), (20, Some(&1)), "each to one");
    assert_eq!(daemon.metric(waiting).await, 10);
    daemon.signal("TERM");
    let began = Instant::now();
    while let Some(tasks) = polls.join_next().await {
        assert_eq!(tasks.expect("no panic"), Vec::<Value>::new());
    }
    assert!(began.elapsed() < Duration::from_secs(5), "ended after {:?}", began.elapsed());
    let daemon = Arc::into_inner(daemon).expect("no poll is left");
    assert_eq!(daemon.ended().await.status.code(), Some(0));
}

async fn entries_for_a_closed_poll_go_to_others(site: Site) {
    let home = site.home("");
    let daemon = Arc::new(home.start().await);
    let polling = Arc::clone(&daemon);
    let mut gone = JoinSet::new();
    gone.spawn(async move { pull(&polling, "gone", 5, 3_000, 20_000).await });
    until("a poll", BOUND, async || (daemon.metric("aurora_bus_pull_waiting").await == 1).then_some(())).await;
    gone.shutdown().await;
    until("its end", BOUND, async || (daemon.metric("aurora_bus_pull_waiting").await == 0).then_some(())).await;
    publish(&daemon, 5).await;
    let mut given = Vec::new();
    while given.len() < 5 {
        given.extend(pull(&daemon, "agent-1", 5, 3_000, 10_000).await);
    }
    let mut ids: Vec<_> = given.iter().map(task_id).collect();
    ids.sort();
    assert_eq!(ids, ["t0", "t1", "t2", "t3", "t4"]);
    assert!(given.iter().all(|task| task["attempt"] == 1), "a released delivery is not an attempt: {given:?}");
    let daemon = Arc::into_inner(daemon).expect("no poll is left");
    daemon.stop().await;
}

async fn exceeded_limits_are_reported_with_their_names(site: Site) {
    let home = site.home("[pull]\nmax_batch = 10\nmax_leases = 2\nmax_wait = \"20s\"\nmax_waiting = 1");
    let daemon = Arc::new(home.start().await);
    let cases = [
        (json!({}), 400, "bad_parameter", "body"),
        (json!({"consumer": "a b"}), 400, "bad_parameter", "consumer"),
        (json!({"consumer": "a", "lease": 1}), 400, "bad_parameter", "body"),
        (json!({"consumer": "a", "max": 0}), 400, "bad_parameter", "max"),
        (json!({"consumer": "a", "max": 11}), 400, "bad_parameter", "max"),
        (json!({"consumer": "a", "wait_ms": 20_001}), 400, "bad_parameter", "wait_ms"),
        (json!({"consumer": "a", "lease_ms": 3_001}), 400, "bad_parameter", "lease_ms"),
        (json!({"consumer": "a", "lease_ms": 99}), 400, "bad_parameter", "lease_ms"),
    ];
    for (body, status, code, field) in cases {
        let (answered, problem) = post(&daemon, "pull", &body).await;
        assert_eq!((answered.as_u16(), &problem["code"], &problem["field"]), (status, &json!(code), &json!(field)));
    }
    for (what, body) in [
        ("ack", json!({"tokens": []})),
        ("ack", json!({"tokens": vec!["x"; 1_001]})),
        ("nack", json!({"tokens": ["x"], "delay_ms": 3_001})),
        ("extend", json!({"tokens": ["x"], "lease_ms": 3_001})),
    ] {
        assert_eq!(post(&daemon, what, &body).await.0, StatusCode::BAD_REQUEST, "{what} {body}");
    }
    for (path, code) in
        [("nothing/groups/agents", "no_such_stream"), ("aurora:agent:tasks/groups/logged", "no_such_group")]
    {
        let (status, problem) = daemon.post(&format!("/api/v1/streams/{path}/pull"), &json!({"consumer": "a"})).await;
        assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!(code)));
    }
    publish(&daemon, 3).await;
    assert_eq!(pull(&daemon, "greedy", 10, 3_000, 0).await.len(), 2, "as many as it may have");
    let (status, problem) = post(&daemon, "pull", &json!({"consumer": "greedy"})).await;
    assert_eq!((status, &problem["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("too_many_leases")));
    assert_eq!(pull(&daemon, "modest", 10, 3_000, 10_000).await.len(), 1);
    let polling = Arc::clone(&daemon);
    let mut polls = JoinSet::new();
    polls.spawn(async move { pull(&polling, "first", 1, 3_000, 10_000).await });
    until("a poll", BOUND, async || (daemon.metric("aurora_bus_pull_waiting").await == 1).then_some(())).await;
    let (status, problem) = post(&daemon, "pull", &json!({"consumer": "second", "wait_ms": 1_000})).await;
    assert_eq!((status, &problem["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("too_many_waiting")));
    polls.shutdown().await;
    Arc::into_inner(daemon).expect("no poll is left").stop().await;
}

macro_rules! cases {
    ($($case:ident,)*) => {
        mod embedded_store {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Site::embedded().await).await;
                }
            )*
        }
        mod redis_store {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Site::redis().await).await;
                }
            )*
        }
        mod valkey_store {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $case() {
                    super::$case(super::Site::valkey().await).await;
                }
            )*
        }
    };
}

cases!(
    entry_is_leased_to_one_consumer_until_its_ack,
    late_consumer_is_rejected_and_the_next_undisturbed,
    extended_entry_stays_with_its_consumer,
    nacked_entry_returns_after_its_delay,
    permanent_nack_dead_letters_the_entry_at_once,
    entry_that_kills_every_consumer_is_dead_lettered,
    entry_of_a_killed_consumer_returns_after_its_lease,
    leases_and_tokens_survive_a_crash_of_the_daemon,
    waiting_pulls_are_served_in_order_and_end_at_the_stop,
    entries_for_a_closed_poll_go_to_others,
    exceeded_limits_are_reported_with_their_names,
);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settling_without_the_store_is_503_and_can_be_repeated() {
    let mut site = Site { server: Some(RedisServer::durable().await) };
    let home = site.with_claim_idle("10m");
    let daemon = home.start().await;
    publish(&daemon, 2).await;
    let (task, other) = (pull_one(&daemon, "agent-1", 600_000).await, pull_one(&daemon, "agent-1", 600_000).await);
    let server = site.server.as_mut().expect("a server");
    server.crash();
    let (status, problem) = post(&daemon, "ack", &json!({"tokens": [task["token"], "nonsense"]})).await;
    assert_eq!((status, &problem["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("store_unavailable")));
    server.restart().await;
    let answer = until("answer", BOUND, async || {
        let (status, answer) = post(&daemon, "ack", &json!({"tokens": [task["token"]]})).await;
        (status != StatusCode::SERVICE_UNAVAILABLE).then_some(answer)
    })
    .await;
    assert_eq!(answer["results"][0]["status"], 200, "{answer}");
    assert_eq!(server.cli(&["XGROUP", "DESTROY", STREAM, "agents"]), "1");
    assert_eq!(ack(&daemon, &other).await, 409, "all leases have gone with the group");
    daemon.stop().await;
}

/// A consumer that reads the group directly from Redis.
const REDIS_WORKER: &str = r#"
import json, sys, redis
port, stream, group, name = sys.argv[1:]
r = redis.Redis(port=int(port))
print("ready", flush=True)
while True:
    for _, entries in r.xreadgroup(group, name, {stream: ">"}, count=3, block=500) or []:
        for id, fields in entries:
            r.xack(stream, group, id)
            print("done", json.loads(fields[b"data"])["task_id"], flush=True)
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_and_redis_consumers_share_a_group_of_two_daemons() {
    let site = Site::redis().await;
    let (home_a, home_b) = (site.named("soc-a", ""), site.named("soc-b", ""));
    let (a, b) = (home_a.start().await, home_b.start().await);
    let port = site.server.as_ref().expect("a server").port().to_string();
    let workers = [
        Python::start(WORKER, &[&a.url(""), "agent-1", "work"]),
        Python::start(WORKER, &[&b.url(""), "agent-2", "work"]),
        Python::start(REDIS_WORKER, &[&port, STREAM, "agents", "agent-3"]),
    ];
    workers[2].wait_for_line("ready").await;
    publish(&a, 300).await;
    a.handled(STREAM, "agents").await;
    let done = || workers.iter().flat_map(Python::lines).filter_map(|line| line.split(' ').nth(1).map(str::to_owned));
    let of = |worker: &Python| worker.lines().iter().filter(|line| line.starts_with("done")).count();
    until("300 tasks", BOUND, async || (workers.iter().map(of).sum::<usize>() >= 300).then_some(())).await;
    let distinct: std::collections::BTreeSet<String> = done().filter(|id| id.starts_with('t')).collect();
    assert_eq!((workers.iter().map(of).sum::<usize>(), distinct.len()), (300, 300));
    drop(workers);

    publish(&a, 1).await;
    let task = pull_one(&a, "agent-4", 3_000).await;
    assert_eq!(settle(&b, "extend", &[&task], json!({"lease_ms": 3_000})).await, [200], "tokens are good everywhere");
    a.stop().await;
    assert_eq!(ack(&b, &task).await, 200);

    publish(&b, 1).await;
    let left = pull_one(&b, "agent-5", 1_000).await;
    let a = home_a.start().await;
    b.crash();
    let again = pull_one(&a, "agent-6", 3_000).await;
    assert_eq!((&again["id"], &again["attempt"]), (&left["id"], &json!(2)), "a lease of a dead instance ends as well");
    assert_eq!(ack(&a, &again).await, 200);
    a.handled(STREAM, "agents").await;
    a.stop().await;
}

/// Returns the first code block of a language in `docs/agents.md`.
fn example(language: &str) -> String {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/agents.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let (_, rest) = page.split_once(&format!("```{language}\n")).expect("an example");
    rest.split_once("```").expect("its end").0.to_owned()
}

/// Returns a daemon with the default configuration, but a shorter `claim_idle`.
fn shipped() -> Home {
    let groups = "[[streams.groups]]\nname = \"aurora-agents\"\nclaim_idle = \"30s\"\n";
    Home::new(&format!("[[streams]]\nname = \"aurora:agent:tasks\"\n{groups}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_example_settles_its_entries() {
    let home = shipped();
    let daemon = home.start().await;
    let mut command = std::process::Command::new("sh");
    command.args(["-euc", &example("sh")]).env("BUS", daemon.url("")).current_dir(home.path(""));
    let output = command.output().expect("sh runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("\"status\":200").count(), 2, "{said}");
    daemon.handled(STREAM, "aurora-agents").await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_example_acknowledges_nacks_and_dead_letters() {
    let home = shipped();
    let daemon = home.start().await;
    let told = "def handle(task):\n    print(\"handles\", task[\"task_id\"], flush=True)\n";
    let handler = "seen = set()\n\ndef handle(task):\n    print(\"handles\", task[\"task_id\"], flush=True)\n    \
                   if task[\"task_id\"] == \"t1\": raise WouldFailAgain(\"no such agent\")\n    \
                   if task[\"task_id\"] == \"t2\" and \"t2\" not in seen:\n        \
                   seen.add(\"t2\"); raise OSError(\"not now\")\n    \
                   print(\"done\", task[\"task_id\"], flush=True)\n";
    let example = example("python");
    assert!(example.contains(told), "the example has a handler");
    let program =
        format!("import os\nos.environ[\"BUS\"] = \"{}\"\n{}", daemon.url(""), example.replace(told, handler));
    let worker = Python::start(&program, &["agent-1"]);
    publish(&daemon, 4).await;
    for line in ["done t0", "done t3", "done t2"] {
        worker.wait_for_line(line).await;
    }
    let letters = dead_letters(&daemon, 1).await;
    assert_eq!(
        (letters.len(), &letters[0]["reason"], &letters[0]["error"]),
        (1, &json!("rejected"), &json!("no such agent"))
    );
    daemon.handled(STREAM, "aurora-agents").await;
    drop(worker);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_example_settles_after_an_outage_of_the_daemon() {
    let mut home = shipped();
    let daemon = home.start().await;
    let base = daemon.url("");
    home.set_env("AURORA_BUS__HTTP__LISTEN", base.strip_prefix("http://").expect("a URL"));
    let is_working = home.path("is-working");
    std::fs::write(&is_working, "").expect("a writable folder");
    let told = "print(\"handles\", task[\"task_id\"], flush=True)\n";
    let example = example("python").replace(
        told,
        &format!("{told}    while os.path.exists({is_working:?}): time.sleep(0.05)\n    print(\"done\", flush=True)\n"),
    );
    let worker = Python::start(&format!("import os\nos.environ[\"BUS\"] = {base:?}\n{example}"), &["agent-1"]);
    publish(&daemon, 1).await;
    worker.wait_for_line("handles t0").await;
    daemon.stop().await;
    std::fs::remove_file(&is_working).expect("a writable folder");
    worker.wait_for_line("done").await;
    let daemon = home.start().await;
    daemon.handled(STREAM, "aurora-agents").await;
    assert_eq!(worker.lines(), ["handles t0", "done"], "once");
    drop(worker);
    daemon.stop().await;
}
