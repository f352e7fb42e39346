//! Logs: one subscriber for the process, on standard error. Also formats error chains.

use std::error::Error;
use std::io::IsTerminal as _;

use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::set_global_default;
use tracing_log::{AsLog as _, LogTracer};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::validate::{Problems, Validate};

/// Level and format of the logs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`), or levels by module: `info,aurora_bus::relay=debug`.
    pub level: String,
    /// The format of a line.
    pub format: Format,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".to_owned(), format: Format::Auto }
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if let Err(error) = EnvFilter::try_new(&self.level) {
            problems.add("level", error);
        }
    }
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Pretty on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Pretty,
    /// One JSON object per line.
    Json,
}

/// A failure to start logging.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is not valid.
    #[error("log.level: {0}")]
    Level(#[from] tracing_subscriber::filter::ParseError),
    /// A subscriber is installed already.
    #[error("logging is already started")]
    Started,
}

/// Starts logging for the whole process.
pub fn init(config: &Config) -> Result<(), TelemetryError> {
    let mut filter = EnvFilter::try_new(&config.level)?;
    if !config.level.contains("fred") {
        // The Redis client warns about each failed command of an outage. The caller of the command reports those.
        filter = filter.add_directive("fred=error".parse()?);
    }
    let is_pretty = match config.format {
        Format::Auto => std::io::stderr().is_terminal(),
        Format::Pretty => true,
        Format::Json => false,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::stderr().is_terminal());
    if is_pretty {
        set_global_default(subscriber.with_target(false).finish())
    } else {
        set_global_default(subscriber.json().flatten_event(true).with_current_span(true).with_span_list(false).finish())
    }
    .map_err(|_error| TelemetryError::Started)?;
    // At its finest levels the WebSocket library logs the messages of clients, with tokens in them. It is always ignored.
    let others = LogTracer::builder().ignore_crate("tungstenite").with_max_level(LevelFilter::current().as_log());
    others.init().map_err(|_error| TelemetryError::Started)
}

/// Formats an error with all its causes, on one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Returns the innermost cause. HTTP clients repeat the same text in several layers.
pub fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
