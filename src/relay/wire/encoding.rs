//! The forms in which alerts travel, and what is told beside them.

use std::fmt::Write as _;

use crate::event::{Position, StreamName};
use crate::relay::wire::frames;

/// How alerts are written for one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// WebSocket: one text message per alert, exactly the stored payload.
    Plain,
    /// The same with `_pos` and `_stream` in each object.
    WithPosition,
    /// WebSocket, `aurora.v1`: JSON frames with a type.
    Rich,
    /// The same for events that are gathered into arrays: `["<position>",<event>]` each.
    Item,
    /// Server-Sent Events. With `ids` each one carries its position as its id, which says all where a client has one
    /// stream; with `meta` its object has `_pos` and `_stream`.
    EventStream { ids: bool, meta: bool },
    /// A line of JSON per alert; with `meta` its object has `_pos` and `_stream`.
    Lines { meta: bool },
}

/// How many forms there are beside [`Form::Plain`].
pub(crate) const VARIANTS: usize = 9;

impl Form {
    /// Its place among the forms that are made on request; nothing for the plain one, which is always there.
    pub(crate) const fn variant(self) -> Option<usize> {
        match self {
            Self::Plain => None,
            Self::WithPosition => Some(0),
            Self::Rich => Some(1),
            Self::EventStream { ids, meta } => Some(2 + 2 * ids as usize + meta as usize),
            Self::Lines { meta } => Some(6 + meta as usize),
            Self::Item => Some(8),
        }
    }

    /// Appends one alert. One that is given before its turn says so, where it says more than its payload.
    pub(crate) fn push(
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
            // What comes before its turn waits for nothing, so it is no part of an array.
            Self::Item if is_early => frames::push_text(out, &rich_event(payload, position, stream, true)),
            Self::Rich => frames::push_text(out, &rich_event(payload, position, stream, is_early)),
            Self::Item => frames::push_text(out, &rich_item(payload, position)),
            Self::EventStream { ids, .. } => {
                // The id says where the client stands.
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
                // In JSON a line break is only ever space between tokens.
                out.extend(payload.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
                out.push(b'\n');
            }
        }
    }

    /// What a client of this form is told; nothing where the form has no words for it.
    pub(crate) fn tell(self, notice: &Notice) -> Option<Vec<u8>> {
        let body = notice.body();
        match (self, notice) {
            (Self::Plain | Self::WithPosition | Self::Lines { meta: false }, _)
            // The subscription tells where the client stands in all its streams at once.
            | (Self::EventStream { .. }, Notice::Mark { .. }) => None,
            (Self::Rich | Self::Item, _) => Some(text_message(&format!(r#"{{"t":"{}",{body}}}"#, notice.kind()))),
            (Self::EventStream { .. }, _) => {
                Some(format!("event: {}\ndata: {{{body}}}\n\n", notice.kind()).into_bytes())
            }
            (Self::Lines { meta: true }, _) => Some(format!("{{\"_{}\":{{{body}}}}}\n", notice.kind()).into_bytes()),
        }
    }
}

/// What is told beside alerts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Notice {
    /// Something that was asked for can't be given.
    Gap {
        stream: StreamName,
        /// The last entry before it, where one is known.
        after: Option<Position>,
        /// The first entry after it, where one is known.
        before: Option<Position>,
        reason: Reason,
    },
    /// Everything up to here is given or does not pass.
    Mark { stream: StreamName, position: Position },
    /// The past is told; what comes now is new.
    Live { stream: StreamName },
}

/// Why something can't be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It was trimmed away.
    Trimmed,
    /// The position is of a life of the stream that is over.
    Epoch,
    /// The stream was lost and has begun anew.
    StateLost,
    /// The store can't read it.
    Unreadable,
    /// The client asked for the latest only, and was behind.
    Lossy,
}

impl Reason {
    /// The reason in one word, for clients and metrics.
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

impl Notice {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Gap { .. } => "gap",
            Self::Mark { .. } => "mark",
            Self::Live { .. } => "live",
        }
    }

    /// Its members. Neither positions nor stream names have characters that JSON escapes.
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

/// One text message of a WebSocket.
pub(crate) fn text_message(text: &str) -> Vec<u8> {
    let mut frame = Vec::with_capacity(text.len() + frames::MAX_HEADER);
    frames::push_text(&mut frame, text.as_bytes());
    frame
}

/// An alert in its envelope. A payload that is no JSON travels as a text in `x` instead of `d`.
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

/// An alert as one of an array. A payload that is no JSON travels as a text in a third place, after `null`.
fn rich_item(payload: &[u8], position: &Position) -> Vec<u8> {
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

    fn written(form: Form, payload: &str) -> String {
        written_as(form, payload, false)
    }

    fn written_as(form: Form, payload: &str, is_early: bool) -> String {
        let mut out = Vec::new();
        form.push(&mut out, payload.as_bytes(), &position(), &stream(), is_early);
        let is_web_socket = matches!(form, Form::Plain | Form::WithPosition | Form::Rich | Form::Item);
        let text = if is_web_socket { frames::payload(&out) } else { &out };
        String::from_utf8(text.to_vec()).expect("text")
    }

    #[test]
    fn an_alert_has_its_shape_in_every_form() {
        let alert = "{\"a\":\r\n1}";
        let cases = [
            (Form::Plain, "{\"a\":\r\n1}"),
            (Form::WithPosition, "{\"a\":\r\n1,\"_pos\":\"e1:5-0\",\"_stream\":\"aurora:alerts\"}"),
            (Form::Rich, "{\"t\":\"event\",\"s\":\"aurora:alerts\",\"p\":\"e1:5-0\",\"d\":{\"a\":\r\n1}}"),
            (Form::Item, "[\"e1:5-0\",{\"a\":\r\n1}]"),
            (Form::EventStream { ids: false, meta: false }, "data: {\"a\":\ndata: 1}\n\n"),
            (Form::EventStream { ids: true, meta: false }, "id: e1:5-0\ndata: {\"a\":\ndata: 1}\n\n"),
            (Form::Lines { meta: false }, "{\"a\":  1}\n"),
            (Form::Lines { meta: true }, "{\"a\":  1,\"_pos\":\"e1:5-0\",\"_stream\":\"aurora:alerts\"}\n"),
        ];
        for (form, expected) in cases {
            assert_eq!(written(form, alert), expected, "{form:?}");
        }
        let early = [
            (Form::Plain, "{}"),
            (Form::WithPosition, r#"{"_pos":"e1:5-0","_stream":"aurora:alerts","_lane":"critical"}"#),
            (Form::Rich, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","lane":"critical","d":{}}"#),
            (Form::Item, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","lane":"critical","d":{}}"#),
            (Form::EventStream { ids: true, meta: false }, "data: {}\n\n"),
        ];
        for (form, expected) in early {
            assert_eq!(written_as(form, "{}", true), expected, "{form:?}");
        }
        let odd = written(Form::Rich, "no \"json\"");
        assert_eq!(odd, r#"{"t":"event","s":"aurora:alerts","p":"e1:5-0","x":"no \"json\""}"#);
        assert_eq!(written(Form::Item, "no \"json\""), r#"["e1:5-0",null,"no \"json\""]"#);
    }

    #[test]
    fn every_form_has_its_own_variant() {
        let bools = [false, true];
        let event_streams = bools.into_iter().flat_map(|ids| bools.map(|meta| Form::EventStream { ids, meta }));
        let lines = bools.map(|meta| Form::Lines { meta });
        let forms = [Form::WithPosition, Form::Rich, Form::Item].into_iter().chain(event_streams).chain(lines);
        let mut variants: Vec<_> = forms.filter_map(Form::variant).collect();
        variants.sort_unstable();
        assert_eq!(variants, (0..VARIANTS).collect::<Vec<_>>());
    }

    #[test]
    fn a_gap_names_its_bounds_as_far_as_they_are_known() {
        let (after, stream) = (Some(position()), stream());
        let gap = Notice::Gap { stream, after, before: None, reason: Reason::Trimmed };
        let body = r#""s":"aurora:alerts","after":"e1:5-0","reason":"trimmed""#;
        let rich = Form::Rich.tell(&gap).expect("told");
        assert_eq!(frames::payload(&rich), format!(r#"{{"t":"gap",{body}}}"#).as_bytes());
        let events = Form::EventStream { ids: false, meta: false }.tell(&gap).expect("told");
        assert_eq!(events, format!("event: gap\ndata: {{{body}}}\n\n").as_bytes());
        assert_eq!(
            Form::Lines { meta: true }.tell(&gap).expect("told"),
            format!("{{\"_gap\":{{{body}}}}}\n").as_bytes()
        );
        assert_eq!(Form::Plain.tell(&gap), None);
    }
}
