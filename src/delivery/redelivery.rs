//! Redelivery for groups whose consumers are external: abandoned entries reach other consumers or the dead letters.
//!
//! Owns the existence of such a group, so that it misses no entries while no consumer runs. Most external consumers read
//! new entries only, so an abandoned entry is appended again for its group. An entry with too many deliveries is
//! dead-lettered. Any number of daemons may run a redeliverer for one group: the store lets one of them act on each
//! entry.
//!
//! A stream on its own is handled like a family with one member. Members of a family are checked when they appear, soon
//! after new entries, several times per `claim_idle` while entries are pending, and else about once per `claim_idle`.

mod monitor;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::delivery::redelivery::monitor::{GroupMonitor, Schedule};
use crate::delivery::{FamilyGroup, GroupSpec};
use crate::event::{ConsumerName, EntryId, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::metrics::Metrics;
use crate::readiness::Part;
use crate::store::{FamilyMembers, Store, StoreError, StoreErrorKind};

/// The time limit for removing the redeliverer's consumer from its groups at the end.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which a family is checked for new members and new entries.
const TICK: Duration = Duration::from_secs(1);
/// The maximum number of members, and the maximum time, of one pass. Readiness is reported between passes.
const MAX_CHECKS: usize = 16;
const MAX_PASS_TIME: Duration = Duration::from_secs(5);
/// The maximum number of notifications that are received together.
const MAX_NOTIFICATIONS: usize = 64;

/// Redelivers abandoned entries of one group of a stream, or of every member of a family.
#[derive(Debug)]
pub struct Redeliverer {
    store: Arc<dyn Store>,
    groups: MonitoredGroups,
    consumer: ConsumerName,
    metrics: Metrics,
    part: Part,
    warning: ThrottledWarning,
    members: BTreeMap<StreamName, Member>,
    /// The time of the next pass: the next tick, or earlier if a member is due before.
    next_pass: Instant,
    notifications: mpsc::Receiver<StreamName>,
}

/// The groups that a redeliverer works for.
#[derive(Debug)]
enum MonitoredGroups {
    Stream(GroupSpec),
    Family(FamilyGroup),
}

impl MonitoredGroups {
    /// Returns the name of the stream or the family, and the name of the group.
    fn name(&self) -> (&str, &str) {
        match self {
            Self::Stream(spec) => (spec.stream.as_str(), spec.config.name.as_str()),
            Self::Family(group) => (group.family_members.family().name(), group.config.name.as_str()),
        }
    }

    fn family_members(&self) -> Option<&FamilyMembers> {
        match self {
            Self::Stream(_) => None,
            Self::Family(group) => Some(&group.family_members),
        }
    }

    /// Returns the group of a stream, and the schedule of its checks.
    fn member(&self, stream: StreamName) -> (GroupSpec, Schedule) {
        match self {
            Self::Stream(spec) => (spec.clone(), Schedule::of_stream(spec.config.claim_idle)),
            Self::Family(group) => (group.member(stream), Schedule::of_member(group.config.claim_idle)),
        }
    }
}

/// The group of one stream.
#[derive(Debug)]
struct Member {
    monitor: GroupMonitor,
    /// The newest known entry.
    newest: EntryId,
    /// The error of the last check.
    failure: Option<StoreError>,
}

impl Redeliverer {
    /// Creates a redeliverer for a group of one stream.
    ///
    /// `consumer` is the consumer name that holds entries while they are dead-lettered.
    pub fn of_stream(
        store: Arc<dyn Store>,
        spec: GroupSpec,
        consumer: ConsumerName,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        let stream = spec.stream.clone();
        let mut redeliverer = Self::new(store, MonitoredGroups::Stream(spec), consumer, metrics, part);
        redeliverer.add_member(stream, EntryId::MIN);
        redeliverer
    }

    /// Creates a redeliverer for a group of every member of a family.
    ///
    /// `consumer` is the consumer name that holds entries while they are dead-lettered.
    pub fn of_family(
        store: Arc<dyn Store>,
        group: FamilyGroup,
        consumer: ConsumerName,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        Self::new(store, MonitoredGroups::Family(group), consumer, metrics, part)
    }

    fn new(
        store: Arc<dyn Store>,
        groups: MonitoredGroups,
        consumer: ConsumerName,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        let (warning, members, next_pass) = (ThrottledWarning::default(), BTreeMap::new(), Instant::now());
        let (_, notifications) = mpsc::channel(1);
        Self { store, groups, consumer, metrics, part, warning, members, next_pass, notifications }
    }

    /// Sets the channel that names streams with entries to redeliver.
    #[must_use]
    pub fn with_notifications(mut self, notifications: mpsc::Receiver<StreamName>) -> Self {
        self.notifications = notifications;
        self
    }

    /// Runs until `stop`, and finishes the check that is under way.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut notified = Vec::new();
        let mut next_tick = Instant::now();
        loop {
            if Instant::now() >= next_tick {
                self.update_members();
                next_tick = Instant::now() + TICK;
            }
            self.check_due(&stop).await;
            self.report();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = sleep_until(next_tick.min(self.next_pass)) => {}
                1.. = self.notifications.recv_many(&mut notified, MAX_NOTIFICATIONS) => {}
            }
            for stream in notified.drain(..) {
                if let Some(member) = self.members.get_mut(&stream) {
                    member.monitor.on_notification();
                    self.next_pass = self.next_pass.min(member.monitor.next_due());
                }
            }
        }
        let leave = async {
            for member in self.members.values() {
                member.monitor.leave().await;
            }
        };
        if timeout(LEAVE_TIMEOUT, leave).await.is_err() {
            debug!("store timed out, consumer of the redeliverer stays in its groups");
        }
    }

    /// Adds new members of the family, and notes new entries of known ones.
    fn update_members(&mut self) {
        let Some(family_members) = self.groups.family_members() else { return };
        for (stream, newest) in family_members.newest() {
            match self.members.get_mut(&stream) {
                Some(member) if newest > member.newest => {
                    member.newest = newest;
                    member.monitor.on_new_entries();
                }
                Some(_) => {}
                None => self.add_member(stream, newest),
            }
        }
    }

    fn add_member(&mut self, stream: StreamName, newest: EntryId) {
        let (spec, schedule) = self.groups.member(stream.clone());
        let (label, _) = self.groups.name();
        let (store, consumer) = (Arc::clone(&self.store), self.consumer.clone());
        let monitor = GroupMonitor::new(store, spec, consumer, &self.metrics, label, schedule);
        self.members.insert(stream, Member { monitor, newest, failure: None });
    }

    /// Checks the members that are due, the longest overdue first.
    async fn check_due(&mut self, stop: &CancellationToken) {
        let now = Instant::now();
        if self.next_pass <= now {
            let upcoming = self.members.values().map(|member| member.monitor.next_due()).filter(|due| *due > now);
            self.next_pass = upcoming.fold(now + TICK, Instant::min);
        }
        let mut due: Vec<&mut Member> = self.members.values_mut().filter(|m| m.monitor.next_due() <= now).collect();
        due.sort_by_key(|member| member.monitor.next_due());
        for (checks, member) in due.into_iter().enumerate() {
            if checks == MAX_CHECKS || now.elapsed() >= MAX_PASS_TIME || stop.is_cancelled() {
                self.next_pass = now;
                break;
            }
            member.failure = match (member.monitor.check().await, &self.groups) {
                // Another program uses the name of a member. The task that follows the family reports it.
                (Err(error), MonitoredGroups::Family(_)) if error.kind() == StoreErrorKind::WrongType => None,
                (checked, _) => checked.err(),
            };
            self.next_pass = self.next_pass.min(member.monitor.next_due());
            if let Some(error) = &member.failure
                && let Some(times) = self.warning.occurred()
            {
                let ((stream, group), kind) = (member.monitor.name(), error.kind().as_str());
                warn!(%stream, %group, error = %error, kind, times, "redelivery failed, retrying");
            }
        }
    }

    fn report(&mut self) {
        if let Some(error) = self.members.values().find_map(|member| member.failure.as_ref()) {
            return self.part.not_ready(error.to_string());
        }
        self.part.ready();
        if let Some(after) = self.warning.ended() {
            let (stream, group) = self.groups.name();
            match &self.groups {
                MonitoredGroups::Family(_) => info!(family = stream, group, ?after, "redelivery recovered"),
                MonitoredGroups::Stream(_) => info!(stream, group, ?after, "redelivery recovered"),
            }
        }
    }
}
