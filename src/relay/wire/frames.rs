//! Server frames of the WebSocket protocol, ready for the wire.
//!
//! Frames of a server are not masked, so the same bytes serve all clients. Only whole text messages and pings are made
//! here. The protocol's own state in `session::reader` answers the control frames of clients.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::Write as _;

/// The first byte of a whole text message: final, opcode 1.
const TEXT: u8 = 0x81;

/// A ping without payload.
pub(crate) const PING: &[u8] = &[0x89, 0x00];

/// The maximum length of a server frame's header, in bytes.
pub(crate) const MAX_HEADER: usize = 10;

/// Appends one text message.
pub(crate) fn push_text(out: &mut Vec<u8>, payload: &[u8]) {
    push_header(out, payload.len());
    out.extend_from_slice(payload);
}

/// Returns the JSON object `payload` with `_pos` and `_stream` as its last properties, and `_lane` for an early alert.
///
/// Last, so that a parser which keeps the last of equal names takes ours. Other payloads stay as they are.
pub(crate) fn with_position<'a>(
    payload: &'a [u8],
    position: impl Display,
    stream: &str,
    is_early: bool,
) -> Cow<'a, [u8]> {
    let Some(open) = OpenObject::read(payload) else {
        return Cow::Borrowed(payload);
    };
    // Positions and stream names need no escapes.
    let mut object = Vec::with_capacity(open.text.len() + 96);
    object.extend_from_slice(open.text);
    let comma = if open.has_properties { "," } else { "" };
    let lane = if is_early { r#","_lane":"critical""# } else { "" };
    write!(object, r#"{comma}"_pos":"{position}","_stream":"{stream}"{lane}}}"#).expect("writing to a Vec succeeds");
    Cow::Owned(object)
}

/// Returns the payload of a frame made here.
pub(crate) fn payload(frame: &[u8]) -> &[u8] {
    let header = match frame.get(1) {
        Some(126) => 4,
        Some(127) => 10,
        _ => 2,
    };
    frame.get(header..).unwrap_or_default()
}

/// Splits the first frame off some frames made here. Returns `None` at their end.
pub(crate) fn split(frames: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = match *frames.get(1)? {
        126 => 4 + usize::from(u16::from_be_bytes(frames.get(2..4)?.try_into().ok()?)),
        127 => 10 + usize::try_from(u64::from_be_bytes(frames.get(2..10)?.try_into().ok()?)).ok()?,
        short => 2 + usize::from(short),
    };
    frames.split_at_checked(length)
}

fn push_header(out: &mut Vec<u8>, len: usize) {
    out.push(TEXT);
    if let Ok(short @ 0..=125) = u8::try_from(len) {
        out.push(short);
    } else if let Ok(medium) = u16::try_from(len) {
        out.push(126);
        out.extend_from_slice(&medium.to_be_bytes());
    } else {
        out.push(127);
        out.extend_from_slice(&(len as u64).to_be_bytes());
    }
}

/// A JSON object without its closing brace.
struct OpenObject<'a> {
    text: &'a [u8],
    has_properties: bool,
}

impl<'a> OpenObject<'a> {
    fn read(payload: &'a [u8]) -> Option<Self> {
        let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
        let begin = payload.iter().position(|b| !is_space(b))?;
        let end = payload.iter().rposition(|b| !is_space(b))?;
        let is_object = begin < end && payload[begin] == b'{' && payload[end] == b'}';
        let inner = is_object.then(|| &payload[begin + 1..end])?;
        Some(Self { text: &payload[..end], has_properties: !inner.iter().all(is_space) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocket};

    use super::*;

    /// Reads bytes as a client's protocol implementation does.
    fn read_back(bytes: Vec<u8>, count: usize) -> Vec<String> {
        let mut client = WebSocket::from_partially_read(std::io::Cursor::new(Vec::new()), bytes, Role::Client, None);
        let mut texts = Vec::new();
        for _ in 0..count {
            match client.read().expect("a valid frame") {
                Message::Text(text) => texts.push(text.as_str().to_owned()),
                other => panic!("expected a text message, got {other:?}"),
            }
        }
        texts
    }

    #[test]
    fn frame_of_every_length_class_is_read_back() {
        let payloads: Vec<String> = [0, 1, 125, 126, 127, 65_535, 65_536, 70_000].map(|n| "x".repeat(n)).to_vec();
        let mut bytes = Vec::new();
        for text in &payloads {
            let start = bytes.len();
            push_text(&mut bytes, text.as_bytes());
            assert_eq!(payload(&bytes[start..]), text.as_bytes());
        }
        let mut rest = &*bytes;
        for text in &payloads {
            let (frame, others) = split(rest).expect("a frame");
            assert_eq!(payload(frame), text.as_bytes());
            rest = others;
        }
        assert_eq!(split(rest), None);
        assert_eq!(read_back(bytes, payloads.len()), payloads);
    }

    #[test]
    fn position_and_stream_are_the_last_properties() {
        let cases = [
            (r#"{"a":1}"#, r#"{"a":1,"_pos":"e:1-2","_stream":"s"}"#),
            ("{}", r#"{"_pos":"e:1-2","_stream":"s"}"#),
            (" { \n} ", " { \n\"_pos\":\"e:1-2\",\"_stream\":\"s\"}"),
            (r#"{"_pos":"forged"}"#, r#"{"_pos":"forged","_pos":"e:1-2","_stream":"s"}"#),
            ("[1]", "[1]"),
            ("7", "7"),
            ("", ""),
            ("{", "{"),
        ];
        for (payload, expected) in cases {
            let object = with_position(payload.as_bytes(), "e:1-2", "s", false);
            assert_eq!(object, expected.as_bytes(), "{payload}");
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_framing(texts in proptest::collection::vec(".{0,300}", 1..20)) {
            let mut bytes = Vec::new();
            for text in &texts {
                push_text(&mut bytes, text.as_bytes());
            }
            prop_assert_eq!(read_back(bytes, texts.len()), texts);
        }
    }
}
