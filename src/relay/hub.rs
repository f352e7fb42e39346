//! The state that all sessions of this instance share, and the channels that clients watch.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::event::{Epoch, StreamName};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::relay::config::Config;
use crate::relay::log::keyed_rings::{KeyedRings, TENANT, may_watch};
use crate::relay::log::ring::Ring;
use crate::relay::metrics::ChannelMetrics;
use crate::relay::session::admission::ConnectError;
use crate::relay::session::broadcast::Fanout;
use crate::relay::session::limits::ConnectionLimiter;
use crate::relay::session::notify::Broadcast;
use crate::relay::subscription::params::BadParameter;
use crate::store::{FamilyMembers, Store};

/// The state that all sessions share.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(super) store: Arc<dyn Store>,
    pub(super) config: Config,
    pub(super) channels: BTreeMap<String, Arc<Channel>>,
    /// The rings of all relayed streams that are not in a family.
    pub(super) rings: Vec<Arc<Ring>>,
    pub(super) keyed_rings: Arc<KeyedRings>,
    /// Channels with the streams of one key in place of their families, by channel and key.
    pub(super) keyed_channels: Mutex<HashMap<(String, String), Weak<Channel>>>,
    pub(super) limiter: Arc<ConnectionLimiter>,
    /// Limits concurrent reads of pages.
    pub(super) page_permits: Semaphore,
    /// Reads of pages in progress.
    pub(super) page_reads: TaskTracker,
    /// Notified when this instance drains.
    pub(super) draining: Arc<Broadcast>,
    pub(super) metrics: Metrics,
    /// One readiness part per ring.
    pub(super) parts: Vec<Part>,
}

impl Hub {
    /// Returns the epochs of all relayed streams and of `others`, or `None` if one has not begun.
    pub(super) fn known_epochs<'a>(&'a self, others: impl Iterator<Item = &'a Arc<Ring>>) -> Option<Vec<Epoch>> {
        self.rings.iter().chain(others).map(|ring| ring.snapshot().map(|snapshot| snapshot.epoch)).collect()
    }

    /// Returns whether a client that was live lags more than the configuration allows.
    pub(super) fn is_too_far_behind(&self, bytes: u64, age: Duration) -> bool {
        bytes > self.config.max_lag_bytes.as_u64() || age > self.config.max_lag_age
    }

    /// Returns the channel with the streams of `key` in place of its families.
    pub(super) fn keyed_channel(
        &self,
        channel: &Channel,
        key: &str,
        tenant: Option<&str>,
    ) -> Result<Arc<Channel>, ConnectError> {
        let name = (channel.name.clone(), key.to_owned());
        let mut members = Vec::with_capacity(channel.families.len());
        for family_members in &channel.families {
            let member = family_members.family().member(key).map_err(|error| BadParameter::new("key", error.to_string()))?;
            members.push((family_members, member));
        }
        if let Some((_, member)) = members.iter().find(|(family_members, member)| !may_watch(family_members, member, tenant)) {
            return Err(ConnectError::Forbidden(format!("stream `{member}` belongs to another tenant")));
        }
        if let Some(known) = self.lock_keyed_channels().get(&name).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let mut rings = channel.rings.clone();
        for (_, member) in &members {
            rings.push(channel.member_ring(member, tenant)?);
        }
        let mut keyed_channels = self.lock_keyed_channels();
        if let Some(known) = keyed_channels.get(&name).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let keyed = Arc::new(channel.with_rings(rings));
        for ring in &keyed.rings {
            self.keyed_rings.notify_on_change(ring.stream(), &keyed.fanout);
        }
        keyed_channels.insert(name, Arc::downgrade(&keyed));
        Ok(keyed)
    }

    /// Removes rings and channels of keys that no client watches.
    pub(super) fn sweep(&self) {
        self.lock_keyed_channels().retain(|_, channel| channel.strong_count() > 0);
        self.keyed_rings.sweep();
    }

    fn lock_keyed_channels(&self) -> MutexGuard<'_, HashMap<(String, String), Weak<Channel>>> {
        self.keyed_channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A named set of streams, with the metrics of its clients.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(super) name: String,
    pub(super) rings: Vec<Arc<Ring>>,
    /// The families among its streams. Clients watch single members of them.
    pub(super) families: Vec<Arc<FamilyMembers>>,
    keyed_rings: Arc<KeyedRings>,
    /// Notified of every change of its rings.
    pub(super) broadcast: Arc<Broadcast>,
    /// The clients that wait for new entries only.
    pub(super) fanout: Arc<Fanout>,
    pub(super) connections: IntGauge,
    pub(super) metrics: ChannelMetrics,
    pub(super) catchups: IntCounter,
    pub(super) gaps: IntCounterVec,
    /// The age of entries when clients acknowledge that a person has seen them.
    pub(super) ack_delay: Histogram,
}

impl Channel {
    pub(super) fn new(
        name: &str,
        rings: Vec<Arc<Ring>>,
        families: Vec<Arc<FamilyMembers>>,
        keyed_rings: &Arc<KeyedRings>,
        metrics: &Metrics,
    ) -> Self {
        let (broadcast, channel_metrics) = (Arc::<Broadcast>::default(), ChannelMetrics::new(metrics, name));
        Self {
            name: name.to_owned(),
            rings,
            families,
            keyed_rings: keyed_rings.clone(),
            fanout: Fanout::new(broadcast.clone(), channel_metrics.clone()),
            broadcast,
            connections: metrics.relay_connections.with_label_values(&[name]),
            metrics: channel_metrics,
            catchups: metrics.relay_catchups.with_label_values(&[name]),
            gaps: metrics.relay_gaps.clone(),
            ack_delay: metrics.relay_seen_seconds.with_label_values(&[name]),
        }
    }

    /// Copies the channel with other rings and without families. Both share their metrics.
    fn with_rings(&self, rings: Vec<Arc<Ring>>) -> Self {
        let (broadcast, metrics) = (Arc::<Broadcast>::default(), self.metrics.clone());
        Self {
            name: self.name.clone(),
            rings,
            families: Vec::new(),
            keyed_rings: self.keyed_rings.clone(),
            fanout: Fanout::new(broadcast.clone(), metrics.clone()),
            broadcast,
            connections: self.connections.clone(),
            metrics,
            catchups: self.catchups.clone(),
            gaps: self.gaps.clone(),
            ack_delay: self.ack_delay.clone(),
        }
    }

    /// Returns the rings of all its streams, or the ring of `stream`. A client of a tenant gets members of its tenant
    /// only.
    pub(super) fn rings_of(
        &self,
        stream: Option<&StreamName>,
        tenant: Option<&str>,
    ) -> Result<Vec<Arc<Ring>>, ConnectError> {
        let Some(stream) = stream else { return Ok(self.rings.clone()) };
        if self.families.iter().any(|family_members| family_members.family().key_of(stream).is_some()) {
            return Ok(vec![self.member_ring(stream, tenant)?]);
        }
        let ring = self.rings.iter().find(|ring| ring.stream() == stream).ok_or_else(|| {
            let streams: Vec<&str> = self.rings.iter().map(|ring| ring.stream().as_str()).collect();
            BadParameter::new("stream", format!("must be one of this channel's: {}", streams.join(", ")))
        })?;
        Ok(vec![ring.clone()])
    }

    /// Returns the ring of a member of its families, and has the fan-out notified of the ring's changes.
    fn member_ring(&self, stream: &StreamName, tenant: Option<&str>) -> Result<Arc<Ring>, ConnectError> {
        let family_members = self.families.iter().find(|family_members| family_members.family().key_of(stream).is_some());
        let family_members = family_members.ok_or_else(|| BadParameter::new("stream", format!("`{stream}` is not in this channel")))?;
        self.keyed_rings.ring(family_members, stream, tenant, &self.fanout)
    }

    /// Returns the key of a client's tenant if all families of the channel are by tenant.
    pub(super) fn key_of_tenant<'a>(&self, tenant: Option<&'a str>) -> Option<&'a str> {
        let is_by_tenant = |family_members: &Arc<FamilyMembers>| family_members.family().placeholder() == TENANT;
        tenant.filter(|_| !self.families.is_empty() && self.families.iter().all(is_by_tenant))
    }

    /// Counts a gap of one client.
    pub(super) fn count_gap(&self, reason: &str) {
        self.gaps.with_label_values(&[&self.name, reason]).inc();
    }
}
