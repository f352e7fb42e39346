//! The configuration of a `PostgreSQL` sink.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;
use url::Url;

use super::table::TableName;
use crate::secret::MASK;
use crate::tls::{self, NoTrust};
use crate::validate::{Problems, Validate};

/// The server, the table, and the size of transactions.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    /// URL: `postgres://[user[:password]@]host[:port][,…]/database[?sslmode=disable|prefer|require&…]`. With TLS the
    /// server's certificate is verified. With `prefer` (the default) the connection is plain if the server has no TLS.
    #[serde(serialize_with = "masked_url")]
    pub url: SecretString,
    /// File with the password, instead of one in the URL. Read for each connection; a line end is ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// File with trusted certificates, in PEM; by default those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Name of the table: `table` or `schema.table`.
    #[serde(default = "default::table")]
    pub table: TableName,
    /// Whether to create the table if it is missing.
    #[serde(default = "default::create_table")]
    pub create_table: bool,
    /// Maximum number of rows per transaction, 1 to 10,000.
    #[serde(default = "default::batch")]
    pub batch: usize,
    /// Maximum number of connections, 1 to 64. They are opened on demand: one for each concurrent call of a group.
    #[serde(default = "default::connections")]
    pub connections: usize,
    /// Timeout of a connection attempt, and of each transaction; 100 ms to 5 min.
    #[serde(default = "default::timeout", with = "humantime_serde")]
    pub timeout: Duration,
}

mod default {
    use std::time::Duration;

    use super::TableName;

    pub(super) fn table() -> TableName {
        "agent_results".parse().expect("a valid table name")
    }

    pub(super) const fn create_table() -> bool {
        true
    }

    pub(super) const fn batch() -> usize {
        1000
    }

    pub(super) const fn connections() -> usize {
        4
    }

    pub(super) const fn timeout() -> Duration {
        Duration::from_secs(10)
    }
}

fn masked_url<S: Serializer>(url: &SecretString, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&masked(url.expose_secret()))
}

/// Returns the URL with a masked password. Masks all of it if the password cannot be located.
fn masked(url: &str) -> String {
    let Ok(mut url) = Url::parse(url) else { return MASK.to_owned() };
    if url.password().is_some() && url.set_password(Some(MASK)).is_err() {
        return MASK.to_owned();
    }
    let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
    if pairs.iter().any(|(name, _)| name == "password") {
        let mask =
            |(name, value): (String, String)| if name == "password" { (name, MASK.to_owned()) } else { (name, value) };
        url.query_pairs_mut().clear().extend_pairs(pairs.into_iter().map(mask));
    }
    url.into()
}

/// A configuration error. Never contains a password.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidPostgresConfig {
    #[error("url: {0}")]
    Url(String),
    #[error("password_file: cannot read {path}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("ca_file: {0}")]
    Trust(NoTrust),
}

/// The checked settings of connections.
#[derive(Clone)]
pub(super) struct PostgresSettings {
    pub(super) server: tokio_postgres::Config,
    pub(super) password_file: Option<PathBuf>,
    pub(super) tls: MakeRustlsConnect,
    pub(super) timeout: Duration,
    /// The hosts, for messages.
    pub(super) address: String,
}

/// Omits the credentials.
impl std::fmt::Debug for PostgresSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresSettings").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Validate for PostgresConfig {
    fn validate(&self, problems: &mut Problems) {
        if let Err(message) = self.server() {
            problems.add("url", message);
        }
        let is_valid = (1..=10_000).contains(&self.batch);
        problems.require(is_valid, "batch", format_args!("must be from 1 to 10000, not {}", self.batch));
        let is_valid = (1..=64).contains(&self.connections);
        problems.require(is_valid, "connections", format_args!("must be from 1 to 64, not {}", self.connections));
        let is_valid = (Duration::from_millis(100)..=Duration::from_mins(5)).contains(&self.timeout);
        let timeout = humantime_serde::re::humantime::format_duration(self.timeout);
        problems.require(is_valid, "timeout", format_args!("must be from 100ms to 5min, not {timeout}"));
    }
}

impl PostgresConfig {
    pub(super) fn settings(&self) -> Result<PostgresSettings, InvalidPostgresConfig> {
        let mut server = self.server().map_err(InvalidPostgresConfig::Url)?;
        if let Some(path) = &self.password_file {
            std::fs::metadata(path).map_err(|source| InvalidPostgresConfig::File { path: path.clone(), source })?;
        }
        if server.get_application_name().is_none() {
            server.application_name("aurora-bus");
        }
        // A host that drops packets must leave time for the others.
        let hosts = u32::try_from(server.get_hosts().len().max(server.get_hostaddrs().len()).max(1)).unwrap_or(1);
        if server.get_connect_timeout().is_none() {
            server.connect_timeout(self.timeout / hosts);
        }
        if server.get_tcp_user_timeout().is_none() {
            server.tcp_user_timeout(self.timeout);
        }
        server
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3);
        let address = address(&server);
        let tls = match server.get_ssl_mode() {
            SslMode::Disable => tls::trusting_none(),
            // Without a certificate to trust, a server that offers TLS is refused at the handshake.
            SslMode::Prefer if self.ca_file.is_none() => {
                tls::client_config(None).unwrap_or_else(|_| tls::trusting_none())
            }
            _ => tls::client_config(self.ca_file.as_deref()).map_err(InvalidPostgresConfig::Trust)?,
        };
        let tls = MakeRustlsConnect::new(tls);
        Ok(PostgresSettings { server, password_file: self.password_file.clone(), tls, timeout: self.timeout, address })
    }

    /// Returns the server of the URL.
    fn server(&self) -> Result<tokio_postgres::Config, String> {
        let url = self.url.expose_secret();
        if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err("must begin with postgres:// or postgresql://".to_owned());
        }
        // The library has fewer modes. Certificates are always verified here.
        let url = url.replace("sslmode=verify-full", "sslmode=require").replace("sslmode=verify-ca", "sslmode=require");
        let server: tokio_postgres::Config = url.parse().map_err(|error: tokio_postgres::Error| {
            let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            format!("{error}{cause}")
        })?;
        if server.get_hosts().is_empty() && server.get_hostaddrs().is_empty() {
            return Err("names no host".to_owned());
        }
        if server.get_ssl_mode() == SslMode::Disable && self.ca_file.is_some() {
            return Err("must not have sslmode=disable together with ca_file".to_owned());
        }
        if server.get_password().is_some() && self.password_file.is_some() {
            return Err("must not have a password together with password_file".to_owned());
        }
        Ok(server)
    }
}

fn address(server: &tokio_postgres::Config) -> String {
    let name = |host: &Host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    };
    let mut names: Vec<String> = server.get_hosts().iter().map(name).collect();
    if names.is_empty() {
        names = server.get_hostaddrs().iter().map(ToString::to_string).collect();
    }
    let ports = server.get_ports();
    let with_port = |(n, name): (usize, &String)| match ports.get(n).or(ports.first()) {
        Some(port) => format!("{name}:{port}"),
        None => name.clone(),
    };
    names.iter().enumerate().map(with_port).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> PostgresConfig {
        toml::from_str(text).expect("every key is known")
    }

    #[test]
    fn url_is_the_only_required_key() {
        let config = config("url = 'postgres://aurora@localhost/aurora'");
        assert_eq!(config.problems(), []);
        assert_eq!((config.table.to_string().as_str(), config.create_table), ("agent_results", true));
        assert!(toml::from_str::<PostgresConfig>("table = 'x'").is_err());
    }

    #[test]
    fn invalid_values_are_reported_with_their_keys() {
        let config = config("url = 'mysql://x'\nbatch = 0\nconnections = 65\ntimeout = '1h'");
        let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.path).collect();
        assert_eq!(keys, ["url", "batch", "connections", "timeout"]);
    }

    #[test]
    fn contradictory_urls_are_refused() {
        let message_of = |text: &str| config(text).problems().pop().map(|problem| problem.message).unwrap_or_default();
        assert!(message_of("url = 'postgres://localhost/x?sslmode=maybe'").contains("sslmode"));
        assert!(message_of("url = 'postgres://a:b@localhost/x'\npassword_file = 'p'").contains("password_file"));
        assert!(message_of("url = 'postgres://localhost/x?sslmode=disable'\nca_file = 'p'").contains("ca_file"));
        assert!(message_of("url = 'postgres:///x'").contains("host"));
        assert_eq!(message_of("url = 'postgresql://h1:1,h2:2/x?sslmode=verify-full'"), "");
    }

    #[test]
    fn password_is_never_printed() {
        let urls = [
            "postgres://aurora:hunter2@localhost/aurora",
            "postgres://aurora@localhost/aurora?password=hunter2&sslmode=disable",
            "postgres://aurora:hunter2@h1,h2/aurora",
            "postgres://aurora:hunter2@%2Frun%2Fpostgresql/aurora",
            "postgres://aurora:hunter2@h:x/aurora",
        ];
        for url in urls {
            let config = config(&format!("url = '{url}'"));
            let printed = toml::to_string(&config).expect("TOML");
            let settings = config.settings().map(|settings| format!("{settings:?}"));
            let problems = config.problems();
            let all = format!("{printed} {config:?} {settings:?} {problems:?}");
            assert!(!all.contains("hunter2"), "{all}");
        }
    }
}
