//! The log sink in the suite.

use std::io::Write;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use aurora_bus::event::Delivery;
use aurora_bus::sink::{LogConfig, Origin, Sink, SinkConfig, SinkError};
use serde_json::Value;
use tracing::Dispatch;
use tracing::instrument::WithSubscriber as _;

use super::{World, build};

/// A log of its own.
pub(super) struct Log {
    lines: Lines,
    dispatch: Dispatch,
}

#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("unpoisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Creates a sink that writes to this log.
#[derive(Debug)]
struct Within {
    inner: Arc<dyn Sink>,
    dispatch: Dispatch,
}

#[async_trait]
impl Sink for Within {
    fn max_batch(&self) -> usize {
        self.inner.max_batch()
    }

    async fn check(&self) -> Result<(), SinkError> {
        self.inner.check().with_subscriber(self.dispatch.clone()).await
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        self.inner.deliver(origin, batch).with_subscriber(self.dispatch.clone()).await
    }
}

#[async_trait]
impl World for Log {
    const TYPE: &str = "log";
    const REFUSES_DUPLICATES: bool = false;

    async fn open() -> Self {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        Self { lines, dispatch: Dispatch::new(subscriber) }
    }

    fn config(&self) -> SinkConfig {
        SinkConfig::Log(LogConfig::default())
    }

    async fn sink(&self) -> Arc<dyn Sink> {
        let inner = build(self.config()).await.expect("a valid configuration");
        Arc::new(Within { inner, dispatch: self.dispatch.clone() })
    }

    async fn effects(&self) -> Vec<String> {
        let text = String::from_utf8(self.lines.0.lock().expect("unpoisoned").clone()).expect("UTF-8");
        let effect = |line: &str| {
            let line: Value = serde_json::from_str(line).expect("a line is a JSON object");
            let field = |name: &str| line["fields"][name].as_str().expect("a text").to_owned();
            format!("{}/{}", field("stream"), field("entry.id"))
        };
        text.lines().map(effect).collect()
    }
}

mod suite {
    super::super::sink_tests!(Log: any_bytes_are_delivered);
}
