//! The section `auth` of the configuration.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use jsonwebtoken::{Algorithm, AlgorithmFamily};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use crate::auth::key_hash::KeyHash;
use crate::auth::scope::Scope;
use crate::event::Filter;
use crate::secret::masked;
use crate::validate::{Problems, Validate};

/// The minimum length of a secret for signatures: that of the shortest hash.
const MIN_SECRET_BYTES: usize = 32;
/// The maximum length of a tenant's name.
pub(crate) const MAX_TENANT_BYTES: usize = 128;

/// Access to the API, the WebSockets and the feeds.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// Whether requests need credentials.
    pub mode: AuthMode,
    /// Access to `/metrics` if credentials are required.
    pub metrics: MetricsAccess,
    /// API keys.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyConfig>,
    /// The issuers whose tokens (JWT) are accepted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub issuers: Vec<IssuerConfig>,
}

/// Whether requests need credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// No credentials while neither keys nor issuers are declared; then the listen address must be a loopback address.
    #[default]
    Loopback,
    /// No credentials: every client that reaches the listener may do everything.
    None,
    /// Credentials: a declared key or a token of a declared issuer.
    Credentials,
}

/// Access to `/metrics` if credentials are required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsAccess {
    /// Open on a loopback address, otherwise limited to the scope `admin`.
    #[default]
    Loopback,
    /// Open to every client.
    Open,
    /// Limited to the scope `admin`.
    Admin,
}

/// One API key, as `aurora-bus token key` makes it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// The name of the key in the audit trail.
    pub name: String,
    /// The hash of the key: `sha256:` and 64 hexadecimal digits.
    pub hash: KeyHash,
    /// The permissions of the key.
    pub scopes: Vec<Scope>,
    /// Restricts the key to the entries of one tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Restricts the key to entries that match this filter, in JSON as
    /// [`Filter::parse`](crate::event::Filter::parse) reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// The time at which the key expires, in RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
}

/// One issuer of tokens.
///
/// Its signatures are checked with exactly one of `secret`, `secret_file`, `public_key_file`, `jwks_file` and
/// `jwks_url`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerConfig {
    /// The value of the claim `iss`.
    pub issuer: String,
    /// The value that the claim `aud` must be or contain.
    pub audience: String,
    /// The allowed signature algorithms: HS256, HS384 and HS512 with a secret; RS256 to RS512, PS256 to PS512, ES256,
    /// ES384 and `EdDSA` with public keys.
    pub algorithms: Vec<Algorithm>,
    /// The shared secret, at least 32 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub secret: Option<SecretString>,
    /// A file with the shared secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// A file with the public key in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key_file: Option<PathBuf>,
    /// A file with the public keys as a JWK set. It is read again like `jwks_url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// The URL of the JWK set: `https://`, or `http://` on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<String>,
    /// The certificates to trust for `jwks_url`, in PEM. Default: those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The maximum age of the JWK set.
    #[serde(default = "default_refresh", with = "humantime_serde")]
    pub refresh: Duration,
    /// The minimum time between two attempts to read the JWK set.
    #[serde(default = "default_refresh_floor", with = "humantime_serde")]
    pub refresh_floor: Duration,
    /// The claim that names the tenant.
    #[serde(default = "default_tenant_claim")]
    pub tenant_claim: String,
    /// The claim that restricts the token to entries that match a filter: its JSON, or that JSON as a text.
    #[serde(default = "default_filter_claim")]
    pub filter_claim: String,
    /// Whether a token without a tenant is rejected. Otherwise it covers all tenants.
    #[serde(default)]
    pub require_tenant: bool,
}

const fn default_refresh() -> Duration {
    Duration::from_mins(15)
}

const fn default_refresh_floor() -> Duration {
    Duration::from_secs(10)
}

fn default_tenant_claim() -> String {
    "tenant".to_owned()
}

fn default_filter_claim() -> String {
    "filter".to_owned()
}

impl AuthConfig {
    /// Returns whether requests need credentials.
    pub fn is_required(&self) -> bool {
        self.mode == AuthMode::Credentials || !self.keys.is_empty() || !self.issuers.is_empty()
    }
}

impl Validate for AuthConfig {
    /// Checks the keys. Does not read the named files.
    fn validate(&self, problems: &mut Problems) {
        let has_some = !self.keys.is_empty() || !self.issuers.is_empty();
        match self.mode {
            AuthMode::None if has_some => {
                problems.add("mode", "must not be \"none\" while auth.keys or auth.issuers are declared");
            }
            AuthMode::Credentials if !has_some => {
                problems.add("mode", "\"credentials\" requires at least one entry in auth.keys or auth.issuers");
            }
            _ => {}
        }
        let (mut names, mut hashes, mut issuers) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for (index, key) in self.keys.iter().enumerate() {
            let path = format!("keys[{index}]");
            problems.check(&path, key);
            let message = format_args!("`{}` is declared twice", key.name);
            problems.require(names.insert(&key.name), &format!("{path}.name"), message);
            let is_new = hashes.insert(key.hash.to_string());
            problems.require(is_new, &format!("{path}.hash"), "must not be the hash of another key");
        }
        for (index, issuer) in self.issuers.iter().enumerate() {
            let path = format!("issuers[{index}]");
            problems.check(&path, issuer);
            let message = format_args!("`{}` is declared twice", issuer.issuer);
            problems.require(issuers.insert(&issuer.issuer), &format!("{path}.issuer"), message);
        }
    }
}

impl KeyConfig {
    /// Returns the filter; an empty one if the key has none. Fails with the problem.
    pub(crate) fn parsed_filter(&self) -> Result<Filter, String> {
        let filter = self.filter.as_deref().map(Filter::parse).transpose();
        let example = r#"{"key":"severity","cmp":"gte","val":"high"}"#;
        let filter =
            filter.map_err(|invalid| format!("is not accepted: {invalid}; a filter is JSON such as {example}"))?;
        Ok(filter.unwrap_or_default())
    }
}

impl Validate for KeyConfig {
    fn validate(&self, problems: &mut Problems) {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let is_name = (1..=64).contains(&self.name.len()) && self.name.chars().all(is_allowed);
        problems.require(is_name, "name", "must be 1 to 64 letters, digits and `._-`");
        problems.require(!self.scopes.is_empty(), "scopes", "must have at least one scope");
        let is_tenant = self.tenant.as_ref().is_none_or(|tenant| (1..=MAX_TENANT_BYTES).contains(&tenant.len()));
        problems.require(is_tenant, "tenant", format_args!("must have 1 to {MAX_TENANT_BYTES} bytes"));
        if let Err(message) = self.parsed_filter() {
            problems.add("filter", message);
        }
    }
}

impl IssuerConfig {
    /// Returns the family of the algorithms, or `None` if they belong to several.
    pub(crate) fn family(&self) -> Option<AlgorithmFamily> {
        let first = self.algorithms.first()?.family();
        self.algorithms.iter().all(|algorithm| algorithm.family() == first).then_some(first)
    }

    fn algorithm_problem(&self, has_secret: bool) -> Option<&'static str> {
        let is_hmac = |algorithm: &Algorithm| algorithm.family() == AlgorithmFamily::Hmac;
        if self.algorithms.is_empty() {
            Some("must list the algorithms that the issuer signs with")
        } else if has_secret && !self.algorithms.iter().all(is_hmac) {
            Some("must be HS256, HS384 or HS512 with a secret")
        } else if !has_secret && self.algorithms.iter().any(is_hmac) {
            Some("must not be HS256, HS384 or HS512 with public keys, which are no secrets")
        } else if self.public_key_file.is_some() && self.family().is_none() {
            Some("must be of one family for one public key: RS and PS, or ES, or EdDSA")
        } else {
            None
        }
    }
}

impl Validate for IssuerConfig {
    fn validate(&self, problems: &mut Problems) {
        for (key, value) in [
            ("issuer", &self.issuer),
            ("audience", &self.audience),
            ("tenant_claim", &self.tenant_claim),
            ("filter_claim", &self.filter_claim),
        ] {
            problems.require(!value.is_empty(), key, "must not be empty");
        }
        let is_other = self.filter_claim != self.tenant_claim;
        problems.require(is_other, "filter_claim", "must not be the same as tenant_claim");
        let keys = [
            ("secret", self.secret.is_some()),
            ("secret_file", self.secret_file.is_some()),
            ("public_key_file", self.public_key_file.is_some()),
            ("jwks_file", self.jwks_file.is_some()),
            ("jwks_url", self.jwks_url.is_some()),
        ];
        let given: Vec<&str> = keys.iter().filter(|(_, is_given)| *is_given).map(|(key, _)| *key).collect();
        match given.as_slice() {
            [_] => {}
            [] => {
                problems.add("secret", "is required, or one of secret_file, public_key_file, jwks_file and jwks_url");
            }
            [first, rest @ ..] => {
                problems.add(first, format_args!("must not be set together with {}", rest.join(" and ")));
            }
        }
        if let Some(message) = self.algorithm_problem(self.secret.is_some() || self.secret_file.is_some()) {
            problems.add("algorithms", message);
        }
        if let Some(message) = self.secret.as_ref().and_then(|secret| secret_problem(secret.expose_secret())) {
            problems.add("secret", message);
        }
        if let Some(message) = self.jwks_url.as_ref().and_then(|url| url_problem(url)) {
            problems.add("jwks_url", message);
        }
        let has_tls = self.jwks_url.as_ref().is_some_and(|url| url.starts_with("https:"));
        problems.require(self.ca_file.is_none() || has_tls, "ca_file", "requires a jwks_url with https");
        for (key, time) in [("refresh", self.refresh), ("refresh_floor", self.refresh_floor)] {
            problems.require(time >= Duration::from_millis(100), key, "must be at least 100ms");
        }
    }
}

/// Returns the problem with a secret, without the secret.
pub(crate) fn secret_problem(secret: &str) -> Option<String> {
    if secret.contains("-----BEGIN") {
        return Some("must not be a key or certificate in PEM; use public_key_file for a public key".to_owned());
    }
    (secret.len() < MIN_SECRET_BYTES).then(|| format!("must have at least {MIN_SECRET_BYTES} bytes"))
}

fn url_problem(text: &str) -> Option<String> {
    let Ok(url) = Url::parse(text) else { return Some("is not a URL".to_owned()) };
    let is_local = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Some("must not contain credentials: the keys are public".to_owned());
    }
    let is_safe = url.scheme() == "https" || url.scheme() == "http" && is_local;
    (!is_safe).then(|| "must be https, or http on this machine: changed keys would allow forged tokens".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::MASK;

    fn problems(text: &str) -> Vec<String> {
        let config: AuthConfig = toml::from_str(text).expect("TOML");
        config.problems().iter().map(ToString::to_string).collect()
    }

    const ISSUER: &str = "[[issuers]]\nissuer = \"i\"\naudience = \"a\"\n";

    #[test]
    fn valid_config_has_no_problems() {
        assert_eq!(AuthConfig::default().problems(), []);
        let secret = "s".repeat(32);
        let texts = [
            format!("{ISSUER}algorithms = [\"HS256\"]\nsecret = \"{secret}\""),
            format!("{ISSUER}algorithms = [\"RS256\", \"PS512\"]\npublic_key_file = \"x\""),
            format!("{ISSUER}algorithms = [\"RS256\", \"ES384\", \"EdDSA\"]\njwks_url = \"https://id.example/jwks\""),
            format!("{ISSUER}algorithms = [\"ES256\"]\njwks_url = \"http://127.0.0.1:1/jwks\""),
            format!(
                "[[keys]]\nname = \"a\"\nhash = \"sha256:{}\"\nscopes = [\"publish:*\"]\nexpires = \"2030-01-01T00:00:00Z\"",
                "0".repeat(64)
            ),
            format!(
                "[[keys]]\nname = \"a\"\nhash = \"sha256:{}\"\nscopes = [\"ws:*\"]\nfilter = '{}'",
                "0".repeat(64),
                r#"{"key":"severity","cmp":"gte","val":"high"}"#
            ),
        ];
        for text in texts {
            assert_eq!(problems(&text), [""; 0], "{text}");
            assert!(toml::from_str::<AuthConfig>(&text).expect("TOML").is_required());
        }
        assert!(!AuthConfig::default().is_required());
    }

    #[test]
    fn every_invalid_value_is_reported_with_its_path() {
        let hash = format!("sha256:{}", "0".repeat(64));
        let key = format!("[[keys]]\nname = \"a\"\nhash = \"{hash}\"\nscopes = [\"admin\"]\n");
        let cases = [
            ("mode = \"credentials\"".to_owned(), "mode: \"credentials\" requires"),
            (format!("mode = \"none\"\n{key}"), "mode: must not be \"none\""),
            (format!("{key}{key}"), "keys[1].name: `a` is declared twice"),
            (format!("{key}{key}"), "keys[1].hash: must not be the hash of another key"),
            (key.replace("\"a\"", "\"a b\""), "keys[0].name: must be"),
            (key.replace("\"admin\"", ""), "keys[0].scopes: must have"),
            (format!("{key}tenant = \"\""), "keys[0].tenant: must have"),
            (format!("{key}filter = \"\""), "keys[0].filter: is not accepted: is not a filter: "),
            (
                format!("{key}filter = '{}'", r#"{"op":"not","nodes":[{"key":"sauce","cmp":"exists"}]}"#),
                "keys[0].filter: is not accepted: nodes[0].key must be severity or one of",
            ),
            (format!("{ISSUER}algorithms = []\nfilter_claim = \"\""), "issuers[0].filter_claim: must not be empty"),
            (
                format!("{ISSUER}algorithms = []\ntenant_claim = \"filter\""),
                "issuers[0].filter_claim: must not be the same",
            ),
            (format!("{ISSUER}algorithms = [\"HS256\"]"), "issuers[0].secret: is required"),
            (
                format!("{ISSUER}algorithms = [\"RS256\"]\njwks_file = \"a\"\npublic_key_file = \"b\""),
                "issuers[0].public_key_file: must not be set together with jwks_file",
            ),
            (format!("{ISSUER}algorithms = [\"HS256\"]\nsecret = \"short\""), "issuers[0].secret: must have at least"),
            (
                format!("{ISSUER}algorithms = [\"HS256\"]\nsecret = \"-----BEGIN PUBLIC KEY-----xxxxxxxxxxxx\""),
                "issuers[0].secret: must not be a key",
            ),
            (format!("{ISSUER}algorithms = []\njwks_file = \"a\""), "issuers[0].algorithms: must list"),
            (
                format!("{ISSUER}algorithms = [\"HS256\"]\njwks_file = \"a\""),
                "issuers[0].algorithms: must not be HS256, HS384",
            ),
            (
                format!("{ISSUER}algorithms = [\"RS256\"]\nsecret_file = \"a\""),
                "issuers[0].algorithms: must be HS256, HS384 or HS512 with a secret",
            ),
            (
                format!("{ISSUER}algorithms = [\"RS256\", \"HS256\"]\npublic_key_file = \"a\""),
                "issuers[0].algorithms: must not be HS256",
            ),
            (
                format!("{ISSUER}algorithms = [\"RS256\", \"ES256\"]\npublic_key_file = \"a\""),
                "issuers[0].algorithms: must be of one family",
            ),
            (
                format!("{ISSUER}algorithms = [\"RS256\"]\njwks_url = \"http://id.example/jwks\""),
                "issuers[0].jwks_url: must be https",
            ),
            (
                format!("{ISSUER}algorithms = [\"RS256\"]\njwks_url = \"https://a:b@id.example/\""),
                "issuers[0].jwks_url: must not contain",
            ),
        ];
        for (text, start) in cases {
            let found = problems(&text);
            assert!(found.iter().any(|problem| problem.starts_with(start)), "{start:?} is not in {found:#?}");
        }
    }

    #[test]
    fn secrets_are_masked_when_printed() {
        let secret = "a very secret text of 32 bytes and more";
        let config: AuthConfig =
            toml::from_str(&format!("{ISSUER}algorithms = [\"HS256\"]\nsecret = \"{secret}\"")).expect("TOML");
        let printed = format!("{config:?}{}", toml::to_string(&config).expect("TOML"));
        assert!(!printed.contains("secret text") && printed.contains(MASK), "{printed}");
    }
}
