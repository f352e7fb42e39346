//! The raw rate of the engine: the store's transactions and chunks without the layers above. For the load generator.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::readers;
use super::writer::{DATABASE, Syncing, Writer, WriterOptions};
use crate::event::{Fields, StreamName, field};
use crate::store::embedded::disk::chunk;
use crate::store::embedded::disk::lock::lock;
use crate::store::embedded::open::new_shared;
use crate::store::{StoreError, StoreErrorKind};

/// The result of [`raw_append_rate`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawRate {
    /// The number of committed entries; each commit was synced.
    pub entries: u64,
    /// The time that the commits took.
    pub elapsed: Duration,
}

impl RawRate {
    /// Returns the entries per second.
    #[expect(clippy::cast_precision_loss, reason = "a rate is a rough number")]
    pub fn per_second(&self) -> f64 {
        self.entries as f64 / self.elapsed.as_secs_f64()
    }
}

/// Measures the append rate of the engine for about `duration`.
///
/// Appends batches of `batch` entries with one field `data` that holds `payload`, with one synced commit per batch, on
/// the calling thread. Creates its store in `folder`, which should be empty and on the disk to measure; the caller
/// removes it. Blocks: call it from a thread of its own. Fails like [`super::Config::open`] and like an append.
pub fn raw_append_rate(folder: &Path, payload: &[u8], batch: usize, duration: Duration) -> Result<RawRate, StoreError> {
    let _lock = lock(folder)?;
    let stream: StreamName = "raw"
        .parse()
        .map_err(|_name| StoreError::new(StoreErrorKind::Internal, "the name of the measured stream is invalid"))?;
    let (shared, asked) = new_shared(&folder.join(DATABASE));
    let options = WriterOptions { syncing: Syncing::Each, recent_bytes: 0, reserve_bytes: 0 };
    let mut writer = Writer::open(folder, &options, shared.clone())?;
    let checkpointer = readers::start_checkpointer(&folder.join(DATABASE), &shared, asked)?;
    let mut fields = Fields::default();
    fields.push(field::DATA, Bytes::copy_from_slice(payload));
    let mut encoded = Vec::new();
    chunk::encode(&fields, &mut encoded);
    let mut entries = 0;
    let begun = Instant::now();
    let result = loop {
        if begun.elapsed() >= duration {
            break Ok(());
        }
        let place = writer.place_or_new(&stream);
        for _ in 0..batch {
            writer.stage(place, &encoded);
        }
        if let Err(error) = writer.commit_now() {
            break Err(error);
        }
        entries += batch as u64;
    };
    let elapsed = begun.elapsed();
    shared.close();
    drop(writer);
    if checkpointer.join().is_err() {
        tracing::error!("the checkpointing thread had panicked");
    }
    result.map(|()| RawRate { entries, elapsed })
}
