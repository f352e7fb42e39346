//! TLS for those who connect: the certificates that are shown, and how they are changed while the daemon runs.
//!
//! Promises that a certificate that can't be used never replaces one that can, that connections keep the one they
//! began with, and that a handshake holds up nobody but its own connection.

mod files;
mod handshake;
mod watch;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use crate::http::server::tls::files::Validity;

use crate::http::server::tls::files::{Files, Read};
use crate::limiter::KeyedLimiter;
use crate::validate::{Problems, Validate};

/// What is shown to those who connect, and asked of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The daemon's certificate in PEM, followed by those between it and its authority.
    pub cert_file: PathBuf,
    /// The key of that certificate, in PEM and not encrypted.
    pub key_file: PathBuf,
    /// The authorities of clients' certificates, in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients must show a certificate. It lets nobody do anything: credentials are asked for besides.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    /// The oldest version of TLS that is spoken: `1.2` or `1.3`.
    #[serde(default)]
    pub min_version: TlsVersion,
    /// How long a client may take to begin the handshake, and again to end it.
    #[serde(default = "default_handshake_timeout", with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// The most handshakes at a time with one address. More wait for their turn, up to 20 s.
    #[serde(default = "default_handshakes")]
    pub max_handshakes_per_address: usize,
}

const fn default_handshake_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn default_handshakes() -> usize {
    64
}

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// None is asked for.
    #[default]
    Off,
    /// Whoever shows none is let in; whoever shows a bad one is not.
    Optional,
    /// Whoever shows none of a known authority is not let in, on any path.
    Required,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[default]
    #[serde(rename = "1.2")]
    V1_2,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    V1_3,
}

/// What is wrong with a key of the configuration, below `http.tls`.
pub type Unusable = (&'static str, String);

impl Validate for TlsConfig {
    /// Checks the keys. The named files are not read.
    fn validate(&self, problems: &mut Problems) {
        match (self.client_certificates, &self.client_ca_file) {
            (ClientCertificates::Off, Some(_)) => {
                let message = "has no effect: client_certificates is neither \"optional\" nor \"required\"";
                problems.add("client_ca_file", message);
            }
            (ClientCertificates::Optional | ClientCertificates::Required, None) => {
                problems.add("client_ca_file", "is missing: client_certificates needs a certificate authority");
            }
            _ => {}
        }
        let handshake_times = Duration::from_millis(100)..=Duration::from_mins(1);
        problems.require(
            handshake_times.contains(&self.handshake_timeout),
            "handshake_timeout",
            "must be from 100ms to 1m",
        );
        problems.require(
            (1..=crate::http::MAX_COUNT).contains(&self.max_handshakes_per_address),
            "max_handshakes_per_address",
            format_args!("must be from 1 to {}", crate::http::MAX_COUNT),
        );
    }
}

impl TlsConfig {
    /// Reads the files and checks that they fit each other. Fails with the key to blame. A certificate that has
    /// expired, or is not valid yet, is told by its validity alone.
    pub fn check(&self) -> Result<Validity, Unusable> {
        Files::read(self).and_then(|read| read.build(self)).map(|shown| shown.validity)
    }
}

/// The certificates that are shown now. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tls {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: TlsConfig,
    shown: RwLock<Arc<Shown>>,
    handshakes: Arc<KeyedLimiter>,
    look_now: Notify,
}

/// What is shown, and where it was read.
#[derive(Debug)]
struct Shown {
    server: Arc<ServerConfig>,
    validity: Validity,
    files: Read,
}

impl Tls {
    /// Reads the files. Fails with the key to blame below `http.tls`.
    pub fn open(config: &TlsConfig) -> Result<Self, Unusable> {
        let shown = Files::read(config)?.build(config)?;
        let inner = Inner {
            shown: RwLock::new(Arc::new(shown)),
            handshakes: KeyedLimiter::new(config.max_handshakes_per_address),
            look_now: Notify::new(),
            config: config.clone(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Has the files read again at once.
    pub fn look_now(&self) {
        self.inner.look_now.notify_one();
    }

    fn shown(&self) -> Arc<Shown> {
        self.inner.shown.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
