//! The desk of one group: whoever waits for entries is served here, in turn, by one reader for all.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use prometheus::{IntCounter, IntGauge};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::debug;

use crate::event::{ConsumerName, DeadLetter, DeadLetterReason, Delivery, Entry, EntryId, GroupName, StreamName};
use crate::metrics::Metrics;
use crate::pull::leases::Ledger;
use crate::pull::{Config, MIN_LEASE, PullGroup, Token};
use crate::store::{Cursor, Order, Outcome, Range, Receipt, Redemption, Settlement, Store, StoreError, StoreErrorKind};

/// How long a pull waits for an answer that is being made for it.
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// What a worker wants.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Under which name it holds what it is given.
    pub consumer: ConsumerName,
    /// The most entries, at least 1.
    pub max: usize,
    /// For how long, from [`MIN_LEASE`] to [`Desk::max_lease`].
    pub lease: Duration,
    /// How long it waits where there are none.
    pub wait: Duration,
}

/// An entry that a worker has leased.
#[derive(Debug)]
pub struct Task {
    /// What settles it.
    pub token: Token,
    /// The entry.
    pub entry: Entry,
    /// For how long it is leased.
    pub lease: Duration,
}

/// How something is given back.
#[derive(Debug, Clone, Default)]
pub struct GiveBack {
    /// After what time others may have it, at most [`Desk::max_lease`].
    pub delay: Duration,
    /// Why, in words, for the dead letter if it becomes one.
    pub reason: Option<String>,
    /// Whether it would fail again: then it is given up at once.
    pub is_permanent: bool,
}

/// Why a pull is given nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The consumer has as many leases as it may have.
    #[error("this consumer has {0} entries leased, and may have no more at a time (pull.max_leases)")]
    TooManyLeases(usize),
    /// A lease is too short or too long.
    #[error("a lease must be from {} to {} ms, as long as others leave the group's entries alone (claim_idle): extend it while you work", MIN_LEASE.as_millis(), .0.as_millis())]
    Lease(Duration),
    /// This instance is stopping.
    #[error("this instance is stopping")]
    Stopping,
    /// The group is gone, and is being made again.
    #[error("the group is being made")]
    NoGroup,
    /// The store has failed, or does not answer.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

/// Why something was not settled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refused {
    /// It is not with whoever shows the token: the lease has ended, or it was settled before.
    #[error("the lease has ended, or it was settled before: another worker may have it")]
    NotLeased,
    /// The store has failed.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

/// Someone who waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) number: u64,
    pub(super) wanted: Wanted,
    pub(super) deadline: Instant,
    pub(super) answer: oneshot::Sender<Answer>,
}

type Answer = Result<Vec<Task>, PullError>;

/// What someone who waits has in hand. What was answered and is not taken out when this is dropped goes to others.
struct Place<'a> {
    desk: &'a Desk,
    answered: oneshot::Receiver<Answer>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.answered.close();
        if let Ok(Ok(tasks)) = self.answered.try_recv() {
            self.desk.take_back(tasks);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) waiters: VecDeque<Waiter>,
    pub(super) next_number: u64,
    /// Whether the reader has found nothing and waits for what comes.
    pub(super) is_reading: bool,
    pub(super) is_closed: bool,
    /// What was leased to those who had gone before they saw it.
    pub(super) unseen: Vec<Receipt>,
    pub(super) ledger: Ledger,
}

#[derive(Debug)]
pub(super) struct Meters {
    pub(super) pulls: IntCounter,
    pub(super) delivered: IntCounter,
    pub(super) waiting: IntGauge,
    pub(super) leases: IntGauge,
    pub(super) expired: IntCounter,
    pub(super) acknowledged: IntCounter,
    pub(super) given_back: IntCounter,
    pub(super) extended: IntCounter,
    pub(super) dead: IntCounter,
    pub(super) refused: IntCounter,
    pub(super) filtered: IntCounter,
    pub(super) letters: prometheus::IntCounterVec,
}

/// Gives the entries of one group to workers outside, and takes them back.
#[derive(Debug)]
pub struct Desk {
    pub(super) store: Arc<dyn Store>,
    pub(super) group: PullGroup,
    pub(super) reader: Cursor,
    pub(super) guard: ConsumerName,
    pub(super) max_leases: usize,
    pub(super) state: Mutex<State>,
    /// Told of those who begin to wait, and of what is unseen.
    pub(super) changed: Notify,
    /// Told of a lease that ends sooner than all others.
    pub(super) sooner: Notify,
    pub(super) meters: Meters,
}

impl Desk {
    pub(super) fn new(
        store: Arc<dyn Store>,
        group: PullGroup,
        config: &Config,
        reader: ConsumerName,
        guard: ConsumerName,
        metrics: &Metrics,
    ) -> Self {
        let labels = [group.label.as_str(), group.group.as_str()];
        let settled = |result| metrics.pull_settled.with_label_values(&[labels[0], labels[1], result]);
        let meters = Meters {
            pulls: metrics.pulls.with_label_values(&labels),
            delivered: metrics.pull_deliveries.with_label_values(&labels),
            waiting: metrics.pull_waiting.with_label_values(&labels),
            leases: metrics.pull_leases.with_label_values(&labels),
            expired: metrics.pull_expired.with_label_values(&labels),
            acknowledged: settled("acknowledged"),
            given_back: settled("given_back"),
            extended: settled("extended"),
            dead: settled("dead"),
            refused: settled("refused"),
            filtered: metrics.filtered.with_label_values(&labels),
            letters: metrics.dead_letters.clone(),
        };
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
            guard,
            max_leases: config.max_leases,
            state: Mutex::default(),
            changed: Notify::new(),
            sooner: Notify::new(),
            meters,
            group,
        }
    }

    /// The longest lease: others take over what is idle for longer.
    pub fn max_lease(&self) -> Duration {
        self.group.claim_idle
    }

    /// The stream.
    pub fn stream(&self) -> &StreamName {
        &self.group.stream
    }

    /// The group.
    pub fn group(&self) -> &GroupName {
        &self.group.group
    }

    /// Whether a token is of this group.
    pub fn is_of(&self, token: &Token) -> bool {
        token.is_of(&self.group.stream, &self.group.group)
    }

    /// The next entries for a worker; none where there are none, also after the time it waits.
    ///
    /// Those who wait are served in the order in which they came. Cancel-safe: what was to be given to someone who has
    /// gone is given to others.
    pub async fn pull(&self, wanted: Wanted) -> Result<Vec<Task>, PullError> {
        self.check_lease(wanted.lease)?;
        self.meters.pulls.inc();
        let deadline = Instant::now() + wanted.wait;
        let is_waiting = !wanted.wait.is_zero();
        let (answer, answered) = oneshot::channel();
        let mut place = Place { desk: self, answered };
        let number = {
            let mut state = self.lock();
            if state.is_closed {
                return Err(PullError::Stopping);
            }
            if state.ledger.held_by(&wanted.consumer) >= self.max_leases {
                return Err(PullError::TooManyLeases(self.max_leases));
            }
            if state.is_reading && !is_waiting {
                return Ok(Vec::new());
            }
            state.next_number += 1;
            let number = state.next_number;
            state.waiters.push_back(Waiter { number, wanted, deadline, answer });
            number
        };
        self.changed.notify_one();
        let _waiting = is_waiting.then(|| Waiting::begin(&self.meters.waiting));
        let first = if is_waiting { deadline } else { deadline + ANSWER_TIME };
        if let Ok(answer) = tokio::time::timeout_at(first, &mut place.answered).await {
            return answer.unwrap_or(Ok(Vec::new()));
        }
        {
            let mut state = self.lock();
            if let Some(turn) = state.waiters.iter().position(|waiter| waiter.number == number) {
                state.waiters.remove(turn);
                return Ok(Vec::new());
            }
        }
        // It is being served.
        let answer = tokio::time::timeout(ANSWER_TIME, &mut place.answered).await;
        answer.map_or(Ok(Vec::new()), |answer| answer.unwrap_or(Ok(Vec::new())))
    }

    /// Acknowledges; says for each what became of it.
    pub async fn acknowledge(&self, tokens: &[Token]) -> Vec<Result<(), Refused>> {
        let items = tokens.iter().map(|token| (token.receipt.clone(), Redemption::Acknowledge)).collect();
        let results = self.redeem(items).await;
        self.change(|ledger| {
            for (token, _) in tokens.iter().zip(&results).filter(|(_, result)| result.is_ok()) {
                ledger.remove(token.receipt.id);
                self.meters.acknowledged.inc();
            }
        });
        results
    }

    /// Leases for longer: for `lease` from now on; says for each what became of it.
    pub async fn extend(&self, tokens: &[Token], lease: Duration) -> Result<Vec<Result<(), Refused>>, PullError> {
        self.check_lease(lease)?;
        let hold = |token: &Token| {
            let receipt = token.receipt.clone();
            let by = receipt.consumer.clone();
            (receipt, Redemption::Hold { by, lease })
        };
        let results = self.redeem(tokens.iter().map(hold).collect()).await;
        for (token, _) in tokens.iter().zip(&results).filter(|(_, result)| result.is_ok()) {
            let consumer = Some(token.receipt.consumer.clone());
            self.note(token.receipt.id, consumer, lease);
            self.meters.extended.inc();
        }
        Ok(results)
    }

    /// Gives back, for others to have after a time, or to be given up; says for each what became of it.
    ///
    /// What was delivered as often as it may be is given up.
    pub async fn give_back(&self, tokens: &[Token], how: &GiveBack) -> Vec<Result<(), Refused>> {
        let is_given_up = |token: &Token| how.is_permanent || token.attempt() >= self.group.max_deliveries;
        let hold = |token: &Token| {
            let lease = if is_given_up(token) { self.group.claim_idle } else { how.delay };
            (token.receipt.clone(), Redemption::Hold { by: self.guard.clone(), lease })
        };
        let mut results = self.redeem(tokens.iter().map(hold).collect()).await;
        let taken = || tokens.iter().enumerate();
        for (place, token) in taken() {
            if results[place].is_err() {
                continue;
            }
            if is_given_up(token) {
                self.forget(token.receipt.id);
                // Where that fails, the entry is with the guard, and comes back once it is idle.
                results[place] = self.give_up(token, how).await.map_err(|error| Refused::Store(Arc::new(error)));
            } else {
                self.note(token.receipt.id, None, how.delay);
                self.meters.given_back.inc();
            }
        }
        results
    }

    fn check_lease(&self, lease: Duration) -> Result<(), PullError> {
        if lease < MIN_LEASE || lease > self.max_lease() { Err(PullError::Lease(self.max_lease())) } else { Ok(()) }
    }

    async fn redeem(&self, items: Vec<(Receipt, Redemption)>) -> Vec<Result<(), Refused>> {
        let redeemed = match self.store.redeem(&self.reader, &items).await {
            // All leases have gone with the group.
            Err(error) if error.kind() == StoreErrorKind::NoGroup => Ok(vec![false; items.len()]),
            redeemed => redeemed,
        };
        match redeemed {
            Ok(good) => {
                let refused = good.iter().filter(|is_good| !**is_good).count() as u64;
                self.meters.refused.inc_by(refused);
                good.into_iter().map(|is_good| if is_good { Ok(()) } else { Err(Refused::NotLeased) }).collect()
            }
            Err(error) => {
                let error = Arc::new(error);
                items.iter().map(|_| Err(Refused::Store(Arc::clone(&error)))).collect()
            }
        }
    }

    /// Moves an entry that the guard's name holds to the dead letters.
    async fn give_up(&self, token: &Token, how: &GiveBack) -> Result<(), StoreError> {
        let id = token.receipt.id;
        let range = Range { from: id, to: id, order: Order::Forward };
        let Some(entry) = self.store.range(&self.group.stream, range, 1).await?.pop() else { return Ok(()) };
        let reason = if how.is_permanent { DeadLetterReason::Rejected } else { DeadLetterReason::Exhausted };
        let error = how.reason.clone().unwrap_or_else(|| "given back by its worker without a reason".to_owned());
        let cursor = Cursor { consumer: self.guard.clone(), ..self.reader.clone() };
        self.bury(&cursor, entry, token.attempt(), reason, error).await
    }

    pub(super) async fn bury(
        &self,
        cursor: &Cursor,
        entry: Entry,
        attempts: u32,
        reason: DeadLetterReason,
        error: String,
    ) -> Result<(), StoreError> {
        let (stream, group) = (&self.group.stream, &self.group.group);
        let letter = DeadLetter::of_first_life(&entry, stream, group, reason, error, attempts, Timestamp::now());
        let outcome = Outcome::DeadLetter { to: self.group.dead_letter.clone(), fields: letter.to_fields() };
        let delivery = Delivery { entry, attempt: attempts, delivered_at: std::time::Instant::now() };
        let settled = self.store.settle(cursor, &[Settlement { delivery, outcome }]).await?;
        if settled.settled > 0 {
            self.meters.dead.inc();
            let labels = [self.group.label.as_str(), group.as_str(), reason.as_str()];
            self.meters.letters.with_label_values(&labels).inc();
            debug!(%stream, %group, entry.id = %letter.id, %reason, attempts, "an entry goes to the dead letters");
        }
        Ok(())
    }

    /// Notes that an entry is leased, or will be due, from now on for so long.
    pub(super) fn note(&self, id: EntryId, consumer: Option<ConsumerName>, time: Duration) {
        if self.change(|ledger| ledger.put(id, consumer, Instant::now() + time)) {
            self.sooner.notify_one();
        }
    }

    /// Has the reader give to others what was leased and never seen.
    pub(super) fn take_back(&self, tasks: Vec<Task>) {
        self.lock().unseen.extend(tasks.into_iter().map(|task| task.token.receipt));
        self.changed.notify_one();
    }

    pub(super) fn forget(&self, id: EntryId) {
        self.change(|ledger| ledger.remove(id));
    }

    /// Changes what is noted of leases, and counts them: beside those of other desks, where those have the same labels.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> T {
        let mut state = self.lock();
        let before = state.ledger.leases();
        let changed = change(&mut state.ledger);
        self.meters.leases.add(count(state.ledger.leases()) - count(before));
        changed
    }

    /// Lets those who wait go, and serves no one from now on.
    pub(super) fn close(&self) {
        let waiters = {
            let mut state = self.lock();
            state.is_closed = true;
            std::mem::take(&mut state.waiters)
        };
        drop(waiters);
        self.changed.notify_one();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts someone who waits for as long as it lives.
struct Waiting<'a>(&'a IntGauge);

impl<'a> Waiting<'a> {
    fn begin(gauge: &'a IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
