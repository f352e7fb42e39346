//! Asking sinks at start whether they can take anything, so that a receiver that is missing or misconfigured shows before
//! the first entry does.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Sink;
use crate::readiness::Part;
use crate::telemetry::chain;

/// How long one check may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// The first pause between two checks, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// One sink that is asked until it can take entries.
#[derive(Debug)]
pub struct StartCheck {
    name: String,
    sink: Arc<dyn Sink>,
    part: Part,
}

impl StartCheck {
    /// The check of a sink of that name. Its part is ready at once and stays so: entries wait for a sink that is down.
    pub fn new(name: String, sink: Arc<dyn Sink>, part: Part) -> Self {
        part.ready();
        Self { name, sink, part }
    }

    /// Asks the sink again and again until it can take entries; from then on its workers tell. Returns when `stop` is
    /// cancelled.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.ask() => {}
        }
        stop.cancelled().await;
    }

    async fn ask(&self) {
        let (mut pause, mut told) = (PAUSE, None::<String>);
        loop {
            let reason = match timeout(CHECK_TIMEOUT, self.sink.check()).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => chain(&error),
                Err(_elapsed) => format!("its check took more than {CHECK_TIMEOUT:?}"),
            };
            if told.as_ref() != Some(&reason) {
                warn!(sink = self.name, error = reason, "the sink can't take entries yet; trying again");
                self.part.ready_but(format!("the sink can't take entries yet: {reason}"));
                told = Some(reason);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.part.ready();
        if told.is_some() {
            info!(sink = self.name, "the sink can take entries now");
        }
    }
}
