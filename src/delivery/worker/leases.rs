//! A worker's turn: the leases under which it works, taken, renewed, and given up in time.
//!
//! Every worker has the lease on its consumer's name, so that two daemons with one name don't take each other's
//! deliveries for left over. Where an order is kept, the one worker that holds the group's lease works. By its own
//! clock a worker stops before anyone else can have taken its lease.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::delivery::ordering::Ordering;
use crate::delivery::{GroupSpec, Worker};
use crate::event::ConsumerName;
use crate::log_throttle::ThrottledWarning;
use crate::readiness::Part;
use crate::store::{Lease, Leased, Store, StoreError, StoreErrorKind};
use crate::telemetry::chain;

/// How long a group's turn lasts without a sign of life, at most.
const TURN_TTL: Duration = Duration::from_secs(10);
/// How often a worker that waits asks again.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long giving up a lease may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// The most names like its own that a worker tries.
const NAMES: u32 = 100;

/// What a worker holds while it works.
#[derive(Debug)]
pub(crate) struct WorkerLeases {
    pub(crate) consumer: ConsumerName,
    /// The group's lease, where an order is kept.
    pub(crate) turn: Option<Lease>,
    pub(crate) permit: LeaseWatch,
    name: Lease,
    name_standing: watch::Sender<LeaseState>,
    turn_standing: watch::Sender<LeaseState>,
}

/// How a lease stands, as far as its holder knows.
#[derive(Debug, Clone)]
struct LeaseState {
    /// When it may be over; nothing where there is no end.
    until: Option<Instant>,
    fence: u64,
    /// Why it could not be renewed, if that failed last.
    trouble: Option<String>,
}

impl LeaseState {
    fn is_valid(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// Tells what a worker may do now.
#[derive(Debug, Clone)]
pub(crate) struct LeaseWatch {
    name: watch::Receiver<LeaseState>,
    turn: watch::Receiver<LeaseState>,
}

impl LeaseWatch {
    /// One that never ends.
    #[cfg(test)]
    pub(crate) fn unbounded() -> Self {
        let standing = watch::Sender::new(LeaseState { until: None, fence: 0, trouble: None });
        Self { name: standing.subscribe(), turn: standing.subscribe() }
    }

    /// Whether entries may be taken in: no one else has this consumer's name.
    pub(crate) fn may_take_in(&self) -> bool {
        self.name.borrow().is_valid() && self.may_deliver()
    }

    /// Whether entries may go to the sink: where an order is kept, no one else has the group.
    pub(crate) fn may_deliver(&self) -> bool {
        self.turn.borrow().is_valid()
    }

    /// Changes when the name was lost for a while: others may have taken what was pending on it, or left something.
    pub(crate) fn life(&self) -> u64 {
        self.name.borrow().fence
    }

    /// Why a lease could not be renewed, if that failed last.
    pub(crate) fn trouble(&self) -> Option<String> {
        let name = self.name.borrow().trouble.clone();
        name.or_else(|| self.turn.borrow().trouble.clone())
    }

    /// Waits until there is news. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        let (name, turn) = (&mut self.name, &mut self.turn);
        let is_over = tokio::select! {
            changed = name.changed() => changed.is_err(),
            changed = turn.changed() => changed.is_err(),
        };
        if is_over {
            std::future::pending::<()>().await;
        }
    }
}

/// Why a tenure ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LostLease {
    /// Another daemon has the consumer's name now.
    Name,
    /// Another daemon may have the group's turn now.
    Turn,
}

/// Takes leases for one worker.
#[derive(Debug)]
pub(crate) struct LeaseManager<'a> {
    store: &'a dyn Store,
    group: &'a GroupSpec,
    consumer: &'a ConsumerName,
    part: &'a Part,
    /// This worker and no other, also not its own earlier life.
    holder: String,
    name_ttl: Duration,
    stop: &'a CancellationToken,
}

impl<'a> LeaseManager<'a> {
    pub(crate) fn new(worker: &'a Worker, stop: &'a CancellationToken) -> Self {
        Self {
            store: &*worker.store,
            group: &worker.group,
            consumer: &worker.consumer,
            part: &worker.readiness,
            holder: new_holder(&worker.consumer),
            name_ttl: worker.name_ttl,
            stop,
        }
    }

    /// Waits until this worker may work; nothing when it is stopped before.
    pub(crate) async fn begin(&self) -> Option<WorkerLeases> {
        let (consumer, name, standing) = self.take_name().await?;
        let name_standing = watch::Sender::new(standing);
        let turn_standing = watch::Sender::new(LeaseState { until: None, fence: 0, trouble: None });
        let permit = LeaseWatch { name: name_standing.subscribe(), turn: turn_standing.subscribe() };
        let mut tenure = WorkerLeases { consumer, turn: None, permit, name, name_standing, turn_standing };
        if self.group.config.ordering == Ordering::None {
            return Some(tenure);
        }
        let taken = tokio::select! {
            biased;
            taken = self.take_turn() => taken,
            _lost = self.keep_name(&tenure) => return Box::pin(self.begin()).await,
        };
        let Some((lease, standing)) = taken else {
            self.end(&tenure).await;
            return None;
        };
        tenure.turn = Some(lease);
        tenure.turn_standing.send_replace(standing);
        Some(tenure)
    }

    /// Keeps a tenure until it is lost. Cancel-safe.
    pub(crate) async fn keep(&self, tenure: &WorkerLeases) -> LostLease {
        let turn = async {
            match &tenure.turn {
                Some(turn) => self.keep_turn(turn, &tenure.turn_standing).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            lost = turn => lost,
            lost = self.keep_name(tenure) => lost,
        }
    }

    /// Gives the leases up, so that others need not wait for them to run out.
    pub(crate) async fn end(&self, tenure: &WorkerLeases) {
        for lease in tenure.turn.iter().chain([&tenure.name]) {
            // Without an answer it runs out by itself.
            drop(timeout(RELEASE_TIMEOUT, self.store.release_lease(&self.group.stream, lease)).await);
        }
    }

    async fn ask_for_name(&self, consumer: &ConsumerName) -> Result<Leased, StoreError> {
        let name = format!("consumer/{}/{consumer}", self.group.config.name);
        match self.ask(&name, &self.holder, self.name_ttl).await {
            // A store without room has looked that no one has it before it tells so; deliveries must go on, they make
            // room.
            Err(error) if error.kind() == StoreErrorKind::Full => {
                Ok(Leased::Held(Lease { name, holder: self.holder.clone(), fence: 0 }))
            }
            answer => answer,
        }
    }

    fn turn_ttl(&self) -> Duration {
        TURN_TTL.min(self.group.config.claim_idle)
    }

    /// Takes the consumer's name. A lease that nobody renews is of a life that has ended, and runs out; where it is
    /// renewed, another daemon has this name, and the next free one like it is taken.
    async fn take_name(&self) -> Option<(ConsumerName, Lease, LeaseState)> {
        let mut backoff = Backoff::default();
        let mut trouble = ThrottledWarning::default();
        // Who had the name at first, and until when at the latest if that was not renewed. Stores round.
        let mut first_seen: Option<(String, Instant)> = None;
        let mut consumer = self.consumer.clone();
        let mut number = 1;
        loop {
            let asked_at = Instant::now();
            let wait = match self.ask_for_name(&consumer).await {
                Ok(Leased::Held(lease)) => {
                    self.tell_name(&consumer);
                    let standing = held(asked_at, self.name_ttl, &lease);
                    return Some((consumer, lease, standing));
                }
                Ok(Leased::Taken { by, expires_in }) => {
                    trouble.ended();
                    let (first, ends) = first_seen.get_or_insert_with(|| (by.clone(), Instant::now() + expires_in));
                    let is_renewed = *first != by || asked_at + expires_in > *ends + self.name_ttl / 20;
                    if number > 1 || is_renewed {
                        number = number % NAMES + 1;
                        consumer = self.numbered(number);
                        first_seen = if number == 1 { None } else { first_seen };
                        Duration::ZERO
                    } else {
                        let text = format!("waiting: another worker had the name {consumer} a moment ago");
                        self.part.ready_but(text);
                        expires_in.min(self.name_ttl / 6) + Duration::from_millis(10)
                    }
                }
                Err(error) => {
                    self.tell_failure(&error, &mut trouble);
                    backoff.next_delay()
                }
            };
            if !self.waits(wait).await {
                return None;
            }
        }
    }

    fn numbered(&self, number: u32) -> ConsumerName {
        if number == 1 { self.consumer.clone() } else { self.consumer.numbered(number) }
    }

    fn tell_name(&self, consumer: &ConsumerName) {
        if consumer != self.consumer {
            warn!(
                stream = %self.group.stream, group = %self.group.config.name, consumer = %consumer,
                "another daemon has the name {}; give each daemon an instance of its own", self.consumer
            );
        }
    }

    /// Takes the group's turn; nothing when the worker is stopped before.
    async fn take_turn(&self) -> Option<(Lease, LeaseState)> {
        let mut backoff = Backoff::default();
        let mut trouble = ThrottledWarning::default();
        let name = format!("group/{}", self.group.config.name);
        // Calls that are still under way from an earlier turn must not pass for calls of this one.
        let holder = new_holder(self.consumer);
        let mut has_waited = false;
        loop {
            let asked_at = Instant::now();
            let wait = match self.ask(&name, &holder, self.turn_ttl()).await {
                Ok(Leased::Held(lease)) => {
                    if has_waited {
                        info!(stream = %self.group.stream, group = %self.group.config.name, "it is this worker's turn");
                    }
                    let standing = held(asked_at, self.turn_ttl(), &lease);
                    return Some((lease, standing));
                }
                Ok(Leased::Taken { by, expires_in }) => {
                    trouble.ended();
                    let by = by.split(' ').next().unwrap_or_default();
                    if !has_waited {
                        info!(
                            stream = %self.group.stream, group = %self.group.config.name, consumer = %self.consumer,
                            "waiting: {by} works, and one at a time keeps the order"
                        );
                    }
                    has_waited = true;
                    self.part.ready_but(format!("waiting: {by} works"));
                    expires_in.min(ASK_EVERY) + Duration::from_millis(10)
                }
                Err(error) => {
                    self.tell_failure(&error, &mut trouble);
                    backoff.next_delay()
                }
            };
            if !self.waits(wait).await {
                return None;
            }
        }
    }

    /// Renews the consumer's name until another has it.
    async fn keep_name(&self, tenure: &WorkerLeases) -> LostLease {
        let mut wait = self.name_ttl / 3;
        loop {
            sleep(wait).await;
            let asked_at = Instant::now();
            wait = self.name_ttl / 3;
            match self.ask_for_name(&tenure.consumer).await {
                Ok(Leased::Held(lease)) => {
                    tenure.name_standing.send_replace(held(asked_at, self.name_ttl, &lease));
                }
                Ok(Leased::Taken { .. }) => return LostLease::Name,
                Err(error) => {
                    wait = self.name_ttl / 10;
                    tenure.name_standing.send_modify(|standing| standing.trouble = Some(chain(&error)));
                }
            }
        }
    }

    /// Renews the group's turn until it may be another's.
    async fn keep_turn(&self, turn: &Lease, standing: &watch::Sender<LeaseState>) -> LostLease {
        let ttl = self.turn_ttl();
        let mut wait = ttl / 3;
        loop {
            let until = standing.borrow().until.unwrap_or_else(Instant::now);
            let renewed = async {
                sleep(wait).await;
                let asked_at = Instant::now();
                (asked_at, self.ask(&turn.name, &turn.holder, ttl).await)
            };
            let (asked_at, answer) = tokio::select! {
                biased;
                () = sleep_until(until) => return LostLease::Turn,
                renewed = renewed => renewed,
            };
            match answer {
                Ok(Leased::Held(lease)) if lease == *turn => {
                    standing.send_replace(held(asked_at, ttl, &lease));
                    wait = ttl / 3;
                }
                Ok(Leased::Held(_) | Leased::Taken { .. }) => return LostLease::Turn,
                Err(error) => {
                    standing.send_modify(|standing| standing.trouble = Some(chain(&error)));
                    wait = ttl / 20;
                }
            }
        }
    }

    /// Asks for a lease. An answer that takes long is no use: by then the lease has partly run out.
    async fn ask(&self, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        let asked = timeout(ttl / 3, self.store.lease(&self.group.stream, name, holder, ttl)).await;
        asked.unwrap_or_else(|_elapsed| Err(StoreError::new(StoreErrorKind::Unavailable, "the store does not answer")))
    }

    fn tell_failure(&self, error: &StoreError, trouble: &mut ThrottledWarning) {
        let text = chain(error);
        if let Some(times) = trouble.occurred() {
            warn!(
                stream = %self.group.stream, group = %self.group.config.name, consumer = %self.consumer, error = text,
                kind = error.kind().as_str(), times, "the worker cannot begin"
            );
        }
        self.part.not_ready(text);
    }

    /// Waits for that long; false when the worker is stopped meanwhile.
    async fn waits(&self, time: Duration) -> bool {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => false,
            () = sleep(time) => true,
        }
    }
}

/// Whose lease it is, told apart from all others, also from this worker's earlier ones.
fn new_holder(consumer: &ConsumerName) -> String {
    format!("{consumer} {}", Uuid::new_v4().simple())
}

/// How a lease stands that was asked for at that instant. Its holder gives it up a third earlier than anyone else can
/// have it: for clocks that don't agree, and for a read that is still under way at the store.
fn held(asked_at: Instant, ttl: Duration, lease: &Lease) -> LeaseState {
    LeaseState { until: Some(asked_at + ttl - ttl / 3), fence: lease.fence, trouble: None }
}
