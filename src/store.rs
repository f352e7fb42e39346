//! The store: one contract for streams, groups and deliveries, and its two backends.
//!
//! Owns the [`Store`] trait and the meaning of each of its operations. It promises the same semantics on
//! Redis (or Valkey) and on the embedded one, which one suite of tests checks on both. It does not know what an alert is,
//! what a sink is, or who asks.
//!
//! # The contract
//!
//! - **Ids** are given by the store and strictly increase within a stream, across restarts, trims and clocks that
//!   step back. A stream exists from its first entry or group on; reading one that does not exist finds nothing.
//! - **Durable on return.** When [`Store::append`] returns, the entries survive a crash of this process. On the
//!   embedded store with `durability = "commit"` they also survive a power cut; on Redis they are as durable as the
//!   server's own persistence makes them. Entries are visible to readers only once that is so. More can be asked for
//!   with [`Store::append_durably`]; then entries may be visible before it is confirmed.
//! - **Groups** have a cursor of their own. An entry that [`Store::fetch`] returns is *pending*: it belongs to the
//!   consumer that fetched it until it is settled, claimed by another, or found lost. Settling may be forgotten by
//!   a power cut, never by a crash: the entry is then delivered again.
//! - **Attempts** are counted by the store, per group and entry: 1 with the first delivery, one more with each
//!   claim. They survive restarts.
//! - **Leases** are names within a stream that one holder has at a time, until it gives them up or does not renew them
//!   in time. A cursor that carries a lease can do nothing once another may have it.
//! - **Loss is told.** A pending entry whose body was trimmed away is removed from the pending entries by the claim
//!   that meets it and reported there as lost, once.
//! - **Accounts.** What becomes of a group's entries is counted in the step in which it happens, see [`Account`]; the
//!   counters are as durable as that step.
//! - **Errors** carry a [`StoreErrorKind`]: whoever calls decides by kind, never by text.

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
pub use families::{Families, NotJoined, Roster};
pub use limits::Limits;
pub use metered::Metered;
pub use types::{
    Appended, Care, Claimed, ConsumerStatus, Cursor, Dropped, Durability, GroupStatus, Lease, Leased, Loser, Order,
    Outcome, Pending, Range, Receipt, Reclaimed, Redelivered, Redelivery, Redemption, Settled, Settlement, Start,
    StoreStatus, StreamStatus, Trim,
};

use crate::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName};

/// The most entries one [`Store::append`] takes.
pub const MAX_APPEND: usize = 512;

/// How often streams are asked for news where the store can't wait for many of them at once.
const NEWS_POLL: Duration = Duration::from_millis(200);

/// Streams, groups and deliveries.
///
/// Every operation fails with [`StoreErrorKind::WrongType`] where the stream's name is taken by something else, and
/// with [`StoreErrorKind::Unavailable`] where the store can't be reached; both concern the one call only.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Appends up to [`MAX_APPEND`] entries, in order, all or none; one result per entry, in order.
    ///
    /// Creates the stream. An entry whose idempotency key was seen within its window is not stored again: its result
    /// names the first one. After an error it is unknown whether the entries were stored; repeating the call is only
    /// safe with idempotency keys. Cancel-safe: the append then happens or not, as a whole.
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError>;

    /// Appends as [`Store::append`] does, and returns only when the entries are as durable as asked.
    ///
    /// Fails with [`StoreErrorKind::Unsupported`], nothing stored, where the store can't be as durable as that. Fails with
    /// [`StoreErrorKind::NotDurable`] where the entries are stored, but it was not confirmed in time that they are as
    /// durable as asked; repeating the call with idempotency keys asks for the confirmation again.
    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, StoreError> {
        self.check_durability(durability).await?;
        self.append(stream, entries).await
    }

    /// Fails with [`StoreErrorKind::Unsupported`] where the store can't be as durable as that, whatever is appended.
    async fn check_durability(&self, durability: Durability) -> Result<(), StoreError> {
        if durability == Durability::MEMORY {
            return Ok(());
        }
        let message = format!("the store can't be more durable than it is (durability {durability})");
        Err(StoreError::new(StoreErrorKind::Unsupported, message))
    }

    /// The entries within a range, in its order, at most `limit`. Cancel-safe.
    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError>;

    /// The entries after `after`, oldest first, at most `limit`; waits up to `wait` for the first one.
    ///
    /// Returns nothing when none came in time. `wait` is at most 5 s. Any number of callers may tail a stream, each
    /// gets every entry. Cancel-safe.
    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Waits up to `wait` until any of these streams has entries after its id, and says of each that has them which one
    /// is its newest now.
    ///
    /// Many streams are waited for by one call, which costs the store one wait however many they are; a Redis Cluster is
    /// asked again and again instead, for its servers can't wait for keys of different slots. Says nothing when none came
    /// in time. `wait` is at most 5 s. Fails with [`StoreErrorKind::WrongType`] where any of them is no stream.
    /// Cancel-safe.
    async fn news(
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
            tokio::time::sleep(NEWS_POLL.min(wait)).await;
        }
    }

    /// Makes sure that a group exists, and its stream; says whether it was created now. Safe to repeat.
    ///
    /// With the group its [`Account`] begins, at zero also where an earlier group of that name had one. Where the
    /// group was made by others, it begins now, such that it adds up.
    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError>;

    /// The next entries that no consumer of the group has seen, at most `limit`; waits up to `wait` for the first.
    ///
    /// They are pending on the cursor's consumer when this returns. One fetch at a time per cursor. `wait` is at
    /// most 2 s. Fails with [`StoreErrorKind::NoGroup`] where the group is gone. **Not cancel-safe**: a dropped call
    /// may leave entries pending that no one holds; find them with [`Store::pending`] and [`Store::claim`], also
    /// after any error.
    async fn fetch(&self, cursor: &Cursor, limit: usize, wait: Duration) -> Result<Vec<Delivery>, StoreError>;

    /// Takes over the named pending entries that have been idle for at least `idle`, whoever holds them.
    ///
    /// Each one taken counts one more attempt. Entries that are not pending, or not idle enough, are left out. At
    /// most 100 ids. Safe to repeat, though attempts are then counted again.
    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError>;

    /// Searches the group's pending entries from `from` on for those idle for at least `idle`, and takes them over
    /// as [`Store::claim`] does, at most `limit` (100 or less).
    ///
    /// Looks at a bounded number of entries: go on from [`Reclaimed::next`] until it is [`EntryId::MIN`].
    async fn reclaim(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
    ) -> Result<Reclaimed, StoreError> {
        self.reclaim_with_care(cursor, idle, from, limit, Care::NONE).await
    }

    /// The same, but stops before an entry that [`Care`] forbids to take beside what is in hand and what was taken
    /// before it; [`Reclaimed::held_back`] tells.
    async fn reclaim_with_care(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        care: Care,
    ) -> Result<Reclaimed, StoreError>;

    /// Hands on pending entries that whoever held them has left, for consumers that read new entries only.
    ///
    /// Looks at a bounded number of pending entries from `from` on, and acts on those idle for long enough, at most
    /// `limit` (100 or less). Each is appended again at the end of the stream and acknowledged, in one step. The new
    /// entry has the fields of the old one and [`field::REPLAY_GROUP`] (this group: it is for no other),
    /// [`field::REPLAY_OF`] (the id that it had first) and [`field::REPLAY_ATTEMPTS`] (how often it was delivered so
    /// far, under all its ids). Else:
    ///
    /// - One that was delivered [`Redelivery::max_deliveries`] times or more becomes pending on the cursor's consumer,
    ///   which counts no attempt, and is returned to be given up by [`Store::settle`]. Its attempt is the number of all
    ///   its deliveries.
    /// - One for another group is acknowledged.
    /// - One whose body was trimmed away is not pending any more, and told as lost.
    ///
    /// Go on from [`Redelivered::next`] until it is [`EntryId::MIN`]. Safe to repeat, and for several callers at once:
    /// who comes second finds nothing pending, or it idle for too short. Fails with [`StoreErrorKind::NoGroup`] where
    /// the group is gone.
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
    /// A delivery that another consumer has claimed meanwhile is left alone and counted in
    /// [`Settled::not_owned`]. Moving to the dead letters and acknowledging are one step: afterwards the entry is in
    /// exactly one of the two places, whatever crashes. Safe to repeat as a whole: what is already settled is not
    /// owned any more. All settlements are of one stream and group; any number of them.
    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError>;

    /// Counts the named entries as delivered just now, without a further attempt: they are still being handled.
    ///
    /// Returns those that are not this consumer's any more; their results no longer count. Safe to repeat.
    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError>;

    /// Acknowledges or holds on deliveries of the group by their receipts, whoever their consumers are: the cursor's
    /// own does not matter. Says for each, in order, whether its receipt was good; where it was not, nothing is done.
    ///
    /// An entry whose body was trimmed away can be acknowledged, but not held on. Any number of them. Repeating an
    /// acknowledgement finds its receipt good no more. Fails with [`StoreErrorKind::NoGroup`] where the group is gone.
    async fn redeem(&self, cursor: &Cursor, redemptions: &[(Receipt, Redemption)]) -> Result<Vec<bool>, StoreError>;

    /// The pending entries of a group from `from` on, oldest first, at most `limit`; those of one consumer where the
    /// cursor's consumer is asked for by `own_only`.
    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError>;

    /// Length, ends, counters and groups of a stream; nothing where it does not exist.
    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError>;

    /// The stream's epoch, made now where it has none. It changes when the stream was lost and begun anew, that is
    /// when its last id is found to be smaller than it was.
    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError>;

    /// Removes the oldest entries as `trim` says, but never one that a group has still to handle, that is at or
    /// after the group's oldest pending entry or after its cursor. Says how many were removed. May leave up to 100
    /// more than asked for. Safe to repeat.
    async fn trim(&self, stream: &StreamName, trim: Trim) -> Result<u64, StoreError> {
        self.trim_past(stream, trim, &[]).await
    }

    /// The same, but passes what these groups have still to handle. For them nothing is counted.
    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError>;

    /// Removes the oldest entries until `keep` are left, whoever has still to handle them: one bounded step of it.
    ///
    /// In the same step, each entry that a group had pending or had not been given is counted as lost in its account,
    /// by [`LostReason::Dropped`], and is not pending any more. May leave up to 100 more than asked for. After an
    /// error it is unknown whether entries were removed; what was removed is counted.
    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError>;

    /// Counts `missing` entries as lost that the group was never given, by [`LostReason::TrimmedUndelivered`], if
    /// `known` is still how many the account says were lost so; says whether it did. So of many who miss the same
    /// entries, one counts them. Also where nothing is missing, a server that counts wrongly what the group has still
    /// to be given is made to count anew, where it can. Safe to repeat.
    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError>;

    /// Removes single entries, pending or not. Says how many there were. Safe to repeat.
    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError>;

    /// Removes a consumer from its group if nothing is pending on it, in one step; says whether it did.
    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError>;

    /// Takes the lease on `name` within the stream for `holder`, or renews it, for `ttl` from now on.
    ///
    /// The stream need not exist. A holder that renews in time keeps its fence; a lease that ran out, or was given up,
    /// is taken with a greater one. `holder` is one line of text. Safe to repeat. Cancel-safe: the lease is then taken
    /// or not.
    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError>;

    /// Gives up a lease, so that others may take it at once; says whether it was still held. Safe to repeat.
    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError>;

    /// Whether the store can do its work now: a cheap write-path check, for readiness.
    async fn check(&self) -> Result<StoreStatus, StoreError>;

    /// Lets go of everything, what is accepted made durable. Calls after it fail with
    /// [`StoreErrorKind::Unavailable`].
    async fn close(&self);
}
