//! A reconnecting connection to one server, for commands that do not block.
//!
//! While it is down, calls fail at once. If the server turns out not to take writes, it is reconnected, because its name
//! may lead to another server by now. Until then its replies are still used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::backoff::equal_jitter;
use crate::store::redis::config::Settings;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::connection::{Connection, Purpose};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::topology::TopologyWatcher;

/// The maximum wait for the first attempt to connect, at start and by early calls.
pub(crate) const FIRST_ATTEMPT: Duration = Duration::from_secs(2);
const RECONNECT_MIN: Duration = Duration::from_millis(100);

/// The state of the connection.
#[derive(Debug, Clone)]
enum ConnectionState {
    Starting,
    Connected(Arc<Connection>),
    Down(Failure),
}

/// A connection to one server that is reopened when it is lost.
#[derive(Debug, Clone)]
pub(crate) struct ReconnectingConnection {
    state: watch::Receiver<ConnectionState>,
    stop: CancellationToken,
}

impl ReconnectingConnection {
    /// Creates the connection, and the task that keeps it open until `stop` is cancelled or it is closed.
    pub(crate) fn new(
        purpose: &'static str,
        address: Address,
        settings: Arc<Settings>,
        servers: TopologyWatcher,
        stop: &CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, state) = watch::channel(ConnectionState::Starting);
        let stop = stop.child_token();
        let connection = Self { state, stop: stop.clone() };
        (connection, keep_open(purpose, address, settings, servers, sender, stop))
    }

    /// Closes the connection for good.
    pub(crate) fn close(&self) {
        self.stop.cancel();
    }

    /// Waits for the first attempt to connect, within a time limit.
    pub(crate) async fn first_attempt(&self) {
        let mut state = self.state.clone();
        let outcome = timeout(FIRST_ATTEMPT, state.wait_for(|state| !matches!(state, ConnectionState::Starting))).await;
        // If there is no result in time, the calls fail.
        drop(outcome);
    }

    /// Returns the open connection, or why there is none.
    pub(crate) async fn connection(&self) -> Result<Arc<Connection>, Failure> {
        if matches!(*self.state.borrow(), ConnectionState::Starting) {
            self.first_attempt().await;
        }
        match &*self.state.borrow() {
            ConnectionState::Connected(connection) => Ok(Arc::clone(connection)),
            ConnectionState::Down(failure) => Err(failure.clone()),
            ConnectionState::Starting => Err(Failure::unavailable("the server has not replied yet")),
        }
    }
}

async fn keep_open(
    purpose: &'static str,
    address: Address,
    settings: Arc<Settings>,
    servers: TopologyWatcher,
    state: watch::Sender<ConnectionState>,
    stop: CancellationToken,
) {
    let mut pause = RECONNECT_MIN;
    let mut is_reported_down = false;
    while !stop.is_cancelled() {
        let began = Instant::now();
        let opened = tokio::select! {
            () = stop.cancelled() => break,
            opened = Connection::open(&settings, &address, Purpose::Shared) => opened,
        };
        let failure = match opened {
            Ok((connection, router)) => {
                tracing::info!(purpose, server = %address, "connected to the server");
                is_reported_down = false;
                let connection = Arc::new(connection);
                state.send_replace(ConnectionState::Connected(Arc::clone(&connection)));
                let failure = tokio::select! {
                    () = stop.cancelled() => break,
                    () = connection.poisoned.cancelled() => Some(Failure::timeout()),
                    ended = router => Some(match ended {
                        Ok(Err(error)) => Failure::from(error),
                        Ok(Ok(())) | Err(_) => Failure::unavailable("the connection to the server was lost"),
                    }),
                    () = connection.wrong_server.cancelled() => None,
                };
                if failure.is_some() {
                    // Pending calls fail now.
                    connection.end();
                }
                failure
            }
            Err(failure) => Some(failure),
        };
        servers.invalidate();
        if let Some(failure) = failure {
            if !is_reported_down {
                tracing::warn!(purpose, server = %address, reason = %failure.reason, "no connection to the server");
                is_reported_down = true;
            }
            state.send_replace(ConnectionState::Down(failure));
        }
        // A server that accepts connections and fails every command must not cause a busy loop.
        let was_stable = began.elapsed() > settings.reconnect_max * 2;
        pause = if was_stable { RECONNECT_MIN } else { (pause * 2).min(settings.reconnect_max) };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(equal_jitter(pause)) => {}
        }
    }
    state.send_replace(ConnectionState::Down(Failure::unavailable("the store is closed")));
}
