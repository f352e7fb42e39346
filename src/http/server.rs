//! The listener: the accept loop, and what it puts around each connection.

pub(super) mod accept;
pub(super) mod maybe_tls;
mod open_connection;
pub(super) mod tls;
mod write_timeout;
