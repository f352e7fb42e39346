//! The ceilings of the embedded store, opened in this process without a daemon.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aurora_bus::event::{Fields, NewEntry, StreamName, field};
use aurora_bus::store::embedded::{Config, EmbeddedStore, raw_append_rate};
use aurora_bus::store::{Cursor, Outcome, Settlement, Start, Store};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::payload::EventTemplate;
use crate::stats::Throughput;

/// The number of entries that the consumer fetches and settles at once.
const FETCH: usize = 500;
/// The longest wait for the next entry.
const WAIT: Duration = Duration::from_millis(200);

/// Appends with the engine alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct EngineAppendJob {
    /// A folder that is empty or does not exist.
    pub(crate) folder: PathBuf,
    /// Entries per synced commit.
    pub(crate) batch: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
}

impl EngineAppendJob {
    pub(crate) fn run(&self) -> Result<Throughput> {
        let payload = EventTemplate::new(self.size).bytes(0, 0);
        let rate = raw_append_rate(&self.folder, &payload, self.batch, Duration::from_secs(self.seconds))?;
        Ok(Throughput { events: rate.entries, seconds: rate.elapsed.as_secs_f64() })
    }
}

/// Appends, fetches and acknowledges concurrently.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoreMixedJob {
    /// A folder that is empty or does not exist.
    pub(crate) folder: PathBuf,
    /// The number of concurrent appends.
    pub(crate) publishers: usize,
    /// Entries per append.
    pub(crate) batch: usize,
    /// Bytes per event.
    pub(crate) size: usize,
    pub(crate) seconds: u64,
    /// The number of events that ends the job early.
    pub(crate) max_events: u64,
}

impl StoreMixedJob {
    /// Runs until all appended entries are acknowledged.
    pub(crate) fn run(&self) -> Result<Throughput> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let throughput = runtime.block_on(self.measure());
        runtime.shutdown_background();
        throughput
    }

    async fn measure(&self) -> Result<Throughput> {
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
            ensure!(
                start.elapsed() < Duration::from_secs(self.seconds + 60),
                "the consumer did not acknowledge all entries within a minute of the end"
            );
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
    fields.push(field::DATA, Bytes::from(EventTemplate::new(size).bytes(0, 0)));
    NewEntry { fields, idempotency: None }
}
