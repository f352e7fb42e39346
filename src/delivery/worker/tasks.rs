//! Tasks of a worker's loop: each makes one call of the store or of the sink.
//!
//! A task runs to its end while the worker lives. A fetch that is dropped half-way leaves entries pending on this
//! consumer that are not in flight.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;

use crate::delivery::ack_floor::AckFloor;
use crate::delivery::worker::context::WorkerContext;
use crate::delivery::worker::settlements::SettlementBatch;
use crate::delivery::worker::sink_call::{SinkCallResult, catch_panic};
use crate::event::{Delivery, EntryId};
use crate::store::{Claimed, Cursor, Pending, Reclaimed, Settled, Store, StoreError, StoreErrorKind};

/// The most ids in one claim.
pub(crate) const CLAIM_LIMIT: usize = 100;

/// A call that a part starts.
pub(crate) struct Task {
    pub(crate) future: BoxFuture<'static, TaskResult>,
    /// The most entries that the call may bring.
    pub(crate) expected: usize,
}

/// The result of a task.
#[derive(Debug)]
pub(crate) enum TaskResult {
    GroupEnsured(Result<(bool, Option<AckFloor>), StoreError>),
    PendingListed { limit: usize, result: Result<Vec<Pending>, StoreError> },
    Fetched { limit: usize, result: Result<Vec<Delivery>, StoreError> },
    Claimed { reason: ClaimReason, ids: Vec<EntryId>, result: Result<ClaimResult, StoreError> },
    Searched { limit: usize, result: Result<(Reclaimed, Option<AckFloor>), StoreError> },
    Extended { was_uncertain: bool, result: Result<Vec<EntryId>, StoreError> },
    SinkCalled { call: u64, result: SinkCallResult },
    Settled { is_dead_letters: bool, batch: SettlementBatch, result: Result<Settled, StoreError> },
}

/// The reason to claim entries by their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimReason {
    /// Their next attempt is due.
    Retry,
    /// They were left pending, and no worker holds them.
    Recovery,
}

/// The entries that a claim brought, and the ids that belong to other consumers by now.
#[derive(Debug, Default)]
pub(crate) struct ClaimResult {
    pub(crate) claimed: Claimed,
    pub(crate) not_owned: Vec<EntryId>,
}

impl Task {
    /// A call that brings up to `expected` entries.
    pub(crate) fn new(expected: usize, future: impl Future<Output = TaskResult> + Send + 'static) -> Self {
        Self { future: future.boxed(), expected }
    }

    /// Claims entries by their ids for one more attempt.
    pub(crate) fn claim(context: &WorkerContext, reason: ClaimReason, ids: Vec<EntryId>) -> Self {
        let (store, cursor) = (context.store.clone(), context.cursor.clone());
        let claims_from_others = context.is_ordered && reason == ClaimReason::Recovery;
        Self::new(ids.len(), async move {
            let claim = async {
                if !claims_from_others {
                    return claim_own(&*store, &cursor, &ids).await;
                }
                let claimed = store.claim(&cursor, &ids, Duration::ZERO).await?;
                Ok(ClaimResult { claimed, not_owned: Vec::new() })
            };
            let result = call_store(claim).await;
            TaskResult::Claimed { reason, ids, result }
        })
    }
}

/// Claims entries that are pending on this consumer, and leaves the entries of other consumers alone.
///
/// The extension makes them look busy, so that no other consumer claims them between the two calls.
async fn claim_own(store: &dyn Store, cursor: &Cursor, ids: &[EntryId]) -> Result<ClaimResult, StoreError> {
    let not_owned = store.extend(cursor, ids).await?;
    let owned: Vec<EntryId> = ids.iter().filter(|id| !not_owned.contains(id)).copied().collect();
    if owned.is_empty() {
        return Ok(ClaimResult { claimed: Claimed::default(), not_owned });
    }
    let claimed = store.claim(cursor, &owned, Duration::ZERO).await?;
    Ok(ClaimResult { claimed, not_owned })
}

/// Awaits a call of the store. A panic fails this call only.
pub(crate) async fn call_store<T>(call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let panicked = |panic| Err(StoreError::new(StoreErrorKind::Internal, format!("the store panicked: {panic}")));
    catch_panic(call).await.unwrap_or_else(panicked)
}
