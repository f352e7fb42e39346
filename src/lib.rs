//! aurora-bus: an event bus for security operations centres.
//!
//! The library of the `aurora-bus` binary. `ARCHITECTURE.md` has the map of the modules. [`store::Store`] and
//! [`sink::Sink`] are the two main interfaces.

pub mod app;
pub mod auth;
mod backoff;
pub mod bus;
pub mod cli;
mod clock;
pub mod config;
pub mod dead_letters;
pub mod delivery;
pub mod event;
pub mod http;
mod limiter;
mod log_throttle;
pub mod maintenance;
pub mod metrics;
pub mod pull;
pub mod readiness;
pub mod relay;
pub mod secret;
pub mod sink;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod validate;
