//! What the configuration says of a webhook.

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

use super::answer::Mask;
use super::guard::Guard;
use super::sign::Signer;
use crate::secret::{MASK, masked};
use crate::tls;

/// The most entries in one request: their ids fit into a header that any receiver takes.
const MOST_IN_BATCH: usize = 100;

/// Headers that each request has from the bus, the connection or the HTTP library, by how they begin.
const OURS: [&str; 11] = [
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

/// Where entries are posted, and how.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// Where to post: `https://` or `http://`. Credentials belong into `headers`. Where the configuration is printed,
    /// only its scheme, host and port are: in many webhooks the path is the password.
    #[serde(serialize_with = "origin_only")]
    pub url: SecretString,
    /// The secret that requests are signed with: `whsec_` and base64, as in Standard Webhooks, or any other text, which
    /// is used as it is.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub secret: Option<SecretString>,
    /// A file with secrets instead, one a line. Requests are signed with each, so that receivers can change over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// How many entries one request carries at most, 1 to 100. With 1 the body is the entry's payload, byte for byte;
    /// with more it is always a JSON array of payloads.
    #[serde(default = "default::batch")]
    pub batch: usize,
    /// How long a request may take, its answer included. Should be shorter than the group's `handler_timeout`.
    #[serde(default = "default::timeout", with = "humantime_serde")]
    pub timeout: Duration,
    /// How long connecting may take.
    #[serde(default = "default::connect_timeout", with = "humantime_serde")]
    pub connect_timeout: Duration,
    /// Whether the receiver may be on this machine or in a private network. Link-local addresses and metadata services
    /// of clouds are refused in any case.
    #[serde(default)]
    pub allow_private: bool,
    /// The certificates to trust, in PEM; those of the system where it is absent.
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

/// Why a configuration can't be used: a key, and what is wrong with it. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Invalid {
    key: &'static str,
    problem: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.problem)
    }
}

impl std::error::Error for Invalid {}

fn invalid(key: &'static str, problem: impl fmt::Display) -> Invalid {
    Invalid { key, problem: problem.to_string() }
}

/// Everything that sending needs, checked.
pub(super) struct Settings {
    pub(super) url: Url,
    pub(super) guard: Guard,
    /// How to do TLS; nothing where the URL asks for none.
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) signer: Signer,
    pub(super) headers: HeaderMap,
    pub(super) mask: Mask,
}

impl WebhookConfig {
    /// A webhook at that URL, all else as by default.
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

    /// Every value that makes no sense, by its key. The files that are named are not read.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        self.invalid().into_iter().map(|invalid| (invalid.key, invalid.problem)).collect()
    }

    fn invalid(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        let url = self.parsed_url();
        found.extend(url.as_ref().err().cloned());
        if self.secret.is_some() && self.secret_file.is_some() {
            found.push(invalid("secret", "can't be given beside secret_file"));
        }
        if let Some(secret) = &self.secret
            && let Err(error) = Signer::new([secret.expose_secret()])
        {
            found.push(invalid("secret", error));
        }
        if !(1..=MOST_IN_BATCH).contains(&self.batch) {
            found.push(invalid("batch", format!("must be 1 to {MOST_IN_BATCH}, not {}", self.batch)));
        }
        for (key, time) in [("timeout", self.timeout), ("connect_timeout", self.connect_timeout)] {
            if time.is_zero() {
                found.push(invalid(key, "must be longer than 0s"));
            }
        }
        if self.ca_file.is_some() && url.is_ok_and(|url| url.scheme() != "https") {
            found.push(invalid("ca_file", "has no use: the scheme of url is not https"));
        }
        let headers = self.headers.iter().map(|(name, value)| header(name, value));
        found.extend(headers.filter_map(Result::err));
        found
    }

    /// Checks everything and reads the files that are named.
    pub(super) fn settings(&self) -> Result<Settings, Invalid> {
        if let Some(first) = self.invalid().into_iter().next() {
            return Err(first);
        }
        let url = self.parsed_url()?;
        let secrets = self.secrets()?;
        let secrets = || secrets.iter().map(ExposeSecret::expose_secret);
        let key = if self.secret_file.is_some() { "secret_file" } else { "secret" };
        let signer = Signer::new(secrets()).map_err(|error| invalid(key, format!("a secret {error}")))?;
        let is_tls = url.scheme() == "https";
        let tls = is_tls.then(|| tls::client_config(self.ca_file.as_deref())).transpose();
        let tls = tls.map_err(|error| invalid("ca_file", error))?.map(Arc::new);

        let agent = concat!("aurora-bus/", env!("CARGO_PKG_VERSION"));
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        for (name, value) in &self.headers {
            let (name, value) = header(name, value)?;
            headers.insert(name, value);
        }
        let values = self.headers.values().map(ExposeSecret::expose_secret);
        let mask = Mask::new(secrets().chain(values).chain([url.path()]).chain(url.query()));
        Ok(Settings { guard: self.guard(), tls, signer, headers, mask, url })
    }

    fn guard(&self) -> Guard {
        Guard { allow_private: self.allow_private }
    }

    fn parsed_url(&self) -> Result<Url, Invalid> {
        let refuse = |problem: String| invalid("url", problem);
        let url = Url::parse(self.url.expose_secret()).map_err(|error| refuse(format!("is not a URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(refuse(format!("the scheme is `{}`, but must be https or http", url.scheme())));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse("must not hold a user and password: give an Authorization in headers".to_owned()));
        }
        if url.fragment().is_some() {
            return Err(refuse("must not have a fragment (`#…`)".to_owned()));
        }
        let literal = match url.host() {
            Some(Host::Ipv4(address)) => Some(address.into()),
            Some(Host::Ipv6(address)) => Some(address.into()),
            Some(Host::Domain(_)) => None,
            None => return Err(refuse("names no host".to_owned())),
        };
        // Addresses written out are never resolved, so this is the place to judge them.
        match literal.map(|address| self.guard().judge(address)) {
            Some(Err(error)) => Err(refuse(error.to_string())),
            _ => Ok(url),
        }
    }

    fn secrets(&self) -> Result<Vec<SecretString>, Invalid> {
        if let Some(secret) = &self.secret {
            return Ok(vec![secret.clone()]);
        }
        let Some(path) = &self.secret_file else { return Ok(Vec::new()) };
        let lines = secret_lines(path)
            .map_err(|error| invalid("secret_file", format!("cannot read {}: {error}", path.display())))?;
        if lines.is_empty() {
            return Err(invalid("secret_file", format!("{} holds no secret", path.display())));
        }
        Ok(lines)
    }
}

fn secret_lines(path: &Path) -> std::io::Result<Vec<SecretString>> {
    let text = SecretString::from(std::fs::read_to_string(path)?);
    let lines = text.expose_secret().lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.map(SecretString::from).collect())
}

/// A further header, hidden where requests are shown.
fn header(name: &str, value: &SecretString) -> Result<(HeaderName, HeaderValue), Invalid> {
    let refuse = |problem: &str| invalid("headers", format!("`{name}` {problem}"));
    let parsed: HeaderName = name.parse().map_err(|_error| refuse("is no name that a header can have"))?;
    let is_ours = |ours: &str| if ours.ends_with('-') { parsed.as_str().starts_with(ours) } else { parsed == *ours };
    if OURS.iter().any(|ours| is_ours(ours)) {
        return Err(refuse("is a header that the bus sets itself"));
    }
    let mut value = HeaderValue::from_str(value.expose_secret())
        .map_err(|_error| refuse("has a value that a header can't have, such as a line end"))?;
    value.set_sensitive(true);
    Ok((parsed, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> WebhookConfig {
        toml::from_str(text).unwrap()
    }

    fn told(text: &str) -> Vec<String> {
        parse(text).problems().into_iter().map(|(key, problem)| format!("{key}: {problem}")).collect()
    }

    #[test]
    fn a_url_is_all_that_is_needed() {
        let config = parse("url = 'https://siem.example/in'");
        assert_eq!(config.problems(), []);
        assert_eq!((config.batch, config.timeout, config.allow_private), (1, Duration::from_secs(10), false));
        assert!(toml::from_str::<WebhookConfig>("secret = 'x'").is_err());
        assert!(toml::from_str::<WebhookConfig>("url = 'https://siem.example/in'\ntimeouts = '1s'").is_err());
    }

    #[test]
    fn every_senseless_value_is_told_with_its_key() {
        let found = told(
            "url = 'http://siem.example/in'\nsecret = 'whsec_?'\nsecret_file = 'x'\nbatch = 101\ntimeout = '0s'\n\
             connect_timeout = '0s'\nca_file = 'x'\n[headers]\n'a b' = 'x'\nX-Token = \"x\\ny\"\nWebhook-Id = '1'\n\
             Host = 'x'\nHostess = 'x'\n",
        );
        let expected = [
            "secret: can't be given beside secret_file",
            "secret: begins with `whsec_`, but is not base64 after it",
            "batch: must be 1 to 100, not 101",
            "timeout: must be longer than 0s",
            "connect_timeout: must be longer than 0s",
            "ca_file: has no use: the scheme of url is not https",
            "headers: `Host` is a header that the bus sets itself",
            "headers: `Webhook-Id` is a header that the bus sets itself",
            "headers: `X-Token` has a value that a header can't have, such as a line end",
            "headers: `a b` is no name that a header can have",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_url_that_leads_nowhere_or_inwards_is_refused() {
        let refused = |url: &str| told(&format!("url = '{url}'")).join("\n");
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
            assert_eq!(told(&format!("url = '{private}'\nallow_private = true")), [""; 0], "{private}");
        }
        for forbidden in ["http://169.254.169.254/latest", "http://[fe80::1]/", "http://0.0.0.0/", "http://[::]/"] {
            let problem = told(&format!("url = '{forbidden}'\nallow_private = true")).join("\n");
            assert!(problem.contains("where no receiver may be"), "{forbidden}: {problem}");
        }
        assert!(refused("siem.example/in").starts_with("url: is not a URL"));
        assert!(refused("ftp://siem.example/").contains("must be https or http"));
        assert!(refused("https://u:hunter2@siem.example/").contains("must not hold a user and password"));
        assert!(!refused("https://u:hunter2@siem.example/").contains("hunter2"));
        assert!(refused("https://siem.example/#x").contains("fragment"));
        assert_eq!(refused("https://1.1.1.1/in"), "");
    }

    #[test]
    fn what_is_printed_holds_no_secret() {
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
