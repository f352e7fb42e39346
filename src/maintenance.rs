//! Maintenance of streams: retention, gauges, loss detection, and removal of idle consumers.
//!
//! Owns the [`Scheduler`], which describes each stream once per interval and hands the status to all tasks. Any number of
//! daemons may maintain the same streams: every step is atomic in the store, and the second daemon finds it done. Knows
//! nothing of workers and sinks. Dead letters have a task of their own in `dead_letters`: it describes other streams, and
//! works with the audit stream, which is above this module.

mod consumer_reaper;
mod loss_detector;
mod retention;
mod round_robin;
mod sampler;
mod scheduler;
mod spec;
mod stream_gauges;

pub use scheduler::Scheduler;
pub use spec::{FamilySpec, Retention, StreamSpec, WhenFull};
