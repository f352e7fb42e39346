//! One module per resource: the requests that it accepts and the responses that it returns.

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
