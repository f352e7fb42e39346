//! The configuration of a webhook sink.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use rustls::ClientConfig;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use url::Host;

use super::guard::AddressGuard;
use super::response::SecretMask;
use super::sign::Signer;
use crate::secret::{MASK, masked};
use crate::tls;
use crate::validate::{ConfigProblem, Problems, Validate};

/// Maximum number of entries per request. Their ids fit into a header that any receiver accepts.
const MAX_BATCH: usize = 100;

/// Prefixes of the headers that the bus, the connection or the HTTP library sets.
const RESERVED_HEADERS: [&str; 11] = [
    "webhook-",
    "aurora-",
    "traceparent",
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "expect",
    "te",
    "trailer",
    "upgrade",
];

/// The receiver of entries, and the format of requests.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// URL of the receiver: `https://` or `http://`. Credentials belong in `headers`. The printed configuration has
    /// only scheme, host and port, because the path of many webhooks is the password.
    #[serde(serialize_with = "origin_only")]
    pub url: SecretString,
    /// Secret for signatures: `whsec_` and base64, as in Standard Webhooks, or any other text, which is used as it is.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub secret: Option<SecretString>,
    /// File with secrets, one per line, instead of `secret`. Requests are signed with each, so that receivers can
    /// change the secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// Maximum number of entries per request, 1 to 100. With 1 the body is the payload of the entry, byte for byte.
    /// With more it is always a JSON array of payloads.
    #[serde(default = "default::batch")]
    pub batch: usize,
    /// Timeout of a request and its response. Should be shorter than the group's `handler_timeout`.
    #[serde(default = "default::timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// Timeout of a connection attempt.
    #[serde(default = "default::connect_timeout", with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Allow receivers on this machine or in a private network. Link-local addresses and metadata services of clouds
    /// are always refused.
    #[serde(default)]
    pub allow_private: bool,
    /// File with trusted certificates, in PEM; by default those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Further headers of each request, such as `Authorization`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", serialize_with = "masked_values")]
    pub headers: BTreeMap<String, SecretString>,
}

mod default {
    use std::time::Duration;

    pub(super) const fn batch() -> usize {
        1
    }

    pub(super) const fn timeout() -> Duration {
        Duration::from_secs(10)
    }

    pub(super) const fn connect_timeout() -> Duration {
        Duration::from_secs(5)
    }
}

fn masked_values<S: Serializer>(headers: &BTreeMap<String, SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(headers.keys().map(|name| (name, MASK)))
}

fn origin_only<S: Serializer>(url: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    match Url::parse(url.expose_secret()) {
        Ok(url) if matches!(url.path(), "" | "/") && url.query().is_none() => {
            serializer.collect_str(&format_args!("{}/", url.origin().ascii_serialization()))
        }
        Ok(url) if url.has_host() => {
            serializer.collect_str(&format_args!("{}/{MASK}", url.origin().ascii_serialization()))
        }
        _ => serializer.serialize_str(MASK),
    }
}

/// The checked settings for sending.
pub(super) struct WebhookSettings {
    pub(super) url: Url,
    pub(super) guard: AddressGuard,
    /// TLS settings; `None` if the URL is not https.
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) signer: Signer,
    pub(super) headers: HeaderMap,
    pub(super) mask: SecretMask,
}

impl WebhookConfig {
    /// Creates the configuration of a URL with defaults for all else.
    pub fn new(url: impl Into<SecretString>) -> Self {
        Self {
            url: url.into(),
            secret: None,
            secret_file: None,
            batch: default::batch(),
            timeout: default::timeout(),
            connect_timeout: default::connect_timeout(),
            allow_private: false,
            ca_file: None,
            headers: BTreeMap::new(),
        }
    }

    /// Checks everything and reads the named files.
    pub(super) fn settings(&self) -> Result<WebhookSettings, ConfigProblem> {
        if let Some(first) = self.problems().into_iter().next() {
            return Err(first);
        }
        let url = self.parsed_url().map_err(|message| ConfigProblem::new("url", message))?;
        let secrets = self.secrets()?;
        let secrets = || secrets.iter().map(ExposeSecret::expose_secret);
        let key = if self.secret_file.is_some() { "secret_file" } else { "secret" };
        let signer = Signer::new(secrets())
            .map_err(|error| ConfigProblem::new(key, format_args!("a secret is not valid: {error}")))?;
        let is_tls = url.scheme() == "https";
        let tls = is_tls.then(|| tls::client_config(self.ca_file.as_deref())).transpose();
        let tls = tls.map_err(|error| ConfigProblem::new("ca_file", error))?.map(Arc::new);

        let agent = concat!("aurora-bus/", env!("CARGO_PKG_VERSION"));
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        for (name, value) in &self.headers {
            let (name, value) = header(name, value).map_err(|message| ConfigProblem::new("headers", message))?;
            headers.insert(name, value);
        }
        let values = self.headers.values().map(ExposeSecret::expose_secret);
        let mask = SecretMask::new(secrets().chain(values).chain([url.path()]).chain(url.query()));
        Ok(WebhookSettings { guard: self.guard(), tls, signer, headers, mask, url })
    }

    fn guard(&self) -> AddressGuard {
        AddressGuard { allow_private: self.allow_private }
    }

    fn parsed_url(&self) -> Result<Url, String> {
        let url = Url::parse(self.url.expose_secret()).map_err(|error| format!("is not a URL: {error}"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(format!("the scheme must be https or http, not `{}`", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("must not hold a user and password: set `Authorization` in headers".to_owned());
        }
        if url.fragment().is_some() {
            return Err("must not have a fragment (`#…`)".to_owned());
        }
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(address.into()),
            Some(Host::Ipv6(address)) => Some(address.into()),
            Some(Host::Domain(_)) => None,
            None => return Err("names no host".to_owned()),
        };
        // Literal addresses are never resolved, so they are checked here.
        match literal.map(|address| self.guard().check(address)) {
            Some(Err(error)) => Err(error.to_string()),
            _ => Ok(url),
        }
    }

    fn secrets(&self) -> Result<Vec<SecretString>, ConfigProblem> {
        if let Some(secret) = &self.secret {
            return Ok(vec![secret.clone()]);
        }
        let Some(path) = &self.secret_file else { return Ok(Vec::new()) };
        let invalid = |message: fmt::Arguments<'_>| ConfigProblem::new("secret_file", message);
        let lines =
            secret_lines(path).map_err(|error| invalid(format_args!("cannot read {}: {error}", path.display())))?;
        if lines.is_empty() {
            return Err(invalid(format_args!("{} holds no secret", path.display())));
        }
        Ok(lines)
    }
}

impl Validate for WebhookConfig {
    /// Checks the keys. The named files are not read.
    fn validate(&self, problems: &mut Problems) {
        let url = self.parsed_url();
        if let Err(message) = &url {
            problems.add("url", message);
        }
        let has_both = self.secret.is_some() && self.secret_file.is_some();
        problems.require(!has_both, "secret", "cannot be given together with secret_file");
        if let Some(secret) = &self.secret
            && let Err(error) = Signer::new([secret.expose_secret()])
        {
            problems.add("secret", error);
        }
        let is_valid = (1..=MAX_BATCH).contains(&self.batch);
        problems.require(is_valid, "batch", format_args!("must be from 1 to {MAX_BATCH}, not {}", self.batch));
        for (key, time) in [("timeout", self.timeout), ("connect_timeout", self.connect_timeout)] {
            problems.require(!time.is_zero(), key, "must be longer than 0s");
        }
        if self.ca_file.is_some() && url.is_ok_and(|url| url.scheme() != "https") {
            problems.add("ca_file", "has no effect: the scheme of url is not https");
        }
        for (name, value) in &self.headers {
            if let Err(message) = header(name, value) {
                problems.add("headers", message);
            }
        }
    }
}

fn secret_lines(path: &Path) -> std::io::Result<Vec<SecretString>> {
    let text = SecretString::from(std::fs::read_to_string(path)?);
    let lines = text.expose_secret().lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(SecretString::from).collect())
}

/// Parses a header. Its value is hidden in debug output.
fn header(name: &str, value: &SecretString) -> Result<(HeaderName, HeaderValue), String> {
    let refuse = |problem: &str| format!("`{name}` {problem}");
    let parsed: HeaderName = name.parse().map_err(|_error| refuse("is not a valid header name"))?;
    let is_reserved = |reserved: &str| {
        if reserved.ends_with('-') { parsed.as_str().starts_with(reserved) } else { parsed == *reserved }
    };
    if RESERVED_HEADERS.iter().any(|reserved| is_reserved(reserved)) {
        return Err(refuse("is a header that the bus sets itself"));
    }
    let mut value = HeaderValue::from_str(value.expose_secret())
        .map_err(|_error| refuse("has a value that is not valid in a header, such as a line end"))?;
    value.set_sensitive(true);
    Ok((parsed, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> WebhookConfig {
        toml::from_str(text).unwrap()
    }

    fn problems_of(text: &str) -> Vec<String> {
        parse(text).problems().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn url_is_the_only_required_key() {
        let config = parse("url = 'https://siem.example/in'");
        assert_eq!(config.problems(), []);
        assert_eq!((config.batch, config.timeout, config.allow_private), (1, Duration::from_secs(10), false));
        assert!(toml::from_str::<WebhookConfig>("secret = 'x'").is_err());
        assert!(toml::from_str::<WebhookConfig>("url = 'https://siem.example/in'\ntimeouts = '1s'").is_err());
    }

    #[test]
    fn invalid_values_are_reported_with_their_keys() {
        let found = problems_of(
            "url = 'http://siem.example/in'\nsecret = 'whsec_?'\nsecret_file = 'x'\nbatch = 101\ntimeout = '0s'\n\
             connect_timeout = '0s'\nca_file = 'x'\n[headers]\n'a b' = 'x'\nX-Token = \"x\\ny\"\nWebhook-Id = '1'\n\
             Host = 'x'\nHostess = 'x'\n",
        );
        let expected = [
            "secret: cannot be given together with secret_file",
            "secret: must be base64 after `whsec_`",
            "batch: must be from 1 to 100, not 101",
            "timeout: must be longer than 0s",
            "connect_timeout: must be longer than 0s",
            "ca_file: has no effect: the scheme of url is not https",
            "headers: `Host` is a header that the bus sets itself",
            "headers: `Webhook-Id` is a header that the bus sets itself",
            "headers: `X-Token` has a value that is not valid in a header, such as a line end",
            "headers: `a b` is not a valid header name",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn invalid_and_internal_urls_are_refused() {
        let refused = |url: &str| problems_of(&format!("url = '{url}'")).join("\n");
        for private in [
            "http://127.0.0.1:9/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://[::1]/",
            "http://[::ffff:10.0.0.1]/",
            "https://192.168.1.1/in",
        ] {
            let problem = refused(private);
            assert!(problem.starts_with("url: ") && problem.contains("is a private address"), "{private}: {problem}");
            assert_eq!(problems_of(&format!("url = '{private}'\nallow_private = true")), [""; 0], "{private}");
        }
        for forbidden in ["http://169.254.169.254/latest", "http://[fe80::1]/", "http://0.0.0.0/", "http://[::]/"] {
            let problem = problems_of(&format!("url = '{forbidden}'\nallow_private = true")).join("\n");
            assert!(problem.contains("is not allowed"), "{forbidden}: {problem}");
        }
        assert!(refused("siem.example/in").starts_with("url: is not a URL"));
        assert!(refused("ftp://siem.example/").contains("must be https or http"));
        assert!(refused("https://u:hunter2@siem.example/").contains("must not hold a user and password"));
        assert!(!refused("https://u:hunter2@siem.example/").contains("hunter2"));
        assert!(refused("https://siem.example/#x").contains("fragment"));
        assert_eq!(refused("https://1.1.1.1/in"), "");
    }

    #[test]
    fn printed_configuration_has_no_secret() {
        let config = parse(
            "url = 'https://hooks.example:8443/T0/hunter2?key=hunter3'\nsecret = 'hunter4'\n\
             [headers]\nAuthorization = 'Bearer hunter5'\n",
        );
        let printed = toml::to_string(&config).unwrap();
        assert!(printed.contains("url = \"https://hooks.example:8443/********\""), "{printed}");
        assert!(printed.contains("Authorization = \"********\""), "{printed}");
        let settings = config.settings().unwrap();
        for shown in [printed, format!("{config:?}"), format!("{:?}", settings.headers)] {
            assert!(!shown.contains("hunter"), "{shown}");
        }
        let printed = toml::to_string(&parse("url = 'https://hooks.example'")).unwrap();
        assert!(printed.contains("url = \"https://hooks.example/\""), "{printed}");
    }

    #[test]
    fn secrets_are_the_lines_of_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secrets");
        let config = WebhookConfig { secret_file: Some(path.clone()), ..WebhookConfig::new("https://siem.example/") };
        let secrets = || {
            let found = config.secrets().map_err(|error| error.to_string())?;
            Ok::<_, String>(found.iter().map(|secret| secret.expose_secret().to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(config.problems(), [], "only opening reads files");
        assert!(secrets().unwrap_err().starts_with("secret_file: cannot read "));
        std::fs::write(&path, " \n").unwrap();
        assert!(secrets().unwrap_err().ends_with("holds no secret"));
        std::fs::write(&path, "new secret \r\n\nold\n").unwrap();
        assert_eq!(secrets().unwrap(), ["new secret", "old"]);
    }
}
