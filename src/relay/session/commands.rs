//! What clients in rich mode ask for that is not the relay's to do: whoever lets them in knows how.

use std::fmt;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

/// The requests that are errands.
pub(crate) const OPS: [&str; 5] = ["pull", "done", "nack", "extend", "publish"];

/// Runs the errands of clients.
pub trait Errands: fmt::Debug + Send + Sync {
    /// Someone who runs those of one client.
    fn runner(&self) -> Box<dyn Runner>;
}

/// Runs the errands of one client: those of the requests `pull`, `done`, `nack`, `extend` and `publish`.
pub trait Runner: Send {
    /// Takes on a request, which is a JSON object. What it is answered comes later, and nothing at all where it says so.
    fn take(&mut self, request: &str);

    /// The next frame for the client, JSON text. Not ready as long as there is none; wakes the task when there is.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<String>;

    /// The client has gone, or, where it `is_sent_away`, is asked to come again: what it has in hand is given to others,
    /// or kept for it. What it was never sent is given to others in any case.
    fn end(self: Box<Self>, is_sent_away: bool) -> BoxFuture<'static, ()>;
}
