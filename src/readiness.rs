//! Whether each part of the daemon can do its work, told by the parts themselves.
//!
//! Readiness is about progress, not about sockets: a part that works reports it again and again, and one that has
//! not done so for too long counts as stuck.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The parts of the daemon and how they are.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    parts: Arc<Mutex<BTreeMap<String, State>>>,
}

#[derive(Debug)]
struct State {
    /// `None` while the part is ready.
    reason: Option<String>,
    note: Option<String>,
    reported_at: Instant,
    stale_after: Option<Duration>,
}

/// One part's way to report. Forgotten parts stay in the list: what was declared must be ready.
#[derive(Debug, Clone)]
pub struct Part {
    name: Arc<str>,
    readiness: Readiness,
}

/// How one part is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartReport {
    /// The part's name, such as `store` or `worker aurora:alerts/siem`.
    pub name: String,
    /// Why it is not ready; nothing when it is.
    pub reason: Option<String>,
    /// What an operator should see to although the part can work.
    pub note: Option<String>,
}

impl Readiness {
    /// Declares a part: not ready until it says so, and stuck when it says nothing for `stale_after`.
    pub fn part(&self, name: &str, stale_after: Option<Duration>) -> Part {
        let state = State { reason: Some("starting".to_owned()), note: None, reported_at: Instant::now(), stale_after };
        self.lock().insert(name.to_owned(), state);
        Part { name: name.into(), readiness: self.clone() }
    }

    /// Every part, by name.
    pub fn report(&self) -> Vec<PartReport> {
        let now = Instant::now();
        let parts = self.lock();
        let report = |(name, state): (&String, &State)| {
            let silence = now.duration_since(state.reported_at);
            let is_stuck = state.stale_after.is_some_and(|limit| silence > limit);
            let stuck = || is_stuck.then(|| format!("no progress for {} s", silence.as_secs()));
            PartReport { name: name.clone(), reason: state.reason.clone().or_else(stuck), note: state.note.clone() }
        };
        parts.iter().map(report).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, State>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    /// The part has just made progress.
    pub fn ready(&self) {
        self.set(None, None);
    }

    /// The same, and something that an operator should see to.
    pub fn ready_but(&self, note: impl Into<String>) {
        self.set(None, Some(note.into()));
    }

    /// The part can't do its work, and why, in words for an operator.
    pub fn not_ready(&self, reason: impl Into<String>) {
        self.set(Some(reason.into()), None);
    }

    fn set(&self, reason: Option<String>, note: Option<String>) {
        if let Some(state) = self.readiness.lock().get_mut(self.name.as_ref()) {
            state.reason = reason;
            state.note = note;
            state.reported_at = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_ready_only_after_it_said_so() {
        let readiness = Readiness::default();
        let part = readiness.part("store", None);
        assert_eq!(readiness.report()[0].reason.as_deref(), Some("starting"));
        part.ready();
        assert_eq!(readiness.report()[0].reason, None);
        part.ready_but("nearly full");
        let report = readiness.report().remove(0);
        assert_eq!((report.reason, report.note.as_deref()), (None, Some("nearly full")));
        part.not_ready("loading");
        assert_eq!(readiness.report()[0].reason.as_deref(), Some("loading"));
    }

    #[test]
    fn a_silent_part_counts_as_stuck() {
        let readiness = Readiness::default();
        readiness.part("relay", Some(Duration::ZERO)).ready();
        let reason = readiness.report()[0].reason.clone().expect("stuck");
        assert!(reason.starts_with("no progress for"), "{reason}");
    }
}
