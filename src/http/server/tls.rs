//! TLS of the listener: its certificates, and their replacement at run time.
//!
//! Promises that an invalid certificate never replaces a valid one, that connections keep the certificate they began
//! with, and that a slow handshake delays no other connection.

mod files;
mod handshake;
mod watch;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use crate::http::server::tls::files::CertificateValidity;

use crate::http::server::tls::files::{FileFingerprint, TlsFiles};
use crate::limiter::KeyedLimiter;
use crate::validate::{Problems, Validate};

/// The certificates of the daemon, and the checks of clients.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate of the daemon in PEM, followed by the intermediate ones.
    pub cert_file: PathBuf,
    /// The private key of that certificate in PEM, not encrypted.
    pub key_file: PathBuf,
    /// The authorities of client certificates in PEM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca_file: Option<PathBuf>,
    /// Whether clients need a certificate. It grants no access: requests need credentials too.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    /// The minimum TLS version: `1.2` or `1.3`.
    #[serde(default)]
    pub min_version: TlsVersion,
    /// The time limit to begin a handshake, and again to complete it.
    #[serde(default = "default_handshake_timeout", with = "humantime_serde")]
    pub handshake_timeout: Duration,
    /// The maximum number of concurrent handshakes per address. More wait, up to 20 s.
    #[serde(default = "default_handshakes")]
    pub max_handshakes_per_address: usize,
}

const fn default_handshake_timeout() -> Duration {
    Duration::from_secs(10)
}

const fn default_handshakes() -> usize {
    64
}

/// Whether clients need a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// No certificate is requested.
    #[default]
    Off,
    /// A certificate is requested. Clients without one are accepted, clients with an invalid one are not.
    Optional,
    /// Only clients with a certificate of a known authority are accepted, on every path.
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

/// A config key below `http.tls`, and the problem with it.
pub type TlsError = (&'static str, String);

/// The maximum of `max_handshakes_per_address`.
const MAX_HANDSHAKES: usize = 1_000_000;

impl Validate for TlsConfig {
    /// Checks the keys. Does not read the named files.
    fn validate(&self, problems: &mut Problems) {
        match (self.client_certificates, &self.client_ca_file) {
            (ClientCertificates::Off, Some(_)) => {
                problems.add("client_ca_file", "requires client_certificates = \"optional\" or \"required\"");
            }
            (ClientCertificates::Optional | ClientCertificates::Required, None) => {
                problems.add("client_ca_file", "is required for client_certificates");
            }
            _ => {}
        }
        let timeouts = Duration::from_millis(100)..=Duration::from_mins(1);
        let is_timeout = timeouts.contains(&self.handshake_timeout);
        problems.require(is_timeout, "handshake_timeout", "must be from 100ms to 1m");
        let is_count = (1..=MAX_HANDSHAKES).contains(&self.max_handshakes_per_address);
        let message = format_args!("must be from 1 to {MAX_HANDSHAKES}");
        problems.require(is_count, "max_handshakes_per_address", message);
    }
}

impl TlsConfig {
    /// Reads the files and checks that they fit each other. Fails with the key at fault.
    ///
    /// Accepts a certificate that has expired or is not valid yet: the returned validity shows this.
    pub fn check(&self) -> Result<CertificateValidity, TlsError> {
        TlsFiles::read(self).and_then(|files| files.build(self)).map(|served| served.validity)
    }
}

/// The TLS state of the listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tls {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: TlsConfig,
    served: RwLock<Arc<ServedCertificate>>,
    handshakes: Arc<KeyedLimiter>,
    reload: Notify,
}

/// The certificate of new connections.
#[derive(Debug)]
struct ServedCertificate {
    config: Arc<ServerConfig>,
    validity: CertificateValidity,
    fingerprint: FileFingerprint,
}

impl Tls {
    /// Reads the files. Fails with the key at fault below `http.tls`.
    pub fn open(config: &TlsConfig) -> Result<Self, TlsError> {
        let served = TlsFiles::read(config)?.build(config)?;
        let inner = Inner {
            served: RwLock::new(Arc::new(served)),
            handshakes: KeyedLimiter::new(config.max_handshakes_per_address),
            reload: Notify::new(),
            config: config.clone(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Requests that the files are read again at once.
    pub fn reload(&self) {
        self.inner.reload.notify_one();
    }

    fn served(&self) -> Arc<ServedCertificate> {
        self.inner.served.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
