//! The log sink: writes one line per entry to the log of the daemon.
//!
//! Owns the content of the line. The line never has the payload, only the parts of it that [`AlertView`] reads as one
//! line for people. Entries cost nothing while the level is off.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tracing::{debug, enabled, error, info, trace, warn};

use super::{Origin, Sink, SinkError};
use crate::event::{AlertView, Delivery, Entry, field};

/// Maximum length of a title, in characters. Titles come from producers, and a line must stay a line.
const TITLE_CHARS: usize = 200;

/// The configuration of a log sink.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// The level of the lines: `trace`, `debug`, `info`, `warn` or `error`.
    pub level: LogLevel,
}

/// The level of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Finer than debug.
    Trace,
    /// For debugging.
    Debug,
    /// Like changes of the daemon's own state.
    #[default]
    Info,
    /// Like faults that the daemon recovers from.
    Warn,
    /// Like faults that need an operator.
    Error,
}

/// Writes entries to the log.
#[derive(Debug)]
pub struct LogSink {
    name: String,
    level: LogLevel,
}

impl LogSink {
    /// Creates a sink with this name.
    pub fn new(name: &str, config: &LogConfig) -> Self {
        Self { name: name.to_owned(), level: config.level }
    }

    fn is_enabled(&self) -> bool {
        match self.level {
            LogLevel::Trace => enabled!(tracing::Level::TRACE),
            LogLevel::Debug => enabled!(tracing::Level::DEBUG),
            LogLevel::Info => enabled!(tracing::Level::INFO),
            LogLevel::Warn => enabled!(tracing::Level::WARN),
            LogLevel::Error => enabled!(tracing::Level::ERROR),
        }
    }

    fn log(&self, origin: &Origin, delivery: &Delivery) {
        let entry = &delivery.entry;
        let line = LogLine::of(entry);
        // The macros need the level as a constant.
        macro_rules! line {
            ($level:ident) => {
                $level!(
                    sink = self.name,
                    stream = %origin.stream,
                    group = %origin.group,
                    entry.id = %entry.id,
                    attempt = delivery.attempt,
                    severity = line.severity,
                    source = line.source,
                    title = line.title,
                    "{line}"
                )
            };
        }
        match self.level {
            LogLevel::Trace => line!(trace),
            LogLevel::Debug => line!(debug),
            LogLevel::Info => line!(info),
            LogLevel::Warn => line!(warn),
            LogLevel::Error => line!(error),
        }
    }
}

#[async_trait]
impl Sink for LogSink {
    fn max_batch(&self) -> usize {
        512
    }

    async fn check(&self) -> Result<(), SinkError> {
        Ok(())
    }

    async fn deliver(&self, origin: &Origin, batch: &[Delivery]) -> Result<(), SinkError> {
        if self.is_enabled() {
            for delivery in batch {
                self.log(origin, delivery);
            }
        }
        Ok(())
    }
}

/// The printable parts of an entry.
#[derive(Debug, PartialEq, Eq)]
struct LogLine {
    severity: &'static str,
    source: Option<String>,
    title: Option<String>,
}

impl LogLine {
    fn of(entry: &Entry) -> Self {
        let view = entry.data().and_then(|data| AlertView::parse(data).ok()).unwrap_or_default();
        let severity = entry.fields.text(field::SEVERITY).and_then(|text| text.parse().ok()).or(view.severity);
        let source = entry.fields.text(field::SOURCE).or(view.source.as_deref());
        Self {
            severity: severity.map_or("unknown", crate::event::Severity::as_str),
            source: source.map(printable),
            title: view.title.as_deref().map(printable),
        }
    }
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry of severity {}", self.severity)?;
        if let Some(source) = &self.source {
            write!(f, " from {source}")?;
        }
        match &self.title {
            Some(title) => write!(f, ": {title}"),
            None => Ok(()),
        }
    }
}

/// Replaces control characters, which could forge lines or drive a terminal, and limits the length.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(TITLE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bytes::Bytes;

    use super::*;
    use crate::event::{EntryId, Fields};

    fn delivery(pairs: &[(&'static str, &'static str)]) -> Delivery {
        let fields: Fields = pairs.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect();
        Delivery {
            entry: Entry { id: EntryId::new(5, 1), fields },
            attempt: 1,
            delivered_at: std::time::Instant::now(),
        }
    }

    #[test]
    fn control_characters_cannot_forge_a_line() {
        let forged = delivery(&[("data", r#"{"severity":"high","source":"zeek","title":"a\nERROR b\u001b[2J"}"#)]);
        let line = LogLine::of(&forged.entry).to_string();
        assert_eq!(line, "entry of severity high from zeek: a\u{fffd}ERROR b\u{fffd}[2J");
        assert_eq!(LogLine::of(&delivery(&[("data", "[]")]).entry).to_string(), "entry of severity unknown");
    }

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn entries_are_one_line_each_without_payload() {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber =
            tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(move || writer.clone()).finish();
        let origin = Origin { stream: "aurora:alerts".parse().unwrap(), group: "siem".parse().unwrap() };
        let batch = [
            delivery(&[("severity", "low"), ("data", r#"{"title":"scan","secret":"hunter2"}"#)]),
            delivery(&[("data", r#"{"title":"second"}"#)]),
        ];
        tracing::subscriber::with_default(subscriber, || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            for level in [LogLevel::Info, LogLevel::Debug] {
                let sink = LogSink::new("log", &LogConfig { level });
                runtime.block_on(sink.deliver(&origin, &batch)).unwrap();
            }
        });
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("scan") && text.contains("5-1") && text.contains("aurora:alerts"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}
