//! Trusted certificates and client certificates of the subcommands.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::tls;

/// The servers to trust.
#[derive(Debug, Clone, Copy)]
pub(super) enum Trust<'a> {
    /// Servers with a certificate of an authority, in this file or in the system.
    Authorities(Option<&'a Path>),
    /// A daemon on this machine with the certificate in this file, for any host name.
    Own(&'a Path),
    /// Any server on this machine, for requests without secrets.
    Anyone,
}

/// Creates a TLS configuration, with a client certificate and key if these are given.
pub(super) fn config(trust: Trust<'_>, identity: Option<(&Path, &Path)>) -> anyhow::Result<ClientConfig> {
    let provider = tls::provider();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("the cryptography supports no version of TLS")?;
    let own = |only| Arc::new(PinnedCertificate { only, provider });
    let builder = match trust {
        Trust::Authorities(file) => {
            let roots = tls::trusted(file).map_err(|error| anyhow!("--ca-file: {error}"))?;
            builder.with_root_certificates(roots)
        }
        Trust::Own(file) => {
            let chain = certificates(file).context("http.tls.cert_file")?;
            builder.dangerous().with_custom_certificate_verifier(own(chain.into_iter().next()))
        }
        Trust::Anyone => builder.dangerous().with_custom_certificate_verifier(own(None)),
    };
    let Some((certificate, key)) = identity else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(certificate).context("--client-cert-file")?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| anyhow!("--client-key-file: {} has no private key in PEM: {error}", key.display()))?;
    builder.with_client_auth_cert(chain, key).map_err(|error| match error {
        Error::InvalidCertificate(error) => {
            anyhow!(
                "--client-cert-file: {} holds no usable X.509 version 3 certificate: {error}",
                certificate.display()
            )
        }
        error => anyhow!("--client-key-file is not the key of --client-cert-file: {error}"),
    })
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(tls::certificates(path, &text)?)
}

/// Accepts one certificate, or any. The server must have its private key.
#[derive(Debug)]
struct PinnedCertificate {
    only: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCertificate {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.only.as_ref().is_none_or(|only| only == certificate) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
