//! Groups whose consumers live outside the daemon: kept declared, so that nothing is missed while none of them runs.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::GroupSpec;
use crate::readiness::Part;
use crate::store::Store;

/// How often a group is made sure of: it may vanish with its stream.
const ENSURE_EVERY: Duration = Duration::from_secs(5);
/// The same after a failure.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// One group without a sink.
#[derive(Debug)]
pub struct Declared {
    store: Arc<dyn Store>,
    spec: GroupSpec,
    part: Part,
}

impl Declared {
    /// A group of that stream, which others consume.
    pub fn new(store: Arc<dyn Store>, spec: GroupSpec, part: Part) -> Self {
        Self { store, spec, part }
    }

    /// Makes sure of the group until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let (stream, group) = (&self.spec.stream, &self.spec.config.name);
        loop {
            let pause = match self.store.ensure_group(stream, group, self.spec.config.start.into()).await {
                Ok(created) => {
                    self.part.ready();
                    if created {
                        tracing::info!(stream = %stream, group = %group, "made a group for consumers outside");
                    }
                    ENSURE_EVERY
                }
                Err(error) => {
                    self.part.not_ready(error.to_string());
                    TRY_AGAIN_AFTER
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}
