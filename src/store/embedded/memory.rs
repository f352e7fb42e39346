//! The state that the embedded store holds in memory: index, groups, leases and waiters.

pub(super) mod groups;
pub(super) mod index;
pub(super) mod leases;
pub(super) mod wait;
