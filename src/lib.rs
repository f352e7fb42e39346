//! aurora-bus: an event bus for security operations centres.
//!
//! The library behind the `aurora-bus` binary. Read `ARCHITECTURE.md` for the map, and [`store::Store`] and
//! [`sink::Sink`] for the two seams.

pub mod bench;
pub mod delivery;
pub mod event;
pub mod metrics;
pub mod readiness;
pub mod relay;
pub mod sink;
pub mod store;
