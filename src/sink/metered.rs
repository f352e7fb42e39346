//! A sink that times and counts the deliveries of another.

use std::sync::Arc;

use async_trait::async_trait;
use prometheus::{Histogram, IntCounter};

use super::{Origin, Sink, SinkError};
use crate::event::Delivery;
use crate::metrics::Metrics;

/// Passes everything on, and measures it by the sink's name. What a sink refuses is counted where it is judged, with
/// what did not end in time.
#[derive(Debug)]
pub struct Metered {
    inner: Arc<dyn Sink>,
    taken: IntCounter,
    seconds: Histogram,
}

impl Metered {
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
impl Sink for Metered {
    fn max_batch(&self) -> usize {
        self.inner.max_batch()
    }

    async fn check(&self) -> Result<(), SinkError> {
        self.inner.check().await
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        // Observes when it is dropped, so that a call that was given up counts as well.
        let _timer = self.seconds.start_timer();
        self.inner.deliver(origin, batch).await?;
        self.taken.inc_by(batch.len() as u64);
        Ok(())
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
