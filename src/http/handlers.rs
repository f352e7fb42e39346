//! One handler per resource: what a request asks for and what the response holds.

pub(super) mod assets;
pub(super) mod dead_letters;
pub(super) mod feed;
pub(super) mod health;
pub(super) mod publish;
pub(super) mod pull;
pub(super) mod streams;
pub(super) mod ticket;
pub(super) mod websocket;
pub(super) mod ws_commands;
