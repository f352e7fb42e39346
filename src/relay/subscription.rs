//! What one client still has to be given: a cursor per stream, and how it moves.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::batch::Batch;
use super::outgoing::Outgoing;
use super::pages::{self, Page, PageSize, Request};
use super::ring::{Lookup, Mark, Ring};
use super::{Channel, CloseCode, Filter, Hub, Since, SubscribeParams};
use crate::event::{EntryId, Epoch, Position};
use crate::store::StoreError;

/// How far before a client's oldest position a stream begins for which it gave none, in ms.
const BEFORE_POSITIONS_MS: u64 = 10_000;

/// What a client asked for and how far it is.
#[derive(Debug)]
pub(super) struct Subscription {
    cursors: Vec<Cursor>,
    filter: Arc<Filter>,
    meta: bool,
    stage: Stage,
    began_ms: u64,
}

#[derive(Debug)]
enum Stage {
    /// The tails have not begun, so it is unknown what "now" is.
    Waiting(Start),
    /// The first entries of a snapshot of that many are being looked for.
    Locating(usize),
    /// On the way to the head for the first time: streams are merged by the time of their entries.
    Replaying,
    /// Was at the head: what a stream has is given at once.
    Live,
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
    /// Waits for a page of the store.
    is_behind: bool,
    page_size: PageSize,
}

/// What a cursor has next.
enum Next {
    Entry(EntryId),
    Head,
    Behind,
}

/// A read of the store on a client's behalf.
pub(super) type Work = Pin<Box<dyn Future<Output = Result<Fetched, StoreError>> + Send>>;

/// What was read.
#[derive(Debug)]
pub(super) enum Fetched {
    /// The next entries of one stream.
    Page(usize, Box<Page>),
    /// Per stream, the newest entries that match, newest first.
    Newest(Vec<Vec<EntryId>>),
}

impl Subscription {
    /// A subscription to some streams, whose rings are given, that begins at this moment.
    pub(super) fn new(rings: Vec<Arc<Ring>>, params: SubscribeParams, hub: &Hub, channel: &Channel) -> Self {
        let began_ms = now_ms();
        let start = match params.since {
            None if params.snapshot > 0 => Start::Snapshot(params.snapshot),
            None => Start::Now,
            Some(Since::Earliest) => Start::Earliest,
            Some(Since::Ago(ago)) => Start::At(began_ms.saturating_sub(ago.as_millis().try_into().unwrap_or(u64::MAX))),
            Some(Since::Time(time)) => Start::At(time.as_millisecond().try_into().unwrap_or(0)),
            Some(Since::Positions(positions)) => Start::Positions(positions),
        };
        let cursors = rings.into_iter().map(Cursor::new).collect();
        let filter = Arc::new(params.filter);
        let mut subscription = Self { cursors, filter, meta: params.meta, stage: Stage::Waiting(start), began_ms };
        subscription.begin(hub, channel);
        subscription
    }

    /// Resolves where to begin, once all rings have begun.
    fn begin(&mut self, hub: &Hub, channel: &Channel) {
        let Stage::Waiting(start) = &self.stage else { return };
        let marks: Option<Vec<Mark>> = self.cursors.iter().map(|cursor| cursor.ring.mark()).collect();
        let Some(marks) = marks else { return };
        // A cursor that was made before its ring began is given all that came since.
        let now = |(cursor, mark): (&Cursor, &Mark)| {
            if cursor.generation == mark.generation { cursor.after } else { mark.start }
        };
        let heads: Vec<EntryId> = self.cursors.iter().zip(&marks).map(now).collect();
        let begins: Vec<Begin> = match start {
            Start::Now | Start::Snapshot(_) => heads.into_iter().map(Begin::at).collect(),
            Start::Earliest => heads.iter().map(|_| Begin::at(EntryId::MIN)).collect(),
            Start::At(ms) => {
                let before = EntryId::new(*ms, 0).previous();
                heads.into_iter().map(|head| Begin::at(before.min(head))).collect()
            }
            Start::Positions(positions) => {
                let epochs: Vec<Epoch> = marks.iter().map(|mark| mark.epoch.clone()).collect();
                resolve(positions, &epochs, &hub.epochs())
            }
        };
        self.stage = match start {
            Start::Snapshot(count) => Stage::Locating(*count),
            _ => Stage::Replaying,
        };
        for ((cursor, mark), begin) in self.cursors.iter_mut().zip(marks).zip(begins) {
            (cursor.generation, cursor.epoch) = (mark.generation, Some(mark.epoch));
            (cursor.after, cursor.is_entry) = (begin.after, begin.is_entry);
            if begin.is_gap {
                channel.gap("epoch");
            }
        }
    }

    /// Adds what can be written now.
    pub(super) fn fill(&mut self, hub: &Hub, channel: &Channel, out: &mut Outgoing) {
        self.begin(hub, channel);
        if !matches!(self.stage, Stage::Replaying | Stage::Live) {
            return;
        }
        while !out.is_full() {
            let mut next: Option<(usize, EntryId)> = None;
            let mut bound = EntryId::MAX;
            let mut is_behind = false;
            for (index, cursor) in self.cursors.iter_mut().enumerate() {
                match cursor.next(&self.filter, channel) {
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
            let is_live = matches!(self.stage, Stage::Live);
            if is_behind && !is_live {
                return;
            }
            let Some((index, first)) = next else {
                if !is_behind {
                    self.stage = Stage::Live;
                }
                return;
            };
            // Two streams may give the same id.
            self.cursors[index].take(bound.max(first.next()), &self.filter, self.meta, self.began_ms, out);
        }
    }

    /// The read of the store that has to come next, if any.
    pub(super) fn work(&self, hub: &Arc<Hub>) -> Option<Work> {
        if let Stage::Locating(count) = self.stage {
            let (hub, filter) = (hub.clone(), self.filter.clone());
            let streams: Vec<(Arc<Ring>, EntryId)> = self.cursors.iter().map(|c| (c.ring.clone(), c.after)).collect();
            return Some(Box::pin(async move {
                let mut found = Vec::with_capacity(streams.len());
                for (ring, cut) in &streams {
                    found.push(pages::newest(&*hub.store, &hub.pages, ring, &filter, count, *cut).await?);
                }
                Ok(Fetched::Newest(found))
            }));
        }
        let (index, cursor) = self.cursors.iter().enumerate().find(|(_, cursor)| cursor.is_behind)?;
        let (hub, ring, request) = (hub.clone(), cursor.ring.clone(), cursor.request());
        Some(Box::pin(async move {
            pages::read(&*hub.store, &hub.pages, &ring, request).await.map(|page| Fetched::Page(index, Box::new(page)))
        }))
    }

    /// Takes in what was read. An error is how the session must end.
    pub(super) fn apply(&mut self, fetched: Fetched, hub: &Hub, channel: &Channel) -> Result<(), CloseCode> {
        match fetched {
            Fetched::Newest(found) => {
                let Stage::Locating(count) = self.stage else { return Ok(()) };
                for (cursor, first) in self.cursors.iter_mut().zip(oldest_of_newest(&found, count)) {
                    if let Some(first) = first {
                        (cursor.after, cursor.is_entry) = (first.previous(), false);
                    }
                }
                self.stage = Stage::Replaying;
                Ok(())
            }
            Fetched::Page(index, page) => self.cursors[index].turn(*page, hub, channel),
        }
    }
}

impl Cursor {
    /// A cursor at the head of the ring as it is now, if it has begun.
    fn new(ring: Arc<Ring>) -> Self {
        let mark = ring.mark();
        Self {
            ring,
            generation: mark.as_ref().map_or(0, |mark| mark.generation),
            epoch: mark.as_ref().map(|mark| mark.epoch.clone()),
            after: mark.map_or(EntryId::MIN, |mark| mark.last),
            is_entry: false,
            current: None,
            head_seen: None,
            passed_bytes: None,
            is_behind: false,
            page_size: PageSize::default(),
        }
    }

    /// Moves to the next entry that passes.
    fn next(&mut self, filter: &Filter, channel: &Channel) -> Next {
        loop {
            if let Some((batch, index)) = &mut self.current {
                *index = batch.next_match(*index, filter);
                if *index < batch.len() {
                    return Next::Entry(batch.id(*index));
                }
                self.pass_current();
            }
            if self.is_behind {
                return Next::Behind;
            }
            let changes = self.ring.changes();
            if self.head_seen == Some(changes) {
                return Next::Head;
            }
            match self.ring.after(self.generation, self.after) {
                Lookup::Head => {
                    self.head_seen = Some(changes);
                    return Next::Head;
                }
                Lookup::Batch(batch, passed_bytes) => {
                    let index = batch.first_after(self.after);
                    self.passed_bytes = Some(passed_bytes);
                    self.current = Some((batch, index));
                }
                Lookup::Behind => {
                    self.is_behind = true;
                    channel.catchups.inc();
                    return Next::Behind;
                }
                Lookup::Restarted => {
                    // Plain clients go on with the new life of the stream from its beginning.
                    channel.gap("state_lost");
                    let mark = self.ring.mark().expect("a ring that restarted has begun");
                    (self.generation, self.epoch) = (mark.generation, Some(mark.epoch));
                    (self.after, self.is_entry, self.passed_bytes) = (mark.start, false, None);
                }
            }
        }
    }

    /// Takes the entries at hand that come before `bound`. The next one must be known to pass.
    fn take(&mut self, bound: EntryId, filter: &Filter, meta: bool, began_ms: u64, out: &mut Outgoing) {
        let Some((batch, index)) = &mut self.current else { return };
        let run = batch.run(*index, bound, filter);
        let (first, end) = (batch.id(*index), run.end);
        out.alerts += run.len() as u64;
        if first.ms >= began_ms {
            out.oldest_ms = Some(out.oldest_ms.map_or(first.ms, |oldest| oldest.min(first.ms)));
        }
        out.push(batch.frames(run, meta));
        *index = end;
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
    fn turn(&mut self, page: Page, hub: &Hub, channel: &Channel) -> Result<(), CloseCode> {
        self.is_behind = false;
        if page.generation != self.generation {
            return Ok(());
        }
        if page.is_trimmed {
            channel.gap("trimmed");
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

/// Where the streams with these `epochs` begin for a client that has seen everything up to `positions`.
///
/// A position of none of the `known` epochs belongs to a life that is over, and it can't be told of which stream: those
/// without a position of their own begin with their oldest entry then. Otherwise they begin a little before the oldest
/// position, because the client has seen nothing of them that it could name.
fn resolve(positions: &[Position], epochs: &[Epoch], known: &[Epoch]) -> Vec<Begin> {
    let is_unknown = |position: &Position| !known.contains(&position.epoch);
    let has_unknown = positions.iter().any(is_unknown);
    let earliest_ms = positions.iter().filter(|p| !is_unknown(p)).map(|p| p.id.ms).min().unwrap_or(0);
    let begin = |epoch: &Epoch| match positions.iter().filter(|p| p.epoch == *epoch).map(|p| p.id).min() {
        Some(after) => Begin { after, is_entry: true, is_gap: false },
        None if has_unknown => Begin { after: EntryId::MIN, is_entry: false, is_gap: true },
        None => Begin::at(EntryId::new(earliest_ms.saturating_sub(BEFORE_POSITIONS_MS), 0).previous()),
    };
    epochs.iter().map(begin).collect()
}

/// From the newest entries of each stream, the oldest of each that is among the newest `count` of all.
fn oldest_of_newest(found: &[Vec<EntryId>], count: usize) -> Vec<Option<EntryId>> {
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
        let epochs = |names: &[&str]| names.iter().map(|name| epoch(name)).collect::<Vec<_>>();
        resolve(&positions, &epochs(streams), &epochs(known))
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
    fn a_snapshot_is_the_newest_of_all_streams_together() {
        let found = [vec![id(9), id(5), id(1)], vec![id(8), id(7), id(6)], vec![]];
        assert_eq!(oldest_of_newest(&found, 4), [Some(id(9)), Some(id(6)), None]);
        assert_eq!(oldest_of_newest(&found, 100), [Some(id(1)), Some(id(6)), None]);
        let tied = [vec![id(5)], vec![id(5)]];
        let kept = oldest_of_newest(&tied, 1).into_iter().flatten().count();
        assert_eq!(kept, 1, "as many as asked for, also where ids are equal");
    }
}
