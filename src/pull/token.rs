//! Lease tokens: the proof of a lease that settles an entry.

use std::fmt;
use std::str::FromStr;

use crate::event::{EntryId, GroupName, StreamName};
use crate::store::Receipt;

/// A delivery of a group as text, such as `1741076109120-0.1.0.1f8a3c5e.worker-1`. Opaque to external consumers.
///
/// The store decides whether the consumer still has the entry by this delivery. The check digits only detect damaged
/// tokens and tokens of another group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token {
    /// The receipt of the delivery.
    pub receipt: Receipt,
    /// The number of deliveries of the entry under earlier ids.
    pub earlier: u32,
    check: u32,
}

/// The text is not a lease token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token is invalid: it must be the `token` of a delivery")]
pub struct InvalidToken;

impl Token {
    /// Creates the token of a delivery of a group.
    pub fn new(stream: &StreamName, group: &GroupName, receipt: Receipt, earlier: u32) -> Self {
        let check = check(stream, group, &receipt, earlier);
        Self { receipt, earlier, check }
    }

    /// Returns whether the token was issued for this group.
    pub fn belongs_to(&self, stream: &StreamName, group: &GroupName) -> bool {
        self.check == check(stream, group, &self.receipt, self.earlier)
    }

    /// Returns the number of deliveries of the entry, including this one.
    pub fn attempt(&self) -> u32 {
        self.earlier.saturating_add(self.receipt.attempt)
    }
}

fn check(stream: &StreamName, group: &GroupName, receipt: &Receipt, earlier: u32) -> u32 {
    let Receipt { id, consumer, attempt } = receipt;
    crc32c::crc32c(format!("{stream} {group} {id} {attempt} {earlier} {consumer}").as_bytes())
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Receipt { id, consumer, attempt } = &self.receipt;
        write!(f, "{id}.{attempt}.{}.{:08x}.{consumer}", self.earlier, self.check)
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let mut parts = text.splitn(5, '.');
        let mut next = || parts.next().ok_or(InvalidToken);
        let (id, attempt, earlier, check, consumer): (EntryId, u32, u32, u32, _) = (
            next()?.parse().map_err(|_error| InvalidToken)?,
            next()?.parse().map_err(|_error| InvalidToken)?,
            next()?.parse().map_err(|_error| InvalidToken)?,
            u32::from_str_radix(next()?, 16).map_err(|_error| InvalidToken)?,
            next()?.parse().map_err(|_error| InvalidToken)?,
        );
        Ok(Self { receipt: Receipt { id, consumer, attempt }, earlier, check })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(text: &str) -> StreamName {
        text.parse().expect("a valid name")
    }

    fn group(text: &str) -> GroupName {
        text.parse().expect("a valid name")
    }

    proptest! {
        #[test]
        fn token_survives_its_text_form_and_knows_its_group(
            ms: u64, seq: u64, attempt: u32, earlier: u32, consumer in "[a-zA-Z0-9:_.~-]{1,200}",
        ) {
            let (stream, group) = (stream("aurora:agent:tasks"), group("aurora-agents"));
            let receipt = Receipt { id: EntryId::new(ms, seq), consumer: consumer.parse().expect("a name"), attempt };
            let token = Token::new(&stream, &group, receipt, earlier);
            let read: Token = token.to_string().parse().expect("a token");
            prop_assert_eq!(&read, &token);
            prop_assert!(read.belongs_to(&stream, &group));
            prop_assert!(!read.belongs_to(&self::stream("aurora:agent:results"), &group));
            prop_assert!(!read.belongs_to(&stream, &self::group("aurora-agents2")));
        }

        #[test]
        fn parsing_never_panics(text in ".{0,60}") {
            std::hint::black_box(text.parse::<Token>().is_ok());
        }
    }

    #[test]
    fn invalid_tokens_are_rejected() {
        for text in
            ["", "1-0", "1-0.1.0.zz.w", "1-0.1.0.00000000.", "x.1.0.00000000.w", "1-0.-1.0.00000000.w", "1-0.1.0.0 .w"]
        {
            assert_eq!(text.parse::<Token>(), Err(InvalidToken), "{text}");
        }
    }
}
