//! Leases, and the operations that need one.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::event::{Delivery, EntryId, StreamName};
use crate::store::redis::net::connection::Arguments;
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply;
use crate::store::redis::net::reply::Reply;
use crate::store::redis::net::script;
use crate::store::redis::net::script::Script;
use crate::store::redis::ops::keys;
use crate::store::redis::{RedisStore, block, key, of_consumer};
use crate::store::{Cursor, Lease, Leased};

impl RedisStore {
    pub(crate) async fn take_lease(
        &self,
        stream: &StreamName,
        name: &str,
        holder: &str,
        ttl: Duration,
    ) -> Result<Leased, Failure> {
        let mut arguments = Arguments::with_capacity(2);
        arguments.name(holder).display(&ttl.as_millis().max(1));
        let keys = [keys::lease(stream, name), keys::fence(stream)];
        let [fence, by, left] = self.control.run(&script::LEASE, &keys, arguments).await?.tuple()?;
        let fence = fence.text()?;
        if fence.is_empty() {
            return Ok(Leased::Taken { by: by.text()?, expires_in: Duration::from_millis(left.count()?) });
        }
        let fence = fence.parse().map_err(|e| Failure::unexpected(&format!("not a fence: {e}")))?;
        Ok(Leased::Held(Lease { name: name.to_owned(), holder: holder.to_owned(), fence }))
    }

    pub(crate) async fn drop_lease(&self, stream: &StreamName, lease: &Lease) -> Result<bool, Failure> {
        let mut arguments = Arguments::with_capacity(1);
        arguments.bytes(value(lease));
        let keys = [keys::lease(stream, &lease.name)];
        let released = self.control.run(&script::RELEASE_LEASE, &keys, arguments).await?.count()?;
        Ok(released == 1)
    }

    /// Runs a script for a consumer. If its cursor has a lease, the script has no effect after the lease is lost.
    pub(crate) async fn run_as(
        &self,
        script: &Script,
        cursor: &Cursor,
        mut keys: Vec<Bytes>,
        mut arguments: Arguments,
    ) -> Result<Reply, Failure> {
        let Some(lease) = &cursor.lease else { return self.control.run(script, &keys, arguments).await };
        keys.push(keys::lease(&cursor.stream, &lease.name));
        arguments.bytes(value(lease));
        self.control.run(script.under_lease(), &keys, arguments).await
    }

    /// Fetches under the cursor's lease. A blocking fetch cannot check the lease when it wakes, so another read waits,
    /// which delivers nothing.
    pub(crate) async fn fetch_under_lease(
        &self,
        cursor: &Cursor,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, Failure> {
        let stream = &cursor.stream;
        let deadline = Instant::now() + wait;
        loop {
            let mut arguments = of_consumer(cursor);
            arguments.display(&self.reply_sizes.bounded(stream, limit));
            let delivered_at = Instant::now();
            let answer = self.run_as(&script::FETCH, cursor, vec![key(stream)], arguments).await;
            let [entries, last] = match answer {
                Ok(reply) => reply.tuple()?,
                Err(failure) => return self.record_size(stream, Err(failure)).map(|_| Vec::new()),
            };
            let entries = self.record_size(stream, entries.entries())?;
            let left = deadline.saturating_duration_since(Instant::now());
            if !entries.is_empty() || left.is_zero() {
                let delivery = |entry| Delivery { entry, attempt: 1, delivered_at };
                return Ok(entries.into_iter().map(delivery).collect());
            }
            self.something_after(stream, reply::parse_id(&last.bytes()?)?, left).await?;
        }
    }

    /// Waits until the stream has an entry after this one, or until the timeout.
    async fn something_after(&self, stream: &StreamName, id: EntryId, wait: Duration) -> Result<(), Failure> {
        let mut arguments = Arguments::with_capacity(7);
        arguments.text("COUNT").text("1");
        block(&mut arguments, wait);
        arguments.text("STREAMS").bytes(key(stream)).display(&id);
        self.readers.read("XREAD", stream.as_str().as_bytes(), arguments, wait).await.map(drop)
    }
}

/// The value of a lease's key.
fn value(lease: &Lease) -> Bytes {
    format!("{} {}", lease.fence, lease.holder).into()
}
