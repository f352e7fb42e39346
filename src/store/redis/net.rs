//! Connections to Redis servers: addresses, topology, reconnects, replies and errors.

pub(super) mod address;
pub(super) mod client;
pub(super) mod connection;
pub(super) mod durability;
pub(super) mod error;
pub(super) mod pool;
pub(super) mod reconnect;
pub(super) mod reply;
pub(super) mod script;
pub(super) mod topology;
