//! API keys: long random texts. The configuration has only their hashes.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;

use crate::auth::config::KeyConfig;
use crate::auth::error::AuthError;
use crate::auth::key_hash::KeyHash;
use crate::auth::principal::Principal;
use crate::event::Filter;

/// The start of every key, so that people and secret scanners recognize one.
pub(crate) const PREFIX: &str = "ab_";

/// Makes a new key: the prefix and 256 random bits.
pub fn new_key() -> String {
    format!("{PREFIX}{}", random_text())
}

/// Returns 256 random bits as a URL-safe text.
pub(crate) fn random_text() -> String {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system provides random numbers");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// The configured API keys.
pub(crate) struct ApiKeys(Vec<StoredKey>);

struct StoredKey {
    hash: KeyHash,
    expires: Option<Timestamp>,
    principal: Principal,
}

impl ApiKeys {
    /// Fails with every invalid filter, each with its key below `auth`.
    pub(crate) fn new(configs: &[KeyConfig]) -> Result<Self, Vec<(String, String)>> {
        let (mut keys, mut problems) = (Vec::new(), Vec::new());
        for (index, config) in configs.iter().enumerate() {
            let filter = config.parsed_filter().unwrap_or_else(|problem| {
                problems.push((format!("keys[{index}].filter"), problem));
                Filter::default()
            });
            let id = format!("key:{}", config.name);
            let expires_at = config.expires.map(Into::into);
            let principal = Principal::new(id, config.scopes.clone(), config.tenant.clone(), filter, expires_at);
            keys.push(StoredKey { hash: config.hash, expires: config.expires, principal });
        }
        if problems.is_empty() { Ok(Self(keys)) } else { Err(problems) }
    }

    /// Returns the principal of a key. Compares with all keys, so that the time does not depend on the key.
    pub(crate) fn find(&self, key: &str, now: Timestamp) -> Result<Principal, AuthError> {
        let hash = KeyHash::of(key);
        let mut found = None;
        for stored in &self.0 {
            if stored.hash.is(&hash) {
                found = Some(stored);
            }
        }
        let stored = found.ok_or(AuthError::UnknownKey)?;
        match stored.expires {
            Some(expires) if expires <= now => Err(AuthError::Expired),
            _ => Ok(stored.principal.clone()),
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
    fn key_is_found_by_its_hash_until_it_expires() {
        let (first, second) = (new_key(), new_key());
        assert_ne!(first, second);
        assert!(first.starts_with("ab_") && first.len() == 46);
        let configs = [config("first", &first, None), config("second", &second, Some("2030-01-01T00:00:00Z"))];
        let keys = ApiKeys::new(&configs).unwrap_or_else(|problems| panic!("{problems:?}"));
        let at = |time: &str| time.parse::<Timestamp>().expect("a time");
        let found = |key: &str, time: &str| keys.find(key, at(time)).map(|principal| principal.id().map(str::to_owned));
        assert_eq!(found(&first, "2099-01-01T00:00:00Z"), Ok(Some("key:first".to_owned())));
        assert_eq!(found(&second, "2029-12-31T23:59:59Z"), Ok(Some("key:second".to_owned())));
        assert_eq!(found(&second, "2030-01-01T00:00:00Z"), Err(AuthError::Expired));
        assert_eq!(found("ab_guess", "2029-01-01T00:00:00Z"), Err(AuthError::UnknownKey));
        assert_eq!(found("", "2029-01-01T00:00:00Z"), Err(AuthError::UnknownKey));
    }

    #[test]
    fn key_with_invalid_filter_is_never_accepted_without_it() {
        let invalid = KeyConfig { filter: Some("{}".to_owned()), ..config("second", "ab_y", None) };
        let problems = ApiKeys::new(&[config("first", "ab_x", None), invalid]).err().expect("a problem");
        assert!(problems.len() == 1 && problems[0].0 == "keys[1].filter", "{problems:?}");
    }
}
