//! As much of NATS's protocol as a dashboard and a publisher need.
//!
//! In a WebSocket the protocol is a stream of bytes that the server cuts into frames as it likes: many messages in one
//! frame, or one in many. So messages are counted, not frames.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::frames::{Kind, Pieces};
use crate::bench::payload::read_marks;

/// The answer to a `PING`, either way.
pub(super) const PONG: &[u8] = b"PONG\r\n";
/// How much of a message is kept: enough for its marks.
const HEAD_LEN: usize = 64;
/// The longest line of the protocol: what a server tells of itself.
const MAX_LINE: usize = 64 << 10;
/// How long the server may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

const CONNECT: &str =
    r#"CONNECT {"verbose":false,"pedantic":false,"lang":"aurora-bus-bench","version":"0","protocol":1}"#;

/// What a client says to be given all messages of a subject.
pub(super) fn subscribe(subject: &str) -> Vec<u8> {
    format!("{CONNECT}\r\nSUB {subject} 1\r\nPING\r\n").into_bytes()
}

/// Finds the messages in what a server sends to a WebSocket.
#[derive(Debug)]
pub(super) struct NatsReader {
    pieces: Pieces,
    /// The front of a line whose end has not come.
    line: Vec<u8>,
    /// Bytes of a message still to come, with its line break.
    missing: usize,
    head: [u8; HEAD_LEN],
    head_len: usize,
}

impl NatsReader {
    pub(super) fn new() -> Self {
        Self { pieces: Pieces::new(), line: Vec::new(), missing: 0, head: [0; HEAD_LEN], head_len: 0 }
    }

    /// Takes what was read and calls `on_event` with the marks of each message that ends in it; says how many pings are
    /// to be answered.
    pub(super) fn feed(&mut self, input: &[u8], mut on_event: impl FnMut((u64, u64))) -> Result<usize> {
        let Self { pieces, line, missing, head, head_len } = self;
        let (mut pings, mut outcome) = (0, Ok(()));
        pieces.feed(input, |piece| {
            let mut bytes = if matches!(piece.kind, Kind::Message | Kind::Continuation) { piece.bytes } else { &[] };
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
                    match understand(line) {
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

/// What a line of the protocol says.
enum Line {
    /// A message of so many bytes follows.
    Message(usize),
    Ping,
    Other,
}

fn understand(line: &[u8]) -> Result<Line> {
    if line.starts_with(b"MSG ") {
        let text = str::from_utf8(line).context("a line of NATS is not text")?;
        let len = text.trim_end().rsplit(' ').next().and_then(|len| len.parse().ok());
        return len.map(Line::Message).with_context(|| format!("NATS announced a message without a length: {text:?}"));
    }
    ensure!(!line.starts_with(b"-ERR"), "NATS answered: {}", String::from_utf8_lossy(line).trim());
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
        let stream = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT)
            .with_context(|| format!("cannot connect to NATS at {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let mut publisher = Self { stream, output: format!("{CONNECT}\r\n").into_bytes(), input: Vec::new() };
        publisher.flush()?;
        Ok(publisher)
    }

    /// Collects a message.
    pub(super) fn push(&mut self, subject: &str, payload: &[u8]) {
        self.output.extend_from_slice(format!("PUB {subject} {}\r\n", payload.len()).as_bytes());
        self.output.extend_from_slice(payload);
        self.output.extend_from_slice(b"\r\n");
    }

    /// Sends what was collected; returns once the server has taken it in.
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
                if let Line::Ping = understand(&line)? {
                    self.stream.write_all(PONG).context("cannot answer NATS")?;
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
    use crate::bench::frames::write_server_text;
    use crate::bench::payload::Template;

    #[test]
    fn messages_are_found_however_they_are_cut_into_frames_and_reads() {
        let mut stream = b"INFO {\"server_id\":\"X\"}\r\nPONG\r\n".to_vec();
        for sequence in 0..5 {
            stream.extend_from_slice(b"MSG bench 1 400\r\n");
            stream.extend_from_slice(&Template::new(400).bytes(sequence, sequence * 7));
            stream.extend_from_slice(b"\r\nPING\r\n");
        }
        for frame_len in [1, 7, 100, 401, 10_000] {
            let mut wire = Vec::new();
            stream.chunks(frame_len).for_each(|chunk| write_server_text(chunk, &mut wire));
            for read_len in [1, 64, 1000, 100_000] {
                let (mut reader, mut marks, mut pings) = (NatsReader::new(), Vec::new(), 0);
                for read in wire.chunks(read_len) {
                    pings += reader.feed(read, |mark| marks.push(mark)).unwrap();
                }
                assert_eq!(marks, [(0, 0), (1, 7), (2, 14), (3, 21), (4, 28)], "{frame_len} {read_len}");
                assert_eq!(pings, 5);
            }
        }
    }

    #[test]
    fn an_error_of_the_server_is_told() {
        let mut wire = Vec::new();
        write_server_text(b"-ERR 'Authorization Violation'\r\n", &mut wire);
        let error = NatsReader::new().feed(&wire, |_| ()).unwrap_err().to_string();
        assert!(error.contains("Authorization Violation"), "{error}");
    }
}
