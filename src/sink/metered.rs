//! Metrics of sink calls.

use std::sync::Arc;

use async_trait::async_trait;
use prometheus::{Histogram, IntCounter};

use super::{Origin, Sink, SinkError};
use crate::event::Delivery;
use crate::metrics::Metrics;

/// Wraps a sink and measures its calls. Refused entries are counted by the caller, which also counts timeouts.
#[derive(Debug)]
pub struct MeteredSink {
    inner: Arc<dyn Sink>,
    taken: IntCounter,
    seconds: Histogram,
}

impl MeteredSink {
    /// Measures `inner`.
    pub fn new(name: &str, inner: Arc<dyn Sink>, metrics: &Metrics) -> Self {
        Self {
            inner,
            taken: metrics.sink_deliveries.with_label_values(&[name]),
            seconds: metrics.sink_seconds.with_label_values(&[name]),
        }
    }
}

#[async_trait]
impl Sink for MeteredSink {
    fn max_batch(&self) -> usize {
        self.inner.max_batch()
    }

    async fn check(&self) -> Result<(), SinkError> {
        self.inner.check().await
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        // Observes on drop, so that a cancelled call counts too.
        let _timer = self.seconds.start_timer();
        self.inner.deliver(origin, batch).await?;
        self.taken.inc_by(batch.len() as u64);
        Ok(())
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
