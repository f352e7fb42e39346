//! `aurora-bus-bench` at a small scale, with every process that it starts.

// Shared with the tests of the product, which also install servers that are missing.
#[path = "../../tests/it/support/install.rs"]
mod install;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The time limit of a state that a test waits for.
const BOUND: Duration = Duration::from_mins(1);

fn bench(folder: &Path) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_aurora-bus-bench"));
    let daemon = program.with_file_name("aurora-bus");
    assert!(daemon.is_file(), "{} does not exist; build it with `cargo build --workspace`", daemon.display());
    let mut command = Command::new(program);
    command.arg("--dir").arg(folder);
    command.args(["--seconds", "1", "--rounds", "1", "--clients", "10", "--idle-clients", "10", "--backlog", "2000"]);
    command
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

fn folder() -> TempDir {
    TempDir::new().expect("a temporary folder")
}

fn wait_until(state: &str, mut is_reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_reached() {
        assert!(started.elapsed() < BOUND, "{state}: not reached within {BOUND:?}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// Measures scenarios; returns all figures as `measurement: name`, and those of them with a ceiling.
fn figures(scenarios: &[&str], store: &str) -> (Vec<String>, Vec<String>) {
    let all = measure(scenarios, store);
    let with_ceiling = all.iter().filter(|(_, figure)| figure["ceiling"].is_object());
    let with_ceiling = with_ceiling.map(|(name, _)| name.clone()).collect();
    (all.into_iter().map(|(name, _)| name).collect(), with_ceiling)
}

/// Measures scenarios; returns the figures of the JSON file, each with its name as `measurement: name`.
fn measure(scenarios: &[&str], store: &str) -> Vec<(String, Value)> {
    let (files, results) = (folder(), folder());
    let json = results.path().join("bench.json");
    let server = install::program("redis-server", "redis-server");
    let mut command = bench(files.path());
    command.args(scenarios).args(["--store", store]).arg("--redis-server").arg(server).arg("--json").arg(&json);
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{}", text_of(&output));
    assert_eq!(fs::read_dir(files.path()).expect("the folder exists").count(), 0, "files were left behind");

    let report: Value = serde_json::from_slice(&fs::read(json).expect("the JSON file exists")).expect("it is JSON");
    let mut all = Vec::new();
    for figure in report["figures"].as_array().expect("figures") {
        let (measurement, name) = (text(&figure["measurement"]), text(&figure["name"]));
        assert!(text_of(&output).contains(name), "{name} is not in the table");
        assert_eq!(figure["store"], store);
        assert!(figure["daemon"]["runs"].as_array().is_some_and(|runs| !runs.is_empty()), "{name}");
        if figure["ceiling"].is_object() {
            assert!(figure["ceiling"]["median"].as_f64().is_some_and(|median| median >= 0.0), "{name}");
        }
        all.push((format!("{measurement}: {name}"), figure.clone()));
    }
    all
}

/// Returns the figure of the relay with this name, beside this competitor if one is given.
fn relay_figure(figures: &[(String, Value)], name: &str, competitor: Option<&str>) -> Value {
    let is_wanted = |(full, figure): &&(String, Value)| {
        *full == format!("relay: {name}") && competitor.is_none_or(|name| figure["ceiling"]["name"] == name)
    };
    let names = || figures.iter().map(|(name, _)| name).collect::<Vec<_>>();
    let found = figures.iter().find(is_wanted);
    found.unwrap_or_else(|| panic!("no {name} beside {competitor:?} in {:?}", names())).1.clone()
}

#[test]
fn redis_figures_have_ceilings() {
    let (all, with_ceiling) = figures(&["publish", "consume", "latency"], "redis");
    for figure in [
        "publish: batches of 500",
        "publish: one per request, 64 connections",
        "consume: backlog of 2000",
        "latency: 1000/s to 1 client, p50",
        "latency: 1000/s to 1 client, p99",
    ] {
        assert!(with_ceiling.iter().any(|name| name == figure), "no {figure} in {all:?}");
    }
}

#[test]
fn embedded_figures_have_ceilings() {
    let (all, with_ceiling) = figures(&["publish", "consume", "fanout", "idle", "start"], "embedded");
    for figure in [
        "publish: batches of 500",
        "consume: delivered beside publishing",
        "fan-out: saturated, 10 clients",
        "fan-out: 100/s to 10 clients, p99",
    ] {
        assert!(with_ceiling.iter().any(|name| name == figure), "no {figure} in {all:?}");
    }
    for figure in ["idle: 10 clients, memory of each", "start: until ready", "start: size of the program"] {
        assert!(all.iter().any(|name| name == figure), "no {figure} in {all:?}");
    }
}

#[test]
fn webhook_figures_have_a_bare_loop_as_ceiling() {
    let (_, with_ceiling) = figures(&["webhook"], "embedded");
    assert_eq!(with_ceiling, ["webhook: the sink alone, 32 in flight", "webhook: a backlog, 32 in flight"]);
}

#[test]
fn relay_is_compared_with_baseline_and_nats() {
    let nats = install::program("nats-server", "nats-server");
    let nats = nats.to_str().expect("a path of UTF-8");
    let figures =
        measure(&["relay", "--only", "idle,fanout,latency", "--idle-seconds", "1", "--nats-server", nats], "redis");
    for competitor in ["baseline relay", "NATS"] {
        for name in ["saturated, 10 clients", "saturated, 10 clients, relay CPU", "100/s to 10 clients, p99"] {
            let figure = relay_figure(&figures, name, Some(competitor));
            assert!(figure["ceiling"]["median"].as_f64().is_some_and(|median| median > 0.0), "{figure}");
        }
    }
    relay_figure(&figures, "idle, 10 clients, memory of each", None);
}

#[test]
fn filters_and_drain_are_measured() {
    let figures = measure(&["relay", "--only", "filters,drain", "--crowd", "20"], "embedded");
    relay_figure(&figures, "50 filters, 20 clients, relay CPU", Some("no filters"));
    relay_figure(&figures, "one match, slowest of 50 filters", None);
    let closes = relay_figure(&figures, "drain, 10 clients, closes per tenth of the window", None);
    let closes: f64 = closes["daemon"]["runs"].as_array().expect("runs").iter().filter_map(Value::as_f64).sum();
    assert!((closes - 10.0).abs() < 0.1, "{closes}");
    assert_eq!(relay_figure(&figures, "drain, 10 clients, share closed with 4000", None)["met"], true);
}

#[test]
fn dashboards_miss_nothing_after_storm_and_pause() {
    for store in ["redis", "embedded"] {
        let figures = measure(&["relay", "--only", "storm,slow", "--crowd", "20"], store);
        for name in ["storm, 20 clients × 300 events", "1 of 10 do not read"] {
            for value in ["duplicates", "holes"] {
                let figure = relay_figure(&figures, &format!("{name}, {value}"), None);
                assert_eq!(figure["met"], true, "{store}: {figure}");
            }
        }
        let reads = relay_figure(&figures, "storm, 20 clients × 300 events, reads of the store", None);
        assert!(reads["daemon"]["median"].as_f64().is_some_and(|reads| reads >= 1.0), "{reads}");
    }
}

/// A Redis server that ends with this value.
struct RedisServer {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl RedisServer {
    fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let program: PathBuf = install::program("redis-server", "redis-server");
        let folder = folder();
        let mut command = Command::new(program);
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", ""])
            .arg("--dir")
            .arg(folder.path());
        let process = command.stdout(Stdio::null()).spawn().expect("Redis starts");
        let server = Self { process, port, _folder: folder };
        wait_until("start of Redis", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        server
    }

    fn call(&self, command: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).expect("Redis accepts");
        write!(stream, "{command}\r\nQUIT\r\n").expect("Redis reads");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("Redis replies");
        reply
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn redis_database_with_keys_is_left_alone() {
    let server = RedisServer::start();
    server.call("SET precious 1");
    let folder = folder();
    let url = format!("redis://127.0.0.1:{}/0", server.port);
    let output = bench(folder.path()).args(["publish", "--store", "redis", "--redis-url", &url]).output().unwrap();
    assert!(!output.status.success());
    assert!(text_of(&output).contains("holds 1 keys"), "{}", text_of(&output));
    assert!(server.call("GET precious").contains("$1\r\n1\r\n"));
}

#[test]
fn missing_daemon_is_reported_with_its_build_command() {
    let folder = folder();
    let output = bench(folder.path()).args(["start", "--daemon", "/nonexistent/aurora-bus"]).output().unwrap();
    assert!(!output.status.success());
    assert!(text_of(&output).contains("build it with `cargo build"), "{}", text_of(&output));
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none(), "files were left behind");
}

#[test]
fn interrupted_run_leaves_no_files() {
    let folder = folder();
    let is_empty = || fs::read_dir(folder.path()).unwrap().next().is_none();
    let mut child = bench(folder.path())
        .args(["publish", "--store", "embedded"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("start of the measurement", || !is_empty());
    let status = Command::new("sh").args(["-c", "kill -s TERM \"$0\"", &child.id().to_string()]).status();
    assert!(status.expect("sh runs").success());
    wait_until("end of the program", || child.try_wait().unwrap().is_some());
    assert!(!child.wait().unwrap().success());
    assert!(is_empty(), "files were left behind");
}
