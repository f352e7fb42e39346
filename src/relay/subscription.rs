//! What one client still has to be given: a cursor per stream, and how it moves.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::batch::Batch;
use super::form::{Form, Notice, Reason, text_message};
use super::outgoing::Outgoing;
use super::pages::{self, Page, PageSize, Request};
use super::ring::{Lookup, Mark, Ring};
use super::{Channel, CloseCode, Filter, Hub, Since, SubscribeParams};
use crate::event::{EntryId, Epoch, Position, StreamName};
use crate::store::StoreError;

/// How far before a client's oldest position a stream begins for which it gave none, in ms.
const BEFORE_POSITIONS_MS: u64 = 10_000;

/// After so many entries that don't pass, a client is told where it stands.
const MARK_ENTRIES: usize = 1000;

/// What a client asked for and how far it is.
#[derive(Debug)]
pub(super) struct Subscription {
    cursors: Vec<Cursor>,
    filter: Arc<Filter>,
    form: Form,
    /// Whether what a live client is too slow for is left out.
    is_latest: bool,
    /// Whether the client would rather be closed than go on after a gap.
    is_strict: bool,
    /// The request that is answered once it is known where this begins, and whether it asked for what comes after
    /// something.
    unanswered: Option<(u64, bool)>,
    /// How many gaps were told.
    gaps: usize,
    /// What is to be told before the next alert.
    notices: Vec<Notice>,
    /// Where to begin, as long as there is a cursor that has not begun.
    start: Option<Start>,
    /// Whether it was at the head once: from then on, what a stream has is given at once. On the way there, streams
    /// are merged by the time of their entries.
    is_live: bool,
    began_ms: u64,
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

/// The place in one stream.
#[derive(Debug)]
struct Cursor {
    ring: Arc<Ring>,
    stage: Stage,
    /// The life of the stream that it belongs to; 0 and nothing before that has begun.
    generation: u64,
    epoch: Option<Epoch>,
    /// Everything up to here is given or filtered out, but for what is left of `current`.
    after: EntryId,
    /// Whether `after` is an entry that was there.
    is_entry: bool,
    /// A batch under way, from the ring or from the store, and the index of what is next in it.
    current: Option<(Arc<Batch>, usize)>,
    /// The ring's change at which there was nothing more.
    head_seen: Option<u64>,
    /// Bytes of the ring's log passed, once that is known.
    passed_bytes: Option<u64>,
    page_size: PageSize,
    /// Entries that did not pass since the client last learnt where it stands.
    unseen: usize,
    /// Where that was.
    told: EntryId,
}

/// Counts what can't be given, and keeps it for the client.
struct Teller<'a> {
    channel: &'a Channel,
    notices: &'a mut Vec<Notice>,
}

impl Teller<'_> {
    fn gap(&mut self, stream: &StreamName, after: Option<Position>, before: Option<Position>, reason: Reason) {
        self.channel.gap(reason.as_str());
        self.notices.push(Notice::Gap { stream: stream.clone(), after, before, reason });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
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
enum Next {
    Entry(EntryId),
    Head,
    Behind,
}

/// A read of the store on a client's behalf.
pub(super) type Work = Pin<Box<dyn Future<Output = Fetched> + Send>>;

/// What was read.
#[derive(Debug)]
pub(super) enum Fetched {
    /// The next entries of the cursor with this index.
    Page(usize, Result<Box<Page>, StoreError>),
    /// For each cursor with these indices, the newest entries that match, newest first.
    Newest(Vec<(usize, Result<Vec<EntryId>, StoreError>)>),
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
            filter: Arc::new(params.filter),
            form,
            is_latest: params.is_latest,
            is_strict: params.is_strict,
            unanswered: answers.map(|request| (request, matches!(start, Start::Positions(_)))),
            gaps: 0,
            notices: Vec::new(),
            start: Some(start),
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
        let known = match start {
            Start::Positions(_) => hub.epochs(),
            _ => None,
        };
        for (index, mark) in marks {
            let cursor = &mut self.cursors[index];
            // A cursor that was made before its ring began is given all that came since.
            let head = if cursor.generation == mark.generation { cursor.after } else { mark.start };
            let begin = match start {
                Start::Now | Start::Snapshot(_) => Begin::at(head),
                Start::Earliest => Begin::at(EntryId::MIN),
                Start::At(ms) => Begin::at(EntryId::new(*ms, 0).previous().min(head)),
                Start::Positions(positions) => resolve(positions, &mark.epoch, known.as_deref()),
            };
            if begin.is_gap {
                let stream = cursor.ring.stream();
                Teller { channel, notices: &mut self.notices }.gap(stream, None, None, Reason::Epoch);
            }
            (cursor.generation, cursor.epoch) = (mark.generation, Some(mark.epoch));
            (cursor.after, cursor.is_entry) = (begin.after, begin.is_entry);
            cursor.stage = if matches!(start, Start::Snapshot(_)) { Stage::Locating } else { Stage::InRing };
        }
        let is_over = |cursor: &Cursor| !matches!(cursor.stage, Stage::Waiting | Stage::Locating);
        if self.cursors.iter().all(is_over) {
            self.start = None;
        }
    }

    /// Adds what can be written now.
    pub(super) fn fill(&mut self, hub: &Hub, channel: &Channel, out: &mut Outgoing) {
        self.begin(hub, channel);
        let alerts_before = out.alerts;
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
            if is_behind && !self.is_live || self.is_lost() {
                break;
            }
            let Some((index, first)) = next else {
                if !self.is_live && self.start.is_none() {
                    self.is_live = true;
                    let live = |cursor: &Cursor| Notice::Live { stream: cursor.ring.stream().clone() };
                    self.notices.extend(self.cursors.iter().map(live));
                    self.tell(out);
                }
                break;
            };
            // Two streams may give the same id.
            self.cursors[index].take(bound.max(first.next()), &self.filter, self.form, self.began_ms, out);
        }
        if out.alerts > alerts_before {
            self.push_ids(out);
        }
    }

    /// Whether the client asked to be closed after what could not be given.
    pub(super) fn is_lost(&self) -> bool {
        self.is_strict && self.gaps > 0
    }

    /// Whether it is to this stream.
    pub(super) fn is_to(&self, stream: &StreamName) -> bool {
        self.cursors.iter().any(|cursor| cursor.ring.stream() == stream)
    }

    /// Where the client stands in each stream, as it is passed for `since`.
    pub(super) fn positions(&self) -> String {
        let positions: Vec<String> = self.cursors.iter().filter_map(Cursor::position).map(|p| p.to_string()).collect();
        positions.join(",")
    }

    /// Lets something else pass from where the client stands.
    pub(super) fn replace_filter(&mut self, filter: Filter) {
        self.filter = Arc::new(filter);
    }

    /// Tells where the client stands in streams of which nothing passed since it was told last.
    pub(super) fn mark(&mut self, out: &mut Outgoing) {
        for cursor in &mut self.cursors {
            cursor.mark(&mut self.notices);
        }
        if !self.notices.is_empty() {
            self.tell(out);
            self.push_ids(out);
        }
    }

    /// Tells a client of several streams that knows one id only where it stands in all of them.
    fn push_ids(&self, out: &mut Outgoing) {
        if matches!(self.form, Form::EventStream { ids: false, .. }) {
            out.push(format!("id: {}\n\n", self.positions()).into());
        }
    }

    /// Answers the request that made this, once it is known where it begins.
    fn answer(&mut self, out: &mut Outgoing) {
        if self.start.is_some() {
            return;
        }
        let Some((request, is_resumed)) = self.unanswered.take() else { return };
        let streams: Vec<&str> = self.cursors.iter().map(|cursor| cursor.ring.stream().as_str()).collect();
        let gaps = self.notices.iter().filter(|notice| matches!(notice, Notice::Gap { .. })).count();
        let answer = serde_json::json!({
            "t": "subscribed",
            "id": request,
            "stream": streams.join(","),
            "from": self.positions(),
            "recovered": is_resumed && gaps == 0,
        });
        out.push(text_message(&answer.to_string()).into());
    }

    /// Writes what is to be told.
    fn tell(&mut self, out: &mut Outgoing) {
        for notice in self.notices.drain(..) {
            self.gaps += usize::from(matches!(&notice, Notice::Gap { reason, .. } if *reason != Reason::Lossy));
            if let Some(words) = self.form.tell(&notice) {
                out.push(words.into());
            }
        }
    }

    /// The read of the store that has to come next, if any.
    pub(super) fn work(&self, hub: &Arc<Hub>) -> Option<Work> {
        let at_stage = |stage| self.cursors.iter().enumerate().filter(move |(_, cursor)| cursor.stage == stage);
        if let Some(Start::Snapshot(count)) = self.start
            && at_stage(Stage::Locating).next().is_some()
        {
            let (hub, filter) = (hub.clone(), self.filter.clone());
            let cuts: Vec<(usize, Arc<Ring>, EntryId)> =
                at_stage(Stage::Locating).map(|(index, cursor)| (index, cursor.ring.clone(), cursor.after)).collect();
            return Some(Box::pin(async move {
                let mut newest = Vec::with_capacity(cuts.len());
                for (index, ring, cut) in cuts {
                    newest.push((index, pages::newest(&*hub.store, &hub.pages, &ring, &filter, count, cut).await));
                }
                Fetched::Newest(newest)
            }));
        }
        let (index, cursor) = at_stage(Stage::Behind).next()?;
        let (hub, ring, request) = (hub.clone(), cursor.ring.clone(), cursor.request());
        Some(Box::pin(async move {
            let page = pages::read(&*hub.store, &hub.pages, &ring, request).await;
            Fetched::Page(index, page.map(Box::new))
        }))
    }

    /// Takes in what was read. An error is how the session must end.
    pub(super) fn apply(&mut self, fetched: Fetched, hub: &Hub, channel: &Channel) -> Result<(), CloseCode> {
        match fetched {
            Fetched::Newest(newest) => {
                let Some(Start::Snapshot(count)) = self.start else { return Ok(()) };
                let found: Vec<&[EntryId]> = newest.iter().map(|(_, ids)| ids.as_deref().unwrap_or_default()).collect();
                let firsts = oldest_of_newest(&found, count);
                for ((index, ids), first) in newest.iter().zip(firsts) {
                    let cursor = &mut self.cursors[*index];
                    if let Err(error) = ids {
                        cursor.unreadable(error, &mut Teller { channel, notices: &mut self.notices });
                    }
                    cursor.stage = Stage::InRing;
                    if let Some(first) = first {
                        (cursor.after, cursor.is_entry) = (first.previous(), false);
                    }
                }
                self.begin(hub, channel);
                Ok(())
            }
            Fetched::Page(index, page) => {
                let cursor = &mut self.cursors[index];
                let mut teller = Teller { channel, notices: &mut self.notices };
                match page {
                    Ok(page) => cursor.turn(*page, hub, &mut teller),
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

impl Cursor {
    /// A cursor at the head of the ring as it is now, if it has begun.
    fn new(ring: Arc<Ring>) -> Self {
        let mark = ring.mark();
        Self {
            ring,
            stage: Stage::Waiting,
            generation: mark.as_ref().map_or(0, |mark| mark.generation),
            epoch: mark.as_ref().map(|mark| mark.epoch.clone()),
            after: mark.map_or(EntryId::MIN, |mark| mark.last),
            is_entry: false,
            current: None,
            head_seen: None,
            passed_bytes: None,
            page_size: PageSize::default(),
            unseen: 0,
            told: EntryId::MIN,
        }
    }

    /// Everything up to here is given or did not pass; nothing before that is known.
    fn position(&self) -> Option<Position> {
        let id = match &self.current {
            Some((batch, index)) if *index > 0 => batch.id(*index - 1).max(self.after),
            _ => self.after,
        };
        let epoch = self.epoch.clone().filter(|_| !matches!(self.stage, Stage::Waiting | Stage::Locating))?;
        Some(Position { epoch, id })
    }

    /// Tells where the client stands, if it does not know.
    fn mark(&mut self, notices: &mut Vec<Notice>) {
        if let Some(position) = self.position().filter(|position| position.id > self.told) {
            (self.told, self.unseen) = (position.id, 0);
            notices.push(Notice::Mark { stream: self.ring.stream().clone(), position });
        }
    }

    /// A part of the past can't be read, and waiting won't help: that is a gap in this stream, and no reason to withhold
    /// what comes.
    fn unreadable(&self, error: &StoreError, teller: &mut Teller<'_>) {
        tracing::warn!(%error, kind = error.kind().as_str(), "cannot read what a client has still to be given");
        teller.gap(self.ring.stream(), self.position(), None, Reason::Unreadable);
    }

    /// Moves to the next entry that passes.
    ///
    /// With `skips`, what has left the ring is left out.
    fn next(&mut self, filter: &Filter, skips: bool, teller: &mut Teller<'_>) -> Next {
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
                    return Next::Entry(id);
                }
            }
            let changes = self.ring.changes();
            if self.head_seen == Some(changes) {
                return Next::Head;
            }
            match self.ring.after(self.generation, self.after) {
                Lookup::Head => {
                    (self.stage, self.head_seen) = (Stage::InRing, Some(changes));
                    return Next::Head;
                }
                Lookup::Batch(batch, passed_bytes) => {
                    let index = batch.first_after(self.after);
                    (self.stage, self.passed_bytes) = (Stage::InRing, Some(passed_bytes));
                    self.current = Some((batch, index));
                }
                Lookup::Behind if skips => {
                    let after = self.position();
                    if let Some(mark) = self.ring.mark() {
                        (self.after, self.is_entry) = (mark.last, false);
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
                    // The client goes on with the new life of the stream from its beginning.
                    teller.gap(self.ring.stream(), self.position(), None, Reason::StateLost);
                    let mark = self.ring.mark().expect("a ring that restarted has begun");
                    (self.generation, self.epoch) = (mark.generation, Some(mark.epoch));
                    (self.after, self.is_entry, self.passed_bytes) = (mark.start, false, None);
                    self.told = EntryId::MIN;
                }
            }
        }
    }

    /// Takes the entries at hand that come before `bound`. The next one must be known to pass.
    fn take(&mut self, bound: EntryId, filter: &Filter, form: Form, began_ms: u64, out: &mut Outgoing) {
        let Some((batch, index)) = &mut self.current else { return };
        let run = batch.run(*index, bound, filter);
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

    fn pass_current(&mut self) {
        if let Some((batch, _)) = self.current.take() {
            (self.after, self.is_entry) = (self.after.max(batch.last()), true);
        }
    }

    fn request(&self) -> Request {
        Request {
            generation: self.generation,
            epoch: self.epoch.clone().expect("only a cursor that has begun falls behind"),
            after: self.after,
            is_entry: self.is_entry && self.after > EntryId::MIN,
            size: self.page_size,
        }
    }

    /// Turns to a page that was read from the store.
    fn turn(&mut self, page: Page, hub: &Hub, teller: &mut Teller<'_>) -> Result<(), CloseCode> {
        self.stage = Stage::InPages;
        if page.generation != self.generation {
            return Ok(());
        }
        if page.is_trimmed {
            let before = page.oldest.zip(self.epoch.clone()).map(|(id, epoch)| Position { epoch, id });
            teller.gap(self.ring.stream(), self.position(), before, Reason::Trimmed);
        }
        self.page_size = page.size;
        if let Some(passed) = &mut self.passed_bytes {
            *passed += page.batch.size_bytes() as u64;
            let total = self.ring.mark().map_or(0, |mark| mark.total_bytes);
            let age = page.oldest.map_or(Duration::ZERO, |id| Duration::from_millis(now_ms().saturating_sub(id.ms)));
            if hub.is_too_far_behind(total.saturating_sub(*passed), age) {
                return Err(CloseCode::TooSlow);
            }
        }
        self.current = Some((Arc::new(page.batch), 0));
        Ok(())
    }

    /// Gives up what has left the ring.
    fn skip_to_ring(&mut self) {
        self.stage = Stage::InRing;
        if let Some(mark) = self.ring.mark() {
            (self.after, self.is_entry) = (self.after.max(mark.floor), false);
        }
    }
}

/// Where one stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Begin {
    after: EntryId,
    /// Whether `after` is an entry that was there.
    is_entry: bool,
    /// Whether something the client has asked for can't be given.
    is_gap: bool,
}

impl Begin {
    fn at(after: EntryId) -> Self {
        Self { after, is_entry: false, is_gap: false }
    }
}

/// Where the stream with this `epoch` begins for a client that has seen everything up to `positions`.
///
/// A position of none of the `known` epochs belongs to a life that is over, and it can't be told of which stream: one
/// without a position of its own begins with its oldest entry then. Otherwise it begins a little before the oldest
/// position, because the client has seen nothing of it that it could name. Without `known` epochs, because there are
/// streams that have not begun, every position is taken for one of a living stream.
fn resolve(positions: &[Position], epoch: &Epoch, known: Option<&[Epoch]>) -> Begin {
    if let Some(after) = positions.iter().filter(|p| p.epoch == *epoch).map(|p| p.id).min() {
        return Begin { after, is_entry: true, is_gap: false };
    }
    let is_known = |position: &Position| known.is_none_or(|known| known.contains(&position.epoch));
    if !positions.iter().all(is_known) {
        return Begin { after: EntryId::MIN, is_entry: false, is_gap: true };
    }
    let earliest_ms = positions.iter().map(|p| p.id.ms).min().unwrap_or(0);
    Begin::at(EntryId::new(earliest_ms.saturating_sub(BEFORE_POSITIONS_MS), 0).previous())
}

/// From the newest entries of each stream, the oldest of each that is among the newest `count` of all.
fn oldest_of_newest(found: &[&[EntryId]], count: usize) -> Vec<Option<EntryId>> {
    let mut all: Vec<(EntryId, usize)> =
        found.iter().enumerate().flat_map(|(stream, ids)| ids.iter().map(move |id| (*id, stream))).collect();
    all.sort_unstable_by(|a, b| b.cmp(a));
    all.truncate(count);
    let oldest = |stream| all.iter().filter(|(_, s)| *s == stream).map(|(id, _)| *id).next_back();
    (0..found.len()).map(oldest).collect()
}

/// The present time in ms since 1970, by the clock that entry ids are made from.
pub(super) fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(ms: u64) -> EntryId {
        EntryId::new(ms, 0)
    }

    fn epoch(text: &str) -> Epoch {
        text.parse().expect("an epoch")
    }

    fn begins(positions: &[&str], streams: &[&str], known: &[&str]) -> Vec<Begin> {
        let positions: Vec<Position> = positions.iter().map(|text| text.parse().expect("a position")).collect();
        let known: Vec<Epoch> = known.iter().map(|name| epoch(name)).collect();
        streams.iter().map(|name| resolve(&positions, &epoch(name), Some(&known))).collect()
    }

    fn seen(ms: u64) -> Begin {
        Begin { after: id(ms), is_entry: true, is_gap: false }
    }

    #[test]
    fn each_stream_goes_on_after_its_own_position() {
        assert_eq!(begins(&["b:7-0", "a:5-0"], &["a", "b"], &["a", "b"]), [seen(5), seen(7)]);
    }

    #[test]
    fn of_two_positions_in_a_stream_the_older_one_counts() {
        assert_eq!(begins(&["a:7-0", "a:5-0"], &["a"], &["a"]), [seen(5)]);
    }

    #[test]
    fn a_stream_without_a_position_begins_a_little_before_the_others() {
        let before = Begin::at(id(90_000).previous());
        assert_eq!(begins(&["a:100000-3"], &["a", "b"], &["a", "b"])[1], before);
        assert_eq!(begins(&["a:5-0"], &["b"], &["a", "b"]), [Begin::at(EntryId::MIN)], "not before the beginning");
    }

    #[test]
    fn a_position_of_a_lost_life_is_a_gap_and_begins_with_the_oldest_entry() {
        let gap = Begin { after: EntryId::MIN, is_entry: false, is_gap: true };
        assert_eq!(begins(&["a:100000-0", "old:99-0"], &["a", "b"], &["a", "b"]), [seen(100_000), gap]);
    }

    #[test]
    fn as_long_as_a_stream_has_not_begun_no_position_counts_as_lost() {
        let positions = ["a:100000-0".parse().expect("a position")];
        assert_eq!(resolve(&positions, &epoch("b"), None), Begin::at(id(90_000).previous()));
    }

    #[test]
    fn a_snapshot_is_the_newest_of_all_streams_together() {
        let found: [&[EntryId]; 3] = [&[id(9), id(5), id(1)], &[id(8), id(7), id(6)], &[]];
        assert_eq!(oldest_of_newest(&found, 4), [Some(id(9)), Some(id(6)), None]);
        assert_eq!(oldest_of_newest(&found, 100), [Some(id(1)), Some(id(6)), None]);
        let tied: [&[EntryId]; 2] = [&[id(5)], &[id(5)]];
        let kept = oldest_of_newest(&tied, 1).into_iter().flatten().count();
        assert_eq!(kept, 1, "as many as asked for, also where ids are equal");
    }
}
