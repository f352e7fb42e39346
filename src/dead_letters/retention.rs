//! The dead letters' own limits: told before they are reached, and never kept in silence.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::clock::since_epoch;
use crate::dead_letters::audit::{Action, Deed};
use crate::dead_letters::scan::{Cursor, Walk};
use crate::dead_letters::selection::{Found, Selection};
use crate::dead_letters::{Failure, Inner, Level};
use crate::event::{EntryId, StreamName};
use crate::readiness::Part;
use crate::store::{StoreError, StoreErrorKind};

/// How often every stream of dead letters is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// In how many looks each stream of a family's dead letters has its turn.
const TURNS: usize = 12;
/// How long one step with the store may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// Keeps streams of dead letters within their limits.
#[derive(Debug)]
pub struct Keeper {
    inner: Arc<Inner>,
    /// Those told of as filling up.
    high: BTreeSet<StreamName>,
    /// Those told of as failing.
    failing: BTreeSet<StreamName>,
    /// How many dead letters each held when it was looked at last.
    lengths: BTreeMap<StreamName, u64>,
    round: usize,
}

impl Keeper {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        Self { inner, high: BTreeSet::new(), failing: BTreeSet::new(), lengths: BTreeMap::new(), round: 0 }
    }

    /// Looks after the dead letters until `stop`. `part` hears of what fills up; that never makes it unready.
    pub async fn run(mut self, part: Part, stop: CancellationToken) {
        loop {
            let look = self.look(&part);
            if stop.run_until_cancelled(look).await.is_none() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn look(&mut self, part: &Part) {
        let mut notes = Vec::new();
        for stream in self.due() {
            match self.keep(&stream).await {
                Ok(level) => {
                    if self.failing.remove(&stream) {
                        tracing::info!(stream = %stream, "keeps the dead letters within their limits again");
                    }
                    self.tell(&stream, &level);
                    notes.extend(level.alarm);
                    self.lengths.insert(stream, level.length);
                }
                Err(error) => {
                    notes.push(format!("cannot look after `{stream}`: {error}"));
                    // The store's own watch tells when it is away.
                    if error.kind() != StoreErrorKind::Unavailable && self.failing.insert(stream.clone()) {
                        tracing::warn!(stream = %stream, error = %error, "cannot keep the dead letters in their limits");
                    }
                }
            }
        }
        self.show();
        if notes.is_empty() {
            part.ready();
        } else {
            part.ready_but(notes.join("; "));
        }
    }

    /// The streams of dead letters to be looked at now: of those of families some in turn, for there may be thousands.
    fn due(&mut self) -> BTreeSet<StreamName> {
        self.round = (self.round + 1) % TURNS;
        let mut due = BTreeSet::new();
        for source in &self.inner.sources {
            if let Some(one) = source.dead_letter.stream() {
                due.insert(one.clone());
                continue;
            }
            let members = self.inner.streams_of(source).into_iter().enumerate();
            due.extend(members.filter(|(place, _)| place % TURNS == self.round).map(|(_, (_, dead))| dead));
        }
        due
    }

    /// Shows how full they are; those of one family together, and how full the fullest is.
    fn show(&self) {
        let mut shown: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for (stream, length) in &self.lengths {
            let (sum, most) = shown.entry(self.inner.label(stream)).or_default();
            (*sum, *most) = (*sum + length, (*most).max(*length));
        }
        let metrics = &self.inner.metrics;
        for (label, (sum, most)) in shown {
            metrics.dead_letter_length.with_label_values(&[label]).set(i64::try_from(sum).unwrap_or(i64::MAX));
            metrics.dead_letter_capacity_ratio.with_label_values(&[label]).set(self.inner.part_full(most));
            // The counter is there from the start, so that its first step is seen as one.
            metrics.dead_letters_expired.with_label_values(&[label]).inc_by(0);
        }
    }

    fn tell(&mut self, stream: &StreamName, level: &Level) {
        let (length, max_len) = (level.length, level.max_len);
        if level.alarm.is_none() {
            if self.high.remove(stream) {
                tracing::info!(stream = %stream, length, max_len, "the dead letters have room again");
            }
        } else if self.high.insert(stream.clone()) {
            tracing::warn!(
                stream = %stream,
                length,
                max_len,
                "the dead letters fill up: replay or discard them, or the oldest will be removed unhandled"
            );
        }
    }

    /// Removes what is too old or too much, and says how full the stream is then.
    async fn keep(&self, stream: &StreamName) -> Result<Level, Failure> {
        let mut walk = Walk::new(Cursor::default(), &Selection::default());
        loop {
            let step = timeout(STEP_TIMEOUT, self.step(stream, &mut walk)).await.unwrap_or_else(|_elapsed| {
                Err(Arc::new(StoreError::new(StoreErrorKind::Unavailable, "the store does not answer")))
            });
            let (level, is_done) = step?;
            if is_done {
                return Ok(level);
            }
        }
    }

    /// One step; says whether nothing is left to be done now.
    async fn step(&self, stream: &StreamName, walk: &mut Walk) -> Result<(Level, bool), Failure> {
        let Inner { store, config, metrics, .. } = &*self.inner;
        let before = self.inner.level(stream, store.describe(stream).await?.as_ref());
        let oldest =
            EntryId::new(u64::try_from(since_epoch().saturating_sub(config.max_age).as_millis()).unwrap_or(0), 0);
        let is_due = before.length > config.max_len || before.first_id.is_some_and(|first| first < oldest);
        if !is_due {
            return Ok((before, true));
        }
        let Some(entries) = walk.next(&**store, stream).await? else { return Ok((before, true)) };
        // The length is asked for after the oldest were read: what other daemons have removed in between only makes
        // the excess smaller, so that together they never remove more than is too much.
        let level = self.inner.level(stream, store.describe(stream).await?.as_ref());
        let excess = usize::try_from(level.length.saturating_sub(config.max_len)).unwrap_or(usize::MAX);
        let read = entries.len();
        let goes = entries.into_iter().enumerate().take_while(|(n, entry)| *n < excess || entry.id < oldest);
        let goes: Vec<Found> = goes.map(|(_, entry)| Found::new(entry)).collect();
        if goes.is_empty() {
            return Ok((level, true));
        }
        let action = Action { deed: Deed::Expire, actor: "retention", stream, selection: None, replay: None };
        self.inner.write_down(&action, &goes.iter().collect::<Vec<_>>()).await?;
        let ids: Vec<EntryId> = goes.iter().map(|found| found.entry.id).collect();
        let removed = store.discard(stream, &ids).await?;
        metrics.dead_letters_expired.with_label_values(&[self.inner.label(stream)]).inc_by(removed);
        let (first, last) = (ids.first().map(ToString::to_string), ids.last().map(ToString::to_string));
        tracing::warn!(stream = %stream, removed, first, last, "dead letters were removed unhandled by their limits");
        let is_done = ids.len() < read;
        let level = if is_done { self.inner.level(stream, store.describe(stream).await?.as_ref()) } else { level };
        Ok((level, is_done))
    }
}
