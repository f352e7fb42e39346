//! The files of the listener's TLS: read, checked against each other, made ready to be shown.

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

use crate::http::server::tls::{ClientCertificates, Shown, TlsConfig, TlsVersion, Unusable};
use crate::tls;

/// The most bytes of a file that are read: chains and lists of authorities are far smaller.
const MAX_BYTES: u64 = 1 << 20;
/// A certificate is to be replaced when less than this is left of it, or less than a fifth of its life.
const SOON: Duration = Duration::from_hours(14 * 24);

/// What the files were found to hold: a hash, since keys should not be kept longer than they are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read([u8; 32]);

/// What the files hold.
pub(crate) struct Files {
    chain: Vec<u8>,
    key: Vec<u8>,
    authorities: Option<Vec<u8>>,
}

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: SystemTime,
    /// The last.
    pub until: SystemTime,
}

impl Validity {
    /// Days until it ends; negative afterwards.
    pub fn days_left(&self) -> f64 {
        let seconds = match self.until.duration_since(SystemTime::now()) {
            Ok(left) => left.as_secs_f64(),
            Err(over) => -over.duration().as_secs_f64(),
        };
        seconds / 86_400.0
    }

    /// What an operator should know of it now.
    pub fn concern(&self) -> Option<String> {
        self.concern_at(SystemTime::now())
    }

    fn concern_at(&self, now: SystemTime) -> Option<String> {
        let until = jiff::Timestamp::try_from(self.until).map_or_else(|_error| "long".to_owned(), |t| t.to_string());
        if now < self.from {
            return Some("the certificate is not valid yet".to_owned());
        }
        let life = self.until.duration_since(self.from).unwrap_or_default();
        match self.until.duration_since(now) {
            Err(_over) => Some(format!("the certificate has expired, it was valid until {until}")),
            Ok(left) if left < SOON.min(life / 5) => Some(format!("the certificate expires soon, at {until}")),
            Ok(_) => None,
        }
    }

    /// Whether it is valid now.
    pub fn is_now(&self) -> bool {
        (self.from..=self.until).contains(&SystemTime::now())
    }
}

impl Files {
    pub(crate) fn read(config: &TlsConfig) -> Result<Self, Unusable> {
        Ok(Self {
            chain: read("cert_file", &config.cert_file)?,
            key: read("key_file", &config.key_file)?,
            authorities: config.client_ca_file.as_deref().map(|path| read("client_ca_file", path)).transpose()?,
        })
    }

    pub(crate) fn fingerprint(&self) -> Read {
        let mut hash = Sha256::new();
        for part in [&self.chain, &self.key, self.authorities.as_ref().unwrap_or(&Vec::new())] {
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        Read(hash.finalize().into())
    }

    /// Puts together what is shown to clients, if the files fit each other.
    pub(crate) fn build(&self, config: &TlsConfig) -> Result<Shown, Unusable> {
        let of_chain = |error: String| ("cert_file", error);
        let chain = tls::certificates(&config.cert_file, &self.chain).map_err(|error| of_chain(error.to_string()))?;
        let leaf = chain.first().ok_or_else(|| of_chain("holds no certificate".to_owned()))?;
        let validity = validity(leaf).ok_or_else(|| of_chain("its first certificate makes no sense".to_owned()))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_error| {
            let path = config.key_file.display();
            let is_encrypted = self.key.windows(9).any(|window| window == b"ENCRYPTED");
            let hint = if is_encrypted { ": it is encrypted, decrypt it first" } else { "" };
            ("key_file", format!("{path} holds no private key in PEM{hint}"))
        })?;

        let provider = tls::provider();
        let both = [&TLS13, &TLS12];
        let versions = if config.min_version == TlsVersion::V1_3 { &both[..1] } else { &both[..] };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .expect("the provider supports these versions");
        let builder = match (&self.authorities, &config.client_ca_file) {
            (Some(text), Some(path)) => {
                let of_authorities = |error: String| ("client_ca_file", error);
                let roots = tls::roots_of(path, text).map_err(|error| of_authorities(error.to_string()))?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                let verifier = match config.client_certificates {
                    ClientCertificates::Optional => verifier.allow_unauthenticated(),
                    ClientCertificates::Off | ClientCertificates::Required => verifier,
                };
                let verifier = verifier.build().map_err(|error| of_authorities(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut server = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                ("key_file", "is not the key of the certificate in cert_file".to_owned())
            }
            other => of_chain(format!("can't be used with its key: {other}")),
        })?;
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        if self.authorities.is_some() {
            // Every connection shows its certificate anew: a session that is resumed would outlive it.
            server.send_tls13_tickets = 0;
        } else {
            server.send_tls13_tickets = 1;
            server.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()
                .map_err(|error| of_chain(format!("no keys for session tickets: {error}")))?;
        }
        Ok(Shown { server: Arc::new(server), validity, files: self.fingerprint() })
    }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, Unusable> {
    let cannot = |error: std::io::Error| (key, format!("cannot read {}: {error}", path.display()));
    let length = std::fs::metadata(path).map_err(cannot)?.len();
    if length > MAX_BYTES {
        return Err((key, format!("{} has more than {MAX_BYTES} bytes", path.display())));
    }
    std::fs::read(path).map_err(cannot)
}

fn validity(leaf: &[u8]) -> Option<Validity> {
    let validity = Certificate::from_der(leaf).ok()?.tbs_certificate.validity;
    Some(Validity { from: validity.not_before.to_system_time(), until: validity.not_after.to_system_time() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_told_of_before_it_ends_by_its_own_life() {
        let day = Duration::from_hours(24);
        let from = SystemTime::UNIX_EPOCH + 10_000 * day;
        let concern = |life: u32, age: Duration| {
            let validity = Validity { from, until: from + day * life };
            validity.concern_at(from + age).unwrap_or_default()
        };
        assert_eq!(concern(90, 75 * day), "");
        assert!(concern(90, 77 * day).contains("expires soon, at "));
        assert_eq!(concern(1, day / 2), "", "a short one is no concern for all of its life");
        assert!(concern(1, day * 9 / 10).contains("expires soon"));
        assert!(concern(90, 91 * day).contains("has expired"));
        let early = Validity { from, until: from + day }.concern_at(from - day);
        assert!(early.is_some_and(|text| text.contains("not valid yet")));
    }
}
