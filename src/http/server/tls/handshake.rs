//! The TLS handshake of a connection.

use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::http::server::maybe_tls::MaybeTlsStream;
use crate::http::server::open_connection::OpenConnection;
use crate::http::server::tls::Tls;
use crate::http::server::write_timeout::WriteTimeoutStream;
use crate::metrics::Metrics;

/// The first byte of a TLS record with a handshake message.
const HANDSHAKE_RECORD: u8 = 0x16;
/// The encrypted bytes that may wait for the socket. A small limit lets the write timeout see the client read.
const MAX_BUFFERED_BYTES: usize = 16 * 1024;
/// The time for which a handshake may wait for the others of its address.
const MAX_TURN_WAIT: Duration = Duration::from_secs(20);
/// The limits for reading the rest of a plain HTTP request after its response.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 * 1024;

/// The response to HTTP without TLS.
const TLS_REQUIRED: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\
    content-length: 49\r\n\r\nThis port requires TLS: use https:// or wss://.\r\n";

/// The outcome of a handshake, as a metric label.
#[derive(Debug, Clone, Copy)]
enum HandshakeOutcome {
    Done,
    Failed,
    Timeout,
    /// The client sent HTTP without TLS.
    Plain,
    /// The client closed without sending anything, as port checks do.
    Silent,
}

impl HandshakeOutcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Done => "ok",
            Self::Failed => "failed",
            Self::Timeout => "timeout",
            Self::Plain => "plain",
            Self::Silent => "silent",
        }
    }
}

impl Tls {
    /// Performs a handshake. Returns `None` if it fails.
    ///
    /// The client has the configured time to begin, and again for the handshake itself.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        open: OpenConnection,
        address: IpAddr,
        write_timeout: Duration,
        metrics: &Metrics,
    ) -> Option<MaybeTlsStream> {
        let secured = self.handshake(stream, open, address, write_timeout).await;
        let outcome = secured.as_ref().err().copied().unwrap_or(HandshakeOutcome::Done);
        metrics.tls_handshakes.with_label_values(&[outcome.label()]).inc();
        secured.ok()
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        open: OpenConnection,
        address: IpAddr,
        write_timeout: Duration,
    ) -> Result<MaybeTlsStream, HandshakeOutcome> {
        let limit = self.inner.config.handshake_timeout;
        let late = |_| HandshakeOutcome::Timeout;
        // No TLS state is allocated before the client has sent something.
        let stream = timeout(limit, await_first_byte(stream)).await.map_err(late)??;
        // After a restart many clients come at once. Each waits, and no address blocks another.
        let _permit = timeout(MAX_TURN_WAIT, self.inner.handshakes.acquire(address)).await.map_err(late)?;
        let acceptor = TlsAcceptor::from(self.served().config.clone());
        let stream = WriteTimeoutStream::new(stream, open, write_timeout);
        let accept = acceptor.accept_with(stream, |connection| connection.set_buffer_limit(Some(MAX_BUFFERED_BYTES)));
        match timeout(limit, accept).await.map_err(late)? {
            Ok(stream) => Ok(MaybeTlsStream::Tls(Box::new(stream))),
            Err(error) => {
                tracing::debug!(error = %error, "TLS handshake failed");
                Err(HandshakeOutcome::Failed)
            }
        }
    }
}

/// Waits for the first byte of the client, and returns the stream if a handshake may follow.
async fn await_first_byte(mut stream: TcpStream) -> Result<TcpStream, HandshakeOutcome> {
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1..) if first == [HANDSHAKE_RECORD] => Ok(stream),
        Ok(1..) if first[0].is_ascii_uppercase() => {
            // The client may be gone already.
            drop(timeout(LINGER_TIME, reject_plain_http(&mut stream)).await);
            Err(HandshakeOutcome::Plain)
        }
        Ok(1..) => Err(HandshakeOutcome::Failed),
        Ok(0) | Err(_) => Err(HandshakeOutcome::Silent),
    }
}

/// Responds, and reads on for a moment: unread bytes would reset the connection and lose the response.
async fn reject_plain_http(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(TLS_REQUIRED).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tls_required_response_has_its_declared_length() {
        let text = std::str::from_utf8(TLS_REQUIRED).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.ends_with(&format!("content-length: {}", body.len())), "{text:?}");
    }
}
