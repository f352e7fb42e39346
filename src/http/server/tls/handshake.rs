//! How a connection begins that is to speak TLS.

use std::net::IpAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::http::server::Open;
use crate::http::server::maybe_tls::Socket;
use crate::http::server::tls::Tls;
use crate::http::server::write_timeout::Timed;
use crate::metrics::Metrics;

/// What a TLS record begins with that opens a handshake.
const HANDSHAKE: u8 = 0x16;
/// How much may wait in a connection for its socket: what is taken from it shows that the peer reads.
const MAX_BUFFERED: usize = 16 * 1024;
/// How long a client may wait for its turn among those of its address.
const LONGEST_TURN: Duration = Duration::from_secs(20);
/// How long someone is listened to who was told that this is the wrong port, and how much of it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 * 1024;

/// The answer to those who speak HTTP without TLS.
const SPEAK_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\
    content-length: 52\r\n\r\nThis port speaks TLS only: use https:// or wss://.\r\n";

/// How the beginning of a connection went, as a metric's label.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    Done,
    Failed,
    Timeout,
    /// Someone spoke HTTP without TLS.
    Plain,
    /// Gone without a word, as checks of an open port do.
    Silent,
}

impl Outcome {
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
    /// The connection once TLS is spoken on it; nothing where that does not come about. The client has the configured
    /// time to begin, and again for the rest once its turn has come.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        open: Open,
        address: IpAddr,
        write_timeout: Duration,
        metrics: &Metrics,
    ) -> Option<Socket> {
        let begun = self.begin(stream, open, address, write_timeout).await;
        let outcome = begun.as_ref().err().copied().unwrap_or(Outcome::Done);
        metrics.tls_handshakes.with_label_values(&[outcome.label()]).inc();
        begun.ok()
    }

    async fn begin(
        &self,
        stream: TcpStream,
        open: Open,
        address: IpAddr,
        write_timeout: Duration,
    ) -> Result<Socket, Outcome> {
        let limit = self.inner.config.handshake_timeout;
        let late = |_| Outcome::Timeout;
        // Until a client has said something, nothing is kept for it.
        let stream = timeout(limit, greeted(stream)).await.map_err(late)??;
        // Many may come at once, after a restart: all have their turn, and none takes that of other addresses.
        let _place = timeout(LONGEST_TURN, self.inner.handshakes.acquire(address)).await.map_err(late)?;
        let acceptor = TlsAcceptor::from(self.shown().server.clone());
        let stream = Timed::new(stream, open, write_timeout);
        let accept = acceptor.accept_with(stream, |connection| connection.set_buffer_limit(Some(MAX_BUFFERED)));
        match timeout(limit, accept).await.map_err(late)? {
            Ok(stream) => Ok(Socket::Tls(Box::new(stream))),
            Err(error) => {
                tracing::debug!(error = %error, "TLS handshake failed");
                Err(Outcome::Failed)
            }
        }
    }
}

/// The connection once its client has begun with what may be a handshake.
async fn greeted(mut stream: TcpStream) -> Result<TcpStream, Outcome> {
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1..) if first == [HANDSHAKE] => Ok(stream),
        Ok(1..) if first[0].is_ascii_uppercase() => {
            // It may be gone already, which is as well.
            drop(timeout(LINGER, refuse(&mut stream)).await);
            Err(Outcome::Plain)
        }
        Ok(1..) => Err(Outcome::Failed),
        Ok(0) | Err(_) => Err(Outcome::Silent),
    }
}

/// Says what is wrong, and reads on for a moment: an answer is lost where bytes come that nobody reads.
async fn refuse(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(SPEAK_TLS).await?;
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_is_as_long_as_it_says() {
        let text = std::str::from_utf8(SPEAK_TLS).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.ends_with(&format!("content-length: {}", body.len())), "{text:?}");
    }
}
