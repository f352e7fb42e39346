//! `aurora-bus bench`, really run: small, but with every process it starts.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::support::app::{BOUND, send_signal};
use crate::support::redis::RedisServer;
use crate::support::{install, until};

fn bench(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aurora-bus"));
    command.arg("bench").arg("--dir").arg(folder);
    command.args(["--seconds", "1", "--rounds", "1", "--clients", "10", "--idle-clients", "10", "--backlog", "2000"]);
    command
}

fn text_of(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().expect("a text")
}

fn folder() -> TempDir {
    TempDir::new().expect("a temporary folder")
}

/// Runs these measurements and returns the figures, each as `measurement: name`, with those that have a ceiling.
fn figures(whats: &[&str], store: &str) -> (Vec<String>, Vec<String>) {
    let (all, with_ceiling): (Vec<_>, Vec<_>) =
        measured(whats, store).into_iter().map(|(name, figure)| (name.clone(), (name, figure))).unzip();
    let with_ceiling = with_ceiling.into_iter().filter(|(_, figure)| figure["ceiling"].is_object());
    (all, with_ceiling.map(|(name, _)| name).collect())
}

/// Runs these measurements and returns what the JSON file says of each figure, with its name as `measurement: name`.
fn measured(whats: &[&str], store: &str) -> Vec<(String, serde_json::Value)> {
    let (files, results) = (folder(), folder());
    let json = results.path().join("bench.json");
    let server = install::program("redis-server", "redis-server");
    let mut command = bench(files.path());
    command.args(whats).args(["--store", store]).arg("--redis-server").arg(server).arg("--json").arg(&json);
    let output = command.output().expect("the command starts");
    assert!(output.status.success(), "{}", text_of(&output));
    assert_eq!(fs::read_dir(files.path()).expect("the folder is there").count(), 0, "files were left behind");

    let report: serde_json::Value =
        serde_json::from_slice(&fs::read(json).expect("the JSON file is there")).expect("it is JSON");
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

/// The figure of the relay with that name, beside that peer if there is one.
fn relay_figure(figures: &[(String, serde_json::Value)], name: &str, peer: Option<&str>) -> serde_json::Value {
    let is_it = |(full, figure): &&(String, serde_json::Value)| {
        *full == format!("relay: {name}") && peer.is_none_or(|peer| figure["ceiling"]["name"] == peer)
    };
    let names = || figures.iter().map(|(name, _)| name).collect::<Vec<_>>();
    figures.iter().find(is_it).unwrap_or_else(|| panic!("no {name} beside {peer:?} in {:?}", names())).1.clone()
}

#[test]
fn figures_with_redis_stand_beside_their_ceilings() {
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
fn figures_with_the_embedded_store_stand_beside_their_ceilings() {
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
fn posting_webhooks_stands_beside_a_bare_loop() {
    let (_, with_ceiling) = figures(&["webhook"], "embedded");
    assert_eq!(with_ceiling, ["webhook: the sink alone, 32 in flight", "webhook: a backlog, 32 in flight"]);
}

#[test]
fn the_relay_stands_beside_a_null_relay_and_nats() {
    let nats = install::program("nats-server", "nats-server");
    let nats = nats.to_str().expect("a path of UTF-8");
    let figures =
        measured(&["relay", "--only", "idle,fanout,latency", "--idle-seconds", "1", "--nats-server", nats], "redis");
    for peer in ["null relay", "NATS"] {
        for name in ["saturated, 10 clients", "saturated, 10 clients, relay CPU", "100/s to 10 clients, p99"] {
            let figure = relay_figure(&figures, name, Some(peer));
            assert!(figure["ceiling"]["median"].as_f64().is_some_and(|median| median > 0.0), "{figure}");
        }
    }
    relay_figure(&figures, "idle, 10 clients, memory of each", None);
}

#[test]
fn filters_and_a_drain_are_measured() {
    let figures = measured(&["relay", "--only", "filters,drain", "--crowd", "20"], "embedded");
    relay_figure(&figures, "50 filters, 20 clients, relay CPU", Some("no filters"));
    relay_figure(&figures, "one match, slowest of 50 filters", None);
    let closes = relay_figure(&figures, "drain, 10 clients, closes per tenth of the window", None);
    let closes: f64 =
        closes["daemon"]["runs"].as_array().expect("runs").iter().filter_map(serde_json::Value::as_f64).sum();
    assert!((closes - 10.0).abs() < 0.1, "{closes}");
    assert_eq!(relay_figure(&figures, "drain, 10 clients, share closed with 4000", None)["met"], true);
}

#[test]
fn dashboards_are_whole_after_a_storm_and_after_not_reading() {
    for store in ["redis", "embedded"] {
        let figures = measured(&["relay", "--only", "storm,slow", "--crowd", "20"], store);
        for name in ["storm, 20 clients × 300 events", "1 of 10 do not read"] {
            for what in ["duplicates", "holes"] {
                let figure = relay_figure(&figures, &format!("{name}, {what}"), None);
                assert_eq!(figure["met"], true, "{store}: {figure}");
            }
        }
        let reads = relay_figure(&figures, "storm, 20 clients × 300 events, reads of the store", None);
        assert!(reads["daemon"]["median"].as_f64().is_some_and(|reads| reads >= 1.0), "{reads}");
    }
}

#[tokio::test]
async fn a_database_that_holds_anything_is_left_alone() {
    let server = RedisServer::durable().await;
    let url = server.url();
    let address = url.trim_start_matches("redis://").trim_end_matches("/0");
    let ask = |command: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "{command}\r\nQUIT\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    ask("SET precious 1");
    let folder = folder();
    let output =
        bench(folder.path()).args(["publish", "--store", "redis", "--redis-url", &server.url()]).output().unwrap();
    assert!(!output.status.success());
    assert!(text_of(&output).contains("holds 1 keys"), "{}", text_of(&output));
    assert!(ask("GET precious").contains("$1\r\n1\r\n"));
}

#[tokio::test]
async fn an_interrupted_measurement_leaves_nothing_behind() {
    let folder = folder();
    let is_empty = || fs::read_dir(folder.path()).unwrap().next().is_none();
    let mut child = bench(folder.path())
        .args(["publish", "--store", "embedded"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("measurement under way", BOUND, async || (!is_empty()).then_some(())).await;
    send_signal(child.id(), "TERM");
    let status = until("end of the command", BOUND, async || child.try_wait().unwrap()).await;
    assert!(!status.success());
    assert!(is_empty(), "files were left behind");
}
