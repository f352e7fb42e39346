//! The leases of a worker: taken, renewed, and given up before another worker can have them.
//!
//! Each worker holds the lease on its consumer's name. Without it, two daemons with one name would claim each other's
//! deliveries. In an ordered group only the worker with the group lease works. A worker stops by its own clock before
//! its lease can have passed to another worker.

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

/// The longest time that a group lease lasts without a renewal.
const GROUP_LEASE_TTL: Duration = Duration::from_secs(10);
/// Between two requests of a worker that waits for the group lease.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How long releasing a lease may take.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);
/// The most numbered names that a worker tries.
const MAX_NAMES: u32 = 100;

/// The leases that a worker holds while it works.
#[derive(Debug)]
pub(crate) struct WorkerLeases {
    pub(crate) consumer: ConsumerName,
    /// The group lease, in an ordered group.
    pub(crate) group: Option<Lease>,
    pub(crate) watch: LeaseWatch,
    name: Lease,
    name_state: watch::Sender<LeaseState>,
    group_state: watch::Sender<LeaseState>,
}

#[cfg(test)]
impl WorkerLeases {
    /// Returns leases that never end.
    pub(crate) fn unbounded(consumer: ConsumerName) -> Self {
        let state = || watch::Sender::new(LeaseState { until: None, fence: 0, error: None });
        let (name_state, group_state) = (state(), state());
        let watch = LeaseWatch { name: name_state.subscribe(), group: group_state.subscribe() };
        let name = Lease { name: "consumer".to_owned(), holder: "test".to_owned(), fence: 0 };
        Self { consumer, group: None, watch, name, name_state, group_state }
    }
}

/// The state of a lease, as its holder knows it.
#[derive(Debug, Clone)]
struct LeaseState {
    /// When the lease may end. `None` if it does not.
    until: Option<Instant>,
    fence: u64,
    /// The error of the last renewal, if it failed.
    error: Option<String>,
}

impl LeaseState {
    fn is_valid(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// The current state of both leases, shared with the loop and the calls of the sink.
#[derive(Debug, Clone)]
pub(crate) struct LeaseWatch {
    name: watch::Receiver<LeaseState>,
    group: watch::Receiver<LeaseState>,
}

impl LeaseWatch {
    /// Returns the watch of leases that never end.
    #[cfg(test)]
    pub(crate) fn unbounded() -> Self {
        let state = watch::Sender::new(LeaseState { until: None, fence: 0, error: None });
        Self { name: state.subscribe(), group: state.subscribe() }
    }

    /// Returns whether entries may be taken in: no other worker has this consumer's name or its group.
    pub(crate) fn may_take_in(&self) -> bool {
        self.name.borrow().is_valid() && self.may_deliver()
    }

    /// Returns whether entries may go to the sink: no other worker has this ordered group.
    pub(crate) fn may_deliver(&self) -> bool {
        self.group.borrow().is_valid()
    }

    /// Returns a number that changes if the name was lost for a while.
    ///
    /// Another worker may have claimed the entries pending on the name, or left some.
    pub(crate) fn generation(&self) -> u64 {
        self.name.borrow().fence
    }

    /// Returns the error of the last renewal, if it failed.
    pub(crate) fn error(&self) -> Option<String> {
        let name = self.name.borrow().error.clone();
        name.or_else(|| self.group.borrow().error.clone())
    }

    /// Waits until a lease changes. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        let (name, group) = (&mut self.name, &mut self.group);
        let is_over = tokio::select! {
            changed = name.changed() => changed.is_err(),
            changed = group.changed() => changed.is_err(),
        };
        if is_over {
            std::future::pending::<()>().await;
        }
    }
}

/// The lease that a worker has lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LostLease {
    /// Another daemon has the consumer's name.
    Name,
    /// Another daemon may have the group.
    Group,
}

/// Takes and renews the leases of one worker.
#[derive(Debug)]
pub(crate) struct LeaseManager<'a> {
    store: &'a dyn Store,
    group: &'a GroupSpec,
    consumer: &'a ConsumerName,
    part: &'a Part,
    /// Identifies this run of this worker.
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

    /// Waits until this worker has its leases. Returns `None` if the worker is stopped before.
    pub(crate) async fn acquire(&self) -> Option<WorkerLeases> {
        let (consumer, name, state) = self.take_name().await?;
        let name_state = watch::Sender::new(state);
        let group_state = watch::Sender::new(LeaseState { until: None, fence: 0, error: None });
        let watch = LeaseWatch { name: name_state.subscribe(), group: group_state.subscribe() };
        let mut leases = WorkerLeases { consumer, group: None, watch, name, name_state, group_state };
        if self.group.config.ordering == Ordering::None {
            return Some(leases);
        }
        let taken = tokio::select! {
            biased;
            taken = self.take_group() => taken,
            _lost = self.renew_name(&leases) => return Box::pin(self.acquire()).await,
        };
        let Some((lease, state)) = taken else {
            self.release(&leases).await;
            return None;
        };
        leases.group = Some(lease);
        leases.group_state.send_replace(state);
        Some(leases)
    }

    /// Renews the leases until one is lost. Cancel-safe.
    pub(crate) async fn renew(&self, leases: &WorkerLeases) -> LostLease {
        let group = async {
            match &leases.group {
                Some(lease) => self.renew_group(lease, &leases.group_state).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            lost = group => lost,
            lost = self.renew_name(leases) => lost,
        }
    }

    /// Releases the leases, so that other workers need not wait for their end.
    pub(crate) async fn release(&self, leases: &WorkerLeases) {
        for lease in leases.group.iter().chain([&leases.name]) {
            // Without a reply the lease runs out.
            drop(timeout(RELEASE_TIMEOUT, self.store.release_lease(&self.group.stream, lease)).await);
        }
    }

    async fn request_name(&self, consumer: &ConsumerName) -> Result<Leased, StoreError> {
        let name = format!("consumer/{}/{consumer}", self.group.config.name);
        match self.request(&name, &self.holder, self.name_ttl).await {
            // A full store checks that the name is free before it fails. Deliveries must go on, because they make room.
            Err(error) if error.kind() == StoreErrorKind::Full => {
                Ok(Leased::Held(Lease { name, holder: self.holder.clone(), fence: 0 }))
            }
            result => result,
        }
    }

    fn group_ttl(&self) -> Duration {
        GROUP_LEASE_TTL.min(self.group.config.claim_idle)
    }

    /// Takes the consumer's name, or the next free numbered one if another daemon has it.
    ///
    /// A lease that is not renewed belongs to an earlier run of this worker. It is waited for. A lease that is renewed
    /// belongs to another daemon.
    async fn take_name(&self) -> Option<(ConsumerName, Lease, LeaseState)> {
        let mut backoff = Backoff::default();
        let mut warning = ThrottledWarning::default();
        // The first holder, and the latest end of its lease without a renewal. Stores round the time.
        let mut first_seen: Option<(String, Instant)> = None;
        let mut consumer = self.consumer.clone();
        let mut number = 1;
        loop {
            let requested_at = Instant::now();
            let wait = match self.request_name(&consumer).await {
                Ok(Leased::Held(lease)) => {
                    self.log_other_name(&consumer);
                    let state = held(requested_at, self.name_ttl, &lease);
                    return Some((consumer, lease, state));
                }
                Ok(Leased::Taken { by, expires_in }) => {
                    warning.ended();
                    let (first, ends) = first_seen.get_or_insert_with(|| (by.clone(), Instant::now() + expires_in));
                    let is_renewed = *first != by || requested_at + expires_in > *ends + self.name_ttl / 20;
                    if number > 1 || is_renewed {
                        number = number % MAX_NAMES + 1;
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
                    self.report_failure(&error, &mut warning);
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

    fn log_other_name(&self, consumer: &ConsumerName) {
        if consumer != self.consumer {
            warn!(
                stream = %self.group.stream, group = %self.group.config.name, consumer = %consumer,
                "another daemon has the name {}; give each daemon its own `instance`", self.consumer
            );
        }
    }

    /// Takes the group lease. Returns `None` if the worker is stopped before.
    async fn take_group(&self) -> Option<(Lease, LeaseState)> {
        let mut backoff = Backoff::default();
        let mut warning = ThrottledWarning::default();
        let name = format!("group/{}", self.group.config.name);
        // A new holder each time: calls that are still under way from an earlier lease must not count for this one.
        let holder = new_holder(self.consumer);
        let mut has_waited = false;
        loop {
            let requested_at = Instant::now();
            let wait = match self.request(&name, &holder, self.group_ttl()).await {
                Ok(Leased::Held(lease)) => {
                    if has_waited {
                        info!(stream = %self.group.stream, group = %self.group.config.name, "group lease taken");
                    }
                    let state = held(requested_at, self.group_ttl(), &lease);
                    return Some((lease, state));
                }
                Ok(Leased::Taken { by, expires_in }) => {
                    warning.ended();
                    let by = by.split(' ').next().unwrap_or_default();
                    if !has_waited {
                        info!(
                            stream = %self.group.stream, group = %self.group.config.name, consumer = %self.consumer,
                            "group lease held by {by}, waiting: one worker at a time keeps the order"
                        );
                    }
                    has_waited = true;
                    self.part.ready_but(format!("waiting: {by} works"));
                    expires_in.min(RETRY_INTERVAL) + Duration::from_millis(10)
                }
                Err(error) => {
                    self.report_failure(&error, &mut warning);
                    backoff.next_delay()
                }
            };
            if !self.waits(wait).await {
                return None;
            }
        }
    }

    /// Renews the consumer's name until another worker has it.
    async fn renew_name(&self, leases: &WorkerLeases) -> LostLease {
        let mut wait = self.name_ttl / 3;
        loop {
            sleep(wait).await;
            let requested_at = Instant::now();
            wait = self.name_ttl / 3;
            match self.request_name(&leases.consumer).await {
                Ok(Leased::Held(lease)) => {
                    leases.name_state.send_replace(held(requested_at, self.name_ttl, &lease));
                }
                Ok(Leased::Taken { .. }) => return LostLease::Name,
                Err(error) => {
                    wait = self.name_ttl / 10;
                    leases.name_state.send_modify(|state| state.error = Some(chain(&error)));
                }
            }
        }
    }

    /// Renews the group lease until another worker may have it.
    async fn renew_group(&self, current: &Lease, state: &watch::Sender<LeaseState>) -> LostLease {
        let ttl = self.group_ttl();
        let mut wait = ttl / 3;
        loop {
            let until = state.borrow().until.unwrap_or_else(Instant::now);
            let renewed = async {
                sleep(wait).await;
                let requested_at = Instant::now();
                (requested_at, self.request(&current.name, &current.holder, ttl).await)
            };
            let (requested_at, result) = tokio::select! {
                biased;
                () = sleep_until(until) => return LostLease::Group,
                renewed = renewed => renewed,
            };
            match result {
                Ok(Leased::Held(lease)) if lease == *current => {
                    state.send_replace(held(requested_at, ttl, &lease));
                    wait = ttl / 3;
                }
                Ok(Leased::Held(_) | Leased::Taken { .. }) => return LostLease::Group,
                Err(error) => {
                    state.send_modify(|state| state.error = Some(chain(&error)));
                    wait = ttl / 20;
                }
            }
        }
    }

    /// Requests a lease. A late reply is useless, because the lease has partly run out by then.
    async fn request(&self, name: &str, holder: &str, ttl: Duration) -> Result<Leased, StoreError> {
        let requested = timeout(ttl / 3, self.store.lease(&self.group.stream, name, holder, ttl)).await;
        requested
            .unwrap_or_else(|_elapsed| Err(StoreError::new(StoreErrorKind::Unavailable, "the store does not answer")))
    }

    fn report_failure(&self, error: &StoreError, warning: &mut ThrottledWarning) {
        let text = chain(error);
        if let Some(times) = warning.occurred() {
            warn!(
                stream = %self.group.stream, group = %self.group.config.name, consumer = %self.consumer, error = text,
                kind = error.kind().as_str(), times, "worker cannot take its lease, trying again"
            );
        }
        self.part.not_ready(text);
    }

    /// Waits for this time. Returns false if the worker is stopped meanwhile.
    async fn waits(&self, time: Duration) -> bool {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => false,
            () = sleep(time) => true,
        }
    }
}

/// Returns the name of a holder, different from all others, also from earlier ones of this worker.
fn new_holder(consumer: &ConsumerName) -> String {
    format!("{consumer} {}", Uuid::new_v4().simple())
}

/// Returns the state of a lease that was requested at this instant.
///
/// Its holder gives it up after two thirds of its time. The rest is for clocks that differ, and for a read that is
/// still under way in the store.
fn held(requested_at: Instant, ttl: Duration, lease: &Lease) -> LeaseState {
    LeaseState { until: Some(requested_at + ttl - ttl / 3), fence: lease.fence, error: None }
}
