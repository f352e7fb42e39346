//! Batches appends: simultaneous appends to one stream go to the server as one command.
//!
//! One task takes all appends. Up to two commands per stream are in flight; appends that arrive meanwhile wait and form
//! the next command. There is no timer: the commands in flight are the window.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::event::{NewEntry, StreamName, field};
use crate::store::redis::net::client::RoutedClient;
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::{Reply, parse_id};
use crate::store::redis::net::script::{APPEND, APPEND_ONCE};
use crate::store::redis::ops::keys;
use crate::store::redis::ops::large_entry;
use crate::store::{Appended, MAX_APPEND, StoreErrorKind};

/// The maximum of bytes in one batch. A single append may be larger.
const MAX_BATCH_BYTES: usize = 1 << 20;
/// The maximum number of commands in flight per stream.
const MAX_IN_FLIGHT: u8 = 2;
/// The capacity of the queue of appends.
const QUEUE: usize = 1024;

/// The handle to the batching task.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    queue: mpsc::Sender<AppendRequest>,
    /// The maximum wait of an append before it is sent.
    patience: Duration,
}

#[derive(Debug)]
struct AppendRequest {
    stream: StreamName,
    entries: Vec<NewEntry>,
    bytes: usize,
    queued_at: Instant,
    answer: oneshot::Sender<Result<Vec<Appended>, Failure>>,
}

/// The appends of one stream.
#[derive(Default)]
struct StreamQueue {
    waiting: VecDeque<AppendRequest>,
    in_flight: u8,
}

impl Publisher {
    /// Creates a publisher and its task, which runs until `closing` is cancelled and all accepted appends are done.
    pub(crate) fn new(
        link: RoutedClient,
        patience: Duration,
        closing: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (queue, requests) = mpsc::channel(QUEUE);
        (Self { queue, patience }, run(link, requests, patience, closing))
    }

    /// Appends entries, all or none. Cancel-safe: a cancelled append happens completely or not at all.
    pub(crate) async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, Failure> {
        if entries.is_empty() {
            return Ok(Vec::new());
        }
        check(&entries)?;
        let (answer, outcome) = oneshot::channel();
        let bytes = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        let request = AppendRequest { stream: stream.clone(), entries, bytes, queued_at: Instant::now(), answer };
        match tokio::time::timeout(self.patience, self.queue.send(request)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Failure::unavailable("the store is closed")),
            Err(_) => return Err(Failure::unavailable("too many appends wait for the server")),
        }
        outcome.await.unwrap_or_else(|_| Err(Failure::unavailable("the store is closed")))
    }
}

/// Refuses invalid entries before they fail the batch of other callers.
fn check(entries: &[NewEntry]) -> Result<(), Failure> {
    let wrong = |reason: String| Err(Failure::new(StoreErrorKind::Internal, reason));
    if entries.len() > MAX_APPEND {
        return wrong(format!("{} entries in one append, the maximum is {MAX_APPEND}", entries.len()));
    }
    for entry in entries {
        if entry.fields.is_empty() {
            return wrong("an entry must have a field".to_owned());
        }
        if entry.fields.len() * 2 > large_entry::MAX_ARGUMENTS {
            return wrong(format!("an entry has {} fields", entry.fields.len()));
        }
    }
    Ok(())
}

async fn run(
    link: RoutedClient,
    mut requests: mpsc::Receiver<AppendRequest>,
    patience: Duration,
    closing: CancellationToken,
) {
    let mut queues: HashMap<StreamName, StreamQueue> = HashMap::new();
    let mut in_flight = FuturesUnordered::new();
    let mut is_open = true;
    while is_open || !in_flight.is_empty() {
        let stream = tokio::select! {
            biased;
            Some(stream) = in_flight.next() => {
                if let Some(queue) = queues.get_mut(&stream) {
                    queue.in_flight -= 1;
                }
                // Appends that arrived meanwhile belong to the next batch.
                while let Ok(request) = requests.try_recv() {
                    queues.entry(request.stream.clone()).or_default().waiting.push_back(request);
                }
                None::<StreamName>
            }
            () = closing.cancelled(), if !requests.is_closed() => {
                requests.close();
                None
            }
            request = requests.recv(), if is_open => {
                is_open = request.is_some();
                request.map(|request| {
                    let stream = request.stream.clone();
                    queues.entry(stream.clone()).or_default().waiting.push_back(request);
                    stream
                })
            }
        };
        match stream {
            Some(stream) => {
                let queue = queues.get_mut(&stream).expect("the request was just put there");
                while let Some(batch) = next_batch(queue, patience) {
                    in_flight.push(send(&link, stream.clone(), batch));
                }
            }
            None => queues.retain(|stream, queue| {
                while let Some(batch) = next_batch(queue, patience) {
                    in_flight.push(send(&link, stream.clone(), batch));
                }
                queue.in_flight > 0 || !queue.waiting.is_empty()
            }),
        }
    }
}

/// Returns the next batch of a stream, if another of its commands may be sent now.
fn next_batch(queue: &mut StreamQueue, patience: Duration) -> Option<Vec<AppendRequest>> {
    if queue.in_flight >= MAX_IN_FLIGHT {
        return None;
    }
    let mut batch = Vec::new();
    let (mut entries, mut bytes) = (0, 0);
    while let Some(next) = queue.waiting.front() {
        let is_too_much = entries + next.entries.len() > MAX_APPEND || bytes + next.bytes > MAX_BATCH_BYTES;
        if is_too_much && !batch.is_empty() {
            break;
        }
        let request = queue.waiting.pop_front().expect("it was just looked at");
        if request.answer.is_closed() {
            continue;
        }
        if request.queued_at.elapsed() > patience {
            answer(request, Err(Failure::unavailable("the server did not take earlier appends in time")));
            continue;
        }
        entries += request.entries.len();
        bytes += request.bytes;
        batch.push(request);
    }
    if batch.is_empty() {
        return None;
    }
    queue.in_flight += 1;
    Some(batch)
}

async fn send(link: &RoutedClient, stream: StreamName, batch: Vec<AppendRequest>) -> StreamName {
    let outcome = append(link, &stream, &batch).await;
    match outcome {
        Ok((appended, unconfirmed)) => {
            let mut appended = appended.into_iter();
            for request in batch {
                let own: Vec<Appended> = appended.by_ref().take(request.entries.len()).collect();
                let outcome = match &unconfirmed {
                    None => Ok(own),
                    Some(failure) => {
                        let stored = own.iter().filter(|appended| !appended.duplicate).count() as u64;
                        Err(Failure { stored, ..failure.clone() })
                    }
                };
                answer(request, outcome);
            }
        }
        Err(failure) => {
            for request in batch {
                answer(request, Err(failure.clone()));
            }
        }
    }
    stream
}

fn answer(request: AppendRequest, outcome: Result<Vec<Appended>, Failure>) {
    // The caller may have been cancelled. The entries are appended nevertheless.
    drop(request.answer.send(outcome));
}

/// The appended entries, and the failure to confirm their durability, if any.
async fn append(
    link: &RoutedClient,
    stream: &StreamName,
    batch: &[AppendRequest],
) -> Result<(Vec<Appended>, Option<Failure>), Failure> {
    let entries = || batch.iter().flat_map(|request| &request.entries);
    if entries().any(large_entry::is_wide) {
        return large_entry::append(link, stream, &entries().collect::<Vec<_>>()).await;
    }
    let once = entries().any(|entry| entry.idempotency.is_some());
    let answer = if once {
        append_once(link, stream, entries()).await
    } else {
        let key = Bytes::copy_from_slice(stream.as_str().as_bytes());
        link.run_with(&APPEND, &[key], |arguments| add_runs(arguments, entries())).await
    };
    let (reply, unconfirmed) = match answer {
        Ok(reply) => (reply, None),
        Err(mut failure) => match failure.unconfirmed.take() {
            Some(reply) => (*reply, Some(failure)),
            None => return Err(failure),
        },
    };
    let appended = if once { with_duplicates(reply, entries())? } else { plain(&reply.bytes()?, entries())? };
    if appended.len() == entries().count() {
        Ok((appended, unconfirmed))
    } else {
        Err(Failure::unexpected("the number of ids differs from the number of entries"))
    }
}

/// Encodes entries in runs with the same names. A value that a whole run shares is encoded once.
fn add_runs<'a>(arguments: &mut Arguments, entries: impl Iterator<Item = &'a NewEntry> + Clone) {
    let names = |entry: &'a NewEntry| entry.fields.iter().map(|(name, _)| name);
    let mut rest = entries.peekable();
    while let Some(first) = rest.peek().copied() {
        let mut run = 0;
        let mut differs = vec![false; first.fields.len()];
        for entry in rest.clone().take_while(|entry| names(entry).eq(names(first))) {
            run += 1;
            let values = first.fields.iter().zip(entry.fields.iter());
            for (differs, ((_, shared), (_, value))) in differs.iter_mut().zip(values) {
                *differs = *differs || shared != value;
            }
        }
        let places: Vec<_> = (1..).zip(&differs).filter(|(_, differs)| **differs).map(|(n, _)| n.to_string()).collect();
        arguments.reserve(2 * first.fields.len() + run * places.len() + 3);
        arguments.display(&first.fields.len());
        for ((name, value), differs) in first.fields.iter().zip(&differs) {
            arguments.bytes(name.clone()).bytes(if *differs { Bytes::new() } else { value.clone() });
        }
        arguments.display(&places.join(" ")).display(&run);
        for entry in rest.by_ref().take(run) {
            for ((_, value), _) in entry.fields.iter().zip(&differs).filter(|(_, differs)| **differs) {
                arguments.bytes(value.clone());
            }
        }
    }
}

async fn append_once(
    link: &RoutedClient,
    stream: &StreamName,
    entries: impl Iterator<Item = &NewEntry> + Clone + Send,
) -> Result<Reply, Failure> {
    let mut stream_keys = vec![Bytes::copy_from_slice(stream.as_str().as_bytes())];
    let mut arguments = Arguments::with_capacity(entries.clone().map(|entry| entry.fields.len() * 2 + 3).sum());
    for entry in entries.clone() {
        let size = entry.fields.len() * 2;
        match &entry.idempotency {
            None => {
                arguments.display(&size);
            }
            Some(idempotency) => {
                stream_keys.push(keys::idempotency(stream, &idempotency.key));
                let window_ms = idempotency.window.as_millis().max(1);
                arguments.display(&format_args!("-{size}")).display(&window_ms).bytes(event_id(entry));
            }
        }
        for (name, value) in entry.fields.iter() {
            arguments.bytes(name.clone()).bytes(value.clone());
        }
    }
    link.run(&APPEND_ONCE, &stream_keys, arguments).await
}

fn event_id(entry: &NewEntry) -> Bytes {
    entry.fields.get(field::ID).cloned().unwrap_or_default()
}

/// Parses ids separated by spaces.
fn plain<'a>(ids: &Bytes, entries: impl Iterator<Item = &'a NewEntry>) -> Result<Vec<Appended>, Failure> {
    let ids = ids.split(|byte| *byte == b' ');
    ids.zip(entries)
        .map(|(id, entry)| Ok(Appended { id: parse_id(id)?, event_id: event_id(entry), duplicate: false }))
        .collect()
}

/// Parses per entry its id, or `=<id> <event id>` of the first entry with its key.
fn with_duplicates<'a>(reply: Reply, entries: impl Iterator<Item = &'a NewEntry>) -> Result<Vec<Appended>, Failure> {
    let one = |(reply, entry): (Reply, &NewEntry)| {
        let text = reply.bytes()?;
        match text.strip_prefix(b"=") {
            None => Ok(Appended { id: parse_id(&text)?, event_id: event_id(entry), duplicate: false }),
            Some(first) => {
                let end = first.iter().position(|byte| *byte == b' ').unwrap_or(first.len());
                let (id, rest) = first.split_at(end);
                let event_id = rest.get(1..).unwrap_or_default();
                Ok(Appended { id: parse_id(id)?, event_id: text.slice_ref(event_id), duplicate: true })
            }
        }
    };
    reply.list()?.into_iter().zip(entries).map(one).collect()
}
