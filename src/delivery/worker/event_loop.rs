//! The worker's loop: fetches entries, passes them to the sink, and settles the outcome.
//!
//! Every call of the store or the sink is a [task](tasks), so that none waits for another. The loop consists
//! of parts. Each part owns one kind of task, and has two methods side by side: `start` begins the next task if it is
//! due, and `next_due` returns when that is. Both read the same facts, so they cannot disagree. The loop
//! starts every part, then sleeps until the earliest `next_due` or the end of a task.
//!
//! # The life of a worker
//!
//! 1. [`Intake`] makes sure that the group exists, recovers entries that are pending on this consumer, then fetches new
//!    ones. An error leads back to recovery, and a missing group back to the first step.
//! 2. `arrivals` queues entries for the sink, and settles entries that the sink must not see.
//! 3. [`InFlight`] passes batches from its queue to the sink, up to `concurrency` at a time.
//! 4. `outcomes` decides about each delivery: acknowledge, retry, requeue, dead-letter or halt.
//! 5. [`Settler`] sends these settlements to the store.
//! 6. [`Claims`] claims failed entries again when their next attempt is due, and leads back to step 2.
//!
//! Beside this path, [`Search`] claims entries that other consumers left, [`Ownership`] extends the entries in flight,
//! [`SinkHealth`] pauses the calls during an outage, and [`SuspectTracker`] limits the entries beside a suspect.
//!
//! [`Lifecycle`] has the [state](WorkerState) of the loop:
//!
//! - `Running`: all parts work. It becomes `Halted` at an entry that is given up (`on_poison = "halt"`). It becomes
//!   `Draining` if the worker is stopped, or if it works for an idle member of a family.
//! - `Halted`: nothing is taken in or delivered. Settling and extending go on, until the worker is stopped.
//! - `Draining`: queued entries are released, and calls of the sink may end. It becomes `Aborting` after the grace
//!   time.
//! - `Aborting`: calls of the sink are cancelled. Their entries are settled for a retry.
//! - `LeaseLost`: another worker has the group lease. The loop ends at once, from any other state.
//!
//! `Draining` and `Aborting` end when everything is settled, at the latest after the time for settling.

#[cfg(test)]
mod tests;

use std::collections::HashSet;

use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::delivery::Worker;
use crate::delivery::ordering::Ordering;
use crate::delivery::worker::claims::Claims;
use crate::delivery::worker::context::{Conditions, WorkerContext};
use crate::delivery::worker::in_flight::{Dispatch, InFlight};
use crate::delivery::worker::intake::Intake;
use crate::delivery::worker::leases::WorkerLeases;
use crate::delivery::worker::lifecycle::{FLUSH_TIME, Lifecycle, WorkerState};
use crate::delivery::worker::metrics::GroupMetrics;
use crate::delivery::worker::ownership::Ownership;
use crate::delivery::worker::poison::SuspectTracker;
use crate::delivery::worker::search::Search;
use crate::delivery::worker::settler::Settler;
use crate::delivery::worker::sink_call::SinkCaller;
use crate::delivery::worker::sink_health::SinkHealth;
use crate::delivery::worker::tasks::{Task, TaskResult};
use crate::event::EntryId;
use crate::log_throttle::ThrottledWarning;
use crate::sink::Origin;
use crate::store::{Cursor, Outcome};

/// The end of a worker's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoopEnd {
    /// The worker was stopped, and has released its entries.
    Stopped,
    /// The store reports that the group lease is lost.
    LeaseLost,
}

/// The parts of one worker, and the tasks under way.
#[derive(Debug)]
pub(crate) struct WorkerLoop {
    pub(crate) context: WorkerContext,
    pub(crate) intake: Intake,
    pub(crate) in_flight: InFlight,
    pub(crate) settler: Settler,
    pub(crate) claims: Claims,
    pub(crate) search: Search,
    pub(crate) ownership: Ownership,
    pub(crate) sink_health: SinkHealth,
    pub(crate) suspects: SuspectTracker,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) step_warning: ThrottledWarning,
    /// A note for operators while all is well.
    note: Option<String>,
    stop: CancellationToken,
    tasks: JoinSet<TaskResult>,
}

impl WorkerLoop {
    pub(crate) fn new(worker: &Worker, leases: &WorkerLeases, stop: CancellationToken) -> Self {
        let (group, now) = (worker.group.clone(), Instant::now());
        let (stream, config) = (&group.stream, &group.config);
        let sink_name = config.sink.clone().unwrap_or_default();
        let label = worker.idle_policy.as_ref().map_or(stream.as_str(), |policy| &policy.label);
        let metrics = GroupMetrics::new(&worker.metrics, label, &config.name, &sink_name);
        let caller = SinkCaller {
            sink: worker.sink.clone(),
            name: sink_name,
            origin: Origin { stream: stream.clone(), group: config.name.clone() },
            timeout: config.handler_timeout,
            deliveries: metrics.deliveries.clone(),
            handler_seconds: metrics.handler_seconds.clone(),
            abort: CancellationToken::new(),
            leases: leases.watch.clone(),
        };
        let cursor = Cursor {
            stream: stream.clone(),
            group: config.name.clone(),
            consumer: leases.consumer.clone(),
            claim_idle: config.claim_idle,
            lease: leases.group.clone(),
        };
        let note = (leases.consumer != worker.consumer)
            .then(|| format!("works as {}: another daemon has the name {}", leases.consumer, worker.consumer));
        let claim_idle = config.claim_idle;
        let suspects = SuspectTracker::new(config, worker.quarantine.clone(), now);
        let context = WorkerContext {
            store: worker.store.clone(),
            cursor,
            caller: caller.into(),
            max_batch: worker.sink.max_batch().max(1),
            leases: leases.watch.clone(),
            part: worker.readiness.clone(),
            metrics,
            is_ordered: config.ordering != Ordering::None,
            group,
        };
        Self {
            intake: Intake::new(now),
            in_flight: InFlight::new(&context),
            settler: Settler::new(now),
            claims: Claims::new(&context, now),
            search: Search::new(claim_idle, now),
            ownership: Ownership::new(context.leases.generation(), claim_idle, now),
            sink_health: SinkHealth::new(&context),
            suspects,
            lifecycle: Lifecycle::new(worker.grace, worker.idle_policy.clone(), now),
            step_warning: ThrottledWarning::default(),
            note,
            stop,
            tasks: JoinSet::new(),
            context,
        }
    }

    pub(crate) async fn run(mut self) -> LoopEnd {
        loop {
            let now = Instant::now();
            self.start_due_tasks(now);
            if self.lifecycle.state() == WorkerState::LeaseLost {
                return LoopEnd::LeaseLost;
            }
            if self.is_finished(now) {
                break;
            }
            let wake_at = self.next_due(now);
            self.ownership.sleep_until(wake_at);
            tokio::select! {
                biased;
                () = self.stop.cancelled(), if !self.lifecycle.is_stopping() => self.begin_stop(Instant::now()),
                Some(ended) = self.tasks.join_next() => {
                    let now = Instant::now();
                    self.on_task_ended(ended, now);
                    while let Some(ended) = self.tasks.try_join_next() {
                        self.on_task_ended(ended, now);
                    }
                }
                () = self.context.leases.changed() => {}
                () = sleep_until(wake_at) => {}
            }
        }
        self.leave().await;
        LoopEnd::Stopped
    }

    /// Starts every task that is due. The order of the parts is fixed: earlier ones make room, or take it first.
    fn start_due_tasks(&mut self, now: Instant) {
        if self.ownership.has_new_lease(self.context.leases.generation()) {
            // While the name was lost, another worker may have left entries pending on it.
            self.intake.request_recovery();
        }
        self.ownership.check_clock(now);
        self.dispatch(now);
        while let Some(task) = self.settler.start(now, &self.context) {
            self.spawn(task);
        }
        let (is_claiming, is_sink_down) = (self.is_claiming(), self.sink_health.is_down());
        self.suspects.start(now, is_claiming, is_sink_down, || self.in_flight.ids());
        let old_entries = |age| {
            let held = self.in_flight.older_than(age).chain(self.settler.older_than(age));
            let retries = &self.claims.retries;
            if is_sink_down {
                held.chain(retries.waiting()).collect()
            } else {
                held.chain(retries.waiting_long()).collect()
            }
        };
        let task = self.ownership.start(now, old_entries, &self.context);
        self.spawn(task);
        let task = self.claims.start(now, &self.conditions(), &self.context);
        self.spawn(task);
        let task = self.search.start(now, &self.conditions(), &mut self.suspects, &self.context);
        self.spawn(task);
        let task = self.intake.start(now, &self.conditions(), &self.context);
        self.spawn(task);
        let timeouts = self.lifecycle.start(now);
        if timeouts.is_heartbeat_due {
            self.report(false, now);
        }
        self.in_flight.set_gauge(self.held());
        if timeouts.is_abort_due {
            self.context.caller.abort.cancel();
        }
    }

    /// Passes queued entries to the sink until it has enough, or the group halts.
    fn dispatch(&mut self, now: Instant) {
        loop {
            let may_deliver = self.may_deliver();
            match self.in_flight.start(now, may_deliver, &mut self.sink_health, &self.context) {
                Some(Dispatch::Call(task)) => self.spawn(task),
                Some(Dispatch::Undeliverable { delivery, error }) => self.halt(delivery, &error),
                None => return,
            }
        }
    }

    /// Returns when the next task is due of its own. The end of a task may make others due earlier.
    fn next_due(&self, now: Instant) -> Instant {
        let facts = self.conditions();
        let due = [
            self.in_flight.next_due(now, self.may_deliver(), &self.sink_health, &self.context),
            self.settler.next_due(),
            self.suspects.next_due(now, self.is_claiming(), facts.is_sink_down),
            self.ownership.next_due(),
            self.claims.next_due(&facts, &self.context),
            self.search.next_due(&facts),
            self.intake.next_due(&facts, &self.context),
        ];
        due.into_iter().flatten().fold(self.lifecycle.next_due(), Instant::min)
    }

    pub(crate) fn spawn(&mut self, task: impl Into<Option<Task>>) {
        if let Some(task) = task.into() {
            self.in_flight.expect(task.expected);
            self.tasks.spawn(task.future);
        }
    }

    fn on_task_ended(&mut self, ended: Result<TaskResult, JoinError>, now: Instant) {
        match ended {
            Ok(result) => self.on_result(result, now),
            // The callers catch panics of the store and of the sink. So this is a defect of the worker itself.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(cancelled) => debug!(error = %cancelled, "task cancelled"),
            },
        }
    }

    fn on_result(&mut self, result: TaskResult, now: Instant) {
        match result {
            TaskResult::GroupEnsured(result) => self.on_group_ensured(result, now),
            TaskResult::PendingListed { limit, result } => self.on_pending_listed(limit, result, now),
            TaskResult::Fetched { limit, result } => self.on_fetched(limit, result, now),
            TaskResult::Claimed { reason, ids, result } => self.on_claimed(reason, &ids, result, now),
            TaskResult::Searched { limit, result } => self.on_searched(limit, result, now),
            TaskResult::Extended { was_uncertain, result } => self.on_extended(was_uncertain, result, now),
            TaskResult::SinkCalled { call, result } => self.on_sink_called(call, result, now),
            TaskResult::Settled { is_dead_letters, batch, result } => {
                self.on_settled(is_dead_letters, batch, result, now);
            }
        }
    }

    /// Returns the facts that decide whether the parts may start their next tasks.
    fn conditions(&self) -> Conditions {
        Conditions {
            is_open: self.lifecycle.state() == WorkerState::Running && self.context.leases.may_take_in(),
            is_sink_down: self.sink_health.is_down(),
            is_fetching: self.intake.is_fetching(),
            is_searching: self.search.is_busy(),
            awaits_isolation: self.suspects.awaits_isolation(),
            is_crowded: self.lifecycle.is_crowded(),
            free_slots: self.free_slots(),
            probe_slots: self.probe_slots(),
            retry_slots: self.retry_slots(),
            unsettled: self.unsettled(),
        }
    }

    fn may_deliver(&self) -> bool {
        self.lifecycle.halt_reason().is_none() && !self.ownership.is_uncertain() && self.context.leases.may_deliver()
    }

    fn is_claiming(&self) -> bool {
        self.search.is_busy() || self.intake.is_busy()
    }

    /// Returns how many entries may still come in.
    fn free_slots(&self) -> usize {
        if self.sink_health.is_down() {
            return 0;
        }
        // A blocked entry is not in flight, but the entries behind it are queued here.
        let taken = self.held() + self.in_flight.queue.blocked() + self.in_flight.expected();
        let room = self.max_held().saturating_sub(taken);
        room.min(self.suspects.max_in_flight().saturating_sub(self.unsettled()))
    }

    /// Returns how many entries may come in as probes during an outage: one, if the sink was tried with all others.
    fn probe_slots(&self) -> usize {
        let may_need_probe =
            self.sink_health.is_down() && self.in_flight.expected() == 0 && self.held() < self.max_held();
        let was_tried = |id: EntryId| self.sink_health.breaker.was_tried(id);
        usize::from(may_need_probe && self.in_flight.queue.iter().all(|delivery| was_tried(delivery.entry.id)))
    }

    /// Returns how many retries may come in as probes during an outage: one, if there is no other entry to try.
    fn retry_slots(&self) -> usize {
        let is_queue_empty = self.in_flight.queue.len() == 0;
        if self.context.is_ordered {
            usize::from(self.in_flight.queue.first().is_none() && !self.in_flight.is_calling())
        } else if is_queue_empty || self.intake.is_at_end() {
            self.probe_slots()
        } else {
            0
        }
    }

    fn max_held(&self) -> usize {
        self.context.group.config.max_in_flight.min(self.intake.held_limit())
    }

    /// Returns how many entries the worker holds: in flight, or not settled yet.
    fn held(&self) -> usize {
        self.in_flight.len() + self.settler.len()
    }

    pub(crate) fn held_ids(&self) -> HashSet<EntryId> {
        self.in_flight.ids().into_iter().chain(self.settler.ids()).collect()
    }

    /// Returns how many entries a crash would deliver once more. Dead letters are given up already.
    pub(crate) fn unsettled(&self) -> usize {
        self.in_flight.len() + self.settler.settlements.len() + self.in_flight.expected()
    }

    /// Reports to readiness. `has_progressed` is true if a call has just read from the stream.
    pub(crate) fn report(&self, has_progressed: bool, now: Instant) {
        let part = &self.context.part;
        let error = self.lifecycle.halt_reason().or(self.intake.error()).or(self.settler.error());
        if let Some(error) = error {
            part.not_ready(error);
        } else if !self.context.leases.may_take_in() {
            part.not_ready(self.context.leases.error().unwrap_or_else(|| "the lease has run out".to_owned()));
        } else if let Some(note) = self.sink_health.note(&self.context) {
            part.ready_but(note);
        } else {
            let is_busy = !self.intake.is_busy() && self.in_flight.is_calling();
            let waits = self.in_flight.queue.blocked() > 0 || self.suspects.awaits_isolation();
            if has_progressed || self.intake.is_reading(now) || is_busy || waits {
                match &self.note {
                    Some(note) => part.ready_but(note.clone()),
                    None => part.ready(),
                }
            }
        }
    }

    fn begin_stop(&mut self, now: Instant) {
        debug!(in_hand = self.held(), "worker stopping");
        self.lifecycle.begin_drain(now);
        let queued = self.in_flight.queue.drain();
        self.settler.push_all(queued, &Outcome::Release);
    }

    /// Stops a worker of a family member that was idle for long. New entries of the member start another one.
    pub(crate) fn leave_if_idle(&mut self, now: Instant) {
        let is_idle = self.held() + self.in_flight.queue.blocked() == 0
            && self.claims.retries.is_empty()
            && self.claims.is_idle()
            && !self.sink_health.is_down()
            && !self.intake.needs_recovery()
            && self.lifecycle.state() == WorkerState::Running;
        if !is_idle {
            self.lifecycle.stay_busy(now);
        } else if self.lifecycle.is_idle_too_long(now) {
            self.begin_stop(now);
        }
    }

    fn is_finished(&self, now: Instant) -> bool {
        let is_done = self.lifecycle.is_stopping() && self.tasks.is_empty() && self.settler.len() == 0;
        is_done || self.lifecycle.is_out_of_time(now)
    }

    /// Removes the consumer from the group if nothing is pending on it.
    async fn leave(mut self) {
        let left = self.held();
        if left > 0 {
            warn!(entries = left, "worker ended with unsettled entries, they will be delivered again");
        }
        self.in_flight.set_gauge(0);
        match timeout(FLUSH_TIME, self.context.store.remove_consumer(&self.context.cursor)).await {
            Ok(Ok(is_removed)) => debug!(is_removed, "worker ended"),
            Ok(Err(error)) => debug!(error = %error, "consumer not removed"),
            Err(_elapsed) => debug!("consumer not removed: the store does not respond"),
        }
    }
}
