//! Reader threads for rows that are not in memory, each with its own connection, and the checkpoint thread.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use rusqlite::Connection;
use tokio::sync::{Semaphore, oneshot};

use super::Shared;
use crate::store::embedded::disk::schema::{connect, is_closed_error};
use crate::store::embedded::writer::maintenance::checkpoint;
use crate::store::{StoreError, StoreErrorKind};

const THREADS: usize = 2;
/// The maximum number of reads that run or wait for a thread; further callers wait.
const MAX_READS: usize = 64;

type ReadJob = Box<dyn FnOnce(Result<&Connection, StoreError>) + Send>;

/// The pool of reader threads.
#[derive(Debug)]
pub(super) struct Readers {
    reads: Mutex<Option<Sender<ReadJob>>>,
    room: Semaphore,
}

impl Readers {
    /// Starts the threads. Each opens its connection with its first read.
    pub(super) fn start(path: &Path) -> Result<(Self, Vec<JoinHandle<()>>), StoreError> {
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let threads = (0..THREADS).map(|number| {
            let (path, receiver) = (path.to_owned(), receiver.clone());
            spawn(&format!("store-reader-{number}"), move || serve(&path, &receiver))
        });
        let threads = threads.collect::<Result<_, _>>()?;
        Ok((Self { reads: Mutex::new(Some(sender)), room: Semaphore::new(MAX_READS) }, threads))
    }

    /// Runs a read on one of the threads.
    pub(super) async fn read<R: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> R + Send + 'static,
    ) -> Result<R, StoreError> {
        let _room = self.room.acquire().await.map_err(|_closed| is_closed_error())?;
        let (answer, answered) = oneshot::channel();
        let work: ReadJob = Box::new(move |connection| {
            // The caller may have been cancelled.
            drop(answer.send(connection.map(read)));
        });
        let sender = self.reads.lock().unwrap_or_else(PoisonError::into_inner).clone();
        sender.ok_or_else(is_closed_error)?.send(work).map_err(|_closed| is_closed_error())?;
        answered.await.unwrap_or_else(|_reader_is_gone| Err(is_closed_error()))
    }

    /// Refuses further reads. The threads end after the queued reads.
    pub(super) fn close(&self) {
        self.reads.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

fn serve(path: &Path, reads: &Mutex<Receiver<ReadJob>>) {
    let mut connection = None;
    loop {
        let next = reads.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(read) = next else { return };
        if connection.is_none() {
            match connect(path, false) {
                Ok(opened) => connection = Some(opened),
                Err(error) => {
                    read(Err(error));
                    continue;
                }
            }
        }
        read(connection.as_ref().ok_or_else(is_closed_error));
    }
}

/// Starts the thread that checkpoints the write-ahead log on request, beside the writer.
pub(super) fn start_checkpointer(
    path: &Path,
    shared: &Arc<Shared>,
    asked: Receiver<()>,
) -> Result<JoinHandle<()>, StoreError> {
    /// The number of pages that may be left for the writer.
    const FEW_PAGES: i64 = 500;
    let (path, shared) = (path.to_owned(), shared.clone());
    spawn("store-checkpoint", move || {
        let mut connection = None;
        while asked.recv().is_ok() {
            if connection.is_none() {
                connection = connect(&path, false)
                    .inspect_err(
                        |error| tracing::warn!(error = %error, "the embedded store cannot checkpoint yet, retrying"),
                    )
                    .ok();
            }
            let Some(connection) = &connection else { continue };
            for _ in 0..4 {
                match checkpoint(connection) {
                    Ok(left) if left > FEW_PAGES => {}
                    Ok(_) => break,
                    Err(error) => {
                        tracing::warn!(error = %error, "checkpoint of the embedded store failed, its write-ahead log grows");
                        break;
                    }
                }
            }
            shared.is_checkpointed.store(true, std::sync::atomic::Ordering::Release);
        }
    })
}

/// Creates the channel of checkpoint requests. It holds one request, because a second one would add nothing.
pub(super) fn checkpoint_requests() -> (SyncSender<()>, Receiver<()>) {
    sync_channel(1)
}

pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StoreError> {
    Builder::new().name(name.to_owned()).spawn(work).map_err(|error| {
        StoreError::new(StoreErrorKind::Unavailable, format!("cannot start the thread `{name}`")).with_source(error)
    })
}
