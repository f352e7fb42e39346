//! Waits for new entries of many streams with one blocking read.
//!
//! Cluster nodes refuse a read over several slots, and one blocking read per stream would need a connection for each. In
//! a cluster the streams are polled instead, on the shared connections.

use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::time::{Instant, sleep};

use crate::event::{EntryId, StreamName};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::{RedisStore, block, key};

/// The number of concurrent polls of a cluster.
const AT_A_TIME: usize = 32;
/// The pause between two rounds of polls, and the addition per stream: a thousand streams cost the cluster about two
/// thousand commands a second.
const POLL: Duration = Duration::from_millis(100);
const POLL_PER_STREAM: Duration = Duration::from_micros(400);

impl RedisStore {
    pub(crate) async fn wait_for_any(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, Failure> {
        if positions.is_empty() {
            sleep(wait).await;
            return Ok(Vec::new());
        }
        if self.servers.is_cluster() {
            return self.poll(positions, wait).await;
        }
        // There is one server for all keys.
        let first = positions[0].0.as_str().as_bytes();
        let answer = self.readers.read("XREAD", first, read(positions, wait), wait).await?;
        let ready = answer.ends_of_streams()?;
        let newest = |(stream, found)| async move { self.newest(stream, found).await };
        stream::iter(ready).map(newest).buffer_unordered(AT_A_TIME).try_collect().await
    }

    async fn poll(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, Failure> {
        let deadline = Instant::now() + wait;
        let pause = POLL + POLL_PER_STREAM * u32::try_from(positions.len()).unwrap_or(u32::MAX);
        let ask = |place: &(StreamName, EntryId)| {
            let place = place.clone();
            async move {
                let arguments = read(std::slice::from_ref(&place), Duration::ZERO);
                let answer = self.control.call("XREAD", place.0.as_str().as_bytes(), arguments).await?;
                match answer.ends_of_streams()?.pop() {
                    Some((stream, found)) => self.newest(stream, found).await.map(Some),
                    None => Ok(None),
                }
            }
        };
        loop {
            let asked = stream::iter(positions).map(ask).buffer_unordered(AT_A_TIME);
            let news: Vec<_> = asked.try_filter_map(|news| async move { Ok(news) }).try_collect().await?;
            if !news.is_empty() || Instant::now() + pause >= deadline {
                return Ok(news);
            }
            sleep(pause).await;
        }
    }

    /// Returns the newest entry of a stream, which is this one or a later one.
    async fn newest(&self, stream: StreamName, found: EntryId) -> Result<(StreamName, EntryId), Failure> {
        let mut arguments = Arguments::with_capacity(5);
        arguments.bytes(key(&stream)).text("+").text("-").text("COUNT").text("1");
        let answer = self.control.call("XREVRANGE", stream.as_str().as_bytes(), arguments).await;
        let last = answer.and_then(Reply::entries)?.last().map(|entry| entry.id);
        Ok((stream, last.unwrap_or(found).max(found)))
    }
}

fn read(positions: &[(StreamName, EntryId)], wait: Duration) -> Arguments {
    let mut arguments = Arguments::with_capacity(5 + 2 * positions.len());
    arguments.text("COUNT").text("1");
    block(&mut arguments, wait);
    arguments.text("STREAMS");
    for (stream, _) in positions {
        arguments.bytes(key(stream));
    }
    for (_, after) in positions {
        arguments.display(after);
    }
    arguments
}
