//! The files of the embedded store: schema, chunks, watermarks, reserve and the directory lock.

pub(super) mod chunk;
pub(super) mod corruption;
pub(super) mod lock;
pub(super) mod reserve;
pub(super) mod schema;
pub(super) mod watermarks;
