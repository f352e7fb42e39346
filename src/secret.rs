//! How secrets of the configuration are printed, and how to tell that such a print was read back.

use secrecy::SecretString;
use serde::Serializer;

/// What stands for a secret, or for the part of a text that is one, where the configuration is printed.
pub const MASK: &str = "********";

/// Prints the mask, whatever the secret. For fields that are left out where they are `None`.
#[expect(clippy::ref_option, reason = "serde hands fields over by reference")]
pub(crate) fn masked<S: Serializer>(_: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(MASK)
}

/// Whether the text was printed with a secret masked, so that it can't be the text itself.
pub fn is_masked(text: &str) -> bool {
    text.contains(MASK)
}
