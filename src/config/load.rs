//! Reads the layers of the configuration and reports all of their problems.

use std::path::{Path, PathBuf};

use config::builder::DefaultState;
use config::{ConfigBuilder, ConfigError, Environment, File, FileFormat, Value, ValueKind};
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use super::{Config, InvalidConfig, default_sinks, nearest};
use crate::secret;
use crate::sink::SinkConfig;
use crate::validate::{ConfigProblem, Validate as _, join};

/// The file that is read if no other is named and it exists.
pub const DEFAULT_FILE: &str = "config/aurora-bus.toml";

/// The sources of the configuration, weakest first: built-in default, file, environment, flags.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// A file that must exist. By default [`DEFAULT_FILE`], if it exists.
    pub file: Option<PathBuf>,
    /// Whether to read `AURORA_BUS__SECTION__KEY` from the environment.
    pub environment: bool,
    /// Keys that flags override, such as `http.listen`.
    pub overrides: Vec<(&'static str, String)>,
}

/// Reads and checks the configuration.
pub fn load(layers: &Layers) -> Result<Config, InvalidConfig> {
    let mut problems = Vec::new();
    let mut root = read(layers).map_err(|error| InvalidConfig(vec![ConfigProblem::new("", error)]))?;
    find_masked(&root, "", &mut problems);
    let sinks = take_sinks(&mut root, &mut problems);
    let config: Option<Config> = read_section(root, "", &mut problems);
    let Some(mut config) = config.filter(|_| problems.is_empty()) else {
        return Err(InvalidConfig(problems));
    };
    config.sinks = default_sinks();
    config.sinks.extend(sinks);
    config.fit_default_channels();
    match config.problems() {
        problems if problems.is_empty() => Ok(config),
        problems => Err(InvalidConfig(problems)),
    }
}

/// Merges the layers into one tree of values.
fn read(layers: &Layers) -> Result<Value, String> {
    let mut builder = ConfigBuilder::<DefaultState>::default();
    let file = match &layers.file {
        Some(file) => Some(file.as_path()),
        None => Some(Path::new(DEFAULT_FILE)).filter(|file| file.exists()),
    };
    if let Some(file) = file {
        let text = std::fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
        // The TOML parser reads it first, because it reports line and column.
        toml::from_str::<toml::Table>(&text)
            .map_err(|e| format!("{} is not TOML: {}", file.display(), describe(&text, &e)))?;
        builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
    }
    if layers.environment {
        let environment =
            Environment::with_prefix("AURORA_BUS").prefix_separator("__").separator("__").ignore_empty(true);
        builder = builder.add_source(environment);
    }
    for (key, value) in &layers.overrides {
        builder = builder.set_override(*key, value.as_str()).map_err(|e| e.to_string())?;
    }
    let mut root = builder.build().map(|config| config.cache).map_err(|e| e.to_string())?;
    split_lists(&mut root);
    Ok(root)
}

/// Formats a TOML error without the line itself, which may have a secret.
fn describe(text: &str, error: &toml::de::Error) -> String {
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else { return error.message().to_owned() };
    let line = before.matches('\n').count() + 1;
    let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
    format!("line {line}, column {column}: {}", error.message())
}

/// Splits lists of the environment: origins, and the streams of channels, are texts with commas.
fn split_lists(root: &mut Value) {
    if let Some(origins) = member(root, "http").and_then(|http| member(http, "origins")) {
        split_list(origins);
    }
    let channels = member(root, "relay").and_then(|relay| member(relay, "channels"));
    if let Some(ValueKind::Table(channels)) = channels.map(|channels| &mut channels.kind) {
        channels.values_mut().for_each(split_list);
    }
}

fn member<'a>(value: &'a mut Value, key: &str) -> Option<&'a mut Value> {
    let ValueKind::Table(table) = &mut value.kind else { return None };
    table.get_mut(key)
}

fn split_list(value: &mut Value) {
    if let ValueKind::String(text) = &value.kind {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        value.kind = ValueKind::Array(parts.map(|part| Value::new(None, part)).collect());
    }
}

/// Reports masked secrets of a printed configuration, which must not become the secrets.
fn find_masked(value: &Value, path: &str, problems: &mut Vec<ConfigProblem>) {
    match &value.kind {
        ValueKind::Table(table) => {
            let mut entries: Vec<_> = table.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            for (key, value) in entries {
                find_masked(value, &join(path, key), problems);
            }
        }
        ValueKind::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                find_masked(value, &format!("{path}[{index}]"), problems);
            }
        }
        ValueKind::String(text) if secret::is_masked(text) => {
            let message = format!(
                "{} is a masked secret of a printed configuration: replace it by the secret, or \
                 name a file that has it",
                secret::MASK
            );
            problems.push(ConfigProblem::new(path, message));
        }
        _ => {}
    }
}

/// Reads each sink as its `type`, which keeps the paths of its keys.
fn take_sinks(root: &mut Value, problems: &mut Vec<ConfigProblem>) -> Vec<(String, SinkConfig)> {
    let ValueKind::Table(root) = &mut root.kind else { return Vec::new() };
    let Some(sinks) = root.remove("sinks") else { return Vec::new() };
    let ValueKind::Table(sinks) = sinks.kind else {
        problems.push(ConfigProblem::new("sinks", "must be a table of sinks by name"));
        return Vec::new();
    };
    let mut built = Vec::new();
    let mut sinks: Vec<(String, Value)> = sinks.into_iter().collect();
    sinks.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, mut value) in sinks {
        let path = format!("sinks.{name}");
        let kind = match &mut value.kind {
            ValueKind::Table(table) => table.remove("type").and_then(|kind| kind.into_string().ok()),
            _ => None,
        };
        let known = SinkConfig::TYPES.join(", ");
        let built_in = SinkConfig::TYPES.into_iter().find(|kind| *kind == name).map(str::to_owned);
        let Some(kind) = kind.or(built_in) else {
            problems.push(ConfigProblem::new(format!("{path}.type"), format!("is missing; allowed are {known}")));
            continue;
        };
        let config = match kind.as_str() {
            "log" => read_section(value, &path, problems).map(SinkConfig::Log),
            "audit" => read_section(value, &path, problems).map(SinkConfig::Audit),
            "webhook" => read_section(value, &path, problems).map(SinkConfig::Webhook),
            "postgres" => read_section(value, &path, problems).map(SinkConfig::Postgres),
            "stream" => read_section(value, &path, problems).map(SinkConfig::Stream),
            other => {
                let hint = nearest(other, SinkConfig::TYPES.into_iter());
                problems
                    .push(ConfigProblem::new(format!("{path}.type"), format!("`{other}` is not one of {known}{hint}")));
                None
            }
        };
        built.extend(config.map(|config| (name, config)));
    }
    built
}

/// Reads a value and reports all of its problems.
///
/// A key with a problem is removed, and the value is read again. An item of an array that cannot do without the key is
/// removed as a whole.
fn read_section<T: DeserializeOwned>(mut value: Value, prefix: &str, problems: &mut Vec<ConfigProblem>) -> Option<T> {
    let mut removed: Vec<(String, usize)> = Vec::new();
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
            Ok(read) => return Some(read),
            Err(error) => error,
        };
        let mut place = ProblemPlace::of(&error, &removed);
        let path = join(prefix, &place.text);
        // A key that was removed because of a problem is now missing, which is no further problem.
        let is_reported = place.is_missing && problems.iter().any(|problem| problem.path == path);
        if !is_reported {
            problems.push(ConfigProblem::new(path, message(error.inner())));
        }
        if place.is_missing {
            place.keys.pop();
        }
        match place.remove(&mut value) {
            Removed::Key => {}
            Removed::Item(array, index) => removed.push((array, index)),
            Removed::Nothing => return None,
        }
    }
}

/// The place of a problem in the value.
struct ProblemPlace {
    keys: Vec<PathKey>,
    /// The path with the original indexes of arrays, before items were removed.
    text: String,
    is_missing: bool,
}

enum PathKey {
    Name(String),
    Index(usize),
}

enum Removed {
    Key,
    /// The path of the array, and the original index of the item.
    Item(String, usize),
    Nothing,
}

impl ProblemPlace {
    fn of(error: &serde_path_to_error::Error<ConfigError>, removed: &[(String, usize)]) -> Self {
        let mut keys: Vec<PathKey> = error
            .path()
            .iter()
            .filter_map(|segment| match segment {
                Segment::Map { key } => Some(PathKey::Name(key.clone())),
                Segment::Seq { index } => Some(PathKey::Index(*index)),
                _ => None,
            })
            .collect();
        let cause = plain(error.inner());
        let missing = missing_key(&cause);
        let named = missing.clone().or_else(|| unknown_key(&cause));
        let is_last = |key: &String| matches!(keys.last(), Some(PathKey::Name(last)) if last == key);
        if let Some(key) = named.filter(|key| !is_last(key)) {
            keys.push(PathKey::Name(key));
        }
        let mut text = String::new();
        for key in &keys {
            text = match key {
                PathKey::Name(name) => join(&text, name),
                PathKey::Index(index) => format!("{text}[{}]", original(&text, *index, removed)),
            };
        }
        Self { keys, text, is_missing: missing.is_some() }
    }

    /// Removes the key or item from the value.
    fn remove(&self, value: &mut Value) -> Removed {
        let Some((last, parents)) = self.keys.split_last() else { return Removed::Nothing };
        let mut place = value;
        for key in parents {
            let next = match (key, &mut place.kind) {
                (PathKey::Name(name), ValueKind::Table(table)) => table.get_mut(name),
                (PathKey::Index(index), ValueKind::Array(items)) => items.get_mut(*index),
                _ => None,
            };
            let Some(next) = next else { return Removed::Nothing };
            place = next;
        }
        match (last, &mut place.kind) {
            (PathKey::Name(name), ValueKind::Table(table)) => {
                if table.remove(name).is_some() {
                    Removed::Key
                } else {
                    Removed::Nothing
                }
            }
            (PathKey::Index(index), ValueKind::Array(items)) if *index < items.len() => {
                items.remove(*index);
                let item = self.text.rsplit_once('[').map(|(array, rest)| (array, rest.split(']').next()));
                match item {
                    Some((array, Some(index))) => Removed::Item(array.to_owned(), index.parse().unwrap_or_default()),
                    _ => Removed::Nothing,
                }
            }
            _ => Removed::Nothing,
        }
    }
}

/// Returns the original index of an item, given the indexes of removed items.
fn original(array: &str, index: usize, removed: &[(String, usize)]) -> usize {
    let mut gone: Vec<usize> = removed.iter().filter(|(path, _)| path == array).map(|(_, index)| *index).collect();
    gone.sort_unstable();
    gone.into_iter().fold(index, |index, gone| if gone <= index { index + 1 } else { index })
}

/// Returns the key that a message of serde calls unknown.
fn unknown_key(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field `")?;
    rest.split_once('`').map(|(key, _)| key.to_owned())
}

/// Returns the key that a message of serde calls missing.
fn missing_key(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("missing field `")?;
    rest.split_once('`').map(|(key, _)| key.to_owned())
}

/// Returns the type that a message of serde expects instead of a text. The text is not repeated: an environment
/// variable can replace a table that has secrets.
fn expected_instead_of_text(message: &str) -> Option<&str> {
    let rest = message.strip_prefix("invalid type: string \"")?;
    rest.rsplit_once("\", expected ").map(|(_, expected)| expected)
}

/// Returns the cause in the words of this program.
fn message(error: &ConfigError) -> String {
    let cause = plain(error);
    if missing_key(&cause).is_some() {
        return "is missing".to_owned();
    }
    if let Some(expected) = expected_instead_of_text(&cause) {
        return format!("a text is not {expected}");
    }
    let Some(key) = unknown_key(&cause) else { return cause };
    let expected = cause.split_once("expected").map_or("", |(_, expected)| expected);
    format!("unknown key{}", nearest(&key, expected.split('`').skip(1).step_by(2)))
}

/// Returns the cause without the key and the origin that `config` adds, because the path is reported separately.
fn plain(error: &ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => plain(error),
        ConfigError::Type { unexpected, expected, .. } => format!("{unexpected} is not {expected}"),
        // The library puts the path before the key without a separator.
        ConfigError::NotFound(key) => format!("missing field `{}`", key.rsplit([']', '.']).next().unwrap_or(key)),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        let layers = Layers { file: Some(file.path().to_owned()), ..Layers::default() };
        match load(&layers) {
            Ok(_) => Vec::new(),
            Err(InvalidConfig(problems)) => problems.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn problems_have_their_path_and_the_nearest_key() {
        let found = problems(
            r#"
            instanse = "a"
            [http]
            listen = "nowhere"
            max_bdy = "1MiB"
            [[streams]]
            name = "aurora alerts"
            [[streams]]
            name = "b"
            [[streams.groups]]
            name = "g"
            sink = "log"
            wrokers = 2
            [sinks.siem]
            type = "logg"
            [sinks.audit]
            type = "audit"
            pathh = "x"
            "#,
        );
        let expected = [
            "sinks.audit.pathh: unknown key, did you mean `path`?",
            "sinks.siem.type: `logg` is not one of log, audit, webhook, postgres, stream, did you mean `log`?",
            "instanse: unknown key, did you mean `instance`?",
            "http.max_bdy: unknown key, did you mean `max_body`?",
            "streams[1].groups[0].wrokers: unknown key, did you mean `workers`?",
        ];
        for line in expected {
            assert!(found.iter().any(|problem| problem == line), "{line:?} is not in {found:#?}");
        }
        assert!(found.iter().any(|problem| problem.starts_with("http.listen: ")), "{found:#?}");
        assert!(found.iter().any(|problem| problem.starts_with("streams[0].name: ")), "{found:#?}");
        assert_eq!(found.len(), 7, "{found:#?}");
    }

    #[test]
    fn problems_across_sections_are_reported_together() {
        let found = problems(
            r#"
            [http]
            listen = "0.0.0.0:8080"
            [[streams]]
            name = "a"
            dead_letter = "a"
            [[streams.groups]]
            name = "g"
            sink = "lgo"
            [[streams.groups]]
            name = "g"
            [relay.channels]
            ops = ["a"]
            [dead_letters]
            audit = "elsewhere"
            "#,
        );
        let starts = [
            "http.listen: 0.0.0.0:8080 can be reached",
            "streams[0].dead_letter: ",
            "streams[0].groups[0].sink: there is no sink `lgo`, did you mean `log`?",
            "streams[0].groups[1].name: `g` is declared twice",
            "relay.channels.ops: stream `a` is not declared with `relay = true`",
            "dead_letters.audit: stream `elsewhere` is not declared",
        ];
        for start in starts {
            assert!(found.iter().any(|problem| problem.starts_with(start)), "{start:?} is not in {found:#?}");
        }
    }

    #[test]
    fn invalid_toml_is_reported_with_its_line() {
        let found = problems("[http\nlisten = 1");
        assert!(found[0].contains("is not TOML: line 1, column 6: "), "{found:?}");
    }

    #[test]
    fn problems_do_not_repeat_possible_secrets() {
        let secret = "s3cret-of-at-least-thirty-two-bytes";
        let open_end = format!("[[auth.issuers]]\nissuer = \"ä\"\nsecret = \"{secret}\n");
        let as_text = format!("[auth]\nissuers = '[{{ secret = \"{secret}\" }}]'\n");
        for (text, expected) in [(open_end, "line 3, column 46: "), (as_text, "auth.issuers: a text is not a sequence")]
        {
            let found = problems(&text);
            assert!(found.len() == 1 && found[0].contains(expected), "{found:?}");
            assert!(!found[0].contains(secret), "{found:?}");
        }
    }

    #[test]
    fn shipped_file_is_the_built_in_default() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_FILE);
        let layers = Layers { file: Some(shipped), ..Layers::default() };
        let shipped = load(&layers).expect("a valid configuration");
        assert_eq!(shipped.to_toml(), Config::default().to_toml());
    }

    #[test]
    fn lists_may_be_texts_with_commas() {
        let layers = Layers {
            file: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_FILE)),
            overrides: vec![
                ("http.origins", "https://a.example, https://b.example".to_owned()),
                ("relay.channels.alerts", "aurora:alerts,aurora:audit".to_owned()),
            ],
            ..Layers::default()
        };
        let config = load(&layers).expect("a valid configuration");
        assert_eq!(config.http.origins, ["https://a.example", "https://b.example"]);
        let streams = config.relay.channels["alerts"].iter().map(crate::event::StreamPattern::as_str);
        assert!(streams.eq(["aurora:alerts", "aurora:audit"]));
    }

    #[test]
    fn printed_configuration_needs_its_secrets() {
        let secret = "s3cret-of-at-least-thirty-two-bytes";
        let text = format!(
            r#"
            [store]
            backend = "redis"
            redis = {{ url = "redis-sentinel://u:{secret}@h/main", sentinel_password = "{secret}" }}
            [[auth.issuers]]
            issuer = "i"
            audience = "a"
            algorithms = ["HS256"]
            secret = "{secret}"
            [sinks.siem]
            type = "webhook"
            url = "https://siem.example/{secret}"
            secret = "{secret}"
            headers = {{ Authorization = "Bearer {secret}" }}
            [sinks.rows]
            type = "postgres"
            url = "postgres://u:{secret}@h/db"
            [sinks.more]
            type = "postgres"
            url = "postgres://u@h/db?password={secret}"
            "#
        );
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("written");
        let layers = Layers { file: Some(file.path().to_owned()), ..Layers::default() };
        let printed = load(&layers).expect("a valid configuration").to_toml();
        assert!(!printed.contains(secret), "{printed}");
        let mut found = problems(&printed);
        found.sort();
        let paths = [
            "auth.issuers[0].secret",
            "sinks.more.url",
            "sinks.rows.url",
            "sinks.siem.headers.Authorization",
            "sinks.siem.secret",
            "sinks.siem.url",
            "store.redis.sentinel_password",
            "store.redis.url",
        ];
        assert_eq!(found.len(), paths.len(), "{found:#?}");
        for (problem, path) in found.iter().zip(paths) {
            assert!(problem.starts_with(&format!("{path}: ******** is a masked secret")), "{problem}");
        }
    }

    #[test]
    fn override_is_read_as_the_type_of_its_key() {
        let layers = Layers {
            file: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_FILE)),
            overrides: vec![("http.listen", "127.0.0.1:9".to_owned()), ("http.max_connections", "0123".to_owned())],
            ..Layers::default()
        };
        let config = load(&layers).expect("a valid configuration");
        assert_eq!((config.http.listen.port(), config.http.max_connections), (9, 123));
    }
}
