//! The encodings of alerts and of control messages.

use std::fmt::Write as _;

use crate::event::{Position, StreamName};
use crate::relay::wire::frames;

/// The encoding of alerts for one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// WebSocket: one text message per alert, exactly the stored payload.
    Plain,
    /// The same with `_pos` and `_stream` in each object.
    WithPosition,
    /// WebSocket, `aurora.v1`: JSON frames with a type.
    Rich,
    /// The same for events in batches: `["<position>",<event>]` each.
    BatchItem,
    /// Server-Sent Events. With `ids` each event carries its position as its id, which is enough for a client of one
    /// stream. With `meta` its object has `_pos` and `_stream`.
    EventStream { ids: bool, meta: bool },
    /// JSON lines, one per alert. With `meta` each object has `_pos` and `_stream`.
    Lines { meta: bool },
}

/// The number of encodings besides [`Encoding::Plain`].
pub(crate) const VARIANTS: usize = 9;

impl Encoding {
    /// Returns the index among the encodings made on request, or `None` for the plain one, which always exists.
    pub(crate) const fn variant_index(self) -> Option<usize> {
        match self {
            Self::Plain => None,
            Self::WithPosition => Some(0),
            Self::Rich => Some(1),
            Self::EventStream { ids, meta } => Some(2 + 2 * ids as usize + meta as usize),
            Self::Lines { meta } => Some(6 + meta as usize),
            Self::BatchItem => Some(8),
        }
    }

    /// Appends one alert. An early alert is labelled, if the encoding has more than the payload.
    pub(crate) fn append_event(
        self,
        out: &mut Vec<u8>,
        payload: &[u8],
        position: &Position,
        stream: &StreamName,
        is_early: bool,
    ) {
        let positioned;
        let has_meta =
            matches!(self, Self::WithPosition | Self::EventStream { meta: true, .. } | Self::Lines { meta: true });
        let payload = if has_meta {
            positioned = frames::with_position(payload, position, stream.as_str(), is_early);
            &*positioned
        } else {
            payload
        };
        match self {
            Self::Plain | Self::WithPosition => frames::push_text(out, payload),
            // An early alert does not wait, so it is not part of a batch.
            Self::BatchItem if is_early => frames::push_text(out, &rich_event(payload, position, stream, true)),
            Self::Rich => frames::push_text(out, &rich_event(payload, position, stream, is_early)),
            Self::BatchItem => frames::push_text(out, &batch_item(payload, position)),
            Self::EventStream { ids, .. } => {
                // The id is the client's position, which an early alert does not move.
                if ids && !is_early {
                    out.extend_from_slice(format!("id: {position}\n").as_bytes());
                }
                // A line break of any kind ends a field; the client joins the lines again.
                let text = String::from_utf8_lossy(payload);
                for line in text.replace("\r\n", "\n").split(['\n', '\r']) {
                    out.extend_from_slice(b"data: ");
                    out.extend_from_slice(line.as_bytes());
                    out.push(b'\n');
                }
                out.push(b'\n');
            }
            Self::Lines { .. } => {
                // In JSON, a line break outside of strings is only white space.
                out.extend(payload.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
                out.push(b'\n');
            }
        }
    }

    /// Encodes a control message. Returns `None` if the encoding cannot express it.
    pub(crate) fn encode_control(self, control: &ControlMessage) -> Option<Vec<u8>> {
        let body = control.body();
        match (self, control) {
            (Self::Plain | Self::WithPosition | Self::Lines { meta: false }, _)
            // The subscription writes one id with the positions in all streams.
            | (Self::EventStream { .. }, ControlMessage::Mark { .. }) => None,
            (Self::Rich | Self::BatchItem, _) => Some(text_message(&format!(r#"{{"t":"{}",{body}}}"#, control.kind()))),
            (Self::EventStream { .. }, _) => {
                Some(format!("event: {}\ndata: {{{body}}}\n\n", control.kind()).into_bytes())
            }
            (Self::Lines { meta: true }, _) => Some(format!("{{\"_{}\":{{{body}}}}}\n", control.kind()).into_bytes()),
        }
    }
}

/// A message besides alerts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ControlMessage {
    /// Requested entries are gone.
    Gap {
        stream: StreamName,
        /// The last entry before the gap, if known.
        after: Option<Position>,
        /// The first entry after the gap, if known.
        before: Option<Position>,
        reason: GapReason,
    },
    /// All entries up to this position are sent or filtered.
    Mark { stream: StreamName, position: Position },
    /// The past is sent: all later entries are new.
    Live { stream: StreamName },
}

/// The reason of a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GapReason {
    /// The entries were trimmed.
    Trimmed,
    /// The position belongs to an epoch that is over.
    Epoch,
    /// The stream was lost and has begun again.
    StateLost,
    /// The store cannot read the entries.
    Unreadable,
    /// The client asked for `mode=latest` and was behind.
    Lossy,
}

impl GapReason {
    /// Returns the reason as one word, for clients and metrics.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Epoch => "epoch",
            Self::StateLost => "state_lost",
            Self::Unreadable => "unreadable",
            Self::Lossy => "lossy",
        }
    }
}

impl ControlMessage {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Gap { .. } => "gap",
            Self::Mark { .. } => "mark",
            Self::Live { .. } => "live",
        }
    }

    /// Returns the properties of the JSON object. Positions and stream names need no escapes.
    fn body(&self) -> String {
        match self {
            Self::Gap { stream, after, before, reason } => {
                let mut body = format!(r#""s":"{stream}""#);
                for (name, position) in [("after", after), ("before", before)] {
                    if let Some(position) = position {
                        write!(body, r#","{name}":"{position}""#).expect("writing to a String succeeds");
                    }
                }
                write!(body, r#","reason":"{}""#, reason.as_str()).expect("writing to a String succeeds");
                body
            }
            Self::Mark { stream, position } => format!(r#""s":"{stream}","p":"{position}""#),
            Self::Live { stream } => format!(r#""s":"{stream}""#),
        }
    }
}

/// Builds one text message of a WebSocket.
pub(crate) fn text_message(text: &str) -> Vec<u8> {
    let mut frame = Vec::with_capacity(text.len() + frames::MAX_HEADER);
    frames::push_text(&mut frame, text.as_bytes());
    frame
}

/// Builds the JSON frame of an alert. A payload that is not JSON becomes a string in `x` instead of `d`.
fn rich_event(payload: &[u8], position: &Position, stream: &StreamName, is_early: bool) -> Vec<u8> {
    let mut event = Vec::with_capacity(payload.len() + 112);
    event.extend_from_slice(format!(r#"{{"t":"event","s":"{stream}","p":"{position}","#).as_bytes());
    if is_early {
        event.extend_from_slice(br#""lane":"critical","#);
    }
    if serde_json::from_slice::<serde::de::IgnoredAny>(payload).is_ok() {
        event.extend_from_slice(br#""d":"#);
        event.extend_from_slice(payload);
    } else {
        event.extend_from_slice(br#""x":"#);
        let text = String::from_utf8_lossy(payload);
        serde_json::to_writer(&mut event, &text).expect("a text can be written to a Vec");
    }
    event.push(b'}');
    event
}

/// Builds an alert of a batch. A payload that is not JSON becomes a string in third place, after `null`.
fn batch_item(payload: &[u8], position: &Position) -> Vec<u8> {
    let mut item = Vec::with_capacity(payload.len() + 64);
    item.extend_from_slice(format!(r#"["{position}","#).as_bytes());
    if serde_json::from_slice::<serde::de::IgnoredAny>(payload).is_ok() {
        item.extend_from_slice(payload);
    } else {
        item.extend_from_slice(b"null,");
        let text = String::from_utf8_lossy(payload);
        serde_json::to_writer(&mut item, &text).expect("a text can be written to a Vec");
    }
    item.push(b']');
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position() -> Position {
        "e1:5-0".parse().expect("a position")
    }

    fn stream() -> StreamName {
        "aurora:alerts".parse().expect("a name")
    }

    fn written(encoding: Encoding, payload: &str) -> String {
        written_as(encoding, payload, false)
    }

    fn written_as(encoding: Encoding, payload: &str, is_early: bool) -> String {
        let mut out = Vec::new();
        encoding.append_event(&mut out, payload.as_bytes(), &position(), &stream(), is_early);
        let is_web_socket =
            matches!(encoding, Encoding::Plain | Encoding::WithPosition | Encoding::Rich | Encoding::BatchItem);
        let text = if is_web_socket { frames::payload(&out) } else { &out };
        String::from_utf8(text.to_vec()).expect("text")
    }

    #[test]
    fn alert_has_its_shape_in_every_encoding() {
        let alert = "{\"a\":\r\n1}";
        let cases = [
            (Encoding::Plain, "{\"a\":\r\n1}"),
            (Encoding::WithPosition, "{\"a\":\r\n1,\"_pos\":\"e1:5-0\",\"_stream\":\"aurora:alerts\"}"),
            (Encoding::Rich, "{\"t\":\"event\",\"s\":\"aurora:alerts\",\"p\":\"e1:5-0\",\"d\":{\"a\":\r\n1}}"),
            (Encoding::BatchItem, "[\"e1:5-0\",{\"a\":\r\n1}]"),
            (Encoding::EventStream { ids: false, meta: false }, "data: {\"a\":\ndata: 1}\n\n"),
            (Encoding::EventStream { ids: true, meta: false }, "id: e1:5-0\ndata: {\"a\":\ndata: 1}\n\n"),
            (Encoding::Lines { meta: false }, "{\"a\":  1}\n"),
            (Encoding::Lines { meta: true }, "{\"a\":  1,\"_pos\":\"e1:5-0\",\"_stream\":\"aurora:alerts\"}\n"),
        ];
        for (encoding, expected) in cases {
            assert_eq!(written(encoding, alert), expected, "{encoding:?}");
        }
        let early = [
            (Encoding::Plain, "{}"),
            (Encoding::WithPosition, r#"{"_pos":"e1:5-0","_stream":"aurora:alerts","_lane":"critical"}"#),
            (Encoding::Rich, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","lane":"critical","d":{}}"#),
            (Encoding::BatchItem, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","lane":"critical","d":{}}"#),
            (Encoding::EventStream { ids: true, meta: false }, "data: {}\n\n"),
        ];
        for (encoding, expected) in early {
            assert_eq!(written_as(encoding, "{}", true), expected, "{encoding:?}");
        }
        let odd = written(Encoding::Rich, "no \"json\"");
        assert_eq!(odd, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","x":"no \"json\""}"#);
        assert_eq!(written(Encoding::BatchItem, "no \"json\""), r#"["e1:5-0",null,"no \"json\""]"#);
    }

    #[test]
    fn every_encoding_has_its_own_index() {
        let bools = [false, true];
        let event_streams = bools.into_iter().flat_map(|ids| bools.map(|meta| Encoding::EventStream { ids, meta }));
        let lines = bools.map(|meta| Encoding::Lines { meta });
        let encodings =
            [Encoding::WithPosition, Encoding::Rich, Encoding::BatchItem].into_iter().chain(event_streams).chain(lines);
        let mut variants: Vec<_> = encodings.filter_map(Encoding::variant_index).collect();
        variants.sort_unstable();
        assert_eq!(variants, (0..VARIANTS).collect::<Vec<_>>());
    }

    #[test]
    fn gap_has_its_known_bounds() {
        let (after, stream) = (Some(position()), stream());
        let gap = ControlMessage::Gap { stream, after, before: None, reason: GapReason::Trimmed };
        let body = r#""s":"aurora:alerts","after":"e1:5-0","reason":"trimmed""#;
        let rich = Encoding::Rich.encode_control(&gap).expect("encoded");
        assert_eq!(frames::payload(&rich), format!(r#"{{"t":"gap",{body}}}"#).as_bytes());
        let events = Encoding::EventStream { ids: false, meta: false }.encode_control(&gap).expect("encoded");
        assert_eq!(events, format!("event: gap\ndata: {{{body}}}\n\n").as_bytes());
        assert_eq!(
            Encoding::Lines { meta: true }.encode_control(&gap).expect("encoded"),
            format!("{{\"_gap\":{{{body}}}}}\n").as_bytes()
        );
        assert_eq!(Encoding::Plain.encode_control(&gap), None);
    }
}
