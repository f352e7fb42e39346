//! What a store can fail with.

use std::error::Error;
use std::fmt;
use std::time::Duration;

/// What kind of failure it is, and so what can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// The store can't be reached, is starting, is read-only, or did not answer in time. Try again later.
    Unavailable,
    /// There is no room: disk full, memory limit, or the stream's hard limit. Reads and acknowledgements go on.
    Full,
    /// The stream's name is taken by something that is no stream.
    WrongType,
    /// The group, or its stream, is gone. Ensure it and go on.
    NoGroup,
    /// The lease that the call was made under is not held any more. Nothing was done.
    LeaseLost,
    /// The store refuses our credentials or rights. Someone must act.
    Denied,
    /// The store is set up so that it would lose what it is given, or is too old. Someone must act.
    Unsuitable,
    /// The store can't be as durable as asked. Nothing was stored.
    Unsupported,
    /// The entries are stored, but it is not confirmed that they are as durable as asked. Appending them again is
    /// safe with idempotency keys only.
    NotDurable,
    /// What is stored is damaged. Someone must act.
    Corrupt,
    /// The call itself is wrong, or an answer makes no sense: a defect.
    Internal,
}

impl StoreErrorKind {
    /// The kind in one word, for logs and metrics.
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

/// A failed store operation: what was tried, the kind of failure, and its cause.
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    /// What was tried and what is wrong, such as "cannot append to stream `x`: the server is loading its data".
    message: String,
    /// How many entries were stored all the same.
    stored: u64,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// An error of that kind, told by `message` (lower case, no period).
    pub fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), stored: 0, source: None }
    }

    /// The same with what caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same where so many entries were stored all the same, which were not there before.
    #[must_use]
    pub fn with_stored(mut self, stored: u64) -> Self {
        self.stored = stored;
        self
    }

    /// How many entries of a failed append were stored all the same, duplicates apart; it may have been more where the
    /// kind is not [`StoreErrorKind::NotDurable`].
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// The same with more to say about it, such as what to do.
    #[must_use]
    pub(super) fn followed_by(mut self, more: &str) -> Self {
        self.message = format!("{}; {more}", self.message);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// How long to wait before trying again makes sense, where trying again can help.
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
