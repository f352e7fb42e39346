//! JSON views that several handlers return.

use serde::Serialize;
use serde_json::value::RawValue;

use crate::dead_letters::FillLevel;
use crate::event::{Entry, StreamName, field};
use crate::http::api::Api;

/// An entry. `data` is the payload as JSON; other payloads are in `data_text`, or in `data_hex` if they are not text.
#[derive(Debug, Serialize)]
pub(super) struct EventView {
    pub(super) id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_hex: Option<String>,
    /// All other fields, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) fields: Vec<(String, String)>,
}

impl From<&Entry> for EventView {
    fn from(entry: &Entry) -> Self {
        let text = |name| entry.fields.text(name).map(str::to_owned);
        let data = entry.data();
        let data_text = data.and_then(|data| std::str::from_utf8(data).ok());
        let data_json = data_text.and_then(|text| serde_json::from_str::<Box<RawValue>>(text).ok());
        let has_own_property =
            |name: &[u8]| [field::ID, field::TIMESTAMP, field::DATA].iter().any(|own| own.as_bytes() == name);
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let others = entry.fields.iter().filter(|(name, _)| !has_own_property(name));
        Self {
            id: entry.id.to_string(),
            event_id: text(field::ID),
            timestamp: text(field::TIMESTAMP),
            data_hex: data.filter(|_| data_text.is_none()).map(|data| format!("{data:x}")),
            data_text: data_text.filter(|_| data_json.is_none()).map(str::to_owned),
            data: data_json,
            fields: others.map(|(name, value)| (lossy(name), lossy(value))).collect(),
        }
    }
}

/// A stream of dead letters and its fill level.
#[derive(Debug, Serialize)]
pub(super) struct FillLevelView {
    stream: String,
    /// The streams whose dead letters it has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) of: Vec<String>,
    length: u64,
    max_len: u64,
    first_id: Option<String>,
    last_id: Option<String>,
    /// A warning if the stream is nearly full.
    #[serde(skip_serializing_if = "Option::is_none")]
    alarm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl FillLevelView {
    /// Reads the fill level of a declared stream's dead letters. Returns `None` if it keeps none.
    pub(super) async fn of_source(api: &Api, source: &StreamName) -> Option<Self> {
        let stream = api.services().dead_letters.stream_of(source)?;
        Some(Self::of_stream(api, &stream).await)
    }

    /// Reads the fill level of a stream of dead letters.
    pub(super) async fn of_stream(api: &Api, stream: &StreamName) -> Self {
        let level = api.services().dead_letters.fill_level(stream).await;
        let error = level.as_ref().err().map(ToString::to_string);
        let level = level.unwrap_or(FillLevel { length: 0, max_len: 0, first_id: None, last_id: None, alarm: None });
        Self {
            stream: stream.to_string(),
            of: Vec::new(),
            length: level.length,
            max_len: level.max_len,
            first_id: level.first_id.map(|id| id.to_string()),
            last_id: level.last_id.map(|id| id.to_string()),
            alarm: level.alarm,
            error,
        }
    }
}
