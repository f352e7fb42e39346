//! The relay: sends every alert to every dashboard that subscribes to it.
//!
//! The path of an alert:
//!
//! 1. The tail (`log::tail`) follows one stream in the store. It frames each entry once, as a WebSocket message, and
//!    pushes batches of frames into the ring of the stream (`log::ring`).
//! 2. It then notifies every channel that has the stream (`session::notify`). The tasks of the fan-out
//!    (`session::broadcast`) pass over all waiting sessions and let each one deliver.
//! 3. The session (`session`) fills its write buffer from its subscriptions (`subscription`). Each has one cursor per
//!    stream (`subscription::cursor`), which takes runs of ready-made frames out of the ring and applies the filter.
//! 4. The write buffer (`wire::write_buffer`) holds slices of these frames, never copies. The connection
//!    (`session::connection`) writes many alerts with one system call.
//!
//! A client that falls behind the ring reads pages of the store (`log::page_reader`) until it has caught up. So a slow
//! client costs others neither memory nor time. Clients at about the same position share pages (`log::page_cache`).
//!
//! Promises, per client and stream: each alert that passes the filter arrives once and in the order of the store. There
//! is no gap between the requested past and the present. Entries that are gone, because they were trimmed or the stream
//! was lost, are counted and reported; all others are sent. Memory is bounded by the rings and a few slices per client.
//!
//! Knows nothing of HTTP: the caller finishes the WebSocket handshake and hands over the bare socket. Knows nothing of
//! groups either: every instance relays every alert.
//!
//! In plain mode the wire carries control frames, and one text message per alert, which is exactly the stored payload.
//! The close code ([`CloseCode`]) gives the reason for the end. Messages of the client are ignored, within limits. In
//! rich mode ([`PROTOCOL`]) frames have types, clients subscribe to streams one by one, and gaps and positions are
//! reported. The same subscriptions feed Server-Sent Events and JSON lines ([`Feed`]).

mod config;
mod hub;
mod log;
mod metrics;
mod session;
mod subscription;
mod wire;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::relay::config::Config;
pub use crate::relay::session::Session;
pub use crate::relay::session::admission::{Admission, ConnectError, Renewal, RenewalError};
pub use crate::relay::session::close::{CloseCode, SessionEnd};
pub use crate::relay::session::commands::{CommandHandler, CommandHandlerFactory};
pub use crate::relay::session::feed::{Feed, FeedEncoding};
pub use crate::relay::session::protocol::PROTOCOL;
#[cfg(any(test, fuzzing))]
pub use crate::relay::session::reader::fuzz as fuzz_inbound;
pub use crate::relay::subscription::params::{BadParameter, MAX_SNAPSHOT, Since, SubscribeParams};

use crate::event::{EntryId, Epoch, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::relay::hub::{Channel, Hub};
use crate::relay::log::keyed_rings::{KeyedRings, SWEEP_INTERVAL, TailRequest};
use crate::relay::log::ring::{Ring, RingLimits};
use crate::relay::log::tail::{GapCounters, Tail};
use crate::relay::session::limits::{ConnectionLimiter, ConnectionLimits, ConnectionPermit};
use crate::relay::subscription::Subscription;
use crate::relay::wire::encoding::Encoding;
use crate::store::{Families, Store};

/// Concurrent reads of pages for clients that catch up. Tails and groups must not wait for them.
const MAX_PAGE_READS: usize = 4;

/// A tail that has not reported to readiness for this long is stuck.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// The pause between checks whether the last client has gone.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The relay of this instance. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Relay {
    hub: Arc<Hub>,
}

/// An admitted client: its channel, the rings that it may read, and its connection permit.
struct Admitted {
    channel: Arc<Channel>,
    rings: Vec<Arc<Ring>>,
    permit: ConnectionPermit,
}

/// The state of the relay at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayStatus {
    /// The number of clients.
    pub connections: usize,
    /// Whether new clients are refused because this instance stops.
    pub is_draining: bool,
    /// The channels with their clients.
    pub channels: Vec<ChannelStatus>,
    /// The streams with their rings.
    pub streams: Vec<RelayedStream>,
}

/// The state of one channel at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelStatus {
    /// The name of the channel.
    pub name: String,
    /// The streams of the channel.
    pub streams: Vec<StreamName>,
    /// The number of its clients.
    pub connections: usize,
}

/// The state of one relayed stream at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayedStream {
    /// The name of the stream.
    pub stream: StreamName,
    /// The epoch in positions of the stream, or `None` until the stream was read for the first time.
    pub epoch: Option<Epoch>,
    /// The last entry that was read.
    pub last: EntryId,
    /// The number of alerts in memory.
    pub ring_entries: usize,
    /// The size of their frames in bytes.
    pub ring_bytes: usize,
}

impl Relay {
    /// Creates a relay for those streams of the configured channels that are among `streams`.
    ///
    /// Each stream becomes a part of `readiness`. Members of `families` are relayed when a client asks for them.
    /// Nothing is read before [`Relay::run`].
    pub fn new(
        store: Arc<dyn Store>,
        config: Config,
        streams: &[StreamPattern],
        families: &Families,
        metrics: Metrics,
        readiness: &Readiness,
    ) -> Self {
        let bytes = usize::try_from(config.ring_bytes.as_u64()).unwrap_or(usize::MAX);
        let limits = RingLimits { bytes, entries: config.ring_entries };
        let mut by_stream: BTreeMap<StreamName, Arc<Ring>> = BTreeMap::new();
        let relayed = config.channels.values().flatten().filter(|stream| streams.contains(stream));
        for stream in relayed.filter_map(StreamPattern::stream) {
            by_stream.entry(stream.clone()).or_insert_with(|| Arc::new(Ring::new(stream.clone(), limits)));
        }
        let rings: Vec<Arc<Ring>> = by_stream.values().cloned().collect();
        let bytes = usize::try_from(config.member_ring_bytes.as_u64()).unwrap_or(usize::MAX);
        let keyed_rings = Arc::new(KeyedRings::new(families.clone(), RingLimits { bytes, ..limits }, &rings));
        let channel = |(name, patterns): (&String, &Vec<StreamPattern>)| {
            let of_channel = patterns.iter().filter_map(StreamPattern::stream);
            let of_channel = of_channel.filter_map(|stream| by_stream.get(stream).cloned()).collect();
            let families = keyed_rings.families_of(patterns);
            (name.clone(), Arc::new(Channel::new(name, of_channel, families, &keyed_rings, &metrics)))
        };
        let channels: BTreeMap<String, Arc<Channel>> = config.channels.iter().map(channel).collect();
        for channel in channels.values() {
            channel.rings.iter().for_each(|ring| keyed_rings.wake_list_of(ring.stream()).add(&channel.fanout));
        }
        let limiter = ConnectionLimiter::new(ConnectionLimits {
            total: config.max_connections,
            per_address: config.max_connections_per_address,
            per_principal: config.max_connections_per_principal,
        });
        let part = |ring: &Arc<Ring>| readiness.part(&format!("relay {}", ring.stream()), Some(STALE_AFTER));
        let parts = rings.iter().map(part).collect();
        let hub = Hub {
            store,
            config,
            channels,
            rings,
            keyed_rings,
            keyed_channels: Mutex::default(),
            limiter,
            page_permits: Semaphore::new(MAX_PAGE_READS),
            page_reads: TaskTracker::new(),
            draining: Arc::default(),
            metrics,
            parts,
        };
        Self { hub: Arc::new(hub) }
    }

    /// Follows the streams until `stop` is cancelled, and then until the last client has gone or the drain window is
    /// over.
    ///
    /// To be called once. Returns earlier only if a tail has panicked.
    pub async fn run(&self, stop: CancellationToken) {
        let mut tails = JoinSet::new();
        let stop_tails = CancellationToken::new();
        for (ring, part) in self.hub.rings.iter().zip(&self.hub.parts) {
            tails.spawn(self.tail(ring, part).run(stop_tails.clone()));
        }
        let mut member_tails = JoinSet::new();
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = tails.join_next() => {
                    tracing::error!(error = ?ended.err(), "relay tail ended, draining");
                    return self.drain();
                }
                Some(Err(error)) = member_tails.join_next(), if !member_tails.is_empty() => {
                    tracing::error!(%error, "relay tail panicked, draining");
                    return self.drain();
                }
                () = self.hub.keyed_rings.tail_requested.notified() => {
                    for request in self.hub.keyed_rings.take_tail_requests() {
                        let ended = request.stop.clone();
                        member_tails.spawn(self.member_tail(request).run(ended));
                    }
                }
                _ = sweep.tick() => self.hub.sweep(),
            }
        }
        self.drain();
        // Clients are served until they are closed: clients that cannot resume would miss the entries of this time.
        let deadline = Instant::now() + self.hub.config.drain_window;
        while self.hub.limiter.total() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        stop_tails.cancel();
        member_tails.shutdown().await;
        while let Some(ended) = tails.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "relay tail panicked");
            }
        }
    }

    /// Refuses new clients from now on, and closes each client at a random moment within the drain window.
    ///
    /// Clients are served until then.
    pub fn drain(&self) {
        self.hub.draining.notify_all();
    }

    /// Returns whether new clients are refused.
    pub fn is_draining(&self) -> bool {
        self.hub.draining.was_notified()
    }

    /// Admits a client, which receives all entries after this call and the past that it requested.
    ///
    /// Neither waits nor does I/O: a client is admitted while the store is unavailable, and served when it is back.
    pub fn connect(
        &self,
        channel: &str,
        mut params: SubscribeParams,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Session, ConnectError> {
        let (key, stream) = (params.key.as_deref(), params.stream.as_ref());
        let Admitted { channel, rings, permit } = self.admit(channel, key, stream, false, peer, &admission)?;
        params.narrow(admission.filter.clone());
        let encoding = if params.meta { Encoding::WithPosition } else { Encoding::Plain };
        let subscription = Subscription::new(rings, params, encoding, None, &self.hub, &channel);
        Ok(Session::plain(self.hub.clone(), channel, subscription, admission, permit))
    }

    /// Admits a client that speaks [`PROTOCOL`] and subscribes by requests.
    ///
    /// With a key the client is offered the streams of that key. Without one it may request any stream of the channel's
    /// families that it may watch.
    pub fn connect_rich(
        &self,
        channel: &str,
        key: Option<&str>,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Session, ConnectError> {
        let Admitted { channel, permit, .. } = self.admit(channel, key, None, true, peer, &admission)?;
        Ok(Session::rich(self.hub.clone(), channel, admission, permit))
    }

    /// Admits a client that reads alerts from an HTTP response. Otherwise the same as [`Relay::connect`].
    pub fn feed(
        &self,
        channel: &str,
        mut params: SubscribeParams,
        encoding: FeedEncoding,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Feed, ConnectError> {
        let (key, stream) = (params.key.as_deref(), params.stream.as_ref());
        let Admitted { channel, rings, permit } = self.admit(channel, key, stream, false, peer, &admission)?;
        let expires_at = admission.deadline();
        params.narrow(admission.filter);
        let meta = params.meta;
        let encoding = match encoding {
            FeedEncoding::EventStream => Encoding::EventStream { ids: rings.len() == 1, meta },
            FeedEncoding::Lines => Encoding::Lines { meta },
        };
        let subscription = Subscription::new(rings, params, encoding, None, &self.hub, &channel);
        Ok(Feed::new(self.hub.clone(), channel, subscription, encoding, permit).ending_at(expires_at))
    }

    fn admit(
        &self,
        channel: &str,
        key: Option<&str>,
        stream: Option<&StreamName>,
        is_rich: bool,
        peer: IpAddr,
        admission: &Admission,
    ) -> Result<Admitted, ConnectError> {
        let hub = &self.hub;
        if self.is_draining() {
            return Err(ConnectError::Draining);
        }
        let unknown = || ConnectError::UnknownChannel(channel.chars().take(64).collect());
        let tenant = admission.tenant.as_deref();
        let mut channel = hub.channels.get(channel).ok_or_else(unknown)?.clone();
        let named = stream.and_then(|stream| channel.families.iter().find_map(|r| r.family().key_of(stream)));
        match key.or(named).or_else(|| channel.key_of_tenant(tenant)) {
            Some(_) if channel.families.is_empty() => {}
            Some(key) => channel = hub.keyed_channel(&channel, key, tenant)?,
            None if channel.families.is_empty() || is_rich => {}
            None => {
                let families: Vec<&str> = channel.families.iter().map(|family_members| family_members.family().name()).collect();
                let problem =
                    format!("is required: this channel has the streams of one key of {}", families.join(", "));
                return Err(BadParameter::new("key", problem).into());
            }
        }
        let rings = channel.rings_of(stream, tenant)?;
        let permit = hub.limiter.acquire(peer, admission.principal.as_ref(), &channel.connections);
        Ok(Admitted { permit: permit.ok_or(ConnectError::ConnectionLimit)?, channel, rings })
    }

    /// Closes the socket of a refused client with the close code of `refused`.
    ///
    /// Browsers hide the status of a refused handshake, so the handshake of a browser is accepted and the connection is
    /// then closed like this. Takes a few seconds at most.
    pub async fn refuse<S>(&self, io: S, refused: &ConnectError)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        session::refuse(io, refused, &self.hub).await;
    }

    /// Returns the clients and streams at this moment.
    pub fn status(&self) -> RelayStatus {
        let hub = &self.hub;
        let channel = |channel: &Arc<Channel>| ChannelStatus {
            name: channel.name.clone(),
            streams: channel.rings.iter().map(|ring| ring.stream().clone()).collect(),
            connections: usize::try_from(channel.connections.get()).unwrap_or(0),
        };
        let stream = |ring: &Arc<Ring>| {
            let (stream, snapshot) = (ring.stream().clone(), ring.snapshot());
            let (ring_entries, ring_bytes) = snapshot.as_ref().map_or((0, 0), |ring| (ring.entries, ring.bytes));
            let last = snapshot.as_ref().map_or(EntryId::MIN, |ring| ring.last);
            RelayedStream { stream, epoch: snapshot.map(|ring| ring.epoch), last, ring_entries, ring_bytes }
        };
        RelayStatus {
            connections: hub.limiter.total(),
            is_draining: self.is_draining(),
            channels: hub.channels.values().map(channel).collect(),
            streams: hub.rings.iter().map(stream).collect(),
        }
    }

    fn tail(&self, ring: &Arc<Ring>, part: &Part) -> Tail {
        let stream = ring.stream();
        let has_stream = |channel: &Channel| channel.rings.iter().any(|ring| ring.stream() == stream);
        Tail {
            store: self.hub.store.clone(),
            ring: ring.clone(),
            wake_list: self.hub.keyed_rings.wake_list_of(stream),
            gaps: self.gap_counters(has_stream),
            part: part.clone(),
            member_start: None,
        }
    }

    /// Creates the tail of a member. The family reports to readiness, not the member.
    fn member_tail(&self, request: TailRequest) -> Tail {
        let TailRequest { ring, wake_list, member_start, .. } = request;
        let has_family =
            |channel: &Channel| channel.families.iter().any(|known| Arc::ptr_eq(known, &member_start.family_members));
        Tail {
            store: self.hub.store.clone(),
            wake_list,
            gaps: self.gap_counters(has_family),
            part: Readiness::default().part(ring.stream().as_str(), None),
            member_start: Some(member_start),
            ring,
        }
    }

    /// Returns the gap counters of all channels that satisfy a condition.
    fn gap_counters(&self, has_stream: impl Fn(&Channel) -> bool) -> GapCounters {
        let channels: Vec<&Arc<Channel>> =
            self.hub.channels.values().filter(|channel| has_stream(channel.as_ref())).collect();
        let counters = |reason: &str| channels.iter().map(|c| c.gaps.with_label_values(&[&c.name, reason])).collect();
        GapCounters {
            undecodable: counters("undecodable"),
            trimmed: counters("trimmed"),
            state_lost: counters("state_lost"),
        }
    }
}
