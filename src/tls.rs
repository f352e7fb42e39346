//! TLS for all connections: trusted certificates and cryptography.
//!
//! Owns the rules of trust for every client: stores, sinks, readers of key sets, the command line. Also reads the
//! certificates of the listener.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::{ClientConfig, RootCertStore};

/// A failure to load trusted certificates.
#[derive(Debug, thiserror::Error)]
pub enum NoTrust {
    /// The file is not readable.
    #[error("cannot read {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// The file has no usable certificate.
    #[error("{} holds no usable certificate: {error}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// The cause.
        error: String,
    },
    /// No file is configured, and the system trusts no certificate.
    #[error("is not set, and the system has no trusted certificates")]
    NoneInSystem,
}

/// Returns the cryptography of every connection.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Creates a client that trusts the certificates in a file, or those of the system if there is no file.
pub(crate) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, NoTrust> {
    Ok(trusting(trusted(ca_file)?))
}

/// Reads the certificates in a file, or those of the system if there is no file.
pub(crate) fn trusted(ca_file: Option<&Path>) -> Result<RootCertStore, NoTrust> {
    let Some(path) = ca_file else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return if roots.is_empty() { Err(NoTrust::NoneInSystem) } else { Ok(roots) };
    };
    let text = std::fs::read(path).map_err(|error| NoTrust::File { path: path.to_owned(), error })?;
    roots_of(path, &text)
}

/// Creates a client that trusts no certificate, for libraries that require one although TLS is off.
pub(crate) fn trusting_none() -> ClientConfig {
    trusting(RootCertStore::empty())
}

fn trusting(roots: RootCertStore) -> ClientConfig {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

/// Parses the certificates of a file into a set of trusted roots.
pub(crate) fn roots_of(path: &Path, text: &[u8]) -> Result<RootCertStore, NoTrust> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, text)? {
        roots
            .add(certificate)
            .map_err(|error| NoTrust::Certificates { path: path.to_owned(), error: error.to_string() })?;
    }
    Ok(roots)
}

/// Parses the certificates of a PEM file, at least one.
pub(crate) fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, NoTrust> {
    let unusable = |error: String| NoTrust::Certificates { path: path.to_owned(), error };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, pem::Error>>()
        .map_err(|error| unusable(error.to_string()))?;
    if certificates.is_empty() { Err(unusable("the file contains none".to_owned())) } else { Ok(certificates) }
}
