//! The shared, read-only log of each stream: the ring of recent frames, and pages of the store behind it.

pub(super) mod frame_batch;
pub(super) mod keyed_rings;
pub(super) mod page_cache;
pub(super) mod page_reader;
pub(super) mod ring;
pub(super) mod tail;
