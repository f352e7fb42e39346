//! TLS of the listener with real clients: handshakes, changed certificates, misbehaving clients.

mod authority;
mod clients;
mod misuse;
mod reload;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use futures_util::StreamExt as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use self::authority::Authority;
use crate::support::app::{BOUND, Daemon, Home};
use crate::support::install;

const STREAMS: &str = r#"
[relay]
drain_window = "200ms"
[[streams]]
name = "aurora:alerts"
relay = true
[[streams]]
name = "aurora:cps:alerts"
relay = true
"#;

/// Returns a home with a `server.pem` and the authority that issued it.
fn home(more: &str) -> (Home, Authority) {
    let tls = format!("[http.tls]\ncert_file = \"server.pem\"\nkey_file = \"server.key\"\n{more}");
    let mut home = Home::new(&format!("{STREAMS}\n{tls}"));
    let authority = Authority::new(&home.path("."));
    authority.issue("server", 30);
    home.trust(&authority.path("ca.pem"));
    (home, authority)
}

/// Runs curl with that authority.
fn curl(ca: &Path, arguments: &[&str]) -> Output {
    let program = install::program("curl", "curl");
    let ca = ca.to_str().expect("UTF-8");
    Command::new(program).args(["-sS", "--max-time", "20", "--cacert", ca]).args(arguments).output().expect("curl runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn address(daemon: &Daemon) -> String {
    daemon.url("").trim_start_matches("https://").to_owned()
}

/// Opens a TLS connection that trusts the authority in `ca`.
async fn secure(daemon: &Daemon, ca: &Path) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).expect("a file") {
        roots.add(certificate.expect("a certificate")).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").expect("a name");
    let stream = TcpStream::connect(address(daemon)).await?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// Returns the certificate of a new connection.
async fn served(daemon: &Daemon, ca: &Path) -> Vec<u8> {
    let stream = secure(daemon, ca).await.expect("a handshake");
    let (_, connection) = stream.get_ref();
    connection.peer_certificates().expect("a certificate")[0].to_vec()
}

/// Opens a WebSocket over TLS.
async fn watch(daemon: &Daemon, ca: &Path) -> WebSocketStream<TlsStream<TcpStream>> {
    let stream = secure(daemon, ca).await.expect("a handshake");
    let url = daemon.url("/api/v1/ws/alerts").replacen("https", "wss", 1);
    tokio_tungstenite::client_async(url, stream).await.expect("a WebSocket").0
}

async fn next_text(socket: &mut WebSocketStream<TlsStream<TcpStream>>) -> String {
    let text = async {
        loop {
            match socket.next().await.expect("an open socket").expect("an open socket") {
                Message::Text(text) => return text.to_string(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("not a text: {other:?}"),
            }
        }
    };
    tokio::time::timeout(BOUND, text).await.expect("a message in time")
}
