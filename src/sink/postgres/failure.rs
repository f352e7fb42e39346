//! What the server, or the way to it, failed with: sorted by what can be done about it.

use std::time::Duration;

use tokio_postgres::Error;

use crate::sink::{SinkError, SinkErrorClass};
use crate::telemetry::chain;

/// The most characters of a server's message that are passed on.
const MESSAGE_CHARS: usize = 300;

/// Why something could not be done.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// What happened, without values of rows or secrets.
    text: String,
}

/// What can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The connection can't be used any more.
    Lost,
    /// The server has no room: disk, memory, connections.
    Full,
    /// The table is not there.
    NoTable,
    /// Something else that passes by itself or by an operator's hand.
    Passing,
    /// A row is refused.
    Refused,
}

impl Failure {
    pub(super) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// The server took longer than that.
    pub(super) fn late(bound: Duration) -> Self {
        Self::new(Kind::Lost, format!("no answer within {bound:?}"))
    }

    /// The same where nothing was said of any row, so that none is to blame.
    pub(super) fn of_no_row(self) -> Self {
        if self.kind == Kind::Refused { Self { kind: Kind::Passing, ..self } } else { self }
    }

    pub(super) fn into_error(self, doing: &str) -> SinkError {
        let class = match self.kind {
            Kind::Refused => SinkErrorClass::Permanent,
            Kind::Lost | Kind::Full | Kind::NoTable | Kind::Passing => SinkErrorClass::Transient,
        };
        SinkError::new(class, format!("{doing}: {}", self.text))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let Some(refusal) = error.as_db_error() else { return Self::new(Kind::Lost, told(&error)) };
        let code = refusal.code().code();
        // The detail and hint of a message may quote the row.
        let message = refusal.message().split_whitespace().collect::<Vec<_>>().join(" ");
        let message: String = message.chars().take(MESSAGE_CHARS).collect();
        let advice = advice(code).map_or_else(String::new, |advice| format!("; {advice}"));
        Self::new(kind(code), format!("{message} (SQLSTATE {code}){advice}"))
    }
}

/// What an SQLSTATE means for a delivery. What is not known to be the fault of a row is none: a wrong guess in the one
/// direction costs a wait, in the other it costs entries their place.
fn kind(code: &str) -> Kind {
    match code.get(..2).unwrap_or_default() {
        // Data, constraints, a view's check option, a program's limit, and what a trigger raises.
        "22" | "23" | "44" | "54" | "P0" => Kind::Refused,
        "53" => Kind::Full,
        // Connection exceptions, and a server that ends sessions or starts.
        "08" => Kind::Lost,
        "57" if code != "57014" => Kind::Lost,
        _ if code == "42P01" => Kind::NoTable,
        _ => Kind::Passing,
    }
}

/// What an operator can do.
fn advice(code: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" | "28000" => "check user, password and pg_hba.conf",
        "3D000" => "create the database, or correct it in `url`",
        "3F000" => "create the schema, or correct it in `table`",
        "42501" => {
            "grant the sink's user SELECT and INSERT on the table, and CREATE on its schema where it is to make it"
        }
        "42P10" => "the table needs its key: ALTER TABLE … ADD PRIMARY KEY (stream, entry_id)",
        "25006" => "this server only reads: name the primary, or several hosts and target_session_attrs=read-write",
        "57014" => "the server was too slow, or the table is locked",
        _ => return None,
    })
}

/// The error with its causes, and what mends the most usual of them.
fn told(error: &Error) -> String {
    let mut text = chain(error);
    if text.contains("UnknownIssuer") {
        text.push_str("; name the authority's certificate as `ca_file`");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_of_sqlstate_has_its_meaning() {
        let cases = [
            ("22P05", Kind::Refused),
            ("23514", Kind::Refused),
            ("54001", Kind::Refused),
            ("P0001", Kind::Refused),
            ("53100", Kind::Full),
            ("53300", Kind::Full),
            ("08006", Kind::Lost),
            ("57P01", Kind::Lost),
            ("57P03", Kind::Lost),
            ("57014", Kind::Passing),
            ("40P01", Kind::Passing),
            ("25006", Kind::Passing),
            ("28P01", Kind::Passing),
            ("42501", Kind::Passing),
            ("42P01", Kind::NoTable),
            ("XX000", Kind::Passing),
            ("", Kind::Passing),
        ];
        for (code, meaning) in cases {
            assert_eq!(kind(code), meaning, "{code}");
        }
    }
}
