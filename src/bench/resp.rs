//! A small blocking client of the Redis protocol (RESP2): the ceiling that any client could reach.
//!
//! Replies are found in place, without an allocation, so that the server is what a measurement meets first.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use url::Url;

/// How long a reply may take.
const REPLY_TIMEOUT: Duration = Duration::from_mins(1);
/// The longest reply taken, in bytes.
const MAX_REPLY: usize = 256 << 20;

/// One connection to a server. Commands are collected until [`Connection::flush`], replies are read one by one.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    start: usize,
    end: usize,
    output: Vec<u8>,
}

impl Connection {
    /// Connects, signs in and selects the database as a `redis://` URL says.
    pub(crate) fn open(url: &Url) -> Result<Self> {
        ensure!(url.scheme() == "redis", "a measurement takes redis:// URLs, not {}://", url.scheme());
        let host = url.host_str().context("the Redis URL names no host")?;
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

    /// Collects a command.
    pub(crate) fn push(&mut self, parts: &[&[u8]]) {
        self.push_with(parts, 0, &[]);
    }

    /// Collects a command whose last `count` arguments are encoded already, see [`encode`].
    pub(crate) fn push_with(&mut self, parts: &[&[u8]], count: usize, encoded: &[u8]) {
        self.output.push(b'*');
        push_number(parts.len() + count, &mut self.output);
        for part in parts {
            encode(part, &mut self.output);
        }
        self.output.extend_from_slice(encoded);
    }

    /// Sends what was collected.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&self.output).context("cannot write to Redis")?;
        self.output.clear();
        Ok(())
    }

    /// Waits for the next reply. An error reply is an error.
    pub(crate) fn reply(&mut self) -> Result<Reply<'_>> {
        let mut scan = Scan::default();
        while !scan.advance(&self.input[self.start..self.end])? {
            self.fill()?;
        }
        let reply = self.start..self.start + scan.position;
        self.start = reply.end;
        let reply = Reply(&self.input[reply]);
        if let Some(Token::Error(text)) = reply.tokens().next() {
            bail!("Redis answered: {}", String::from_utf8_lossy(text));
        }
        Ok(reply)
    }

    /// Sends one command and waits for its reply.
    pub(crate) fn call(&mut self, parts: &[&[u8]]) -> Result<Reply<'_>> {
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

/// Appends one argument as the protocol has it.
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

/// One complete reply, as it came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reply<'a>(&'a [u8]);

impl<'a> Reply<'a> {
    /// Its parts in the order of the wire, arrays flattened.
    pub(crate) fn tokens(self) -> Tokens<'a> {
        Tokens(self.0)
    }

    /// The number it is, if it is one.
    pub(crate) fn integer(self) -> Option<i64> {
        match self.tokens().next() {
            Some(Token::Integer(number)) => Some(number),
            _ => None,
        }
    }

    /// What follows `name` in a flattened map.
    pub(crate) fn after(self, name: &[u8]) -> Option<Token<'a>> {
        let mut tokens = self.tokens();
        tokens.find(|token| matches!(token, Token::Text(text) if *text == name))?;
        tokens.next()
    }
}

/// One part of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token<'a> {
    /// An array of so many elements, which follow.
    Array(u64),
    /// A simple or bulk string.
    Text(&'a [u8]),
    /// A number.
    Integer(i64),
    /// No value.
    Null,
    /// An error's text.
    Error(&'a [u8]),
}

/// See [`Reply::tokens`].
#[derive(Debug)]
pub(crate) struct Tokens<'a>(&'a [u8]);

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        let (token, len) = token(self.0).ok()??;
        self.0 = &self.0[len..];
        Some(token)
    }
}

/// The first token of `input` and its length; nothing where its end has not come yet.
fn token(input: &[u8]) -> Result<Option<(Token<'_>, usize)>> {
    let Some(newline) = input.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
    let line = input[..newline].strip_suffix(b"\r").context("a line of Redis does not end with CR LF")?;
    let (kind, rest) = line.split_first().context("Redis sent an empty line")?;
    let header = newline + 1;
    Ok(Some(match kind {
        b'+' => (Token::Text(rest), header),
        b'-' => (Token::Error(rest), header),
        b':' => (Token::Integer(number(rest)?), header),
        b'*' => match number(rest)? {
            -1 => (Token::Null, header),
            count => (Token::Array(u64::try_from(count).context("a negative array length")?), header),
        },
        b'$' => match number(rest)? {
            -1 => (Token::Null, header),
            len => {
                let len = usize::try_from(len).context("a negative string length")?;
                ensure!(len <= MAX_REPLY, "a reply of Redis is longer than {MAX_REPLY} bytes");
                let Some(text) = input.get(header..header + len + 2) else { return Ok(None) };
                (Token::Text(text.strip_suffix(b"\r\n").context("a string does not end with CR LF")?), header + len + 2)
            }
        },
        other => bail!("Redis sent a reply of the unknown type {:?}", char::from(*other)),
    }))
}

fn number(digits: &[u8]) -> Result<i64> {
    let text = std::str::from_utf8(digits).context("a number is not text")?;
    text.parse().with_context(|| format!("{text:?} is not a number"))
}

/// Looks for the end of a reply as its bytes come in; never looks at a byte of a finished token twice.
#[derive(Debug)]
struct Scan {
    position: usize,
    missing: u64,
}

impl Default for Scan {
    fn default() -> Self {
        Self { position: 0, missing: 1 }
    }
}

impl Scan {
    /// Whether the reply that begins with `input` is complete, up to `position`.
    fn advance(&mut self, input: &[u8]) -> Result<bool> {
        while self.missing > 0 {
            let Some((token, len)) = token(&input[self.position..])? else { return Ok(false) };
            self.position += len;
            self.missing -= 1;
            if let Token::Array(count) = token {
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

    fn flatten<'a>(value: &'a Value, out: &mut Vec<Token<'a>>) {
        match value {
            Value::Array(items) => {
                out.push(Token::Array(items.len() as u64));
                for item in items {
                    flatten(item, out);
                }
            }
            Value::Text(text) => out.push(Token::Text(text)),
            Value::Integer(number) => out.push(Token::Integer(*number)),
            Value::Null => out.push(Token::Null),
        }
    }

    proptest! {
        #[test]
        fn a_reply_is_complete_with_its_last_byte_wherever_reads_split_it(value in value(), tail in any::<[u8; 5]>()) {
            let mut wire = Vec::new();
            write(&value, &mut wire);
            let len = wire.len();
            let mut expected = Vec::new();
            flatten(&value, &mut expected);

            let mut scan = Scan::default();
            for end in 0..len {
                prop_assert!(!scan.advance(&wire[..end]).unwrap(), "complete after {end} of {len} bytes");
            }
            wire.extend_from_slice(&tail);
            prop_assert!(scan.advance(&wire).unwrap());
            prop_assert_eq!(scan.position, len);
            prop_assert_eq!(Reply(&wire[..len]).tokens().collect::<Vec<_>>(), expected);
        }

        #[test]
        fn garbage_is_an_error_or_incomplete_but_never_a_panic(wire in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(Scan::default().advance(&wire));
        }
    }

    #[test]
    fn values_of_a_map_are_found_by_name() {
        let wire = b"*4\r\n$7\r\npending\r\n:3\r\n$3\r\nlag\r\n$-1\r\n";
        assert_eq!(Reply(wire).after(b"lag"), Some(Token::Null));
        assert_eq!(Reply(wire).after(b"pending"), Some(Token::Integer(3)));
        assert_eq!(Reply(wire).after(b"none"), None);
    }

    #[test]
    fn a_command_is_an_array_of_its_arguments() {
        let mut out = Vec::new();
        encode(b"XADD", &mut out);
        assert_eq!(out, b"$4\r\nXADD\r\n");
        let mut out = Vec::new();
        push_number(1_000, &mut out);
        assert_eq!(out, b"1000\r\n");
    }
}
