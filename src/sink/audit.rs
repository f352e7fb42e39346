//! The audit sink: append-only files in which every record has the hash of the record before.
//!
//! Owns the files, their rotation and the content of each line. Promises that an entry is recorded exactly once, by its
//! id, however often it is delivered. When [`Sink::deliver`] returns, the record is on disk. One process at a time
//! writes to a folder. All groups of the sink share one chain.
//!
//! [`verify()`] finds records that were changed, removed, moved or added. A chain cannot show by itself that its newest
//! records are missing. For that, compare the number and hash of the head with a copy that is kept elsewhere.

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

pub use verify::{AuditFlaw, AuditProblem, VerifyReport, verify};

use self::journal::{FileRotation, Journal, JournalError, PreparedBatch};
use super::{Origin, Sink, SinkError, SinkErrorClass};
use crate::event::Delivery;
use crate::telemetry::chain;

/// Number of batches that wait for the disk. Each belongs to a worker that waits for it.
const WAITING_BATCHES: usize = 64;
/// Approximate number of bytes per write and sync.
const WRITE_BYTES: usize = 4 * 1024 * 1024;
const MIN_FILE_SIZE: ByteSize = ByteSize::kib(4);

/// The configuration of an audit sink.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// The folder, which belongs to this sink alone. It is created if it is missing.
    pub path: PathBuf,
    /// Maximum size of a file, unless a single record is larger. At least 4 KiB.
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
    requests: mpsc::Sender<WriterRequest>,
}

#[derive(Debug)]
enum WriterRequest {
    Append(PreparedBatch, oneshot::Sender<Result<(), SinkError>>),
    Check(oneshot::Sender<Result<(), SinkError>>),
    Close(oneshot::Sender<()>),
}

impl AuditSink {
    /// Opens and locks the folder, and repairs the last record after a crash.
    ///
    /// Fails if another process has the folder, if it is not writable, or if the last file is damaged.
    pub async fn open(name: &str, config: AuditConfig) -> Result<Self, SinkError> {
        if config.max_file_size < MIN_FILE_SIZE {
            let message = format!("max_file_size of the audit sink `{name}` must be at least {MIN_FILE_SIZE}");
            return Err(SinkError::new(SinkErrorClass::Permanent, message));
        }
        let rotation = FileRotation { max_bytes: config.max_file_size.as_u64(), daily: config.rotate_daily };
        let (requests, receiver) = mpsc::channel(WAITING_BATCHES);
        let (opened, is_open) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("audit-{name}"));
        let spawned = thread.spawn(move || match Journal::open(&config.path, rotation) {
            Ok(journal) => {
                // The opener may have given up. Then there are no requests either.
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

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> WriterRequest) -> Result<T, SinkError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_closed| stopped())?;
        answer.await.map_err(|_closed| stopped())
    }
}

/// Converts an error of the journal. No entry caused it, so a retry helps after an operator has acted.
fn failure(folder: &Path, error: JournalError) -> SinkError {
    let message = format!("cannot write audit files in `{}`", folder.display());
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
        self.ask(WriterRequest::Check).await?
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        let payload: usize = batch.iter().map(|delivery| delivery.entry.fields.size_bytes()).sum();
        let mut prepared = PreparedBatch {
            stream: origin.stream.clone(),
            bodies: Vec::with_capacity(payload + payload / 4 + batch.len() * 128),
            entries: Vec::with_capacity(batch.len()),
        };
        for delivery in batch {
            record::entry_body(&origin.stream, &delivery.entry, &mut prepared.bodies);
            prepared.entries.push((delivery.entry.id, prepared.bodies.len()));
        }
        self.ask(|reply| WriterRequest::Append(prepared, reply)).await?
    }

    async fn close(&self) {
        // An error means that the sink is already closed.
        self.ask(WriterRequest::Close).await.ok();
    }
}

/// The thread that writes.
struct Recorder {
    journal: Journal,
    /// Number of bytes that the last failed write needed.
    probe_bytes: u64,
    is_failing: bool,
}

impl Recorder {
    fn run(mut self, mut requests: mpsc::Receiver<WriterRequest>) {
        let mut next = None;
        while let Some(request) = next.take().or_else(|| requests.blocking_recv()) {
            match request {
                WriterRequest::Append(first, reply) => {
                    let (mut batches, mut replies) = (vec![first], vec![reply]);
                    let mut bytes = batches[0].bodies.len();
                    while bytes < WRITE_BYTES {
                        match requests.try_recv() {
                            Ok(WriterRequest::Append(batch, reply)) => {
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
                        // A worker that gave up waiting delivers again, and nothing is recorded twice.
                        drop(reply.send(result.as_ref().map(|_| ()).map_err(|text| refusal(text))));
                    }
                }
                WriterRequest::Check(reply) => drop(reply.send(self.check())),
                WriterRequest::Close(reply) => {
                    drop(self);
                    reply.send(()).ok();
                    return;
                }
            }
        }
    }

    fn append(&mut self, batches: &[PreparedBatch]) -> Result<usize, String> {
        let result = self.journal.append(batches, Timestamp::now()).map_err(|error| chain(&error));
        match &result {
            Ok(_) if self.is_failing => info!("audit sink recovered"),
            Err(text) if !self.is_failing => error!(error = text, "audit sink failed, trying again"),
            _ => {}
        }
        self.is_failing = result.is_err();
        if self.is_failing {
            // Whole pages, and one for the record that begins a file.
            let bytes: u64 = batches.iter().map(PreparedBatch::file_bytes).sum();
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
