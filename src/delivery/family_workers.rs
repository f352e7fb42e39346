//! The workers of a family's group: one member after another has workers while there is something to do for it.
//!
//! A crew looks at each member once it comes and now and then, and hears from the family's [`Roster`] when there is news;
//! only then workers begin, and end when nothing came for a while. So an idle member costs a look a minute, and one wait
//! of the store serves all of them. A bounded number of members is worked for at a time; where others wait, they take
//! turns. A member that can't be looked at holds up no other.

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

/// The members that are worked for at a time.
const AT_WORK: usize = 64;
/// How long a member may be worked for while others wait.
const TURN: Duration = Duration::from_secs(10);
/// After how long without entries workers leave a member.
const LEAVE_AFTER: Duration = Duration::from_secs(5);
/// How often the crew looks round when nothing wakes it.
const TICK: Duration = Duration::from_secs(1);
/// The most members looked at between two looks at what else there is to do, and how long that may take before no other
/// is looked at.
const LOOKS: usize = 64;
const ROUND: Duration = Duration::from_secs(5);
/// How long one look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// When a member is looked at again where that failed.
const AGAIN: Duration = Duration::from_secs(2);
/// Between two looks at a member of which nothing is heard, at least: what crashed workers left shows in nothing else.
const LEAST_LOOK_EVERY: Duration = Duration::from_secs(1);
/// After how long without a word a worker counts as stuck.
const STALE_AFTER: Duration = Duration::from_secs(20);

/// Works for one group of every member of a family.
#[derive(Debug)]
pub struct Crew {
    store: Arc<dyn Store>,
    sink: Arc<dyn Sink>,
    group: FamilyGroup,
    consumers: Vec<ConsumerName>,
    quarantine: Quarantine,
    metrics: Metrics,
    part: Part,
    standings: HashMap<StreamName, Standing>,
    waiting: VecDeque<StreamName>,
    at_work: HashMap<StreamName, AtWork>,
    /// Whether members wait for workers: those who have nothing to do then make room at once.
    is_crowded: Arc<AtomicBool>,
    tasks: JoinSet<StreamName>,
    /// Why members could not be looked at.
    failures: BTreeMap<StreamName, StoreError>,
    trouble: ThrottledWarning,
}

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Nothing is to be done up to this entry, as far as is known; to be looked at then.
    Idle {
        seen: EntryId,
        look_at: Instant,
        has_been_at_work: bool,
    },
    /// It waits for workers.
    Waiting,
    AtWork,
}

/// What is said of a store that has not answered in time.
fn silent_for<T>(_elapsed: tokio::time::error::Elapsed) -> Result<T, StoreError> {
    Err(StoreError::new(StoreErrorKind::Unavailable, "the store does not answer"))
}

impl Standing {
    fn idle(seen: EntryId, look_at: Instant) -> Self {
        Self::Idle { seen, look_at, has_been_at_work: false }
    }
}

/// A member that is worked for.
#[derive(Debug)]
struct AtWork {
    since: Instant,
    stop: CancellationToken,
    /// What its workers tell.
    readiness: Readiness,
}

/// What a look at a member found.
#[derive(Debug, Clone, Copy)]
struct Found {
    last: EntryId,
    /// Whether there are entries that the group was not given, or there is no group yet.
    is_behind: bool,
    /// Whether entries are pending.
    has_pending: bool,
}

impl Crew {
    /// A crew that does not work yet. Each member has workers of these names, as many as there are.
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
            standings: HashMap::new(),
            waiting: VecDeque::new(),
            at_work: HashMap::new(),
            is_crowded: Arc::default(),
            tasks: JoinSet::new(),
            failures: BTreeMap::new(),
            trouble: ThrottledWarning::default(),
        }
    }

    /// Works until `stop`; then as [`Worker::run`] ends, for each member that is worked for.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.group.roster.changes();
        loop {
            changes.mark_unchanged();
            let has_more = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                has_more = self.look_round() => has_more,
            };
            self.begin_work(&stop);
            self.report();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.ended(ended),
                Ok(()) = changes.changed() => {}
                () = tokio::time::sleep(if has_more { Duration::ZERO } else { TICK }) => {}
            }
        }
        while let Some(ended) = self.tasks.join_next().await {
            self.ended(ended);
        }
    }

    /// Finds the members for which there is something to do; says whether there are more to be looked at now.
    async fn look_round(&mut self) -> bool {
        let now = Instant::now();
        let mut due = Vec::new();
        for (stream, newest) in self.group.roster.newest() {
            let standing = self.standings.entry(stream.clone()).or_insert(Standing::idle(EntryId::MAX, now));
            match *standing {
                Standing::Idle { seen, .. } if newest > seen => {
                    *standing = Standing::Waiting;
                    self.waiting.push_back(stream);
                }
                Standing::Idle { look_at, has_been_at_work, .. } if look_at <= now => {
                    due.push((look_at, stream, has_been_at_work));
                }
                Standing::Idle { .. } | Standing::Waiting | Standing::AtWork => {}
            }
        }
        // So that members which fail, or are slow, hold up no others.
        due.sort_by_key(|(look_at, ..)| *look_at);
        for (looks, (_, stream, has_been_at_work)) in due.into_iter().enumerate() {
            if looks == LOOKS || now.elapsed() >= ROUND {
                return true;
            }
            match timeout(LOOK_TIMEOUT, self.look(&stream)).await.unwrap_or_else(silent_for) {
                Ok(found) => {
                    self.failures.remove(&stream);
                    // What is pending after work is others' for now.
                    self.settle(stream, found, found.has_pending && !has_been_at_work);
                }
                Err(error) => self.failed(stream, error),
            }
        }
        false
    }

    /// A member could not be looked at.
    fn failed(&mut self, stream: StreamName, error: StoreError) {
        if let Some(times) = self.trouble.occurred() {
            warn!(
                family = %self.group.roster.family(), group = %self.group.config.name, error = %error, times,
                "cannot look for work at the members of the family"
            );
        }
        if let Some(Standing::Idle { look_at, .. }) = self.standings.get_mut(&stream) {
            *look_at = Instant::now() + AGAIN;
        }
        self.failures.insert(stream, error);
    }

    /// A member goes to work or is left alone, by what was found.
    fn settle(&mut self, stream: StreamName, found: Found, is_due: bool) {
        if found.is_behind || is_due {
            self.standings.insert(stream.clone(), Standing::Waiting);
            self.waiting.push_back(stream);
        } else {
            let look_at = Instant::now() + self.group.config.claim_idle.max(LEAST_LOOK_EVERY);
            self.standings.insert(stream, Standing::idle(found.last, look_at));
        }
    }

    async fn look(&self, stream: &StreamName) -> Result<Found, StoreError> {
        let status = match self.store.describe(stream).await {
            // What is no stream has nothing to be done; who follows the family tells of it.
            Err(error) if error.kind() == StoreErrorKind::WrongType => {
                return Ok(Found { last: EntryId::MAX, is_behind: false, has_pending: false });
            }
            status => status?,
        };
        let last = status.as_ref().map_or(EntryId::MIN, |status| status.last_id);
        let group =
            status.and_then(|status| status.groups.into_iter().find(|group| group.name == self.group.config.name));
        let Some(group) = group else {
            // At once, however many wait for workers: what no group has still to handle may be trimmed.
            self.store.ensure_group(stream, &self.group.config.name, self.group.config.start.into()).await?;
            return Ok(Found { last, is_behind: true, has_pending: false });
        };
        let undelivered = group.undelivered.or(group.lag);
        let is_behind = undelivered.map_or(group.last_delivered < last, |entries| entries > 0);
        Ok(Found { last, is_behind, has_pending: group.pending > 0 })
    }

    /// Begins work for those that wait, as far as there is room; makes room where someone has had it for long.
    fn begin_work(&mut self, stop: &CancellationToken) {
        while self.at_work.len() < AT_WORK
            && let Some(stream) = self.waiting.pop_front()
        {
            self.begin(stream, stop.child_token());
        }
        self.is_crowded.store(!self.waiting.is_empty(), Ordering::Relaxed);
        if self.waiting.is_empty() || self.at_work.values().any(|work| work.stop.is_cancelled()) {
            return;
        }
        let longest = self.at_work.values().min_by_key(|work| work.since);
        if let Some(work) = longest.filter(|work| work.since.elapsed() > TURN) {
            work.stop.cancel();
        }
    }

    fn begin(&mut self, stream: StreamName, stop: CancellationToken) {
        let (readiness, spec) = (Readiness::default(), self.group.member(stream.clone()));
        let mut workers = JoinSet::new();
        for consumer in &self.consumers {
            let part = readiness.part(consumer.as_str(), Some(STALE_AFTER));
            let (store, sink) = (Arc::clone(&self.store), Arc::clone(&self.sink));
            let (quarantine, metrics) = (self.quarantine.clone(), self.metrics.clone());
            let worker = Worker::new(store, sink, spec.clone(), consumer.clone(), quarantine, metrics, part);
            let worker = worker.of_family(self.group.roster.family().name(), LEAVE_AFTER, Arc::clone(&self.is_crowded));
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
        // From here on its workers tell.
        self.failures.remove(&stream);
        self.standings.insert(stream.clone(), Standing::AtWork);
        self.at_work.insert(stream, AtWork { since: Instant::now(), stop, readiness });
    }

    fn ended(&mut self, ended: Result<StreamName, JoinError>) {
        let stream = match ended {
            Ok(stream) => stream,
            // A defect of the worker itself.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let was_sent_away = self.at_work.remove(&stream).is_some_and(|work| work.stop.is_cancelled());
        if was_sent_away {
            self.standings.insert(stream.clone(), Standing::Waiting);
            self.waiting.push_back(stream);
        } else {
            // What came while it ended is found by looking.
            let look_at = Instant::now();
            self.standings.insert(stream, Standing::Idle { seen: EntryId::MAX, look_at, has_been_at_work: true });
        }
    }

    /// Tells readiness how the members and the workers are.
    fn report(&mut self) {
        if let Some(error) = self.failures.values().next() {
            return self.part.not_ready(error.to_string());
        }
        if let Some(after) = self.trouble.ended() {
            info!(family = %self.group.roster.family(), group = %self.group.config.name, ?after, "looks for work again");
        }
        let (mut reasons, mut notes) = (Vec::new(), Vec::new());
        for (stream, work) in &self.at_work {
            for report in work.readiness.report() {
                let is_new = work.since.elapsed() < STALE_AFTER;
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
