//! Checks of the server: settings, permissions, clock skew and reply sizes.

pub(super) mod clock_skew;
pub(super) mod diagnostics;
pub(super) mod permissions;
pub(super) mod reply_size;
