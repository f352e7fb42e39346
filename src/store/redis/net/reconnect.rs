//! A line to one server: a connection that is opened again whenever it is lost, for commands that don't block.
//!
//! While it is down, calls fail at once. A server that turns out not to be the one that takes writes is connected to
//! anew, for its name may lead to another one by now; until that is done, what it still answers is taken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::store::redis::config::Settings;
use crate::store::redis::net::address::Address;
use crate::store::redis::net::connection::{Connection, Purpose};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::topology::Servers;

/// How long the first attempt to connect is waited for at start, and by calls that come before its outcome.
pub(crate) const FIRST_ATTEMPT: Duration = Duration::from_secs(2);
const RECONNECT_MIN: Duration = Duration::from_millis(100);

/// How a line is.
#[derive(Debug, Clone)]
enum State {
    Starting,
    Connected(Arc<Connection>),
    Down(Failure),
}

/// A line to one server.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    state: watch::Receiver<State>,
    stop: CancellationToken,
}

impl Line {
    /// The line, and the task that keeps it up until `stop` is cancelled or the line is given up.
    pub(crate) fn new(
        purpose: &'static str,
        address: Address,
        settings: Arc<Settings>,
        servers: Servers,
        stop: &CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (sender, state) = watch::channel(State::Starting);
        let stop = stop.child_token();
        let line = Self { state, stop: stop.clone() };
        (line, keep_up(purpose, address, settings, servers, sender, stop))
    }

    /// Nobody needs the line any more.
    pub(crate) fn give_up(&self) {
        self.stop.cancel();
    }

    /// Waits for the outcome of the first attempt to connect, within bounds.
    pub(crate) async fn first_attempt(&self) {
        let mut state = self.state.clone();
        let outcome = timeout(FIRST_ATTEMPT, state.wait_for(|state| !matches!(state, State::Starting))).await;
        // Without an outcome in time, calls will tell.
        drop(outcome);
    }

    /// The line's connection, or why there is none.
    pub(crate) async fn connection(&self) -> Result<Arc<Connection>, Failure> {
        if matches!(*self.state.borrow(), State::Starting) {
            self.first_attempt().await;
        }
        match &*self.state.borrow() {
            State::Connected(connection) => Ok(Arc::clone(connection)),
            State::Down(failure) => Err(failure.clone()),
            State::Starting => Err(Failure::unavailable("the server has not answered yet")),
        }
    }
}

async fn keep_up(
    purpose: &'static str,
    address: Address,
    settings: Arc<Settings>,
    servers: Servers,
    state: watch::Sender<State>,
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
                state.send_replace(State::Connected(Arc::clone(&connection)));
                let failure = tokio::select! {
                    () = stop.cancelled() => break,
                    () = connection.doubted.cancelled() => Some(Failure::timeout()),
                    ended = router => Some(match ended {
                        Ok(Err(error)) => Failure::from(error),
                        Ok(Ok(())) | Err(_) => Failure::unavailable("the connection to the server was lost"),
                    }),
                    () = connection.misplaced.cancelled() => None,
                };
                if failure.is_some() {
                    // Calls that still wait on it fail now.
                    connection.end();
                }
                failure
            }
            Err(failure) => Some(failure),
        };
        servers.doubt();
        if let Some(failure) = failure {
            if !is_reported_down {
                tracing::warn!(purpose, server = %address, reason = %failure.reason, "no connection to the server");
                is_reported_down = true;
            }
            state.send_replace(State::Down(failure));
        }
        // A server that takes connections and then fails every command must not be asked without pause.
        let was_stable = began.elapsed() > settings.reconnect_max * 2;
        pause = if was_stable { RECONNECT_MIN } else { (pause * 2).min(settings.reconnect_max) };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(jittered(pause)) => {}
        }
    }
    state.send_replace(State::Down(Failure::unavailable("the store is closed")));
}

/// Between half of the pause and all of it, so that many instances don't come back together.
fn jittered(pause: Duration) -> Duration {
    let [byte, ..] = uuid::Uuid::new_v4().into_bytes();
    pause.mul_f64(0.5 + f64::from(byte) / 510.0)
}
