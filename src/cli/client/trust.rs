//! Whom the sub-commands trust when they speak TLS, and what they show.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use crate::tls;

/// Who may answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Trust<'a> {
    /// Whoever an authority vouches for: one in this file, or one of the system.
    Authorities(Option<&'a Path>),
    /// A daemon on this machine that shows the certificate in this file, whatever name that is for.
    Own(&'a Path),
    /// Anyone on this machine: for questions that hold no secret.
    Anyone,
}

/// A configuration for that, showing the certificate and key in these files where they are given.
pub(super) fn config(trust: Trust<'_>, identity: Option<(&Path, &Path)>) -> anyhow::Result<ClientConfig> {
    let provider = tls::provider();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .context("the cryptography knows no version of TLS")?;
    let own = |only| Arc::new(Own { only, provider });
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
        .map_err(|error| anyhow!("--client-key-file: no private key in PEM in {}: {error}", key.display()))?;
    builder.with_client_auth_cert(chain, key).map_err(|error| match error {
        Error::InvalidCertificate(error) => {
            anyhow!(
                "--client-cert-file: {} holds no certificate of version 3 that can be used: {error}",
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

/// Takes the one certificate, or any. Whoever shows it must have its key.
#[derive(Debug)]
struct Own {
    only: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Own {
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
