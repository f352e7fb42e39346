//! How the server is reached.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fred::types::config::{
    Blocking, Config as FredConfig, ConnectionConfig, PerformanceConfig, ServerConfig, TcpConfig, TlsConfig,
    TlsConnector, TlsHostMapping, UnresponsiveConfig,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use url::{Host, Url};

use super::RedisStore;

/// Where the server is and how to speak to it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://` or, over TLS, `rediss://`, then `[user:password@]host[:port][/database]`.
    #[serde(serialize_with = "masked_url")]
    pub url: SecretString,
    /// The user, instead of the one in the URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The password, instead of the one in the URL.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub password: Option<SecretString>,
    /// A file that holds the password, instead of one written here. A line end after it is ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// The certificates to trust with `rediss://`, in PEM; those of the system where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// How long to wait for a connection, and for each answer of the server.
    #[serde(with = "humantime_serde")]
    pub command_timeout: Duration,
    /// The longest pause between two attempts to connect again. The pauses grow from 100 ms and are jittered.
    #[serde(with = "humantime_serde")]
    pub reconnect_max: Duration,
    /// The most blocking reads at a time, each on a connection of its own: one per worker and tailed stream.
    pub max_readers: usize,
}

/// What stands for a secret where the configuration is printed.
const MASK: &str = "********";

#[expect(clippy::ref_option, reason = "serde hands fields over by reference")]
fn masked<S: Serializer>(_: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(MASK)
}

fn masked_url<S: Serializer>(url: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    let Ok(mut url) = Url::parse(url.expose_secret()) else { return serializer.serialize_str(MASK) };
    if url.password().is_some() && url.set_password(Some(MASK)).is_err() {
        return serializer.serialize_str(MASK);
    }
    serializer.serialize_str(url.as_str())
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: SecretString::from("redis://127.0.0.1:6379/0"),
            username: None,
            password: None,
            password_file: None,
            ca_file: None,
            command_timeout: Duration::from_secs(5),
            reconnect_max: Duration::from_secs(2),
            max_readers: 256,
        }
    }
}

/// Why a configuration can't be used. Never holds a password.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    /// The text is no URL.
    #[error("url: not a URL: {0}")]
    Url(url::ParseError),
    /// The URL asks for what there is not.
    #[error("url: the scheme is `{0}`, but those understood are redis:// and rediss://")]
    Scheme(String),
    /// The URL names no host.
    #[error("url: names no host")]
    Host,
    /// What follows the host is no database number.
    #[error("url: `{0}` is no database, which is a number from 0 to 255")]
    Database(String),
    /// What stands before the host can't be read.
    #[error("url: the user or password is not percent-encoded UTF-8")]
    Credentials,
    /// The password is given twice.
    #[error("password and password_file can't both be given")]
    TwoPasswords,
    /// Certificates are given, but no TLS is asked for.
    #[error("ca_file is given, but the scheme of url is not rediss://")]
    UselessCa,
    /// A number or duration that can't work.
    #[error("{0} must be greater than zero")]
    Zero(&'static str),
    /// A file can't be read.
    #[error("{key}: cannot read {path}", path = path.display())]
    File {
        /// Which setting names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A file or the system holds no usable certificate.
    #[error("ca_file: no usable certificate: {0}")]
    Certificates(String),
}

/// Everything that opening a connection needs, checked.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) config: FredConfig,
    pub(super) performance: PerformanceConfig,
    pub(super) connection: ConnectionConfig,
    pub(super) command_timeout: Duration,
    pub(super) reconnect_max: Duration,
    pub(super) max_readers: usize,
    /// Host and port, for logs.
    pub(super) address: String,
}

/// Without the credentials.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Config {
    /// Starts a store on this server. Must be called within a tokio runtime.
    ///
    /// Waits until the first attempt to connect has succeeded or failed, at most two seconds, and returns in either
    /// case: the store connects and reconnects on its own for as long as it lives, and its operations fail with
    /// [`crate::store::StoreErrorKind::Unavailable`] meanwhile. Fails only where the configuration can't be used.
    pub async fn connect(self) -> Result<RedisStore, InvalidConfig> {
        Ok(RedisStore::start(self.settings()?).await)
    }

    /// Checks the configuration, the files it names included, without connecting.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.settings().map(|_| ())
    }

    pub(super) fn settings(&self) -> Result<Settings, InvalidConfig> {
        for (name, value) in [("command_timeout", self.command_timeout), ("reconnect_max", self.reconnect_max)] {
            if value.is_zero() {
                return Err(InvalidConfig::Zero(name));
            }
        }
        if self.max_readers == 0 {
            return Err(InvalidConfig::Zero("max_readers"));
        }
        let url = Url::parse(self.url.expose_secret()).map_err(InvalidConfig::Url)?;
        let with_tls = match url.scheme() {
            "redis" => false,
            "rediss" => true,
            other => return Err(InvalidConfig::Scheme(other.to_owned())),
        };
        if self.ca_file.is_some() && !with_tls {
            return Err(InvalidConfig::UselessCa);
        }
        let host = match url.host().ok_or(InvalidConfig::Host)? {
            Host::Domain("") => return Err(InvalidConfig::Host),
            Host::Domain(name) => name.to_owned(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        let port = url.port().unwrap_or(6379);
        let tls = with_tls.then(|| self.tls()).transpose()?;
        let config = FredConfig {
            fail_fast: true,
            blocking: Blocking::Block,
            username: match &self.username {
                Some(name) => Some(name.clone()),
                None => Some(decoded(url.username())?).filter(|name| !name.is_empty()),
            },
            password: self.password(&url)?,
            server: ServerConfig::new_centralized(host.clone(), port),
            database: database(&url)?,
            tls,
            ..FredConfig::default()
        };
        let connection = ConnectionConfig {
            connection_timeout: self.command_timeout,
            internal_command_timeout: self.command_timeout,
            // One lost reply must never become two entries: what is sent again is for our callers to decide.
            max_command_attempts: 1,
            unresponsive: UnresponsiveConfig {
                max_timeout: Some(self.command_timeout + Duration::from_secs(1)),
                interval: Duration::from_secs(1),
            },
            max_command_buffer_len: 10_000,
            tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
            ..ConnectionConfig::default()
        };
        let performance =
            PerformanceConfig { default_command_timeout: self.command_timeout, ..PerformanceConfig::default() };
        Ok(Settings {
            config,
            performance,
            connection,
            command_timeout: self.command_timeout,
            reconnect_max: self.reconnect_max,
            max_readers: self.max_readers,
            address: format!("{host}:{port}"),
        })
    }

    fn password(&self, url: &Url) -> Result<Option<String>, InvalidConfig> {
        match (&self.password, &self.password_file) {
            (Some(_), Some(_)) => Err(InvalidConfig::TwoPasswords),
            (Some(password), None) => Ok(Some(password.expose_secret().to_owned())),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).map_err(|source| InvalidConfig::File {
                    key: "password_file",
                    path: path.clone(),
                    source,
                })?;
                Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
            }
            (None, None) => url.password().map(decoded).transpose(),
        }
    }

    fn tls(&self) -> Result<TlsConfig, InvalidConfig> {
        let mut roots = rustls::RootCertStore::empty();
        match &self.ca_file {
            Some(path) => {
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|e| InvalidConfig::Certificates(e.to_string()))?;
                }
            }
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        if roots.is_empty() {
            return Err(InvalidConfig::Certificates("there is none".to_owned()));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider supports the default versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsConfig { connector: TlsConnector::from(client), hostnames: TlsHostMapping::None })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, InvalidConfig> {
    let pem =
        std::fs::read(path).map_err(|source| InvalidConfig::File { key: "ca_file", path: path.to_owned(), source })?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|e| InvalidConfig::Certificates(e.to_string()))
}

fn database(url: &Url) -> Result<Option<u8>, InvalidConfig> {
    match url.path().trim_matches('/') {
        "" => Ok(None),
        text => match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(InvalidConfig::Database(text.chars().take(64).collect())),
        },
    }
}

/// Text of a URL with its %-escapes resolved.
fn decoded(text: &str) -> Result<String, InvalidConfig> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push(high * 16 + low),
            _ => return Err(InvalidConfig::Credentials),
        }
    }
    String::from_utf8(out).or(Err(InvalidConfig::Credentials))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Result<Settings, InvalidConfig> {
        Config { url: SecretString::from(url), ..Config::default() }.settings()
    }

    #[test]
    fn a_url_gives_host_port_database_and_credentials() {
        let settings = settings("redis://bob:p%40ss%2Fword@redis.example:7000/3").expect("valid");
        assert_eq!(settings.address, "redis.example:7000");
        assert_eq!(settings.config.database, Some(3));
        assert_eq!(settings.config.username.as_deref(), Some("bob"));
        assert_eq!(settings.config.password.as_deref(), Some("p@ss/word"));
        assert!(settings.config.tls.is_none());
    }

    #[test]
    fn defaults_are_the_port_of_redis_and_no_credentials() {
        let settings = settings("redis://[::1]").expect("valid");
        assert_eq!(settings.address, "::1:6379");
        assert_eq!((settings.config.username, settings.config.password), (None, None));
        assert_eq!(settings.connection.max_command_attempts, 1);
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_words() {
        let refused = |url: &str| settings(url).expect_err(url).to_string();
        assert_eq!(
            refused("redis-sentinel://a:1/x"),
            "url: the scheme is `redis-sentinel`, but those understood are redis:// and rediss://"
        );
        assert_eq!(refused("redis://h/seven"), "url: `seven` is no database, which is a number from 0 to 255");
        assert_eq!(refused("redis:///0"), "url: names no host");
        assert!(refused("no url").starts_with("url: not a URL"));
        assert_eq!(refused("redis://a:%zz@h"), "url: the user or password is not percent-encoded UTF-8");
    }

    #[test]
    fn passwords_never_appear_when_shown() {
        let config = Config { url: SecretString::from("redis://u:hunter2@h"), ..Config::default() };
        let shown = format!("{config:?} {:?}", config.settings().expect("valid"));
        assert!(!shown.contains("hunter2"), "{shown}");
        for url in ["redis://u:hunter2@h/x", "redis-x://u:hunter2@h", "redis://u:hunter2@h:port", "u:hunter2@h"] {
            let error = settings(url).expect_err(url);
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
        }
    }

    #[test]
    fn a_password_file_is_read_without_its_line_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("password");
        std::fs::write(&path, "secret \r\n").expect("written");
        let config = Config { password_file: Some(path), ..Config::default() };
        assert_eq!(config.settings().expect("valid").config.password.as_deref(), Some("secret "));
        let missing = Config { password_file: Some(folder.path().join("none")), ..Config::default() };
        assert!(missing.settings().expect_err("missing").to_string().starts_with("password_file: cannot read"));
    }
}
