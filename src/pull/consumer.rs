//! Pull consumer of one group: leases entries to external consumers and settles them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use prometheus::{IntCounter, IntCounterVec, IntGauge};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::debug;

use crate::event::{ConsumerName, DeadLetter, DeadLetterReason, Delivery, Entry, EntryId, GroupName, StreamName};
use crate::metrics::Metrics;
use crate::pull::leases::PullLeaseTable;
use crate::pull::{Config, MIN_LEASE, PullGroup, Token};
use crate::store::{
    Cursor, Order, Outcome, Range, Receipt, ReceiptAction, Settlement, Store, StoreError, StoreErrorKind,
};

/// The time that a pull waits for a reply after its own deadline, while the reader serves it.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);

/// A request for entries.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// The consumer that holds the leases.
    pub consumer: ConsumerName,
    /// The maximum number of entries, at least 1.
    pub max: usize,
    /// The lease, from [`MIN_LEASE`] to [`PullConsumer::max_lease`].
    pub lease: Duration,
    /// The time to wait if there are no entries.
    pub wait: Duration,
}

/// An entry with a lease.
#[derive(Debug)]
pub struct LeasedEntry {
    /// The token that settles the entry.
    pub token: Token,
    /// The entry.
    pub entry: Entry,
    /// The duration of the lease.
    pub lease: Duration,
}

/// Options of a nack.
#[derive(Debug, Clone, Default)]
pub struct Nack {
    /// The time until the entry is redelivered, at most [`PullConsumer::max_lease`].
    pub delay: Duration,
    /// The reason in words, for the dead letter.
    pub reason: Option<String>,
    /// Whether the entry would fail again. It is then dead-lettered at once.
    pub is_permanent: bool,
}

/// The reason why a pull or an extension failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The consumer has the maximum number of leases.
    #[error("the consumer has {0} leases, which is the limit (pull.max_leases); settle entries first")]
    TooManyLeases(usize),
    /// The lease is too short or too long.
    #[error(
        "the lease must be from {} to {} ms (claim_idle of the group); extend it for longer work",
        MIN_LEASE.as_millis(),
        .0.as_millis()
    )]
    Lease(Duration),
    /// This instance is stopping.
    #[error("this instance is stopping")]
    Stopping,
    /// The group was removed and is about to be created again.
    #[error("the group is being created")]
    NoGroup,
    /// The store failed or timed out.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

/// The reason why an entry was not settled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SettleError {
    /// The token does not prove a lease: the lease has expired, or the entry was settled before.
    #[error("the lease has expired or the entry is settled already; another consumer may have it")]
    NotLeased,
    /// The store failed.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

/// A pull that waits for entries.
#[derive(Debug)]
pub(super) struct PendingPull {
    pub(super) number: u64,
    pub(super) request: PullRequest,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<PullReply>,
}

type PullReply = Result<Vec<LeasedEntry>, PullError>;

/// The receiving end of a pending pull. Returns unreceived entries to the reader if it is dropped.
struct ReplyGuard<'a> {
    consumer: &'a PullConsumer,
    reply: oneshot::Receiver<PullReply>,
}

impl Drop for ReplyGuard<'_> {
    fn drop(&mut self) {
        self.reply.close();
        if let Ok(Ok(entries)) = self.reply.try_recv() {
            self.consumer.take_back(entries);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct PullState {
    pub(super) pending: VecDeque<PendingPull>,
    pub(super) next_number: u64,
    /// Whether the reader has found no entries and waits for new ones.
    pub(super) is_reading: bool,
    pub(super) is_closed: bool,
    /// Receipts of entries that were leased to clients which disconnected before they received them.
    pub(super) unreceived: Vec<Receipt>,
    pub(super) leases: PullLeaseTable,
}

#[derive(Debug)]
pub(super) struct PullMetrics {
    pub(super) pulls: IntCounter,
    pub(super) delivered: IntCounter,
    pub(super) waiting: IntGauge,
    pub(super) leases: IntGauge,
    pub(super) expired: IntCounter,
    pub(super) acknowledged: IntCounter,
    pub(super) nacked: IntCounter,
    pub(super) extended: IntCounter,
    pub(super) dead: IntCounter,
    pub(super) rejected: IntCounter,
    pub(super) filtered: IntCounter,
    pub(super) dead_letters: IntCounterVec,
}

impl PullMetrics {
    fn new(metrics: &Metrics, labels: [&str; 2]) -> Self {
        let settled = |result| metrics.pull_settled.with_label_values(&[labels[0], labels[1], result]);
        Self {
            pulls: metrics.pulls.with_label_values(&labels),
            delivered: metrics.pull_deliveries.with_label_values(&labels),
            waiting: metrics.pull_waiting.with_label_values(&labels),
            leases: metrics.pull_leases.with_label_values(&labels),
            expired: metrics.pull_expired.with_label_values(&labels),
            acknowledged: settled("acknowledged"),
            nacked: settled("given_back"),
            extended: settled("extended"),
            dead: settled("dead"),
            rejected: settled("refused"),
            filtered: metrics.filtered.with_label_values(&labels),
            dead_letters: metrics.dead_letters.clone(),
        }
    }
}

/// Leases the entries of one group to external consumers.
#[derive(Debug)]
pub struct PullConsumer {
    pub(super) store: Arc<dyn Store>,
    pub(super) group: PullGroup,
    pub(super) reader: Cursor,
    pub(super) redeliverer: ConsumerName,
    pub(super) max_leases: usize,
    pub(super) state: Mutex<PullState>,
    /// Notified of new pending pulls and of unreceived entries.
    pub(super) changed: Notify,
    /// Notified of a lease that expires before all others.
    pub(super) next_expiry_changed: Notify,
    pub(super) metrics: PullMetrics,
}

impl PullConsumer {
    pub(super) fn new(
        store: Arc<dyn Store>,
        group: PullGroup,
        config: &Config,
        reader: ConsumerName,
        redeliverer: ConsumerName,
        metrics: &Metrics,
    ) -> Self {
        let reader = Cursor {
            stream: group.stream.clone(),
            group: group.group.clone(),
            consumer: reader,
            claim_idle: group.claim_idle,
            lease: None,
        };
        Self {
            store,
            reader,
            redeliverer,
            max_leases: config.max_leases,
            state: Mutex::default(),
            changed: Notify::new(),
            next_expiry_changed: Notify::new(),
            metrics: PullMetrics::new(metrics, [group.label.as_str(), group.group.as_str()]),
            group,
        }
    }

    /// Returns the maximum lease: entries that are idle for longer are redelivered.
    pub fn max_lease(&self) -> Duration {
        self.group.claim_idle
    }

    /// Returns the stream of the group.
    pub fn stream(&self) -> &StreamName {
        &self.group.stream
    }

    /// Returns the name of the group.
    pub fn group(&self) -> &GroupName {
        &self.group.group
    }

    /// Returns whether a token was issued for this group.
    pub fn has_issued(&self, token: &Token) -> bool {
        token.belongs_to(&self.group.stream, &self.group.group)
    }

    /// Leases the next entries. Returns an empty list if there are none within the requested time.
    ///
    /// Serves pending pulls in order of arrival. Cancel-safe: entries that were leased for a cancelled pull go to other
    /// consumers.
    pub async fn pull(&self, request: PullRequest) -> Result<Vec<LeasedEntry>, PullError> {
        self.check_lease(request.lease)?;
        self.metrics.pulls.inc();
        let deadline = Instant::now() + request.wait;
        let is_waiting = !request.wait.is_zero();
        let (sender, receiver) = oneshot::channel();
        let mut guard = ReplyGuard { consumer: self, reply: receiver };
        let number = {
            let mut state = self.lock();
            if state.is_closed {
                return Err(PullError::Stopping);
            }
            if state.leases.count_of(&request.consumer) >= self.max_leases {
                return Err(PullError::TooManyLeases(self.max_leases));
            }
            if state.is_reading && !is_waiting {
                return Ok(Vec::new());
            }
            state.next_number += 1;
            let number = state.next_number;
            state.pending.push_back(PendingPull { number, request, deadline, reply: sender });
            number
        };
        self.changed.notify_one();
        let _waiting = is_waiting.then(|| GaugeGuard::new(&self.metrics.waiting));
        let first = if is_waiting { deadline } else { deadline + REPLY_TIMEOUT };
        if let Ok(reply) = tokio::time::timeout_at(first, &mut guard.reply).await {
            return reply.unwrap_or(Ok(Vec::new()));
        }
        {
            let mut state = self.lock();
            if let Some(index) = state.pending.iter().position(|pending| pending.number == number) {
                state.pending.remove(index);
                return Ok(Vec::new());
            }
        }
        // The reader has taken the pull and is about to reply.
        let reply = tokio::time::timeout(REPLY_TIMEOUT, &mut guard.reply).await;
        reply.map_or(Ok(Vec::new()), |reply| reply.unwrap_or(Ok(Vec::new())))
    }

    /// Acknowledges entries. Returns one result per token.
    pub async fn acknowledge(&self, tokens: &[Token]) -> Vec<Result<(), SettleError>> {
        let items = tokens.iter().map(|token| (token.receipt.clone(), ReceiptAction::Acknowledge)).collect();
        let results = self.settle_receipts(items).await;
        self.update_leases(|leases| {
            for (token, _) in tokens.iter().zip(&results).filter(|(_, result)| result.is_ok()) {
                leases.remove(token.receipt.id);
                self.metrics.acknowledged.inc();
            }
        });
        results
    }

    /// Extends leases: they expire `lease` from now. Returns one result per token.
    pub async fn extend(&self, tokens: &[Token], lease: Duration) -> Result<Vec<Result<(), SettleError>>, PullError> {
        self.check_lease(lease)?;
        let hold = |token: &Token| {
            let receipt = token.receipt.clone();
            let by = receipt.consumer.clone();
            (receipt, ReceiptAction::Hold { by, lease })
        };
        let results = self.settle_receipts(tokens.iter().map(hold).collect()).await;
        for (token, _) in tokens.iter().zip(&results).filter(|(_, result)| result.is_ok()) {
            let consumer = Some(token.receipt.consumer.clone());
            self.record_lease(token.receipt.id, consumer, lease);
            self.metrics.extended.inc();
        }
        Ok(results)
    }

    /// Returns entries to the group after a delay, or dead-letters them. Returns one result per token.
    ///
    /// Dead-letters an entry if the nack is permanent or the entry has no deliveries left.
    pub async fn nack(&self, tokens: &[Token], nack: &Nack) -> Vec<Result<(), SettleError>> {
        let is_dead = |token: &Token| nack.is_permanent || token.attempt() >= self.group.max_deliveries;
        let hold = |token: &Token| {
            let lease = if is_dead(token) { self.group.claim_idle } else { nack.delay };
            (token.receipt.clone(), ReceiptAction::Hold { by: self.redeliverer.clone(), lease })
        };
        let mut results = self.settle_receipts(tokens.iter().map(hold).collect()).await;
        for (index, token) in tokens.iter().enumerate() {
            if results[index].is_err() {
                continue;
            }
            if is_dead(token) {
                self.forget_lease(token.receipt.id);
                // If this fails, the entry stays pending on the redeliverer, which finds it after `claim_idle`.
                let result = self.dead_letter_nacked(token, nack).await;
                results[index] = result.map_err(|error| SettleError::Store(Arc::new(error)));
            } else {
                self.record_lease(token.receipt.id, None, nack.delay);
                self.metrics.nacked.inc();
            }
        }
        results
    }

    fn check_lease(&self, lease: Duration) -> Result<(), PullError> {
        if lease < MIN_LEASE || lease > self.max_lease() { Err(PullError::Lease(self.max_lease())) } else { Ok(()) }
    }

    async fn settle_receipts(&self, items: Vec<(Receipt, ReceiptAction)>) -> Vec<Result<(), SettleError>> {
        let settled = match self.store.settle_by_receipt(&self.reader, &items).await {
            // All leases are gone with the group.
            Err(error) if error.kind() == StoreErrorKind::NoGroup => Ok(vec![false; items.len()]),
            settled => settled,
        };
        match settled {
            Ok(valid) => {
                let rejected = valid.iter().filter(|is_valid| !**is_valid).count() as u64;
                self.metrics.rejected.inc_by(rejected);
                valid.into_iter().map(|is_valid| if is_valid { Ok(()) } else { Err(SettleError::NotLeased) }).collect()
            }
            Err(error) => {
                let error = Arc::new(error);
                items.iter().map(|_| Err(SettleError::Store(Arc::clone(&error)))).collect()
            }
        }
    }

    /// Dead-letters a nacked entry, which is pending on the redeliverer.
    async fn dead_letter_nacked(&self, token: &Token, nack: &Nack) -> Result<(), StoreError> {
        let id = token.receipt.id;
        let range = Range { from: id, to: id, order: Order::Forward };
        let Some(entry) = self.store.range(&self.group.stream, range, 1).await?.pop() else { return Ok(()) };
        let reason = if nack.is_permanent { DeadLetterReason::Rejected } else { DeadLetterReason::Exhausted };
        let error = nack.reason.clone().unwrap_or_else(|| "nacked by its consumer without a reason".to_owned());
        let cursor = Cursor { consumer: self.redeliverer.clone(), ..self.reader.clone() };
        self.dead_letter(&cursor, entry, token.attempt(), reason, error).await
    }

    pub(super) async fn dead_letter(
        &self,
        cursor: &Cursor,
        entry: Entry,
        attempts: u32,
        reason: DeadLetterReason,
        error: String,
    ) -> Result<(), StoreError> {
        let (stream, group) = (&self.group.stream, &self.group.group);
        let letter = DeadLetter::of_original_entry(&entry, stream, group, reason, error, attempts, Timestamp::now());
        let outcome = Outcome::DeadLetter { to: self.group.dead_letter.clone(), fields: letter.to_fields() };
        let delivery = Delivery { entry, attempt: attempts, delivered_at: std::time::Instant::now() };
        let settled = self.store.settle(cursor, &[Settlement { delivery, outcome }]).await?;
        if settled.settled > 0 {
            self.metrics.dead.inc();
            let labels = [self.group.label.as_str(), group.as_str(), reason.as_str()];
            self.metrics.dead_letters.with_label_values(&labels).inc();
            debug!(%stream, %group, entry.id = %letter.id, %reason, attempts, "entry dead-lettered");
        }
        Ok(())
    }

    /// Records the lease of an entry, or the delay of a nacked one, from now on.
    pub(super) fn record_lease(&self, id: EntryId, consumer: Option<ConsumerName>, time: Duration) {
        if self.update_leases(|leases| leases.insert(id, consumer, Instant::now() + time)) {
            self.next_expiry_changed.notify_one();
        }
    }

    /// Hands unreceived entries to the reader, which releases them to other consumers.
    pub(super) fn take_back(&self, entries: Vec<LeasedEntry>) {
        self.lock().unreceived.extend(entries.into_iter().map(|leased| leased.token.receipt));
        self.changed.notify_one();
    }

    pub(super) fn forget_lease(&self, id: EntryId) {
        self.update_leases(|leases| leases.remove(id));
    }

    /// Changes the lease table and adds the difference to the gauge, which several consumers may share.
    pub(super) fn update_leases<T>(&self, update: impl FnOnce(&mut PullLeaseTable) -> T) -> T {
        let mut state = self.lock();
        let before = state.leases.count();
        let result = update(&mut state.leases);
        self.metrics.leases.add(to_i64(state.leases.count()) - to_i64(before));
        result
    }

    /// Ends all pending pulls with no entries, and refuses new ones.
    pub(super) fn close(&self) {
        let pending = {
            let mut state = self.lock();
            state.is_closed = true;
            std::mem::take(&mut state.pending)
        };
        drop(pending);
        self.changed.notify_one();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, PullState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Increments a gauge while it exists.
struct GaugeGuard<'a>(&'a IntGauge);

impl<'a> GaugeGuard<'a> {
    fn new(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for GaugeGuard<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn to_i64(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
