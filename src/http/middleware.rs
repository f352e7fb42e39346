//! Checks that every request passes before its handler, and the limit of large responses.

pub(super) mod authorize;
pub(super) mod cors;
pub(super) mod credentials;
pub(super) mod host_and_rate;
pub(super) mod large_response;
pub(super) mod origin;
pub(super) mod trace;
