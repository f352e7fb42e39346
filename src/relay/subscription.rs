//! A subscription: a cursor per stream, merged into the client's write buffer.

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

use crate::clock::now_ms;
use crate::event::{EntryId, Filter, Position, StreamName};
use crate::relay::hub::{Channel, Hub};
use crate::relay::log::page_cache::PageResult;
use crate::relay::log::page_reader;
use crate::relay::log::page_reader::NewestResult;
use crate::relay::log::ring::{Ring, RingSnapshot};
use crate::relay::session::close::CloseCode;
use crate::relay::subscription::cursor::{CursorStage, GapReporter, NextStep, StreamCursor};
use crate::relay::subscription::params::{Since, SubscribeParams};
use crate::relay::subscription::start::{ResolvedStart, oldest_of_newest, resolve};
use crate::relay::wire::encoding::{ControlMessage, Encoding, GapReason, text_message};
use crate::relay::wire::write_buffer::WriteBuffer;

/// The time in ms by which a valid position may be ahead of this relay: other instances may have read more, and clocks
/// differ.
const MAX_CLOCK_AHEAD_MS: u64 = 60_000;

/// The subscription of one client to one or more streams.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Subscription {
    /// Most subscriptions have one cursor, which lies in place.
    cursors: SmallVec<[StreamCursor; 1]>,
    filter: Filter,
    encoding: Encoding,
    /// Whether entries that leave the ring while the client is live are skipped.
    is_latest: bool,
    /// Whether critical alerts are sent early when the client is far behind.
    has_lane: bool,
    /// Whether the last pass left work: the client was behind, or had more than the buffer takes.
    is_lagging: bool,
    /// Whether the client is closed after a gap.
    is_strict: bool,
    /// The subscribe request, until its reply is sent.
    pending_reply: Option<Box<PendingReply>>,
    /// The number of gaps that were reported.
    gaps: usize,
    /// Control messages to write before the next alert.
    controls: Vec<ControlMessage>,
    /// The requested start, until all cursors have started.
    start: Option<Box<StartRequest>>,
    /// Whether the client was at the head once. From then on entries of each stream are sent at once. Before, the
    /// streams are merged by the time of their entries.
    is_live: bool,
    created_ms: u64,
}

/// A subscribe request without its reply.
#[derive(Debug)]
struct PendingReply {
    id: u64,
    /// Whether the request gave positions to resume from.
    is_resumption: bool,
}

/// The requested start.
#[derive(Debug, Clone)]
enum StartRequest {
    Now,
    Earliest,
    At(u64),
    Positions(Vec<Position>),
    Snapshot(usize),
}

/// A read of the store for a client.
pub(super) type StoreRead = Pin<Box<dyn Future<Output = ReadOutcome> + Send>>;

/// The result of a read.
#[derive(Debug)]
pub(super) enum ReadOutcome {
    /// The next entries of the cursor with this index.
    Page(usize, PageResult),
    /// For each cursor, by index, the newest entries that pass this filter, newest first.
    Newest(Filter, Vec<(usize, NewestResult)>),
}

impl Subscription {
    /// Creates a subscription to the streams of these rings that starts now.
    pub(super) fn new(
        rings: Vec<Arc<Ring>>,
        params: SubscribeParams,
        encoding: Encoding,
        reply_id: Option<u64>,
        hub: &Hub,
        channel: &Channel,
    ) -> Self {
        let created_ms = now_ms();
        let start = match params.since {
            None if params.snapshot > 0 => StartRequest::Snapshot(params.snapshot),
            None => StartRequest::Now,
            Some(Since::Earliest) => StartRequest::Earliest,
            Some(Since::Ago(ago)) => {
                StartRequest::At(created_ms.saturating_sub(ago.as_millis().try_into().unwrap_or(u64::MAX)))
            }
            Some(Since::Time(time)) => StartRequest::At(time.as_millisecond().try_into().unwrap_or(0)),
            Some(Since::Positions(positions)) => StartRequest::Positions(positions),
        };
        let mut subscription = Self {
            cursors: rings.into_iter().map(StreamCursor::new).collect(),
            filter: params.filter,
            encoding,
            is_latest: params.is_latest,
            has_lane: params.has_lane,
            is_lagging: false,
            is_strict: params.is_strict,
            pending_reply: reply_id
                .map(|id| Box::new(PendingReply { id, is_resumption: matches!(start, StartRequest::Positions(_)) })),
            gaps: 0,
            controls: Vec::new(),
            start: Some(Box::new(start)),
            is_live: false,
            created_ms,
        };
        subscription.resolve_start(hub, channel);
        subscription
    }

    /// Resolves the start in all streams that can be read. The others start later, and nothing waits for them.
    fn resolve_start(&mut self, hub: &Hub, channel: &Channel) {
        let Some(start) = &self.start else { return };
        let waiting = || self.cursors.iter().enumerate().filter(|(_, cursor)| cursor.stage == CursorStage::Waiting);
        if waiting().any(|(_, cursor)| cursor.ring.is_starting()) {
            return;
        }
        let snapshots: Vec<(usize, RingSnapshot)> =
            waiting().filter_map(|(index, cursor)| cursor.ring.snapshot().map(|snapshot| (index, snapshot))).collect();
        let known = match &**start {
            StartRequest::Positions(_) => hub.known_epochs(self.cursors.iter().map(|cursor| &cursor.ring)),
            _ => None,
        };
        for (index, snapshot) in snapshots {
            let cursor = &mut self.cursors[index];
            // A cursor that is older than its ring's generation starts with all entries since.
            let head = if cursor.generation == snapshot.generation { cursor.after } else { snapshot.start };
            let resolved = match &**start {
                StartRequest::Now | StartRequest::Snapshot(_) => ResolvedStart::exactly_after(head),
                StartRequest::Earliest => ResolvedStart::available_after(EntryId::MIN),
                StartRequest::At(ms) => ResolvedStart::available_after(EntryId::new(*ms, 0).previous().min(head)),
                StartRequest::Positions(positions) => {
                    let latest_ms = snapshot.last.ms.max(self.created_ms).saturating_add(MAX_CLOCK_AHEAD_MS);
                    let resolved = resolve(positions, &snapshot.epoch, known.as_deref(), latest_ms);
                    if resolved.reports_gaps {
                        resolved
                    } else {
                        ResolvedStart { after: resolved.after.min(head), ..resolved }
                    }
                }
            };
            if resolved.has_gap {
                let stream = cursor.ring.stream();
                GapReporter { channel, controls: &mut self.controls }.report(stream, None, None, GapReason::Epoch);
            }
            (cursor.generation, cursor.epoch) = (snapshot.generation, Some(snapshot.epoch));
            cursor.after = resolved.after;
            if resolved.reports_gaps {
                cursor.report_gaps_from_here();
            }
            cursor.stage = if matches!(**start, StartRequest::Snapshot(_)) {
                CursorStage::LocatingSnapshot
            } else {
                CursorStage::InRing
            };
        }
        let has_started =
            |cursor: &StreamCursor| !matches!(cursor.stage, CursorStage::Waiting | CursorStage::LocatingSnapshot);
        if self.cursors.iter().all(has_started) {
            self.start = None;
        }
    }

    /// Adds as much as can be written now.
    pub(super) fn fill(&mut self, hub: &Hub, channel: &Channel, out: &mut WriteBuffer) {
        self.resolve_start(hub, channel);
        let was_lagging = self.is_lagging;
        if was_lagging {
            self.deliver_early(hub, channel, out);
        }
        self.is_lagging = true;
        while !out.is_full() {
            let mut next: Option<(usize, EntryId)> = None;
            let mut bound = EntryId::MAX;
            let mut is_behind = false;
            let mut gap_reporter = GapReporter { channel, controls: &mut self.controls };
            let skips_to_newest = self.is_latest && self.is_live;
            for (index, cursor) in self.cursors.iter_mut().enumerate() {
                match cursor.next(&self.filter, skips_to_newest, &mut gap_reporter) {
                    NextStep::Head => {}
                    NextStep::Behind => is_behind = true,
                    NextStep::Entry(id) => match next {
                        Some((_, oldest)) if oldest <= id => bound = bound.min(id),
                        Some((_, oldest)) => {
                            bound = oldest;
                            next = Some((index, id));
                        }
                        None => next = Some((index, id)),
                    },
                }
            }
            self.reply_if_started(out);
            self.write_controls(out);
            self.is_lagging = is_behind;
            if is_behind && !self.is_live || self.is_ended_by_gap() {
                break;
            }
            let Some((index, first)) = next else {
                if !is_behind && !self.cursors.iter().any(StreamCursor::is_starting) {
                    self.is_live = true;
                    self.cursors.iter_mut().for_each(|cursor| cursor.report_live(&mut self.controls));
                    if !self.controls.is_empty() {
                        // A client that disconnects before the first alert resumes from here.
                        self.push_ids(out);
                    }
                    self.write_controls(out);
                }
                break;
            };
            // Two streams may have the same id.
            let mut bound = bound.max(first.next());
            if matches!(self.encoding, Encoding::EventStream { ids: false, .. }) {
                // The id has the positions in all streams, so this client's frame cannot be shared.
                bound = first.next();
                out.push(self.event_id_line(index, first).into());
            }
            self.cursors[index].write_run(bound, &self.filter, self.encoding, self.created_ms, out);
            self.is_lagging = true;
        }
        if self.is_lagging && !was_lagging {
            self.deliver_early(hub, channel, out);
        }
    }

    /// Adds critical alerts ahead of their order if the client is far behind.
    fn deliver_early(&mut self, hub: &Hub, channel: &Channel, out: &mut WriteBuffer) {
        if !self.has_lane || self.pending_reply.is_some() || self.is_ended_by_gap() {
            return;
        }
        let before = out.alerts;
        let is_held_up = !self.is_live && self.cursors.iter().any(StreamCursor::is_behind);
        for cursor in &mut self.cursors {
            self.controls.extend(cursor.deliver_early(is_held_up, &self.filter, self.encoding, self.created_ms, out));
        }
        if out.alerts > before {
            hub.metrics.relay_early.with_label_values(&[&channel.name]).inc_by(out.alerts - before);
            self.write_controls(out);
        }
    }

    /// Returns whether the last pass left work: the client was behind, or had more than the buffer takes.
    pub(super) fn is_lagging(&self) -> bool {
        self.is_lagging
    }

    /// Returns whether the client must be closed because of a gap.
    pub(super) fn is_ended_by_gap(&self) -> bool {
        self.is_strict && self.gaps > 0
    }

    /// Returns whether the subscription has this stream.
    pub(super) fn contains(&self, stream: &StreamName) -> bool {
        self.ring_of(stream).is_some()
    }

    /// Returns the ring of the stream, or `None` if the subscription does not have it.
    pub(super) fn ring_of(&self, stream: &StreamName) -> Option<&Arc<Ring>> {
        self.cursors.iter().map(|cursor| &cursor.ring).find(|ring| ring.stream() == stream)
    }

    /// Returns the client's position in each stream, in the form of `since`.
    pub(super) fn positions(&self) -> String {
        joined(self.cursors.iter().filter_map(StreamCursor::position))
    }

    /// Replaces the filter from the client's position on.
    pub(super) fn replace_filter(&mut self, filter: Filter) {
        self.filter = filter;
    }

    /// Adds the positions of streams in which only filtered entries came since the last report.
    pub(super) fn add_marks(&mut self, out: &mut WriteBuffer) {
        if self.pending_reply.is_some() {
            return;
        }
        for cursor in &mut self.cursors {
            cursor.report_position(&mut self.controls);
        }
        if !self.controls.is_empty() {
            self.write_controls(out);
        }
    }

    /// Adds the positions in all streams as an event id.
    fn push_ids(&self, out: &mut WriteBuffer) {
        if matches!(self.encoding, Encoding::EventStream { .. }) {
            out.push(format!("id: {}\n\n", self.positions()).into());
        }
    }

    /// Returns the id line of an event: `id` for the cursor with this index, and the positions in all other streams.
    fn event_id_line(&self, index: usize, id: EntryId) -> String {
        let at = |(i, cursor): (usize, &StreamCursor)| {
            let position = cursor.position()?;
            Some(if i == index { Position { id, ..position } } else { position })
        };
        format!("id: {}\n", joined(self.cursors.iter().enumerate().filter_map(at)))
    }

    /// Replies to the subscribe request when the start is known, and whether all entries from there are available.
    fn reply_if_started(&mut self, out: &mut WriteBuffer) {
        if self.pending_reply.is_none() {
            return;
        }
        let is_behind = self.cursors.iter().any(|cursor| cursor.stage == CursorStage::AwaitingPage);
        let is_answerable = |pending_reply: &mut Box<PendingReply>| !(pending_reply.is_resumption && is_behind);
        if self.cursors.iter().any(StreamCursor::is_starting) {
            return;
        }
        let Some(pending_reply) = self.pending_reply.take_if(is_answerable) else { return };
        let streams: Vec<&str> = self.cursors.iter().map(|cursor| cursor.ring.stream().as_str()).collect();
        let gaps = self.controls.iter().filter(|control| matches!(control, ControlMessage::Gap { .. })).count();
        let reply = serde_json::json!({
            "t": "subscribed",
            "id": pending_reply.id,
            "stream": streams.join(","),
            "from": joined(self.cursors.iter().filter_map(|cursor| cursor.start.clone())),
            "recovered": pending_reply.is_resumption && gaps == 0,
        });
        out.push(text_message(&reply.to_string()).into());
    }

    /// Writes control messages, but nothing before the reply.
    fn write_controls(&mut self, out: &mut WriteBuffer) {
        if self.pending_reply.is_some() {
            return;
        }
        let mut is_marked = false;
        for control in self.controls.drain(..) {
            if matches!(control, ControlMessage::Mark { .. }) {
                is_marked = true;
            }
            self.gaps +=
                usize::from(matches!(&control, ControlMessage::Gap { reason, .. } if *reason != GapReason::Lossy));
            if let Some(bytes) = self.encoding.encode_control(&control) {
                out.push(bytes.into());
            }
        }
        if is_marked {
            self.push_ids(out);
        }
    }

    /// Returns the next read of the store, if one is needed.
    pub(super) fn next_read(&self, hub: &Arc<Hub>) -> Option<StoreRead> {
        let at_stage = |stage| self.cursors.iter().enumerate().filter(move |(_, cursor)| cursor.stage == stage);
        if let Some(&StartRequest::Snapshot(count)) = self.start.as_deref()
            && at_stage(CursorStage::LocatingSnapshot).next().is_some()
        {
            let (hub, filter) = (hub.clone(), self.filter.clone());
            let cut =
                |(index, cursor): (usize, &StreamCursor)| (index, cursor.ring.clone(), cursor.generation, cursor.after);
            let cuts: Vec<_> = at_stage(CursorStage::LocatingSnapshot).map(cut).collect();
            return Some(Box::pin(async move {
                let mut newest = Vec::with_capacity(cuts.len());
                for (index, ring, generation, cut) in cuts {
                    newest.push((
                        index,
                        page_reader::newest_matching(&hub, &ring, generation, &filter, count, cut).await,
                    ));
                }
                ReadOutcome::Newest(filter, newest)
            }));
        }
        let (index, cursor) = at_stage(CursorStage::AwaitingPage).next()?;
        let page = page_reader::page_after(hub.clone(), cursor.ring.clone(), cursor.generation, cursor.after);
        Some(Box::pin(async move { ReadOutcome::Page(index, page.await) }))
    }

    /// Applies the result of a read. An error is the close code that ends the session.
    pub(super) fn apply(&mut self, outcome: ReadOutcome, hub: &Hub, channel: &Channel) -> Result<(), CloseCode> {
        match outcome {
            // The filter was replaced during the read, so another snapshot is needed.
            ReadOutcome::Newest(filter, _) if filter != self.filter => Ok(()),
            ReadOutcome::Newest(_, newest) => {
                let Some(&StartRequest::Snapshot(count)) = self.start.as_deref() else { return Ok(()) };
                let found: Vec<&[EntryId]> = newest.iter().map(|(_, ids)| ids.as_deref().unwrap_or_default()).collect();
                let firsts = oldest_of_newest(&found, count);
                for ((index, ids), first) in newest.iter().zip(firsts) {
                    let cursor = &mut self.cursors[*index];
                    if let Err(error) = ids {
                        cursor.report_unreadable(error, &mut GapReporter { channel, controls: &mut self.controls });
                    }
                    cursor.stage = CursorStage::InRing;
                    if let Some(first) = first {
                        (cursor.after, cursor.start) = (first.previous(), None);
                    }
                }
                self.resolve_start(hub, channel);
                Ok(())
            }
            ReadOutcome::Page(index, page) => {
                let cursor = &mut self.cursors[index];
                let mut gap_reporter = GapReporter { channel, controls: &mut self.controls };
                match page {
                    Ok(page) => cursor.apply_page(page.as_deref(), hub, &mut gap_reporter),
                    Err(error) => {
                        cursor.report_unreadable(&error, &mut gap_reporter);
                        cursor.skip_to_ring();
                        Ok(())
                    }
                }
            }
        }
    }
}

/// Formats positions in the form of `since`.
fn joined(positions: impl Iterator<Item = Position>) -> String {
    positions.map(|position| position.to_string()).collect::<Vec<_>>().join(",")
}
