//! Delivery: the workers that bring the entries of a group to its sink.
//!
//! Owns the path from [`Store::fetch`] to [`Store::settle`]: batches, timeouts, retries, dead letters, the recovery of
//! entries that crashed workers left, and the release of entries when a worker stops. It promises that an entry leaves a
//! group in one of three ways: acknowledged after its sink took it, as a dead letter, or counted as filtered or lost. It
//! knows neither the relay nor HTTP, nor the kind of store and sink. A group without a sink has a
//! [`Redeliverer`] instead.
//!
//! One [`Worker`] is one consumer of one group. It fetches a batch while the sink handles the previous one, and while
//! the one before that is acknowledged. Each of these steps has at most one call of the store under way. Entries that
//! become ready meanwhile go into the next call together.

mod ack_floor;
mod config;
mod family_workers;
mod ordering;
mod policy;
mod redelivery;
mod worker;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info_span, warn};

pub use crate::delivery::family_workers::FamilyWorkers;
pub use crate::delivery::redelivery::Redeliverer;
pub use crate::delivery::worker::breaker::BreakerPolicy;
pub use crate::delivery::worker::poison::Quarantine;
pub use config::{GroupConfig, GroupStart};
pub use ordering::{InvalidOrderBy, OnPoison, OrderBy, Ordering};
pub use policy::{RetryPolicy, Verdict};

use crate::delivery::worker::event_loop::{LoopEnd, WorkerLoop};
use crate::delivery::worker::leases::{LeaseManager, LostLease};
use crate::event::{ConsumerName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::sink::Sink;
use crate::store::{FamilyMembers, Store};

/// How long the sink may take to end its calls when a worker stops.
const GRACE: Duration = Duration::from_secs(20);

/// How long a name lease lasts without a renewal.
const NAME_TTL: Duration = Duration::from_secs(3);

/// A group of one stream.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// The stream.
    pub stream: StreamName,
    /// The stream of its dead letters.
    pub dead_letter: StreamName,
    /// The configuration of the group.
    pub config: GroupConfig,
}

/// A group of every member of a family.
#[derive(Debug, Clone)]
pub struct FamilyGroup {
    /// The family and its members.
    pub family_members: Arc<FamilyMembers>,
    /// The streams of the dead letters, each with the key of a member.
    pub dead_letter: StreamPattern,
    /// The configuration of the group.
    pub config: GroupConfig,
}

impl FamilyGroup {
    /// Returns the group of one member.
    fn member(&self, stream: StreamName) -> GroupSpec {
        let key = self.family_members.family().key_of(&stream);
        let dead_letter = key.and_then(|key| self.dead_letter.of_key(key).ok());
        let dead_letter = dead_letter.expect("the configuration was checked with the longest key");
        GroupSpec { stream, dead_letter, config: self.config.clone() }
    }
}

/// How long a worker of a family member stays without entries.
#[derive(Debug, Clone)]
pub(crate) struct IdlePolicy {
    /// The stream in the labels of its metrics.
    label: Arc<str>,
    /// The time without entries after which the worker ends.
    leave_after: Duration,
    /// Whether other members wait for a worker. Then an idle worker ends at once.
    is_crowded: Arc<AtomicBool>,
}

/// One consumer of a group: passes entries to a sink and settles them.
#[derive(Debug)]
pub struct Worker {
    store: Arc<dyn Store>,
    sink: Arc<dyn Sink>,
    group: GroupSpec,
    consumer: ConsumerName,
    quarantine: Quarantine,
    metrics: Metrics,
    readiness: Part,
    grace: Duration,
    name_ttl: Duration,
    /// Set if the stream is a member of a family.
    idle_policy: Option<IdlePolicy>,
}

impl Worker {
    /// Returns a worker that does not run yet.
    ///
    /// `consumer` is its name in the group, the same after each restart: entries that are pending on it are recovered.
    /// If another worker has that name, this one takes a numbered name. All workers of a process share one
    /// `quarantine`. The worker reports to `readiness` about every second.
    pub fn new(
        store: Arc<dyn Store>,
        sink: Arc<dyn Sink>,
        group: GroupSpec,
        consumer: ConsumerName,
        quarantine: Quarantine,
        metrics: Metrics,
        readiness: Part,
    ) -> Self {
        let (grace, name_ttl, idle_policy) = (GRACE, NAME_TTL, None);
        Self { store, sink, group, consumer, quarantine, metrics, readiness, grace, name_ttl, idle_policy }
    }

    /// Sets the time in which the sink may end its calls when the worker stops, instead of 20 s.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets how long the name lease lasts after a crash, instead of 3 s.
    #[must_use]
    pub fn with_name_lease(mut self, ttl: Duration) -> Self {
        self.name_ttl = ttl;
        self
    }

    /// Makes it the worker of a member of the family `name`, which is the stream in its metrics.
    ///
    /// It ends after `leave_after` without entries, or as soon as it is idle while `is_crowded` is set.
    #[must_use]
    pub fn of_family(mut self, name: &str, leave_after: Duration, is_crowded: Arc<AtomicBool>) -> Self {
        self.idle_policy = Some(IdlePolicy { label: name.into(), leave_after, is_crowded });
        self
    }

    /// Works until `stop` is cancelled. Failures of the store and the sink are waited out.
    ///
    /// When it stops, the worker lets the calls of the sink end, settles their entries and releases the others. That
    /// takes at most the grace time and 5 s. A dropped future is a crash: the entries in flight stay pending until this
    /// consumer runs again, or until another one claims them.
    pub async fn run(self, stop: CancellationToken) {
        let manager = LeaseManager::new(&self, &stop);
        while let Some(leases) = manager.acquire().await {
            let span = info_span!(
                "worker",
                stream = %self.group.stream,
                group = %self.group.config.name,
                consumer = %leases.consumer
            );
            let event_loop = WorkerLoop::new(&self, &leases, stop.clone());
            let lost = tokio::select! {
                biased;
                end = event_loop.run().instrument(span.clone()) => match end {
                    LoopEnd::Stopped => return manager.release(&leases).await,
                    LoopEnd::LeaseLost => LostLease::Group,
                },
                lost = manager.renew(&leases) => lost,
            };
            // Its entries are still pending, and the next worker claims them. The group lease is not released, because
            // calls of the sink that were cancelled may take a moment to end. It runs out.
            span.in_scope(|| match lost {
                LostLease::Name => warn!("name lease lost to another daemon, starting again"),
                LostLease::Group => warn!("group lease not renewed in time, starting again"),
            });
        }
    }
}
