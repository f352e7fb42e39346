//! The log of each stream, shared by all clients: the ring of recent frames, and pages of the store behind it.

pub(super) mod frame_batch;
pub(super) mod keyed_rings;
pub(super) mod page_cache;
pub(super) mod page_reader;
pub(super) mod page_size;
pub(super) mod ring;
pub(super) mod tail;
