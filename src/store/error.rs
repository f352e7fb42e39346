//! Errors of store operations.

use std::error::Error;
use std::fmt;
use std::time::Duration;

/// The kind of a store error, which decides the reaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The store cannot be reached, is starting, is read-only, or did not reply in time. Retry later.
    Unavailable,
    /// No room: disk full, memory limit, or the stream's hard limit. Reads and acknowledgements still work.
    Full,
    /// The stream's name belongs to a key that is not a stream.
    WrongType,
    /// The group or its stream is gone. Ensure it and continue.
    NoGroup,
    /// The lease of the call was lost. The call had no effect.
    LeaseLost,
    /// The store refuses the credentials, or they lack permissions. An operator must act.
    Denied,
    /// The store is configured so that it would lose data, or is too old. An operator must act.
    Unsuitable,
    /// The store cannot provide the requested durability. Nothing was stored.
    Unsupported,
    /// The entries are stored, but the requested durability is not confirmed. Appending them again is safe with
    /// idempotency keys only.
    NotDurable,
    /// Stored data is damaged. An operator must act.
    Corrupt,
    /// The call is wrong, or a reply is invalid: a defect.
    Internal,
}

impl StoreErrorKind {
    /// Returns the kind as one word, for logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Full => "full",
            Self::WrongType => "wrong_type",
            Self::NoGroup => "no_group",
            Self::LeaseLost => "lease_lost",
            Self::Denied => "denied",
            Self::Unsuitable => "unsuitable",
            Self::Unsupported => "unsupported",
            Self::NotDurable => "not_durable",
            Self::Corrupt => "corrupt",
            Self::Internal => "internal",
        }
    }
}

/// A failed store operation: the attempted action, the kind of failure, and its cause.
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    /// The attempted action and the fault, such as "cannot append to stream `x`: the server is loading its data".
    message: String,
    /// The number of entries that were stored nevertheless.
    stored: u64,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// Returns an error of that kind with that message (lower case, no full stop).
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), stored: 0, source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds the number of new entries that were stored nevertheless.
    #[must_use]
    pub fn with_stored(mut self, stored: u64) -> Self {
        self.stored = stored;
        self
    }

    /// Returns how many entries of a failed append were stored, not counting duplicates.
    ///
    /// Exact for [`StoreErrorKind::NotDurable`]; for other kinds it may be more.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// Appends a hint to the message, such as the remedy.
    #[must_use]
    pub(super) fn followed_by(mut self, more: &str) -> Self {
        self.message = format!("{}; {more}", self.message);
        self
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns the delay before a retry, or `None` if a retry cannot help.
    pub fn retry_after(&self) -> Option<Duration> {
        matches!(self.kind, StoreErrorKind::Unavailable | StoreErrorKind::Full | StoreErrorKind::NotDurable)
            .then_some(Duration::from_secs(1))
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}
