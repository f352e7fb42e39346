//! What Redis itself can do: the cheapest client there is, as the ceiling of every figure with Redis.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use url::Url;

use super::{RedisStream, Throughput};
use crate::bench::payload::Template;
use crate::bench::resp::{Connection, Token, encode};

/// XADD through pipelines of one process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RawPublishJob {
    pub(crate) at: RedisStream,
    pub(crate) connections: usize,
    /// The most commands of one connection without a reply.
    pub(crate) window: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
    /// Ends before its time after so many events, which bounds the server's memory.
    pub(crate) max_events: u64,
}

impl RawPublishJob {
    pub(crate) fn run(&self) -> Result<Throughput> {
        let start = Instant::now();
        let end = start + Duration::from_secs(self.seconds);
        let share = self.max_events / self.connections as u64;
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..self.connections).map(|_| scope.spawn(move || self.publish(end, share))).collect();
            let events = workers
                .into_iter()
                .map(|worker| worker.join().expect("a publisher does not panic"))
                .sum::<Result<u64>>()?;
            Ok(Throughput::since(start, events))
        })
    }

    /// Keeps a window of commands under way in two halves, so that the server never waits for this side.
    fn publish(&self, end: Instant, max_events: u64) -> Result<u64> {
        let mut connection = self.at.connect()?;
        let payload = Template::new(self.size).bytes(0, 0);
        let half = (self.window / 2).max(1);
        let push = |connection: &mut Connection| {
            for _ in 0..half {
                connection.push(&[b"XADD", self.at.stream.as_bytes(), b"*", b"data", &payload]);
            }
            connection.flush()
        };
        let (mut sent, mut stored) = (half as u64, 0_u64);
        push(&mut connection)?;
        while stored < sent {
            if sent < max_events && Instant::now() < end {
                push(&mut connection)?;
                sent += half as u64;
            }
            for _ in 0..half {
                connection.reply().context("cannot publish to Redis")?;
            }
            stored += half as u64;
        }
        Ok(stored)
    }
}

/// XREADGROUP and one XACK per read, each sent together with the next read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RawConsumeJob {
    pub(crate) at: RedisStream,
    pub(crate) group: String,
    /// Entries per read.
    pub(crate) count: usize,
}

impl RawConsumeJob {
    /// Consumes all there is.
    pub(crate) fn run(&self) -> Result<Throughput> {
        let mut connection = self.at.connect()?;
        let count = self.count.to_string();
        let (stream, group) = (self.at.stream.as_bytes(), self.group.as_bytes());
        let read =
            [b"XREADGROUP".as_slice(), b"GROUP", group, b"raw", b"COUNT", count.as_bytes(), b"STREAMS", stream, b">"];
        let start = Instant::now();
        connection.push(&read);
        connection.flush()?;
        let (mut ids, mut events) = (Vec::new(), 0_u64);
        loop {
            ids.clear();
            let found = collect_ids(connection.reply()?.tokens(), &mut ids)?;
            if found == 0 {
                return Ok(Throughput::since(start, events));
            }
            connection.push_with(&[b"XACK", stream, group], found, &ids);
            connection.push(&read);
            connection.flush()?;
            let acknowledged = connection.reply()?.integer().context("XACK was not answered with a number")?;
            ensure!(usize::try_from(acknowledged) == Ok(found), "{acknowledged} of {found} entries were acknowledged");
            events += found as u64;
        }
    }
}

/// Encodes the ids of the entries of an XREADGROUP reply of one stream; says how many there are.
fn collect_ids<'a>(mut tokens: impl Iterator<Item = Token<'a>>, ids: &mut Vec<u8>) -> Result<usize> {
    let unexpected = "XREADGROUP was answered with something unexpected";
    let Some(Token::Array(1)) = tokens.next() else { return Ok(0) };
    let (Some(Token::Array(2)), Some(Token::Text(_)), Some(Token::Array(count))) =
        (tokens.next(), tokens.next(), tokens.next())
    else {
        anyhow::bail!(unexpected)
    };
    for _ in 0..count {
        let (Some(Token::Array(2)), Some(Token::Text(id)), Some(Token::Array(fields))) =
            (tokens.next(), tokens.next(), tokens.next())
        else {
            anyhow::bail!(unexpected)
        };
        encode(id, ids);
        for _ in 0..fields {
            tokens.next().context(unexpected)?;
        }
    }
    usize::try_from(count).context(unexpected)
}

/// Puts `entries` events into a stream.
pub(crate) fn fill(url: &Url, stream: &str, entries: u64, size: usize) -> Result<()> {
    let mut connection = Connection::open(url)?;
    let template = Template::new(size);
    let mut payload = Vec::with_capacity(size);
    for first in (0..entries).step_by(128) {
        let end = entries.min(first + 128);
        for sequence in first..end {
            payload.clear();
            template.write(sequence, 0, &mut payload);
            connection.push(&[b"XADD", stream.as_bytes(), b"*", b"data", &payload]);
        }
        connection.flush()?;
        for _ in first..end {
            connection.reply().context("cannot fill a stream")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_collected_from_a_reply_whatever_the_fields() {
        let tokens = [
            Token::Array(1),
            Token::Array(2),
            Token::Text(b"stream"),
            Token::Array(2),
            Token::Array(2),
            Token::Text(b"1-0"),
            Token::Array(2),
            Token::Text(b"data"),
            Token::Text(b"{}"),
            Token::Array(2),
            Token::Text(b"2-0"),
            Token::Array(0),
        ];
        let mut ids = Vec::new();
        assert_eq!(collect_ids(tokens.into_iter(), &mut ids).unwrap(), 2);
        assert_eq!(ids, b"$3\r\n1-0\r\n$3\r\n2-0\r\n");
        assert_eq!(collect_ids([Token::Null].into_iter(), &mut ids).unwrap(), 0);
        collect_ids(tokens[..6].iter().copied(), &mut ids).unwrap_err();
    }
}
