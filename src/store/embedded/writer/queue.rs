//! The queue between callers and the writer: callers wait while it is full, and the writer drains it completely.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::store::StoreError;
use crate::store::embedded::disk::schema::is_closed_error;
use crate::store::embedded::writer::Writer;

/// The maximum of appended bytes in the queue, in units of [`UNIT_BYTES`]; further callers wait.
const CAPACITY: u32 = 64 * 1024;
const UNIT_BYTES: usize = 1024;

/// One call of the store, run by the writer.
pub(crate) trait WriteOp: Send {
    /// Returns whether it needs a transaction of its own.
    fn is_alone(&self) -> bool;
    /// Runs it, up to the commit. May be called again after a failed commit.
    fn run(&mut self, writer: &mut Writer);
    /// Returns the result to the caller, or the error of the commit if that failed.
    fn answer(self: Box<Self>, error: Option<StoreError>);
}

struct QueuedCall<F, R> {
    work: F,
    is_alone: bool,
    result: Option<Result<R, StoreError>>,
    answer: oneshot::Sender<Result<R, StoreError>>,
    _permit: OwnedSemaphorePermit,
}

impl<F, R> WriteOp for QueuedCall<F, R>
where
    F: FnMut(&mut Writer) -> Result<R, StoreError> + Send,
    R: Send,
{
    fn is_alone(&self) -> bool {
        self.is_alone
    }

    fn run(&mut self, writer: &mut Writer) {
        self.result = Some((self.work)(writer));
    }

    fn answer(self: Box<Self>, error: Option<StoreError>) {
        let result = match (error, self.result) {
            (Some(error), _) => Err(error),
            (None, Some(result)) => result,
            (None, None) => Err(is_closed_error()),
        };
        // The caller may have been cancelled. The work is done nevertheless.
        drop(self.answer.send(result));
    }
}

/// The result of waiting for work.
pub(crate) enum Dequeued {
    Work(VecDeque<Box<dyn WriteOp>>),
    /// Nothing arrived before the deadline.
    Nothing,
    /// The queue is closed and empty.
    Closed,
}

/// The queue.
pub(crate) struct WriteQueue {
    room: Arc<Semaphore>,
    waiting: Mutex<QueueState>,
    came: Condvar,
}

#[derive(Default)]
struct QueueState {
    work: VecDeque<Box<dyn WriteOp>>,
    is_closed: bool,
}

impl WriteQueue {
    pub(crate) fn new() -> Self {
        Self { room: Arc::new(Semaphore::new(CAPACITY as usize)), waiting: Mutex::default(), came: Condvar::new() }
    }

    fn waiting(&self) -> MutexGuard<'_, QueueState> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `work`, and returns its result after the commit. Waits while the queue is full.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        bytes: usize,
        is_alone: bool,
        work: impl FnMut(&mut Writer) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let units = u32::try_from(1 + bytes / UNIT_BYTES).unwrap_or(CAPACITY).min(CAPACITY);
        let room = self.room.clone().acquire_many_owned(units).await;
        let permit = room.map_err(|_closed| is_closed_error())?;
        let (answer, answered) = oneshot::channel();
        if !self.push(Box::new(QueuedCall { work, is_alone, result: None, answer, _permit: permit })) {
            return Err(is_closed_error());
        }
        answered.await.unwrap_or_else(|_writer_is_gone| Err(is_closed_error()))
    }

    fn push(&self, work: Box<dyn WriteOp>) -> bool {
        let mut waiting = self.waiting();
        if waiting.is_closed {
            return false;
        }
        waiting.work.push_back(work);
        let was_empty = waiting.work.len() == 1;
        drop(waiting);
        if was_empty {
            self.came.notify_one();
        }
        true
    }

    /// Takes all queued work, or waits until `deadline` for the first.
    pub(crate) fn take(&self, deadline: Option<Instant>) -> Dequeued {
        let mut waiting = self.waiting();
        loop {
            if !waiting.work.is_empty() {
                return Dequeued::Work(std::mem::take(&mut waiting.work));
            }
            if waiting.is_closed {
                return Dequeued::Closed;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            waiting = match left {
                Some(Duration::ZERO) => return Dequeued::Nothing,
                Some(left) => self.came.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Refuses further calls. Queued calls still run.
    pub(crate) fn close(&self) {
        self.waiting().is_closed = true;
        self.room.close();
        self.came.notify_all();
    }

    /// Refuses further calls, and drops the queued ones, whose callers then get an error.
    pub(crate) fn abandon(&self) {
        self.close();
        let abandoned = std::mem::take(&mut self.waiting().work);
        drop(abandoned);
    }
}
