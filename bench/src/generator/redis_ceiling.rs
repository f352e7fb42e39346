//! The ceilings of Redis, measured with the cheapest possible client.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use url::Url;

use super::endpoint::RedisStream;
use crate::payload::EventTemplate;
use crate::resp::{RespConnection, RespToken, encode};
use crate::stats::Throughput;

/// Sends XADD in pipelines, from one process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RedisPublishJob {
    pub(crate) stream: RedisStream,
    pub(crate) connections: usize,
    /// The number of commands in flight on one connection.
    pub(crate) window: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
    /// The number of events that ends the job early, to bound the memory of the server.
    pub(crate) max_events: u64,
}

impl RedisPublishJob {
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

    /// Keeps a window of commands in flight in two halves, so that the server never waits for this client.
    fn publish(&self, end: Instant, max_events: u64) -> Result<u64> {
        let mut connection = self.stream.connect()?;
        let payload = EventTemplate::new(self.size).bytes(0, 0);
        let half = (self.window / 2).max(1);
        let push = |connection: &mut RespConnection| {
            for _ in 0..half {
                connection.push(&[b"XADD", self.stream.stream.as_bytes(), b"*", b"data", &payload]);
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

/// Loops XREADGROUP with one XACK per read, which is sent together with the next read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RedisConsumeJob {
    pub(crate) stream: RedisStream,
    pub(crate) group: String,
    /// Entries per read.
    pub(crate) count: usize,
}

impl RedisConsumeJob {
    /// Consumes the stream to its end.
    pub(crate) fn run(&self) -> Result<Throughput> {
        let mut connection = self.stream.connect()?;
        let count = self.count.to_string();
        let (stream, group) = (self.stream.stream.as_bytes(), self.group.as_bytes());
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
            let acknowledged = connection.reply()?.integer().context("the reply to XACK is not a number")?;
            ensure!(usize::try_from(acknowledged) == Ok(found), "{acknowledged} of {found} entries were acknowledged");
            events += found as u64;
        }
    }
}

/// Encodes the ids of the entries in an XREADGROUP reply of one stream; returns their number.
fn collect_ids<'a>(mut tokens: impl Iterator<Item = RespToken<'a>>, ids: &mut Vec<u8>) -> Result<usize> {
    let unexpected = "the reply to XREADGROUP has an unexpected form";
    let Some(RespToken::Array(1)) = tokens.next() else { return Ok(0) };
    let (Some(RespToken::Array(2)), Some(RespToken::Text(_)), Some(RespToken::Array(count))) =
        (tokens.next(), tokens.next(), tokens.next())
    else {
        anyhow::bail!(unexpected)
    };
    for _ in 0..count {
        let (Some(RespToken::Array(2)), Some(RespToken::Text(id)), Some(RespToken::Array(fields))) =
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

/// Appends `entries` events to a stream.
pub(crate) fn fill_stream(url: &Url, stream: &str, entries: u64, size: usize) -> Result<()> {
    let mut connection = RespConnection::open(url)?;
    let template = EventTemplate::new(size);
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
    fn ids_are_collected_for_any_number_of_fields() {
        let tokens = [
            RespToken::Array(1),
            RespToken::Array(2),
            RespToken::Text(b"stream"),
            RespToken::Array(2),
            RespToken::Array(2),
            RespToken::Text(b"1-0"),
            RespToken::Array(2),
            RespToken::Text(b"data"),
            RespToken::Text(b"{}"),
            RespToken::Array(2),
            RespToken::Text(b"2-0"),
            RespToken::Array(0),
        ];
        let mut ids = Vec::new();
        assert_eq!(collect_ids(tokens.into_iter(), &mut ids).unwrap(), 2);
        assert_eq!(ids, b"$3\r\n1-0\r\n$3\r\n2-0\r\n");
        assert_eq!(collect_ids([RespToken::Null].into_iter(), &mut ids).unwrap(), 0);
        collect_ids(tokens[..6].iter().copied(), &mut ids).unwrap_err();
    }
}
