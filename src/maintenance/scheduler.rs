//! Scheduler of the maintenance tasks: describes each stream once per interval, for all tasks together.
//!
//! A check hands the status of a stream to the sampler (gauges and loss detection), to the janitor (retention) and to
//! the reaper, in this order. The trim comes early, because its status must be fresh. After an unavailable store the
//! check ends at once, so that one failing stream does not delay the others.
//!
//! - A declared stream is checked every 5 s.
//! - A stream near its hard limit is checked every 500 ms.
//! - A member of a family is checked within 5 s if it has new or unsettled entries, and otherwise once per minute.
//! - Each of them is checked at least four times per `reap_after` of its groups, so that idle consumers are removed in
//!   time. A short `reap_after` therefore shortens the other intervals.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::jittered;
use crate::delivery::GroupConfig;
use crate::event::{ConsumerName, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::maintenance::consumer_reaper::Reaper;
use crate::maintenance::retention::Janitor;
use crate::maintenance::round_robin::MemberSchedule;
use crate::maintenance::sampler::Sampler;
use crate::maintenance::{FamilySpec, StreamSpec};
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::store::{HardLimits, Store, StoreError, StoreErrorKind};

/// The interval between checks of a stream.
const INTERVAL: Duration = Duration::from_secs(5);
/// The interval between checks of a stream that is near its hard limit.
const NEAR_FULL_INTERVAL: Duration = Duration::from_millis(500);
/// The interval between checks of an idle member of a family.
const MEMBER_INTERVAL: Duration = Duration::from_mins(1);
/// The minimum interval between checks for idle consumers.
const MIN_REAP_INTERVAL: Duration = Duration::from_millis(250);
/// The time limit for describing a stream, and for sampling it.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs the maintenance of all declared streams.
#[derive(Debug)]
pub struct Scheduler {
    targets: Vec<MaintenanceTarget>,
    tasks: Tasks,
    failing: BTreeSet<StreamName>,
    warning: ThrottledWarning,
}

/// A declared stream or family, with the times of its checks.
#[derive(Debug)]
struct MaintenanceTarget {
    streams: TargetStreams,
    sampler: Sampler,
    interval: Duration,
    check_at: Instant,
    near_full: BTreeSet<StreamName>,
    check_near_full_at: Instant,
}

#[derive(Debug)]
enum TargetStreams {
    Fixed(StreamSpec),
    Family { spec: FamilySpec, schedule: MemberSchedule },
}

impl Scheduler {
    /// Creates a scheduler for these streams. Each is a part of `readiness` that is always ready and warns of losses.
    pub fn new(
        store: Arc<dyn Store>,
        streams: Vec<StreamSpec>,
        limits: HardLimits,
        metrics: Metrics,
        readiness: &Readiness,
    ) -> Self {
        let target = |spec: StreamSpec| {
            let interval = reap_interval(&spec.groups).min(INTERVAL);
            let sampler = Sampler::of_stream(&spec.name, metrics.clone(), readiness);
            MaintenanceTarget::new(TargetStreams::Fixed(spec), sampler, interval)
        };
        let targets = streams.into_iter().map(target).collect();
        let (janitor, reaper) = (Janitor::new(limits, metrics.clone()), Reaper::new(metrics));
        let tasks = Tasks { store, janitor, reaper };
        Self { targets, tasks, failing: BTreeSet::new(), warning: ThrottledWarning::default() }
    }

    /// Adds the members of these families. Their gauges are summed under the name of the family.
    #[must_use]
    pub fn with_families(
        mut self,
        families: impl IntoIterator<Item = FamilySpec>,
        metrics: &Metrics,
        readiness: &Readiness,
    ) -> Self {
        self.targets.extend(families.into_iter().map(|spec| {
            let reap_interval = reap_interval(&spec.groups);
            let interval = reap_interval.min(INTERVAL);
            let turns = reap_interval.min(MEMBER_INTERVAL).as_millis() / interval.as_millis();
            let schedule = MemberSchedule::new(usize::try_from(turns).unwrap_or(1));
            let sampler = Sampler::of_family(Arc::clone(&spec.family_members), metrics.clone(), readiness);
            MaintenanceTarget::new(TargetStreams::Family { spec, schedule }, sampler, interval)
        }));
        self
    }

    /// Sets the names of this daemon's consumers, which are never removed.
    #[must_use]
    pub fn with_own_consumers(mut self, own: HashSet<ConsumerName>) -> Self {
        self.tasks.reaper.set_own_consumers(own);
        self
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(async {
            loop {
                self.check_due().await;
                match self.targets.iter().map(MaintenanceTarget::next_due).min() {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            }
        })
        .await;
    }

    async fn check_due(&mut self) {
        for target in &mut self.targets {
            if target.next_due() > Instant::now() {
                continue;
            }
            let is_full_check = target.check_at <= Instant::now();
            for stream in target.due_streams(is_full_check) {
                let spec = target.streams.spec(stream.clone());
                let (is_near_full, result) = self.tasks.check(&spec, &mut target.sampler).await;
                if is_near_full {
                    target.near_full.insert(stream.clone());
                } else {
                    target.near_full.remove(&stream);
                }
                report(&mut self.failing, &mut self.warning, stream, result);
            }
            target.sampler.show();
            target.check_near_full_at = Instant::now() + NEAR_FULL_INTERVAL;
            if is_full_check {
                target.check_at = Instant::now() + jittered(target.interval);
            }
        }
    }
}

impl MaintenanceTarget {
    fn new(streams: TargetStreams, sampler: Sampler, interval: Duration) -> Self {
        let now = Instant::now();
        Self { streams, sampler, interval, check_at: now, near_full: BTreeSet::new(), check_near_full_at: now }
    }

    fn next_due(&self) -> Instant {
        if self.near_full.is_empty() { self.check_at } else { self.check_at.min(self.check_near_full_at) }
    }

    /// Returns the streams to check now: those near their hard limit, and in a full check all that are due.
    fn due_streams(&mut self, is_full_check: bool) -> BTreeSet<StreamName> {
        let mut due = self.near_full.clone();
        if is_full_check {
            match &mut self.streams {
                TargetStreams::Fixed(spec) => due.extend([spec.name.clone()]),
                TargetStreams::Family { spec, schedule } => {
                    due.extend(schedule.next(spec.family_members.newest()));
                    due.extend(self.sampler.unsettled().cloned());
                }
            }
        }
        due
    }
}

impl TargetStreams {
    fn spec(&self, stream: StreamName) -> StreamSpec {
        match self {
            Self::Fixed(spec) => spec.clone(),
            Self::Family { spec, .. } => spec.member(stream),
        }
    }
}

#[derive(Debug)]
struct Tasks {
    store: Arc<dyn Store>,
    janitor: Janitor,
    reaper: Reaper,
}

impl Tasks {
    /// Describes a stream and runs all tasks on its status. Returns whether the stream is near its hard limit.
    async fn check(&mut self, spec: &StreamSpec, sampler: &mut Sampler) -> (bool, Result<(), StoreError>) {
        let store = &*self.store;
        let known_length = self.janitor.known_length(&spec.name);
        let status = match in_time(store.describe(&spec.name)).await {
            Ok(status) => status,
            Err(error) => return (false, Err(error)),
        };
        let status = status.as_ref();
        let sampled = in_time(sampler.sample(store, spec, status)).await;
        if is_unavailable(&sampled) {
            return (false, sampled);
        }
        let label = sampler.label();
        let enforced = self.janitor.enforce(store, spec, label, known_length, status).await;
        if is_unavailable(&enforced) {
            return (false, enforced.map(|_length| ()));
        }
        let is_near_full = enforced.as_ref().is_ok_and(|length| spec.retention.is_near_full(*length));
        let reaped = self.reaper.reap(store, spec, label, status).await;
        (is_near_full, sampled.and(enforced.map(|_length| ())).and(reaped))
    }
}

fn is_unavailable<T>(result: &Result<T, StoreError>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == StoreErrorKind::Unavailable)
}

/// Logs the result of a check: a warning now and then while any stream fails, and one line after all have recovered.
fn report(
    failing: &mut BTreeSet<StreamName>,
    warning: &mut ThrottledWarning,
    stream: StreamName,
    result: Result<(), StoreError>,
) {
    if let Err(error) = result {
        if let Some(times) = warning.occurred() {
            let kind = error.kind().as_str();
            warn!(%stream, error = %error, kind, times, "stream maintenance failed, retrying");
        }
        failing.insert(stream);
    } else if failing.remove(&stream)
        && failing.is_empty()
        && let Some(after) = warning.ended()
    {
        info!(?after, "stream maintenance recovered");
    }
}

/// Returns the interval at which a stream must be checked for idle consumers of its groups.
fn reap_interval(groups: &[GroupConfig]) -> Duration {
    let shortest = groups.iter().map(|config| config.reap_after).min();
    shortest.map_or(MEMBER_INTERVAL, |shortest| (shortest / 4).clamp(MIN_REAP_INTERVAL, MEMBER_INTERVAL))
}

async fn in_time<T>(step: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let timed_out = |_elapsed| Err(StoreError::new(StoreErrorKind::Unavailable, "the store timed out"));
    timeout(STEP_TIMEOUT, step).await.unwrap_or_else(timed_out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maintenance::Retention;

    #[test]
    fn reap_interval_is_a_quarter_of_the_shortest_reap_after() {
        let group = |reap_after| {
            let mut config = GroupConfig::new("siem".parse().expect("a valid name"));
            config.reap_after = reap_after;
            config
        };
        assert_eq!(reap_interval(&[]), MEMBER_INTERVAL);
        let groups = [Duration::from_secs(40), Duration::from_hours(1)].map(group);
        assert_eq!(reap_interval(&groups), Duration::from_secs(10));
        assert_eq!(reap_interval(&[group(Duration::from_hours(24))]), MEMBER_INTERVAL);
        assert_eq!(reap_interval(&[group(Duration::from_millis(1))]), MIN_REAP_INTERVAL);
    }

    #[test]
    fn target_is_due_early_only_with_streams_near_full() {
        let stream: StreamName = "it:stream".parse().expect("a valid name");
        let spec = StreamSpec { name: stream.clone(), retention: Retention::default(), groups: Vec::new() };
        let sampler = Sampler::of_stream(&stream, Metrics::new(), &Readiness::default());
        let mut target = MaintenanceTarget::new(TargetStreams::Fixed(spec), sampler, INTERVAL);
        let now = target.check_at;
        (target.check_at, target.check_near_full_at) = (now + INTERVAL, now + NEAR_FULL_INTERVAL);
        assert_eq!((target.next_due(), target.due_streams(false).len()), (now + INTERVAL, 0));
        assert_eq!(target.due_streams(true).len(), 1);
        target.near_full.insert(stream);
        assert_eq!((target.next_due(), target.due_streams(false).len()), (now + NEAR_FULL_INTERVAL, 1));
    }
}
