//! The table: name, columns and SQL statements.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Maximum length of an identifier in `PostgreSQL`, in bytes.
const MAX_IDENTIFIER: usize = 63;

/// The written columns, in the order of the insert. The first two are the key.
pub(super) const COLUMNS: [RequiredColumn; 14] = [
    RequiredColumn::new("stream", TEXT, true),
    RequiredColumn::new("entry_id", TEXT, true),
    RequiredColumn::new("event_id", TEXT, false),
    RequiredColumn::new("received_at", "timestamp with time zone", true),
    RequiredColumn::new("severity", TEXT, false),
    RequiredColumn::new("source", TEXT, false),
    RequiredColumn::new("category", TEXT, false),
    RequiredColumn::new("tenant", TEXT, false),
    RequiredColumn::new("traceparent", TEXT, false),
    RequiredColumn::new("task_id", TEXT, false),
    RequiredColumn::new("agent_type", TEXT, false),
    RequiredColumn::new("case_id", TEXT, false),
    RequiredColumn::new("alert_id", TEXT, false),
    RequiredColumn::new("data", "jsonb", true),
];

const TEXT: &str = "text";

/// A required column.
#[derive(Debug)]
pub(super) struct RequiredColumn {
    name: &'static str,
    kind: &'static str,
    is_required: bool,
}

/// A column of an existing table.
#[derive(Debug)]
pub(super) struct TableColumn {
    pub(super) name: String,
    pub(super) kind: String,
    /// Whether an insert without a value for it fails.
    pub(super) needs_value: bool,
    /// Whether it is `NOT NULL`.
    pub(super) is_not_null: bool,
}

impl RequiredColumn {
    const fn new(name: &'static str, kind: &'static str, is_required: bool) -> Self {
        Self { name, kind, is_required }
    }

    fn is_taken_by(&self, kind: &str) -> bool {
        kind == self.kind || self.kind == TEXT && kind == "character varying"
    }
}

/// The name of a table: `table` or `schema.table`, in lower-case letters, digits and `_`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableName(String);

/// A text that is not a table name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a table name: allowed are `table` and `schema.table`, each of 1 to 63 lower-case letters, digits and `_`, without a leading digit"
)]
pub struct InvalidTableName(String);

impl FromStr for TableName {
    type Err = InvalidTableName;

    fn from_str(text: &str) -> Result<Self, InvalidTableName> {
        let is_word = |part: &str| {
            (1..=MAX_IDENTIFIER).contains(&part.len())
                && !part.starts_with(|c: char| c.is_ascii_digit())
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let is_valid = text.split('.').count() <= 2 && text.split('.').all(is_word);
        if is_valid { Ok(Self(text.to_owned())) } else { Err(InvalidTableName(text.chars().take(128).collect())) }
    }
}

impl TryFrom<String> for TableName {
    type Error = InvalidTableName;

    fn try_from(text: String) -> Result<Self, InvalidTableName> {
        text.parse()
    }
}

impl From<TableName> for String {
    fn from(name: TableName) -> Self {
        name.0
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TableName {
    /// Returns the name in quotes, so that words like `user` are allowed.
    pub(super) fn quoted(&self) -> String {
        let words: Vec<String> = self.0.split('.').map(|word| format!("\"{word}\"")).collect();
        words.join(".")
    }

    /// Returns the statement that creates the table.
    pub(super) fn create(&self) -> String {
        let columns: Vec<String> = COLUMNS
            .iter()
            .map(|column| {
                let not_null = if column.is_required { " NOT NULL" } else { "" };
                format!("{} {}{not_null}", column.name, column.kind)
            })
            .collect();
        format!(
            "CREATE TABLE {} ({}, written_at timestamp with time zone NOT NULL DEFAULT now(), \
             PRIMARY KEY (stream, entry_id))",
            self.quoted(),
            columns.join(", ")
        )
    }

    /// Returns the statement that inserts rows from one array per column. All rows have the same stream name.
    pub(super) fn insert(&self) -> String {
        let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
        let arrays: Vec<String> =
            COLUMNS.iter().enumerate().skip(1).map(|(n, column)| format!("${}::{}[]", n + 1, column.kind)).collect();
        format!(
            "INSERT INTO {} ({}) SELECT $1::text, * FROM unnest({}) ON CONFLICT (stream, entry_id) DO NOTHING",
            self.quoted(),
            names.join(", "),
            arrays.join(", ")
        )
    }

    /// Returns the fault of a table with these columns, with the statement that repairs it.
    pub(super) fn fault(&self, found: &[TableColumn]) -> Option<String> {
        let table = self.quoted();
        for column in &COLUMNS {
            let RequiredColumn { name, kind, is_required } = column;
            let Some(found) = found.iter().find(|found| found.name == *name) else {
                return Some(format!(
                    "the table `{self}` has no column `{name}`: ALTER TABLE {table} ADD COLUMN {name} {kind}"
                ));
            };
            if !column.is_taken_by(&found.kind) {
                return Some(format!(
                    "the column `{name}` of the table `{self}` is `{}`, not `{kind}`: ALTER TABLE {table} ALTER COLUMN \
                     {name} TYPE {kind} USING {name}::{kind}",
                    found.kind
                ));
            }
            if found.is_not_null && !is_required {
                return Some(format!(
                    "the column `{name}` of the table `{self}` is NOT NULL, but not every entry has a value for it: \
                     ALTER TABLE {table} ALTER COLUMN {name} DROP NOT NULL"
                ));
            }
        }
        let is_ours = |found: &&TableColumn| COLUMNS.iter().any(|column| column.name == found.name);
        let demanding = found.iter().find(|found| found.needs_value && !is_ours(found))?;
        Some(format!(
            "the column `{name}` of the table `{self}` is NOT NULL without a default, and the sink does not write to it: \
             ALTER TABLE {table} ALTER COLUMN \"{name}\" DROP NOT NULL",
            name = demanding.name
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> TableName {
        "soc.agent_results".parse().expect("a table name")
    }

    fn found(change: impl Fn(&mut Vec<TableColumn>)) -> Vec<TableColumn> {
        let as_it_should_be = |column: &RequiredColumn| TableColumn {
            name: column.name.to_owned(),
            kind: column.kind.to_owned(),
            needs_value: column.is_required,
            is_not_null: column.is_required,
        };
        let mut columns = COLUMNS.iter().map(as_it_should_be).collect();
        change(&mut columns);
        columns
    }

    #[test]
    fn unsafe_table_names_are_refused() {
        for good in ["results", "soc.agent_results", "_x1", "user"] {
            assert_eq!(good.parse::<TableName>().map(String::from), Ok(good.to_owned()));
        }
        let long = "x".repeat(64);
        for bad in ["", ".", "a.", "a.b.c", "1a", "A", "a b", "a\"b", "a;b", "a-b", "ä", &long] {
            assert!(bad.parse::<TableName>().is_err(), "{bad:?} was accepted");
        }
        assert_eq!(table().quoted(), "\"soc\".\"agent_results\"");
    }

    #[test]
    fn fault_names_the_column_and_the_repair() {
        let fault = |change: fn(&mut Vec<TableColumn>)| table().fault(&found(change)).unwrap_or_default();
        assert_eq!(fault(|_| {}), "");
        assert_eq!(fault(|columns| columns[4].kind = "character varying".to_owned()), "");
        let missing = fault(|columns| drop(columns.remove(9)));
        assert!(missing.ends_with("ALTER TABLE \"soc\".\"agent_results\" ADD COLUMN task_id text"), "{missing}");
        let wrong = fault(|columns| columns[13].kind = "json".to_owned());
        assert!(wrong.contains("`data`") && wrong.contains("TYPE jsonb"), "{wrong}");
        let short = fault(|columns| columns[4].kind = "character varying(4)".to_owned());
        assert!(short.contains("`severity`"), "{short}");
        let strict = fault(|columns| columns[8].is_not_null = true);
        assert!(strict.contains("`traceparent`") && strict.contains("DROP NOT NULL"), "{strict}");
        let mine = |name: &str, needs_value| TableColumn {
            name: name.to_owned(),
            kind: "integer".to_owned(),
            needs_value,
            is_not_null: needs_value,
        };
        assert_eq!(table().fault(&found(|columns| columns.push(mine("note", false)))), None);
        let demanding = table().fault(&found(|columns| columns.push(mine("note", true)))).unwrap_or_default();
        assert!(demanding.contains("`note`"), "{demanding}");
    }
}
