//! TLS, as far as more than one part needs it: which certificates are trusted, and by which cryptography.
//!
//! The one place for that, whoever connects: stores, sinks, readers of key sets, the command line. The listener reads
//! its certificates here too.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::{ClientConfig, RootCertStore};

/// Why there is nothing to trust.
#[derive(Debug, thiserror::Error)]
pub enum NoTrust {
    /// The file can't be read.
    #[error("cannot read {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The file holds something else.
    #[error("{} holds no usable certificate: {error}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: String,
    },
    /// No file is named, and the system trusts no one.
    #[error("is not given, and the system has no certificates to trust")]
    NoneInSystem,
}

/// The cryptography of every connection.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Trusts the certificates in that file, or those of the system where there is none.
pub(crate) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, NoTrust> {
    Ok(trusting(trusted(ca_file)?))
}

/// The certificates in that file, or those of the system where there is none.
pub(crate) fn trusted(ca_file: Option<&Path>) -> Result<RootCertStore, NoTrust> {
    let Some(path) = ca_file else {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return if roots.is_empty() { Err(NoTrust::NoneInSystem) } else { Ok(roots) };
    };
    let text = std::fs::read(path).map_err(|error| NoTrust::File { path: path.to_owned(), error })?;
    roots_of(path, &text)
}

/// Trusts no one, for clients that must be given something though they speak no TLS.
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

/// The certificates that were read from that file, to trust them.
pub(crate) fn roots_of(path: &Path, text: &[u8]) -> Result<RootCertStore, NoTrust> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, text)? {
        roots
            .add(certificate)
            .map_err(|error| NoTrust::Certificates { path: path.to_owned(), error: error.to_string() })?;
    }
    Ok(roots)
}

/// The certificates that were read from that file in PEM, at least one.
pub(crate) fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, NoTrust> {
    let unusable = |error: String| NoTrust::Certificates { path: path.to_owned(), error };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, pem::Error>>()
        .map_err(|error| unusable(error.to_string()))?;
    if certificates.is_empty() { Err(unusable("there is none in it".to_owned())) } else { Ok(certificates) }
}
