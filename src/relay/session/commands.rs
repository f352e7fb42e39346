//! Handlers for requests of rich mode that are not subscriptions. The caller that admits a client supplies them.

use std::fmt;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

/// The requests that go to the handler.
pub(crate) const OPS: [&str; 5] = ["pull", "done", "nack", "extend", "publish"];

/// Creates the command handlers of clients.
pub trait CommandHandlerFactory: fmt::Debug + Send + Sync {
    /// Creates the handler of one client.
    fn handler(&self) -> Box<dyn CommandHandler>;
}

/// Handles the requests `pull`, `done`, `nack`, `extend` and `publish` of one client.
pub trait CommandHandler: Send {
    /// Handles a request, which is a JSON object. Replies come later, or not at all if the request asks for none.
    fn handle(&mut self, request: &str);

    /// Returns the next frame for the client, as JSON text. Pending until there is one; then the task is woken.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<String>;

    /// Ends the session: entries that the client has pulled are released for other consumers.
    ///
    /// If the client `will_reconnect`, it keeps them. Entries that were never sent to it are released in any case.
    fn end(self: Box<Self>, will_reconnect: bool) -> BoxFuture<'static, ()>;
}
