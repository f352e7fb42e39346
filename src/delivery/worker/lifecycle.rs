//! Lifecycle: the state of a worker, its deadlines when it stops, and its heartbeat for readiness.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use crate::delivery::IdlePolicy;
use crate::store::{StoreError, StoreErrorKind};

/// The longest time between two reports to readiness.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long settling may go on after the grace time.
pub(crate) const FLUSH_TIME: Duration = Duration::from_secs(5);

/// The state of a worker's loop. The doc of [`super::event_loop`] describes the transitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WorkerState {
    /// Takes entries in and delivers them.
    Running,
    /// Keeps its entries and delivers none, because the group stops at an entry (`on_poison = "halt"`).
    Halted,
    /// Stops: takes nothing in, lets calls of the sink end until `abort_at`, and settles.
    Draining { abort_at: Instant, end: Instant },
    /// Has cancelled the calls of the sink, and settles until `end`.
    Aborting { end: Instant },
    /// Has lost the group lease, and with it all entries in flight.
    LeaseLost,
}

/// The state and the clock of one worker.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: WorkerState,
    /// The reason of the halt. It stays reported while the worker drains.
    halt_reason: Option<String>,
    grace: Duration,
    idle_policy: Option<IdlePolicy>,
    busy_at: Instant,
    next_heartbeat: Instant,
}

/// The things that the loop has to do because of the time.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// Reports to readiness.
    pub(crate) is_heartbeat_due: bool,
    /// Cancels the calls of the sink.
    pub(crate) is_abort_due: bool,
}

impl Lifecycle {
    pub(crate) fn new(grace: Duration, idle_policy: Option<IdlePolicy>, now: Instant) -> Self {
        let next_heartbeat = now + HEARTBEAT;
        Self { state: WorkerState::Running, halt_reason: None, grace, idle_policy, busy_at: now, next_heartbeat }
    }

    /// Changes the state if its time is over, and returns the timeouts that are due.
    pub(crate) fn start(&mut self, now: Instant) -> Timeouts {
        let is_heartbeat_due = now >= self.next_heartbeat;
        if is_heartbeat_due {
            self.next_heartbeat = now + HEARTBEAT;
        }
        let is_abort_due = matches!(self.state, WorkerState::Draining { abort_at, .. } if now >= abort_at);
        if let WorkerState::Draining { end, .. } = self.state
            && is_abort_due
        {
            self.state = WorkerState::Aborting { end };
        }
        Timeouts { is_heartbeat_due, is_abort_due }
    }

    /// Returns when the next timeout is due, or the end of the worker.
    pub(crate) fn next_due(&self) -> Instant {
        match self.state {
            WorkerState::Draining { abort_at, .. } => self.next_heartbeat.min(abort_at),
            WorkerState::Aborting { end } => self.next_heartbeat.min(end),
            WorkerState::Running | WorkerState::Halted | WorkerState::LeaseLost => self.next_heartbeat,
        }
    }

    pub(crate) fn state(&self) -> WorkerState {
        self.state
    }

    pub(crate) fn halt_reason(&self) -> Option<&str> {
        self.halt_reason.as_deref()
    }

    /// Returns whether the worker drains or aborts.
    pub(crate) fn is_stopping(&self) -> bool {
        matches!(self.state, WorkerState::Draining { .. } | WorkerState::Aborting { .. })
    }

    /// Returns whether the time for settling is over.
    pub(crate) fn is_out_of_time(&self, now: Instant) -> bool {
        matches!(self.state, WorkerState::Draining { end, .. } | WorkerState::Aborting { end } if now >= end)
    }

    /// Starts to drain, unless the worker stops already.
    pub(crate) fn begin_drain(&mut self, now: Instant) {
        if matches!(self.state, WorkerState::Running | WorkerState::Halted) {
            let abort_at = now + self.grace;
            self.state = WorkerState::Draining { abort_at, end: abort_at + FLUSH_TIME };
        }
    }

    /// Halts the group. A worker that stops already goes on stopping.
    pub(crate) fn halt(&mut self, reason: String) {
        if self.state == WorkerState::Running {
            self.state = WorkerState::Halted;
        }
        self.halt_reason = Some(reason);
    }

    /// Ends the worker if the error means that the group lease is lost. Returns whether it does.
    pub(crate) fn lose_lease(&mut self, error: &StoreError) -> bool {
        let is_lost = error.kind() == StoreErrorKind::LeaseLost;
        if is_lost {
            self.state = WorkerState::LeaseLost;
        }
        is_lost
    }

    /// Takes note that the worker has something to do.
    pub(crate) fn stay_busy(&mut self, now: Instant) {
        self.busy_at = now;
    }

    /// Returns whether an idle worker of a family member should end, so that its room is free for others.
    pub(crate) fn is_idle_too_long(&self, now: Instant) -> bool {
        let is_over = |policy: &IdlePolicy| now.duration_since(self.busy_at) >= policy.leave_after;
        self.idle_policy.as_ref().is_some_and(is_over) || self.is_crowded()
    }

    /// Returns whether other members of the family wait for a worker.
    pub(crate) fn is_crowded(&self) -> bool {
        self.idle_policy.as_ref().is_some_and(|policy| policy.is_crowded.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn drain_becomes_abort_after_the_grace_time() {
        let now = Instant::now();
        let mut lifecycle = Lifecycle::new(SECOND * 20, None, now);
        lifecycle.halt("poison".to_owned());
        assert_eq!(lifecycle.state(), WorkerState::Halted);
        lifecycle.begin_drain(now);
        let (abort_at, end) = (now + SECOND * 20, now + SECOND * 20 + FLUSH_TIME);
        assert_eq!(lifecycle.state(), WorkerState::Draining { abort_at, end });
        lifecycle.begin_drain(now + SECOND);
        assert_eq!(lifecycle.state(), WorkerState::Draining { abort_at, end }, "a second stop changes nothing");
        assert_eq!(lifecycle.halt_reason(), Some("poison"));
        assert_eq!(lifecycle.start(now), Timeouts::default());
        assert!(lifecycle.start(abort_at).is_abort_due);
        assert!(!lifecycle.start(abort_at).is_abort_due, "calls are cancelled once");
        assert_eq!(lifecycle.state(), WorkerState::Aborting { end });
        assert!(!lifecycle.is_out_of_time(abort_at) && lifecycle.is_out_of_time(end));
    }
}
