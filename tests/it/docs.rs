//! Checks of the documentation against the program.

use std::fs;
use std::path::Path;

use aurora_bus::auth::{AuthConfig, IssuerConfig};
use aurora_bus::http::TlsConfig;
use aurora_bus::metrics::Metrics;
use aurora_bus::sink::{SinkConfig, WebhookConfig};
use aurora_bus::validate::Validate as _;

fn page(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the Markdown files of a folder, with their paths from the root.
fn pages_in(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)).expect("a folder");
    let names = entries.map(|entry| format!("{folder}/{}", entry.expect("an entry").file_name().display()));
    names.filter(|name| name.ends_with(".md")).collect()
}

/// Returns README.md, ARCHITECTURE.md and all pages in docs/.
fn pages() -> Vec<String> {
    let root = ["README.md".to_owned(), "ARCHITECTURE.md".to_owned()];
    pages_in("docs").into_iter().chain(pages_in("docs/design")).chain(root).collect()
}

/// Returns the anchor of a heading in links.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_between_pages_resolve() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    for from in pages() {
        let text = page(&from);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            seen += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = root.join(&from).parent().expect("a folder").join(path);
            let target = if path.is_empty() { root.join(&from) } else { target };
            assert!(target.exists(), "{from} leads to {link}, which is not there");
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).expect("a page");
                let mut headings = text.lines().filter(|line| line.starts_with('#')).map(anchor);
                assert!(headings.any(|there| there == heading), "{from} leads to {link}, which has no such heading");
            }
        }
    }
    assert!(seen > 5, "only {seen} links");
}

#[test]
fn readme_links_to_every_page() {
    let readme = page("README.md");
    for name in pages_in("docs").into_iter().chain(["ARCHITECTURE.md".to_owned()]) {
        assert!(readme.contains(&format!("]({name})")), "README.md does not mention {name}");
    }
    let architecture = page("ARCHITECTURE.md");
    for name in pages_in("docs/design") {
        assert!(architecture.contains(&format!("]({name})")), "ARCHITECTURE.md does not mention {name}");
    }
}

#[test]
fn operations_page_lists_every_metric() {
    let operations = page("docs/operations.md");
    let (_, rest) = operations.split_once("<!-- metrics -->\n").expect("the table begins");
    let (table, _) = rest.split_once("<!-- /metrics -->").expect("the table ends");
    let expected: String = std::iter::once("| metric | labels | meaning |\n|---|---|---|\n".to_owned())
        .chain(Metrics::described().into_iter().map(|(name, labels, help)| {
            format!("| `{name}` | {} | {} |\n", labels.join(", "), help.trim_end_matches('.'))
        }))
        .collect();
    assert_eq!(table, expected, "the table in docs/operations.md should be:\n{expected}");
}

/// Parses a table of the configuration file that is shown as a comment.
fn commented_table(table: &str) -> toml::Table {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(aurora_bus::config::DEFAULT_FILE);
    let text = fs::read_to_string(file).expect("the documented configuration");
    let begin = [format!("# [{table}]\n"), format!("# [[{table}]]\n")];
    let (_, rest) = begin.iter().find_map(|begin| text.split_once(begin)).expect("the table begins");
    let lines = rest.lines().map_while(|line| line.strip_prefix("# "));
    toml::from_str(&lines.collect::<Vec<_>>().join("\n")).expect("TOML")
}

#[test]
fn every_key_of_a_webhook_is_documented_with_its_default() {
    let shown = commented_table("sinks.siem");
    let config: SinkConfig = shown.clone().try_into().expect("a webhook");
    let SinkConfig::Webhook(config) = config else { panic!("{config:?} is no webhook") };
    let shown_defaults = WebhookConfig { secret_file: None, ca_file: None, headers: [].into(), ..config };
    let url = shown["url"].as_str().expect("a URL");
    let defaults = WebhookConfig::new(url);
    assert_eq!(toml::to_string(&shown_defaults), toml::to_string(&defaults));

    let groups = page("docs/groups.md");
    let (_, rest) = groups.split_once("## Webhooks\n").expect("a part about webhooks");
    let (_, rest) = rest.split_once("| key | default | meaning |\n|---|---|---|\n").expect("a table of keys");
    let keys = rest.lines().map_while(|line| line.strip_prefix("| ")?.split(" |").next());
    let mut keys: Vec<String> = keys.flat_map(|keys| keys.split(", ")).map(|key| key.replace('`', "")).collect();
    keys.sort();
    let shown = shown.keys().map(String::as_str).chain(["secret"]).filter(|key| *key != "type");
    let mut shown: Vec<String> = shown.map(str::to_owned).collect();
    shown.sort();
    assert_eq!(keys, shown);
}

#[test]
fn every_key_of_tls_is_documented_with_its_default() {
    let shown = commented_table("http.tls");
    let config: TlsConfig = shown.clone().try_into().expect("a table of TLS");
    assert_eq!(config.problems(), []);
    assert_eq!(toml::Table::try_from(&config).expect("TOML"), shown);
    let least: TlsConfig = toml::from_str("cert_file = \"tls.crt\"\nkey_file = \"tls.key\"").expect("files");
    assert_eq!(config, least);
    let page = page("docs/tls.md");
    for key in shown.keys().map(String::as_str).chain(["client_ca_file"]) {
        let is_there = page.lines().any(|line| line.starts_with("| `") && line.contains(&format!("`{key}`")));
        assert!(is_there, "`{key}` is not in docs/tls.md");
    }
}

#[test]
fn every_key_of_keys_and_issuers_is_documented_with_its_default() {
    let (key, issuer) = (commented_table("auth.keys"), commented_table("auth.issuers"));
    let mut auth = toml::Table::new();
    auth.insert("keys".to_owned(), vec![key.clone()].into());
    auth.insert("issuers".to_owned(), vec![issuer.clone()].into());
    let config: AuthConfig = auth.try_into().expect("a key and an issuer");
    assert_eq!(config.problems(), []);
    let printed = toml::Table::try_from(&config).expect("TOML");
    assert_eq!(printed["keys"][0].as_table(), Some(&key));
    assert_eq!(printed["issuers"][0].as_table(), Some(&issuer));
    let least: IssuerConfig = toml::from_str("issuer = \"i\"\naudience = \"a\"\nalgorithms = []").expect("an issuer");
    for (name, default) in toml::Table::try_from(&least).expect("TOML") {
        let is_given = ["issuer", "audience", "algorithms"].contains(&name.as_str());
        assert!(is_given || issuer.get(&name) == Some(&default), "`{name}` is {default} by default");
    }
}
