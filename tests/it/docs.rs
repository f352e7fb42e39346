//! What the documentation claims, compared with the program.

use std::fs;
use std::path::Path;

use aurora_bus::metrics::Metrics;
use aurora_bus::sink::{SinkConfig, WebhookConfig};

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("a README")
}

#[test]
fn the_readme_lists_every_metric() {
    let readme = readme();
    let (_, rest) = readme.split_once("<!-- metrics -->\n").expect("the table begins");
    let (table, _) = rest.split_once("<!-- /metrics -->").expect("the table ends");
    let expected: String = std::iter::once("| metric | labels | meaning |\n|---|---|---|\n".to_owned())
        .chain(Metrics::described().into_iter().map(|(name, labels, help)| {
            format!("| `{name}` | {} | {} |\n", labels.join(", "), help.trim_end_matches('.'))
        }))
        .collect();
    assert_eq!(table, expected, "the table in the README should be:\n{expected}");
}

/// The table of a sink as the configuration file shows it, in comments.
fn commented_sink(table: &str) -> toml::Table {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(aurora_bus::config::DEFAULT_FILE);
    let text = fs::read_to_string(file).expect("the documented configuration");
    let (_, rest) = text.split_once(&format!("# [{table}]\n")).expect("the table begins");
    let lines = rest.lines().map_while(|line| line.strip_prefix("# "));
    toml::from_str(&lines.collect::<Vec<_>>().join("\n")).expect("TOML")
}

#[test]
fn every_key_of_a_webhook_is_documented_with_its_default() {
    let shown = commented_sink("sinks.siem");
    let config: SinkConfig = shown.clone().try_into().expect("a webhook");
    let SinkConfig::Webhook(config) = config else { panic!("{config:?} is no webhook") };
    let shown_defaults = WebhookConfig { secret_file: None, ca_file: None, headers: [].into(), ..config };
    let url = shown["url"].as_str().expect("a URL");
    let defaults = WebhookConfig::new(url);
    assert_eq!(toml::to_string(&shown_defaults), toml::to_string(&defaults));

    let readme = readme();
    let (_, rest) = readme.split_once("### Webhooks\n").expect("a part about webhooks");
    let (_, rest) = rest.split_once("| key | default | meaning |\n|---|---|---|\n").expect("a table of keys");
    let keys = rest.lines().map_while(|line| line.strip_prefix("| ")?.split(" |").next());
    let mut keys: Vec<String> = keys.flat_map(|keys| keys.split(", ")).map(|key| key.replace('`', "")).collect();
    keys.sort();
    let shown = shown.keys().map(String::as_str).chain(["secret"]).filter(|key| *key != "type");
    let mut shown: Vec<String> = shown.map(str::to_owned).collect();
    shown.sort();
    assert_eq!(keys, shown);
}
