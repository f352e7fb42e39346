//! The client side of WebSocket at the lowest cost: frames are parsed in the buffer that they were read into.
//!
//! Covers the handshake, unmasked server frames split anywhere, and writing of client frames. Of a payload only the
//! first bytes are kept: the events of a measurement have their marks there.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::http::read_head;

/// The number of first bytes of a payload that are kept.
const HEAD_LEN: usize = 192;
/// The longest payload of a control frame.
const MAX_CONTROL: usize = 125;
/// The longest frame header of a server: no mask.
const MAX_HEADER: usize = 10;
/// The bit in the second byte of a frame that announces a mask.
const MASKED: u8 = 0x80;
/// The time limit of a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The kinds of frame that a measurement distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// The first frame of a message.
    Message,
    /// A further frame of a message.
    Continuation,
    /// The other side ends the connection.
    Close,
    /// A request for a pong with the same payload.
    Ping,
    /// A reply to a ping.
    Pong,
}

/// One whole frame, with the first bytes of its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: FrameKind,
    /// The payload's first bytes, all of them in a control frame.
    pub(crate) head: &'a [u8],
}

/// A part of the payload of a frame, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PayloadPart<'a> {
    pub(crate) kind: FrameKind,
    pub(crate) bytes: &'a [u8],
    /// Whether the payload begins with this part.
    pub(crate) is_first: bool,
    /// Whether the payload ends with this part.
    pub(crate) is_last: bool,
}

/// Splits the bytes of one connection into frames, and yields their payload part by part.
#[derive(Debug)]
pub(crate) struct PayloadReader {
    header: [u8; MAX_HEADER],
    header_len: usize,
    kind: FrameKind,
    /// Payload bytes not yet read; `None` while the header is incomplete.
    missing: Option<u64>,
    is_started: bool,
}

impl PayloadReader {
    pub(crate) fn new() -> Self {
        Self { header: [0; MAX_HEADER], header_len: 0, kind: FrameKind::Message, missing: None, is_started: false }
    }

    /// Parses `input` and calls `on_part` for each part of a payload in it.
    pub(crate) fn feed(&mut self, mut input: &[u8], mut on_part: impl FnMut(PayloadPart<'_>)) -> Result<()> {
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
                    (self.kind, self.header_len, self.is_started) = (kind, 0, false);
                    self.missing = Some(payload_len).filter(|len| *len > 0);
                    if payload_len == 0 {
                        on_part(PayloadPart { kind, bytes: &[], is_first: true, is_last: true });
                    }
                }
                continue;
            };
            let take = usize::try_from(missing).unwrap_or(usize::MAX).min(input.len());
            let (bytes, rest) = input.split_at(take);
            let left = missing - take as u64;
            on_part(PayloadPart { kind: self.kind, bytes, is_first: !self.is_started, is_last: left == 0 });
            (self.is_started, self.missing) = (true, Some(left).filter(|left| *left > 0));
            input = rest;
        }
        Ok(())
    }
}

/// Finds the frames in the bytes of one connection, with the first bytes of each payload.
#[derive(Debug)]
pub(crate) struct FrameReader {
    payloads: PayloadReader,
    head: [u8; HEAD_LEN],
    head_len: usize,
}

impl FrameReader {
    pub(crate) fn new() -> Self {
        Self { payloads: PayloadReader::new(), head: [0; HEAD_LEN], head_len: 0 }
    }

    /// Parses `input` and calls `on_frame` for each frame that ends in it.
    pub(crate) fn feed(&mut self, input: &[u8], mut on_frame: impl FnMut(Frame<'_>)) -> Result<()> {
        let Self { payloads, head, head_len } = self;
        payloads.feed(input, |PayloadPart { kind, bytes, is_first, is_last }| {
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

/// Returns kind, header length and payload length of a server frame, or `None` while the header is incomplete.
fn parse_header(input: &[u8]) -> Result<Option<(FrameKind, usize, u64)>> {
    let [first, second, rest @ ..] = input else { return Ok(None) };
    ensure!(first & 0x70 == 0, "a frame uses an extension that was not negotiated");
    ensure!(second & 0x80 == 0, "a frame of the server is masked");
    let kind = match first & 0x0f {
        0 => FrameKind::Continuation,
        1 | 2 => FrameKind::Message,
        8 => FrameKind::Close,
        9 => FrameKind::Ping,
        10 => FrameKind::Pong,
        other => bail!("a frame has the unknown type {other}"),
    };
    Ok(match second & 0x7f {
        126 => rest.first_chunk().map(|len| (kind, 4, u64::from(u16::from_be_bytes(*len)))),
        127 => rest.first_chunk().map(|len| (kind, 10, u64::from_be_bytes(*len))),
        len => Some((kind, 2, u64::from(len))),
    })
}

/// Appends a server text frame around `payload` to `out`.
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

/// Builds a client text frame. The mask is zero: nothing needs hiding on loopback.
pub(crate) fn client_text(payload: &[u8]) -> Vec<u8> {
    client_frame(0x81, payload)
}

/// Builds a client binary frame.
pub(crate) fn client_binary(payload: &[u8]) -> Vec<u8> {
    client_frame(0x82, payload)
}

/// Builds a client pong with the payload of a ping (at most 125 bytes).
pub(crate) fn pong(payload: &[u8]) -> Vec<u8> {
    client_frame(0x8a, &payload[..payload.len().min(MAX_CONTROL)])
}

fn client_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    if let Ok(len @ 0..126) = u8::try_from(payload.len()) {
        frame.push(MASKED | len);
    } else {
        let len = u16::try_from(payload.len()).expect("clients of a measurement send short messages");
        frame.push(MASKED | 0x7e);
        frame.extend_from_slice(&len.to_be_bytes());
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// Builds the handshake request.
pub(crate) fn handshake(address: SocketAddr, path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YXVyb3JhLWJ1cyBiZW5jaA==\r\n\r\n"
    )
    .into_bytes()
}

/// Fails unless the head of the response accepts the handshake.
pub(crate) fn ensure_upgraded(head: &str) -> Result<()> {
    let first = head.lines().next().unwrap_or_default();
    ensure!(first.starts_with("HTTP/1.1 101 "), "the WebSocket handshake was refused: {first}");
    Ok(())
}

/// Opens a WebSocket; returns it with the bytes that the server sent right after the handshake.
pub(crate) fn connect(address: SocketAddr, path: &str) -> Result<(TcpStream, Vec<u8>)> {
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT)
        .with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.write_all(&handshake(address, path)).context("cannot send the WebSocket handshake")?;
    let (head, rest) = read_head(&mut stream)?;
    ensure_upgraded(&head)?;
    Ok((stream, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames_of(pieces: &[&[u8]]) -> Result<Vec<(FrameKind, Vec<u8>)>> {
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
        fn frames_are_found_across_any_split(
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
                payloads.iter().map(|payload| (FrameKind::Message, payload[..payload.len().min(HEAD_LEN)].to_vec())).collect();
            prop_assert_eq!(frames_of(&pieces).unwrap(), expected);
        }

        #[test]
        fn frames_are_found_in_single_bytes(payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4)) {
            let mut wire = Vec::new();
            for payload in &payloads {
                write_server_text(payload, &mut wire);
            }
            let pieces: Vec<&[u8]> = wire.chunks(1).collect();
            prop_assert_eq!(frames_of(&pieces).unwrap().len(), payloads.len());
        }

        #[test]
        fn garbage_never_panics(wire in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(frames_of(&[&wire]));
        }
    }

    #[test]
    fn control_frames_between_messages_are_distinguished() {
        let frames = frames_of(&[b"\x89\x02hi", b"\x81\x01x\x88\x02\x03\xe8"]).unwrap();
        assert_eq!(
            frames,
            [
                (FrameKind::Ping, b"hi".to_vec()),
                (FrameKind::Message, b"x".to_vec()),
                (FrameKind::Close, b"\x03\xe8".to_vec())
            ]
        );
    }

    #[test]
    fn masked_or_extended_frame_is_an_error() {
        frames_of(&[b"\x81\x81\0\0\0\0x"]).unwrap_err();
        frames_of(&[b"\xc1\x01x"]).unwrap_err();
        frames_of(&[b"\x83\x01x"]).unwrap_err();
    }

    #[test]
    fn pong_carries_the_payload_of_the_ping() {
        assert_eq!(pong(b"hi"), b"\x8a\x82\0\0\0\0hi");
    }
}
