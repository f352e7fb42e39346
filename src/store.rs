//! The store: one contract for streams, groups and deliveries, and its two backends.
//!
//! Owns the [`Store`] trait and the meaning of each operation. Promises the same semantics on Redis (or Valkey) and on
//! the embedded store; one test suite checks both. Knows neither alerts nor sinks nor the caller.
//!
//! # The contract
//!
//! - **Ids** are assigned by the store and strictly increase within a stream, across restarts, trims and clocks that
//!   step back. A stream exists from its first entry or group on; a read of a missing stream returns nothing.
//! - **Durable on return.** When [`Store::append`] returns, the entries survive a crash of this process. On the
//!   embedded store with `durability = "commit"` they also survive a power cut; on Redis they are as durable as the
//!   server's own persistence makes them. Readers see entries only after that. [`Store::append_durably`] asks for
//!   more; then entries may be visible before the durability is confirmed.
//! - **Groups** have their own cursor. An entry that [`Store::fetch`] returns is *pending*: it belongs to the consumer
//!   that fetched it until it is settled, claimed by another consumer, or found lost. A power cut may undo a
//!   settlement, a crash never does: the entry is then delivered again.
//! - **Attempts** are counted by the store, per group and entry: 1 with the first delivery, one more with each claim.
//!   They survive restarts.
//! - **Leases** are names within a stream. One holder has a name at a time, until it releases the lease or fails to
//!   renew it. A cursor that carries a lease has no effect after another holder may have taken it.
//! - **Losses are reported.** If the body of a pending entry was trimmed away, the next claim of it removes the pending
//!   entry and reports it as lost, once.
//! - **Accounts.** Each step counts its outcome for the group's entries, see [`Account`]. The counters are as durable as
//!   the step.
//! - **Errors** carry a [`StoreErrorKind`]. Callers decide by the kind, never by the text.

mod account;
pub mod embedded;
mod error;
mod families;
mod limits;
mod metered;
pub mod redis;
mod types;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

pub use account::{Account, Balance, Consumption, LostReason};
pub use error::{StoreError, StoreErrorKind};
pub use families::{Families, JoinError, FamilyMembers};
pub use limits::HardLimits;
pub use metered::MeteredStore;
pub use types::{
    Appended, IsolationLimits, Claimed, ConsumerStatus, Cursor, Dropped, Durability, GroupStatus, Lease, Leased, GroupLoss, Order,
    Outcome, Pending, Range, Receipt, Reclaimed, Redelivered, Redelivery, ReceiptAction, Settled, Settlement, Start,
    StoreStatus, StreamStatus, Trim,
};

use crate::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName};

/// The most entries one [`Store::append`] takes.
pub const MAX_APPEND: usize = 512;

/// How often the streams are polled if the store cannot wait for many of them in one call.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Streams, groups and deliveries.
///
/// Every operation fails with [`StoreErrorKind::WrongType`] if the stream's name belongs to something else, and with
/// [`StoreErrorKind::Unavailable`] if the store cannot be reached. Both concern the one call only.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Appends up to [`MAX_APPEND`] entries, in order, all or none; one result per entry, in order.
    ///
    /// Creates the stream. An entry whose idempotency key was seen within its window is not stored again: its result
    /// names the first entry. After an error it is unknown whether the entries were stored, so repeating the call is
    /// safe with idempotency keys only. Cancel-safe: a cancelled append happens completely or not at all.
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError>;

    /// Appends as [`Store::append`] does, and returns when the requested durability is confirmed.
    ///
    /// Fails with [`StoreErrorKind::Unsupported`] and stores nothing if the store cannot provide that durability. Fails
    /// with [`StoreErrorKind::NotDurable`] if the entries are stored but the durability was not confirmed in time;
    /// repeating the call with idempotency keys waits for the confirmation again.
    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, StoreError> {
        self.check_durability(durability).await?;
        self.append(stream, entries).await
    }

    /// Fails with [`StoreErrorKind::Unsupported`] if the store cannot provide that durability for any append.
    async fn check_durability(&self, durability: Durability) -> Result<(), StoreError> {
        if durability == Durability::MEMORY {
            return Ok(());
        }
        let message = format!("durability {durability} is not supported by this store");
        Err(StoreError::new(StoreErrorKind::Unsupported, message))
    }

    /// Returns the entries within a range, in its order, at most `limit`. Cancel-safe.
    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError>;

    /// Returns the entries after `after`, oldest first, at most `limit`; waits up to `wait` for the first one.
    ///
    /// Returns an empty list on timeout. `wait` is at most 5 s. Any number of callers may tail a stream; each gets
    /// every entry. Cancel-safe.
    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Waits up to `wait` until any of these streams has entries after its id; returns the newest id of each that has.
    ///
    /// One call waits for all the streams and costs the store one wait. A Redis Cluster is polled instead, because its
    /// servers cannot wait for keys of different slots. Returns an empty list on timeout. `wait` is at most 5 s. Fails
    /// with [`StoreErrorKind::WrongType`] if any of them is not a stream. Cancel-safe.
    async fn wait_any(
        &self,
        places: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            let mut news = Vec::new();
            for (stream, after) in places {
                let last = self.describe(stream).await?.map(|status| status.last_id);
                news.extend(last.filter(|last| last > after).map(|last| (stream.clone(), last)));
            }
            if !news.is_empty() || tokio::time::Instant::now() >= deadline {
                return Ok(news);
            }
            tokio::time::sleep(POLL_INTERVAL.min(wait)).await;
        }
    }

    /// Creates the group, and its stream, if they are missing. Returns whether the group was created. Safe to repeat.
    ///
    /// The group's [`Account`] begins with it, at zero even if an earlier group of that name had one. If another program
    /// created the group, the account begins now, balanced.
    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError>;

    /// Delivers the next undelivered entries of the group, at most `limit`; waits up to `wait` for the first one.
    ///
    /// They are pending on the cursor's consumer when this returns. One fetch at a time per cursor. `wait` is at most
    /// 2 s. Fails with [`StoreErrorKind::NoGroup`] if the group is gone. **Not cancel-safe**: a dropped call may leave
    /// entries pending that no task holds. Find them with [`Store::pending`] and [`Store::claim`], also after an error.
    async fn fetch(&self, cursor: &Cursor, limit: usize, wait: Duration) -> Result<Vec<Delivery>, StoreError>;

    /// Claims the named pending entries that have been idle for at least `idle`, from any consumer.
    ///
    /// Each claim counts one more attempt. Skips entries that are not pending or not idle for long enough. At most 100
    /// ids. Safe to repeat, but attempts are then counted again.
    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError>;

    /// Searches the group's pending entries from `from` on for those idle for at least `idle`, and claims them as
    /// [`Store::claim`] does, at most `limit` (100 or less).
    ///
    /// Scans a bounded number of entries: continue from [`Reclaimed::next`] until it is [`EntryId::MIN`].
    async fn reclaim(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
    ) -> Result<Reclaimed, StoreError> {
        self.reclaim_isolated(cursor, idle, from, limit, IsolationLimits::NONE).await
    }

    /// Reclaims like [`Store::reclaim`], but stops before an entry that [`IsolationLimits`] does not allow beside the entries in
    /// flight; [`Reclaimed::held_back`] is that entry.
    async fn reclaim_isolated(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<Reclaimed, StoreError>;

    /// Redelivers abandoned pending entries by appending them again, for consumers that read new entries only.
    ///
    /// Scans a bounded number of pending entries from `from` on, and acts on those idle for long enough, at most
    /// `limit` (100 or less). Each is appended again at the end of the stream and acknowledged, in one step. The new
    /// entry has the fields of the old one and [`field::REPLAY_GROUP`] (the only group that it is for),
    /// [`field::REPLAY_OF`] (its first id) and [`field::REPLAY_ATTEMPTS`] (its deliveries so far, under all its ids).
    /// The exceptions:
    ///
    /// - An entry with [`Redelivery::max_deliveries`] deliveries or more becomes pending on the cursor's consumer, which
    ///   counts no attempt, and is returned to be dead-lettered by [`Store::settle`]. Its attempt is the number of all
    ///   its deliveries.
    /// - An entry for another group is acknowledged.
    /// - An entry whose body was trimmed away is no longer pending, and is reported as lost.
    ///
    /// Continue from [`Redelivered::next`] until it is [`EntryId::MIN`]. Safe to repeat, and safe for several callers at
    /// once: the second one finds the entry settled, or not idle for long enough. Fails with
    /// [`StoreErrorKind::NoGroup`] if the group is gone.
    ///
    /// [`field::REPLAY_GROUP`]: crate::event::field::REPLAY_GROUP
    /// [`field::REPLAY_OF`]: crate::event::field::REPLAY_OF
    /// [`field::REPLAY_ATTEMPTS`]: crate::event::field::REPLAY_ATTEMPTS
    async fn redeliver(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, StoreError>;

    /// Settles deliveries of this cursor's consumer: acknowledges, re-arms, dead-letters or releases.
    ///
    /// Skips a delivery that another consumer has claimed meanwhile, and counts it in [`Settled::not_owned`].
    /// Dead-lettering and acknowledging are one step: afterwards the entry is in exactly one of the two streams,
    /// whatever crashes. Safe to repeat as a whole: settled deliveries are not owned any more. All settlements are of
    /// one stream and group, in any number.
    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError>;

    /// Resets the idle time of the named entries without counting an attempt: they are still being handled.
    ///
    /// Returns the entries that this consumer no longer owns; their results no longer count. Safe to repeat.
    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError>;

    /// Acknowledges or holds deliveries of the group by their receipts, for any consumer: the cursor's does not matter.
    ///
    /// Returns for each, in order, whether its receipt was valid; an invalid one has no effect. An entry whose body was
    /// trimmed away can be acknowledged, but not held. Any number of receipts. Acknowledging invalidates the receipt.
    /// Fails with [`StoreErrorKind::NoGroup`] if the group is gone.
    async fn settle_by_receipt(&self, cursor: &Cursor, actions: &[(Receipt, ReceiptAction)]) -> Result<Vec<bool>, StoreError>;

    /// Returns the pending entries of a group from `from` on, oldest first, at most `limit`.
    ///
    /// With `own_only`, only those of the cursor's consumer.
    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError>;

    /// Returns length, ends, counters and groups of a stream, or `None` if it does not exist.
    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError>;

    /// Returns the stream's epoch, and creates it if there is none.
    ///
    /// The epoch changes when the stream was lost and started again, which shows in a last id that went back.
    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError>;

    /// Removes the oldest entries by `trim`, but none that a group has not settled. Returns how many were removed.
    ///
    /// A group has not settled the entries from its oldest pending one on, nor those after its cursor. May leave up to
    /// 100 more than requested. Safe to repeat.
    async fn trim(&self, stream: &StreamName, trim: Trim) -> Result<u64, StoreError> {
        self.trim_past(stream, trim, &[]).await
    }

    /// Trims like [`Store::trim`], but also removes entries that only the `ignored` groups have not settled.
    ///
    /// Counts nothing for the ignored groups.
    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError>;

    /// Removes the oldest entries until `keep` are left, settled or not, in one bounded step.
    ///
    /// The same step counts each entry that was pending or undelivered for a group as lost in its account, by
    /// [`LostReason::Dropped`], and removes it from the pending entries. May leave up to 100 more than requested. After
    /// an error it is unknown whether entries were removed; removed entries are counted.
    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError>;

    /// Counts `missing` undelivered entries of the group as lost, by [`LostReason::TrimmedUndelivered`].
    ///
    /// Compare-and-set: counts only if the account still has `known` entries lost for that reason, and returns whether
    /// it counted. So one of many instances counts them. Even if nothing is missing, a server whose lag counter is
    /// wrong is made to count again, if it can. Safe to repeat.
    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError>;

    /// Removes single entries, pending or not. Returns how many there were. Safe to repeat.
    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError>;

    /// Removes a consumer from its group if it has nothing pending, in one step. Returns whether it did.
    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError>;

    /// Takes the lease on `name` within the stream for `holder`, or renews it, for `ttl` from now on.
    ///
    /// The stream need not exist. A holder that renews in time keeps its fence; a new lease after an expired or released
    /// one has a greater fence. `holder` is one line of text. Safe to repeat. Cancel-safe: the lease is taken or not.
    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError>;

    /// Releases a lease, so that others may take it at once. Returns whether it was still held. Safe to repeat.
    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError>;

    /// Checks whether the store can work now, by a cheap check of the write path, for readiness.
    async fn check(&self) -> Result<StoreStatus, StoreError>;

    /// Makes accepted entries durable and closes the store. Later calls fail with [`StoreErrorKind::Unavailable`].
    async fn close(&self);
}
