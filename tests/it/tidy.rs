//! The structure of the source tree, as described in ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Maximum length of a source file, in lines.
const MAX_LINES: usize = 700;

/// Small modules without a domain, which all modules above them may name.
const GROUND: &[&str] =
    &["backoff", "clock", "limiter", "log_throttle", "metrics", "readiness", "secret", "tls", "telemetry", "validate"];

/// The modules that each module may name, from the bottom to the top. `_` stands for the ground modules, `^` for all
/// modules before it in this list, `*` for all modules.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("backoff", &[]),
    ("clock", &[]),
    ("limiter", &[]),
    ("log_throttle", &[]),
    ("metrics", &[]),
    ("readiness", &[]),
    ("secret", &[]),
    ("tls", &[]),
    ("validate", &[]),
    ("event", &[]),
    ("telemetry", &["metrics", "validate"]),
    ("store", &["_", "event"]),
    ("sink", &["_", "event"]),
    ("auth", &["_", "event"]),
    ("bus", &["_", "event", "store", "sink"]),
    ("delivery", &["_", "event", "store", "sink"]),
    ("relay", &["_", "event", "store"]),
    ("pull", &["_", "event", "store"]),
    ("maintenance", &["_", "event", "store", "delivery"]),
    ("dead_letters", &["_", "event", "store", "bus"]),
    ("http", &["^"]),
    ("config", &["^"]),
    ("app", &["^"]),
    ("cli", &["*"]),
    ("lib", &["*"]),
    ("main", &["*"]),
];

/// The modules of `aurora-bus-bench`, from the bottom to the top; each may name those before it.
const BENCH_ORDER: &[&str] = &[
    "stats",
    "clock",
    "procfs",
    "http",
    "websocket",
    "resp",
    "payload",
    "process",
    "report",
    "generator",
    "workspace",
    "servers",
    "args",
    "bench",
    "scenarios",
    "run",
    "main",
];

/// Type names that several modules share, with the reason.
const SHARED_TYPE_NAMES: &[(&str, &str)] =
    &[("Config", "the section of a module in the configuration, always named with its module: `http::Config`")];

/// Words that do not begin a sentence, because a clause would be its subject. Questions are allowed.
const RELATIVE_SUBJECTS: [&str; 4] = ["What", "Who", "Whoever", "Whom"];

/// A source file, with and without its comments.
struct Source {
    path: PathBuf,
    /// Its top module: `store` for `src/store/redis/reader.rs`.
    top: String,
    /// Its path within `src`, such as `store/redis/reader.rs`.
    name: String,
    text: String,
    code: String,
}

impl Source {
    fn is_within(&self, module: &str) -> bool {
        self.name == format!("{module}.rs") || self.name.starts_with(&format!("{module}/"))
    }

    /// Returns the modules of this crate that the code names.
    fn named_modules(&self) -> BTreeSet<String> {
        let mut named = BTreeSet::new();
        for prefix in ["crate::", "aurora_bus::"] {
            for (at, _) in self.code.match_indices(prefix) {
                let (before, after) = self.code.split_at(at);
                if before.ends_with('$') || before.ends_with(is_word) {
                    continue;
                }
                let after = after.trim_start_matches(prefix);
                match after.strip_prefix('{') {
                    Some(list) => named.extend(first_names(list)),
                    None => named.extend(first_word(after)),
                }
            }
        }
        named
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text.chars().take_while(|c| is_word(*c)).collect();
    (!word.is_empty()).then_some(word)
}

/// Returns the first words of the paths in a `use` list, up to its closing brace.
fn first_names(list: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut depth = 1;
    let mut is_start = true;
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => is_start = true,
            c if c.is_whitespace() => {}
            _ if is_start => {
                names.extend(first_word(list.split_at(at).1));
                is_start = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names
}

fn without_comments(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).fold(String::new(), |mut code, line| {
        code.push_str(line);
        code.push('\n');
        code
    })
}

/// The files of the product.
fn sources() -> Vec<Source> {
    sources_in("src")
}

/// The files of both packages.
fn all_sources() -> Vec<Source> {
    let mut all = sources();
    all.extend(sources_in("bench/src"));
    all
}

fn sources_in(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the source") {
            let path = entry.expect("a folder of the source").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a file of the source");
                let name = path.strip_prefix(&root).expect("it is below").to_str().expect("UTF-8").to_owned();
                let top = first_word(&name).expect("files have names");
                let code = without_comments(&text);
                found.push(Source { path, top, name, text, code });
            }
        }
    }
    assert!(found.iter().any(|s| s.name == "main.rs"), "no source in {}", root.display());
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Returns whether the code has the text at the start of a word.
fn names(code: &str, what: &str) -> bool {
    code.match_indices(what).any(|(at, _)| !code.split_at(at).0.ends_with(is_word))
}

/// Fails with every file outside of `allowed` whose code names one of `words`.
fn only_in(allowed: &[&str], words: &[&str]) {
    let is_allowed = |source: &&Source| !allowed.iter().any(|module| source.is_within(module));
    let offenders: Vec<String> = sources()
        .iter()
        .filter(is_allowed)
        .flat_map(|s| {
            words.iter().filter(|w| names(&s.code, w)).map(move |w| format!("{} names {w}", s.path.display()))
        })
        .collect();
    assert!(offenders.is_empty(), "only {allowed:?} may do that:\n{}", offenders.join("\n"));
}

#[test]
fn only_the_redis_store_names_its_client() {
    only_in(&["store/redis"], &["fred::"]);
}

#[test]
fn only_the_embedded_store_names_its_engine() {
    only_in(&["store/embedded"], &["rusqlite::"]);
}

#[test]
fn only_http_names_axum() {
    only_in(&["http"], &["axum::", "tower_http::"]);
}

#[test]
fn http_statuses_are_named_in_http_only() {
    let below = ["event", "metrics", "readiness", "store", "bus", "delivery", "relay", "pull", "dead_letters"];
    let is_below = |source: &Source| below.iter().any(|module| source.is_within(module));
    let offenders: Vec<_> =
        sources().into_iter().filter(|s| is_below(s) && names(&s.code, "StatusCode")).map(|s| s.path).collect();
    assert!(offenders.is_empty(), "{offenders:?}");
}

#[test]
fn events_name_neither_the_runtime_nor_json_trees() {
    let offenders: Vec<_> = sources()
        .into_iter()
        .filter(|s| s.is_within("event"))
        .filter(|s| ["tokio", "serde_json::Value", "std::fs", "std::net"].iter().any(|word| names(&s.code, word)))
        .map(|s| s.path)
        .collect();
    assert!(offenders.is_empty(), "{offenders:?}");
}

#[test]
fn only_config_and_main_read_the_environment() {
    only_in(&["config", "main"], &["env::var", "env::vars", "env::var_os", "option_env!"]);
}

#[test]
fn modules_name_only_modules_below_them() {
    let mut offences = Vec::new();
    for source in sources() {
        let Some((_, allowed)) = MAY_NAME.iter().find(|(module, _)| *module == source.top) else {
            offences.push(format!("{}: the module `{}` has no place in the order", source.path.display(), source.top));
            continue;
        };
        let own_place = MAY_NAME.iter().position(|(module, _)| *module == source.top);
        let modules = MAY_NAME.iter().map(|(module, _)| *module).enumerate();
        for (place, other) in modules.filter(|(_, m)| source.named_modules().contains(*m) && *m != source.top) {
            let is_below =
                allowed.contains(&"^") && Some(place) < own_place || allowed.contains(&"_") && GROUND.contains(&other);
            if !is_below && !allowed.contains(&"*") && !allowed.contains(&other) {
                offences.push(format!("{}: `{}` may not name `{other}`", source.path.display(), source.top));
            }
        }
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn bench_modules_name_lower_modules_only() {
    let place_of = |module: &str| BENCH_ORDER.iter().position(|m| *m == module);
    let mut offences = Vec::new();
    for source in sources_in("bench/src") {
        let Some(place) = place_of(&source.top) else {
            offences.push(format!("{}: the module `{}` has no place in the order", source.path.display(), source.top));
            continue;
        };
        let named = source.named_modules();
        let upward = named.iter().filter(|name| place_of(name).is_some_and(|other| other > place));
        offences
            .extend(upward.map(|name| format!("{}: `{}` may not name `{name}`", source.path.display(), source.top)));
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn delivery_and_relay_do_not_name_each_other() {
    for source in sources() {
        let named = source.named_modules();
        let is_crossing = source.is_within("delivery") && named.contains("relay")
            || source.is_within("relay") && named.contains("delivery");
        assert!(!is_crossing, "{}", source.path.display());
    }
}

#[test]
fn files_are_not_too_long() {
    let long: Vec<String> = all_sources()
        .iter()
        .map(|s| (s.text.lines().count(), s))
        .filter(|(lines, _)| *lines > MAX_LINES)
        .map(|(lines, s)| format!("{}: {lines} lines", s.path.display()))
        .collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines; look for two modules in:\n{}", long.join("\n"));
}

#[test]
fn module_files_are_not_named_mod() {
    let mod_files: Vec<_> = all_sources().into_iter().filter(|s| s.name.ends_with("mod.rs")).map(|s| s.path).collect();
    assert!(mod_files.is_empty(), "foo.rs and foo/, not foo/mod.rs: {mod_files:?}");
}

#[test]
fn every_file_begins_with_module_documentation() {
    let silent: Vec<_> = all_sources()
        .into_iter()
        .filter(|s| !s.text.starts_with("//!") && !s.name.ends_with("/tests.rs"))
        .map(|s| s.path)
        .collect();
    assert!(silent.is_empty(), "no module documentation: {silent:?}");
}

/// Returns the names of the types that the code declares `pub` or `pub(crate)`.
fn declared_types(code: &str) -> impl Iterator<Item = String> {
    code.lines().map(str::trim_start).filter_map(|line| {
        let declaration = line.strip_prefix("pub ").or_else(|| line.strip_prefix("pub(crate) "))?;
        let kinds = ["struct ", "enum ", "trait ", "type ", "union "];
        first_word(kinds.iter().find_map(|kind| declaration.strip_prefix(kind))?)
    })
}

/// Returns the sentences of all comments. List items and table cells are sentences of their own.
fn comment_sentences(text: &str) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    for line in text.lines() {
        let words = line.trim().strip_prefix("//").map(|rest| rest.trim_start_matches(['/', '!']).trim());
        let words = words.unwrap_or_default();
        if words.is_empty() || words.starts_with(['-', '|']) {
            paragraphs.push(String::new());
        }
        if let Some(paragraph) = paragraphs.last_mut() {
            paragraph.push_str(words);
            paragraph.push(' ');
        }
    }
    let sentences = paragraphs.iter().flat_map(|paragraph| paragraph.split_inclusive(['.', '!', '?', '|']));
    sentences.map(|sentence| sentence.trim_start_matches(['-', ' ']).trim_end().to_owned()).collect()
}

#[test]
fn type_names_are_unique() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for source in sources() {
        for name in declared_types(&source.code) {
            files.entry(name).or_default().push(source.name.clone());
        }
    }
    files.retain(|_, files| files.len() > 1);
    for (name, reason) in SHARED_TYPE_NAMES {
        assert!(files.remove(*name).is_some(), "no longer shared: `{name}` ({reason})");
    }
    assert!(files.is_empty(), "a type that leaves its file carries its noun; rename these: {files:#?}");
}

#[test]
fn declared_types_are_found() {
    let types: Vec<String> =
        declared_types("pub struct A;\npub(crate) enum B<T> {}\npub(super) trait C {}\n").collect();
    assert_eq!(types, ["A", "B"]);
}

#[test]
fn sentences_of_comments_have_plain_subjects() {
    let is_relative = |sentence: &String| {
        let word = first_word(sentence);
        RELATIVE_SUBJECTS.iter().any(|subject| word.as_deref() == Some(subject)) && !sentence.ends_with('?')
    };
    let found: Vec<String> = sources()
        .iter()
        .flat_map(|source| comment_sentences(&source.text).into_iter().map(|sentence| (source.name.clone(), sentence)))
        .filter(|(_, sentence)| is_relative(sentence))
        .map(|(name, sentence)| format!("{name}: {sentence}"))
        .collect();
    assert!(found.is_empty(), "STYLE.md: put the subject first in\n{}", found.join("\n"));
}

#[test]
fn sentences_of_comments_are_found() {
    let text = "/// One. What is\n/// two stays.\nlet x = 1;\n    // - Who?\n//! | a | Whom b |\n";
    let sentences = comment_sentences(text);
    let sentences: Vec<&str> = sentences.iter().map(String::as_str).filter(|sentence| !sentence.is_empty()).collect();
    assert_eq!(sentences, ["One.", "What is two stays.", "Who?", "|", "a |", "Whom b |"]);
}

#[test]
fn no_code_is_left_unfinished() {
    let is_unfinished = |source: &Source| ["todo!", "unimplemented!"].iter().any(|word| names(&source.code, word));
    let offenders: Vec<_> = all_sources().into_iter().filter(is_unfinished).map(|s| s.path).collect();
    assert!(offenders.is_empty(), "{offenders:?}");
}

#[test]
fn names_in_use_lists_are_found() {
    let code = "use crate::event::{Entry, EntryId};\nuse crate::{bus::Bus, relay::{Ring, Tail}, store};\n";
    let source = Source {
        path: PathBuf::new(),
        top: "http".to_owned(),
        name: "http.rs".to_owned(),
        text: String::new(),
        code: code.to_owned(),
    };
    let named: Vec<String> = source.named_modules().into_iter().collect();
    assert_eq!(named, ["bus", "event", "relay", "store"]);
    assert_eq!(first_names("a::b, c"), ["a", "c"]);
    assert!(names("use axum::Router;", "axum::") && !names("use not_axum::Router;", "axum::"));
}
