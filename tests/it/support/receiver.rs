//! An HTTP receiver that responds as the test decides, and records its requests.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use reqwest::header::HeaderMap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::redis::free_port;

/// Size of one piece of an endless body.
const PIECE_BYTES: usize = 64 * 1024;

/// The response to a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Responds with this status and no body.
    Status(u16),
    /// Responds with a status, a header and a body.
    With(u16, (&'static str, String), String),
    /// Responds with a status and an endless body.
    Endless(u16),
    /// Never responds.
    Silence,
    /// Responds 204 when the barrier has as many requests as it waits for.
    Meet(Arc<Barrier>),
}

/// A recorded request.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// Whether the response was 2xx.
    pub(crate) is_taken: bool,
}

impl Received {
    /// Returns the value of a header, or an empty string.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("visible ASCII"))
    }
}

type Script = dyn Fn(&Received) -> Reply + Send + Sync;

struct State {
    script: Box<Script>,
    received: Mutex<Vec<Received>>,
    connections: AtomicU64,
    endless_bytes: AtomicU64,
    tls: Option<TlsAcceptor>,
}

/// A receiver on a free port of the loopback address. It ends on drop.
pub(crate) struct Receiver {
    address: SocketAddr,
    state: Arc<State>,
    /// The accept loop, which owns its connections; `None` while the receiver is down.
    tasks: JoinSet<()>,
}

impl Receiver {
    /// Starts a receiver.
    pub(crate) async fn start(script: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        Self::listening(None, Box::new(script)).await
    }

    /// Starts a receiver with TLS, `server.pem` and `server.key` of this folder, that accepts every request.
    pub(crate) async fn with_tls(folder: &Path) -> Self {
        let certificate = CertificateDer::from_pem_file(folder.join("server.pem")).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the default versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a certificate with its key");
        Self::listening(Some(TlsAcceptor::from(Arc::new(config))), Box::new(|_| Reply::Status(204))).await
    }

    async fn listening(tls: Option<TlsAcceptor>, script: Box<Script>) -> Self {
        let state = State {
            script,
            received: Mutex::default(),
            connections: AtomicU64::new(0),
            endless_bytes: AtomicU64::new(0),
            tls,
        };
        // It listens there again later, so no other server may use the port in between.
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut receiver = Self { address, state: Arc::new(state), tasks: JoinSet::new() };
        receiver.come_up().await;
        receiver
    }

    /// Ends like a killed process: cuts all connections and refuses new ones.
    pub(crate) async fn go_down(&mut self) {
        self.tasks.shutdown().await;
    }

    /// Listens again on the same port.
    pub(crate) async fn come_up(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("a free port");
        self.tasks.spawn(accept(listener, Arc::clone(&self.state)));
    }

    /// Returns the port.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Returns the URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        let scheme = if self.state.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.address)
    }

    /// Returns all requests so far, in order of arrival.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.state.received.lock().expect("unpoisoned").clone()
    }

    /// Returns the number of connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Returns the number of bytes sent of endless bodies.
    pub(crate) fn endless_bytes(&self) -> u64 {
        self.state.endless_bytes.load(Ordering::SeqCst)
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        state.connections.fetch_add(1, Ordering::SeqCst);
        stream.set_nodelay(true).expect("a socket");
        let state = Arc::clone(&state);
        connections.spawn(async move {
            match state.tls.clone() {
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream, state).await;
                    }
                }
                None => serve(stream, state).await,
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, state: Arc<State>) {
    let service = service_fn(move |request| answer(request, Arc::clone(&state)));
    // A client may close the connection at any time.
    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

async fn answer(
    request: hyper::Request<Incoming>,
    state: Arc<State>,
) -> Result<hyper::Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let mut received = Received {
        method: head.method.to_string(),
        path: head.uri.to_string(),
        headers: head.headers,
        body: body.collect().await?.to_bytes(),
        is_taken: false,
    };
    let reply = (state.script)(&received);
    received.is_taken = match &reply {
        Reply::Status(status) | Reply::With(status, ..) | Reply::Endless(status) => (200..300).contains(status),
        Reply::Meet(_) => true,
        Reply::Silence => false,
    };
    state.received.lock().expect("unpoisoned").push(received);
    let respond = |status: u16| hyper::Response::builder().status(status);
    let whole = |text: String| Full::new(Bytes::from(text)).boxed();
    let response = match reply {
        Reply::Status(status) => respond(status).body(whole(String::new())),
        Reply::With(status, (name, value), body) => respond(status).header(name, value).body(whole(body)),
        Reply::Endless(status) => {
            respond(status).body(BodyExt::boxed(StreamBody::new(stream::repeat_with(move || {
                state.endless_bytes.fetch_add(PIECE_BYTES as u64, Ordering::SeqCst);
                Ok(Frame::data(Bytes::from(vec![b'x'; PIECE_BYTES])))
            }))))
        }
        Reply::Silence => std::future::pending().await,
        Reply::Meet(barrier) => {
            barrier.wait().await;
            respond(204).body(whole(String::new()))
        }
    };
    Ok(response.expect("a status and headers that are valid"))
}
