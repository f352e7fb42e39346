//! The sink that writes one line per entry to the daemon's own log.
//!
//! Owns what such a line says. It never holds the payload; of it, only what [`AlertView`] reads as one line for
//! people. While its level is switched off it costs nothing per entry.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tracing::{debug, enabled, error, info, trace, warn};

use super::{Origin, Sink, SinkError};
use crate::event::{AlertView, Delivery, Entry, field};

/// Titles come from outside; a line stays a line.
const TITLE_CHARS: usize = 200;

/// How to log entries.
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
    /// Finer than debugging.
    Trace,
    /// For debugging.
    Debug,
    /// As the daemon's own state changes.
    #[default]
    Info,
    /// As the daemon's own recovered troubles.
    Warn,
    /// As what someone must act on.
    Error,
}

/// Logs entries.
#[derive(Debug)]
pub struct LogSink {
    name: String,
    level: LogLevel,
}

impl LogSink {
    /// A sink of that name.
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
        let line = Line::of(entry);
        // The macros need their level as a constant.
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

/// What a line says of an entry, safe to print.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    severity: &'static str,
    source: Option<String>,
    title: Option<String>,
}

impl Line {
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

impl fmt::Display for Line {
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

/// Without control characters, which could forge lines or drive a terminal, and not too long.
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
    fn a_line_reads_alone_and_cannot_forge_another() {
        let forged = delivery(&[("data", r#"{"severity":"high","source":"zeek","title":"a\nERROR b\u001b[2J"}"#)]);
        let line = Line::of(&forged.entry).to_string();
        assert_eq!(line, "entry of severity high from zeek: a\u{fffd}ERROR b\u{fffd}[2J");
        assert_eq!(Line::of(&delivery(&[("data", "[]")]).entry).to_string(), "entry of severity unknown");
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
    fn every_entry_is_one_line_without_its_payload_and_none_below_the_level() {
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
