//! The audit sink: append-only files in which every record carries the hash of the one before.
//!
//! Owns the files, their rotation and what each line holds. It promises that an entry is recorded exactly once, by its
//! id, however often it is delivered, and that it is on disk when [`Sink::deliver`] returns. One process at a time
//! writes to a folder; all groups that share the sink are recorded in one chain.
//!
//! [`verify()`] finds any record that was changed, removed, moved or added. What no chain can show by itself is
//! that its newest records are missing: compare the head's number and hash with ones noted elsewhere.

mod files;
mod index;
mod journal;
mod record;
mod verify;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytesize::ByteSize;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info};

pub use verify::{Flaw, Problem, VerifyReport, verify};

use self::journal::{Journal, JournalError, Prepared, Rotation};
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::Delivery;
use crate::telemetry::chain;

/// Batches that wait for the disk; each is of one worker, which waits for it.
const WAITING_BATCHES: usize = 64;
/// Bytes that are written and synced at once, about.
const WRITE_BYTES: usize = 4 * 1024 * 1024;
const SMALLEST_FILE: ByteSize = ByteSize::kib(4);

/// Where audit files are kept and when a new one is begun.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// The folder, made when missing. It belongs to this sink alone.
    pub path: PathBuf,
    /// A file grows no larger than this, unless a single record is larger. At least 4 KiB.
    pub max_file_size: ByteSize,
    /// Whether each day (UTC) begins a new file.
    pub rotate_daily: bool,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { path: "data/audit".into(), max_file_size: ByteSize::mib(64), rotate_daily: true }
    }
}

/// Records entries in files.
#[derive(Debug)]
pub struct AuditSink {
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
enum Request {
    Append(Prepared, oneshot::Sender<Result<(), SinkError>>),
    Check(oneshot::Sender<Result<(), SinkError>>),
    Close(oneshot::Sender<()>),
}

impl AuditSink {
    /// Opens the folder, takes its lock, and repairs what a crash left of the last record.
    ///
    /// Fails where another process has the folder, where it can't be written, or where the last file is damaged.
    pub async fn open(name: &str, config: AuditConfig) -> Result<Self, SinkError> {
        if config.max_file_size < SMALLEST_FILE {
            let message = format!("max_file_size of the audit sink `{name}` must be at least {SMALLEST_FILE}");
            return Err(SinkError::new(SinkErrorClass::Permanent, message));
        }
        let rotation = Rotation { max_bytes: config.max_file_size.as_u64(), daily: config.rotate_daily };
        let (requests, receiver) = mpsc::channel(WAITING_BATCHES);
        let (opened, is_open) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("audit-{name}"));
        let spawned = thread.spawn(move || match Journal::open(&config.path, rotation) {
            Ok(journal) => {
                // Whoever opens may have given up waiting; then there are no requests either.
                if opened.send(Ok(())).is_ok() {
                    Recorder { journal, probe_bytes: 0, is_failing: false }.run(receiver);
                }
            }
            Err(error) => drop(opened.send(Err(failure(&config.path, error)))),
        });
        spawned.map_err(|error| {
            SinkError::new(SinkErrorClass::Transient, "cannot start the audit thread").with_source(error)
        })?;
        is_open.await.map_err(|_gone| stopped())??;
        Ok(Self { requests })
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, SinkError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_closed| stopped())?;
        answer.await.map_err(|_closed| stopped())
    }
}

/// None of these is the fault of an entry: once someone has acted, trying again helps.
fn failure(folder: &Path, error: JournalError) -> SinkError {
    let message = format!("cannot keep audit files in `{}`", folder.display());
    SinkError::new(SinkErrorClass::Transient, message).with_source(error)
}

fn stopped() -> SinkError {
    SinkError::new(SinkErrorClass::Transient, "the audit sink is closed")
}

#[async_trait]
impl Sink for AuditSink {
    fn max_batch(&self) -> usize {
        500
    }

    async fn check(&self) -> Result<(), SinkError> {
        self.ask(Request::Check).await?
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let payload: usize = batch.iter().map(|delivery| delivery.entry.fields.size_bytes()).sum();
        let mut prepared = Prepared {
            stream: origin.stream.clone(),
            bodies: Vec::with_capacity(payload + payload / 4 + batch.len() * 128),
            entries: Vec::with_capacity(batch.len()),
        };
        for delivery in batch {
            record::entry_body(&origin.stream, &delivery.entry, &mut prepared.bodies);
            prepared.entries.push((delivery.entry.id, prepared.bodies.len()));
        }
        self.ask(|reply| Request::Append(prepared, reply)).await?
    }

    async fn close(&self) {
        // An error means that it was closed before.
        self.ask(Request::Close).await.ok();
    }
}

/// The thread that writes.
struct Recorder {
    journal: Journal,
    /// What the last failed write needed room for.
    probe_bytes: u64,
    is_failing: bool,
}

impl Recorder {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut next = None;
        while let Some(request) = next.take().or_else(|| requests.blocking_recv()) {
            match request {
                Request::Append(first, reply) => {
                    let (mut batches, mut replies) = (vec![first], vec![reply]);
                    let mut bytes = batches[0].bodies.len();
                    while bytes < WRITE_BYTES {
                        match requests.try_recv() {
                            Ok(Request::Append(batch, reply)) => {
                                bytes += batch.bodies.len();
                                batches.push(batch);
                                replies.push(reply);
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    let result = self.append(&batches);
                    for reply in replies {
                        // A worker that has given up waiting will deliver again, which is not recorded twice.
                        drop(reply.send(result.as_ref().map(|_| ()).map_err(|text| refusal(text))));
                    }
                }
                Request::Check(reply) => drop(reply.send(self.check())),
                Request::Close(reply) => {
                    drop(self);
                    reply.send(()).ok();
                    return;
                }
            }
        }
    }

    fn append(&mut self, batches: &[Prepared]) -> Result<usize, String> {
        let result = self.journal.append(batches, Timestamp::now()).map_err(|error| chain(&error));
        match &result {
            Ok(_) if self.is_failing => info!("audit records are written again"),
            Err(text) if !self.is_failing => error!(error = text, "cannot write audit records"),
            _ => {}
        }
        self.is_failing = result.is_err();
        if self.is_failing {
            // Whole pages, and one for the record that begins a file.
            let bytes: u64 = batches.iter().map(Prepared::file_bytes).sum();
            self.probe_bytes = (bytes + 4096).next_multiple_of(4096);
        }
        result
    }

    fn check(&self) -> Result<(), SinkError> {
        if !self.is_failing {
            return Ok(());
        }
        self.journal.probe(self.probe_bytes).map_err(|error| refusal(&chain(&error)))
    }
}

fn refusal(text: &str) -> SinkError {
    let refusal = SinkError::new(SinkErrorClass::Transient, format!("cannot write audit records: {text}"));
    refusal.with_retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests;
