//! The reading side of a connection: bytes in, events and replies out. Does no I/O.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::time::Duration;

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Utf8Bytes};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::relay::session::close::{CloseCode, fitting_reason};

/// Allocated for every connection at once. Most clients send pongs only, of 6 bytes.
const READ_BUFFER: usize = 512;

/// The limits on a client's messages within [`WINDOW`].
const MAX_MESSAGES: u32 = 200;
const MAX_BYTES: usize = 1 << 20;
const WINDOW: Duration = Duration::from_secs(10);

/// The reading side of one connection.
#[derive(Debug)]
pub(crate) struct InboundReader {
    context: WebSocketContext,
    /// Set by a protocol violation: the bytes after it cannot be read as frames.
    is_invalid: bool,
    /// Set when our close frame is sent: limits do not apply any more, only the client's close frame counts.
    is_closing: bool,
    window_began: Instant,
    messages: u32,
    bytes: usize,
    /// Text messages that were not handled yet, in rich mode.
    requests: Option<VecDeque<Utf8Bytes>>,
}

/// The result of reading some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InboundEvent {
    /// No whole frame yet.
    Nothing,
    /// The client is alive.
    Alive,
    /// The client has closed, or answered our close frame. The reply is in the output.
    Closed(Option<u16>),
}

impl InboundReader {
    /// Creates a reader for messages of at most `max_message_bytes`.
    pub(crate) fn new(max_message_bytes: usize, now: Instant) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_write_buffer_size(4096)
            .max_message_size(Some(max_message_bytes))
            .max_frame_size(Some(max_message_bytes));
        let context = WebSocketContext::new(Role::Server, Some(config));
        Self { context, is_invalid: false, is_closing: false, window_began: now, messages: 0, bytes: 0, requests: None }
    }

    /// Keeps text messages from now on, instead of ignoring them.
    pub(crate) fn keep_requests(&mut self) {
        self.requests.get_or_insert_default();
    }

    /// Returns the next text message that was kept.
    pub(crate) fn next_request(&mut self) -> Option<Utf8Bytes> {
        self.requests.as_mut()?.pop_front()
    }

    /// Reads some bytes. Replies to control frames are appended to `output`. An error is the close code that ends the
    /// session.
    pub(crate) fn read(&mut self, input: &[u8], output: &mut Vec<u8>, now: Instant) -> Result<InboundEvent, CloseCode> {
        if self.is_invalid {
            return Ok(InboundEvent::Nothing);
        }
        if self.exceeds_byte_limit(input.len(), now) {
            return Err(self.reject(CloseCode::RateLimited));
        }
        let mut event = InboundEvent::Nothing;
        let mut input_output = BufferedInput { input, output };
        loop {
            match self.context.read(&mut input_output) {
                Ok(Message::Close(frame)) => {
                    event = InboundEvent::Closed(frame.map(|frame| frame.code.into()));
                }
                // In plain mode messages are ignored, but their number is limited.
                Ok(message) => {
                    self.messages += 1;
                    if self.messages > MAX_MESSAGES && !self.is_closing {
                        return Err(self.reject(CloseCode::RateLimited));
                    }
                    if let (Message::Text(text), Some(requests)) = (message, &mut self.requests) {
                        requests.push_back(text);
                    }
                    event = InboundEvent::Alive;
                }
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(event),
                Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                    let is_first = !matches!(event, InboundEvent::Closed(_));
                    return Ok(if is_first { InboundEvent::Closed(None) } else { event });
                }
                Err(Error::Capacity(_)) => return Err(self.reject(CloseCode::TooBig)),
                Err(_) => return Err(self.reject(CloseCode::Protocol)),
            }
        }
    }

    /// Appends our close frame to `output`, unless one was sent before. Nothing may be sent after it.
    pub(crate) fn close(&mut self, code: CloseCode, reason: &str, output: &mut Vec<u8>) {
        self.is_closing = true;
        // Requests get no replies now, and no limit applies to further ones.
        self.requests = None;
        let reason = Utf8Bytes::from(fitting_reason(reason));
        let frame = CloseFrame { code: code.code().into(), reason };
        // Fails only if the client's close frame was read and answered before.
        if let Err(error) = self.context.close(&mut BufferedInput { input: &[], output }, Some(frame)) {
            tracing::trace!(%error, "both sides closed");
        }
    }

    fn reject(&mut self, code: CloseCode) -> CloseCode {
        self.is_invalid = true;
        code
    }

    fn exceeds_byte_limit(&mut self, bytes: usize, now: Instant) -> bool {
        if now.duration_since(self.window_began) >= WINDOW {
            (self.window_began, self.messages, self.bytes) = (now, 0, 0);
        }
        self.bytes += bytes;
        self.bytes > MAX_BYTES && !self.is_closing
    }
}

/// Stands for the socket: the protocol reads received bytes and writes replies.
struct BufferedInput<'a> {
    input: &'a [u8],
    output: &'a mut Vec<u8>,
}

impl Read for BufferedInput<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.input.read(buffer)
    }
}

impl Write for BufferedInput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Checks any input in pieces of any size: no panic, and replies no longer than the input.
#[cfg(any(test, fuzzing))]
pub fn fuzz(piece_bytes: usize, input: &[u8]) {
    let (mut reader, mut output) = (InboundReader::new(65_536, Instant::now()), Vec::new());
    reader.keep_requests();
    for piece in input.chunks(piece_bytes.max(1)) {
        while reader.next_request().is_some() {}
        if let Err(code) = reader.read(piece, &mut output, Instant::now()) {
            reader.close(code, code.reason(), &mut output);
        }
    }
    // The maximum length of a close frame, besides the pongs.
    assert!(output.len() <= input.len() + 127, "{} bytes for {}", output.len(), input.len());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reader() -> InboundReader {
        InboundReader::new(65_536, Instant::now())
    }

    /// Builds a client's frame, masked with zeros.
    fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x80 | opcode];
        if let Ok(len @ 0..=125) = u8::try_from(payload.len()) {
            frame.push(0x80 | len);
        } else {
            frame.push(0xfe);
            frame.extend(u16::try_from(payload.len()).expect("below 64 KiB").to_be_bytes());
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn fuzz_seeds_do_not_panic() {
        let seeds = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/frames")).expect("seeds");
        for seed in seeds {
            let seed = std::fs::read(seed.expect("a seed").path()).expect("a seed");
            for piece_bytes in [0, 1, 7, seed.len()] {
                fuzz(piece_bytes, &seed);
            }
        }
    }

    #[test]
    fn ping_is_answered_and_pong_is_reported() {
        let (mut reader, mut output) = (reader(), Vec::new());
        let bytes = [masked(0x9, b"hi"), masked(0xA, b"")].concat();
        let (front, back) = bytes.split_at(5);
        assert_eq!(reader.read(front, &mut output, Instant::now()), Ok(InboundEvent::Nothing));
        assert_eq!(reader.read(back, &mut output, Instant::now()), Ok(InboundEvent::Alive));
        assert_eq!(output, b"\x8a\x02hi");
    }

    #[test]
    fn close_is_answered_once() {
        let (mut reader, mut output) = (reader(), Vec::new());
        let close = masked(0x8, &1000_u16.to_be_bytes());
        assert_eq!(reader.read(&close, &mut output, Instant::now()), Ok(InboundEvent::Closed(Some(1000))));
        assert_eq!(output, b"\x88\x02\x03\xe8");
        reader.close(CloseCode::GoingAway, "x", &mut output);
        assert_eq!(output.len(), 4);
    }

    #[test]
    fn answer_to_our_close_is_reported() {
        let (mut reader, mut output) = (reader(), Vec::new());
        reader.close(CloseCode::GoingAway, "going_away", &mut output);
        assert_eq!(output, b"\x88\x0c\x0f\xa0going_away");
        let answer = masked(0x8, &4000_u16.to_be_bytes());
        assert_eq!(reader.read(&answer, &mut output, Instant::now()), Ok(InboundEvent::Closed(Some(4000))));
    }

    #[test]
    fn violation_ends_the_session_with_its_code() {
        let unmasked = b"\x81\x01x".to_vec();
        let long = [vec![0x82, 0xff], 65_537_u64.to_be_bytes().to_vec(), vec![0; 4]].concat();
        let cases = [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), CloseCode::Protocol),
            (unmasked, CloseCode::Protocol),
            (masked(0x1, b"\xff"), CloseCode::Protocol),
            (masked(0x3, b""), CloseCode::Protocol),
            (long, CloseCode::TooBig),
        ];
        for (bytes, code) in cases {
            let (mut reader, mut output) = (reader(), Vec::new());
            assert_eq!(reader.read(&bytes, &mut output, Instant::now()), Err(code), "{bytes:?}");
            assert_eq!(reader.read(b"more", &mut output, Instant::now()), Ok(InboundEvent::Nothing));
            reader.close(code, "why", &mut output);
            assert_eq!(output.first(), Some(&0x88), "the close frame can still be sent");
        }
    }

    #[test]
    fn too_many_messages_or_bytes_are_rate_limited() {
        let began = Instant::now();
        let (mut reader, mut output) = (InboundReader::new(65_536, began), Vec::new());
        let text = masked(0x1, b"hello");
        for window in 0..2 {
            for _ in 0..MAX_MESSAGES {
                assert_eq!(reader.read(&text, &mut output, began + WINDOW * window), Ok(InboundEvent::Alive));
            }
        }
        assert_eq!(reader.read(&text, &mut output, began + WINDOW), Err(CloseCode::RateLimited));
        let (mut reader, chunk) = (InboundReader::new(65_536, began), masked(0x2, &vec![0; 60_000]));
        let outcomes: Vec<_> = (0..18).map(|_| reader.read(&chunk, &mut output, began)).collect();
        assert_eq!(outcomes.last(), Some(&Err(CloseCode::RateLimited)), "bytes count as well");
    }

    #[test]
    fn requests_after_our_close_are_dropped() {
        let (mut reader, mut output) = (reader(), Vec::new());
        reader.keep_requests();
        let text = masked(0x1, &vec![b'x'; 60_000]);
        assert_eq!(reader.read(&text, &mut output, Instant::now()), Ok(InboundEvent::Alive));
        assert!(reader.next_request().is_some());
        assert_eq!(reader.read(&text, &mut output, Instant::now()), Ok(InboundEvent::Alive));
        reader.close(CloseCode::GoingAway, "going_away", &mut output);
        for _ in 0..100 {
            assert_eq!(
                reader.read(&text, &mut output, Instant::now()),
                Ok(InboundEvent::Alive),
                "the client may not have read it yet"
            );
        }
        assert_eq!(reader.next_request(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic_or_excess(chunks in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..200), 1..20,
        )) {
            let (mut reader, mut output) = (reader(), Vec::new());
            let mut sent = 0;
            for chunk in chunks {
                sent += chunk.len();
                if let Err(code) = reader.read(&chunk, &mut output, Instant::now()) {
                    reader.close(code, code.reason(), &mut output);
                }
            }
            prop_assert!(output.len() <= sent + 125);
        }
    }
}
