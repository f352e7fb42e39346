//! Intake: makes sure that the group exists, recovers pending entries, then fetches new ones.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::delivery::GroupStart;
use crate::delivery::ack_floor::{AckFloor, ensure_group};
use crate::delivery::worker::context::{Conditions, WorkerContext};
use crate::delivery::worker::tasks::{CLAIM_LIMIT, Task, TaskResult, call_store};
use crate::event::{Delivery, EntryId};
use crate::log_throttle::ThrottledWarning;
use crate::store::{Start, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// How long a fetch waits for entries.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// A fetch that takes this long means that the store does not work.
const FETCH_STUCK: Duration = Duration::from_secs(5);
/// The most bytes of payload that one fetch should bring, by the estimate of [`Intake::entries_in`].
const FETCH_BYTES: usize = 8 * 1024 * 1024;
/// The most bytes of payload that a worker should hold, by the same estimate.
const HELD_BYTES: usize = 4 * FETCH_BYTES;
/// The estimated size of an entry before the first fetch.
const FIRST_ESTIMATE_BYTES: usize = 64 * 1024;
/// Between fetches without a wait, while other members of the family wait for a worker.
const CROWDED_PAUSE: Duration = Duration::from_millis(50);

/// The next thing that the intake does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IntakePhase {
    /// Makes sure that the group exists.
    EnsureGroup,
    /// Claims entries that are pending on this consumer and not in flight, from this id on.
    RecoverPending(EntryId),
    /// Fetches new entries.
    Fetch,
}

/// Brings entries into the worker, one call of the store at a time.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each with its own events")]
pub(crate) struct Intake {
    phase: IntakePhase,
    is_busy: bool,
    not_before: Instant,
    backoff: Backoff,
    warning: ThrottledWarning,
    error: Option<String>,
    /// Whether the next phase is recovery: a call whose reply was lost may have left entries pending.
    needs_recovery: bool,
    was_ensured: bool,
    /// Whether the last fetch brought nothing.
    is_at_end: bool,
    ack_floor: Option<AckFloor>,
    fetch_began: Option<Instant>,
    entry_bytes: usize,
}

impl Intake {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            phase: IntakePhase::EnsureGroup,
            is_busy: false,
            not_before: now,
            backoff: Backoff::default(),
            warning: ThrottledWarning::default(),
            error: None,
            needs_recovery: false,
            was_ensured: false,
            is_at_end: false,
            ack_floor: None,
            fetch_began: None,
            entry_bytes: FIRST_ESTIMATE_BYTES,
        }
    }

    /// Starts the next call if it is due.
    pub(crate) fn start(&mut self, now: Instant, facts: &Conditions, context: &WorkerContext) -> Option<Task> {
        if self.next_due(facts, context)? > now {
            return None;
        }
        self.is_busy = true;
        let (store, cursor) = (context.store.clone(), context.cursor.clone());
        let limit = self.limit(facts, context);
        Some(match self.phase {
            IntakePhase::EnsureGroup => {
                let ack_floor = self.ack_floor.clone();
                let start = match (self.was_ensured, context.group.config.start) {
                    (false, GroupStart::New) => Start::New,
                    _ => Start::Oldest,
                };
                Task::new(0, async move {
                    TaskResult::GroupEnsured(call_store(ensure_group(&*store, &cursor, start, ack_floor)).await)
                })
            }
            IntakePhase::RecoverPending(from) => {
                let own_only = !context.is_ordered;
                Task::new(limit, async move {
                    let result = call_store(store.pending(&cursor, own_only, from, limit)).await;
                    TaskResult::PendingListed { limit, result }
                })
            }
            IntakePhase::Fetch => {
                self.fetch_began = Some(now);
                let wait = if facts.is_crowded { Duration::ZERO } else { FETCH_WAIT };
                Task::new(limit, async move {
                    let result = call_store(store.fetch(&cursor, limit, wait)).await;
                    TaskResult::Fetched { limit, result }
                })
            }
        })
    }

    /// Returns when the next call is due, or `None` until an event changes the conditions.
    ///
    /// A recovery and a search never run at the same time: the recovery would list the entries that the search has just
    /// claimed, and count one more attempt for each.
    pub(crate) fn next_due(&self, facts: &Conditions, context: &WorkerContext) -> Option<Instant> {
        let may_start = match self.phase {
            IntakePhase::EnsureGroup => true,
            IntakePhase::RecoverPending(_) => !facts.is_searching && self.limit(facts, context) > 0,
            // During an outage entries come in one at a time anyway.
            IntakePhase::Fetch => (!facts.awaits_isolation || facts.is_sink_down) && self.limit(facts, context) > 0,
        };
        (facts.is_open && !self.is_busy && may_start).then_some(self.not_before)
    }

    /// Returns the most entries that the next call may bring.
    fn limit(&self, facts: &Conditions, context: &WorkerContext) -> usize {
        let most = match self.phase {
            IntakePhase::EnsureGroup => return 0,
            IntakePhase::RecoverPending(_) => CLAIM_LIMIT,
            IntakePhase::Fetch => context.group.config.batch.min(self.entries_in(FETCH_BYTES)),
        };
        facts.free_slots.min(most).max(facts.probe_slots)
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy
    }

    pub(crate) fn is_fetching(&self) -> bool {
        self.phase == IntakePhase::Fetch
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.is_at_end
    }

    pub(crate) fn needs_recovery(&self) -> bool {
        self.needs_recovery
    }

    /// Returns the error of the last call, if it failed.
    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Returns whether a fetch is under way, and the store is not stuck.
    pub(crate) fn is_reading(&self, now: Instant) -> bool {
        self.fetch_began.is_some_and(|began| now.duration_since(began) < FETCH_STUCK)
    }

    /// Returns how many entries of the estimated size the worker may hold.
    pub(crate) fn held_limit(&self) -> usize {
        self.entries_in(HELD_BYTES)
    }

    fn entries_in(&self, bytes: usize) -> usize {
        (bytes / self.entry_bytes).max(1)
    }

    /// Ends the call under way.
    pub(crate) fn task_ended(&mut self) {
        self.is_busy = false;
    }

    /// Continues with a claim of listed entries, as part of the same recovery.
    pub(crate) fn begin_claim(&mut self) {
        self.is_busy = true;
    }

    pub(crate) fn group_ensured(&mut self, is_new: bool, ack_floor: Option<AckFloor>, context: &WorkerContext) {
        if is_new && self.was_ensured {
            context.metrics.groups_recreated.inc();
            let from = self.ack_floor.as_ref().map(|floor| floor.id.to_string());
            warn!(?from, "group was missing, made again");
        } else if is_new {
            info!("group created");
        }
        self.was_ensured = true;
        self.note_ack_floor(ack_floor);
        self.phase = IntakePhase::RecoverPending(EntryId::MIN);
        self.needs_recovery = false;
    }

    /// Stores how far the group has come, if that is known.
    pub(crate) fn note_ack_floor(&mut self, ack_floor: Option<AckFloor>) {
        self.ack_floor = ack_floor.or(self.ack_floor.take());
    }

    /// Goes on with new entries after the last pending one.
    pub(crate) fn recovery_ended(&mut self) {
        self.phase = IntakePhase::Fetch;
    }

    /// Goes on with pending entries at `from`, after `pause`.
    pub(crate) fn recover_from(&mut self, from: EntryId, now: Instant, pause: Duration) {
        self.phase = IntakePhase::RecoverPending(from);
        if !pause.is_zero() {
            self.not_before = now + pause;
        }
    }

    /// Takes note of a fetch. Returns the deliveries, or `None` if the reply is too old to be trusted.
    ///
    /// A process that stood still may read a reply long after it was sent. Its entries may belong to other consumers by
    /// then, so the recovery lists those that are left.
    pub(crate) fn fetched(
        &mut self,
        deliveries: Vec<Delivery>,
        now: Instant,
        context: &WorkerContext,
    ) -> Option<Vec<Delivery>> {
        self.backoff.reset();
        self.error = None;
        if let Some(after) = self.warning.ended() {
            info!(?after, "worker reads its stream again");
        }
        self.estimate_entry_bytes(&deliveries);
        self.is_at_end = deliveries.is_empty();
        let age = self.fetch_began.take().map(|began| now.duration_since(began));
        let is_stale = age.is_some_and(|age| age > FETCH_WAIT + context.cursor.claim_idle / 2);
        if is_stale || self.needs_recovery {
            self.needs_recovery = false;
            self.phase = IntakePhase::RecoverPending(EntryId::MIN);
        }
        (!is_stale).then_some(deliveries)
    }

    /// Pauses the fetches of a crowded member that found nothing.
    pub(crate) fn pause_crowded(&mut self, now: Instant) {
        self.not_before = now + CROWDED_PAUSE;
    }

    /// Takes note of a call that failed, and starts over after a pause.
    ///
    /// A lost reply may have made entries pending on this consumer, so they are recovered before new ones.
    pub(crate) fn failed(&mut self, error: &StoreError, now: Instant, context: &WorkerContext) {
        self.fetch_began = None;
        let text = chain(error);
        if let Some(times) = self.warning.occurred() {
            warn!(error = text, kind = error.kind().as_str(), times, "worker cannot read its stream, trying again");
        }
        context.part.not_ready(text.clone());
        self.error = Some(text);
        let is_group_gone = error.kind() == StoreErrorKind::NoGroup || self.phase == IntakePhase::EnsureGroup;
        self.phase = if is_group_gone { IntakePhase::EnsureGroup } else { IntakePhase::RecoverPending(EntryId::MIN) };
        self.not_before = now + self.backoff.next_delay().max(error.retry_after().unwrap_or_default());
    }

    /// Makes the group again, because another call found it missing. A call of the intake finds out by itself.
    pub(crate) fn group_missing(&mut self) {
        if !self.is_busy {
            self.phase = IntakePhase::EnsureGroup;
        }
    }

    /// Recovers pending entries, at once or after the call under way.
    pub(crate) fn request_recovery(&mut self) {
        if self.is_busy || self.phase == IntakePhase::EnsureGroup {
            self.needs_recovery = true;
        } else {
            self.phase = IntakePhase::RecoverPending(EntryId::MIN);
        }
    }

    /// Recovers pending entries after the next fetch.
    pub(crate) fn request_recovery_after_fetch(&mut self) {
        self.needs_recovery = true;
    }

    /// Updates the estimate: up at once, down step by step. Memory stays bounded because larger entries are fetched in
    /// smaller batches.
    fn estimate_entry_bytes(&mut self, deliveries: &[Delivery]) {
        if deliveries.is_empty() {
            return;
        }
        let bytes: usize = deliveries.iter().map(|delivery| delivery.entry.fields.size_bytes()).sum();
        let average = (bytes / deliveries.len()).max(1);
        self.entry_bytes = average.max(usize::midpoint(self.entry_bytes, average));
    }
}
