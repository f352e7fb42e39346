//! The place of one client in one stream: through the ring, and behind it through pages of the store.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::now_ms;
use crate::event::Filter;
use crate::event::{EntryId, Epoch, Position, StreamName};
use crate::relay::log::frame_batch::Batch;
use crate::relay::log::page_cache::Page;
use crate::relay::log::ring::{Lookup, Ring};
use crate::relay::subscription::priority;
use crate::relay::subscription::priority::Lane;
use crate::relay::wire::encoding::{Form, Notice, Reason};
use crate::relay::wire::write_buffer::Outgoing;
use crate::relay::{Channel, CloseCode, Hub};
use crate::store::StoreError;

/// After so many entries that don't pass, a client is told where it stands.
const MARK_ENTRIES: usize = 1000;

/// The place in one stream.
#[derive(Debug)]
pub(crate) struct Cursor {
    pub(crate) ring: Arc<Ring>,
    pub(crate) stage: Stage,
    /// The life of the stream that it belongs to; 0 and nothing before that has begun.
    pub(crate) generation: u64,
    pub(crate) epoch: Option<Epoch>,
    /// Everything up to here is given or filtered out, but for what is left of `current`.
    pub(crate) after: EntryId,
    /// Where the client began: everything after that is owed to it, so that it is told where something is gone. Nothing as
    /// long as it is to begin with what there is, and that has not been seen.
    pub(crate) began: Option<Position>,
    /// Whether it was at the head once, and the client was told.
    is_live: bool,
    /// A batch under way, from the ring or from the store, and the index of what is next in it.
    current: Option<(Arc<Batch>, usize)>,
    /// The ring's change at which there is nothing more than what is at hand.
    head_seen: Option<u64>,
    /// Bytes of the ring's log passed, once that is known.
    passed_bytes: Option<u64>,
    /// What was given before its turn; nothing for a client that is not far behind.
    lane: Option<Box<Lane>>,
    /// Entries that did not pass since the client last learnt where it stands.
    unseen: usize,
    /// Where that was.
    told: EntryId,
}

/// Counts what can't be given, and keeps it for the client.
pub(crate) struct Teller<'a> {
    pub(crate) channel: &'a Channel,
    pub(crate) notices: &'a mut Vec<Notice>,
}

impl Teller<'_> {
    pub(crate) fn gap(
        &mut self,
        stream: &StreamName,
        after: Option<Position>,
        before: Option<Position>,
        reason: Reason,
    ) {
        self.channel.gap(reason.as_str());
        self.notices.push(Notice::Gap { stream: stream.clone(), after, before, reason });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The tail has not begun, so it is unknown what "now" is.
    Waiting,
    /// The first entry of a snapshot is being looked for.
    Locating,
    /// Reads the ring.
    InRing,
    /// Is behind the ring, and has a page of the store or the ring's word to go on with.
    InPages,
    /// Is behind the ring and waits for a page of the store.
    Behind,
}

/// What a cursor has next.
pub(crate) enum Next {
    Entry(EntryId),
    Head,
    Behind,
}

impl Cursor {
    /// A cursor at the head of the ring as it is now, if it has begun.
    pub(crate) fn new(ring: Arc<Ring>) -> Self {
        let mark = ring.mark();
        Self {
            ring,
            stage: Stage::Waiting,
            generation: mark.as_ref().map_or(0, |mark| mark.generation),
            epoch: mark.as_ref().map(|mark| mark.epoch.clone()),
            after: mark.map_or(EntryId::MIN, |mark| mark.last),
            began: None,
            is_live: false,
            current: None,
            head_seen: None,
            passed_bytes: None,
            lane: None,
            unseen: 0,
            told: EntryId::MIN,
        }
    }

    /// Everything up to here is given or did not pass; nothing before that is known.
    pub(crate) fn position(&self) -> Option<Position> {
        let id = match &self.current {
            Some((batch, index)) if *index > 0 => batch.id(*index - 1).max(self.after),
            _ => self.after,
        };
        let epoch = self.epoch.clone().filter(|_| !matches!(self.stage, Stage::Waiting | Stage::Locating))?;
        Some(Position { epoch, id })
    }

    /// Whether it is not known yet where the client begins, and will be.
    pub(crate) fn is_beginning(&self) -> bool {
        match self.stage {
            Stage::Waiting => self.ring.is_starting(),
            Stage::Locating => true,
            Stage::InRing | Stage::InPages | Stage::Behind => self.began.is_none(),
        }
    }

    /// Tells that the past is told, if it is for the first time, and if there is one to tell.
    pub(crate) fn reach_head(&mut self, notices: &mut Vec<Notice>) {
        if !self.is_live && self.stage == Stage::InRing {
            self.is_live = true;
            notices.push(Notice::Live { stream: self.ring.stream().clone() });
        }
    }

    /// Tells where the client stands, if it does not know.
    pub(crate) fn mark(&mut self, notices: &mut Vec<Notice>) {
        if self.began.is_none() {
            return;
        }
        if let Some(position) = self.position().filter(|position| position.id > self.told) {
            (self.told, self.unseen) = (position.id, 0);
            notices.push(Notice::Mark { stream: self.ring.stream().clone(), position });
        }
    }

    /// A part of the past can't be read, and waiting won't help: that is a gap in this stream, and no reason to withhold
    /// what comes.
    pub(crate) fn unreadable(&self, error: &StoreError, teller: &mut Teller<'_>) {
        tracing::warn!(%error, kind = error.kind().as_str(), "cannot read what a client has still to be given");
        teller.gap(self.ring.stream(), self.position(), None, Reason::Unreadable);
    }

    /// Moves to the next entry that passes.
    ///
    /// With `skips`, what has left the ring is left out.
    pub(crate) fn next(&mut self, filter: &Filter, skips: bool, teller: &mut Teller<'_>) -> Next {
        match self.stage {
            Stage::Waiting => return Next::Head,
            Stage::Locating | Stage::Behind => return Next::Behind,
            Stage::InRing | Stage::InPages => {}
        }
        loop {
            if let Some((batch, index)) = &mut self.current {
                let next = batch.next_match(*index, filter);
                self.unseen += next - *index;
                *index = next;
                let id = (next < batch.len()).then(|| batch.id(next));
                if id.is_none() {
                    self.pass_current();
                }
                if self.unseen >= MARK_ENTRIES {
                    self.mark(teller.notices);
                }
                if let Some(id) = id {
                    if !self.lane.as_mut().is_some_and(|lane| lane.has_given(id)) {
                        return Next::Entry(id);
                    }
                    self.pass_given();
                    continue;
                }
            }
            let changes = self.ring.changes();
            if self.head_seen == Some(changes) {
                return Next::Head;
            }
            match self.ring.after(self.generation, self.after) {
                Lookup::Head => {
                    (self.stage, self.head_seen, self.lane) = (Stage::InRing, Some(changes), None);
                    self.owe();
                }
                Lookup::Batch(batch, passed_bytes, is_newest) => {
                    // A lane ends only where the ring itself says that there is nothing more.
                    self.head_seen = (is_newest && self.lane.is_none()).then_some(changes);
                    let index = batch.first_after(self.after);
                    (self.stage, self.passed_bytes) = (Stage::InRing, Some(passed_bytes));
                    if batch.is_torn_off() && index == 0 && self.began.is_some() {
                        let before = self.epoch.clone().map(|epoch| Position { epoch, id: batch.id(0) });
                        teller.gap(self.ring.stream(), self.position(), before, Reason::Trimmed);
                    }
                    self.open(batch, index);
                }
                Lookup::Behind if skips => {
                    let after = self.position();
                    if let Some(mark) = self.ring.mark() {
                        self.after = mark.last;
                        self.owe();
                    }
                    teller.gap(self.ring.stream(), after, self.position(), Reason::Lossy);
                }
                Lookup::Behind => {
                    if self.stage == Stage::InRing {
                        teller.channel.catchups.inc();
                    }
                    self.stage = Stage::Behind;
                    return Next::Behind;
                }
                Lookup::Restarted => {
                    // The client goes on with the new life of the stream from its beginning; with what is left of the
                    // same one from where it stands, or from its end.
                    teller.gap(self.ring.stream(), self.position(), None, Reason::StateLost);
                    let mark = self.ring.mark().expect("a ring that restarted has begun");
                    let is_same = self.epoch.as_ref() == Some(&mark.epoch);
                    self.after = if is_same { self.after.min(mark.start) } else { mark.start };
                    (self.generation, self.epoch, self.passed_bytes) = (mark.generation, Some(mark.epoch), None);
                    self.owe();
                    (self.told, self.lane) = (EntryId::MIN, None);
                }
            }
        }
    }

    /// Takes the entries at hand that come before `bound`. The next one must be known to pass.
    pub(crate) fn take(&mut self, bound: EntryId, filter: &Filter, form: Form, began_ms: u64, out: &mut Outgoing) {
        let Some((batch, index)) = &mut self.current else { return };
        let given = self.lane.as_ref().and_then(|lane| lane.next_given());
        let run = batch.run(*index, given.map_or(bound, |given| bound.min(given)), filter);
        let (first, end) = (batch.id(*index), run.end);
        out.alerts += run.len() as u64;
        if first.ms >= began_ms {
            out.oldest_ms = Some(out.oldest_ms.map_or(first.ms, |oldest| oldest.min(first.ms)));
        }
        out.push(batch.frames(run, form));
        *index = end;
        (self.told, self.unseen) = (batch.id(end - 1), 0);
        if end == batch.len() {
            self.pass_current();
        }
    }

    /// Passes over what is at hand, for the client has been given it.
    fn pass_given(&mut self) {
        if let Some((batch, index)) = &mut self.current {
            (*index, self.unseen) = (*index + 1, self.unseen + 1);
            if *index == batch.len() {
                self.pass_current();
            }
        }
    }

    /// Whether it is behind the ring.
    pub(crate) fn is_behind(&self) -> bool {
        matches!(self.stage, Stage::Behind | Stage::InPages)
    }

    /// Gives what is critical before its turn, if the client is far behind in this stream or `is_held_up` by another, and
    /// then tells where it stands.
    pub(crate) fn overtake(
        &mut self,
        is_held_up: bool,
        filter: &Filter,
        form: Form,
        began_ms: u64,
        out: &mut Outgoing,
    ) -> Option<Notice> {
        let at_hand = self.current.as_ref().map(|(batch, _)| batch.last());
        let turn = match self.stage {
            Stage::Behind | Stage::InPages => self.after,
            Stage::InRing if is_held_up => self.position()?.id,
            // What is in the batch at hand is about to have its turn.
            Stage::InRing if self.is_far_behind() => at_hand.unwrap_or(self.after),
            _ => return None,
        };
        let lane = self.lane.get_or_insert_default();
        let count = lane.give(&self.ring, self.generation, turn, filter, form, out);
        out.alerts += count as u64;
        let oldest_ms = lane.newest(count).map(|id| id.ms).filter(|ms| *ms >= began_ms);
        out.oldest_ms = out.oldest_ms.into_iter().chain(oldest_ms).min();
        let position = self.position().filter(|_| count > 0)?;
        Some(Notice::Mark { stream: self.ring.stream().clone(), position })
    }

    fn is_far_behind(&self) -> bool {
        let passed = self.passed_bytes.unwrap_or_default();
        self.ring.mark().is_some_and(|mark| mark.total_bytes.saturating_sub(passed) > priority::FAR_BYTES)
    }

    fn pass_current(&mut self) {
        if let Some((batch, _)) = self.current.take() {
            self.after = self.after.max(batch.last());
            self.owe();
        }
    }

    /// Has a batch at hand, with what comes next at `index`.
    fn open(&mut self, batch: Arc<Batch>, index: usize) {
        if self.began.is_none() && index < batch.len() {
            self.after = self.after.max(batch.id(index).previous());
            self.owe();
        }
        self.current = Some((batch, index));
    }

    /// Whatever it has asked for of the past, from here on it is owed everything.
    pub(crate) fn owe(&mut self) {
        if self.began.is_none() {
            self.began = self.epoch.clone().map(|epoch| Position { epoch, id: self.after });
        }
    }

    /// Turns to the page that has what comes next; to the ring where there is none, because the stream has begun a new
    /// life.
    pub(crate) fn turn(&mut self, page: Option<&Page>, hub: &Hub, teller: &mut Teller<'_>) -> Result<(), CloseCode> {
        self.stage = Stage::InPages;
        let Some(page) = page else { return Ok(()) };
        if self.began.is_some() && page.is_trimmed_after(self.after) {
            let oldest = page.front.and_then(|front| front.oldest);
            let before = oldest.zip(self.epoch.clone()).map(|(id, epoch)| Position { epoch, id });
            teller.gap(self.ring.stream(), self.position(), before, Reason::Trimmed);
        }
        let (batch, index) = (page.batch.clone(), page.batch.first_after(self.after));
        if let Some(passed) = &mut self.passed_bytes {
            *passed += batch.size_from(index) as u64;
            let total = self.ring.mark().map_or(0, |mark| mark.total_bytes);
            let next = (index < batch.len()).then(|| batch.id(index));
            let age = next.map_or(Duration::ZERO, |id| Duration::from_millis(now_ms().saturating_sub(id.ms)));
            if hub.is_too_far_behind(total.saturating_sub(*passed), age) {
                return Err(CloseCode::TooSlow);
            }
        }
        self.open(batch, index);
        Ok(())
    }

    /// Gives up what has left the ring.
    pub(crate) fn skip_to_ring(&mut self) {
        self.stage = Stage::InRing;
        if let Some(mark) = self.ring.mark() {
            self.after = self.after.max(mark.floor);
            self.owe();
        }
    }
}
