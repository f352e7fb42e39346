//! Entry ids, epochs and positions.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The id of an entry: milliseconds since 1970 and a sequence number.
///
/// Ids of one stream only grow, and have gaps: their distance has no meaning. Text form: `<ms>-<seq>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntryId {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub ms: u64,
    /// Sequence number within the millisecond.
    pub seq: u64,
}

/// A text that is not an entry id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an entry id has the form <milliseconds>-<sequence>, such as 1741076109120-0, not {0:?}")]
pub struct InvalidEntryId(String);

impl EntryId {
    /// The position before every entry.
    pub const MIN: Self = Self { ms: 0, seq: 0 };
    /// The position after every entry.
    pub const MAX: Self = Self { ms: u64::MAX, seq: u64::MAX };

    /// Creates an id from its two parts.
    pub const fn new(ms: u64, seq: u64) -> Self {
        Self { ms, seq }
    }

    /// Returns the next greater id. [`EntryId::MAX`] returns itself.
    #[must_use]
    pub const fn next(self) -> Self {
        match (self.seq.checked_add(1), self.ms.checked_add(1)) {
            (Some(seq), _) => Self { ms: self.ms, seq },
            (None, Some(ms)) => Self { ms, seq: 0 },
            (None, None) => Self::MAX,
        }
    }

    /// Returns the next smaller id. [`EntryId::MIN`] returns itself.
    #[must_use]
    pub const fn previous(self) -> Self {
        match (self.seq.checked_sub(1), self.ms.checked_sub(1)) {
            (Some(seq), _) => Self { ms: self.ms, seq },
            (None, Some(ms)) => Self { ms, seq: u64::MAX },
            (None, None) => Self::MIN,
        }
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

impl FromStr for EntryId {
    type Err = InvalidEntryId;

    fn from_str(text: &str) -> Result<Self, InvalidEntryId> {
        let invalid = || InvalidEntryId(text.chars().take(64).collect());
        let digits = |part: &str| -> Option<u64> {
            let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            is_number.then(|| part.parse().ok()).flatten()
        };
        let (ms, seq) = text.split_once('-').ok_or_else(invalid)?;
        Ok(Self { ms: digits(ms).ok_or_else(invalid)?, seq: digits(seq).ok_or_else(invalid)? })
    }
}

/// One existence of a stream: a random text, stored beside the stream. It changes if the stream is lost or created
/// again, so that ids of an earlier epoch are recognized.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Epoch(Arc<str>);

impl Epoch {
    /// Creates a new epoch.
    #[must_use]
    pub fn random() -> Self {
        let bytes = uuid::Uuid::new_v4().into_bytes();
        let mut text = String::with_capacity(8);
        for byte in &bytes[..4] {
            use fmt::Write as _;
            write!(text, "{byte:02x}").expect("writing to a String succeeds");
        }
        Self(text.into())
    }

    /// Returns the text: 1 to 32 letters and digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Epoch {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        let is_valid = (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
        if is_valid { Ok(Self(text.into())) } else { Err(InvalidPosition(text.chars().take(64).collect())) }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The position of a reader: an entry id within an [`Epoch`]. Text form: `<epoch>:<ms>-<seq>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The epoch that `id` belongs to.
    pub epoch: Epoch,
    /// The last entry that the reader has seen.
    pub id: EntryId,
}

/// A text that is not a position.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a position has the form <epoch>:<milliseconds>-<sequence>, not {0:?}")]
pub struct InvalidPosition(String);

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.id)
    }
}

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, InvalidPosition> {
        let invalid = || InvalidPosition(text.chars().take(64).collect());
        let (epoch, id) = text.split_once(':').ok_or_else(invalid)?;
        let id = id.parse().map_err(|_error: InvalidEntryId| invalid())?;
        Ok(Self { epoch: epoch.parse()?, id })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn id_is_two_numbers_and_a_dash() {
        for text in ["", "1", "1-", "-1", "+1-0", "1-0-0", "1 -0", "a-b", "18446744073709551616-0"] {
            assert!(text.parse::<EntryId>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn position_has_its_epoch() {
        let position: Position = "9f3c:12-4".parse().expect("a valid position");
        assert_eq!(position.epoch.as_str(), "9f3c");
        assert_eq!(position.id, EntryId::new(12, 4));
        assert_eq!(position.to_string(), "9f3c:12-4");
        assert!("12-4".parse::<Position>().is_err());
        assert!(":12-4".parse::<Position>().is_err());
    }

    proptest! {
        #[test]
        fn ids_round_trip_through_text(ms: u64, seq: u64) {
            let id = EntryId::new(ms, seq);
            prop_assert_eq!(id.to_string().parse::<EntryId>(), Ok(id));
        }

        #[test]
        fn next_and_previous_are_neighbours(ms: u64, seq: u64) {
            let id = EntryId::new(ms, seq);
            prop_assume!(id != EntryId::MAX);
            prop_assert!(id.next() > id);
            prop_assert_eq!(id.next().previous(), id);
        }
    }
}
