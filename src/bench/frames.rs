//! The client's side of WebSocket, as cheap as it can be: frames are counted in the buffer they were read into.
//!
//! Knows the handshake, unmasked server frames split anywhere, and how to write a client frame. Of a payload only
//! the first bytes are kept, which is where the events of a measurement carry their marks.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// How many of a payload's first bytes are shown.
const HEAD_LEN: usize = 192;
/// The longest payload of a control frame.
const MAX_CONTROL: usize = 125;
/// The longest frame header of a server: no mask.
const MAX_HEADER: usize = 10;
/// In the second byte of a frame: there is a mask.
const MASKED: u8 = 0x80;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// What kinds of frame a measurement tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The first frame of a message.
    Message,
    /// A further frame of a message.
    Continuation,
    /// The other side says good bye.
    Close,
    /// To be answered with the same payload.
    Ping,
    /// An answer to a ping.
    Pong,
}

/// One whole frame, with the first bytes of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: Kind,
    /// The payload's first bytes, all of them in a control frame.
    pub(crate) head: &'a [u8],
}

/// A part of a frame's payload, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece<'a> {
    pub(crate) kind: Kind,
    pub(crate) bytes: &'a [u8],
    /// Whether the payload begins with it.
    pub(crate) is_first: bool,
    /// Whether the payload ends with it.
    pub(crate) is_last: bool,
}

/// Takes the frames off what is read from one connection.
#[derive(Debug)]
pub(crate) struct Pieces {
    header: [u8; MAX_HEADER],
    header_len: usize,
    kind: Kind,
    /// Payload bytes still to come, once the header is complete.
    missing: Option<u64>,
    is_begun: bool,
}

impl Pieces {
    pub(crate) fn new() -> Self {
        Self { header: [0; MAX_HEADER], header_len: 0, kind: Kind::Message, missing: None, is_begun: false }
    }

    /// Takes what was read and calls `on_piece` for each piece of payload in it.
    pub(crate) fn feed(&mut self, mut input: &[u8], mut on_piece: impl FnMut(Piece<'_>)) -> Result<()> {
        while !input.is_empty() {
            let Some(missing) = self.missing else {
                let header = if self.header_len == 0 { parse_header(input)? } else { None };
                let header = if let Some((kind, header_len, payload_len)) = header {
                    input = &input[header_len..];
                    Some((kind, payload_len))
                } else {
                    self.header[self.header_len] = input[0];
                    self.header_len += 1;
                    input = &input[1..];
                    parse_header(&self.header[..self.header_len])?.map(|(kind, _, payload_len)| (kind, payload_len))
                };
                if let Some((kind, payload_len)) = header {
                    (self.kind, self.header_len, self.is_begun) = (kind, 0, false);
                    self.missing = Some(payload_len).filter(|len| *len > 0);
                    if payload_len == 0 {
                        on_piece(Piece { kind, bytes: &[], is_first: true, is_last: true });
                    }
                }
                continue;
            };
            let take = usize::try_from(missing).unwrap_or(usize::MAX).min(input.len());
            let (bytes, rest) = input.split_at(take);
            let left = missing - take as u64;
            on_piece(Piece { kind: self.kind, bytes, is_first: !self.is_begun, is_last: left == 0 });
            (self.is_begun, self.missing) = (true, Some(left).filter(|left| *left > 0));
            input = rest;
        }
        Ok(())
    }
}

/// Finds the frames in what is read from one connection.
#[derive(Debug)]
pub(crate) struct FrameReader {
    pieces: Pieces,
    head: [u8; HEAD_LEN],
    head_len: usize,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self { pieces: Pieces::new(), head: [0; HEAD_LEN], head_len: 0 }
    }

    /// Takes what was read and calls `on_frame` for each frame that ends in it.
    pub(crate) fn feed(&mut self, input: &[u8], mut on_frame: impl FnMut(Frame<'_>)) -> Result<()> {
        let Self { pieces, head, head_len } = self;
        pieces.feed(input, |Piece { kind, bytes, is_first, is_last }| {
            if is_first && is_last {
                return on_frame(Frame { kind, head: &bytes[..bytes.len().min(HEAD_LEN)] });
            }
            if is_first {
                *head_len = 0;
            }
            let keep = bytes.len().min(HEAD_LEN - *head_len);
            head[*head_len..*head_len + keep].copy_from_slice(&bytes[..keep]);
            *head_len += keep;
            if is_last {
                on_frame(Frame { kind, head: &head[..*head_len] });
            }
        })
    }
}

/// A server frame's kind, header length and payload length; nothing while the header is incomplete.
fn parse_header(input: &[u8]) -> Result<Option<(Kind, usize, u64)>> {
    let [first, second, rest @ ..] = input else { return Ok(None) };
    ensure!(first & 0x70 == 0, "a frame uses an extension that was not agreed on");
    ensure!(second & 0x80 == 0, "a server's frame is masked");
    let kind = match first & 0x0f {
        0 => Kind::Continuation,
        1 | 2 => Kind::Message,
        8 => Kind::Close,
        9 => Kind::Ping,
        10 => Kind::Pong,
        other => bail!("a frame has the unknown type {other}"),
    };
    Ok(match second & 0x7f {
        126 => rest.first_chunk().map(|len| (kind, 4, u64::from(u16::from_be_bytes(*len)))),
        127 => rest.first_chunk().map(|len| (kind, 10, u64::from_be_bytes(*len))),
        len => Some((kind, 2, u64::from(len))),
    })
}

/// A server's text frame around `payload`, appended to `out`.
pub(crate) fn write_server_text(payload: &[u8], out: &mut Vec<u8>) {
    out.push(0x81);
    match (payload.len(), u16::try_from(payload.len())) {
        (len @ 0..126, _) => out.push(u8::try_from(len).expect("it is less than 126")),
        (_, Ok(len)) => {
            out.push(126);
            out.extend_from_slice(&len.to_be_bytes());
        }
        (len, Err(_)) => {
            out.push(127);
            out.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

/// A client's text frame. The mask is zero: it hides nothing here.
pub(crate) fn client_text(payload: &[u8]) -> Vec<u8> {
    client_frame(0x81, payload)
}

/// A client's frame of bytes.
pub(crate) fn client_binary(payload: &[u8]) -> Vec<u8> {
    client_frame(0x82, payload)
}

/// A client's pong with the payload of a ping (at most 125 bytes).
pub(crate) fn pong(payload: &[u8]) -> Vec<u8> {
    client_frame(0x8a, &payload[..payload.len().min(MAX_CONTROL)])
}

fn client_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    if let Ok(len @ 0..126) = u8::try_from(payload.len()) {
        frame.push(MASKED | len);
    } else {
        let len = u16::try_from(payload.len()).expect("clients of a measurement send little");
        frame.push(MASKED | 0x7e);
        frame.extend_from_slice(&len.to_be_bytes());
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// The request for a WebSocket.
pub(crate) fn handshake(address: SocketAddr, path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YXVyb3JhLWJ1cyBiZW5jaA==\r\n\r\n"
    )
    .into_bytes()
}

/// Fails unless the head of an answer says that there is a WebSocket now.
pub(crate) fn must_switch(head: &str) -> Result<()> {
    let first = head.lines().next().unwrap_or_default();
    ensure!(first.starts_with("HTTP/1.1 101 "), "the WebSocket handshake was refused: {first}");
    Ok(())
}

/// Opens a WebSocket; returns it with what the server sent right after the handshake.
pub(crate) fn connect(address: SocketAddr, path: &str) -> Result<(TcpStream, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.write_all(&handshake(address, path)).context("cannot send the WebSocket handshake")?;
    let (head, rest) = read_head(&mut stream)?;
    must_switch(&head)?;
    Ok((stream, rest))
}

/// Reads an HTTP head, of a request or a response; returns it with what came after it.
pub(crate) fn read_head(stream: &mut impl Read) -> Result<(String, Vec<u8>)> {
    let mut input = Vec::with_capacity(1024);
    loop {
        if let Some(end) = input.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = input.split_off(end + 4);
            return Ok((String::from_utf8(input).context("an HTTP head is not text")?, rest));
        }
        ensure!(input.len() < 64 << 10, "an HTTP head is longer than 64 KiB");
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).context("cannot read an HTTP head")?;
        ensure!(count > 0, "the connection was closed before an HTTP head was complete");
        input.extend_from_slice(&buffer[..count]);
    }
}

/// The value of a header in an HTTP head.
pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames_of(pieces: &[&[u8]]) -> Result<Vec<(Kind, Vec<u8>)>> {
        let mut reader = FrameReader::new();
        let mut frames = Vec::new();
        for piece in pieces {
            reader.feed(piece, |frame| frames.push((frame.kind, frame.head.to_vec())))?;
        }
        Ok(frames)
    }

    fn payload() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![0_usize..4, 120_usize..130, 400_usize..600, Just(65_535_usize), Just(65_536_usize)]
            .prop_map(|len| (0..len).map(|at| b"0123456789"[at % 10]).collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn frames_are_found_wherever_reads_split_them(
            payloads in prop::collection::vec(payload(), 1..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut wire = Vec::new();
            for payload in &payloads {
                write_server_text(payload, &mut wire);
            }
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).chain([0, wire.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &wire[pair[0]..pair[1]]).collect();

            let expected: Vec<_> =
                payloads.iter().map(|payload| (Kind::Message, payload[..payload.len().min(HEAD_LEN)].to_vec())).collect();
            prop_assert_eq!(frames_of(&pieces).unwrap(), expected);
        }

        #[test]
        fn single_bytes_are_enough(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4)) {
            let mut wire = Vec::new();
            for payload in &payloads {
                write_server_text(payload, &mut wire);
            }
            let pieces: Vec<&[u8]> = wire.chunks(1).collect();
            prop_assert_eq!(frames_of(&pieces).unwrap().len(), payloads.len());
        }

        #[test]
        fn garbage_is_an_error_but_never_a_panic(wire in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(frames_of(&[&wire]));
        }
    }

    #[test]
    fn control_frames_between_messages_are_told_apart() {
        let frames = frames_of(&[b"\x89\x02hi", b"\x81\x01x\x88\x02\x03\xe8"]).unwrap();
        assert_eq!(
            frames,
            [(Kind::Ping, b"hi".to_vec()), (Kind::Message, b"x".to_vec()), (Kind::Close, b"\x03\xe8".to_vec())]
        );
    }

    #[test]
    fn a_masked_or_extended_frame_is_refused() {
        frames_of(&[b"\x81\x81\0\0\0\0x"]).unwrap_err();
        frames_of(&[b"\xc1\x01x"]).unwrap_err();
        frames_of(&[b"\x83\x01x"]).unwrap_err();
    }

    #[test]
    fn a_pong_carries_the_pings_payload_under_a_mask() {
        assert_eq!(pong(b"hi"), b"\x8a\x82\0\0\0\0hi");
    }

    #[test]
    fn headers_are_found_whatever_their_case() {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n";
        assert_eq!(header(head, "Content-Length"), Some("12"));
        assert_eq!(header(head, "Content-Type"), None);
    }
}
