//! A TCP proxy with the faults of networks: lost, delayed and cut connections.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// A proxy in front of a server on the loopback address. It ends on drop.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    faults: Arc<Faults>,
    stop: CancellationToken,
}

/// The active faults.
#[derive(Debug, Default)]
struct Faults {
    /// The next request with these bytes passes; its reply is dropped and its connection is cut.
    drop_reply_to: Mutex<Option<Vec<u8>>>,
    /// Number of dropped replies.
    dropped: AtomicU64,
    /// The next request with these bytes turns its connection into a black hole and is dropped itself.
    black_hole_at: Mutex<Option<Vec<u8>>>,
    /// Connections below this number are black holes, in both directions.
    black_hole_below: AtomicU64,
    delay_ms: AtomicU64,
    /// Cancelled to cut the open connections, then replaced.
    cut: Mutex<CancellationToken>,
    next_connection: AtomicU64,
    refuse: AtomicBool,
}

impl Proxy {
    /// Starts a proxy in front of `port`.
    pub(crate) async fn start(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound listener");
        let (faults, stop) = (Arc::<Faults>::default(), CancellationToken::new());
        let task = accept(listener, port, Arc::clone(&faults), stop.clone());
        // The task ends with `stop`, which `drop` cancels.
        tokio_util::task::TaskTracker::new().spawn(task);
        Self { address, faults, stop }
    }

    /// Returns the URL for clients of Redis.
    pub(crate) fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    /// Returns the port, for clients of other servers.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Drops the reply to the next request that contains `part`, and cuts the connection. The request itself passes.
    pub(crate) fn drop_reply_to(&self, part: &[u8]) {
        *self.faults.drop_reply_to.lock().expect("unpoisoned") = Some(part.to_vec());
    }

    /// Returns the number of connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.faults.next_connection.load(Ordering::SeqCst)
    }

    /// Returns the number of dropped replies so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.faults.dropped.load(Ordering::SeqCst)
    }

    /// Turns the open connections into black holes: they stay open and pass no byte. New connections work.
    pub(crate) fn black_hole_existing(&self) {
        let next = self.faults.next_connection.load(Ordering::SeqCst);
        self.faults.black_hole_below.store(next, Ordering::SeqCst);
    }

    /// Turns the connection of the next request that contains `part` into a black hole. The request is dropped as well.
    /// All other connections work.
    pub(crate) fn black_hole_at(&self, part: &[u8]) {
        *self.faults.black_hole_at.lock().expect("unpoisoned") = Some(part.to_vec());
    }

    /// Returns whether a connection became a black hole since [`Self::black_hole_at`].
    pub(crate) fn has_black_hole(&self) -> bool {
        self.faults.black_hole_at.lock().expect("unpoisoned").is_none()
    }

    /// Delays everything read from either side by this time.
    pub(crate) fn delay(&self, delay: Duration) {
        self.faults.delay_ms.store(u64::try_from(delay.as_millis()).expect("a short delay"), Ordering::SeqCst);
    }

    /// Resets the open connections.
    pub(crate) fn reset(&self) {
        let mut cut = self.faults.cut.lock().expect("unpoisoned");
        std::mem::take(&mut *cut).cancel();
    }

    /// Sets whether new connections are cut at once.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.faults.refuse.store(refuse, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, port: u16, faults: Arc<Faults>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let client = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted.expect("the listener works").0,
        };
        let number = faults.next_connection.fetch_add(1, Ordering::SeqCst);
        let cut = faults.cut.lock().expect("unpoisoned").clone();
        if faults.refuse.load(Ordering::SeqCst) {
            continue;
        }
        let faults = Arc::clone(&faults);
        connections.spawn(async move {
            let mut client = client;
            let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
            tokio::select! {
                () = cut.cancelled() => {}
                () = pass(&mut client, &mut server, number, &faults) => return,
            }
            // A reset, not a regular end: data in flight is lost.
            for socket in [client, server] {
                socket.set_zero_linger().expect("a socket option");
            }
        });
    }
}

async fn pass(client: &mut TcpStream, server: &mut TcpStream, number: u64, faults: &Faults) {
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    // Set by a request with a lost reply, and by a request that makes its connection a black hole.
    let (swallow, is_hole) = (AtomicBool::new(false), AtomicBool::new(false));
    let hits = |wanted: &Mutex<Option<Vec<u8>>>, bytes: &[u8]| {
        let mut wanted = wanted.lock().expect("unpoisoned");
        let is_hit = wanted.as_ref().is_some_and(|part| bytes.windows(part.len()).any(|window| window == part));
        if is_hit {
            *wanted = None;
        }
        is_hit
    };
    let requests = pump(from_client, to_server, number, faults, |bytes| {
        if hits(&faults.black_hole_at, bytes) {
            is_hole.store(true, Ordering::SeqCst);
        }
        if hits(&faults.drop_reply_to, bytes) {
            swallow.store(true, Ordering::SeqCst);
        }
        if is_hole.load(Ordering::SeqCst) { Passage::Nowhere } else { Passage::On }
    });
    let replies = pump(from_server, to_client, number, faults, |_| {
        if is_hole.load(Ordering::SeqCst) {
            return Passage::Nowhere;
        }
        if swallow.load(Ordering::SeqCst) {
            faults.dropped.fetch_add(1, Ordering::SeqCst);
            return Passage::Cut;
        }
        Passage::On
    });
    tokio::select! {
        () = requests => {}
        () = replies => {}
    }
}

/// The fate of some bytes and their connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Passage {
    On,
    Cut,
    Nowhere,
}

/// Passes bytes on until either side ends or the connection is cut.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    number: u64,
    faults: &Faults,
    passage: impl Fn(&[u8]) -> Passage,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(length) if length > 0 => length,
            _ => return,
        };
        let delay = faults.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if number < faults.black_hole_below.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let bytes = &buffer[..length];
        match passage(bytes) {
            Passage::On if to.write_all(bytes).await.is_ok() => {}
            Passage::On | Passage::Cut => return,
            Passage::Nowhere => std::future::pending().await,
        }
    }
}
