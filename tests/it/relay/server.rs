//! A relay behind a real listener, and clients for it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aurora_bus::event::{Attribute, Fields, Filter, NewEntry, StreamName, StreamPattern, field};
use aurora_bus::metrics::Metrics;
use aurora_bus::readiness::Readiness;
use aurora_bus::relay::{Admission, Config, ConnectError, Relay, SessionEnd, SubscribeParams};
use aurora_bus::store::{Appended, Families, MAX_APPEND, Store};
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_util::sync::CancellationToken;

/// The maximum time that a test waits.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_mins(1);

/// The socket buffers for slow clients: small, so that few bytes fill them.
const SMALL_BUFFER: u32 = 4096;

pub(crate) struct Server {
    pub(crate) relay: Relay,
    pub(crate) metrics: Metrics,
    pub(crate) readiness: Readiness,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    ends: Arc<Mutex<Vec<SessionEnd>>>,
    tasks: JoinSet<()>,
}

pub(crate) fn stream(name: &str) -> StreamName {
    name.parse().expect("a valid name")
}

pub(crate) fn alerts() -> StreamName {
    stream("aurora:alerts")
}

pub(crate) fn cps_alerts() -> StreamName {
    stream("aurora:cps:alerts")
}

impl Server {
    /// Starts a relay on that store, and waits until its tails have begun.
    pub(crate) async fn start(store: Arc<dyn Store>, config: Config) -> Self {
        let server = Self::start_cold(store, config);
        server.until("the tails have begun", || server.relay.status().streams.iter().all(|s| s.epoch.is_some())).await;
        server
    }

    /// The same without waiting for the tails.
    pub(crate) fn start_cold(store: Arc<dyn Store>, config: Config) -> Self {
        let (metrics, readiness) = (Metrics::new(), Readiness::default());
        let streams: Vec<StreamPattern> = config.channels.values().flatten().cloned().collect();
        let relay = Relay::new(store.clone(), config, &streams, &Families::default(), metrics.clone(), &readiness);
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_send_buffer_size(SMALL_BUFFER).expect("a socket option");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let listener = socket.listen(1024).expect("a listener");
        let address = listener.local_addr().expect("its address");
        let (stop, ends) = (CancellationToken::new(), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        let (running, stopped) = (relay.clone(), stop.clone());
        tasks.spawn(async move { running.run(stopped).await });
        tasks.spawn(accept(listener, relay.clone(), stop.clone(), ends.clone()));
        Self { relay, metrics, readiness, store, address, stop, ends, tasks }
    }

    /// Connects a client to `target`, such as `alerts?snapshot=5`. It answers pings while it is read.
    pub(crate) async fn connect(&self, target: &str) -> Client {
        Client::connect(self.address, target, None).await
    }

    /// The same with small socket buffers.
    pub(crate) async fn connect_slow(&self, target: &str) -> Client {
        Client::connect(self.address, target, Some(SMALL_BUFFER)).await
    }

    /// Publishes payloads to a stream, in order.
    pub(crate) async fn publish(
        &self,
        stream: &StreamName,
        payloads: impl IntoIterator<Item = String>,
    ) -> Vec<Appended> {
        publish(&*self.store, stream, payloads).await
    }

    pub(crate) async fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + TEST_TIMEOUT;
        while !is_so() {
            assert!(Instant::now() < deadline, "not within {TEST_TIMEOUT:?}: {what}\n{}", self.metrics.render());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Waits until this many sessions have ended, and returns how.
    pub(crate) async fn ends(&self, count: usize) -> Vec<SessionEnd> {
        let ends = || self.ends.lock().expect("no test panics here").clone();
        self.until("sessions have ended", || ends().len() >= count).await;
        ends()
    }

    pub(crate) fn gaps(&self, reason: &str) -> u64 {
        self.metrics.relay_gaps.with_label_values(&["alerts", reason]).get()
    }

    pub(crate) fn catchups(&self) -> u64 {
        self.metrics.relay_catchups.with_label_values(&["alerts"]).get()
    }

    /// Waits until the tails have read all published entries.
    pub(crate) async fn until_relayed(&self, stream: &StreamName, appended: &[Appended]) {
        let last = appended.last().expect("something was published").id;
        self.until("the tail has read it", || {
            self.relay.status().streams.iter().any(|s| s.stream == *stream && s.last >= last)
        })
        .await;
    }

    /// Stops the relay, and waits until `run` and every session have returned.
    pub(crate) async fn stop(mut self) -> Vec<SessionEnd> {
        self.stop.cancel();
        while let Some(ended) = timeout(TEST_TIMEOUT, self.tasks.join_next()).await.expect("it stops in time") {
            ended.expect("no task panics");
        }
        self.ends.lock().expect("no test panics here").clone()
    }
}

async fn accept(listener: TcpListener, relay: Relay, stop: CancellationToken, ends: Arc<Mutex<Vec<SessionEnd>>>) {
    let mut sessions = JoinSet::new();
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (socket, peer) = accepted.expect("a connection");
        let (relay, ends) = (relay.clone(), ends.clone());
        sessions.spawn(async move {
            let end = serve(socket, peer, &relay).await;
            ends.lock().expect("no test panics here").extend(end);
        });
    }
    while let Some(ended) = sessions.join_next().await {
        ended.expect("no session panics");
    }
}

#[expect(clippy::result_large_err, reason = "the handshake's callback is made like this")]
async fn serve(socket: TcpStream, peer: SocketAddr, relay: &Relay) -> Option<SessionEnd> {
    socket.set_nodelay(true).expect("a socket option");
    let mut connected = None;
    // Before the handshake is answered: the client receives all entries that are published after it.
    let connect = |request: &Request, response: Response| {
        let (channel, query) =
            (request.uri().path().trim_start_matches('/'), request.uri().query().unwrap_or_default());
        let params = SubscribeParams::parse(query).map_err(ConnectError::from);
        let is_rich = query.split('&').any(|pair| pair == "v=1");
        let bound = query.split('&').find_map(|pair| pair.strip_prefix("bound_to="));
        let filter = bound.map_or_else(Filter::default, |tenant| Filter::is(Attribute::Tenant, tenant));
        let admission = Admission { filter, ..Admission::default() };
        connected = Some(params.and_then(|params| {
            if is_rich {
                relay.connect_rich(channel, None, peer.ip(), admission)
            } else {
                relay.connect(channel, params, peer.ip(), admission)
            }
        }));
        Ok(response)
    };
    let socket = tokio_tungstenite::accept_hdr_async(socket, connect).await.ok()?.into_inner();
    match connected? {
        Ok(session) => Some(session.run(socket).await),
        Err(refused) => {
            relay.refuse(socket, &refused).await;
            None
        }
    }
}

pub(crate) async fn publish(
    store: &dyn Store,
    stream: &StreamName,
    payloads: impl IntoIterator<Item = String>,
) -> Vec<Appended> {
    let entry = |payload: String| {
        let mut fields = Fields::default();
        fields.push(field::DATA.as_bytes(), Bytes::from(payload));
        NewEntry { fields, idempotency: None }
    };
    let entries: Vec<NewEntry> = payloads.into_iter().map(entry).collect();
    let mut appended = Vec::with_capacity(entries.len());
    for chunk in entries.chunks(MAX_APPEND) {
        appended.extend(store.append(stream, chunk.to_vec()).await.expect("the store takes it"));
    }
    appended
}

pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<TcpStream>,
}

impl Client {
    async fn connect(address: SocketAddr, target: &str, buffer: Option<u32>) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        if let Some(bytes) = buffer {
            socket.set_recv_buffer_size(bytes).expect("a socket option");
        }
        let socket = socket.connect(address).await.expect("a connection");
        let url = format!("ws://{address}/{target}");
        let handshake = tokio_tungstenite::client_async(url, socket);
        let (socket, _) = timeout(TEST_TIMEOUT, handshake).await.expect("in time").expect("a handshake");
        Self { socket }
    }

    /// Returns the next alert.
    pub(crate) async fn text(&mut self) -> String {
        loop {
            match self.message().await {
                Some(Message::Text(text)) => return text.as_str().to_owned(),
                Some(Message::Ping(_) | Message::Pong(_)) => {}
                other => panic!("expected an alert, got {other:?}"),
            }
        }
    }

    pub(crate) async fn texts(&mut self, count: usize) -> Vec<String> {
        let mut texts = Vec::with_capacity(count);
        while texts.len() < count {
            texts.push(self.text().await);
        }
        texts
    }

    /// Returns the next message, or `None` when the connection has ended.
    pub(crate) async fn message(&mut self) -> Option<Message> {
        timeout(TEST_TIMEOUT, self.socket.next()).await.expect("a message in time").and_then(Result::ok)
    }

    /// Reads until the server closes. Returns the alerts until then, the code and the reason.
    pub(crate) async fn close(&mut self) -> (Vec<String>, u16, String) {
        let mut texts = Vec::new();
        loop {
            match self.message().await {
                Some(Message::Text(text)) => texts.push(text.as_str().to_owned()),
                Some(Message::Close(Some(frame))) => {
                    return (texts, frame.code.into(), frame.reason.as_str().to_owned());
                }
                Some(_) => {}
                None => panic!("the connection ended without a close frame"),
            }
        }
    }
}
