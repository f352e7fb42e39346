//! Housekeeping of streams: retention, gauges, loss detection, and removal of idle consumers.

mod consumer_reaper;
mod loss_detector;
mod retention;
mod round_robin;
mod sampler;
mod stream_gauges;

pub use consumer_reaper::Reaper;
pub use retention::{Janitor, Retention, StreamSpec, WhenFull};
pub use round_robin::FamilySpec;
pub use sampler::Sampler;
