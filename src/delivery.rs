//! Delivery: the workers that bring a group's entries to its sink.
//!
//! Owns what happens between [`Store::fetch`] and [`Store::settle`]: batches, deadlines, retries, dead letters, taking
//! over what crashed workers left, and handing back at the end. It promises that an entry leaves a group only
//! acknowledged after its sink took it, as a dead letter, or counted as filtered or lost. It knows nothing of the
//! relay, of HTTP, or of which store and sink it works with. Groups without a sink have a [`Redeliverer`] instead.
//!
//! One [`Worker`] is one consumer of one group. It fetches the next batch while the sink handles the last one and the
//! one before it is being acknowledged; each of these three steps has at most one store call under way, and what
//! comes up meanwhile goes into the next call together.

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
pub use config::{GroupConfig, GroupStart};
pub use ordering::{InvalidOrderBy, OnPoison, OrderBy, Ordering};
pub use policy::{RetryPolicy, Verdict};

pub use crate::delivery::worker::event_loop::Quarantine;
use crate::delivery::worker::event_loop::{End, Pump};
use crate::delivery::worker::leases::{Applicant, Lost};
use crate::event::{ConsumerName, StreamName, StreamPattern};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::sink::Sink;
use crate::store::{Roster, Store};

/// How long a worker that is told to stop lets the sink finish what it has begun.
const GRACE: Duration = Duration::from_secs(20);

/// How long a consumer's name stays taken without a sign of life of its worker.
const NAME_TTL: Duration = Duration::from_secs(3);

/// Which group a worker works for, and how.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// The stream.
    pub stream: StreamName,
    /// The stream that its dead letters go to.
    pub dead_letter: StreamName,
    /// The group.
    pub config: GroupConfig,
}

/// A group of every member of a family.
#[derive(Debug, Clone)]
pub struct FamilyGroup {
    /// The family and its members.
    pub roster: Arc<Roster>,
    /// The streams that their dead letters go to, each with a member's key.
    pub dead_letter: StreamPattern,
    /// The group.
    pub config: GroupConfig,
}

impl FamilyGroup {
    /// The group of a member.
    fn member(&self, stream: StreamName) -> GroupSpec {
        let key = self.roster.family().key_of(&stream);
        let dead_letter = key.and_then(|key| self.dead_letter.of_key(key).ok());
        let dead_letter = dead_letter.expect("the configuration was checked with the longest key");
        GroupSpec { stream, dead_letter, config: self.config.clone() }
    }
}

/// How long a worker stays with a member of a family.
#[derive(Debug, Clone)]
struct Stay {
    /// What it is counted under.
    label: Arc<str>,
    /// After how long without entries it ends.
    leave_after: Duration,
    /// Whether others wait for room, so that it ends at once.
    is_crowded: Arc<AtomicBool>,
}

/// One consumer of a group: brings entries to a sink and settles them.
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
    /// Where the stream is of a family.
    family: Option<Stay>,
}

impl Worker {
    /// A worker that is not running yet.
    ///
    /// `consumer` is its name in the group, the same after each restart: what is pending on it is taken for left over
    /// by an earlier life. Where another worker is found alive under that name, this one takes another. All workers of a
    /// process share one `quarantine`. `readiness` hears of it whenever a fetch succeeded, about every second.
    pub fn new(
        store: Arc<dyn Store>,
        sink: Arc<dyn Sink>,
        group: GroupSpec,
        consumer: ConsumerName,
        quarantine: Quarantine,
        metrics: Metrics,
        readiness: Part,
    ) -> Self {
        let (grace, name_ttl) = (GRACE, NAME_TTL);
        Self { store, sink, group, consumer, quarantine, metrics, readiness, grace, name_ttl, family: None }
    }

    /// The same with another time to finish in after being told to stop, instead of 20 s.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// The same with another time that its consumer's name stays taken after a crash, instead of 3 s.
    #[must_use]
    pub fn with_name_lease(mut self, ttl: Duration) -> Self {
        self.name_ttl = ttl;
        self
    }

    /// The same for a member of the family of that name, under which it is counted: the worker ends once there has been
    /// nothing to do for that long, or at all where it is crowded.
    #[must_use]
    pub fn of_family(mut self, name: &str, leave_after: Duration, is_crowded: Arc<AtomicBool>) -> Self {
        self.family = Some(Stay { label: name.into(), leave_after, is_crowded });
        self
    }

    /// Works until `stop` is cancelled, then finishes what the sink has begun, settles it, and hands the rest back;
    /// that takes the grace time and 5 s at most. Failures of store and sink are waited out, however long.
    ///
    /// Dropping the future is a crash: what is in hand stays pending until this consumer runs again or another one
    /// takes it over.
    pub async fn run(self, stop: CancellationToken) {
        let applicant = Applicant::new(&self, &stop);
        while let Some(tenure) = applicant.begin().await {
            let span = info_span!(
                "worker",
                stream = %self.group.stream,
                group = %self.group.config.name,
                consumer = %tenure.consumer
            );
            let pump = Pump::new(&self, &tenure, stop.clone());
            let lost = tokio::select! {
                biased;
                end = pump.run().instrument(span.clone()) => match end {
                    End::Stopped => return applicant.end(&tenure).await,
                    End::LeaseLost => Lost::Turn,
                },
                lost = applicant.keep(&tenure) => lost,
            };
            // What it had in hand is pending still, and whoever comes next takes it over. A turn is not given up here, it
            // runs out: calls of the sink that were broken off may take a moment to end.
            span.in_scope(|| match lost {
                Lost::Name => warn!("another daemon has taken this consumer's name; beginning anew"),
                Lost::Turn => warn!("the group's lease was not renewed in time; beginning anew"),
            });
        }
    }
}
