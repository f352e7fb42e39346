//! Checks that the files of `deploy/` agree with the daemon and with the tools that read them.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use aurora_bus::config::{Config, Layers, load};
use aurora_bus::metrics::Metrics;
use aurora_bus::sink::SinkConfig;

use crate::support::app::Home;
use crate::support::install;

fn deployed(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "deploy", path].iter().collect()
}

fn promtool_accepts(verb: &str, kind: &str, path: &str) {
    let promtool = install::program("promtool", "prometheus");
    let output = Command::new(promtool).args([verb, kind]).arg(deployed(path)).output().expect("promtool runs");
    assert!(
        output.status.success(),
        "{path}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}

#[test]
fn prometheus_accepts_the_scrape_configuration() {
    promtool_accepts("check", "config", "prometheus/prometheus.yml");
}

#[test]
fn prometheus_accepts_the_alert_rules() {
    promtool_accepts("check", "rules", "prometheus/aurora-bus.rules.yml");
}

#[test]
fn alert_rules_fire_as_expected() {
    promtool_accepts("test", "rules", "prometheus/aurora-bus.rules.test.yml");
}

#[test]
fn composed_daemon_is_the_default_with_postgresql() {
    let layers = Layers { file: Some(deployed("compose/aurora-bus.toml")), ..Layers::default() };
    let mut composed = load(&layers).expect("a valid configuration");
    assert!(matches!(composed.sinks.remove("results"), Some(SinkConfig::Postgres(_))));
    let groups = composed.streams.iter_mut().flat_map(|stream| &mut stream.groups);
    let results = groups.into_iter().find(|group| group.name.as_str() == "api-agent-results").expect("the group");
    assert_eq!(results.sink.replace("log".to_owned()).as_deref(), Some("results"));
    assert_eq!(composed.to_toml(), Config::default().to_toml());

    let compose = concat!(env!("CARGO_MANIFEST_DIR"), "/docker-compose.yml");
    let compose = std::fs::read_to_string(compose).expect("the Compose file");
    assert!(compose.contains("- ./deploy/compose/aurora-bus.toml:/aurora-bus/config/aurora-bus.toml:ro"));
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_accepts_the_metrics() {
    let daemon = Home::new("").start().await;
    daemon.publish("aurora:alerts", &[r#"{"severity":"high"}"#.to_owned()]).await.expect("accepted");
    daemon.handled("aurora:alerts", "alert-processor").await;
    let metrics = daemon.get("/metrics").await;
    daemon.stop().await;

    let mut promtool = Command::new(install::program("promtool", "prometheus"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs");
    promtool.stdin.take().expect("piped").write_all(metrics.as_bytes()).expect("promtool reads");
    let output = promtool.wait_with_output().expect("promtool runs");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
}

#[test]
fn alert_rules_name_only_metrics_that_exist() {
    let rules = std::fs::read_to_string(deployed("prometheus/aurora-bus.rules.yml")).expect("the alert rules");
    let described = Metrics::described();
    let existing: BTreeSet<&str> = described.iter().map(|(name, _, _)| *name).collect();
    let is_part_of_a_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let named: BTreeSet<&str> = rules
        .split(|c| !is_part_of_a_name(c))
        .filter(|word| word.starts_with("aurora_bus_"))
        .map(|word| word.trim_end_matches("_bucket"))
        .collect();
    assert!(!named.is_empty(), "the rules name no metric at all");
    let unknown: Vec<_> = named.difference(&existing).collect();
    assert!(unknown.is_empty(), "no such metrics: {unknown:?}");
}
