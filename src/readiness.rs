//! Readiness: each part of the daemon reports whether it can do its work.
//!
//! Readiness is about progress, not about sockets: a working part reports again and again. A part without a recent
//! report counts as stuck.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The parts of the daemon and their states. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    parts: Arc<Mutex<BTreeMap<String, PartState>>>,
}

#[derive(Debug)]
struct PartState {
    /// `None` while the part is ready.
    reason: Option<String>,
    note: Option<String>,
    reported_at: Instant,
    stale_after: Option<Duration>,
}

/// The handle by which one part reports. Its entry stays after the handle is dropped: declared parts must be ready.
#[derive(Debug, Clone)]
pub struct Part {
    name: Arc<str>,
    readiness: Readiness,
}

/// The state of one part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartReport {
    /// The part's name, such as `store` or `worker aurora:alerts/siem`.
    pub name: String,
    /// The reason why the part is not ready. `None` if it is ready.
    pub reason: Option<String>,
    /// A condition that an operator should see to, although the part works.
    pub note: Option<String>,
}

impl Readiness {
    /// Declares a part. It is not ready until its first report, and stuck without a report for `stale_after`.
    pub fn part(&self, name: &str, stale_after: Option<Duration>) -> Part {
        let state =
            PartState { reason: Some("starting".to_owned()), note: None, reported_at: Instant::now(), stale_after };
        self.lock().insert(name.to_owned(), state);
        Part { name: name.into(), readiness: self.clone() }
    }

    /// Returns the state of every part, by name.
    pub fn report(&self) -> Vec<PartReport> {
        let now = Instant::now();
        let parts = self.lock();
        let report = |(name, state): (&String, &PartState)| {
            let silence = now.duration_since(state.reported_at);
            let is_stuck = state.stale_after.is_some_and(|limit| silence > limit);
            let stuck = || is_stuck.then(|| format!("no progress for {} s", silence.as_secs()));
            PartReport { name: name.clone(), reason: state.reason.clone().or_else(stuck), note: state.note.clone() }
        };
        parts.iter().map(report).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, PartState>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    /// Reports progress.
    pub fn ready(&self) {
        self.set(None, None);
    }

    /// Reports progress, and a condition that an operator should see to.
    pub fn ready_but(&self, note: impl Into<String>) {
        self.set(None, Some(note.into()));
    }

    /// Reports that the part cannot work, with the reason in words.
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
    fn part_is_ready_only_after_its_first_report() {
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
    fn part_without_reports_is_stuck() {
        let readiness = Readiness::default();
        readiness.part("relay", Some(Duration::ZERO)).ready();
        let reason = readiness.report()[0].reason.clone().expect("stuck");
        assert!(reason.starts_with("no progress for"), "{reason}");
    }
}
