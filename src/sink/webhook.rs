//! The sink that posts entries to an HTTP receiver.
//!
//! Owns what a request looks like, how it is signed, where it may go, and what each answer means. An entry has had its
//! effect when the receiver answers 2xx. Deliveries repeat, so every request says by `webhook-id` what it carries: a
//! receiver that passes over ids it knows handles every entry once.
//!
//! Redirects are never followed, proxies of the environment never used, and addresses are checked after they were
//! resolved: nothing but the configuration says where alerts go.

mod answer;
mod config;
mod guard;
mod message;
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

use self::answer::Mask;
use self::config::Settings;
use self::guard::Guard;
use self::message::Message;
use self::sign::Signer;
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::Delivery;
use crate::telemetry::innermost;

/// How much of an answer's body is read: after any usual one the connection can be used again.
const ANSWER_BYTES: usize = 16 * 1024;
/// How long that may take: the status, which is what counts, is known by then.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// How long a connection is kept that has nothing to do. Most receivers close theirs later than that.
const IDLE_TIME: Duration = Duration::from_secs(30);

/// Posts entries.
pub struct WebhookSink {
    client: Client,
    url: Url,
    /// Scheme, host and port: the part of the URL that may be told.
    receiver: String,
    guard: Guard,
    tls: Option<Arc<ClientConfig>>,
    signer: Signer,
    mask: Mask,
    batch: usize,
    timeout: Duration,
    connect_timeout: Duration,
}

/// Without anything that may be a secret.
impl fmt::Debug for WebhookSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookSink").field("receiver", &self.receiver).finish_non_exhaustive()
    }
}

impl WebhookSink {
    /// A sink of that name. Reads the files that its configuration names, and connects to nothing.
    pub fn open(name: &str, config: &WebhookConfig) -> Result<Self, SinkError> {
        let unusable = || SinkError::new(SinkErrorClass::Permanent, format!("the webhook sink `{name}` can't be used"));
        let settings = config.settings().map_err(|problem| unusable().with_source(problem))?;
        let Settings { url, guard, tls, signer, headers, mask } = settings;
        let client_tls = tls.as_deref().cloned().unwrap_or_else(crate::tls::trusting_none);
        let client = Client::builder()
            .default_headers(headers)
            .dns_resolver(guard)
            .redirect(Policy::none())
            .no_proxy()
            .referer(false)
            .timeout(config.timeout)
            .connect_timeout(config.connect_timeout)
            .pool_idle_timeout(IDLE_TIME)
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

    async fn send(&self, message: Message) -> Result<(), SinkError> {
        let Message { id, mut headers, body } = message;
        let now = SystemTime::now();
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        headers.insert(message::TIMESTAMP, HeaderValue::from(seconds));
        if let Some(signature) = self.signer.sign(&id, seconds, &body) {
            headers.insert(message::SIGNATURE, signature);
        }
        let request = self.client.post(self.url.clone()).headers(headers).body(body);
        let response = request.send().await.map_err(|error| self.no_answer(&error))?;
        let status = response.status();
        let header = |name| response.headers().get(name).cloned();
        let (retry_after, location) = (header(RETRY_AFTER), header(LOCATION));
        let mut said = beginning_of(response).await;
        if let Some(location) = location.filter(|_| status.is_redirection()) {
            said = location.as_bytes().to_vec();
        }
        answer::judge(status, retry_after.as_ref(), now, || self.mask.excerpt(&said))
    }

    /// Says why no answer came, without the URL.
    fn no_answer(&self, error: &reqwest::Error) -> SinkError {
        let receiver = &self.receiver;
        let message = match (error.is_connect(), error.is_timeout()) {
            (true, true) => format!("cannot connect to {receiver} within {:?}", self.connect_timeout),
            (true, false) => format!("cannot connect to {receiver}"),
            (false, true) => format!("{receiver} did not answer within {:?}", self.timeout),
            (false, false) => format!("{receiver} did not answer"),
        };
        SinkError::new(SinkErrorClass::Transient, message).with_source(innermost(error))
    }

    /// Connects as a delivery would, with a TLS handshake where there is one, and lets go.
    async fn connect(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let addresses = self.guard.addresses(&self.url).await?;
        // An address that does not answer leaves time for the others.
        let share = self.connect_timeout / u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let mut failure: Box<dyn Error + Send + Sync> = "it has no address".into();
        for address in addresses {
            match timeout(share, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return self.shake_hands(stream).await,
                Ok(Err(error)) => failure = error.into(),
                Err(elapsed) => failure = elapsed.into(),
            }
        }
        Err(failure)
    }

    async fn shake_hands(&self, stream: TcpStream) -> Result<(), Box<dyn Error + Send + Sync>> {
        if let Some(tls) = &self.tls {
            let host = self.url.host_str().unwrap_or_default().trim_matches(['[', ']']);
            let name = ServerName::try_from(host.to_owned())?;
            TlsConnector::from(Arc::clone(tls)).connect(name, stream).await?;
        }
        Ok(())
    }
}

/// What came first of an answer's body; as much as there is of one that breaks off.
async fn beginning_of(mut response: Response) -> Vec<u8> {
    let mut bytes = Vec::new();
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            bytes.extend_from_slice(&chunk);
            if bytes.len() >= ANSWER_BYTES {
                break;
            }
        }
    };
    // An answer that is slow to end has been given all the same.
    drop(timeout(ANSWER_TIME, reading).await);
    bytes
}

#[async_trait]
impl Sink for WebhookSink {
    fn max_batch(&self) -> usize {
        self.batch
    }

    /// Connects to the receiver, and with `https` does the TLS handshake; sends no request, so that the receiver sees
    /// no event that is none. What the receiver would answer is not known by that.
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
            let message = match part {
                [delivery] if self.batch == 1 => Message::of_entry(origin, delivery)?,
                deliveries => Message::of_batch(origin, deliveries)?,
            };
            self.send(message).await?;
        }
        Ok(())
    }
}
