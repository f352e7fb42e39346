//! Checks of sinks at start, so that a missing or misconfigured receiver shows before the first entry.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Sink;
use crate::readiness::Part;
use crate::telemetry::chain;

/// Timeout of one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// The first and the longest pause between two checks.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// Checks one sink until it can take entries.
#[derive(Debug)]
pub struct StartCheck {
    name: String,
    sink: Arc<dyn Sink>,
    part: Part,
}

impl StartCheck {
    /// Creates the check of a sink. Its part is ready from the start, because entries wait for a sink that is down.
    pub fn new(name: String, sink: Arc<dyn Sink>, part: Part) -> Self {
        part.ready();
        Self { name, sink, part }
    }

    /// Repeats the check until the sink can take entries. From then on its workers report. Returns when `stop` is
    /// cancelled.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.check_until_ready() => {}
        }
        stop.cancelled().await;
    }

    async fn check_until_ready(&self) {
        let (mut pause, mut reported) = (PAUSE, None::<String>);
        loop {
            let reason = match timeout(CHECK_TIMEOUT, self.sink.check()).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => chain(&error),
                Err(_elapsed) => format!("the check took more than {CHECK_TIMEOUT:?}"),
            };
            if reported.as_ref() != Some(&reason) {
                warn!(sink = self.name, error = reason, "sink cannot take entries yet, trying again");
                self.part.ready_but(format!("the sink cannot take entries yet: {reason}"));
                reported = Some(reason);
            }
            sleep(pause).await;
            pause = (pause * 2).min(MAX_PAUSE);
        }
        self.part.ready();
        if reported.is_some() {
            info!(sink = self.name, "sink can take entries now");
        }
    }
}
