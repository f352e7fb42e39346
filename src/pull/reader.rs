//! Tasks of a pull consumer: one reader serves all pending pulls, and one timer follows all leases.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::token::Token;
use crate::event::{ConsumerName, DeadLetterReason, Delivery, Entry, EntryId, Fields, field};
use crate::pull::consumer::{LeasedEntry, PendingPull, PullConsumer, PullError};
use crate::store::{Cursor, Outcome, Pending, Receipt, ReceiptAction, Settlement, StoreError, StoreErrorKind};

/// The time that one fetch waits for entries.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// The maximum number of entries per fetch.
const FETCH_LIMIT: usize = 500;
/// The pause after a failure of the store.
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// The maximum number of expired leases that are checked in the store, to skip those that were settled elsewhere.
const MAX_EXPIRY_CHECKS: usize = 100;
/// The page size of the scan for entries that an earlier run of this instance has left.
const RECOVERY_PAGE: usize = 100;

impl PullConsumer {
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::join!(self.serve(&stop), self.watch_leases(&stop), self.close_at(&stop));
    }

    /// Ends the pending pulls as soon as this instance stops.
    async fn close_at(&self, stop: &CancellationToken) {
        stop.cancelled().await;
        self.close();
    }

    /// Notifies the redeliverer when a lease expires.
    async fn watch_leases(&self, stop: &CancellationToken) {
        loop {
            let next = self.lock().leases.next_expiry();
            let expiry = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = self.next_expiry_changed.notified() => continue,
                () = expiry => {}
            }
            let expired = self.update_leases(|leases| leases.take_expired(Instant::now()));
            self.count_expired(&expired).await;
            self.group.notify_redeliverer();
        }
    }

    /// Counts the leases that did expire. Others were settled through another instance.
    async fn count_expired(&self, expired: &[(EntryId, Option<ConsumerName>)]) {
        for (id, consumer) in expired.iter().take(MAX_EXPIRY_CHECKS) {
            let Some(consumer) = consumer else { continue };
            let Ok(found) = self.store.pending(&self.reader, false, *id, 1).await else { return };
            let has_expired =
                |one: &Pending| one.id == *id && one.consumer == *consumer && one.idle >= self.group.claim_idle;
            if found.first().is_some_and(has_expired) {
                self.metrics.expired.inc();
            }
        }
    }

    /// Serves pending pulls.
    async fn serve(&self, stop: &CancellationToken) {
        // An earlier run under this name may have fetched entries that no client received.
        let mut is_recovered = false;
        loop {
            if !self.has_work() {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = self.changed.notified() => {}
                }
                continue;
            }
            let served = if is_recovered { self.serve_once(stop).await } else { self.recover().await };
            is_recovered = served.is_ok();
            if let Err(error) = served {
                self.fail(error);
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY_DELAY) => {}
                }
            }
            if stop.is_cancelled() {
                return;
            }
        }
    }

    /// Returns whether there are pending pulls or unreceived entries.
    fn has_work(&self) -> bool {
        self.has_pending_pulls() || !self.lock().unreceived.is_empty()
    }

    /// Returns whether there are pending pulls, after it has removed the cancelled ones.
    fn has_pending_pulls(&self) -> bool {
        let mut state = self.lock();
        state.pending.retain(|pull| !pull.reply.is_closed());
        !state.pending.is_empty()
    }

    /// Fails the pending pulls. If the group is being created, pulls with time left keep waiting.
    fn fail(&self, error: StoreError) {
        let is_transient = error.kind() == StoreErrorKind::NoGroup;
        let error = if is_transient { PullError::NoGroup } else { PullError::Store(Arc::new(error)) };
        let now = Instant::now();
        let mut state = self.lock();
        let (kept, failed) = std::mem::take(&mut state.pending)
            .into_iter()
            .partition::<VecDeque<_>, _>(|pull| is_transient && pull.deadline > now);
        state.pending = kept;
        drop(state);
        for pull in failed {
            // A cancelled pull needs no reply.
            drop(pull.reply.send(Err(error.clone())));
        }
    }

    /// Releases entries that are pending on the reader and belong to no pull, after a crash or a lost reply.
    async fn recover(&self) -> Result<(), StoreError> {
        let mut from = EntryId::MIN;
        loop {
            let found = self.store.pending(&self.reader, true, from, RECOVERY_PAGE).await?;
            let Some(last) = found.last() else { return Ok(()) };
            from = last.id.next();
            let left = found.into_iter().filter(|one| one.idle < self.group.claim_idle);
            self.release(&self.reader, left.map(|one| (one.id, one.attempts))).await?;
        }
    }

    /// Releases entries to other consumers at once. Their deliveries do not count as attempts.
    async fn release(&self, cursor: &Cursor, entries: impl Iterator<Item = (EntryId, u32)>) -> Result<(), StoreError> {
        let settlement = |(id, attempt)| {
            let entry = Entry { id, fields: Fields::default() };
            let delivery = Delivery { entry, attempt, delivered_at: std::time::Instant::now() };
            Settlement { delivery, outcome: Outcome::Release }
        };
        let settlements: Vec<_> = entries.map(settlement).collect();
        if !settlements.is_empty() {
            self.store.settle(cursor, &settlements).await?;
            self.group.notify_redeliverer();
        }
        Ok(())
    }

    async fn serve_once(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        self.release_unreceived().await?;
        if self.has_pending_pulls() { self.fetch(stop).await } else { Ok(()) }
    }

    /// Releases entries that were leased for cancelled pulls. After a failure they return when their leases expire.
    async fn release_unreceived(&self) -> Result<(), StoreError> {
        let mut by_consumer: BTreeMap<ConsumerName, Vec<Receipt>> = BTreeMap::new();
        for receipt in std::mem::take(&mut self.lock().unreceived) {
            by_consumer.entry(receipt.consumer.clone()).or_default().push(receipt);
        }
        for (consumer, receipts) in by_consumer {
            for receipt in &receipts {
                self.forget_lease(receipt.id);
            }
            let cursor = Cursor { consumer, ..self.reader.clone() };
            self.release(&cursor, receipts.into_iter().map(|receipt| (receipt.id, receipt.attempt))).await?;
        }
        Ok(())
    }

    /// Fetches entries for the pending pulls, and waits for new ones if there are none.
    async fn fetch(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        let mut found = self.store.fetch(&self.reader, self.requested(), Duration::ZERO).await?;
        if found.is_empty() {
            let Some(wait) = self.begin_reading() else { return Ok(()) };
            // Must not be cancelled: fetched entries would stay pending on the reader without a task that knows them.
            let read = self.store.fetch(&self.reader, self.requested(), wait).await;
            self.lock().is_reading = false;
            found = read?;
        }
        if stop.is_cancelled() {
            return self.release(&self.reader, found.into_iter().map(|one| (one.entry.id, one.attempt))).await;
        }
        self.distribute(found).await
    }

    fn requested(&self) -> usize {
        let state = self.lock();
        state.pending.iter().map(|pull| pull.request.max).sum::<usize>().clamp(1, FETCH_LIMIT)
    }

    /// Replies to pulls that do not wait. Returns the time to wait for the other pulls, or `None` if there are none.
    fn begin_reading(&self) -> Option<Duration> {
        let now = Instant::now();
        let mut state = self.lock();
        let (waiting, ended) =
            std::mem::take(&mut state.pending).into_iter().partition::<VecDeque<_>, _>(|pull| pull.deadline > now);
        state.pending = waiting;
        let latest = state.pending.iter().map(|pull| pull.deadline).max();
        state.is_reading = latest.is_some();
        drop(state);
        for pull in ended {
            drop(pull.reply.send(Ok(Vec::new())));
        }
        latest.map(|latest| (latest - now).clamp(Duration::from_millis(1), FETCH_WAIT))
    }

    /// Leases fetched entries to the pending pulls in order of arrival, and releases the rest.
    async fn distribute(&self, found: Vec<Delivery>) -> Result<(), StoreError> {
        let (deliverable, undeliverable): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|one| one.entry.is_for(&self.group.group) && one.entry.data().is_some());
        self.settle_undeliverable(undeliverable).await?;
        let mut left: VecDeque<Delivery> = deliverable.into();
        while !left.is_empty() {
            let Some((pull, share)) = self.next_share(&mut left) else { break };
            self.lease(pull, share).await?;
        }
        let left = left.into_iter().map(|one| (one.entry.id, one.attempt));
        self.release(&self.reader, left).await
    }

    /// Takes the next pending pull and its share of the entries.
    fn next_share(&self, left: &mut VecDeque<Delivery>) -> Option<(PendingPull, Vec<Delivery>)> {
        let mut state = self.lock();
        while let Some(pull) = state.pending.pop_front() {
            if pull.reply.is_closed() {
                continue;
            }
            let room = self.max_leases.saturating_sub(state.leases.count_of(&pull.request.consumer));
            if room == 0 {
                drop(pull.reply.send(Err(PullError::TooManyLeases(self.max_leases))));
                continue;
            }
            let share = pull.request.max.min(room).min(left.len());
            return Some((pull, left.drain(..share).collect()));
        }
        None
    }

    async fn lease(&self, pull: PendingPull, share: Vec<Delivery>) -> Result<(), StoreError> {
        let PendingPull { request, reply, .. } = pull;
        let hold = |one: &Delivery| {
            let receipt = Receipt { id: one.entry.id, consumer: self.reader.consumer.clone(), attempt: one.attempt };
            (receipt, ReceiptAction::Hold { by: request.consumer.clone(), lease: request.lease })
        };
        let items: Vec<_> = share.iter().map(hold).collect();
        let valid = match self.store.settle_by_receipt(&self.reader, &items).await {
            Ok(valid) => valid,
            Err(error) => {
                let copy = StoreError::new(error.kind(), error.to_string());
                drop(reply.send(Err(PullError::Store(Arc::new(copy)))));
                return Err(error);
            }
        };
        let mut leased = Vec::with_capacity(share.len());
        for (Delivery { entry, attempt, .. }, _) in share.into_iter().zip(valid).filter(|(_, is_valid)| *is_valid) {
            let receipt = Receipt { id: entry.id, consumer: request.consumer.clone(), attempt };
            let token = Token::new(&self.group.stream, &self.group.group, receipt, earlier_attempts(&entry));
            self.record_lease(entry.id, Some(request.consumer.clone()), request.lease);
            leased.push(LeasedEntry { token, entry, lease: request.lease });
        }
        let count = leased.len() as u64;
        match reply.send(Ok(leased)) {
            Ok(()) => self.metrics.delivered.inc_by(count),
            // The pull was cancelled meanwhile, and its client never received the entries.
            Err(leased) => self.take_back(leased.unwrap_or_default()),
        }
        Ok(())
    }

    /// Settles entries that no external consumer may receive: entries of another group, and entries without a payload.
    async fn settle_undeliverable(&self, undeliverable: Vec<Delivery>) -> Result<(), StoreError> {
        let (without_payload, foreign): (Vec<_>, Vec<_>) =
            undeliverable.into_iter().partition(|one| one.entry.is_for(&self.group.group));
        for one in without_payload {
            let (stream, group) = (&self.group.stream, &self.group.group);
            warn!(%stream, %group, entry.id = %one.entry.id, "entry has no payload, dead-lettering it");
            let attempts = one.attempt.saturating_add(earlier_attempts(&one.entry));
            let error = "the entry has no field `data`".to_owned();
            self.dead_letter(&self.reader, one.entry, attempts, DeadLetterReason::Undecodable, error).await?;
        }
        if !foreign.is_empty() {
            let settle = |delivery| Settlement { delivery, outcome: Outcome::Filter };
            let foreign: Vec<_> = foreign.into_iter().map(settle).collect();
            let settled = self.store.settle(&self.reader, &foreign).await?;
            self.metrics.filtered.inc_by(settled.settled as u64);
        }
        Ok(())
    }
}

/// Returns the number of deliveries before the entry was appended again.
///
/// Other programs can write to the stream too, so only a plain number counts.
fn earlier_attempts(entry: &Entry) -> u32 {
    let text = entry.fields.text(field::REPLAY_ATTEMPTS).filter(|text| text.len() <= 9);
    let text = text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}
