//! What one client still has to be given: a cursor per stream, and how it moves.

pub(super) mod batching;
pub(super) mod cursor;
pub(super) mod params;
pub(super) mod priority;
pub(super) mod set;
pub(super) mod start;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{Channel, CloseCode, Hub, Since, SubscribeParams};
use crate::clock::now_ms;
use crate::event::{EntryId, Filter, Position, StreamName};
use crate::relay::log::page_cache::Outcome;
use crate::relay::log::page_reader;
use crate::relay::log::page_reader::Newest;
use crate::relay::log::ring::{Mark, Ring};
use crate::relay::subscription::cursor::{Cursor, Next, Stage, Teller};
use crate::relay::subscription::start::{Begin, oldest_of_newest, resolve};
use crate::relay::wire::encoding::{Form, Notice, Reason, text_message};
use crate::relay::wire::write_buffer::Outgoing;

/// How far ahead of what there is a position may be, in ms: other instances may have read more, and clocks differ.
const AHEAD_MS: u64 = 60_000;

/// What a client asked for and how far it is.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Subscription {
    /// Most have one, and it is at hand with the rest.
    cursors: SmallVec<[Cursor; 1]>,
    filter: Filter,
    form: Form,
    /// Whether what a live client is too slow for is left out.
    is_latest: bool,
    /// Whether critical alerts come before their turn where the client is far behind.
    has_lane: bool,
    /// Whether it was behind, or had more than could be written at once, when it was looked at last.
    is_lagging: bool,
    /// Whether the client would rather be closed than go on after a gap.
    is_strict: bool,
    /// The request that is answered once it is known where this begins.
    unanswered: Option<Box<Unanswered>>,
    /// How many gaps were told.
    gaps: usize,
    /// What is to be told before the next alert.
    notices: Vec<Notice>,
    /// Where to begin, as long as there is a cursor that has not begun.
    start: Option<Box<Start>>,
    /// Whether it was at the head once: from then on, what a stream has is given at once. On the way there, streams
    /// are merged by the time of their entries.
    is_live: bool,
    began_ms: u64,
}

/// A request that is still to be answered.
#[derive(Debug)]
struct Unanswered {
    id: u64,
    /// Whether it asked for what comes after something.
    is_resumed: bool,
}

/// Where to begin.
#[derive(Debug, Clone)]
enum Start {
    Now,
    Earliest,
    At(u64),
    Positions(Vec<Position>),
    Snapshot(usize),
}

/// A read of the store on a client's behalf.
pub(super) type Work = Pin<Box<dyn Future<Output = Fetched> + Send>>;

/// What was read.
#[derive(Debug)]
pub(super) enum Fetched {
    /// The next entries of the cursor with this index.
    Page(usize, Outcome),
    /// For each cursor with these indices, the newest entries that pass this filter, newest first.
    Newest(Filter, Vec<(usize, Newest)>),
}

impl Subscription {
    /// A subscription to some streams, whose rings are given, that begins at this moment.
    pub(super) fn new(
        rings: Vec<Arc<Ring>>,
        params: SubscribeParams,
        form: Form,
        answers: Option<u64>,
        hub: &Hub,
        channel: &Channel,
    ) -> Self {
        let began_ms = now_ms();
        let start = match params.since {
            None if params.snapshot > 0 => Start::Snapshot(params.snapshot),
            None => Start::Now,
            Some(Since::Earliest) => Start::Earliest,
            Some(Since::Ago(ago)) => Start::At(began_ms.saturating_sub(ago.as_millis().try_into().unwrap_or(u64::MAX))),
            Some(Since::Time(time)) => Start::At(time.as_millisecond().try_into().unwrap_or(0)),
            Some(Since::Positions(positions)) => Start::Positions(positions),
        };
        let mut subscription = Self {
            cursors: rings.into_iter().map(Cursor::new).collect(),
            filter: params.filter,
            form,
            is_latest: params.is_latest,
            has_lane: params.has_lane,
            is_lagging: false,
            is_strict: params.is_strict,
            unanswered: answers.map(|id| Box::new(Unanswered { id, is_resumed: matches!(start, Start::Positions(_)) })),
            gaps: 0,
            notices: Vec::new(),
            start: Some(Box::new(start)),
            is_live: false,
            began_ms,
        };
        subscription.begin(hub, channel);
        subscription
    }

    /// Resolves where to begin in the streams that can be read. Those that can't be are not waited for, and begin later.
    fn begin(&mut self, hub: &Hub, channel: &Channel) {
        let Some(start) = &self.start else { return };
        let waiting = || self.cursors.iter().enumerate().filter(|(_, cursor)| cursor.stage == Stage::Waiting);
        if waiting().any(|(_, cursor)| cursor.ring.is_starting()) {
            return;
        }
        let marks: Vec<(usize, Mark)> =
            waiting().filter_map(|(index, cursor)| cursor.ring.mark().map(|mark| (index, mark))).collect();
        let known = match &**start {
            Start::Positions(_) => hub.epochs(self.cursors.iter().map(|cursor| &cursor.ring)),
            _ => None,
        };
        for (index, mark) in marks {
            let cursor = &mut self.cursors[index];
            // A cursor that was made before its ring began is given all that came since.
            let head = if cursor.generation == mark.generation { cursor.after } else { mark.start };
            let begin = match &**start {
                Start::Now | Start::Snapshot(_) => Begin::after(head),
                Start::Earliest => Begin::at(EntryId::MIN),
                Start::At(ms) => Begin::at(EntryId::new(*ms, 0).previous().min(head)),
                Start::Positions(positions) => {
                    let latest_ms = mark.last.ms.max(self.began_ms).saturating_add(AHEAD_MS);
                    let begin = resolve(positions, &mark.epoch, known.as_deref(), latest_ms);
                    if begin.is_owed { begin } else { Begin { after: begin.after.min(head), ..begin } }
                }
            };
            if begin.is_gap {
                let stream = cursor.ring.stream();
                Teller { channel, notices: &mut self.notices }.gap(stream, None, None, Reason::Epoch);
            }
            (cursor.generation, cursor.epoch) = (mark.generation, Some(mark.epoch));
            cursor.after = begin.after;
            if begin.is_owed {
                cursor.owe();
            }
            cursor.stage = if matches!(**start, Start::Snapshot(_)) { Stage::Locating } else { Stage::InRing };
        }
        let is_over = |cursor: &Cursor| !matches!(cursor.stage, Stage::Waiting | Stage::Locating);
        if self.cursors.iter().all(is_over) {
            self.start = None;
        }
    }

    /// Adds what can be written now.
    pub(super) fn fill(&mut self, hub: &Hub, channel: &Channel, out: &mut Outgoing) {
        self.begin(hub, channel);
        let was_lagging = self.is_lagging;
        if was_lagging {
            self.overtake(hub, channel, out);
        }
        self.is_lagging = true;
        while !out.is_full() {
            let mut next: Option<(usize, EntryId)> = None;
            let mut bound = EntryId::MAX;
            let mut is_behind = false;
            let mut teller = Teller { channel, notices: &mut self.notices };
            let skips = self.is_latest && self.is_live;
            for (index, cursor) in self.cursors.iter_mut().enumerate() {
                match cursor.next(&self.filter, skips, &mut teller) {
                    Next::Head => {}
                    Next::Behind => is_behind = true,
                    Next::Entry(id) => match next {
                        Some((_, oldest)) if oldest <= id => bound = bound.min(id),
                        Some((_, oldest)) => {
                            bound = oldest;
                            next = Some((index, id));
                        }
                        None => next = Some((index, id)),
                    },
                }
            }
            self.answer(out);
            self.tell(out);
            self.is_lagging = is_behind;
            if is_behind && !self.is_live || self.is_lost() {
                break;
            }
            let Some((index, first)) = next else {
                if !is_behind && !self.cursors.iter().any(Cursor::is_beginning) {
                    self.is_live = true;
                    self.cursors.iter_mut().for_each(|cursor| cursor.reach_head(&mut self.notices));
                    if !self.notices.is_empty() {
                        // Whoever breaks off before there is an alert comes back to this place.
                        self.push_ids(out);
                    }
                    self.tell(out);
                }
                break;
            };
            // Two streams may give the same id.
            let mut bound = bound.max(first.next());
            if matches!(self.form, Form::EventStream { ids: false, .. }) {
                // What tells where a client stands in several streams can't be shared with others.
                bound = first.next();
                out.push(self.id_at(index, first).into());
            }
            self.cursors[index].take(bound, &self.filter, self.form, self.began_ms, out);
            self.is_lagging = true;
        }
        if self.is_lagging && !was_lagging {
            self.overtake(hub, channel, out);
        }
    }

    /// Gives what is critical before its turn, where the client is far behind.
    fn overtake(&mut self, hub: &Hub, channel: &Channel, out: &mut Outgoing) {
        if !self.has_lane || self.unanswered.is_some() || self.is_lost() {
            return;
        }
        let before = out.alerts;
        let is_held_up = !self.is_live && self.cursors.iter().any(Cursor::is_behind);
        for cursor in &mut self.cursors {
            self.notices.extend(cursor.overtake(is_held_up, &self.filter, self.form, self.began_ms, out));
        }
        if out.alerts > before {
            hub.metrics.relay_early.with_label_values(&[&channel.name]).inc_by(out.alerts - before);
            self.tell(out);
        }
    }

    /// Whether it was behind, or had more than could be written at once, when it was looked at last.
    pub(super) fn is_lagging(&self) -> bool {
        self.is_lagging
    }

    /// Whether the client asked to be closed after what could not be given.
    pub(super) fn is_lost(&self) -> bool {
        self.is_strict && self.gaps > 0
    }

    /// Whether it is to this stream.
    pub(super) fn is_to(&self, stream: &StreamName) -> bool {
        self.ring_of(stream).is_some()
    }

    /// The ring of the stream, if it is one that this is to.
    pub(super) fn ring_of(&self, stream: &StreamName) -> Option<&Arc<Ring>> {
        self.cursors.iter().map(|cursor| &cursor.ring).find(|ring| ring.stream() == stream)
    }

    /// Where the client stands in each stream, as it is passed for `since`.
    pub(super) fn positions(&self) -> String {
        joined(self.cursors.iter().filter_map(Cursor::position))
    }

    /// Lets something else pass from where the client stands.
    pub(super) fn replace_filter(&mut self, filter: Filter) {
        self.filter = filter;
    }

    /// Tells where the client stands in streams of which nothing passed since it was told last.
    pub(super) fn mark(&mut self, out: &mut Outgoing) {
        if self.unanswered.is_some() {
            return;
        }
        for cursor in &mut self.cursors {
            cursor.mark(&mut self.notices);
        }
        if !self.notices.is_empty() {
            self.tell(out);
        }
    }

    /// Tells a reader of an event stream where it stands in all streams.
    fn push_ids(&self, out: &mut Outgoing) {
        if matches!(self.form, Form::EventStream { .. }) {
            out.push(format!("id: {}\n\n", self.positions()).into());
        }
    }

    /// The line of an event that tells where its reader stands in all streams once it has it: `id`, of the cursor with
    /// this index.
    fn id_at(&self, index: usize, id: EntryId) -> String {
        let at = |(i, cursor): (usize, &Cursor)| {
            let position = cursor.position()?;
            Some(if i == index { Position { id, ..position } } else { position })
        };
        format!("id: {}\n", joined(self.cursors.iter().enumerate().filter_map(at)))
    }

    /// Answers the request that made this, once it is known where it begins, and whether that can be given.
    fn answer(&mut self, out: &mut Outgoing) {
        if self.unanswered.is_none() {
            return;
        }
        let is_behind = self.cursors.iter().any(|cursor| cursor.stage == Stage::Behind);
        let is_answerable = |unanswered: &mut Box<Unanswered>| !(unanswered.is_resumed && is_behind);
        if self.cursors.iter().any(Cursor::is_beginning) {
            return;
        }
        let Some(unanswered) = self.unanswered.take_if(is_answerable) else { return };
        let streams: Vec<&str> = self.cursors.iter().map(|cursor| cursor.ring.stream().as_str()).collect();
        let gaps = self.notices.iter().filter(|notice| matches!(notice, Notice::Gap { .. })).count();
        let answer = serde_json::json!({
            "t": "subscribed",
            "id": unanswered.id,
            "stream": streams.join(","),
            "from": joined(self.cursors.iter().filter_map(|cursor| cursor.began.clone())),
            "recovered": unanswered.is_resumed && gaps == 0,
        });
        out.push(text_message(&answer.to_string()).into());
    }

    /// Writes what is to be told: nothing comes before the answer.
    fn tell(&mut self, out: &mut Outgoing) {
        if self.unanswered.is_some() {
            return;
        }
        let mut is_marked = false;
        for notice in self.notices.drain(..) {
            if matches!(notice, Notice::Mark { .. }) {
                is_marked = true;
            }
            self.gaps += usize::from(matches!(&notice, Notice::Gap { reason, .. } if *reason != Reason::Lossy));
            if let Some(words) = self.form.tell(&notice) {
                out.push(words.into());
            }
        }
        if is_marked {
            self.push_ids(out);
        }
    }

    /// The read of the store that has to come next, if any.
    pub(super) fn work(&self, hub: &Arc<Hub>) -> Option<Work> {
        let at_stage = |stage| self.cursors.iter().enumerate().filter(move |(_, cursor)| cursor.stage == stage);
        if let Some(&Start::Snapshot(count)) = self.start.as_deref()
            && at_stage(Stage::Locating).next().is_some()
        {
            let (hub, filter) = (hub.clone(), self.filter.clone());
            let cut = |(index, cursor): (usize, &Cursor)| (index, cursor.ring.clone(), cursor.generation, cursor.after);
            let cuts: Vec<_> = at_stage(Stage::Locating).map(cut).collect();
            return Some(Box::pin(async move {
                let mut newest = Vec::with_capacity(cuts.len());
                for (index, ring, generation, cut) in cuts {
                    newest.push((index, page_reader::newest(&hub, &ring, generation, &filter, count, cut).await));
                }
                Fetched::Newest(filter, newest)
            }));
        }
        let (index, cursor) = at_stage(Stage::Behind).next()?;
        let page = page_reader::after(hub.clone(), cursor.ring.clone(), cursor.generation, cursor.after);
        Some(Box::pin(async move { Fetched::Page(index, page.await) }))
    }

    /// Takes in what was read. An error is how the session must end.
    pub(super) fn apply(&mut self, fetched: Fetched, hub: &Hub, channel: &Channel) -> Result<(), CloseCode> {
        match fetched {
            // Where the filter was replaced meanwhile, it is another snapshot that is asked for.
            Fetched::Newest(filter, _) if filter != self.filter => Ok(()),
            Fetched::Newest(_, newest) => {
                let Some(&Start::Snapshot(count)) = self.start.as_deref() else { return Ok(()) };
                let found: Vec<&[EntryId]> = newest.iter().map(|(_, ids)| ids.as_deref().unwrap_or_default()).collect();
                let firsts = oldest_of_newest(&found, count);
                for ((index, ids), first) in newest.iter().zip(firsts) {
                    let cursor = &mut self.cursors[*index];
                    if let Err(error) = ids {
                        cursor.unreadable(error, &mut Teller { channel, notices: &mut self.notices });
                    }
                    cursor.stage = Stage::InRing;
                    if let Some(first) = first {
                        (cursor.after, cursor.began) = (first.previous(), None);
                    }
                }
                self.begin(hub, channel);
                Ok(())
            }
            Fetched::Page(index, page) => {
                let cursor = &mut self.cursors[index];
                let mut teller = Teller { channel, notices: &mut self.notices };
                match page {
                    Ok(page) => cursor.turn(page.as_deref(), hub, &mut teller),
                    Err(error) => {
                        cursor.unreadable(&error, &mut teller);
                        cursor.skip_to_ring();
                        Ok(())
                    }
                }
            }
        }
    }
}

/// Positions as they are passed for `since`.
fn joined(positions: impl Iterator<Item = Position>) -> String {
    positions.map(|position| position.to_string()).collect::<Vec<_>>().join(",")
}
