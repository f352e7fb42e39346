//! The TLS files: read, checked against each other, and built into a server configuration.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{InconsistentKeys, ServerConfig};
use sha2::{Digest as _, Sha256};
use x509_cert::Certificate;
use x509_cert::der::Decode as _;

use crate::http::server::tls::{ClientCertificates, ServedCertificate, TlsConfig, TlsError, TlsVersion};
use crate::tls;

/// The maximum size of a file. Chains and lists of authorities are far smaller.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The remaining time at which a certificate should be replaced; for short ones a fifth of their validity.
const EXPIRES_SOON: Duration = Duration::from_hours(14 * 24);

/// A hash of the files. Private keys should not stay in memory longer than necessary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileFingerprint([u8; 32]);

/// The content of the files.
pub(crate) struct TlsFiles {
    chain: Vec<u8>,
    key: Vec<u8>,
    authorities: Option<Vec<u8>>,
}

/// The time in which a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CertificateValidity {
    /// The start.
    pub from: SystemTime,
    /// The end.
    pub until: SystemTime,
}

impl CertificateValidity {
    /// Returns the days until the end; negative afterwards.
    pub fn days_left(&self) -> f64 {
        let seconds = match self.until.duration_since(SystemTime::now()) {
            Ok(left) => left.as_secs_f64(),
            Err(over) => -over.duration().as_secs_f64(),
        };
        seconds / 86_400.0
    }

    /// Returns a warning for operators if the certificate is invalid now or expires soon.
    pub fn warning(&self) -> Option<String> {
        self.warning_at(SystemTime::now())
    }

    fn warning_at(&self, now: SystemTime) -> Option<String> {
        let until =
            jiff::Timestamp::try_from(self.until).map_or_else(|_error| "an unknown time".to_owned(), |t| t.to_string());
        if now < self.from {
            return Some("the certificate is not valid yet".to_owned());
        }
        let lifetime = self.until.duration_since(self.from).unwrap_or_default();
        match self.until.duration_since(now) {
            Err(_over) => Some(format!("the certificate has expired, it was valid until {until}")),
            Ok(left) if left < EXPIRES_SOON.min(lifetime / 5) => {
                Some(format!("the certificate expires soon, at {until}"))
            }
            Ok(_) => None,
        }
    }

    /// Returns whether the certificate is valid now.
    pub fn is_valid_now(&self) -> bool {
        (self.from..=self.until).contains(&SystemTime::now())
    }
}

impl TlsFiles {
    pub(crate) fn read(config: &TlsConfig) -> Result<Self, TlsError> {
        Ok(Self {
            chain: read("cert_file", &config.cert_file)?,
            key: read("key_file", &config.key_file)?,
            authorities: config.client_ca_file.as_deref().map(|path| read("client_ca_file", path)).transpose()?,
        })
    }

    pub(crate) fn fingerprint(&self) -> FileFingerprint {
        let mut hash = Sha256::new();
        for part in [&self.chain, &self.key, self.authorities.as_ref().unwrap_or(&Vec::new())] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        FileFingerprint(hash.finalize().into())
    }

    /// Builds the certificate for new connections. Fails if the files do not fit each other.
    pub(crate) fn build(&self, config: &TlsConfig) -> Result<ServedCertificate, TlsError> {
        let in_chain = |error: String| ("cert_file", error);
        let chain = tls::certificates(&config.cert_file, &self.chain).map_err(|error| in_chain(error.to_string()))?;
        let leaf = chain.first().ok_or_else(|| in_chain("must contain a certificate".to_owned()))?;
        let validity = validity(leaf).ok_or_else(|| in_chain("its first certificate is not valid X.509".to_owned()))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_error| {
            let path = config.key_file.display();
            let is_encrypted = self.key.windows(9).any(|window| window == b"ENCRYPTED");
            let hint = if is_encrypted { ": it is encrypted, decrypt it first" } else { "" };
            ("key_file", format!("{path} must contain a private key in PEM{hint}"))
        })?;

        let provider = tls::provider();
        let both = [&TLS13, &TLS12];
        let versions = if config.min_version == TlsVersion::V1_3 { &both[..1] } else { &both[..] };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .expect("the provider supports these versions");
        let builder = match (&self.authorities, &config.client_ca_file) {
            (Some(text), Some(path)) => {
                let in_authorities = |error: String| ("client_ca_file", error);
                let roots = tls::roots_of(path, text).map_err(|error| in_authorities(error.to_string()))?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match config.client_certificates {
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                    ClientCertificates::Off | ClientCertificates::Required => verifier,
                };
                let verifier = verifier.build().map_err(|error| in_authorities(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut server = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                ("key_file", "is not the key of the certificate in cert_file".to_owned())
            }
            other => in_chain(format!("cannot be used with its key: {other}")),
        })?;
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        if self.authorities.is_some() {
            // Every connection must present its certificate: a resumed session would outlive it.
            server.send_tls13_tickets = 0;
        } else {
            server.send_tls13_tickets = 1;
            server.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()
                .map_err(|error| in_chain(format!("cannot create session ticket keys: {error}")))?;
        }
        Ok(ServedCertificate { config: Arc::new(server), validity, fingerprint: self.fingerprint() })
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let cannot = |error: std::io::Error| (key, format!("cannot read {}: {error}", path.display()));
    let length = std::fs::metadata(path).map_err(cannot)?.len();
    if length > MAX_FILE_BYTES {
        return Err((key, format!("{} must have at most {MAX_FILE_BYTES} bytes", path.display())));
    }
    std::fs::read(path).map_err(cannot)
}

fn validity(leaf: &[u8]) -> Option<CertificateValidity> {
    let validity = Certificate::from_der(leaf).ok()?.tbs_certificate.validity;
    Some(CertificateValidity { from: validity.not_before.to_system_time(), until: validity.not_after.to_system_time() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificate_warns_before_it_expires_by_its_lifetime() {
        let day = Duration::from_hours(24);
        let from = SystemTime::UNIX_EPOCH + 10_000 * day;
        let warning = |days: u32, age: Duration| {
            let validity = CertificateValidity { from, until: from + day * days };
            validity.warning_at(from + age).unwrap_or_default()
        };
        assert_eq!(warning(90, 75 * day), "");
        assert!(warning(90, 77 * day).contains("expires soon, at "));
        assert_eq!(warning(1, day / 2), "", "a short one does not warn for all of its lifetime");
        assert!(warning(1, day * 9 / 10).contains("expires soon"));
        assert!(warning(90, 91 * day).contains("has expired"));
        let early = CertificateValidity { from, until: from + day }.warning_at(from - day);
        assert!(early.is_some_and(|text| text.contains("not valid yet")));
    }
}
