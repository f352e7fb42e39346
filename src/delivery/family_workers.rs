//! Workers for a group of every family member, started while a member has entries to handle.
//!
//! Each member is checked when it appears and from time to time, and the family's [`FamilyMembers`] reports new entries. Workers
//! start only then, and stop when no entries have come for a while. So an idle member costs one check per `claim_idle`,
//! and one wait of the store serves all members. The number of active members is limited; if others wait, they take
//! turns. A member that cannot be checked does not delay others.
//!
//! [`FamilyMembers`]: crate::store::FamilyMembers

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::delivery::{FamilyGroup, Quarantine, Worker};
use crate::event::{ConsumerName, EntryId, StreamName};
use crate::log_throttle::ThrottledWarning;
use crate::metrics::Metrics;
use crate::readiness::{Part, Readiness};
use crate::sink::Sink;
use crate::store::{Store, StoreError, StoreErrorKind};

/// The maximum number of members with workers at a time.
const MAX_ACTIVE: usize = 64;
/// The time for which a member may have workers while others wait.
const MAX_TURN: Duration = Duration::from_secs(10);
/// The time without entries after which the workers of a member stop.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval at which members are checked if nothing else happens.
const TICK: Duration = Duration::from_secs(1);
/// The maximum number of members, and the maximum time, of one pass. Other events are handled between passes.
const MAX_CHECKS: usize = 64;
const MAX_PASS_TIME: Duration = Duration::from_secs(5);
/// The time limit for one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a failed check.
const RETRY_DELAY: Duration = Duration::from_secs(2);
/// The minimum interval between checks of an idle member. Only a check detects entries that crashed workers left.
const MIN_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The time without a report after which a worker counts as stuck.
const STALE_AFTER: Duration = Duration::from_secs(20);

/// Runs workers for one group of every member of a family.
#[derive(Debug)]
pub struct FamilyWorkers {
    store: Arc<dyn Store>,
    sink: Arc<dyn Sink>,
    group: FamilyGroup,
    consumers: Vec<ConsumerName>,
    quarantine: Quarantine,
    metrics: Metrics,
    part: Part,
    states: HashMap<StreamName, MemberState>,
    waiting: VecDeque<StreamName>,
    active: HashMap<StreamName, ActiveMember>,
    /// Whether members wait for workers. Idle workers then stop at once to make room.
    is_crowded: Arc<AtomicBool>,
    tasks: JoinSet<StreamName>,
    /// The errors of failed checks.
    failures: BTreeMap<StreamName, StoreError>,
    warning: ThrottledWarning,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MemberState {
    /// All entries up to `seen` are handled, as far as is known.
    Idle { seen: EntryId, check_at: Instant, was_active: bool },
    /// The member waits for workers.
    Waiting,
    /// The member has workers.
    Active,
}

/// Returns the error of a store call that timed out.
fn timed_out<T>(_elapsed: tokio::time::error::Elapsed) -> Result<T, StoreError> {
    Err(StoreError::new(StoreErrorKind::Unavailable, "the store timed out"))
}

impl MemberState {
    fn idle(seen: EntryId, check_at: Instant) -> Self {
        Self::Idle { seen, check_at, was_active: false }
    }
}

/// A member with workers.
#[derive(Debug)]
struct ActiveMember {
    since: Instant,
    stop: CancellationToken,
    /// The reports of its workers.
    readiness: Readiness,
}

/// The result of a check.
#[derive(Debug, Clone, Copy)]
struct MemberCheck {
    last: EntryId,
    /// Whether the group has undelivered entries, or does not exist yet.
    is_behind: bool,
    has_pending: bool,
}

impl FamilyWorkers {
    /// Creates the workers of a family. Each active member has one worker per consumer name.
    pub fn new(
        store: Arc<dyn Store>,
        sink: Arc<dyn Sink>,
        group: FamilyGroup,
        consumers: Vec<ConsumerName>,
        quarantine: Quarantine,
        metrics: Metrics,
        part: Part,
    ) -> Self {
        Self {
            store,
            sink,
            group,
            consumers,
            quarantine,
            metrics,
            part,
            states: HashMap::new(),
            waiting: VecDeque::new(),
            active: HashMap::new(),
            is_crowded: Arc::default(),
            tasks: JoinSet::new(),
            failures: BTreeMap::new(),
            warning: ThrottledWarning::default(),
        }
    }

    /// Runs until `stop`; the workers of each active member then end as [`Worker::run`] does.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.group.family_members.changes();
        loop {
            changes.mark_unchanged();
            let has_more = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                has_more = self.check_members() => has_more,
            };
            self.start_waiting(&stop);
            self.report();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.on_ended(ended),
                Ok(()) = changes.changed() => {}
                () = tokio::time::sleep(if has_more { Duration::ZERO } else { TICK }) => {}
            }
        }
        while let Some(ended) = self.tasks.join_next().await {
            self.on_ended(ended);
        }
    }

    /// Finds the members with entries to handle. Returns whether more members are due for a check now.
    async fn check_members(&mut self) -> bool {
        let now = Instant::now();
        let mut due = Vec::new();
        for (stream, newest) in self.group.family_members.newest() {
            let state = self.states.entry(stream.clone()).or_insert(MemberState::idle(EntryId::MAX, now));
            match *state {
                MemberState::Idle { seen, .. } if newest > seen => {
                    *state = MemberState::Waiting;
                    self.waiting.push_back(stream);
                }
                MemberState::Idle { check_at, was_active, .. } if check_at <= now => {
                    due.push((check_at, stream, was_active));
                }
                MemberState::Idle { .. } | MemberState::Waiting | MemberState::Active => {}
            }
        }
        // The longest overdue first, so that slow or failing members do not delay others.
        due.sort_by_key(|(check_at, ..)| *check_at);
        for (checks, (_, stream, was_active)) in due.into_iter().enumerate() {
            if checks == MAX_CHECKS || now.elapsed() >= MAX_PASS_TIME {
                return true;
            }
            match timeout(CHECK_TIMEOUT, self.check(&stream)).await.unwrap_or_else(timed_out) {
                Ok(found) => {
                    self.failures.remove(&stream);
                    // Entries that are still pending after its workers stopped belong to other consumers for now.
                    self.on_checked(stream, found, found.has_pending && !was_active);
                }
                Err(error) => self.on_check_failed(stream, error),
            }
        }
        false
    }

    fn on_check_failed(&mut self, stream: StreamName, error: StoreError) {
        if let Some(times) = self.warning.occurred() {
            warn!(
                family = %self.group.family_members.family(), group = %self.group.config.name, error = %error, times,
                "family member check failed, retrying"
            );
        }
        if let Some(MemberState::Idle { check_at, .. }) = self.states.get_mut(&stream) {
            *check_at = Instant::now() + RETRY_DELAY;
        }
        self.failures.insert(stream, error);
    }

    /// Queues a member for workers if it has entries for them, else schedules its next check.
    fn on_checked(&mut self, stream: StreamName, found: MemberCheck, is_due: bool) {
        if found.is_behind || is_due {
            self.enqueue(stream);
        } else {
            let check_at = Instant::now() + self.group.config.claim_idle.max(MIN_CHECK_INTERVAL);
            self.states.insert(stream, MemberState::idle(found.last, check_at));
        }
    }

    fn enqueue(&mut self, stream: StreamName) {
        self.states.insert(stream.clone(), MemberState::Waiting);
        self.waiting.push_back(stream);
    }

    async fn check(&self, stream: &StreamName) -> Result<MemberCheck, StoreError> {
        let status = match self.store.describe(stream).await {
            // Another program uses the name. The task that follows the family reports it.
            Err(error) if error.kind() == StoreErrorKind::WrongType => {
                return Ok(MemberCheck { last: EntryId::MAX, is_behind: false, has_pending: false });
            }
            status => status?,
        };
        let last = status.as_ref().map_or(EntryId::MIN, |status| status.last_id);
        let group =
            status.and_then(|status| status.groups.into_iter().find(|group| group.name == self.group.config.name));
        let Some(group) = group else {
            // Created at once, even if many members wait for workers: retention may trim entries without a group.
            self.store.ensure_group(stream, &self.group.config.name, self.group.config.start.into()).await?;
            return Ok(MemberCheck { last, is_behind: true, has_pending: false });
        };
        let undelivered = group.undelivered.or(group.lag);
        let is_behind = undelivered.map_or(group.last_delivered < last, |entries| entries > 0);
        Ok(MemberCheck { last, is_behind, has_pending: group.pending > 0 })
    }

    /// Starts workers for waiting members up to the limit, and ends the longest turn if others wait too long.
    fn start_waiting(&mut self, stop: &CancellationToken) {
        while self.active.len() < MAX_ACTIVE
            && let Some(stream) = self.waiting.pop_front()
        {
            self.start(stream, stop.child_token());
        }
        self.is_crowded.store(!self.waiting.is_empty(), Ordering::Relaxed);
        if self.waiting.is_empty() || self.active.values().any(|active| active.stop.is_cancelled()) {
            return;
        }
        let longest = self.active.values().min_by_key(|active| active.since);
        if let Some(active) = longest.filter(|active| active.since.elapsed() > MAX_TURN) {
            active.stop.cancel();
        }
    }

    fn start(&mut self, stream: StreamName, stop: CancellationToken) {
        let (readiness, spec) = (Readiness::default(), self.group.member(stream.clone()));
        let mut workers = JoinSet::new();
        for consumer in &self.consumers {
            let part = readiness.part(consumer.as_str(), Some(STALE_AFTER));
            let (store, sink) = (Arc::clone(&self.store), Arc::clone(&self.sink));
            let (quarantine, metrics) = (self.quarantine.clone(), self.metrics.clone());
            let worker = Worker::new(store, sink, spec.clone(), consumer.clone(), quarantine, metrics, part);
            let worker =
                worker.of_family(self.group.family_members.family().name(), IDLE_TIMEOUT, Arc::clone(&self.is_crowded));
            workers.spawn(worker.run(stop.clone()));
        }
        let member = stream.clone();
        self.tasks.spawn(async move {
            while let Some(ended) = workers.join_next().await {
                if let Err(error) = ended {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
            member
        });
        // From now on its workers report failures.
        self.failures.remove(&stream);
        self.states.insert(stream.clone(), MemberState::Active);
        self.active.insert(stream, ActiveMember { since: Instant::now(), stop, readiness });
    }

    fn on_ended(&mut self, ended: Result<StreamName, JoinError>) {
        let stream = match ended {
            Ok(stream) => stream,
            // A defect of a worker ends the daemon.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let was_preempted = self.active.remove(&stream).is_some_and(|active| active.stop.is_cancelled());
        if was_preempted {
            self.enqueue(stream);
        } else {
            // A check finds the entries that came while the workers stopped.
            let check_at = Instant::now();
            self.states.insert(stream, MemberState::Idle { seen: EntryId::MAX, check_at, was_active: true });
        }
    }

    /// Reports failed checks and the state of the workers.
    fn report(&mut self) {
        if let Some(error) = self.failures.values().next() {
            return self.part.not_ready(error.to_string());
        }
        if let Some(after) = self.warning.ended() {
            info!(family = %self.group.family_members.family(), group = %self.group.config.name, ?after, "family member checks recovered");
        }
        let (mut reasons, mut notes) = (Vec::new(), Vec::new());
        for (stream, active) in &self.active {
            for report in active.readiness.report() {
                let is_new = active.since.elapsed() < STALE_AFTER;
                reasons.extend(report.reason.filter(|_| !is_new).map(|reason| format!("{stream}: {reason}")));
                notes.extend(report.note.map(|note| format!("{stream}: {note}")));
            }
        }
        match (reasons.first(), notes.first()) {
            (Some(reason), _) => self.part.not_ready(format!("{reason} (and {} more)", reasons.len() - 1)),
            (None, Some(note)) => self.part.ready_but(format!("{note} (and {} more)", notes.len() - 1)),
            (None, None) => self.part.ready(),
        }
    }
}
