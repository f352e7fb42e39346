//! Retention of dead letters: warns before the limits are reached, and records every removal.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::clock::since_epoch;
use crate::dead_letters::audit::{AuditAction, AuditContext};
use crate::dead_letters::scan::{DeadLetterCursor, PageScan};
use crate::dead_letters::selection::{DeadLetterEntry, Selection};
use crate::dead_letters::{FillLevel, Inner, SharedStoreError};
use crate::event::{EntryId, StreamName};
use crate::readiness::Part;
use crate::store::{StoreError, StoreErrorKind};

/// Interval between two checks of a stream of dead letters.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// Number of passes in which each dead-letter stream of a family is checked once.
const PASSES: usize = 12;
/// Timeout of one step with the store.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Keeps streams of dead letters within their limits.
#[derive(Debug)]
pub struct DeadLetterRetention {
    inner: Arc<Inner>,
    /// Streams with a reported high fill level.
    high: BTreeSet<StreamName>,
    /// Streams with a reported failure.
    failing: BTreeSet<StreamName>,
    /// Length of each stream at its last check.
    lengths: BTreeMap<StreamName, u64>,
    pass: usize,
}

impl DeadLetterRetention {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self { inner, high: BTreeSet::new(), failing: BTreeSet::new(), lengths: BTreeMap::new(), pass: 0 }
    }

    /// Keeps dead letters within their limits until `stop`. A high fill level is reported to `part` and never makes it
    /// unready.
    pub async fn run(mut self, part: Part, stop: CancellationToken) {
        loop {
            let check = self.check(&part);
            if stop.run_until_cancelled(check).await.is_none() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(CHECK_INTERVAL) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn check(&mut self, part: &Part) {
        let mut notes = Vec::new();
        for stream in self.due() {
            match self.enforce(&stream).await {
                Ok(level) => {
                    if self.failing.remove(&stream) {
                        tracing::info!(stream = %stream, "dead-letter retention recovered");
                    }
                    self.report(&stream, &level);
                    notes.extend(level.alarm);
                    self.lengths.insert(stream, level.length);
                }
                Err(error) => {
                    notes.push(format!("retention of `{stream}` failed: {error}"));
                    // The check of the store reports an unavailable store.
                    if error.kind() != StoreErrorKind::Unavailable && self.failing.insert(stream.clone()) {
                        tracing::warn!(stream = %stream, error = %error, "dead-letter retention failed, trying again");
                    }
                }
            }
        }
        self.update_gauges();
        if notes.is_empty() {
            part.ready();
        } else {
            part.ready_but(notes.join("; "));
        }
    }

    /// Returns the streams to check in this pass. Families can have thousands of streams, so they are spread over
    /// [`PASSES`].
    fn due(&mut self) -> BTreeSet<StreamName> {
        self.pass = (self.pass + 1) % PASSES;
        let mut due = BTreeSet::new();
        for source in &self.inner.sources {
            if let Some(one) = source.dead_letter.stream() {
                due.insert(one.clone());
                continue;
            }
            let members = self.inner.streams_of(source).into_iter().enumerate();
            due.extend(members.filter(|(place, _)| place % PASSES == self.pass).map(|(_, (_, dead))| dead));
        }
        due
    }

    /// Updates the gauges. Streams of one family share a label: the sum of lengths, and the ratio of the fullest.
    fn update_gauges(&self) {
        let mut shown: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for (stream, length) in &self.lengths {
            let (sum, most) = shown.entry(self.inner.label(stream)).or_default();
            (*sum, *most) = (*sum + length, (*most).max(*length));
        }
        let metrics = &self.inner.metrics;
        for (label, (sum, most)) in shown {
            metrics.dead_letter_length.with_label_values(&[label]).set(i64::try_from(sum).unwrap_or(i64::MAX));
            metrics.dead_letter_capacity_ratio.with_label_values(&[label]).set(self.inner.fill_ratio(most));
            // Creates the counter at the start, so that its first increment is visible.
            metrics.dead_letters_expired.with_label_values(&[label]).inc_by(0);
        }
    }

    fn report(&mut self, stream: &StreamName, level: &FillLevel) {
        let (length, max_len) = (level.length, level.max_len);
        if level.alarm.is_none() {
            if self.high.remove(stream) {
                tracing::info!(stream = %stream, length, max_len, "dead letters below the alarm level again");
            }
        } else if self.high.insert(stream.clone()) {
            tracing::warn!(
                stream = %stream,
                length,
                max_len,
                "dead letters fill up, replay or discard them: at the limit the oldest are removed unhandled"
            );
        }
    }

    /// Removes dead letters beyond the limits. Returns the fill level after it.
    async fn enforce(&self, stream: &StreamName) -> Result<FillLevel, SharedStoreError> {
        let mut scan = PageScan::new(DeadLetterCursor::default(), &Selection::default());
        loop {
            let step = timeout(STEP_TIMEOUT, self.step(stream, &mut scan)).await.unwrap_or_else(|_elapsed| {
                Err(Arc::new(StoreError::new(StoreErrorKind::Unavailable, "the store does not respond")))
            });
            let (level, is_done) = step?;
            if is_done {
                return Ok(level);
            }
        }
    }

    /// Runs one step. Returns the fill level, and whether no work is left.
    async fn step(&self, stream: &StreamName, scan: &mut PageScan) -> Result<(FillLevel, bool), SharedStoreError> {
        let Inner { store, config, metrics, .. } = &*self.inner;
        let before = self.inner.fill_level(stream, store.describe(stream).await?.as_ref());
        let oldest =
            EntryId::new(u64::try_from(since_epoch().saturating_sub(config.max_age).as_millis()).unwrap_or(0), 0);
        let is_due = before.length > config.max_len || before.first_id.is_some_and(|first| first < oldest);
        if !is_due {
            return Ok((before, true));
        }
        let Some(entries) = scan.next(&**store, stream).await? else { return Ok((before, true)) };
        // The length is read after the oldest entries. If another daemon has removed some since, the excess is only
        // smaller, so that daemons together never remove too many.
        let level = self.inner.fill_level(stream, store.describe(stream).await?.as_ref());
        let excess = usize::try_from(level.length.saturating_sub(config.max_len)).unwrap_or(usize::MAX);
        let read = entries.len();
        let removed_entries = entries.into_iter().enumerate().take_while(|(n, entry)| *n < excess || entry.id < oldest);
        let removed_entries: Vec<DeadLetterEntry> =
            removed_entries.map(|(_, entry)| DeadLetterEntry::new(entry)).collect();
        if removed_entries.is_empty() {
            return Ok((level, true));
        }
        let action =
            AuditContext { kind: AuditAction::Expire, actor: "retention", stream, selection: None, replay: None };
        self.inner.write_audit(&action, &removed_entries.iter().collect::<Vec<_>>()).await?;
        let ids: Vec<EntryId> = removed_entries.iter().map(|found| found.entry.id).collect();
        let removed = store.discard(stream, &ids).await?;
        metrics.dead_letters_expired.with_label_values(&[self.inner.label(stream)]).inc_by(removed);
        let (first, last) = (ids.first().map(ToString::to_string), ids.last().map(ToString::to_string));
        tracing::warn!(stream = %stream, removed, first, last, "dead letters removed by retention, unhandled");
        let is_done = ids.len() < read;
        let level = if is_done { self.inner.fill_level(stream, store.describe(stream).await?.as_ref()) } else { level };
        Ok((level, is_done))
    }
}
