//! What a client sends: control frames, mostly. Bytes in, protocol events and answers out; no I/O here.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::time::Duration;

use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Utf8Bytes};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::relay::CloseCode;
use crate::relay::session::close::fitting_reason;

/// Eagerly allocated for every connection. Pongs, all that most clients ever send, have 6 bytes.
const READ_BUFFER: usize = 512;

/// What a client may send within [`WINDOW`].
const MAX_MESSAGES: u32 = 200;
const MAX_BYTES: usize = 1 << 20;
const WINDOW: Duration = Duration::from_secs(10);

/// The reading side of one connection.
#[derive(Debug)]
pub(crate) struct Inbound {
    context: WebSocketContext,
    /// After a violation nothing that follows can be read as frames.
    is_garbled: bool,
    /// Once our close frame is on its way, limits don't matter any more: only its answer does.
    is_closing: bool,
    window_began: Instant,
    messages: u32,
    bytes: usize,
    /// Texts that came and were not looked at yet, where anybody wants them.
    requests: Option<VecDeque<Utf8Bytes>>,
}

/// What some bytes told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// Nothing yet.
    Nothing,
    /// The client is alive.
    Alive,
    /// The client has closed, or answered our close. What is to be answered is in the output.
    Closed(Option<u16>),
}

impl Inbound {
    /// For a connection whose client must not send longer messages than `max_message_bytes`.
    pub(crate) fn new(max_message_bytes: usize, now: Instant) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .write_buffer_size(0)
            .max_write_buffer_size(4096)
            .max_message_size(Some(max_message_bytes))
            .max_frame_size(Some(max_message_bytes));
        let context = WebSocketContext::new(Role::Server, Some(config));
        Self { context, is_garbled: false, is_closing: false, window_began: now, messages: 0, bytes: 0, requests: None }
    }

    /// From now on texts are kept, instead of being ignored.
    pub(crate) fn keep_requests(&mut self) {
        self.requests.get_or_insert_default();
    }

    /// The next text that was kept.
    pub(crate) fn next_request(&mut self) -> Option<Utf8Bytes> {
        self.requests.as_mut()?.pop_front()
    }

    /// Reads some bytes. Answers to control frames are appended to `output`. An error is how the session must end.
    pub(crate) fn read(&mut self, input: &[u8], output: &mut Vec<u8>, now: Instant) -> Result<Heard, CloseCode> {
        if self.is_garbled {
            return Ok(Heard::Nothing);
        }
        if self.is_too_much(input.len(), now) {
            return Err(self.garbled(CloseCode::RateLimited));
        }
        let mut heard = Heard::Nothing;
        let mut pipe = Pipe { input, output };
        loop {
            match self.context.read(&mut pipe) {
                Ok(Message::Close(frame)) => {
                    heard = Heard::Closed(frame.map(|frame| frame.code.into()));
                }
                // In plain mode a client has nothing to say: its messages are ignored, but not without limit.
                Ok(message) => {
                    self.messages += 1;
                    if self.messages > MAX_MESSAGES && !self.is_closing {
                        return Err(self.garbled(CloseCode::RateLimited));
                    }
                    if let (Message::Text(text), Some(requests)) = (message, &mut self.requests) {
                        requests.push_back(text);
                    }
                    heard = Heard::Alive;
                }
                Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(heard),
                Err(Error::ConnectionClosed | Error::AlreadyClosed) => {
                    let is_news = !matches!(heard, Heard::Closed(_));
                    return Ok(if is_news { Heard::Closed(None) } else { heard });
                }
                Err(Error::Capacity(_)) => return Err(self.garbled(CloseCode::TooBig)),
                Err(_) => return Err(self.garbled(CloseCode::Protocol)),
            }
        }
    }

    /// Appends our close frame to `output`, unless one was sent already. Nothing may be sent after it.
    pub(crate) fn close(&mut self, code: CloseCode, reason: &str, output: &mut Vec<u8>) {
        self.is_closing = true;
        // Nobody answers them any more, and nothing limits how many still come.
        self.requests = None;
        let reason = Utf8Bytes::from(fitting_reason(reason));
        let frame = CloseFrame { code: code.code().into(), reason };
        // Fails only where the client's close was read before, and answered.
        if let Err(error) = self.context.close(&mut Pipe { input: &[], output }, Some(frame)) {
            tracing::trace!(%error, "both sides closed");
        }
    }

    fn garbled(&mut self, code: CloseCode) -> CloseCode {
        self.is_garbled = true;
        code
    }

    fn is_too_much(&mut self, bytes: usize, now: Instant) -> bool {
        if now.duration_since(self.window_began) >= WINDOW {
            (self.window_began, self.messages, self.bytes) = (now, 0, 0);
        }
        self.bytes += bytes;
        self.bytes > MAX_BYTES && !self.is_closing
    }
}

/// Stands for the socket: the protocol reads what has come and writes what is to go.
struct Pipe<'a> {
    input: &'a [u8],
    output: &'a mut Vec<u8>,
}

impl Read for Pipe<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.input.read(buffer)
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whatever a client sends, in whatever pieces: no panic, and no more answered than it sent.
#[cfg(any(test, fuzzing))]
pub fn fuzz(piece_bytes: usize, input: &[u8]) {
    let (mut inbound, mut output) = (Inbound::new(65_536, Instant::now()), Vec::new());
    inbound.keep_requests();
    for piece in input.chunks(piece_bytes.max(1)) {
        while inbound.next_request().is_some() {}
        if let Err(code) = inbound.read(piece, &mut output, Instant::now()) {
            inbound.close(code, code.reason(), &mut output);
        }
    }
    // The longest a close frame may be, besides the pongs.
    assert!(output.len() <= input.len() + 127, "{} bytes for {}", output.len(), input.len());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn inbound() -> Inbound {
        Inbound::new(65_536, Instant::now())
    }

    /// A frame as a client sends it, masked with zeros.
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
    fn the_seeds_of_the_fuzzer_do_no_harm() {
        let seeds = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/frames")).expect("seeds");
        for seed in seeds {
            let seed = std::fs::read(seed.expect("a seed").path()).expect("a seed");
            for piece_bytes in [0, 1, 7, seed.len()] {
                fuzz(piece_bytes, &seed);
            }
        }
    }

    #[test]
    fn a_ping_is_answered_and_a_pong_is_heard() {
        let (mut inbound, mut output) = (inbound(), Vec::new());
        let bytes = [masked(0x9, b"hi"), masked(0xA, b"")].concat();
        let (front, back) = bytes.split_at(5);
        assert_eq!(inbound.read(front, &mut output, Instant::now()), Ok(Heard::Nothing));
        assert_eq!(inbound.read(back, &mut output, Instant::now()), Ok(Heard::Alive));
        assert_eq!(output, b"\x8a\x02hi");
    }

    #[test]
    fn a_close_is_answered_once() {
        let (mut inbound, mut output) = (inbound(), Vec::new());
        let close = masked(0x8, &1000_u16.to_be_bytes());
        assert_eq!(inbound.read(&close, &mut output, Instant::now()), Ok(Heard::Closed(Some(1000))));
        assert_eq!(output, b"\x88\x02\x03\xe8");
        inbound.close(CloseCode::GoingAway, "x", &mut output);
        assert_eq!(output.len(), 4);
    }

    #[test]
    fn the_answer_to_our_close_is_heard() {
        let (mut inbound, mut output) = (inbound(), Vec::new());
        inbound.close(CloseCode::GoingAway, "going_away", &mut output);
        assert_eq!(output, b"\x88\x0c\x0f\xa0going_away");
        let answer = masked(0x8, &4000_u16.to_be_bytes());
        assert_eq!(inbound.read(&answer, &mut output, Instant::now()), Ok(Heard::Closed(Some(4000))));
    }

    #[test]
    fn violations_end_the_session_with_their_code() {
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
            let (mut inbound, mut output) = (inbound(), Vec::new());
            assert_eq!(inbound.read(&bytes, &mut output, Instant::now()), Err(code), "{bytes:?}");
            assert_eq!(inbound.read(b"more", &mut output, Instant::now()), Ok(Heard::Nothing));
            inbound.close(code, "why", &mut output);
            assert_eq!(output.first(), Some(&0x88), "the close frame can still be sent");
        }
    }

    #[test]
    fn a_client_that_sends_too_much_within_a_window_is_stopped() {
        let began = Instant::now();
        let (mut inbound, mut output) = (Inbound::new(65_536, began), Vec::new());
        let text = masked(0x1, b"hello");
        for window in 0..2 {
            for _ in 0..MAX_MESSAGES {
                assert_eq!(inbound.read(&text, &mut output, began + WINDOW * window), Ok(Heard::Alive));
            }
        }
        assert_eq!(inbound.read(&text, &mut output, began + WINDOW), Err(CloseCode::RateLimited));
        let (mut inbound, chunk) = (Inbound::new(65_536, began), masked(0x2, &vec![0; 60_000]));
        let outcomes: Vec<_> = (0..18).map(|_| inbound.read(&chunk, &mut output, began)).collect();
        assert_eq!(outcomes.last(), Some(&Err(CloseCode::RateLimited)), "bytes count as well");
    }

    #[test]
    fn nothing_is_kept_of_what_a_client_says_after_our_close() {
        let (mut inbound, mut output) = (inbound(), Vec::new());
        inbound.keep_requests();
        let text = masked(0x1, &vec![b'x'; 60_000]);
        assert_eq!(inbound.read(&text, &mut output, Instant::now()), Ok(Heard::Alive));
        assert!(inbound.next_request().is_some());
        assert_eq!(inbound.read(&text, &mut output, Instant::now()), Ok(Heard::Alive));
        inbound.close(CloseCode::GoingAway, "going_away", &mut output);
        for _ in 0..100 {
            assert_eq!(inbound.read(&text, &mut output, Instant::now()), Ok(Heard::Alive), "it may not have heard");
        }
        assert_eq!(inbound.next_request(), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_answer_without_bound(chunks in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..200), 1..20,
        )) {
            let (mut inbound, mut output) = (inbound(), Vec::new());
            let mut sent = 0;
            for chunk in chunks {
                sent += chunk.len();
                if let Err(code) = inbound.read(&chunk, &mut output, Instant::now()) {
                    inbound.close(code, code.reason(), &mut output);
                }
            }
            prop_assert!(output.len() <= sent + 125);
        }
    }
}
