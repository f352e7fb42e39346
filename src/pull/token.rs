//! What a worker shows to settle what it was given.

use std::fmt;
use std::str::FromStr;

use crate::event::{EntryId, GroupName, StreamName};
use crate::store::Receipt;

/// One delivery of one group, as text such as `1741076109120-0.1.0.1f8a3c5e.worker-1`; to workers it is opaque.
///
/// It proves nothing by itself: the store is asked whether the entry is still with that consumer, by that delivery. The
/// check digits tell a token of another group or a mangled one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token {
    /// The delivery.
    pub receipt: Receipt,
    /// How many times the entry had been delivered under earlier ids.
    pub earlier: u32,
    check: u32,
}

/// The text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no token that was given with a delivery")]
pub struct InvalidToken;

impl Token {
    /// The token of a delivery of that group.
    pub fn new(stream: &StreamName, group: &GroupName, receipt: Receipt, earlier: u32) -> Self {
        let check = check(stream, group, &receipt, earlier);
        Self { receipt, earlier, check }
    }

    /// Whether it is of that group.
    pub fn is_of(&self, stream: &StreamName, group: &GroupName) -> bool {
        self.check == check(stream, group, &self.receipt, self.earlier)
    }

    /// How many times the entry was delivered, with this delivery.
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
        fn tokens_survive_their_text_form_and_know_their_group(
            ms: u64, seq: u64, attempt: u32, earlier: u32, consumer in "[a-zA-Z0-9:_.~-]{1,200}",
        ) {
            let (stream, group) = (stream("aurora:agent:tasks"), group("aurora-agents"));
            let receipt = Receipt { id: EntryId::new(ms, seq), consumer: consumer.parse().expect("a name"), attempt };
            let token = Token::new(&stream, &group, receipt, earlier);
            let read: Token = token.to_string().parse().expect("a token");
            prop_assert_eq!(&read, &token);
            prop_assert!(read.is_of(&stream, &group));
            prop_assert!(!read.is_of(&self::stream("aurora:agent:results"), &group));
            prop_assert!(!read.is_of(&stream, &self::group("aurora-agents2")));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,60}") {
            std::hint::black_box(text.parse::<Token>().is_ok());
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in
            ["", "1-0", "1-0.1.0.zz.w", "1-0.1.0.00000000.", "x.1.0.00000000.w", "1-0.-1.0.00000000.w", "1-0.1.0.0 .w"]
        {
            assert_eq!(text.parse::<Token>(), Err(InvalidToken), "{text}");
        }
    }
}
