//! The relay: every alert to every dashboard that asked for it, over a WebSocket.
//!
//! Owns the way from a stream to the clients' sockets. One tail per stream reads the store and frames each alert
//! once into the stream's ring; each client is a [`Session`] with a cursor per stream that writes slices of the ring,
//! many alerts per write. A client that falls behind the ring is served from the store in pages until it has caught
//! up: nobody's slowness costs anyone else memory or time. Pages are shared by those who need the same.
//!
//! Promises, per client and stream: every alert that passes its filter once, in the store's order, without a hole
//! between the past it asked for and the present. What can't be given any more (trimmed away, or the stream was lost)
//! is counted, and what is left is given. Memory is that of the rings, and for each client a bounded few slices.
//!
//! Knows nothing of HTTP: whoever calls has done the WebSocket handshake and hands over the bare socket. Knows nothing
//! of groups either: every instance relays every alert.
//!
//! What travels is, in plain mode, one text message per alert, exactly the stored payload; control frames for liveness;
//! the end told by the close code ([`CloseCode`]). What a client sends is ignored, within limits. In rich mode
//! ([`PROTOCOL`]) frames have types, clients ask for streams one by one, and gaps and positions are told. The same
//! subscriptions feed Server-Sent Events and lines of JSON ([`Feed`]).

mod config;
mod log;
mod metrics;
mod session;
mod subscription;
mod wire;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use crate::relay::session::admission::{Admission, NotRenewed, Renewal};
pub use crate::relay::session::close::{CloseCode, Ending};
pub use crate::relay::session::commands::{Errands, Runner};
pub use crate::relay::session::feed::{Feed, FeedForm};
pub use crate::relay::session::protocol::PROTOCOL;
#[cfg(any(test, fuzzing))]
pub use crate::relay::session::reader::fuzz as fuzz_inbound;
pub use crate::relay::subscription::params::{BadParameter, MAX_SNAPSHOT, Since, SubscribeParams};
pub use config::Config;
pub use session::Session;

use crate::event::{EntryId, Epoch, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::relay::log::keyed_rings::Members;
use crate::relay::log::ring::{Limits, Ring};
use crate::relay::log::tail::{Gaps, Tail};
use crate::relay::metrics::Meter;
use crate::relay::session::broadcast::Fanout;
use crate::relay::session::limits::{Slot, Slots};
use crate::relay::session::notify::Bell;
use crate::relay::wire::encoding::Form;
use crate::store::{Families, Roster, Store};
use subscription::Subscription;

/// Reads of the store at a time for clients that catch up: those that are live, and the groups, come first.
const PAGES_AT_A_TIME: usize = 4;

/// A tail that has told nothing for so long is stuck.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// How often draining looks whether the last client has gone.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The relay of this instance. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Relay {
    hub: Arc<Hub>,
}

/// What all sessions share.
#[derive(Debug)]
pub(crate) struct Hub {
    store: Arc<dyn Store>,
    config: Config,
    channels: BTreeMap<String, Arc<Channel>>,
    rings: Vec<Arc<Ring>>,
    members: Arc<Members>,
    slots: Arc<Slots>,
    pages: Semaphore,
    /// Reads of pages under way.
    reads: TaskTracker,
    /// Rung when this instance stops.
    draining: Arc<Bell>,
    metrics: Metrics,
    /// One per ring.
    parts: Vec<Part>,
}

/// Some streams under one name, and what is counted of its clients.
#[derive(Debug)]
pub(crate) struct Channel {
    name: String,
    rings: Vec<Arc<Ring>>,
    /// The families among its streams, of which clients are given members.
    families: Vec<Arc<Roster>>,
    members: Arc<Members>,
    /// Itself, for those who wake it.
    me: Weak<Self>,
    /// Rung for every change of its rings.
    bell: Arc<Bell>,
    /// Those of its clients that wait for nothing but that.
    fanout: Arc<Fanout>,
    connections: IntGauge,
    meter: Meter,
    catchups: IntCounter,
    gaps: IntCounterVec,
    seen: Histogram,
}

/// A client's place: its channel, what it may see of it, and its place among the connections.
struct Admitted {
    channel: Arc<Channel>,
    rings: Vec<Arc<Ring>>,
    slot: Slot,
}

/// Why a client is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such channel.
    #[error("there is no channel `{0}`")]
    UnknownChannel(String),
    /// A parameter makes no sense.
    #[error(transparent)]
    BadParameter(#[from] BadParameter),
    /// There are too many connections, in all or from this address. Later there may be room.
    #[error("too many connections")]
    ConnectionLimit,
    /// The page that asks is of an origin that is not let in.
    #[error("pages of this origin are not let in (http.origins)")]
    Origin,
    /// The client asks for versions of the protocol, and none that is spoken here.
    #[error("no version of the protocol that is asked for is spoken here; there is aurora.v1, or v=1")]
    Version,
    /// Credentials are asked for, and there are none, or none that are any good; in words.
    #[error("{0}")]
    Unauthenticated(String),
    /// Whoever asks may not watch this; in words.
    #[error("{0}")]
    Forbidden(String),
    /// It can't be told now who asks. Later it may be.
    #[error("{0}")]
    Unavailable(String),
    /// The family that is asked for has as many keys as it may have; in words.
    #[error("{0}")]
    TooManyKeys(String),
    /// This instance is stopping; another one, or this one later, will serve.
    #[error("this instance is stopping")]
    Draining,
}

impl Refused {
    /// The close code for clients that can't see why their handshake was refused.
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::UnknownChannel(_) | Self::BadParameter(_) => CloseCode::Protocol,
            Self::ConnectionLimit | Self::TooManyKeys(_) => CloseCode::ConnectionLimit,
            Self::Origin => CloseCode::Origin,
            Self::Version => CloseCode::Version,
            Self::Unauthenticated(_) => CloseCode::Unauthenticated,
            Self::Forbidden(_) => CloseCode::Forbidden,
            Self::Unavailable(_) => CloseCode::ServerError,
            Self::Draining => CloseCode::GoingAway,
        }
    }

    fn close_reason(&self) -> String {
        match self {
            Self::UnknownChannel(_) => format!("unknown_channel: {self}"),
            Self::BadParameter(_) => format!("bad_parameter: {self}"),
            Self::Unauthenticated(_) => format!("unauthenticated: {self}"),
            Self::Forbidden(_) => format!("forbidden: {self}"),
            Self::Unavailable(_) => format!("server_error: {self}"),
            Self::TooManyKeys(_) => format!("too_many_keys: {self}"),
            Self::ConnectionLimit | Self::Origin | Self::Version | Self::Draining => {
                self.close_code().reason().to_owned()
            }
        }
    }
}

/// The relay as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayStatus {
    /// Clients connected.
    pub connections: usize,
    /// Whether new clients are refused because this instance stops.
    pub is_draining: bool,
    /// Clients by channel.
    pub channels: Vec<ChannelStatus>,
    /// Streams and their rings.
    pub streams: Vec<RelayedStream>,
}

/// One channel as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelStatus {
    /// Its name.
    pub name: String,
    /// Its streams.
    pub streams: Vec<StreamName>,
    /// Its clients.
    pub connections: usize,
}

/// One relayed stream as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayedStream {
    /// Its name.
    pub stream: StreamName,
    /// The life of the stream that positions name; nothing until the stream could be read for the first time.
    pub epoch: Option<Epoch>,
    /// The last entry read of it.
    pub last: EntryId,
    /// Alerts in memory.
    pub ring_entries: usize,
    /// Their frames, in bytes.
    pub ring_bytes: usize,
}

impl Relay {
    /// A relay of those streams of the configured channels that are among `streams`, each of which is a part of
    /// `readiness`. Of `families` clients are given the members that they ask for. Nothing is read before
    /// [`Relay::run`].
    pub fn new(
        store: Arc<dyn Store>,
        config: Config,
        streams: &[StreamPattern],
        families: &Families,
        metrics: Metrics,
        readiness: &Readiness,
    ) -> Self {
        let bytes = usize::try_from(config.ring_bytes.as_u64()).unwrap_or(usize::MAX);
        let limits = Limits { bytes, entries: config.ring_entries };
        let mut rings: BTreeMap<StreamName, Arc<Ring>> = BTreeMap::new();
        let relayed = config.channels.values().flatten().filter(|stream| streams.contains(stream));
        for stream in relayed.filter_map(StreamPattern::stream) {
            rings.entry(stream.clone()).or_insert_with(|| Arc::new(Ring::new(stream.clone(), limits)));
        }
        let all: Vec<Arc<Ring>> = rings.values().cloned().collect();
        let bytes = usize::try_from(config.member_ring_bytes.as_u64()).unwrap_or(usize::MAX);
        let members = Arc::new(Members::new(families.clone(), Limits { bytes, ..limits }, &all));
        let channel = |(name, patterns): (&String, &Vec<StreamPattern>)| {
            let of_channel = patterns.iter().filter_map(StreamPattern::stream);
            let of_channel = of_channel.filter_map(|stream| rings.get(stream).cloned()).collect();
            (name.clone(), Channel::new(name, of_channel, members.families_of(patterns), &members, &metrics))
        };
        let channels: BTreeMap<String, Arc<Channel>> = config.channels.iter().map(channel).collect();
        for channel in channels.values() {
            channel.rings.iter().for_each(|ring| members.wakes_of(ring.stream()).add(&channel.me));
        }
        let slots = Slots::new(session::limits::Most {
            total: config.max_connections,
            per_address: config.max_connections_per_address,
            per_principal: config.max_connections_per_principal,
        });
        let rings = all;
        let part = |ring: &Arc<Ring>| readiness.part(&format!("relay {}", ring.stream()), Some(STALE_AFTER));
        let parts = rings.iter().map(part).collect();
        let (pages, reads) = (Semaphore::new(PAGES_AT_A_TIME), TaskTracker::new());
        let draining = Arc::default();
        let hub = Hub { store, config, channels, rings, members, slots, pages, reads, draining, metrics, parts };
        Self { hub: Arc::new(hub) }
    }

    /// Follows the streams until `stop` is cancelled, and then until the last client has gone, or the drain window is
    /// over. To be called once. Returns earlier only where a tail has panicked.
    pub async fn run(&self, stop: CancellationToken) {
        let mut tails = JoinSet::new();
        let stop_tails = CancellationToken::new();
        for (ring, part) in self.hub.rings.iter().zip(&self.hub.parts) {
            tails.spawn(self.hub.tail(ring, part).run(stop_tails.clone()));
        }
        let mut member_tails = JoinSet::new();
        let mut sweep = tokio::time::interval(log::keyed_rings::SWEEP_EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(ended) = tails.join_next() => {
                    tracing::error!(error = ?ended.err(), "a tail of the relay has ended");
                    return self.drain();
                }
                Some(Err(error)) = member_tails.join_next(), if !member_tails.is_empty() => {
                    tracing::error!(%error, "a tail of the relay has ended badly");
                    return self.drain();
                }
                () = self.hub.members.news.notified() => {
                    for wanted in self.hub.members.take_wanted() {
                        let ended = wanted.stop.clone();
                        member_tails.spawn(self.hub.member_tail(wanted).run(ended));
                    }
                }
                _ = sweep.tick() => self.hub.members.sweep(),
            }
        }
        self.drain();
        // Clients are served until they are closed, or those that can't resume would miss what comes meanwhile.
        let deadline = Instant::now() + self.hub.config.drain_window;
        while self.hub.slots.total() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        stop_tails.cancel();
        member_tails.shutdown().await;
        while let Some(ended) = tails.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a tail of the relay has ended badly");
            }
        }
    }

    /// From now on nobody is let in, and everyone who is here is closed at a random moment within the configured drain
    /// window, and served until then.
    pub fn drain(&self) {
        self.hub.draining.ring();
    }

    /// Whether nobody is let in any more.
    pub fn is_draining(&self) -> bool {
        self.hub.draining.is_rung()
    }

    /// Lets a client in, who is then given everything that comes after this call, and what it asked for of the past.
    ///
    /// Does not wait, and does no I/O: a client is let in while the store is away, and served when it is back.
    pub fn connect(
        &self,
        channel: &str,
        mut params: SubscribeParams,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Session, Refused> {
        let (key, stream) = (params.key.as_deref(), params.stream.as_ref());
        let Admitted { channel, rings, slot } = self.admit(channel, key, stream, false, peer, &admission)?;
        params.narrow(admission.filter.clone());
        let form = if params.meta { Form::WithPosition } else { Form::Plain };
        let subscription = Subscription::new(rings, params, form, None, &self.hub, &channel);
        Ok(Session::plain(self.hub.clone(), channel, subscription, admission, slot))
    }

    /// Lets a client in that speaks [`PROTOCOL`], and will say what it wants. With a key it is offered the streams of that
    /// key; without one it may ask for any stream of the channel's families that it may watch.
    pub fn connect_rich(
        &self,
        channel: &str,
        key: Option<&str>,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Session, Refused> {
        let Admitted { channel, slot, .. } = self.admit(channel, key, None, true, peer, &admission)?;
        Ok(Session::rich(self.hub.clone(), channel, admission, slot))
    }

    /// Lets a client in that reads the alerts in the answer to an HTTP request. Otherwise as [`Relay::connect`].
    pub fn feed(
        &self,
        channel: &str,
        mut params: SubscribeParams,
        form: FeedForm,
        peer: IpAddr,
        admission: Admission,
    ) -> Result<Feed, Refused> {
        let (key, stream) = (params.key.as_deref(), params.stream.as_ref());
        let Admitted { channel, rings, slot } = self.admit(channel, key, stream, false, peer, &admission)?;
        let expires_at = admission.deadline();
        params.narrow(admission.filter);
        let meta = params.meta;
        let form = match form {
            FeedForm::EventStream => Form::EventStream { ids: rings.len() == 1, meta },
            FeedForm::Lines => Form::Lines { meta },
        };
        let subscription = Subscription::new(rings, params, form, None, &self.hub, &channel);
        Ok(Feed::new(self.hub.clone(), channel, subscription, form, slot).until(expires_at))
    }

    fn admit(
        &self,
        channel: &str,
        key: Option<&str>,
        stream: Option<&StreamName>,
        will_ask: bool,
        peer: IpAddr,
        admission: &Admission,
    ) -> Result<Admitted, Refused> {
        let hub = &self.hub;
        if self.is_draining() {
            return Err(Refused::Draining);
        }
        let unknown = || Refused::UnknownChannel(channel.chars().take(64).collect());
        let tenant = admission.tenant.as_deref();
        let mut channel = hub.channels.get(channel).ok_or_else(unknown)?.clone();
        let named = stream.and_then(|stream| channel.families.iter().find_map(|r| r.family().key_of(stream)));
        match key.or(named).or_else(|| log::keyed_rings::own_key(&channel, tenant)) {
            Some(_) if channel.families.is_empty() => {}
            Some(key) => channel = hub.members.keyed(&channel, key, tenant)?,
            None if channel.families.is_empty() || will_ask => {}
            None => {
                let families: Vec<&str> = channel.families.iter().map(|roster| roster.family().name()).collect();
                let problem = format!("is needed: this channel has the streams of a key, of {}", families.join(", "));
                return Err(BadParameter::new("key", problem).into());
            }
        }
        let rings = channel.rings_of(stream, tenant)?;
        let slot =
            hub.slots.take(peer, admission.principal.as_ref(), &channel.connections).ok_or(Refused::ConnectionLimit)?;
        Ok(Admitted { channel, rings, slot })
    }

    /// Tells a client why it was refused, by closing its socket with the code: to browsers the status of a refused
    /// handshake is not visible, so theirs is accepted and then ended like this. Takes a few seconds at most.
    pub async fn refuse<S>(&self, io: S, refused: &Refused)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
    {
        session::refuse(io, refused, &self.hub).await;
    }

    /// Clients and streams as they are now.
    pub fn status(&self) -> RelayStatus {
        let hub = &self.hub;
        let channel = |channel: &Arc<Channel>| ChannelStatus {
            name: channel.name.clone(),
            streams: channel.rings.iter().map(|ring| ring.stream().clone()).collect(),
            connections: usize::try_from(channel.connections.get()).unwrap_or(0),
        };
        let stream = |ring: &Arc<Ring>| {
            let (stream, mark) = (ring.stream().clone(), ring.mark());
            let (ring_entries, ring_bytes) = mark.as_ref().map_or((0, 0), |mark| (mark.entries, mark.bytes));
            let last = mark.as_ref().map_or(EntryId::MIN, |mark| mark.last);
            RelayedStream { stream, epoch: mark.map(|mark| mark.epoch), last, ring_entries, ring_bytes }
        };
        RelayStatus {
            connections: hub.slots.total(),
            is_draining: self.is_draining(),
            channels: hub.channels.values().map(channel).collect(),
            streams: hub.rings.iter().map(stream).collect(),
        }
    }
}

impl Hub {
    /// The lives of all relayed streams, once all have begun, and of these.
    fn epochs<'a>(&'a self, others: impl Iterator<Item = &'a Arc<Ring>>) -> Option<Vec<Epoch>> {
        self.rings.iter().chain(others).map(|ring| ring.mark().map(|mark| mark.epoch)).collect()
    }

    /// Whether a client that was live may be left to catch up.
    fn is_too_far_behind(&self, bytes: u64, age: Duration) -> bool {
        bytes > self.config.max_lag_bytes.as_u64() || age > self.config.max_lag_age
    }

    fn tail(&self, ring: &Arc<Ring>, part: &Part) -> Tail {
        let stream = ring.stream();
        let channels: Vec<&Arc<Channel>> =
            self.channels.values().filter(|channel| channel.rings.iter().any(|r| r.stream() == stream)).collect();
        let counters =
            |reason: &str| channels.iter().map(|c| c.gaps.with_label_values(&[&c.name, reason])).collect::<Vec<_>>();
        Tail {
            store: self.store.clone(),
            ring: ring.clone(),
            wakes: self.members.wakes_of(stream),
            gaps: Gaps {
                undecodable: counters("undecodable"),
                trimmed: counters("trimmed"),
                state_lost: counters("state_lost"),
            },
            part: part.clone(),
            membership: None,
        }
    }

    /// The tail of a member. Whether the family can be followed, its own part tells.
    fn member_tail(&self, wanted: log::keyed_rings::Wanted) -> Tail {
        let log::keyed_rings::Wanted { ring, wakes, membership, .. } = wanted;
        let is_of =
            |channel: &&Arc<Channel>| channel.families.iter().any(|known| Arc::ptr_eq(known, &membership.roster));
        let counters = |reason: &str| {
            let channels = self.channels.values().filter(is_of);
            channels.map(|c| c.gaps.with_label_values(&[&c.name, reason])).collect::<Vec<_>>()
        };
        Tail {
            store: self.store.clone(),
            wakes,
            gaps: Gaps {
                undecodable: counters("undecodable"),
                trimmed: counters("trimmed"),
                state_lost: counters("state_lost"),
            },
            part: Readiness::default().part(ring.stream().as_str(), None),
            membership: Some(membership),
            ring,
        }
    }
}

impl Channel {
    fn new(
        name: &str,
        rings: Vec<Arc<Ring>>,
        families: Vec<Arc<Roster>>,
        members: &Arc<Members>,
        metrics: &Metrics,
    ) -> Arc<Self> {
        let (bell, meter) = (Arc::<Bell>::default(), Meter::new(metrics, name));
        Arc::new_cyclic(|me| Self {
            name: name.to_owned(),
            rings,
            families,
            members: members.clone(),
            me: me.clone(),
            fanout: Fanout::new(bell.clone(), meter.clone()),
            bell,
            connections: metrics.relay_connections.with_label_values(&[name]),
            meter,
            catchups: metrics.relay_catchups.with_label_values(&[name]),
            gaps: metrics.relay_gaps.clone(),
            seen: metrics.relay_seen_seconds.with_label_values(&[name]),
        })
    }

    /// The same with these rings and no families, counted together.
    fn with_rings(&self, rings: Vec<Arc<Ring>>) -> Arc<Self> {
        let (bell, meter) = (Arc::<Bell>::default(), self.meter.clone());
        Arc::new_cyclic(|me| Self {
            name: self.name.clone(),
            rings,
            families: Vec::new(),
            members: self.members.clone(),
            me: me.clone(),
            fanout: Fanout::new(bell.clone(), meter.clone()),
            bell,
            connections: self.connections.clone(),
            meter,
            catchups: self.catchups.clone(),
            gaps: self.gaps.clone(),
            seen: self.seen.clone(),
        })
    }

    /// The rings of all its streams, or of the one asked for. Who is bound to a tenant is given its own alone.
    fn rings_of(&self, stream: Option<&StreamName>, tenant: Option<&str>) -> Result<Vec<Arc<Ring>>, Refused> {
        let Some(stream) = stream else { return Ok(self.rings.clone()) };
        if self.families.iter().any(|roster| roster.family().key_of(stream).is_some()) {
            return Ok(vec![self.members.ring(self, stream, tenant)?]);
        }
        let ring = self.rings.iter().find(|ring| ring.stream() == stream).ok_or_else(|| {
            let streams: Vec<&str> = self.rings.iter().map(|ring| ring.stream().as_str()).collect();
            BadParameter::new("stream", format!("must be one of this channel's: {}", streams.join(", ")))
        })?;
        Ok(vec![ring.clone()])
    }

    /// Counts something that a client can't be given.
    fn gap(&self, reason: &str) {
        self.gaps.with_label_values(&[&self.name, reason]).inc();
    }
}
