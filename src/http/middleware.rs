//! What every request passes before its handler: credentials, origins, CORS, and limits of large responses.

pub(super) mod cors;
pub(super) mod credentials;
pub(super) mod large_response;
pub(super) mod origin;
