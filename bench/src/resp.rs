//! A small blocking client of the Redis protocol (RESP2), which sets the ceiling for any other client.
//!
//! Replies are parsed in place and without allocation, so that the server is the bottleneck of a measurement.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use url::Url;

/// The time limit of a reply.
const REPLY_TIMEOUT: Duration = Duration::from_mins(1);
/// The longest accepted reply, in bytes.
const MAX_REPLY: usize = 256 << 20;

/// One connection to a server. Commands are buffered until [`RespConnection::flush`]; replies are read one by one.
#[derive(Debug)]
pub(crate) struct RespConnection {
    stream: TcpStream,
    input: Vec<u8>,
    start: usize,
    end: usize,
    output: Vec<u8>,
}

impl RespConnection {
    /// Connects, authenticates and selects the database of a `redis://` URL.
    pub(crate) fn open(url: &Url) -> Result<Self> {
        ensure!(url.scheme() == "redis", "the Redis URL must begin with redis://, not {}://", url.scheme());
        let host = url.host_str().context("the Redis URL has no host")?;
        let stream = TcpStream::connect((host, url.port().unwrap_or(6379)))
            .with_context(|| format!("cannot connect to Redis at {host}:{}", url.port().unwrap_or(6379)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut connection =
            Self { stream, input: vec![0; 256 << 10], start: 0, end: 0, output: Vec::with_capacity(256 << 10) };
        if let Some(password) = url.password() {
            let user = if url.username().is_empty() { "default" } else { url.username() };
            connection.call(&[b"AUTH", user.as_bytes(), password.as_bytes()])?;
        }
        let database = url.path().trim_start_matches('/');
        if !database.is_empty() && database != "0" {
            connection.call(&[b"SELECT", database.as_bytes()])?;
        }
        Ok(connection)
    }

    /// Buffers a command.
    pub(crate) fn push(&mut self, parts: &[&[u8]]) {
        self.push_with(parts, 0, &[]);
    }

    /// Buffers a command whose last `count` arguments are already encoded, see [`encode`].
    pub(crate) fn push_with(&mut self, parts: &[&[u8]], count: usize, encoded: &[u8]) {
        self.output.push(b'*');
        push_number(parts.len() + count, &mut self.output);
        for part in parts {
            encode(part, &mut self.output);
        }
        self.output.extend_from_slice(encoded);
    }

    /// Sends the buffered commands.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&self.output).context("cannot write to Redis")?;
        self.output.clear();
        Ok(())
    }

    /// Waits for the next reply. Fails if it is an error reply.
    pub(crate) fn reply(&mut self) -> Result<RespReply<'_>> {
        let mut scan = ReplyScan::default();
        while !scan.advance(&self.input[self.start..self.end])? {
            self.fill()?;
        }
        let reply = self.start..self.start + scan.position;
        self.start = reply.end;
        let reply = RespReply(&self.input[reply]);
        if let Some(RespToken::Error(text)) = reply.tokens().next() {
            bail!("Redis returned an error: {}", String::from_utf8_lossy(text));
        }
        Ok(reply)
    }

    /// Sends one command and waits for its reply.
    pub(crate) fn call(&mut self, parts: &[&[u8]]) -> Result<RespReply<'_>> {
        self.push(parts);
        self.flush()?;
        self.reply()
    }

    fn fill(&mut self) -> Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.end == self.input.len() {
            if self.start > 0 {
                self.input.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                ensure!(self.input.len() < MAX_REPLY, "a reply of Redis is longer than {MAX_REPLY} bytes");
                self.input.resize(self.input.len() * 2, 0);
            }
        }
        let count = self.stream.read(&mut self.input[self.end..]).context("cannot read from Redis")?;
        ensure!(count > 0, "Redis closed the connection");
        self.end += count;
        Ok(())
    }
}

/// Appends one argument, encoded as a bulk string.
pub(crate) fn encode(argument: &[u8], out: &mut Vec<u8>) {
    out.push(b'$');
    push_number(argument.len(), out);
    out.extend_from_slice(argument);
    out.extend_from_slice(b"\r\n");
}

fn push_number(mut number: usize, out: &mut Vec<u8>) {
    let mut digits = [b'0'; 20];
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b"0123456789"[number % 10];
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[first..]);
    out.extend_from_slice(b"\r\n");
}

/// One complete reply, as it was received.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RespReply<'a>(&'a [u8]);

impl<'a> RespReply<'a> {
    /// Returns the parts of the reply in wire order, with arrays flattened.
    pub(crate) fn tokens(self) -> RespTokens<'a> {
        RespTokens(self.0)
    }

    /// Returns the number, or `None` if the reply is not a number.
    pub(crate) fn integer(self) -> Option<i64> {
        match self.tokens().next() {
            Some(RespToken::Integer(number)) => Some(number),
            _ => None,
        }
    }

    /// Returns the value after `name` in a flattened map.
    pub(crate) fn after(self, name: &[u8]) -> Option<RespToken<'a>> {
        let mut tokens = self.tokens();
        tokens.find(|token| matches!(token, RespToken::Text(text) if *text == name))?;
        tokens.next()
    }
}

/// One part of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RespToken<'a> {
    /// The start of an array with this number of elements.
    Array(u64),
    /// A simple or bulk string.
    Text(&'a [u8]),
    /// A number.
    Integer(i64),
    /// No value.
    Null,
    /// The text of an error.
    Error(&'a [u8]),
}

/// See [`RespReply::tokens`].
#[derive(Debug)]
pub(crate) struct RespTokens<'a>(&'a [u8]);

impl<'a> Iterator for RespTokens<'a> {
    type Item = RespToken<'a>;

    fn next(&mut self) -> Option<RespToken<'a>> {
        let (token, len) = token(self.0).ok()??;
        self.0 = &self.0[len..];
        Some(token)
    }
}

/// Returns the first token of `input` and its length, or `None` while it is incomplete.
fn token(input: &[u8]) -> Result<Option<(RespToken<'_>, usize)>> {
    let Some(newline) = input.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
    let line = input[..newline].strip_suffix(b"\r").context("a line from Redis does not end with CR LF")?;
    let (kind, rest) = line.split_first().context("Redis sent an empty line")?;
    let header = newline + 1;
    Ok(Some(match kind {
        b'+' => (RespToken::Text(rest), header),
        b'-' => (RespToken::Error(rest), header),
        b':' => (RespToken::Integer(number(rest)?), header),
        b'*' => match number(rest)? {
            -1 => (RespToken::Null, header),
            count => (RespToken::Array(u64::try_from(count).context("a negative array length")?), header),
        },
        b'$' => match number(rest)? {
            -1 => (RespToken::Null, header),
            len => {
                let len = usize::try_from(len).context("a negative string length")?;
                ensure!(len <= MAX_REPLY, "a reply of Redis is longer than {MAX_REPLY} bytes");
                let Some(text) = input.get(header..header + len + 2) else { return Ok(None) };
                (
                    RespToken::Text(text.strip_suffix(b"\r\n").context("a string does not end with CR LF")?),
                    header + len + 2,
                )
            }
        },
        other => bail!("Redis sent a reply of the unknown type {:?}", char::from(*other)),
    }))
}

fn number(digits: &[u8]) -> Result<i64> {
    let text = std::str::from_utf8(digits).context("a number is not text")?;
    text.parse().with_context(|| format!("{text:?} is not a number"))
}

/// Finds the end of a reply while its bytes arrive, and parses each finished token only once.
#[derive(Debug)]
struct ReplyScan {
    position: usize,
    missing: u64,
}

impl Default for ReplyScan {
    fn default() -> Self {
        Self { position: 0, missing: 1 }
    }
}

impl ReplyScan {
    /// Returns whether `input` holds a complete reply, which then ends at `position`.
    fn advance(&mut self, input: &[u8]) -> Result<bool> {
        while self.missing > 0 {
            let Some((token, len)) = token(&input[self.position..])? else { return Ok(false) };
            self.position += len;
            self.missing -= 1;
            if let RespToken::Array(count) = token {
                self.missing = self.missing.checked_add(count).context("an array is too long")?;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Value {
        Array(Vec<Self>),
        Text(Vec<u8>),
        Integer(i64),
        Null,
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Text),
            any::<i64>().prop_map(Value::Integer),
            Just(Value::Null),
        ];
        leaf.prop_recursive(3, 20, 5, |inner| prop::collection::vec(inner, 0..5).prop_map(Value::Array))
    }

    fn write(value: &Value, out: &mut Vec<u8>) {
        match value {
            Value::Array(items) => {
                out.extend_from_slice(format!("*{}\r\n", items.len()).as_bytes());
                for item in items {
                    write(item, out);
                }
            }
            Value::Text(text) => encode(text, out),
            Value::Integer(number) => out.extend_from_slice(format!(":{number}\r\n").as_bytes()),
            Value::Null => out.extend_from_slice(b"$-1\r\n"),
        }
    }

    fn flatten<'a>(value: &'a Value, out: &mut Vec<RespToken<'a>>) {
        match value {
            Value::Array(items) => {
                out.push(RespToken::Array(items.len() as u64));
                for item in items {
                    flatten(item, out);
                }
            }
            Value::Text(text) => out.push(RespToken::Text(text)),
            Value::Integer(number) => out.push(RespToken::Integer(*number)),
            Value::Null => out.push(RespToken::Null),
        }
    }

    proptest! {
        #[test]
        fn reply_is_complete_with_its_last_byte(value in value(), tail in any::<[u8; 5]>()) {
            let mut wire = Vec::new();
            write(&value, &mut wire);
            let len = wire.len();
            let mut expected = Vec::new();
            flatten(&value, &mut expected);

            let mut scan = ReplyScan::default();
            for end in 0..len {
                prop_assert!(!scan.advance(&wire[..end]).unwrap(), "complete after {end} of {len} bytes");
            }
            wire.extend_from_slice(&tail);
            prop_assert!(scan.advance(&wire).unwrap());
            prop_assert_eq!(scan.position, len);
            prop_assert_eq!(RespReply(&wire[..len]).tokens().collect::<Vec<_>>(), expected);
        }

        #[test]
        fn garbage_never_panics(wire in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(ReplyScan::default().advance(&wire));
        }
    }

    #[test]
    fn map_value_is_found_by_name() {
        let wire = b"*4\r\n$7\r\npending\r\n:3\r\n$3\r\nlag\r\n$-1\r\n";
        assert_eq!(RespReply(wire).after(b"lag"), Some(RespToken::Null));
        assert_eq!(RespReply(wire).after(b"pending"), Some(RespToken::Integer(3)));
        assert_eq!(RespReply(wire).after(b"none"), None);
    }

    #[test]
    fn argument_is_encoded_as_a_bulk_string() {
        let mut out = Vec::new();
        encode(b"XADD", &mut out);
        assert_eq!(out, b"$4\r\nXADD\r\n");
        let mut out = Vec::new();
        push_number(1_000, &mut out);
        assert_eq!(out, b"1000\r\n");
    }
}
