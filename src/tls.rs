//! TLS as a client speaks it: whom it trusts, and by which cryptography.
//!
//! The one place for certificates to trust, whoever connects: stores, sinks, readers of key sets, the command line.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

/// Trusts the certificates in that file, or those of the system where there is none.
pub(crate) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, NoTrust> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca_file {
        add_file(path, &mut roots)?;
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(NoTrust::NoneInSystem);
        }
    }
    Ok(trusting(roots))
}

/// Trusts no one, for clients that must be given something though they speak no TLS.
pub(crate) fn trusting_none() -> ClientConfig {
    trusting(RootCertStore::empty())
}

fn trusting(roots: RootCertStore) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider supports the default versions")
        .with_root_certificates(roots)
        .with_no_client_auth()
}

fn add_file(path: &Path, roots: &mut RootCertStore) -> Result<(), NoTrust> {
    let unusable = |error: String| NoTrust::Certificates { path: path.to_owned(), error };
    let text = std::fs::read(path).map_err(|error| NoTrust::File { path: path.to_owned(), error })?;
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, pem::Error>>()
        .map_err(|e| unusable(e.to_string()))?;
    if certificates.is_empty() {
        return Err(unusable("there is none in it".to_owned()));
    }
    for certificate in certificates {
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    Ok(())
}
