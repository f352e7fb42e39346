//! Errors of the server and of connections, classified by their remedy.

use std::time::Duration;

use tokio_postgres::Error;

use crate::sink::{SinkError, SinkErrorClass};
use crate::telemetry::chain;

/// Maximum length of a server message, in characters.
const MESSAGE_CHARS: usize = 300;

/// A failed operation.
#[derive(Debug)]
pub(super) struct PostgresError {
    pub(super) kind: PostgresErrorKind,
    /// The fault, without values of rows or secrets.
    text: String,
}

/// The class of an error. It decides about the remedy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PostgresErrorKind {
    /// The connection is not usable any more.
    Lost,
    /// The server has no room: disk, memory, connections.
    Full,
    /// The table does not exist.
    NoTable,
    /// Another condition that ends by itself or by an operator.
    Temporary,
    /// The server refuses a row.
    Refused,
}

impl PostgresError {
    pub(super) fn new(kind: PostgresErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// Creates the error of a timeout.
    pub(super) fn late(bound: Duration) -> Self {
        Self::new(PostgresErrorKind::Lost, format!("no response within {bound:?}"))
    }

    /// Removes the blame from rows, for statements without rows.
    pub(super) fn without_row(self) -> Self {
        if self.kind == PostgresErrorKind::Refused { Self { kind: PostgresErrorKind::Temporary, ..self } } else { self }
    }

    pub(super) fn into_error(self, doing: &str) -> SinkError {
        let class = match self.kind {
            PostgresErrorKind::Refused => SinkErrorClass::Permanent,
            PostgresErrorKind::Lost
            | PostgresErrorKind::Full
            | PostgresErrorKind::NoTable
            | PostgresErrorKind::Temporary => SinkErrorClass::Transient,
        };
        SinkError::new(class, format!("{doing}: {}", self.text))
    }
}

impl From<Error> for PostgresError {
    fn from(error: Error) -> Self {
        let Some(refusal) = error.as_db_error() else { return Self::new(PostgresErrorKind::Lost, with_advice(&error)) };
        let code = refusal.code().code();
        // Detail and hint of a message may quote the row.
        let message = refusal.message().split_whitespace().collect::<Vec<_>>().join(" ");
        let message: String = message.chars().take(MESSAGE_CHARS).collect();
        let advice = advice(code).map_or_else(String::new, |advice| format!("; {advice}"));
        Self::new(kind_of(code), format!("{message} (SQLSTATE {code}){advice}"))
    }
}

/// Returns the class of an SQLSTATE. Unknown states do not blame a row. A wrong guess costs a wait in one direction,
/// and dead-letters entries in the other.
fn kind_of(code: &str) -> PostgresErrorKind {
    match code.get(..2).unwrap_or_default() {
        // Data, constraints, check options of views, program limits, and errors of triggers.
        "22" | "23" | "44" | "54" | "P0" => PostgresErrorKind::Refused,
        "53" => PostgresErrorKind::Full,
        // Connection exceptions, and a server that starts or ends sessions.
        "08" => PostgresErrorKind::Lost,
        "57" if code != "57014" => PostgresErrorKind::Lost,
        _ if code == "42P01" => PostgresErrorKind::NoTable,
        _ => PostgresErrorKind::Temporary,
    }
}

/// Returns advice for an operator.
fn advice(code: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" | "28000" => "check user, password and pg_hba.conf",
        "3D000" => "create the database, or correct `url`",
        "3F000" => "create the schema, or correct `table`",
        "42501" => "grant the user SELECT and INSERT on the table, and CREATE on its schema if the sink creates it",
        "42P10" => "the table needs a primary key: ALTER TABLE … ADD PRIMARY KEY (stream, entry_id)",
        "25006" => "the server is read-only: use the primary, or several hosts and target_session_attrs=read-write",
        "57014" => "the server is too slow, or the table is locked",
        _ => return None,
    })
}

/// Formats an error with its causes, and adds advice for the most usual one.
fn with_advice(error: &Error) -> String {
    let mut text = chain(error);
    if text.contains("UnknownIssuer") {
        text.push_str("; set `ca_file` to the certificate of the authority");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_of_sqlstate_has_its_kind() {
        let cases = [
            ("22P05", PostgresErrorKind::Refused),
            ("23514", PostgresErrorKind::Refused),
            ("54001", PostgresErrorKind::Refused),
            ("P0001", PostgresErrorKind::Refused),
            ("53100", PostgresErrorKind::Full),
            ("53300", PostgresErrorKind::Full),
            ("08006", PostgresErrorKind::Lost),
            ("57P01", PostgresErrorKind::Lost),
            ("57P03", PostgresErrorKind::Lost),
            ("57014", PostgresErrorKind::Temporary),
            ("40P01", PostgresErrorKind::Temporary),
            ("25006", PostgresErrorKind::Temporary),
            ("28P01", PostgresErrorKind::Temporary),
            ("42501", PostgresErrorKind::Temporary),
            ("42P01", PostgresErrorKind::NoTable),
            ("XX000", PostgresErrorKind::Temporary),
            ("", PostgresErrorKind::Temporary),
        ];
        for (code, meaning) in cases {
            assert_eq!(kind_of(code), meaning, "{code}");
        }
    }
}
