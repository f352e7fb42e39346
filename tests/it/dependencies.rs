//! The dependencies that are compiled for this machine keep the rules of `deny.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use serde::Deserialize;

/// The parts of `deny.toml` that need no database.
#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Crate>,
    skip: Vec<Crate>,
}

/// A crate as `name`, or as `name:version` with the leading parts of a version.
#[derive(Deserialize)]
struct Crate {
    #[serde(rename = "crate")]
    spec: String,
    reason: String,
}

impl Crate {
    fn matches(&self, package: &Package) -> bool {
        let (name, version) = self.spec.split_once(':').unwrap_or((&self.spec, ""));
        let rest = package.version.strip_prefix(version);
        name == package.name && rest.is_some_and(|rest| version.is_empty() || rest.starts_with('.'))
    }
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

fn rules() -> Rules {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deny.toml");
    toml::from_str(&fs::read_to_string(path).expect("deny.toml")).expect("the rules")
}

/// Returns the packages of `Cargo.lock` that this machine's builds and tests may compile.
fn packages() -> Vec<Package> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let rustc = Command::new("rustc").args(["--print", "host-tuple"]).output().expect("rustc starts");
    let host = String::from_utf8(rustc.stdout).expect("UTF-8");
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version=1", "--filter-platform", host.trim()])
        .args(["--manifest-path", manifest])
        .output()
        .expect("Cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice::<Metadata>(&output.stdout).expect("metadata").packages
}

/// Evaluates an SPDX expression: `OR` binds less than `AND`; old crates write `/` for `OR`.
fn is_allowed(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut tokens = spaced.split_whitespace().collect::<Vec<_>>();
    tokens.reverse();
    let result = any(&mut tokens, allowed);
    assert!(tokens.is_empty(), "not an SPDX expression: {expression}");
    result
}

fn any(tokens: &mut Vec<&str>, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut result = all(tokens, allowed);
    while tokens.pop_if(|token| *token == "OR").is_some() {
        result = all(tokens, allowed) || result;
    }
    result
}

fn all(tokens: &mut Vec<&str>, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut result = term(tokens, allowed);
    while tokens.pop_if(|token| *token == "AND").is_some() {
        result = term(tokens, allowed) && result;
    }
    result
}

fn term(tokens: &mut Vec<&str>, allowed: &dyn Fn(&str) -> bool) -> bool {
    match tokens.pop().expect("a licence") {
        "(" => {
            let result = any(tokens, allowed);
            assert_eq!(tokens.pop(), Some(")"));
            result
        }
        licence => match tokens.pop_if(|token| *token == "WITH").and_then(|_| tokens.pop()) {
            Some(exception) => allowed(&format!("{licence} WITH {exception}")),
            None => allowed(licence),
        },
    }
}

#[test]
fn licences_are_all_allowed() {
    let allowed = rules().licenses.allow;
    let is_refused = |package: &&Package| {
        let license = package.license.as_deref();
        !license.is_some_and(|expression| is_allowed(expression, &|name| allowed.contains(name)))
    };
    let refused: Vec<_> =
        packages().iter().filter(is_refused).map(|p| format!("{}: {:?}", p.name, p.license)).collect();
    assert!(refused.is_empty(), "licences that deny.toml does not allow: {refused:#?}");
}

#[test]
fn allowed_licences_are_all_needed() {
    let packages = packages();
    let allowed = rules().licenses.allow;
    let is_needed = |needed: &&String| {
        packages
            .iter()
            .filter_map(|package| package.license.as_deref())
            .any(|expression| !is_allowed(expression, &|name| allowed.contains(name) && name != needed.as_str()))
    };
    let unneeded: Vec<_> = allowed.iter().filter(|license| !is_needed(license)).collect();
    assert!(unneeded.is_empty(), "{unneeded:?}");
}

#[test]
fn banned_crates_are_absent() {
    let rules = rules();
    for package in packages() {
        let ban = rules.bans.deny.iter().find(|ban| ban.matches(&package));
        assert!(ban.is_none(), "{} {}: {}", package.name, package.version, ban.map_or("", |ban| &ban.reason));
    }
}

#[test]
fn second_versions_are_all_named() {
    let rules = rules();
    let mut versions: BTreeMap<String, Vec<Package>> = BTreeMap::new();
    for package in packages() {
        versions.entry(package.name.clone()).or_default().push(package);
    }
    versions.retain(|_, packages| packages.len() > 1);

    for (name, packages) in &versions {
        let is_named = |package: &&Package| rules.bans.skip.iter().any(|skip| skip.matches(package));
        let unnamed: Vec<_> = packages.iter().filter(|p| !is_named(p)).map(|p| &p.version).collect();
        assert_eq!(unnamed.len(), 1, "{name}: name all but one version in deny.toml, with a reason: {unnamed:?}");
    }
    for skip in &rules.bans.skip {
        let is_used = versions.values().flatten().any(|package| skip.matches(package));
        assert!(is_used, "{} ({}) is no second version: take it out of deny.toml", skip.spec, skip.reason);
    }
}

#[test]
fn licence_expressions_are_evaluated_by_precedence() {
    let is_allowed = |expression| is_allowed(expression, &|name| ["A", "B", "C WITH E"].contains(&name));
    for good in ["A", "X OR A", "A/X", "A AND (B OR X)", "X AND X OR A", "C WITH E", "A AND B OR X"] {
        assert!(is_allowed(good), "{good}");
    }
    for bad in ["X", "A AND X", "(A OR B) AND X", "C", "X AND A OR X", "C WITH F"] {
        assert!(!is_allowed(bad), "{bad}");
    }
}
