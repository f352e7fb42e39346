//! Validation of the configuration: sections report their invalid values with the paths of the keys.
//!
//! Owns the [`Validate`] trait and the [`Problems`] that it fills. Promises that one pass reports every problem of a
//! configuration. Knows none of the sections.

use std::fmt;

/// A section of the configuration that checks its own values.
pub trait Validate {
    /// Adds a problem for each invalid value, with its key below this section.
    fn validate(&self, problems: &mut Problems);

    /// Returns a problem for each invalid value, with its key below this section.
    fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Problems::default();
        self.validate(&mut problems);
        problems.into_vec()
    }
}

/// An invalid value of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The key, such as `streams[0].groups[1].retry.base`.
    pub path: String,
    /// The fault and the allowed values. Never holds a secret.
    pub message: String,
}

impl ConfigProblem {
    /// Creates a problem of the value at `path`.
    pub fn new(path: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { path: path.into(), message: message.to_string() }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for ConfigProblem {}

/// Collects problems below the path of the section that is being checked.
#[derive(Debug, Default)]
pub struct Problems {
    section: String,
    found: Vec<ConfigProblem>,
}

impl Problems {
    /// Adds a problem of `key` in the current section. An empty key means the section itself.
    pub fn add(&mut self, key: &str, message: impl fmt::Display) {
        self.found.push(ConfigProblem::new(join(&self.section, key), message));
    }

    /// Adds `message` as a problem of `key` unless `is_valid`.
    pub fn require(&mut self, is_valid: bool, key: &str, message: impl fmt::Display) {
        if !is_valid {
            self.add(key, message);
        }
    }

    /// Returns the problems in the order of their discovery.
    pub fn into_vec(self) -> Vec<ConfigProblem> {
        self.found
    }

    /// Validates `section`, which is found at `key` of the current section.
    pub fn check(&mut self, key: &str, section: &impl Validate) {
        let parent = std::mem::take(&mut self.section);
        self.section = join(&parent, key);
        section.validate(self);
        self.section = parent;
    }
}

/// Joins the paths of a section and of a key below it.
pub fn join(section: &str, key: &str) -> String {
    match (section, key) {
        (section, "") => section.to_owned(),
        ("", key) => key.to_owned(),
        (section, key) => format!("{section}.{key}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Inner(u32);

    struct Outer(Vec<Inner>);

    impl Validate for Inner {
        fn validate(&self, problems: &mut Problems) {
            problems.require(self.0 > 0, "count", format_args!("must be at least 1, not {}", self.0));
        }
    }

    impl Validate for Outer {
        fn validate(&self, problems: &mut Problems) {
            for (index, inner) in self.0.iter().enumerate() {
                problems.check(&format!("inner[{index}]"), inner);
            }
            problems.require(self.0.len() > 2, "", "must have at least 3 items");
        }
    }

    #[test]
    fn nested_problems_have_full_paths() {
        let found: Vec<_> = Outer(vec![Inner(1), Inner(0)]).problems().iter().map(ToString::to_string).collect();
        assert_eq!(found, ["inner[1].count: must be at least 1, not 0", "must have at least 3 items"]);
    }
}
