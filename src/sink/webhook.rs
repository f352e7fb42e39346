//! The webhook sink: posts entries to an HTTP receiver.
//!
//! Owns the format of requests, their signatures, the allowed addresses, and the meaning of responses. An entry is
//! delivered when the receiver responds with 2xx. Deliveries repeat, and `webhook-id` identifies the content of a
//! request. A receiver that skips known ids handles every entry once.
//!
//! Redirects are never followed, and proxies of the environment are never used. Addresses are checked after their
//! resolution. So only the configuration decides where alerts go.

mod config;
mod guard;
mod request;
mod response;
mod sign;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use reqwest::header::{HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, Url};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

pub use config::WebhookConfig;

use self::config::WebhookSettings;
use self::guard::AddressGuard;
use self::request::WebhookRequest;
use self::response::SecretMask;
use self::sign::Signer;
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::Delivery;
use crate::telemetry::innermost;

/// Maximum number of bytes read from a response body. After a fully read body the connection can be reused.
const MAX_BODY_BYTES: usize = 16 * 1024;
/// Time limit for reading the body. The status is known by then.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which an idle connection is closed, before most receivers close theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Posts entries.
pub struct WebhookSink {
    client: Client,
    url: Url,
    /// Scheme, host and port: the part of the URL that is safe to log.
    receiver: String,
    guard: AddressGuard,
    tls: Option<Arc<ClientConfig>>,
    signer: Signer,
    mask: SecretMask,
    batch: usize,
    timeout: Duration,
    connect_timeout: Duration,
}

/// Omits everything that may be a secret.
impl fmt::Debug for WebhookSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookSink").field("receiver", &self.receiver).finish_non_exhaustive()
    }
}

impl WebhookSink {
    /// Creates a sink with this name. Reads the files that its configuration names, and connects to nothing.
    pub fn open(name: &str, config: &WebhookConfig) -> Result<Self, SinkError> {
        let unusable = || SinkError::new(SinkErrorClass::Permanent, format!("the webhook sink `{name}` is not usable"));
        let settings = config.settings().map_err(|problem| unusable().with_source(problem))?;
        let WebhookSettings { url, guard, tls, signer, headers, mask } = settings;
        let client_tls = tls.as_deref().cloned().unwrap_or_else(crate::tls::trusting_none);
        let client = Client::builder()
            .default_headers(headers)
            .dns_resolver(guard)
            .redirect(Policy::none())
            .no_proxy()
            .referer(false)
            .timeout(config.timeout)
            .connect_timeout(config.connect_timeout)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .tls_backend_preconfigured(client_tls)
            .build()
            .map_err(|error| unusable().with_source(innermost(&error)))?;
        Ok(Self {
            client,
            receiver: url.origin().ascii_serialization(),
            url,
            guard,
            tls,
            signer,
            mask,
            batch: config.batch,
            timeout: config.timeout,
            connect_timeout: config.connect_timeout,
        })
    }

    async fn send(&self, request: WebhookRequest) -> Result<(), SinkError> {
        let WebhookRequest { id, mut headers, body } = request;
        let now = SystemTime::now();
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        headers.insert(request::TIMESTAMP, HeaderValue::from(seconds));
        if let Some(signature) = self.signer.sign(&id, seconds, &body) {
            headers.insert(request::SIGNATURE, signature);
        }
        let request = self.client.post(self.url.clone()).headers(headers).body(body);
        let response = request.send().await.map_err(|error| self.request_failed(&error))?;
        let status = response.status();
        let header = |name| response.headers().get(name).cloned();
        let (retry_after, location) = (header(RETRY_AFTER), header(LOCATION));
        let mut body = read_beginning(response).await;
        if let Some(location) = location.filter(|_| status.is_redirection()) {
            body = location.as_bytes().to_vec();
        }
        response::result_of(status, retry_after.as_ref(), now, || self.mask.excerpt(&body))
    }

    /// Converts a failed request to an error that does not have the URL.
    fn request_failed(&self, error: &reqwest::Error) -> SinkError {
        let receiver = &self.receiver;
        let message = match (error.is_connect(), error.is_timeout()) {
            (true, true) => format!("cannot connect to {receiver} within {:?}", self.connect_timeout),
            (true, false) => format!("cannot connect to {receiver}"),
            (false, true) => format!("{receiver} did not respond within {:?}", self.timeout),
            (false, false) => format!("{receiver} did not respond"),
        };
        SinkError::new(SinkErrorClass::Transient, message).with_source(innermost(error))
    }

    /// Connects like a delivery, with a TLS handshake for `https`, and closes the connection.
    async fn connect(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let addresses = self.guard.addresses(&self.url).await?;
        // An address that does not respond must leave time for the others.
        let share = self.connect_timeout / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let mut failure: Box<dyn Error + Send + Sync> = "the host has no address".into();
        for address in addresses {
            match timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return self.tls_handshake(stream).await,
                Ok(Err(error)) => failure = error.into(),
                Err(elapsed) => failure = elapsed.into(),
            }
        }
        Err(failure)
    }

    async fn tls_handshake(&self, stream: TcpStream) -> Result<(), Box<dyn Error + Send + Sync>> {
        if let Some(tls) = &self.tls {
            let host = self.url.host_str().unwrap_or_default().trim_matches(['[', ']']);
            let name = ServerName::try_from(host.to_owned())?;
            TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?;
        }
        Ok(())
    }
}

/// Returns the beginning of a response body, up to its limit or until the connection is lost.
async fn read_beginning(mut response: Response) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            bytes.extend_from_slice(&chunk);
            if bytes.len() >= MAX_BODY_BYTES {
                break;
            }
        }
    };
    // A response counts even if its body is slow.
    drop(timeout(BODY_TIMEOUT, reading).await);
    bytes
}

#[async_trait]
impl Sink for WebhookSink {
    fn max_batch(&self) -> usize {
        self.batch
    }

    /// Connects to the receiver, with a TLS handshake for `https`. Sends no request, so that the receiver sees no
    /// artificial event. The response to a real event remains unknown.
    async fn check(&self) -> Result<(), SinkError> {
        let failed = |text: String| SinkError::new(SinkErrorClass::Transient, text);
        match timeout(self.connect_timeout, self.connect()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                Err(failed(format!("cannot connect to {}", self.receiver)).with_source(innermost(&*error)))
            }
            Err(_elapsed) => {
                Err(failed(format!("cannot connect to {} within {:?}", self.receiver, self.connect_timeout)))
            }
        }
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        for part in batch.chunks(self.batch) {
            let request = match part {
                [delivery] if self.batch == 1 => WebhookRequest::of_entry(origin, delivery)?,
                deliveries => WebhookRequest::of_batch(origin, deliveries)?,
            };
            self.send(request).await?;
        }
        Ok(())
    }
}
