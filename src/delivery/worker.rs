//! The worker of one group: takes entries from the store, calls the sink, and settles the outcome.

pub(super) mod breaker;
pub(super) mod event_loop;
pub(super) mod leases;
pub(super) mod metrics;
pub(super) mod queue;
pub(super) mod retries;
pub(super) mod settlements;
pub(super) mod sink_call;
