//! The state that all handlers share: the services of the daemon, and the limits of the HTTP surface.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::auth::AuthError;
use crate::bus::Bus;
use crate::dead_letters::DeadLetters;
use crate::http::authenticator::Authenticator;
use crate::http::config::Config;
use crate::http::problem::ApiError;
use crate::limiter::KeyedLimiter;
use crate::metrics::Metrics;
use crate::pull::PullConsumers;
use crate::readiness::Readiness;
use crate::relay::Relay;
use crate::store::Store;

/// Concurrent range reads from the store. Each may hold megabytes.
const MAX_READS: usize = 32;
/// Requests that wait for new entries, in all and per principal or address.
const MAX_WAITS: usize = 64;
const MAX_WAITS_PER_KEY: usize = MAX_WAITS / 2;
/// The memory for large responses in transfer per address. A part of a MiB counts as a whole one.
const MAX_RESPONSE_MIB_PER_ADDRESS: usize = 256;

/// The state of the HTTP surface. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Api {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    services: Services,
    limits: Limits,
    sessions: TaskTracker,
}

/// The parts of the daemon that handlers use.
#[derive(Debug)]
pub struct Services {
    /// Authentication.
    pub authenticator: Authenticator,
    /// Publishing.
    pub bus: Bus,
    /// Dead letters.
    pub dead_letters: DeadLetters,
    /// Pulling.
    pub pull: PullConsumers,
    /// Streams and groups.
    pub store: Arc<dyn Store>,
    /// Dashboards.
    pub relay: Relay,
    /// Metrics.
    pub metrics: Metrics,
    /// Readiness.
    pub readiness: Readiness,
}

/// Concurrency and rate limits, so that no client takes all memory or all workers.
#[derive(Debug)]
pub(super) struct Limits {
    pub(super) publishes: Semaphore,
    /// Request bodies in transfer, per address: a slow sender must not hold all of `publishes`.
    pub(super) bodies: Arc<KeyedLimiter>,
    /// MiB of large responses in transfer, per address: a slow reader must not hold all memory.
    pub(super) response_mib: Arc<KeyedLimiter>,
    pub(super) reads: Semaphore,
    pub(super) waits: Semaphore,
    pub(super) waits_per_key: Arc<KeyedLimiter>,
    /// Pull requests that wait for entries, per principal or address.
    pub(super) pulls: Arc<KeyedLimiter>,
    /// Requests per second, per address.
    pub(super) rate: DefaultKeyedRateLimiter<IpAddr>,
}

impl Limits {
    fn new(config: &Config, max_pulls: usize) -> Self {
        let rate = NonZeroU32::new(config.rate_limit).unwrap_or(NonZeroU32::MIN);
        Self {
            publishes: Semaphore::new(config.max_in_flight),
            bodies: KeyedLimiter::new(config.max_bodies_per_address),
            response_mib: KeyedLimiter::new(MAX_RESPONSE_MIB_PER_ADDRESS),
            reads: Semaphore::new(MAX_READS),
            waits: Semaphore::new(MAX_WAITS),
            waits_per_key: KeyedLimiter::new(MAX_WAITS_PER_KEY),
            pulls: KeyedLimiter::new(max_pulls),
            rate: RateLimiter::keyed(Quota::per_second(rate)),
        }
    }
}

impl Api {
    /// Creates the state. Nothing runs yet.
    pub fn new(config: Config, services: Services) -> Self {
        let limits = Limits::new(&config, services.pull.config().max_waiting);
        Self { inner: Arc::new(Inner { config, services, limits, sessions: TaskTracker::new() }) }
    }

    /// Begins the drain: `/ready` returns 503, no dashboard may connect, and connected ones are asked to reconnect.
    pub fn drain(&self) {
        self.services().relay.drain();
    }

    /// Waits until every dashboard session has ended. None may begin afterwards.
    pub async fn sessions_ended(&self) {
        self.inner.sessions.close();
        self.inner.sessions.wait().await;
    }

    pub(super) fn is_draining(&self) -> bool {
        self.services().relay.is_draining()
    }

    pub(super) fn config(&self) -> &Config {
        &self.inner.config
    }

    pub(super) fn services(&self) -> &Services {
        &self.inner.services
    }

    pub(super) fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.inner.services.metrics
    }

    /// Returns the tracker of dashboard sessions, which outlive their requests.
    pub(super) fn sessions(&self) -> &TaskTracker {
        &self.inner.sessions
    }

    /// Counts a rejected request, event or connection by its reason.
    pub(super) fn count_rejected(&self, reason: &'static str) {
        self.metrics().rejected.with_label_values(&[reason]).inc();
    }

    /// Counts a refusal of access and returns it as an error for the client.
    pub(super) fn deny(&self, error: &AuthError) -> ApiError {
        let error = ApiError::from(error);
        self.count_rejected(error.code());
        error
    }
}
