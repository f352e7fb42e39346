//! What the embedded store itself can do, in this process and with nothing above it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::Throughput;
use crate::bench::payload::Template;
use crate::event::{Fields, NewEntry, StreamName, field};
use crate::store::embedded::{Config, EmbeddedStore, raw_append_rate};
use crate::store::{Cursor, Outcome, Settlement, Start, Store};

/// How many entries the consumer fetches and settles at once.
const FETCH: usize = 500;
/// How long the consumer waits for the next entry.
const WAIT: Duration = Duration::from_millis(200);

/// Appends by the engine alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct EngineAppendJob {
    /// An empty folder, or one that is not there yet.
    pub(crate) folder: PathBuf,
    /// Entries per commit, each of which is synced.
    pub(crate) batch: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
}

impl EngineAppendJob {
    pub(crate) fn run(&self) -> Result<Throughput> {
        let payload = Template::new(self.size).bytes(0, 0);
        let rate = raw_append_rate(&self.folder, &payload, self.batch, Duration::from_secs(self.seconds))?;
        Ok(Throughput { events: rate.entries, seconds: rate.elapsed.as_secs_f64() })
    }
}

/// Appends, fetches and acknowledgements side by side.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoreMixedJob {
    /// An empty folder, or one that is not there yet.
    pub(crate) folder: PathBuf,
    /// How many append at the same time.
    pub(crate) publishers: usize,
    /// Entries per append.
    pub(crate) batch: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
    /// Ends before its time after so many events.
    pub(crate) max_events: u64,
}

impl StoreMixedJob {
    /// Runs until all that was appended is acknowledged.
    pub(crate) fn run(&self) -> Result<Throughput> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let done = runtime.block_on(self.mixed());
        runtime.shutdown_background();
        done
    }

    async fn mixed(&self) -> Result<Throughput> {
        let store = Arc::new(Config { path: self.folder.clone(), ..Config::default() }.open().await?);
        let cursor = Cursor {
            stream: "bench".parse()?,
            group: "bench".parse()?,
            consumer: "bench".parse()?,
            claim_idle: Duration::from_mins(1),
            lease: None,
        };
        store.ensure_group(&cursor.stream, &cursor.group, Start::Oldest).await?;
        let start = Instant::now();
        let end = start + Duration::from_secs(self.seconds);
        let mut publishers = JoinSet::new();
        for _ in 0..self.publishers {
            let share = self.max_events / self.publishers as u64;
            let entry = entry(self.size);
            publishers.spawn(publish(store.clone(), cursor.stream.clone(), vec![entry; self.batch], end, share));
        }
        let mut acknowledged = 0_u64;
        let mut published = 0_u64;
        while !publishers.is_empty() || acknowledged < published {
            let deliveries = store.fetch(&cursor, FETCH, WAIT).await?;
            while let Some(done) = publishers.try_join_next() {
                published += done??;
            }
            ensure!(start.elapsed() < Duration::from_secs(self.seconds + 60), "the consumer does not come to an end");
            let settlements: Vec<_> =
                deliveries.into_iter().map(|delivery| Settlement { delivery, outcome: Outcome::Acknowledge }).collect();
            if !settlements.is_empty() {
                acknowledged += store.settle(&cursor, &settlements).await?.settled as u64;
            }
        }
        let throughput = Throughput::since(start, acknowledged);
        store.close().await;
        Ok(throughput)
    }
}

async fn publish(
    store: Arc<EmbeddedStore>,
    stream: StreamName,
    entries: Vec<NewEntry>,
    end: Instant,
    max_events: u64,
) -> Result<u64> {
    let mut published = 0;
    while Instant::now() < end && published < max_events {
        published += store.append(&stream, entries.clone()).await.context("cannot append")?.len() as u64;
    }
    Ok(published)
}

fn entry(size: usize) -> NewEntry {
    let mut fields = Fields::default();
    fields.push(field::DATA, Bytes::from(Template::new(size).bytes(0, 0)));
    NewEntry { fields, idempotency: None }
}
