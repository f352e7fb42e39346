//! The guard of a group whose consumers live outside the daemon.
//!
//! Keeps the group declared, so that nothing is missed while no consumer runs. Hands on what consumers left half done:
//! most of them read new entries only, so the entry is appended again for this group. What was delivered too often goes
//! to the dead letters. Any number of daemons may guard one group; the store lets one of them act on each entry.

pub(super) mod family;
mod monitor;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::delivery::GroupSpec;
pub(crate) use crate::delivery::redelivery::monitor::{Pace, Ward};
use crate::event::ConsumerName;
use crate::log_throttle::ThrottledWarning;
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::store::{Store, StoreError};

/// How long giving up the guard's own consumer may take at the end.
pub(super) const LEAVE_TIME: Duration = Duration::from_secs(5);

/// Guards one group without a sink.
#[derive(Debug)]
pub struct Guard {
    ward: Ward,
    part: Part,
    trouble: ThrottledWarning,
    bell: Arc<Notify>,
}

impl Guard {
    /// A guard that is not running yet.
    ///
    /// `consumer` is the name under which it holds entries while it gives them up.
    pub fn new(store: Arc<dyn Store>, spec: GroupSpec, consumer: ConsumerName, metrics: &Metrics, part: Part) -> Self {
        let (label, pace) = (spec.stream.clone(), Pace::of_stream(spec.config.claim_idle));
        let ward = Ward::new(store, spec, consumer, metrics, label.as_str(), pace);
        Self { ward, part, trouble: ThrottledWarning::default(), bell: Arc::default() }
    }

    /// The same with a bell: when it rings, there is something to hand on.
    #[must_use]
    pub fn with_bell(mut self, bell: Arc<Notify>) -> Self {
        self.bell = bell;
        self
    }

    /// Guards until `stop`; what it is about to do then, it finishes.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let result = self.ward.step().await;
            self.report(result);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = sleep_until(self.ward.next_at()) => {}
                () = self.bell.notified() => self.ward.hear_bell(),
            }
        }
        if timeout(LEAVE_TIME, self.ward.leave()).await.is_err() {
            debug!("the guard's consumer stays in its group: the store does not answer");
        }
    }

    fn report(&mut self, result: Result<(), StoreError>) {
        let (stream, group) = self.ward.name();
        match result {
            Ok(()) => {
                self.part.ready();
                if let Some(after) = self.trouble.ended() {
                    info!(%stream, %group, ?after, "guards the group again");
                }
            }
            Err(error) => {
                if let Some(times) = self.trouble.occurred() {
                    let kind = error.kind().as_str();
                    warn!(%stream, %group, error = %error, kind, times, "cannot guard the group");
                }
                self.part.not_ready(error.to_string());
            }
        }
    }
}
