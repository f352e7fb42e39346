//! Masks for secrets in the printed configuration, and their detection if a print is read back.

use secrecy::SecretString;
use serde::Serializer;

/// The text that replaces a secret, or the secret part of a text, in the printed configuration.
pub const MASK: &str = "********";

/// Serializes the mask instead of the secret. For fields that are skipped if they are `None`.
#[expect(clippy::ref_option, reason = "serde hands fields over by reference")]
pub(crate) fn masked<S: Serializer>(_: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(MASK)
}

/// Returns whether the text has a masked part, and so cannot be the secret itself.
pub fn is_masked(text: &str) -> bool {
    text.contains(MASK)
}
