//! Delivery: the workers that bring a group's entries to its sink.
//!
//! Owns what happens between [`Store::fetch`] and [`Store::settle`]: batches, deadlines, retries, dead letters, taking
//! over what crashed workers left, and handing back at the end. It promises that an entry leaves a group only
//! acknowledged after its sink took it, as a dead letter, or counted as filtered or lost. It knows nothing of the
//! relay, of HTTP, or of which store and sink it works with. Groups consumed from outside have a [`Guard`] instead.
//!
//! One [`Worker`] is one consumer of one group. It fetches the next batch while the sink handles the last one and the
//! one before it is being acknowledged; each of these three steps has at most one store call under way, and what
//! comes up meanwhile goes into the next call together.

mod breaker;
mod call;
mod config;
mod guard;
mod ledger;
mod meters;
mod outbox;
mod patience;
mod policy;
mod pump;
mod reaper;
mod retention;
mod retries;
mod sampler;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info_span};

pub use breaker::BreakerPolicy;
pub use config::{GroupConfig, GroupStart, InvalidValue};
pub use guard::Guard;
pub use policy::{RetryPolicy, Verdict};
pub use reaper::Reaper;
pub use retention::{Janitor, Retention, StreamSpec, WhenFull};
pub use sampler::Sampler;

use self::pump::Pump;
use crate::event::{ConsumerName, StreamName};
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::sink::Sink;
use crate::store::Store;

/// How long a worker that is told to stop lets the sink finish what it has begun.
const GRACE: Duration = Duration::from_secs(20);

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

/// One consumer of a group: brings entries to a sink and settles them.
#[derive(Debug)]
pub struct Worker {
    store: Arc<dyn Store>,
    sink: Arc<dyn Sink>,
    group: GroupSpec,
    consumer: ConsumerName,
    metrics: Metrics,
    readiness: Part,
    grace: Duration,
}

impl Worker {
    /// A worker that is not running yet.
    ///
    /// `consumer` is its name in the group, the same after each restart, and of no other worker at a time: what is
    /// pending on it is taken for left over by an earlier life. `readiness` hears of it whenever a fetch
    /// succeeded, about every second.
    pub fn new(
        store: Arc<dyn Store>,
        sink: Arc<dyn Sink>,
        group: GroupSpec,
        consumer: ConsumerName,
        metrics: Metrics,
        readiness: Part,
    ) -> Self {
        Self { store, sink, group, consumer, metrics, readiness, grace: GRACE }
    }

    /// The same with another time to finish in after being told to stop, instead of 20 s.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Works until `stop` is cancelled, then finishes what the sink has begun, settles it, and hands the rest back;
    /// that takes the grace time and 5 s at most. Failures of store and sink are waited out, however long.
    ///
    /// Dropping the future is a crash: what is in hand stays pending until this consumer runs again or another one
    /// takes it over.
    pub async fn run(self, stop: CancellationToken) {
        let span = info_span!(
            "worker",
            stream = %self.group.stream,
            group = %self.group.config.name,
            consumer = %self.consumer
        );
        Pump::new(self, stop).run().instrument(span).await;
    }
}
