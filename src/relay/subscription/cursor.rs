//! The position of one client in one stream: in the ring, or behind it in pages of the store.
//!
//! A cursor waits until the tail has begun, then reads the ring. If its next entry has left the ring, it waits for a
//! page of the store, reads that page, and looks into the ring again. A snapshot first locates its oldest entry.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::now_ms;
use crate::event::{EntryId, Epoch, Filter, Position, StreamName};
use crate::relay::hub::{Channel, Hub};
use crate::relay::log::frame_batch::FrameBatch;
use crate::relay::log::page_cache::EntryPage;
use crate::relay::log::ring::{Lookup, Ring};
use crate::relay::session::close::CloseCode;
use crate::relay::subscription::priority;
use crate::relay::subscription::priority::PriorityLane;
use crate::relay::wire::encoding::{ControlMessage, Encoding, GapReason};
use crate::relay::wire::write_buffer::WriteBuffer;
use crate::store::StoreError;

/// The number of filtered entries after which the client's position is reported.
const MARK_ENTRIES: usize = 1000;

/// The position in one stream.
#[derive(Debug)]
pub(crate) struct StreamCursor {
    pub(crate) ring: Arc<Ring>,
    pub(crate) stage: CursorStage,
    /// The generation of the ring that the position belongs to; 0 and `None` until that has begun.
    pub(crate) generation: u64,
    pub(crate) epoch: Option<Epoch>,
    /// All entries up to this one are sent or filtered, except for the rest of `current`.
    pub(crate) after: EntryId,
    /// The start position. Gaps after it are reported. `None` until the first read, for starts such as `earliest`.
    pub(crate) start: Option<Position>,
    /// Whether the client has received the `live` message.
    is_live: bool,
    /// The batch in progress, from the ring or from a page, and the index of its next entry.
    current: Option<(Arc<FrameBatch>, usize)>,
    /// The ring's change number at which `current` was the end of the stream.
    head_at_change: Option<u64>,
    /// The bytes of the ring's log up to this position, if known.
    passed_bytes: Option<u64>,
    /// The early alerts, for a client that is far behind.
    lane: Option<Box<PriorityLane>>,
    /// The number of filtered entries since the position was last reported.
    filtered_since: usize,
    /// The last position that the client knows, by an event or a mark.
    last_reported: EntryId,
}

/// Counts gaps and keeps their messages for the client.
pub(crate) struct GapReporter<'a> {
    pub(crate) channel: &'a Channel,
    pub(crate) controls: &'a mut Vec<ControlMessage>,
}

impl GapReporter<'_> {
    pub(crate) fn report(
        &mut self,
        stream: &StreamName,
        after: Option<Position>,
        before: Option<Position>,
        reason: GapReason,
    ) {
        self.channel.count_gap(reason.as_str());
        self.controls.push(ControlMessage::Gap { stream: stream.clone(), after, before, reason });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CursorStage {
    /// The tail has not begun, so the present end of the stream is unknown.
    Waiting,
    /// Waits for the first entry of a snapshot.
    LocatingSnapshot,
    /// Reads the ring.
    InRing,
    /// Is behind the ring, and reads a page of the store or looks into the ring again.
    InPage,
    /// Is behind the ring, and waits for a page of the store.
    AwaitingPage,
}

/// The result of a step to the next entry.
pub(crate) enum NextStep {
    Entry(EntryId),
    Head,
    Behind,
}

impl StreamCursor {
    /// Creates a cursor at the present head of the ring, if it has begun.
    pub(crate) fn new(ring: Arc<Ring>) -> Self {
        let snapshot = ring.snapshot();
        Self {
            ring,
            stage: CursorStage::Waiting,
            generation: snapshot.as_ref().map_or(0, |snapshot| snapshot.generation),
            epoch: snapshot.as_ref().map(|snapshot| snapshot.epoch.clone()),
            after: snapshot.map_or(EntryId::MIN, |snapshot| snapshot.last),
            start: None,
            is_live: false,
            current: None,
            head_at_change: None,
            passed_bytes: None,
            lane: None,
            filtered_since: 0,
            last_reported: EntryId::MIN,
        }
    }

    /// Returns the position up to which all entries are sent or filtered, or `None` if it is not known yet.
    pub(crate) fn position(&self) -> Option<Position> {
        let id = match &self.current {
            Some((batch, index)) if *index > 0 => batch.id(*index - 1).max(self.after),
            _ => self.after,
        };
        let epoch = self
            .epoch
            .clone()
            .filter(|_| !matches!(self.stage, CursorStage::Waiting | CursorStage::LocatingSnapshot))?;
        Some(Position { epoch, id })
    }

    /// Returns whether the start is not known yet, but will be.
    pub(crate) fn is_starting(&self) -> bool {
        match self.stage {
            CursorStage::Waiting => self.ring.is_starting(),
            CursorStage::LocatingSnapshot => true,
            CursorStage::InRing | CursorStage::InPage | CursorStage::AwaitingPage => self.start.is_none(),
        }
    }

    /// Reports that the client is live, if it is for the first time.
    pub(crate) fn report_live(&mut self, controls: &mut Vec<ControlMessage>) {
        if !self.is_live && self.stage == CursorStage::InRing {
            self.is_live = true;
            controls.push(ControlMessage::Live { stream: self.ring.stream().clone() });
        }
    }

    /// Reports the position, if the client does not know it.
    pub(crate) fn report_position(&mut self, controls: &mut Vec<ControlMessage>) {
        if self.start.is_none() {
            return;
        }
        if let Some(position) = self.position().filter(|position| position.id > self.last_reported) {
            (self.last_reported, self.filtered_since) = (position.id, 0);
            controls.push(ControlMessage::Mark { stream: self.ring.stream().clone(), position });
        }
    }

    /// Reports a gap where entries cannot be read and a retry would not help. Later entries are sent.
    pub(crate) fn report_unreadable(&self, error: &StoreError, gap_reporter: &mut GapReporter<'_>) {
        tracing::warn!(%error, kind = error.kind().as_str(), "cannot read entries for a client, reporting a gap");
        gap_reporter.report(self.ring.stream(), self.position(), None, GapReason::Unreadable);
    }

    /// Moves to the next entry that passes.
    ///
    /// With `skips_to_newest`, entries that have left the ring are skipped.
    pub(crate) fn next(
        &mut self,
        filter: &Filter,
        skips_to_newest: bool,
        gap_reporter: &mut GapReporter<'_>,
    ) -> NextStep {
        match self.stage {
            CursorStage::Waiting => return NextStep::Head,
            CursorStage::LocatingSnapshot | CursorStage::AwaitingPage => return NextStep::Behind,
            CursorStage::InRing | CursorStage::InPage => {}
        }
        loop {
            if let Some((batch, index)) = &mut self.current {
                let next = batch.next_match(*index, filter);
                self.filtered_since += next - *index;
                *index = next;
                let id = (next < batch.len()).then(|| batch.id(next));
                if id.is_none() {
                    self.finish_batch();
                }
                if self.filtered_since >= MARK_ENTRIES {
                    self.report_position(gap_reporter.controls);
                }
                if let Some(id) = id {
                    if !self.lane.as_mut().is_some_and(|lane| lane.was_delivered(id)) {
                        return NextStep::Entry(id);
                    }
                    self.skip_current();
                    continue;
                }
            }
            let changes = self.ring.changes();
            if self.head_at_change == Some(changes) {
                return NextStep::Head;
            }
            match self.ring.after(self.generation, self.after) {
                Lookup::Head => {
                    (self.stage, self.head_at_change, self.lane) = (CursorStage::InRing, Some(changes), None);
                    self.report_gaps_from_here();
                }
                Lookup::Batch(batch, passed_bytes, is_newest) => {
                    // Early alerts are forgotten only when the ring itself reports the head.
                    self.head_at_change = (is_newest && self.lane.is_none()).then_some(changes);
                    let index = batch.first_after(self.after);
                    (self.stage, self.passed_bytes) = (CursorStage::InRing, Some(passed_bytes));
                    if batch.has_gap_before() && index == 0 && self.start.is_some() {
                        let before = self.epoch.clone().map(|epoch| Position { epoch, id: batch.id(0) });
                        gap_reporter.report(self.ring.stream(), self.position(), before, GapReason::Trimmed);
                    }
                    self.start_batch(batch, index);
                }
                Lookup::Behind if skips_to_newest => {
                    let after = self.position();
                    if let Some(snapshot) = self.ring.snapshot() {
                        self.after = snapshot.last;
                        self.report_gaps_from_here();
                    }
                    gap_reporter.report(self.ring.stream(), after, self.position(), GapReason::Lossy);
                }
                Lookup::Behind => {
                    if self.stage == CursorStage::InRing {
                        gap_reporter.channel.catchups.inc();
                    }
                    self.stage = CursorStage::AwaitingPage;
                    return NextStep::Behind;
                }
                Lookup::Restarted => {
                    // A stream that was lost is read from its beginning. If only its end was lost, the client
                    // continues from its position, or from the new end if that is before it.
                    gap_reporter.report(self.ring.stream(), self.position(), None, GapReason::StateLost);
                    let snapshot = self.ring.snapshot().expect("a ring with a new generation has a snapshot");
                    let is_same_epoch = self.epoch.as_ref() == Some(&snapshot.epoch);
                    self.after = if is_same_epoch { self.after.min(snapshot.start) } else { snapshot.start };
                    (self.generation, self.epoch, self.passed_bytes) =
                        (snapshot.generation, Some(snapshot.epoch), None);
                    self.report_gaps_from_here();
                    (self.last_reported, self.lane) = (EntryId::MIN, None);
                }
            }
        }
    }

    /// Writes the entries of the current batch before `bound`. The next one must pass.
    pub(crate) fn write_run(
        &mut self,
        bound: EntryId,
        filter: &Filter,
        encoding: Encoding,
        created_ms: u64,
        out: &mut WriteBuffer,
    ) {
        let Some((batch, index)) = &mut self.current else { return };
        let delivered = self.lane.as_ref().and_then(|lane| lane.next_delivered());
        let run = batch.run(*index, delivered.map_or(bound, |id| bound.min(id)), filter);
        let (first, end) = (batch.id(*index), run.end);
        out.alerts += run.len() as u64;
        if first.ms >= created_ms {
            out.oldest_ms = Some(out.oldest_ms.map_or(first.ms, |oldest| oldest.min(first.ms)));
        }
        out.push(batch.frames(run, encoding));
        *index = end;
        (self.last_reported, self.filtered_since) = (batch.id(end - 1), 0);
        if end == batch.len() {
            self.finish_batch();
        }
    }

    /// Skips the next entry, which the client received early.
    fn skip_current(&mut self) {
        if let Some((batch, index)) = &mut self.current {
            (*index, self.filtered_since) = (*index + 1, self.filtered_since + 1);
            if *index == batch.len() {
                self.finish_batch();
            }
        }
    }

    /// Returns whether the cursor is behind the ring.
    pub(crate) fn is_behind(&self) -> bool {
        matches!(self.stage, CursorStage::AwaitingPage | CursorStage::InPage)
    }

    /// Adds critical alerts ahead of their order, and returns a mark with the position.
    ///
    /// Does so only if the client is far behind in this stream, or `is_held_up` by another stream.
    pub(crate) fn deliver_early(
        &mut self,
        is_held_up: bool,
        filter: &Filter,
        encoding: Encoding,
        created_ms: u64,
        out: &mut WriteBuffer,
    ) -> Option<ControlMessage> {
        let batch_end = self.current.as_ref().map(|(batch, _)| batch.last());
        let in_order_up_to = match self.stage {
            CursorStage::AwaitingPage | CursorStage::InPage => self.after,
            CursorStage::InRing if is_held_up => self.position()?.id,
            // The rest of the current batch is sent in order next.
            CursorStage::InRing if self.is_far_behind() => batch_end.unwrap_or(self.after),
            _ => return None,
        };
        let lane = self.lane.get_or_insert_default();
        let count = lane.deliver(&self.ring, self.generation, in_order_up_to, filter, encoding, out);
        out.alerts += count as u64;
        let oldest_ms = lane.oldest_of_last(count).map(|id| id.ms).filter(|ms| *ms >= created_ms);
        out.oldest_ms = out.oldest_ms.into_iter().chain(oldest_ms).min();
        let position = self.position().filter(|_| count > 0)?;
        Some(ControlMessage::Mark { stream: self.ring.stream().clone(), position })
    }

    fn is_far_behind(&self) -> bool {
        let passed = self.passed_bytes.unwrap_or_default();
        self.ring
            .snapshot()
            .is_some_and(|snapshot| snapshot.total_bytes.saturating_sub(passed) > priority::FAR_BEHIND_BYTES)
    }

    fn finish_batch(&mut self) {
        if let Some((batch, _)) = self.current.take() {
            self.after = self.after.max(batch.last());
            self.report_gaps_from_here();
        }
    }

    /// Starts a batch at `index`.
    fn start_batch(&mut self, batch: Arc<FrameBatch>, index: usize) {
        if self.start.is_none() && index < batch.len() {
            self.after = self.after.max(batch.id(index).previous());
            self.report_gaps_from_here();
        }
        self.current = Some((batch, index));
    }

    /// Makes this position the start, if there is none yet: all later gaps are reported.
    pub(crate) fn report_gaps_from_here(&mut self) {
        if self.start.is_none() {
            self.start = self.epoch.clone().map(|epoch| Position { epoch, id: self.after });
        }
    }

    /// Starts the page with the next entry. Without a page, looks into the ring: the stream has a new generation.
    pub(crate) fn apply_page(
        &mut self,
        page: Option<&EntryPage>,
        hub: &Hub,
        gap_reporter: &mut GapReporter<'_>,
    ) -> Result<(), CloseCode> {
        self.stage = CursorStage::InPage;
        let Some(page) = page else { return Ok(()) };
        if self.start.is_some() && page.is_trimmed_after(self.after) {
            let oldest = page.stream_start.and_then(|stream_start| stream_start.oldest);
            let before = oldest.zip(self.epoch.clone()).map(|(id, epoch)| Position { epoch, id });
            gap_reporter.report(self.ring.stream(), self.position(), before, GapReason::Trimmed);
        }
        let (batch, index) = (page.batch.clone(), page.batch.first_after(self.after));
        if let Some(passed) = &mut self.passed_bytes {
            *passed += batch.size_from(index) as u64;
            let total = self.ring.snapshot().map_or(0, |snapshot| snapshot.total_bytes);
            let next = (index < batch.len()).then(|| batch.id(index));
            let age = next.map_or(Duration::ZERO, |id| Duration::from_millis(now_ms().saturating_sub(id.ms)));
            if hub.is_too_far_behind(total.saturating_sub(*passed), age) {
                return Err(CloseCode::TooSlow);
            }
        }
        self.start_batch(batch, index);
        Ok(())
    }

    /// Skips the entries that have left the ring.
    pub(crate) fn skip_to_ring(&mut self) {
        self.stage = CursorStage::InRing;
        if let Some(snapshot) = self.ring.snapshot() {
            self.after = self.after.max(snapshot.floor);
            self.report_gaps_from_here();
        }
    }
}
