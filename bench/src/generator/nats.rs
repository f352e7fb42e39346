//! The part of NATS's protocol that dashboards and publishers need.
//!
//! In a WebSocket the protocol is a stream of bytes with arbitrary frame boundaries: one frame may hold many messages,
//! or a part of one. Messages are therefore counted, not frames.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::payload::{Marks, read_marks};
use crate::websocket::{FrameKind, PayloadReader};

/// The reply to a `PING`, in both directions.
pub(super) const PONG: &[u8] = b"PONG\r\n";
/// The number of first bytes of a message that are kept, enough for its marks.
const HEAD_LEN: usize = 64;
/// The longest line of the protocol, the `INFO` of a server.
const MAX_LINE: usize = 64 << 10;
/// The time limit of a reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

const CONNECT: &str =
    r#"CONNECT {"verbose":false,"pedantic":false,"lang":"aurora-bus-bench","version":"0","protocol":1}"#;

/// Returns the commands that connect and subscribe to a subject.
pub(super) fn subscribe(subject: &str) -> Vec<u8> {
    format!("{CONNECT}\r\nSUB {subject} 1\r\nPING\r\n").into_bytes()
}

/// Finds the messages in the bytes of one WebSocket.
#[derive(Debug)]
pub(super) struct NatsReader {
    payloads: PayloadReader,
    /// The beginning of a line that is not complete.
    line: Vec<u8>,
    /// Bytes of a message not yet read, including its line break.
    missing: usize,
    head: [u8; HEAD_LEN],
    head_len: usize,
}

impl NatsReader {
    pub(super) fn new() -> Self {
        Self { payloads: PayloadReader::new(), line: Vec::new(), missing: 0, head: [0; HEAD_LEN], head_len: 0 }
    }

    /// Parses `input` and calls `on_event` for each event that ends in it; returns the number of pings to reply to.
    pub(super) fn feed(&mut self, input: &[u8], mut on_event: impl FnMut(Marks)) -> Result<usize> {
        let Self { payloads, line, missing, head, head_len } = self;
        let (mut pings, mut outcome) = (0, Ok(()));
        payloads.feed(input, |part| {
            let is_data = matches!(part.kind, FrameKind::Message | FrameKind::Continuation);
            let mut bytes = if is_data { part.bytes } else { &[] };
            while !bytes.is_empty() && outcome.is_ok() {
                if *missing > 0 {
                    let (taken, rest) = bytes.split_at(bytes.len().min(*missing));
                    let keep = taken.len().min(HEAD_LEN - *head_len);
                    head[*head_len..*head_len + keep].copy_from_slice(&taken[..keep]);
                    (*head_len, *missing, bytes) = (*head_len + keep, *missing - taken.len(), rest);
                    if *missing == 0 {
                        read_marks(&head[..*head_len]).into_iter().for_each(&mut on_event);
                        *head_len = 0;
                    }
                    continue;
                }
                let end = bytes.iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| end + 1);
                line.extend_from_slice(&bytes[..end]);
                bytes = &bytes[end..];
                if line.last() == Some(&b'\n') {
                    match parse_line(line) {
                        Ok(Line::Message(len)) => *missing = len + 2,
                        Ok(Line::Ping) => pings += 1,
                        Ok(Line::Other) => {}
                        Err(error) => outcome = Err(error),
                    }
                    line.clear();
                } else if line.len() > MAX_LINE {
                    outcome = Err(anyhow::anyhow!("NATS sent a line of more than {MAX_LINE} bytes"));
                }
            }
        })?;
        outcome.map(|()| pings)
    }
}

/// A line of the protocol.
enum Line {
    /// A message with this number of bytes follows.
    Message(usize),
    Ping,
    Other,
}

fn parse_line(line: &[u8]) -> Result<Line> {
    if line.starts_with(b"MSG ") {
        let text = str::from_utf8(line).context("a line from NATS is not UTF-8")?;
        let len = text.trim_end().rsplit(' ').next().and_then(|len| len.parse().ok());
        return len.map(Line::Message).with_context(|| format!("a message from NATS has no length: {text:?}"));
    }
    ensure!(!line.starts_with(b"-ERR"), "NATS returned an error: {}", String::from_utf8_lossy(line).trim());
    Ok(if line.starts_with(b"PING") { Line::Ping } else { Line::Other })
}

/// A connection that publishes.
#[derive(Debug)]
pub(super) struct NatsPublisher {
    stream: TcpStream,
    output: Vec<u8>,
    input: Vec<u8>,
}

impl NatsPublisher {
    pub(super) fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, REPLY_TIMEOUT)
            .with_context(|| format!("cannot connect to NATS at {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut publisher = Self { stream, output: format!("{CONNECT}\r\n").into_bytes(), input: Vec::new() };
        publisher.flush()?;
        Ok(publisher)
    }

    /// Buffers a message.
    pub(super) fn push(&mut self, subject: &str, payload: &[u8]) {
        self.output.extend_from_slice(format!("PUB {subject} {}\r\n", payload.len()).as_bytes());
        self.output.extend_from_slice(payload);
        self.output.extend_from_slice(b"\r\n");
    }

    /// Sends the buffered messages; returns when the server has processed them.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.output.extend_from_slice(b"PING\r\n");
        self.stream.write_all(&self.output).context("cannot publish to NATS")?;
        self.output.clear();
        loop {
            while let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                if line.starts_with(b"PONG") {
                    return Ok(());
                }
                if let Line::Ping = parse_line(&line)? {
                    self.stream.write_all(PONG).context("cannot reply to NATS")?;
                }
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer).context("cannot read from NATS")? {
                0 => bail!("NATS closed the connection"),
                count => self.input.extend_from_slice(&buffer[..count]),
            }
            ensure!(self.input.len() <= MAX_LINE, "NATS sent a line of more than {MAX_LINE} bytes");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::EventTemplate;
    use crate::websocket::write_server_text;

    #[test]
    fn messages_are_found_across_any_split() {
        let mut stream = b"INFO {\"server_id\":\"X\"}\r\nPONG\r\n".to_vec();
        for sequence in 0..5 {
            stream.extend_from_slice(b"MSG bench 1 400\r\n");
            stream.extend_from_slice(&EventTemplate::new(400).bytes(sequence, sequence * 7));
            stream.extend_from_slice(b"\r\nPING\r\n");
        }
        for frame_len in [1, 7, 100, 401, 10_000] {
            let mut wire = Vec::new();
            stream.chunks(frame_len).for_each(|chunk| write_server_text(chunk, &mut wire));
            for read_len in [1, 64, 1000, 100_000] {
                let (mut reader, mut marks, mut pings) = (NatsReader::new(), Vec::new(), 0);
                for read in wire.chunks(read_len) {
                    pings += reader.feed(read, |mark: Marks| marks.push((mark.sequence, mark.stamp))).unwrap();
                }
                assert_eq!(marks, [(0, 0), (1, 7), (2, 14), (3, 21), (4, 28)], "{frame_len} {read_len}");
                assert_eq!(pings, 5);
            }
        }
    }

    #[test]
    fn error_of_the_server_is_an_error() {
        let mut wire = Vec::new();
        write_server_text(b"-ERR 'Authorization Violation'\r\n", &mut wire);
        let error = NatsReader::new().feed(&wire, |_| ()).unwrap_err().to_string();
        assert!(error.contains("Authorization Violation"), "{error}");
    }
}
