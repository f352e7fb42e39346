//! The worker's loop: what is in hand, what is under way, and what is due next.
//!
//! Every store call and every call of the sink is a task of its own, so that none waits for another, and none is ever
//! dropped half-way while the worker lives: a fetch that is dropped leaves entries pending that nobody holds.

mod claims;
mod intake;
mod outage;
mod outcomes;
mod poison;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant as WallInstant};

use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::backoff::{Backoff, jittered};
use crate::delivery::ack_floor::AckFloor;
use crate::delivery::ordering::Ordering;
use crate::delivery::worker::breaker::Breaker;
use crate::delivery::worker::event_loop::intake::TaskResult;
use crate::delivery::worker::event_loop::outage::Outage;
pub use crate::delivery::worker::event_loop::poison::Quarantine;
use crate::delivery::worker::event_loop::poison::SuspectTracker;
use crate::delivery::worker::leases::{LeaseWatch, WorkerLeases};
use crate::delivery::worker::metrics::GroupMetrics;
use crate::delivery::worker::queue::{DispatchQueue, OrderingKey};
use crate::delivery::worker::retries::Retries;
use crate::delivery::worker::settlements::SettlementQueue;
use crate::delivery::worker::sink_call::SinkCaller;
use crate::delivery::{GroupSpec, IdlePolicy, Worker};
use crate::event::{DeadLetterReason, EntryId};
use crate::log_throttle::ThrottledWarning;
use crate::readiness::Part;
use crate::sink::Origin;
use crate::store::{Cursor, Outcome, Store};

/// How long a fetch waits for entries.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// A store that takes this much longer is not taken for working.
const FETCH_STUCK: Duration = Duration::from_secs(5);
/// The most ids in one claim.
const CLAIM_LIMIT: usize = 100;
/// The most ids in one extension.
const EXTEND_LIMIT: usize = 500;
/// Bytes of payload that one fetch should bring at most, as far as can be foreseen.
const FETCH_BYTES: usize = 8 * 1024 * 1024;
/// Bytes of payload that a worker should hold at most, as far as can be foreseen.
const HELD_BYTES: usize = 4 * FETCH_BYTES;
/// What an entry is taken to hold before any was seen.
const FIRST_GUESS_BYTES: usize = 64 * 1024;
/// Failed entries that a worker remembers.
const REMEMBERED_FAILURES: usize = 10_000;
/// How often readiness hears of a worker at least.
const PULSE: Duration = Duration::from_secs(1);
/// How long settling may go on after the grace time.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// What a worker does next to get entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IntakePhase {
    /// Make sure that the group exists.
    EnsureGroup,
    /// Take what is pending on this consumer and not in hand, from that id on.
    RecoverPending(EntryId),
    /// Fetch new entries.
    Fetch,
}

/// Why a pump has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoopEnd {
    /// It was told to stop, and has handed back what it had.
    Stopped,
    /// The store says that the group's lease is not held any more.
    LeaseLost,
}

/// A batch that the sink has now.
#[derive(Debug)]
struct Running {
    slot: u64,
    ids: Vec<EntryId>,
    lanes: Vec<OrderingKey>,
    oldest: WallInstant,
    /// Whether it is to tell if the sink is up again.
    is_probe: bool,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent steps, each under way or not")]
pub(crate) struct WorkerLoop {
    store: Arc<dyn Store>,
    cursor: Cursor,
    group: GroupSpec,
    caller: Arc<SinkCaller>,
    max_batch: usize,
    meters: GroupMetrics,
    part: Part,
    grace: Duration,
    tasks: JoinSet<TaskResult>,

    permit: LeaseWatch,
    /// The permit's life that is known.
    life: u64,
    /// Whether an order is kept: everything pending in the group is then this worker's.
    is_ordered: bool,
    is_lease_lost: bool,
    /// What an operator should know while all is well.
    note: Option<String>,

    intake: IntakePhase,
    intake_under_way: bool,
    intake_not_before: Instant,
    intake_backoff: Backoff,
    intake_trouble: ThrottledWarning,
    intake_error: Option<String>,
    /// A call whose answer was lost may have left entries pending that are not in hand.
    sweep_due: bool,
    was_ensured: bool,
    /// Whether the last read brought nothing.
    is_at_end: bool,
    floor: Option<AckFloor>,
    fetch_began: Option<Instant>,
    /// Entries that calls under way may bring.
    expected: usize,
    entry_bytes: usize,

    ready: DispatchQueue,
    /// Entries among `ready` that no sink is to see, and why, where the group stops at such an entry.
    unfit: HashMap<EntryId, (DeadLetterReason, String)>,
    /// Why the group has stopped, if it has.
    halted: Option<String>,
    running: Vec<Running>,
    next_slot: u64,
    settlements: SettlementQueue,
    dead_letters: SettlementQueue,
    /// Why entries in `dead_letters` are there.
    burials: HashMap<EntryId, DeadLetterReason>,
    breaker: Breaker,
    /// While the breaker is open.
    outage: Option<Outage>,
    /// Whether an entry was given up and the sink has taken nothing since: where an order is kept, no other entry can
    /// show that the sink works.
    gave_up_in_vain: bool,
    sink_trouble: ThrottledWarning,
    dead_letter_trouble: ThrottledWarning,
    failure_trouble: ThrottledWarning,
    step_trouble: ThrottledWarning,

    suspects: SuspectTracker,

    retries: Retries,
    claiming: Vec<EntryId>,
    claim_not_before: Instant,
    claim_backoff: Backoff,

    search_from: EntryId,
    search_at: Instant,
    is_searching: bool,

    extend_at: Instant,
    is_extending: bool,
    /// Whether this process stood still for so long that others may have what it has in hand: nothing goes to the sink
    /// until the store has said what is still this worker's.
    is_in_doubt: bool,
    /// When the loop was to look at what is due, at the latest.
    wake_at: Instant,
    pulse_at: Instant,

    /// How long the worker stays where there is nothing to do, if it is not for ever.
    stay: Option<IdlePolicy>,
    /// When there was something to do last.
    busy_at: Instant,
    stop: CancellationToken,
    /// When calls of the sink are broken off, and when settling ends, once the worker stops.
    deadlines: Option<(Instant, Instant)>,
}

impl WorkerLoop {
    pub(crate) fn new(worker: &Worker, tenure: &WorkerLeases, stop: CancellationToken) -> Self {
        let group = worker.group.clone();
        let (stream, config) = (&group.stream, &group.config);
        let sink_name = config.sink.clone().unwrap_or_default();
        let label = worker.family.as_ref().map_or(stream.as_str(), |stay| &stay.label);
        let meters = GroupMetrics::new(&worker.metrics, label, &config.name, &sink_name);
        let permit = tenure.permit.clone();
        let caller = SinkCaller {
            sink: worker.sink.clone(),
            name: sink_name,
            origin: Origin { stream: stream.clone(), group: config.name.clone() },
            timeout: config.handler_timeout,
            deliveries: meters.deliveries.clone(),
            handler_seconds: meters.handler_seconds.clone(),
            abort: CancellationToken::new(),
            permit: permit.clone(),
        };
        let cursor = Cursor {
            stream: stream.clone(),
            group: config.name.clone(),
            consumer: tenure.consumer.clone(),
            claim_idle: config.claim_idle,
            lease: tenure.turn.clone(),
        };
        let is_ordered = config.ordering != Ordering::None;
        // Where an order is kept, no search would find again what was forgotten.
        let remembered = if is_ordered { config.max_in_flight.max(REMEMBERED_FAILURES) } else { REMEMBERED_FAILURES };
        let has_other_name = tenure.consumer != worker.consumer;
        let note = has_other_name
            .then(|| format!("works as {}: another daemon has the name {}", tenure.consumer, worker.consumer));
        let now = Instant::now();
        Self {
            store: worker.store.clone(),
            cursor,
            max_batch: worker.sink.max_batch().max(1),
            caller: Arc::new(caller),
            meters,
            part: worker.readiness.clone(),
            grace: worker.grace,
            tasks: JoinSet::new(),
            life: permit.life(),
            permit,
            is_ordered,
            is_lease_lost: false,
            note,
            intake: IntakePhase::EnsureGroup,
            intake_under_way: false,
            intake_not_before: now,
            intake_backoff: Backoff::default(),
            intake_trouble: ThrottledWarning::default(),
            intake_error: None,
            sweep_due: false,
            was_ensured: false,
            is_at_end: false,
            floor: None,
            fetch_began: None,
            expected: 0,
            entry_bytes: FIRST_GUESS_BYTES,
            ready: DispatchQueue::new(config),
            unfit: HashMap::new(),
            halted: None,
            running: Vec::new(),
            next_slot: 0,
            settlements: SettlementQueue::new(),
            dead_letters: SettlementQueue::new(),
            burials: HashMap::new(),
            breaker: Breaker::new(config.breaker.clone()),
            outage: None,
            gave_up_in_vain: false,
            sink_trouble: ThrottledWarning::default(),
            dead_letter_trouble: ThrottledWarning::default(),
            failure_trouble: ThrottledWarning::default(),
            step_trouble: ThrottledWarning::default(),
            suspects: SuspectTracker::new(config, worker.quarantine.clone(), now),
            retries: Retries::new(remembered),
            claiming: Vec::new(),
            claim_not_before: now,
            claim_backoff: Backoff::default(),
            search_from: EntryId::MIN,
            search_at: now,
            is_searching: false,
            extend_at: now + group.config.claim_idle / 3,
            is_extending: false,
            is_in_doubt: false,
            wake_at: now,
            pulse_at: now + PULSE,
            stay: worker.family.clone(),
            busy_at: now,
            stop,
            deadlines: None,
            group,
        }
    }

    pub(crate) async fn run(mut self) -> LoopEnd {
        loop {
            self.start_what_is_due();
            if self.is_lease_lost {
                return LoopEnd::LeaseLost;
            }
            if self.is_finished() {
                break;
            }
            self.wake_at = self.next_wake();
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if self.deadlines.is_none() => self.begin_stop(),
                Some(done) = self.tasks.join_next() => {
                    self.finish(done);
                    while let Some(done) = self.tasks.try_join_next() {
                        self.finish(done);
                    }
                }
                () = self.permit.changed() => {}
                () = sleep_until(self.wake_at) => {}
            }
        }
        self.leave().await;
        LoopEnd::Stopped
    }

    /// A search and a sweep never run beside each other: the sweep would take what the search has just taken for left
    /// over, and count one more attempt.
    fn may_search(&self) -> bool {
        self.intake == IntakePhase::Fetch && !self.is_searching
    }

    fn may_take_in(&self) -> bool {
        let has_to_wait = match self.intake {
            IntakePhase::EnsureGroup => false,
            IntakePhase::RecoverPending(_) => self.is_searching,
            // An outage is a time for one entry after the other anyway.
            IntakePhase::Fetch => self.suspects.awaits_turn() && !self.breaker.is_open(),
        };
        !(self.intake_under_way || has_to_wait)
    }

    /// Whether anything may be taken in hand now.
    fn is_open(&self) -> bool {
        !self.is_stopping() && self.halted.is_none() && self.permit.may_take_in()
    }

    fn is_stopping(&self) -> bool {
        self.deadlines.is_some()
    }

    /// How many entries may still come in.
    fn free_slots(&self) -> usize {
        if self.breaker.is_open() {
            return 0;
        }
        let fit = (HELD_BYTES / self.entry_bytes).max(1);
        // What holds a lane back is not in hand, but what comes behind it has to wait here.
        let taken = self.in_hand() + self.ready.held() + self.expected;
        let room = self.group.config.max_in_flight.min(fit).saturating_sub(taken);
        room.min(self.suspects.most_in_hand().saturating_sub(self.at_risk()))
    }

    fn in_hand(&self) -> usize {
        let running: usize = self.running.iter().map(|running| running.ids.len()).sum();
        self.ready.len() + running + self.settlements.len() + self.dead_letters.len()
    }

    fn in_hand_ids(&self) -> HashSet<EntryId> {
        let ready = self.ready.iter().map(|delivery| delivery.entry.id);
        let running = self.running.iter().flat_map(|running| running.ids.iter().copied());
        let outboxes = self.settlements.ids().chain(self.dead_letters.ids());
        ready.chain(running).chain(outboxes).collect()
    }

    /// Starts every step that can be taken now.
    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        let life = self.permit.life();
        if std::mem::replace(&mut self.life, life) != life {
            self.doubt();
        }
        if now > self.wake_at + self.group.config.claim_idle / 2 {
            self.is_in_doubt = true;
            self.extend_at = now;
        }
        self.start_sink_calls(now);
        self.start_settling(now);
        self.review_suspects(now);
        if now >= self.extend_at && !self.is_extending {
            self.start_extending();
        }
        if self.is_open() {
            self.start_retries(now);
            self.start_search(now);
            self.start_intake(now);
        }
        if now >= self.pulse_at {
            self.pulse_at = now + PULSE;
            self.report(false);
        }
        self.meters.in_flight.set(self.in_hand());
        if let Some((abort_at, _)) = self.deadlines
            && now >= abort_at
        {
            self.caller.abort.cancel();
        }
    }

    /// When something is due that no task's end will tell.
    fn next_wake(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = self.pulse_at;
        let mut at = |due: Instant| wake = wake.min(due);
        if !self.is_extending {
            at(self.extend_at);
        }
        for outbox in [&self.settlements, &self.dead_letters] {
            outbox.due().into_iter().for_each(&mut at);
        }
        if let Some((abort_at, end)) = self.deadlines {
            at(if now < abort_at { abort_at } else { end });
        } else if self.breaker.is_open() && self.is_open() {
            self.next_wake_in_outage().into_iter().for_each(at);
        } else if self.is_open() {
            let has_room = self.free_slots() > 0;
            if let (true, Some(due)) = (self.claiming.is_empty(), self.retries.next_due())
                && (has_room || self.is_ordered)
            {
                at(due.max(self.claim_not_before));
            }
            if has_room && self.may_search() {
                at(self.search_at);
            }
            if has_room && self.may_take_in() {
                at(self.intake_not_before);
            }
        }
        wake
    }

    fn finish(&mut self, done: Result<TaskResult, JoinError>) {
        match done {
            Ok(done) => self.take(done),
            // Panics of store and sink are caught where they are called: this is a defect of the worker itself.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(cancelled) => debug!(error = %cancelled, "a step was cancelled"),
            },
        }
    }

    /// Tells readiness how the worker is; `has_progressed` where a call that reads has just succeeded.
    fn report(&mut self, has_progressed: bool) {
        if let Some(reason) = &self.halted {
            self.part.not_ready(reason.clone());
        } else if let Some(error) = &self.intake_error {
            self.part.not_ready(error.clone());
        } else if let Some(error) = self.settlements.error.as_ref().or(self.dead_letters.error.as_ref()) {
            self.part.not_ready(error.clone());
        } else if !self.permit.may_take_in() {
            let reason = self.permit.trouble().unwrap_or_else(|| "its lease has run out".to_owned());
            self.part.not_ready(reason);
        } else if let Some(Outage { since, reason }) = &self.outage {
            self.part.ready_but(format!("the sink `{}` is down since {since:.0}: {reason}", self.caller.name));
        } else {
            let is_reading = self.fetch_began.is_some_and(|began| began.elapsed() < FETCH_STUCK);
            let is_busy = !self.intake_under_way && !self.running.is_empty();
            let waits = self.ready.held() > 0 || self.suspects.awaits_turn();
            if has_progressed || is_reading || is_busy || waits {
                match &self.note {
                    Some(note) => self.part.ready_but(note.clone()),
                    None => self.part.ready(),
                }
            }
        }
    }

    fn begin_stop(&mut self) {
        debug!(in_hand = self.in_hand(), "the worker stops");
        let abort_at = Instant::now() + self.grace;
        self.deadlines = Some((abort_at, abort_at + FLUSH_TIME));
        for delivery in self.ready.drain() {
            self.settlements.push(delivery, Outcome::Release);
        }
    }

    /// Ends where nothing was to be done for so long that whoever watches the stream may begin again when there is.
    fn leave_if_idle(&mut self) {
        let is_idle = self.in_hand() + self.ready.held() == 0
            && self.retries.is_empty()
            && self.claiming.is_empty()
            && !self.breaker.is_open()
            && self.halted.is_none()
            && !self.sweep_due
            && !self.is_stopping();
        if !is_idle {
            self.busy_at = Instant::now();
        } else if self.stay.as_ref().is_some_and(|stay| self.busy_at.elapsed() >= stay.leave_after) || self.is_crowded()
        {
            self.begin_stop();
        }
    }

    /// Whether others wait for the room that this worker takes.
    fn is_crowded(&self) -> bool {
        self.stay.as_ref().is_some_and(|stay| stay.is_crowded.load(std::sync::atomic::Ordering::Relaxed))
    }

    fn is_finished(&self) -> bool {
        let Some((_, end)) = self.deadlines else { return false };
        let is_done = self.tasks.is_empty() && self.settlements.len() + self.dead_letters.len() == 0;
        is_done || Instant::now() >= end
    }

    /// Gives up the consumer, if nothing is pending on it.
    async fn leave(mut self) {
        let left = self.in_hand();
        if left > 0 {
            warn!(entries = left, "the worker ends with entries unsettled: they will be delivered again");
        }
        self.meters.in_flight.set(0);
        match timeout(FLUSH_TIME, self.store.remove_consumer(&self.cursor)).await {
            Ok(Ok(is_removed)) => debug!(is_removed, "the worker has ended"),
            Ok(Err(error)) => debug!(error = %error, "the consumer stays in its group"),
            Err(_elapsed) => debug!("the consumer stays in its group: the store does not answer"),
        }
    }

    /// When to search for idle entries again.
    fn next_search(&self) -> Instant {
        Instant::now() + jittered(self.group.config.claim_idle / 4)
    }
}
