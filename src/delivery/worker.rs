//! The worker of one group: fetches entries, passes them to the sink, and settles the outcome.

mod arrivals;
pub(super) mod breaker;
mod claims;
mod context;
pub(super) mod event_loop;
mod in_flight;
mod intake;
pub(super) mod leases;
mod lifecycle;
mod metrics;
mod outcomes;
mod ownership;
pub(super) mod poison;
mod queue;
mod retries;
mod search;
mod settlements;
mod settler;
mod sink_call;
mod sink_health;
mod tasks;
