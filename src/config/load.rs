//! Reads the layers of the configuration and finds everything that is wrong with them.

use std::path::{Path, PathBuf};

use config::builder::DefaultState;
use config::{ConfigBuilder, ConfigError, Environment, File, FileFormat, Value, ValueKind};
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path as KeyPath, Segment};

use super::{Config, InvalidConfig, Problem, default_sinks, nearest};
use crate::sink::SinkConfig;

/// The file that is read where no other is named, if it is there.
pub const DEFAULT_FILE: &str = "config/aurora-bus.toml";

/// Where the configuration comes from, weakest first: the built-in default, a file, the environment, flags.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// A file that must exist; without one [`DEFAULT_FILE`] is read if it is there.
    pub file: Option<PathBuf>,
    /// Whether to read `AURORA_BUS__SECTION__KEY` from the environment.
    pub environment: bool,
    /// Single keys set by flags, such as `http.listen`.
    pub overrides: Vec<(&'static str, String)>,
}

/// Reads and checks the configuration.
pub fn load(layers: &Layers) -> Result<Config, InvalidConfig> {
    let mut problems = Vec::new();
    let mut root = read(layers).map_err(|error| InvalidConfig(vec![Problem::new("", error)]))?;
    let sinks = take_sinks(&mut root, &mut problems);
    let config: Option<Config> = collect(root, "", &mut problems);
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
        // Read by the TOML parser first, for the line and column in its message.
        toml::from_str::<toml::Table>(&text).map_err(|e| format!("{} is not TOML: {e}", file.display()))?;
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
    builder.build().map(|config| config.cache).map_err(|e| e.to_string())
}

/// Sinks are told apart by their `type`, so each is read as that type, which keeps the paths of its keys.
fn take_sinks(root: &mut Value, problems: &mut Vec<Problem>) -> Vec<(String, SinkConfig)> {
    let ValueKind::Table(root) = &mut root.kind else { return Vec::new() };
    let Some(sinks) = root.remove("sinks") else { return Vec::new() };
    let ValueKind::Table(sinks) = sinks.kind else {
        problems.push(Problem::new("sinks", "must be a table of sinks by name"));
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
        let Some(kind) = kind else {
            problems.push(Problem::new(format!("{path}.type"), format!("is missing: one of {known}")));
            continue;
        };
        let config = match kind.as_str() {
            "log" => collect(value, &path, problems).map(SinkConfig::Log),
            "audit" => collect(value, &path, problems).map(SinkConfig::Audit),
            other => {
                let hint = nearest(other, SinkConfig::TYPES.into_iter());
                problems.push(Problem::new(format!("{path}.type"), format!("`{other}` is none of {known}{hint}")));
                None
            }
        };
        built.extend(config.map(|config| (name, config)));
    }
    built
}

/// Reads a value, and where something is wrong with one of its keys, takes that key out and reads on, so that every
/// problem is found.
fn collect<T: DeserializeOwned>(mut value: Value, prefix: &str, problems: &mut Vec<Problem>) -> Option<T> {
    loop {
        let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
            Ok(read) => return Some(read),
            Err(error) => error,
        };
        let (path, message) = describe(&error);
        problems.push(Problem::new(join(prefix, &path), message));
        if !remove(&mut value, error.path(), error.inner()) {
            return None;
        }
    }
}

fn join(prefix: &str, path: &str) -> String {
    match (prefix, path) {
        (prefix, "") => prefix.to_owned(),
        ("", path) => path.to_owned(),
        (prefix, path) => format!("{prefix}.{path}"),
    }
}

/// The unknown or missing key that serde names in its message, if that is what it complains about.
fn named_key(message: &str, what: &str) -> Option<String> {
    let (_, rest) = message.split_once(&format!("{what} field `"))?;
    rest.split_once('`').map(|(key, _)| key.to_owned())
}

/// Path and message in our words.
fn describe(error: &serde_path_to_error::Error<ConfigError>) -> (String, String) {
    let path = match error.path().to_string() {
        root if root == "." => String::new(),
        path => path,
    };
    let message = plain(error.inner());
    if let Some(key) = named_key(&message, "unknown") {
        let expected = message.split_once("expected").map_or("", |(_, expected)| expected);
        let known = expected.split('`').skip(1).step_by(2);
        let path = if last_key(error.path()) == Some(key.as_str()) { path } else { join(&path, &key) };
        return (path, format!("unknown key{}", nearest(&key, known)));
    }
    if let Some(key) = named_key(&message, "missing") {
        return (join(&path, &key), "is missing".to_owned());
    }
    (path, message)
}

/// The cause without the key and origin that `config` adds: the path is told already.
fn plain(error: &ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => plain(error),
        ConfigError::Type { unexpected, expected, .. } => format!("{unexpected} is not {expected}"),
        other => other.to_string(),
    }
}

fn last_key(path: &KeyPath) -> Option<&str> {
    match path.iter().next_back() {
        Some(Segment::Map { key }) => Some(key),
        _ => None,
    }
}

/// Takes the offending key out; says whether there was one.
fn remove(value: &mut Value, path: &KeyPath, error: &ConfigError) -> bool {
    let message = plain(error);
    if named_key(&message, "missing").is_some() {
        return false;
    }
    let mut segments: Vec<&Segment> = path.iter().collect();
    let unknown = named_key(&message, "unknown").map(|key| Segment::Map { key });
    if let Some(Segment::Map { key }) = &unknown
        && last_key(path) != Some(key.as_str())
    {
        segments.extend(unknown.as_ref());
    }
    let Some((last, parents)) = segments.split_last() else { return false };
    let mut place = value;
    for segment in parents {
        let next = match (segment, &mut place.kind) {
            (Segment::Map { key }, ValueKind::Table(table)) => table.get_mut(key),
            (Segment::Seq { index }, ValueKind::Array(items)) => items.get_mut(*index),
            _ => None,
        };
        let Some(next) = next else { return false };
        place = next;
    }
    match (last, &mut place.kind) {
        (Segment::Map { key }, ValueKind::Table(table)) => table.remove(key).is_some(),
        _ => false,
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
    fn every_problem_is_reported_with_its_path_and_the_nearest_key() {
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
            "sinks.siem.type: `logg` is none of log, audit, did you mean `log`?",
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
            "#,
        );
        let starts = [
            "http.listen: 0.0.0.0:8080 can be reached",
            "streams[0].dead_letter: ",
            "streams[0].groups[0].sink: there is no sink `lgo`, did you mean `log`?",
            "streams[0].groups[1].name: `g` is declared twice",
            "relay.channels.ops: stream `a` is not declared with `relay = true`",
        ];
        for start in starts {
            assert!(found.iter().any(|problem| problem.starts_with(start)), "{start:?} is not in {found:#?}");
        }
    }

    #[test]
    fn a_file_that_is_no_toml_is_told_with_its_line() {
        let found = problems("[http\nlisten = 1");
        assert!(found[0].contains("is not TOML") && found[0].contains("line 1"), "{found:?}");
    }

    #[test]
    fn the_shipped_file_is_the_built_in_default() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_FILE);
        let layers = Layers { file: Some(shipped), ..Layers::default() };
        let shipped = load(&layers).expect("a valid configuration");
        assert_eq!(shipped.to_toml(), Config::default().to_toml());
    }

    #[test]
    fn an_override_is_read_as_the_type_of_its_key() {
        let layers = Layers {
            file: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join(DEFAULT_FILE)),
            overrides: vec![("http.listen", "127.0.0.1:9".to_owned()), ("http.max_connections", "0123".to_owned())],
            ..Layers::default()
        };
        let config = load(&layers).expect("a valid configuration");
        assert_eq!((config.http.listen.port(), config.http.max_connections), (9, 123));
    }
}
