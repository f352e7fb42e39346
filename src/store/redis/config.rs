//! Configuration of the Redis store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fred::types::config::{
    Blocking, Config as FredConfig, ConnectionConfig, PerformanceConfig, TcpConfig, TlsConfig, TlsConnector,
    TlsHostMapping, UnresponsiveConfig,
};
use rustls::pki_types::ServerName;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};

use super::RedisStore;
use crate::secret::{MASK, masked};
use crate::store::redis::net::address;
use crate::store::redis::net::address::{Target, Topology};
use crate::tls;
use crate::validate::{Problems, Validate};

/// The address of the server, and the settings of its connections.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://[user:password@]host[:port][/database]`; `rediss://` for TLS. The primary of a Sentinel service:
    /// `redis-sentinel://[user:password@]host[:port][,host…]/<service>[/database]`. A cluster, by some of its nodes:
    /// `redis-cluster://[user:password@]host[:port][,host…]`. With TLS these begin with `rediss-`.
    #[serde(serialize_with = "masked_url")]
    pub url: SecretString,
    /// The user, instead of the one in the URL.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// The password, instead of the one in the URL.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub password: Option<SecretString>,
    /// A file with the password, instead of `password`. A line end after it is ignored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// The user for the sentinels. They do not use the servers' user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel_username: Option<String>,
    /// The password for the sentinels, if they require one.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub sentinel_password: Option<SecretString>,
    /// A file with the sentinels' password, instead of `sentinel_password`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel_password_file: Option<PathBuf>,
    /// The certificates to trust with `rediss://`, in PEM. Default: those of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The name or address that the certificates of all servers and sentinels must be for. Default: the host of the
    /// connection. For clusters and sentinels that announce addresses while their certificates contain a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_server_name: Option<String>,
    /// The timeout of connecting, and of each reply of the server.
    #[serde(with = "humantime_serde")]
    pub command_timeout: Duration,
    /// The longest pause between two attempts to reconnect. The pauses grow from 100 ms, with jitter.
    #[serde(with = "humantime_serde")]
    pub reconnect_max: Duration,
    /// The maximum number of blocking reads at a time, each on its own connection: one per worker and tailed stream.
    pub max_readers: usize,
    /// The number of replicas that must confirm an append with durability `replicated`.
    pub replicas: u8,
    /// The timeout of the confirmation by replicas or the disk.
    #[serde(with = "humantime_serde")]
    pub wait_timeout: Duration,
    /// Accepts a server whose eviction policy drops keys at its memory limit instead of refusing writes.
    pub allow_eviction: bool,
}

fn masked_url<S: Serializer>(url: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(address::masked(url.expose_secret(), MASK).as_deref().unwrap_or(MASK))
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: SecretString::from("redis://127.0.0.1:6379/0"),
            username: None,
            password: None,
            password_file: None,
            sentinel_username: None,
            sentinel_password: None,
            sentinel_password_file: None,
            ca_file: None,
            tls_server_name: None,
            command_timeout: Duration::from_secs(5),
            reconnect_max: Duration::from_secs(2),
            max_readers: 256,
            replicas: 1,
            wait_timeout: Duration::from_secs(2),
            allow_eviction: false,
        }
    }
}

/// Why a configuration is invalid. Never contains a password.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRedisConfig {
    /// The text is not a URL.
    #[error("url: not a URL: {0}")]
    Url(url::ParseError),
    /// The scheme of the URL is unknown.
    #[error(
        "url: the scheme `{0}` is not supported; use redis://, redis-sentinel:// or redis-cluster://, or with TLS \
         rediss://, rediss-sentinel:// or rediss-cluster://"
    )]
    Scheme(String),
    /// The URL of sentinels has no service name.
    #[error("url: the service name is missing: redis-sentinel://host:port,host:port/<service>")]
    Service,
    /// A cluster has no databases.
    #[error("url: `{0}` after the hosts is not allowed: a cluster has database 0 only")]
    ClusterDatabase(String),
    /// Several hosts with a scheme for one host.
    #[error("url: several hosts need the scheme redis-sentinel:// or redis-cluster://")]
    SeveralHosts,
    /// A query or a fragment.
    #[error("url: nothing may follow the database; set other options by their own keys")]
    Query,
    /// The URL names no host.
    #[error("url: the host is missing")]
    Host,
    /// The path is not a database number.
    #[error("url: database `{0}` is not a number from 0 to 255")]
    Database(String),
    /// The credentials in the URL cannot be decoded.
    #[error("url: the user or password is not percent-encoded UTF-8")]
    Credentials,
    /// The password is given twice.
    #[error("{0} and {0}_file cannot both be set")]
    TwoPasswords(&'static str),
    /// A setting of sentinels without sentinels.
    #[error("{0} requires the scheme redis-sentinel:// in url")]
    UselessSentinel(&'static str),
    /// A timeout longer than publishers wait.
    #[error("wait_timeout must be at most 1m")]
    WaitTooLong,
    /// Certificates without TLS.
    #[error("ca_file requires the scheme rediss:// in url")]
    UselessCa,
    /// A name for certificates without TLS.
    #[error("tls_server_name requires the scheme rediss:// in url")]
    UselessServerName,
    /// A name that no certificate can have.
    #[error("tls_server_name: `{0}` is neither a host name nor an address")]
    ServerName(String),
    /// A number or duration of zero.
    #[error("{0} must be greater than zero")]
    Zero(&'static str),
    /// A file cannot be read.
    #[error("{key}: cannot read {path}", path = path.display())]
    File {
        /// The setting that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// No certificate can be loaded.
    #[error("ca_file: {0}")]
    Trust(tls::NoTrust),
}

/// The validated settings of connections.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) topology: Topology,
    /// The client configuration for the servers; the address is filled in per connection.
    pub(super) config: FredConfig,
    /// The client configuration for the sentinels, likewise.
    pub(super) sentinel: FredConfig,
    pub(super) performance: PerformanceConfig,
    pub(super) connection: ConnectionConfig,
    /// The name that certificates must be for, if it differs from the host of the connection.
    pub(super) tls_server_name: Option<String>,
    pub(super) command_timeout: Duration,
    pub(super) reconnect_max: Duration,
    pub(super) max_readers: usize,
    pub(super) replicas: u8,
    pub(super) wait_timeout: Duration,
    pub(super) allow_eviction: bool,
}

/// Omits the credentials.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("topology", &self.topology).finish_non_exhaustive()
    }
}

impl Config {
    /// Starts a store on this server. Must be called within a tokio runtime.
    ///
    /// Returns after the first attempt to connect has succeeded or failed, at most two seconds. The store then reconnects
    /// until it is closed, and operations fail with [`crate::store::StoreErrorKind::Unavailable`] meanwhile. Fails only
    /// if the configuration is invalid.
    pub async fn connect(self) -> Result<RedisStore, InvalidRedisConfig> {
        Ok(RedisStore::start(self.settings()?).await)
    }

    pub(super) fn settings(&self) -> Result<Settings, InvalidRedisConfig> {
        let zeros = [
            ("command_timeout", self.command_timeout.is_zero()),
            ("reconnect_max", self.reconnect_max.is_zero()),
            ("wait_timeout", self.wait_timeout.as_millis() == 0),
            ("max_readers", self.max_readers == 0),
            ("replicas", self.replicas == 0),
        ];
        if let Some((name, _)) = zeros.into_iter().find(|(_, is_zero)| *is_zero) {
            return Err(InvalidRedisConfig::Zero(name));
        }
        if self.wait_timeout > Duration::from_mins(1) {
            return Err(InvalidRedisConfig::WaitTooLong);
        }
        let target = Target::parse(self.url.expose_secret())?;
        if self.ca_file.is_some() && !target.with_tls {
            return Err(InvalidRedisConfig::UselessCa);
        }
        if let Some(name) = &self.tls_server_name {
            if !target.with_tls {
                return Err(InvalidRedisConfig::UselessServerName);
            }
            ServerName::try_from(name.as_str()).map_err(|_invalid| InvalidRedisConfig::ServerName(name.clone()))?;
        }
        let of_sentinels = [
            ("sentinel_username", self.sentinel_username.is_some()),
            ("sentinel_password", self.sentinel_password.is_some()),
            ("sentinel_password_file", self.sentinel_password_file.is_some()),
        ];
        if let Some((name, _)) = of_sentinels.into_iter().find(|(_, is_given)| *is_given)
            && !matches!(target.topology, Topology::Sentinel { .. })
        {
            return Err(InvalidRedisConfig::UselessSentinel(name));
        }
        let tls = target.with_tls.then(|| self.tls()).transpose()?;
        let of = |username, password, database| FredConfig {
            fail_fast: true,
            blocking: Blocking::Block,
            username,
            password,
            database,
            tls: tls.clone(),
            ..FredConfig::default()
        };
        let password = password("password", self.password.as_ref(), self.password_file.as_deref())?;
        let config = of(self.username.clone().or(target.username), password.or(target.password), target.database);
        let sentinel_password = self::password(
            "sentinel_password",
            self.sentinel_password.as_ref(),
            self.sentinel_password_file.as_deref(),
        )?;
        let sentinel = of(self.sentinel_username.clone(), sentinel_password, None);
        let connection = ConnectionConfig {
            connection_timeout: self.command_timeout,
            internal_command_timeout: self.command_timeout,
            // One lost reply must never become two entries: callers decide about repetitions.
            max_command_attempts: 1,
            unresponsive: UnresponsiveConfig {
                max_timeout: Some(self.command_timeout + Duration::from_secs(1)),
                interval: Duration::from_secs(1),
            },
            max_command_buffer_len: 10_000,
            // The reply handler decides whether an error closes the connection.
            reconnect_errors: Vec::new(),
            tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
            ..ConnectionConfig::default()
        };
        let performance =
            PerformanceConfig { default_command_timeout: self.command_timeout, ..PerformanceConfig::default() };
        Ok(Settings {
            topology: target.topology,
            config,
            sentinel,
            performance,
            connection,
            tls_server_name: self.tls_server_name.clone(),
            command_timeout: self.command_timeout,
            reconnect_max: self.reconnect_max,
            max_readers: self.max_readers,
            replicas: self.replicas,
            wait_timeout: self.wait_timeout,
            allow_eviction: self.allow_eviction,
        })
    }

    fn tls(&self) -> Result<TlsConfig, InvalidRedisConfig> {
        let client = tls::client_config(self.ca_file.as_deref()).map_err(InvalidRedisConfig::Trust)?;
        Ok(TlsConfig { connector: TlsConnector::from(client), hostnames: TlsHostMapping::None })
    }
}

impl Validate for Config {
    /// Checks the keys and the named files, without connecting.
    fn validate(&self, problems: &mut Problems) {
        if let Err(error) = self.settings() {
            problems.add("", error);
        }
    }
}

/// Returns the password from the configuration or from its file.
fn password(
    key: &'static str,
    written: Option<&SecretString>,
    file: Option<&Path>,
) -> Result<Option<String>, InvalidRedisConfig> {
    match (written, file) {
        (Some(_), Some(_)) => Err(InvalidRedisConfig::TwoPasswords(key)),
        (Some(password), None) => Ok(Some(password.expose_secret().to_owned())),
        (None, Some(path)) => {
            let key = if key == "password" { "password_file" } else { "sentinel_password_file" };
            let text = std::fs::read_to_string(path).map_err(|source| InvalidRedisConfig::File {
                key,
                path: path.to_owned(),
                source,
            })?;
            Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
        }
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Result<Settings, InvalidRedisConfig> {
        Config { url: SecretString::from(url), ..Config::default() }.settings()
    }

    #[test]
    fn url_has_host_port_database_and_credentials() {
        let settings = settings("redis://bob:p%40ss%2Fword@redis.example:7000/3").expect("valid");
        assert_eq!(settings.topology.to_string(), "redis.example:7000");
        assert_eq!(settings.config.database, Some(3));
        assert_eq!(settings.config.username.as_deref(), Some("bob"));
        assert_eq!(settings.config.password.as_deref(), Some("p@ss/word"));
        assert!(settings.config.tls.is_none());
    }

    #[test]
    fn url_without_port_uses_redis_default_port() {
        let settings = settings("redis://[::1]").expect("valid");
        assert_eq!(settings.topology.to_string(), "[::1]:6379");
        assert_eq!((settings.config.username, settings.config.password), (None, None));
        assert_eq!(settings.connection.max_command_attempts, 1);
    }

    #[test]
    fn invalid_urls_are_refused_with_reason() {
        let refused = |url: &str| settings(url).expect_err(url).to_string();
        assert!(refused("redis-ring://a:1/x").starts_with("url: the scheme `redis-ring` is not supported; use"));
        assert_eq!(refused("redis://h/seven"), "url: database `seven` is not a number from 0 to 255");
        assert_eq!(refused("redis:///0"), "url: the host is missing");
        assert!(refused("no url").starts_with("url: not a URL"));
        assert_eq!(refused("redis://a:%zz@h"), "url: the user or password is not percent-encoded UTF-8");
        let named = |url: &str, name: &str| {
            let config = Config { url: url.into(), tls_server_name: Some(name.to_owned()), ..Config::default() };
            config.settings().map(drop).map_err(|error| error.to_string())
        };
        let useless = "tls_server_name requires the scheme rediss:// in url";
        assert_eq!(named("redis://h", "redis.soc"), Err(useless.to_owned()));
        let wrong = "tls_server_name: `a b` is neither a host name nor an address";
        assert_eq!(named("rediss-cluster://h", "a b"), Err(wrong.to_owned()));
    }

    #[test]
    fn debug_output_contains_no_password() {
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
    fn password_file_is_read_without_line_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("password");
        std::fs::write(&path, "secret \r\n").expect("written");
        let config = Config { password_file: Some(path), ..Config::default() };
        assert_eq!(config.settings().expect("valid").config.password.as_deref(), Some("secret "));
        let missing = Config { password_file: Some(folder.path().join("none")), ..Config::default() };
        assert!(missing.settings().expect_err("missing").to_string().starts_with("password_file: cannot read"));
    }
}
