//! How the server is reached.

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

/// Where the server is and how to speak to it.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://[user:password@]host[:port][/database]`; over TLS `rediss://`. The primary that sentinels name:
    /// `redis-sentinel://[user:password@]host[:port][,host…]/<service>[/database]`. A cluster, by some of its nodes:
    /// `redis-cluster://[user:password@]host[:port][,host…]`. Over TLS these begin with `rediss-`.
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
    /// The user that the sentinels know, which is not the servers'.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel_username: Option<String>,
    /// The password that the sentinels ask for, if they ask.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "masked")]
    pub sentinel_password: Option<SecretString>,
    /// A file that holds it, instead of one written here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel_password_file: Option<PathBuf>,
    /// The certificates to trust with `rediss://`, in PEM; those of the system where it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The name, or address, that every server's and sentinel's certificate must be for; that of the host connected to
    /// where it is absent. For clusters and sentinels that announce addresses while their certificates bear a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_server_name: Option<String>,
    /// How long to wait for a connection, and for each answer of the server.
    #[serde(with = "humantime_serde")]
    pub command_timeout: Duration,
    /// The longest pause between two attempts to connect again. The pauses grow from 100 ms and are jittered.
    #[serde(with = "humantime_serde")]
    pub reconnect_max: Duration,
    /// The most blocking reads at a time, each on a connection of its own: one per worker and tailed stream.
    pub max_readers: usize,
    /// How many replicas must confirm what is published with the durability `replicated`.
    pub replicas: u8,
    /// How long to wait for replicas or the disk to confirm what is published.
    #[serde(with = "humantime_serde")]
    pub wait_timeout: Duration,
    /// Work with a server whose eviction policy lets it drop streams at its memory limit, instead of refusing.
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

/// Why a configuration can't be used. Never holds a password.
#[derive(Debug, thiserror::Error)]
pub enum InvalidConfig {
    /// The text is no URL.
    #[error("url: not a URL: {0}")]
    Url(url::ParseError),
    /// The URL asks for what there is not.
    #[error(
        "url: the scheme is `{0}`, but those understood are redis://, redis-sentinel:// and redis-cluster://, and over \
         TLS rediss://, rediss-sentinel:// and rediss-cluster://"
    )]
    Scheme(String),
    /// The URL of sentinels does not say whom to ask for.
    #[error("url: names no service: redis-sentinel://host:port,host:port/<service>")]
    Service,
    /// A cluster has no databases.
    #[error("url: `{0}` after the hosts: a cluster has database 0 only")]
    ClusterDatabase(String),
    /// Several hosts, and no word about what they are.
    #[error("url: names several hosts: is it redis-sentinel:// or redis-cluster://?")]
    SeveralHosts,
    /// Settings behind a question mark.
    #[error("url: nothing may follow the database: other settings are keys of their own")]
    Query,
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
    #[error("{0} and {0}_file can't both be given")]
    TwoPasswords(&'static str),
    /// Sentinels have a password, but there are none.
    #[error("{0} is given, but the scheme of url is not redis-sentinel://")]
    UselessSentinel(&'static str),
    /// More time to confirm than any publisher waits.
    #[error("wait_timeout must not be more than 1m")]
    WaitTooLong,
    /// Certificates are given, but no TLS is asked for.
    #[error("ca_file is given, but the scheme of url is not rediss://")]
    UselessCa,
    /// A name for certificates is given, but no TLS is asked for.
    #[error("tls_server_name is given, but the scheme of url is not rediss://")]
    UselessServerName,
    /// No certificate can be for that.
    #[error("tls_server_name: `{0}` is neither the name of a host nor an address")]
    ServerName(String),
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
    /// There are no certificates to trust.
    #[error("ca_file: {0}")]
    Trust(tls::NoTrust),
}

/// Everything that opening a connection needs, checked.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) topology: Topology,
    /// For the servers; which one is to be filled in.
    pub(super) config: FredConfig,
    /// For the sentinels; likewise.
    pub(super) sentinel: FredConfig,
    pub(super) performance: PerformanceConfig,
    pub(super) connection: ConnectionConfig,
    /// Whom certificates must be for, if not for the host connected to.
    pub(super) tls_server_name: Option<String>,
    pub(super) command_timeout: Duration,
    pub(super) reconnect_max: Duration,
    pub(super) max_readers: usize,
    pub(super) replicas: u8,
    pub(super) wait_timeout: Duration,
    pub(super) allow_eviction: bool,
}

/// Without the credentials.
impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("topology", &self.topology).finish_non_exhaustive()
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

    pub(super) fn settings(&self) -> Result<Settings, InvalidConfig> {
        let zeros = [
            ("command_timeout", self.command_timeout.is_zero()),
            ("reconnect_max", self.reconnect_max.is_zero()),
            ("wait_timeout", self.wait_timeout.as_millis() == 0),
            ("max_readers", self.max_readers == 0),
            ("replicas", self.replicas == 0),
        ];
        if let Some((name, _)) = zeros.into_iter().find(|(_, is_zero)| *is_zero) {
            return Err(InvalidConfig::Zero(name));
        }
        if self.wait_timeout > Duration::from_mins(1) {
            return Err(InvalidConfig::WaitTooLong);
        }
        let target = Target::parse(self.url.expose_secret())?;
        if self.ca_file.is_some() && !target.with_tls {
            return Err(InvalidConfig::UselessCa);
        }
        if let Some(name) = &self.tls_server_name {
            if !target.with_tls {
                return Err(InvalidConfig::UselessServerName);
            }
            ServerName::try_from(name.as_str()).map_err(|_invalid| InvalidConfig::ServerName(name.clone()))?;
        }
        let of_sentinels = [
            ("sentinel_username", self.sentinel_username.is_some()),
            ("sentinel_password", self.sentinel_password.is_some()),
            ("sentinel_password_file", self.sentinel_password_file.is_some()),
        ];
        if let Some((name, _)) = of_sentinels.into_iter().find(|(_, is_given)| *is_given)
            && !matches!(target.topology, Topology::Sentinel { .. })
        {
            return Err(InvalidConfig::UselessSentinel(name));
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
            // One lost reply must never become two entries: what is sent again is for our callers to decide.
            max_command_attempts: 1,
            unresponsive: UnresponsiveConfig {
                max_timeout: Some(self.command_timeout + Duration::from_secs(1)),
                interval: Duration::from_secs(1),
            },
            max_command_buffer_len: 10_000,
            // What an error means for the connection is judged where its kind is known.
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

    fn tls(&self) -> Result<TlsConfig, InvalidConfig> {
        let client = tls::client_config(self.ca_file.as_deref()).map_err(InvalidConfig::Trust)?;
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

/// A password that is written down, or in a file.
fn password(
    key: &'static str,
    written: Option<&SecretString>,
    file: Option<&Path>,
) -> Result<Option<String>, InvalidConfig> {
    match (written, file) {
        (Some(_), Some(_)) => Err(InvalidConfig::TwoPasswords(key)),
        (Some(password), None) => Ok(Some(password.expose_secret().to_owned())),
        (None, Some(path)) => {
            let key = if key == "password" { "password_file" } else { "sentinel_password_file" };
            let text = std::fs::read_to_string(path).map_err(|source| InvalidConfig::File {
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

    fn settings(url: &str) -> Result<Settings, InvalidConfig> {
        Config { url: SecretString::from(url), ..Config::default() }.settings()
    }

    #[test]
    fn a_url_gives_host_port_database_and_credentials() {
        let settings = settings("redis://bob:p%40ss%2Fword@redis.example:7000/3").expect("valid");
        assert_eq!(settings.topology.to_string(), "redis.example:7000");
        assert_eq!(settings.config.database, Some(3));
        assert_eq!(settings.config.username.as_deref(), Some("bob"));
        assert_eq!(settings.config.password.as_deref(), Some("p@ss/word"));
        assert!(settings.config.tls.is_none());
    }

    #[test]
    fn defaults_are_the_port_of_redis_and_no_credentials() {
        let settings = settings("redis://[::1]").expect("valid");
        assert_eq!(settings.topology.to_string(), "[::1]:6379");
        assert_eq!((settings.config.username, settings.config.password), (None, None));
        assert_eq!(settings.connection.max_command_attempts, 1);
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_words() {
        let refused = |url: &str| settings(url).expect_err(url).to_string();
        assert!(refused("redis-ring://a:1/x").starts_with("url: the scheme is `redis-ring`, but those understood are"));
        assert_eq!(refused("redis://h/seven"), "url: `seven` is no database, which is a number from 0 to 255");
        assert_eq!(refused("redis:///0"), "url: names no host");
        assert!(refused("no url").starts_with("url: not a URL"));
        assert_eq!(refused("redis://a:%zz@h"), "url: the user or password is not percent-encoded UTF-8");
        let named = |url: &str, name: &str| {
            let config = Config { url: url.into(), tls_server_name: Some(name.to_owned()), ..Config::default() };
            config.settings().map(drop).map_err(|error| error.to_string())
        };
        let useless = "tls_server_name is given, but the scheme of url is not rediss://";
        assert_eq!(named("redis://h", "redis.soc"), Err(useless.to_owned()));
        let wrong = "tls_server_name: `a b` is neither the name of a host nor an address";
        assert_eq!(named("rediss-cluster://h", "a b"), Err(wrong.to_owned()));
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
