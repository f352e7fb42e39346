//! The bytes for clients: encodings, WebSocket frames, and the write buffer.

pub(super) mod encoding;
pub(super) mod frames;
pub(super) mod write_buffer;
