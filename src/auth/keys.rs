//! API keys: long random texts, of which only hashes are kept.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::auth::AuthError;
use crate::auth::config::KeyConfig;
use crate::auth::principal::Principal;
use crate::event::Filter;

/// How every key begins, so that people and secret scanners tell it from other texts.
pub(crate) const PREFIX: &str = "ab_";

/// A SHA-256, as `sha256:` and 64 hexadecimal digits.
///
/// Keys have 256 random bits: nobody finds one by trying, however fast the hash is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash of a key.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Whether it is the same, in a time that does not tell where they differ.
    fn is(&self, other: &Self) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

/// The text is no hash of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be sha256: and 64 hexadecimal digits, as `aurora-bus token key` prints it")]
pub struct InvalidKeyHash;

impl FromStr for KeyHash {
    type Err = InvalidKeyHash;

    fn from_str(text: &str) -> Result<Self, InvalidKeyHash> {
        let digits = text.strip_prefix("sha256:").filter(|digits| digits.len() == 64).ok_or(InvalidKeyHash)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = str::from_utf8(pair).map_err(|_error| InvalidKeyHash)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_error| InvalidKeyHash)?;
        }
        Ok(Self(hash))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl TryFrom<String> for KeyHash {
    type Error = InvalidKeyHash;

    fn try_from(text: String) -> Result<Self, InvalidKeyHash> {
        text.parse()
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> Self {
        hash.to_string()
    }
}

/// A fresh key: the prefix and 256 random bits.
pub fn new_key() -> String {
    format!("{PREFIX}{}", random_text())
}

/// 256 random bits as a text that fits everywhere.
pub(crate) fn random_text() -> String {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random numbers");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The keys that are known.
pub(crate) struct Keys(Vec<Known>);

struct Known {
    hash: KeyHash,
    expires: Option<Timestamp>,
    principal: Principal,
}

impl Keys {
    /// Fails with every filter that makes no sense, each with its key below `auth`.
    pub(crate) fn new(keys: &[KeyConfig]) -> Result<Self, Vec<(String, String)>> {
        let (mut known, mut problems) = (Vec::new(), Vec::new());
        for (index, key) in keys.iter().enumerate() {
            let filter = key.sight().unwrap_or_else(|problem| {
                problems.push((format!("keys[{index}].filter"), problem));
                Filter::default()
            });
            let id = format!("key:{}", key.name);
            let ends = key.expires.map(Into::into);
            let principal = Principal::new(id, key.scopes.clone(), key.tenant.clone(), filter, ends);
            known.push(Known { hash: key.hash, expires: key.expires, principal });
        }
        if problems.is_empty() { Ok(Self(known)) } else { Err(problems) }
    }

    /// Whose key it is. Looks at all of them, whichever it is.
    pub(crate) fn find(&self, key: &str, now: Timestamp) -> Result<Principal, AuthError> {
        let hash = KeyHash::of(key);
        let mut found = None;
        for known in &self.0 {
            if known.hash.is(&hash) {
                found = Some(known);
            }
        }
        let known = found.ok_or(AuthError::UnknownKey)?;
        match known.expires {
            Some(expires) if expires <= now => Err(AuthError::Expired),
            _ => Ok(known.principal.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str, key: &str, expires: Option<&str>) -> KeyConfig {
        KeyConfig {
            name: name.to_owned(),
            hash: KeyHash::of(key),
            scopes: vec!["admin".parse().expect("a scope")],
            tenant: None,
            filter: None,
            expires: expires.map(|time| time.parse().expect("a time")),
        }
    }

    #[test]
    fn a_key_is_found_by_its_hash_until_it_expires() {
        let (first, second) = (new_key(), new_key());
        assert_ne!(first, second);
        assert!(first.starts_with("ab_") && first.len() == 46);
        let keys = Keys::new(&[config("first", &first, None), config("second", &second, Some("2030-01-01T00:00:00Z"))]);
        let keys = keys.unwrap_or_else(|problems| panic!("{problems:?}"));
        let at = |time: &str| time.parse::<Timestamp>().expect("a time");
        let found = |key: &str, time: &str| keys.find(key, at(time)).map(|principal| principal.id().map(str::to_owned));
        assert_eq!(found(&first, "2099-01-01T00:00:00Z"), Ok(Some("key:first".to_owned())));
        assert_eq!(found(&second, "2029-12-31T23:59:59Z"), Ok(Some("key:second".to_owned())));
        assert_eq!(found(&second, "2030-01-01T00:00:00Z"), Err(AuthError::Expired));
        assert_eq!(found("ab_guess", "2029-01-01T00:00:00Z"), Err(AuthError::UnknownKey));
        assert_eq!(found("", "2029-01-01T00:00:00Z"), Err(AuthError::UnknownKey));
    }

    #[test]
    fn a_key_whose_filter_makes_no_sense_is_not_known_without_it() {
        let senseless = KeyConfig { filter: Some("{}".to_owned()), ..config("second", "ab_y", None) };
        let problems = Keys::new(&[config("first", "ab_x", None), senseless]).err().expect("a problem");
        assert!(problems.len() == 1 && problems[0].0 == "keys[1].filter", "{problems:?}");
    }

    #[test]
    fn hashes_survive_their_text_form_and_odd_ones_are_refused() {
        let hash = KeyHash::of("ab_x");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        let odd = [
            "",
            "sha256:",
            "sha256:00",
            "md5:00",
            &format!("sha256:{}", "zz".repeat(32)),
            &format!("sha256:{}", "é".repeat(32)),
        ];
        for text in odd {
            assert_eq!(text.parse::<KeyHash>(), Err(InvalidKeyHash), "{text}");
        }
    }
}
