//! The part of Centrifugo's JSON protocol that dashboards and publishers need.
//!
//! A WebSocket message holds one or many lines of JSON. A reply to a recovering client is one line with all missed
//! publications. Events are therefore found by their marks anywhere in a line, without parsing or buffering it.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use memchr::{memchr, memmem};

use crate::http::HttpClient;
use crate::payload::{MARKS_LEN, MARKS_PREFIX, Marks, read_marks};
use crate::websocket::{FrameKind, PayloadPart, PayloadReader};

/// The key of the HTTP API, for a server that listens on loopback during one measurement.
pub(crate) const API_KEY: &str = "bench";
/// The client's reply to a ping.
pub(super) const PONG: &[u8] = b"{}";
/// The number of first bytes of a line that are kept, enough for an error or an epoch.
const HEAD_LEN: usize = 192;
/// The start of the reply to the subscribe command, which has the id 2.
const SUBSCRIBED: &[u8] = br#"{"id":2,"subscribe":"#;

/// Returns the commands that connect and subscribe, from a position of epoch and offset on if there is one.
pub(super) fn subscribe(channel: &str, position: Option<(&str, u64)>) -> Vec<u8> {
    let recover = position
        .map_or_else(String::new, |(epoch, offset)| format!(r#","recover":true,"epoch":"{epoch}","offset":{offset}"#));
    format!(
        r#"{{"id":1,"connect":{{"name":"aurora-bus-bench"}}}}
{{"id":2,"subscribe":{{"channel":"{channel}"{recover}}}}}"#
    )
    .into_bytes()
}

/// A message from the server.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CentrifugoMessage<'a> {
    Event(Marks),
    /// The subscription is live. The epoch is empty for a channel without history.
    Subscribed {
        epoch: &'a str,
    },
    Ping,
    /// The server ends the connection, with a close code.
    Closed(Option<u16>),
}

/// Finds the messages in the bytes of one WebSocket.
#[derive(Debug)]
pub(super) struct CentrifugoReader {
    payloads: PayloadReader,
    line: LineReader,
}

impl CentrifugoReader {
    pub(super) fn new() -> Self {
        let line = LineReader { head: [0; HEAD_LEN], head_len: 0, unscanned: Vec::new() };
        Self { payloads: PayloadReader::new(), line }
    }

    /// Parses `input` and calls `on_message` for each message that ends in it. Fails if the server reports an error.
    pub(super) fn feed(&mut self, input: &[u8], mut on_message: impl FnMut(CentrifugoMessage<'_>)) -> Result<()> {
        let Self { payloads, line } = self;
        let mut outcome = Ok(());
        payloads.feed(input, |PayloadPart { kind, bytes, is_first, is_last }| match kind {
            FrameKind::Message | FrameKind::Continuation => {
                let mut rest = bytes;
                while let Some(end) = memchr(b'\n', rest) {
                    line.extend(&rest[..end], &mut on_message);
                    line.end(&mut on_message).unwrap_or_else(|error| outcome = Err(error));
                    rest = &rest[end + 1..];
                }
                line.extend(rest, &mut on_message);
                if is_last {
                    line.end(&mut on_message).unwrap_or_else(|error| outcome = Err(error));
                }
            }
            FrameKind::Close if is_first => {
                on_message(CentrifugoMessage::Closed(bytes.first_chunk().map(|code| u16::from_be_bytes(*code))));
            }
            FrameKind::Close | FrameKind::Ping | FrameKind::Pong => {}
        })?;
        outcome
    }
}

/// Scans one line while its bytes arrive.
#[derive(Debug)]
struct LineReader {
    head: [u8; HEAD_LEN],
    head_len: usize,
    /// The last bytes, if they may be the beginning of an event.
    unscanned: Vec<u8>,
}

impl LineReader {
    fn extend(&mut self, bytes: &[u8], on_message: &mut impl FnMut(CentrifugoMessage<'_>)) {
        let keep = bytes.len().min(HEAD_LEN - self.head_len);
        self.head[self.head_len..self.head_len + keep].copy_from_slice(&bytes[..keep]);
        self.head_len += keep;
        let on_event = |marks| on_message(CentrifugoMessage::Event(marks));
        if self.unscanned.is_empty() {
            self.unscanned.extend_from_slice(scan_events(bytes, on_event));
        } else {
            self.unscanned.extend_from_slice(bytes);
            let unscanned = scan_events(&self.unscanned, on_event).len();
            self.unscanned.drain(..self.unscanned.len() - unscanned);
        }
    }

    fn end(&mut self, on_message: &mut impl FnMut(CentrifugoMessage<'_>)) -> Result<()> {
        let head = &self.head[..self.head_len];
        self.head_len = 0;
        self.unscanned.clear();
        if head == b"{}" {
            on_message(CentrifugoMessage::Ping);
        } else if let Some(reply) = head.strip_prefix(SUBSCRIBED) {
            on_message(CentrifugoMessage::Subscribed { epoch: epoch_of(reply)? });
        } else if head.starts_with(br#"{"id":"#) {
            let has_error = memmem::find(head, br#""error":"#).is_some();
            ensure!(!has_error, "Centrifugo returned an error: {}", String::from_utf8_lossy(head));
        }
        Ok(())
    }
}

/// Calls `on_event` for each event, and returns the last bytes, if they may be the beginning of another one.
fn scan_events(mut bytes: &[u8], mut on_event: impl FnMut(Marks)) -> &[u8] {
    while let Some(at) = memmem::find(bytes, MARKS_PREFIX) {
        let Some(payload) = bytes.get(at..at + MARKS_LEN) else { return &bytes[at..] };
        read_marks(payload).into_iter().for_each(&mut on_event);
        bytes = &bytes[at + MARKS_LEN..];
    }
    let last = &bytes[bytes.len().saturating_sub(MARKS_PREFIX.len() - 1)..];
    let start = last.iter().position(|byte| *byte == MARKS_PREFIX[0]).unwrap_or(last.len());
    &last[start..]
}

/// Returns the epoch of a reply to the subscribe command, or an empty string if it has none.
fn epoch_of(reply: &[u8]) -> Result<&str> {
    let name = br#""epoch":""#;
    let Some(at) = memmem::find(reply, name) else { return Ok("") };
    let value = &reply[at + name.len()..];
    let end = memchr(b'"', value).context("an epoch has no end")?;
    str::from_utf8(&value[..end]).context("an epoch is not UTF-8")
}

/// A connection that publishes over the HTTP API.
#[derive(Debug)]
pub(super) struct CentrifugoPublisher {
    client: HttpClient,
    channel: String,
    commands: Vec<Vec<u8>>,
}

impl CentrifugoPublisher {
    pub(super) fn open(address: SocketAddr, channel: &str) -> Result<Self> {
        Ok(Self { client: HttpClient::open(address)?, channel: channel.to_owned(), commands: Vec::new() })
    }

    /// Buffers a publication.
    pub(super) fn push(&mut self, payload: &[u8]) {
        let mut command = format!(r#"{{"channel":"{}","data":"#, self.channel).into_bytes();
        command.extend_from_slice(payload);
        command.push(b'}');
        self.commands.push(command);
    }

    /// Sends the buffered publications in one request; returns when the server has accepted all of them.
    pub(super) fn flush(&mut self) -> Result<()> {
        let (path, body) = match &*self.commands {
            [command] => ("/api/publish", command.clone()),
            commands => {
                let mut body = br#"{"commands":["#.to_vec();
                for (index, command) in commands.iter().enumerate() {
                    body.extend_from_slice(if index == 0 { br#"{"publish":"# } else { br#",{"publish":"# });
                    body.extend_from_slice(command);
                    body.push(b'}');
                }
                body.extend_from_slice(b"]}");
                ("/api/batch", body)
            }
        };
        self.commands.clear();
        let (status, answer) =
            self.client.post(path, "application/json", &format!("X-API-Key: {API_KEY}\r\n"), &body)?;
        ensure!(
            status == 200 && !answer.contains(r#""error":"#),
            "publishing to Centrifugo failed with status {status}: {}",
            answer.trim()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::payload::EventTemplate;
    use crate::websocket::write_server_text;

    fn messages(wire: &[u8], read_len: usize) -> Result<Vec<String>> {
        let (mut reader, mut found) = (CentrifugoReader::new(), Vec::new());
        for read in wire.chunks(read_len) {
            reader.feed(read, |message| {
                found.push(match message {
                    CentrifugoMessage::Event(Marks { sequence, stamp }) => format!("{sequence}@{stamp}"),
                    CentrifugoMessage::Subscribed { epoch } => format!("epoch {epoch}"),
                    CentrifugoMessage::Ping => "ping".to_owned(),
                    CentrifugoMessage::Closed(code) => format!("closed {code:?}"),
                });
            })?;
        }
        Ok(found)
    }

    fn event(sequence: u64) -> String {
        String::from_utf8(EventTemplate::new(400).bytes(sequence, sequence * 7)).unwrap()
    }

    #[test]
    fn messages_are_found_across_any_split() {
        let recovered: Vec<_> =
            (1..=3).map(|sequence| format!(r#"{{"data":{},"offset":{sequence}}}"#, event(sequence))).collect();
        let lines = [
            r#"{"id":1,"connect":{"client":"c","ping":25,"pong":true}}"#.to_owned(),
            format!(
                r#"{{"id":2,"subscribe":{{"recoverable":true,"epoch":"xyz","publications":[{}],"recovered":true,"offset":3}}}}"#,
                recovered.join(",")
            ),
            "{}".to_owned(),
            format!(r#"{{"push":{{"channel":"alerts","pub":{{"data":{},"offset":4}}}}}}"#, event(4)),
        ];
        let mut apart = Vec::new();
        for line in &lines {
            write_server_text(line.as_bytes(), &mut apart);
        }
        let mut together = Vec::new();
        write_server_text(lines.join("\n").as_bytes(), &mut together);
        together.extend_from_slice(b"\x88\x02\x0b\xba");
        for read_len in [1, 7, 50, 64, 401, 100_000] {
            let expected = ["1@7", "2@14", "3@21", "epoch xyz", "ping", "4@28"];
            assert_eq!(messages(&apart, read_len).unwrap(), expected, "{read_len}");
            let found = messages(&together, read_len).unwrap();
            assert_eq!(found[..6], expected, "{read_len}");
            assert!(found[6].starts_with("closed"), "{read_len}: {found:?}");
        }
    }

    #[test]
    fn error_reply_is_an_error() {
        let mut wire = Vec::new();
        write_server_text(br#"{"id":2,"error":{"code":103,"message":"permission denied"}}"#, &mut wire);
        let error = messages(&wire, 1000).unwrap_err().to_string();
        assert!(error.contains("permission denied"), "{error}");
    }

    #[test]
    fn subscribe_with_a_position_recovers() {
        let text = String::from_utf8(subscribe("alerts", Some(("xyz", 7)))).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[1]["subscribe"]["offset"], 7);
        assert_eq!(lines[1]["subscribe"]["epoch"], "xyz");
        assert_eq!(lines[1]["subscribe"]["recover"], true);
    }
}
