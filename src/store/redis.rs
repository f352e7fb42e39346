//! The store on a Redis or Valkey server.
//!
//! Owns the connections, the scripts and the meaning of the server's replies and errors. Requires Redis 6.2 or Valkey,
//! and nothing newer. A stream is the key of its name; its auxiliary keys share its hash tag. One script over both
//! streams moves an entry to the dead letters. If a cluster keeps the two in different slots, the server refuses that
//! script, and the move takes two repeatable steps.
//!
//! There are three kinds of connections: one for appends, one for other commands that do not block, and one per blocking
//! read while it runs. No command is sent twice: after an error it is unknown whether it ran, and the caller decides.
//! Connections are reopened until the store is closed.

mod config;
mod health;
mod net;
mod ops;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[cfg(any(test, fuzzing))]
pub use crate::store::redis::net::reply::fuzz as fuzz_reply;
pub use config::{Config, InvalidRedisConfig};

use self::config::Settings;
use super::{
    Appended, Claimed, Cursor, Dropped, Durability, IsolationLimits, Lease, Leased, Order, Pending, Range, Receipt,
    ReceiptAction, Reclaimed, Redelivered, Redelivery, Settled, Settlement, Start, Store, StoreError, StoreErrorKind,
    StoreStatus, StreamStatus, Trim,
};
use crate::event::{Delivery, Entry, EntryId, Epoch, GroupName, NewEntry, StreamName};
use crate::store::redis::health::clock_skew::ServerClock;
use crate::store::redis::health::permissions::AclCheck;
use crate::store::redis::health::reply_size::ReplySizer;
use crate::store::redis::net::client::{Readers, RoutedClient};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::pool::Pool;
use crate::store::redis::net::script::Script;
use crate::store::redis::net::topology::TopologyWatcher;
use crate::store::redis::ops::append::Publisher;

/// The maximum time that the server blocks for one command.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// The maximum number of ids in one claim. The reply contains the bodies.
const MAX_CLAIM: usize = 100;
/// The maximum number of ids in one plain command.
const MAX_ACKNOWLEDGE: usize = 5000;
/// The number of pending entries scanned for each one that may be claimed.
const LOOKED_AT_PER_CLAIM: usize = 10;

/// A store on a Redis or Valkey server. Created by [`Config::connect`].
pub struct RedisStore {
    settings: Arc<Settings>,
    servers: TopologyWatcher,
    /// The publishers for each durability. They send appends only, so that no slow command delays them.
    publishers: [(Durability, Publisher); Durability::ALL.len()],
    publish: RoutedClient,
    /// The connection of other commands that do not block.
    control: RoutedClient,
    readers: Readers,
    /// The connections of appends that wait for replicas or the disk.
    pool: Arc<Pool>,
    permissions: AclCheck,
    reply_sizes: ReplySizer,
    clock: ServerClock,
    /// Cancelled when appends are refused. Accepted appends are still sent.
    closing: CancellationToken,
    publishing: TaskTracker,
    /// Cancelled when the connections close.
    stop: CancellationToken,
    links: TaskTracker,
}

/// Omits the URL, which contains the password.
impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore").field("topology", &self.settings.topology).finish_non_exhaustive()
    }
}

impl Drop for RedisStore {
    fn drop(&mut self) {
        self.closing.cancel();
        self.stop.cancel();
    }
}

impl RedisStore {
    async fn start(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let (closing, stop) = (CancellationToken::new(), CancellationToken::new());
        let (publishing, links) = (TaskTracker::new(), TaskTracker::new());
        let (servers, keep_finding) = TopologyWatcher::new(Arc::clone(&settings), stop.clone());
        links.spawn(keep_finding);
        let pool = Arc::new(Pool::new(Arc::clone(&settings)));
        let link = |purpose| {
            let (settings, servers, pool) = (Arc::clone(&settings), servers.clone(), Arc::clone(&pool));
            RoutedClient::new(purpose, settings, servers, pool, links.clone(), stop.clone())
        };
        let (publish, control) = (link("publish"), link("control"));
        let publishers = Durability::ALL.map(|durability| {
            let link = publish.waiting_for(durability);
            let (publisher, run) = Publisher::new(link, settings.command_timeout, closing.clone());
            publishing.spawn(run);
            (durability, publisher)
        });
        tokio::join!(publish.first_attempt(), control.first_attempt());
        Self {
            servers,
            publishers,
            publish,
            readers: Readers::new(Arc::clone(&settings), control.clone()),
            control,
            pool,
            permissions: AclCheck::default(),
            reply_sizes: ReplySizer::default(),
            clock: ServerClock::default(),
            closing,
            publishing,
            stop,
            links,
            settings,
        }
    }

    /// Runs a script on a stream for a group.
    async fn run_for(
        &self,
        script: &Script,
        cursor: &Cursor,
        arguments: Arguments,
    ) -> Result<net::reply::Reply, Failure> {
        let mut all = of_consumer(cursor);
        all.append(arguments);
        self.run_as(script, cursor, vec![key(&cursor.stream), ops::keys::account(&cursor.stream)], all).await
    }

    /// Reads a range in replies of bounded size.
    async fn entries(&self, stream: &StreamName, mut range: Range, limit: usize) -> Result<Vec<Entry>, Failure> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let count = self.reply_sizes.bounded(stream, limit - entries.len());
            let (command, first, last) = match range.order {
                Order::Forward => ("XRANGE", range.from, range.to),
                Order::Backward => ("XREVRANGE", range.to, range.from),
            };
            let mut arguments = Arguments::with_capacity(5);
            arguments.bytes(key(stream)).display(&first).display(&last).text("COUNT").display(&count);
            let answer = self.control.call(command, stream.as_str().as_bytes(), arguments).await;
            let read = self.record_size(stream, answer.and_then(net::reply::Reply::entries))?;
            let is_last = read.len() < count;
            entries.extend(read);
            let Some(reached) = entries.last().map(|entry| entry.id).filter(|_| !is_last && entries.len() < limit)
            else {
                return Ok(entries);
            };
            match range.order {
                Order::Forward => range.from = reached.next(),
                Order::Backward => range.to = reached.previous(),
            }
            if range.from > range.to || reached == EntryId::MIN || reached == EntryId::MAX {
                return Ok(entries);
            }
        }
    }

    /// Records the size of a reply's entries, or that the reply did not arrive.
    fn record_size(&self, stream: &StreamName, read: Result<Vec<Entry>, Failure>) -> Result<Vec<Entry>, Failure> {
        match &read {
            Ok(entries) => self.reply_sizes.learn(stream, entries),
            Err(failure) if *failure == Failure::timeout() => self.reply_sizes.record_timeout(stream),
            Err(_) => {}
        }
        read
    }

    async fn claim_with(&self, cursor: &Cursor, idle: Duration, how: Arguments) -> Result<Reclaimed, Failure> {
        let mut arguments = Arguments::default();
        arguments.display(&idle.as_millis()).append(how);
        let asked_at = Instant::now();
        let mut keys = vec![key(&cursor.stream), ops::keys::account(&cursor.stream)];
        keys.extend(self.servers.is_cluster().then(|| ops::keys::moving(&cursor.stream)));
        let mut all = of_consumer(cursor);
        all.append(arguments);
        let answer = self.run_as(&net::script::CLAIM, cursor, keys, all).await;
        let [taken, counts, lost, more, left, moving] = match answer {
            Ok(reply) => reply.tuple()?,
            Err(failure) => return self.record_size(&cursor.stream, Err(failure)).map(|_| Reclaimed::default()),
        };
        let taken = self.record_size(&cursor.stream, taken.entries())?;
        let counts = counts.list()?;
        if taken.len() != counts.len() {
            return Err(Failure::unexpected("the number of counts differs from the number of entries"));
        }
        let mut deliveries = Vec::with_capacity(taken.len());
        for (entry, count) in taken.into_iter().zip(counts) {
            let attempt = u32::try_from(count.count()?.saturating_add(1)).unwrap_or(u32::MAX);
            deliveries.push(Delivery { entry, attempt, delivered_at: asked_at });
        }
        let deliveries = self.not_buried(cursor, deliveries, moving).await?;
        let more = more.bytes()?;
        let held_back = u32::try_from(left.count()?).ok().filter(|attempts| *attempts > 0);
        let next = match (more.is_empty(), held_back) {
            (true, _) => EntryId::MIN,
            (false, Some(_)) => net::reply::parse_id(&more)?,
            (false, None) => net::reply::parse_id(&more)?.next(),
        };
        Ok(Reclaimed { claimed: Claimed { deliveries, lost: lost.ids()? }, next, held_back })
    }

    async fn trim_all(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, Failure> {
        let mut removed = 0;
        loop {
            let mut arguments = Arguments::with_capacity(2);
            match trim {
                Trim::ToLength(length) => arguments.text("length").display(&length),
                Trim::Before(id) => arguments.text("before").display(&id),
            };
            for group in ignored {
                arguments.name(group.as_str());
            }
            let keys = [key(stream), ops::keys::account(stream)];
            let [count, more] = self.control.run(&net::script::TRIM, &keys, arguments).await?.tuple()?;
            removed += count.count()?;
            if more.count()? == 0 {
                return Ok(removed);
            }
        }
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn append(&self, stream: &StreamName, entries: Vec<NewEntry>) -> Result<Vec<Appended>, StoreError> {
        self.append_durably(stream, entries, Durability::MEMORY).await
    }

    async fn append_durably(
        &self,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, StoreError> {
        let publisher = self.publishers.iter().find(|(known, _)| *known == durability);
        let (_, publisher) = publisher.expect("each durability has a publisher");
        let outcome = publisher.append(stream, entries).await;
        outcome.map_err(|failure| match failure.kind {
            StoreErrorKind::NotDurable => failure.because(format_args!("append to stream `{stream}` is not confirmed")),
            _ => failure.because(format_args!("cannot append to stream `{stream}`")),
        })
    }

    async fn check_durability(&self, durability: Durability) -> Result<(), StoreError> {
        let checked = self.check_disks(durability).await;
        checked.map_err(|failure| failure.because(format_args!("durability {durability} is not available")))
    }

    async fn range(&self, stream: &StreamName, range: Range, limit: usize) -> Result<Vec<Entry>, StoreError> {
        if limit == 0 || range.from > range.to {
            return Ok(Vec::new());
        }
        let outcome = self.entries(stream, range, limit).await;
        outcome.map_err(|failure| failure.because(format_args!("cannot read stream `{stream}`")))
    }

    async fn tail(
        &self,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let wait = wait.min(MAX_WAIT);
        let mut arguments = Arguments::with_capacity(7);
        arguments.text("COUNT").display(&self.reply_sizes.bounded(stream, limit));
        block(&mut arguments, wait);
        arguments.text("STREAMS").bytes(key(stream)).display(&after);
        let answer = self.readers.read("XREAD", stream.as_str().as_bytes(), arguments, wait).await;
        let outcome = self.record_size(stream, answer.and_then(net::reply::Reply::entries_of_one_stream));
        outcome.map_err(|failure| failure.because(format_args!("cannot tail stream `{stream}`")))
    }

    async fn wait_any(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        let outcome = self.wait_for_any(positions, wait.min(MAX_WAIT)).await;
        outcome
            .map_err(|failure| failure.because(format_args!("cannot wait for entries of {} streams", positions.len())))
    }

    async fn ensure_group(&self, stream: &StreamName, group: &GroupName, start: Start) -> Result<bool, StoreError> {
        let mut arguments = Arguments::with_capacity(2);
        arguments.name(group.as_str());
        match start {
            Start::Oldest => arguments.text("0"),
            Start::New => arguments.text("$"),
            Start::After(id) => arguments.display(&id),
        };
        let keys = [key(stream), ops::keys::account(stream)];
        let answer = self.control.run(&net::script::ENSURE_GROUP, &keys, arguments).await;
        let outcome = answer.and_then(net::reply::Reply::count).map(|made| made == 1);
        outcome.map_err(|f| f.because(format_args!("cannot create group `{group}` of stream `{stream}`")))
    }

    async fn fetch(&self, cursor: &Cursor, limit: usize, wait: Duration) -> Result<Vec<Delivery>, StoreError> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let wait = wait.min(MAX_WAIT);
        if cursor.lease.is_some() {
            let outcome = self.fetch_under_lease(cursor, limit, wait).await;
            return outcome.map_err(|failure| failure.because(of_group("cannot fetch from", cursor)));
        }
        let mut arguments = Arguments::with_capacity(10);
        arguments.text("GROUP").name(cursor.group.as_str()).name(cursor.consumer.as_str());
        arguments.text("COUNT").display(&self.reply_sizes.bounded(&cursor.stream, limit));
        block(&mut arguments, wait);
        arguments.text("STREAMS").bytes(key(&cursor.stream)).text(">");
        // The age of a delivery may be overestimated, never underestimated: it decides whether ownership is checked.
        let delivered_at = Instant::now();
        // A command that does not block needs no connection of its own.
        let answer = if wait.is_zero() {
            self.control.call("XREADGROUP", cursor.stream.as_str().as_bytes(), arguments).await
        } else {
            self.readers.read("XREADGROUP", cursor.stream.as_str().as_bytes(), arguments, wait).await
        };
        let entries = self
            .record_size(&cursor.stream, answer.and_then(net::reply::Reply::entries_of_one_stream))
            .map_err(|failure| failure.because(of_group("cannot fetch from", cursor)))?;
        Ok(entries.into_iter().map(|entry| Delivery { entry, attempt: 1, delivered_at }).collect())
    }

    async fn claim(&self, cursor: &Cursor, ids: &[EntryId], idle: Duration) -> Result<Claimed, StoreError> {
        if ids.is_empty() {
            return Ok(Claimed::default());
        }
        if ids.len() > MAX_CLAIM {
            let reason = format!("{} ids in one claim, the maximum is {MAX_CLAIM}", ids.len());
            return Err(Failure::new(StoreErrorKind::Internal, reason).because(of_group("cannot claim from", cursor)));
        }
        let mut claimed = Claimed::default();
        let mut rest = ids;
        while !rest.is_empty() {
            let (ids, later) = rest.split_at(self.reply_sizes.bounded(&cursor.stream, rest.len()));
            rest = later;
            let mut how = Arguments::with_capacity(ids.len() + 1);
            how.text("ids").ids(ids);
            let outcome = self.claim_with(cursor, idle, how).await;
            let Claimed { deliveries, lost } =
                outcome.map_err(|failure| failure.because(of_group("cannot claim from", cursor)))?.claimed;
            claimed.deliveries.extend(deliveries);
            claimed.lost.extend(lost);
        }
        Ok(claimed)
    }

    async fn reclaim_isolated(
        &self,
        cursor: &Cursor,
        idle: Duration,
        from: EntryId,
        limit: usize,
        isolation: IsolationLimits,
    ) -> Result<Reclaimed, StoreError> {
        if limit == 0 {
            return Ok(Reclaimed { next: from, ..Reclaimed::default() });
        }
        let failed = |failure: Failure| failure.because(of_group("cannot claim from", cursor));
        let time = self.control.call("TIME", &key(&cursor.stream), Arguments::default()).await.map_err(failed)?;
        let server_ms = health::clock_skew::milliseconds(time).map_err(failed)?;
        if !idle.is_zero() && !self.clock.is_trusted(&cursor.stream, server_ms, Instant::now(), idle) {
            return Ok(Reclaimed::default());
        }
        let limit = self.reply_sizes.bounded(&cursor.stream, limit.min(MAX_CLAIM));
        let mut how = Arguments::with_capacity(7);
        how.text("from").display(&from).display(&limit).display(&(limit * LOOKED_AT_PER_CLAIM));
        for most in isolation.most {
            how.display(&most.saturating_sub(isolation.in_hand).min(limit));
        }
        self.claim_with(cursor, idle, how).await.map_err(failed)
    }

    async fn redeliver(
        &self,
        cursor: &Cursor,
        redelivery: Redelivery,
        from: EntryId,
        limit: usize,
    ) -> Result<Redelivered, StoreError> {
        let outcome = self.hand_on(cursor, redelivery, from, limit).await;
        outcome.map_err(|failure| failure.because(of_group("cannot redeliver entries of", cursor)))
    }

    async fn settle(&self, cursor: &Cursor, settlements: &[Settlement]) -> Result<Settled, StoreError> {
        self.settle_all(cursor, settlements).await
    }

    async fn extend(&self, cursor: &Cursor, ids: &[EntryId]) -> Result<Vec<EntryId>, StoreError> {
        let mut not_owned = Vec::new();
        for ids in ids.chunks(net::script::MAX_IDS) {
            let mut arguments = Arguments::with_capacity(ids.len());
            arguments.ids(ids);
            let answer = self.run_for(&net::script::EXTEND, cursor, arguments).await;
            let lost = answer
                .and_then(net::reply::Reply::ids)
                .map_err(|failure| failure.because(of_group("cannot extend deliveries of", cursor)))?;
            not_owned.extend(lost);
        }
        Ok(not_owned)
    }

    async fn settle_by_receipt(
        &self,
        cursor: &Cursor,
        actions: &[(Receipt, ReceiptAction)],
    ) -> Result<Vec<bool>, StoreError> {
        let outcome = self.redeem_all(cursor, actions).await;
        outcome.map_err(|failure| failure.because(of_group("cannot settle receipts of", cursor)))
    }

    async fn pending(
        &self,
        cursor: &Cursor,
        own_only: bool,
        from: EntryId,
        limit: usize,
    ) -> Result<Vec<Pending>, StoreError> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let mut arguments = Arguments::with_capacity(6);
        arguments.bytes(key(&cursor.stream)).name(cursor.group.as_str());
        arguments.display(&from).text("+").display(&limit);
        if own_only {
            arguments.name(cursor.consumer.as_str());
        }
        let answer = self.control.call("XPENDING", cursor.stream.as_str().as_bytes(), arguments).await;
        let outcome = answer.and_then(ops::status::pending);
        outcome.map_err(|failure| failure.because(of_group("cannot list the pending entries of", cursor)))
    }

    async fn describe(&self, stream: &StreamName) -> Result<Option<StreamStatus>, StoreError> {
        let keys = [key(stream), ops::keys::account(stream)];
        let answer = self.control.run(&net::script::DESCRIBE, &keys, Arguments::default()).await;
        let outcome = answer.and_then(ops::status::stream);
        outcome.map_err(|failure| failure.because(format_args!("cannot describe stream `{stream}`")))
    }

    async fn epoch(&self, stream: &StreamName) -> Result<Epoch, StoreError> {
        let mut arguments = Arguments::with_capacity(1);
        arguments.display(&Epoch::random());
        let answer = self.control.run(&net::script::EPOCH, &[key(stream), ops::keys::epoch(stream)], arguments).await;
        let outcome = answer
            .and_then(net::reply::Reply::text)
            .and_then(|text| text.parse().map_err(|e| Failure::unexpected(&format!("not an epoch: {e}"))));
        outcome.map_err(|failure| failure.because(format_args!("cannot read the epoch of stream `{stream}`")))
    }

    async fn trim_past(&self, stream: &StreamName, trim: Trim, ignored: &[GroupName]) -> Result<u64, StoreError> {
        let outcome = self.trim_all(stream, trim, ignored).await;
        outcome.map_err(|failure| failure.because(format_args!("cannot trim stream `{stream}`")))
    }

    async fn drop_oldest(&self, stream: &StreamName, keep: u64) -> Result<Dropped, StoreError> {
        let outcome = self.drop_step(stream, keep).await;
        outcome.map_err(|failure| failure.because(format_args!("cannot drop the oldest entries of stream `{stream}`")))
    }

    async fn write_off(
        &self,
        stream: &StreamName,
        group: &GroupName,
        known: u64,
        missing: u64,
    ) -> Result<bool, StoreError> {
        let outcome = self.count_missing(stream, group, known, missing).await;
        let what = format_args!("cannot count lost entries of group `{group}` of stream `{stream}`");
        outcome.map_err(|failure| failure.because(what))
    }

    async fn discard(&self, stream: &StreamName, ids: &[EntryId]) -> Result<u64, StoreError> {
        let mut removed = 0;
        for ids in ids.chunks(MAX_ACKNOWLEDGE) {
            let mut arguments = Arguments::with_capacity(ids.len() + 1);
            arguments.bytes(key(stream)).ids(ids);
            let answer = self.control.call("XDEL", stream.as_str().as_bytes(), arguments).await;
            removed += answer
                .and_then(net::reply::Reply::count)
                .map_err(|failure| failure.because(format_args!("cannot discard from stream `{stream}`")))?;
        }
        Ok(removed)
    }

    async fn remove_consumer(&self, cursor: &Cursor) -> Result<bool, StoreError> {
        let answer = self.run_for(&net::script::REMOVE_CONSUMER, cursor, Arguments::default()).await;
        let outcome = answer.and_then(net::reply::Reply::count).map(|removed| removed == 1);
        let consumer = &cursor.consumer;
        outcome.map_err(|f| f.because(of_group(&format!("cannot remove consumer `{consumer}` from"), cursor)))
    }

    async fn lease(&self, stream: &StreamName, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        let outcome = self.take_lease(stream, name, holder, ttl).await;
        outcome.map_err(|failure| failure.because(format_args!("cannot lease `{name}` of stream `{stream}`")))
    }

    async fn release_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, StoreError> {
        let outcome = self.drop_lease(stream, lease).await;
        let name = &lease.name;
        outcome.map_err(|failure| failure.because(format_args!("cannot release lease `{name}` of stream `{stream}`")))
    }

    async fn check(&self) -> Result<StoreStatus, StoreError> {
        let topology = &self.settings.topology;
        self.probe().await.map_err(|failure| failure.because(format_args!("the server ({topology}) is not ready")))
    }

    async fn close(&self) {
        self.closing.cancel();
        self.publishing.close();
        self.publishing.wait().await;
        self.stop.cancel();
        self.readers.close();
        self.pool.close();
        self.links.close();
        self.links.wait().await;
    }
}

fn key(stream: &StreamName) -> Bytes {
    Bytes::copy_from_slice(stream.as_str().as_bytes())
}

/// Returns the first arguments of the scripts.
fn of_consumer(cursor: &Cursor) -> Arguments {
    let mut arguments = Arguments::with_capacity(16);
    arguments.name(cursor.group.as_str()).name(cursor.consumer.as_str());
    arguments
}

fn of_group(what: &str, cursor: &Cursor) -> String {
    format!("{what} group `{}` of stream `{}`", cursor.group, cursor.stream)
}

/// Adds the blocking time. The minimum is 1 ms, because zero would block forever.
fn block(arguments: &mut Arguments, wait: Duration) {
    if !wait.is_zero() {
        arguments.text("BLOCK").display(&wait.as_millis().max(1));
    }
}
