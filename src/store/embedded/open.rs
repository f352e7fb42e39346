//! Configures, opens and closes the embedded store.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::store::StoreError;
use crate::store::embedded::disk::corruption;
use crate::store::embedded::disk::corruption::FileDamage;
use crate::store::embedded::disk::lock;
use crate::store::embedded::disk::lock::FolderLock;
use crate::store::embedded::disk::schema::is_closed_error;
use crate::store::embedded::memory::leases::Leases;
use crate::store::embedded::readers;
use crate::store::embedded::readers::Readers;
use crate::store::embedded::writer::queue::WriteQueue;
use crate::store::embedded::writer::{DATABASE, Syncing, Writer, WriterOptions};
use crate::store::embedded::{EmbeddedStore, Shared};

/// The configuration of the embedded store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder of the store's files. It is created if it is missing.
    pub path: PathBuf,
    /// When an accepted entry is on the disk: `commit` or `interval`.
    pub durability: SyncMode,
    /// The interval between syncs with `durability = "interval"`.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// The memory for the newest entries of all streams, which serves readers at the head.
    pub recent: ByteSize,
    /// The size of a file that reserves disk space, so that acknowledgements and trims still work on a full disk.
    pub reserve: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::from("data"),
            durability: SyncMode::Commit,
            interval: Duration::from_millis(50),
            recent: ByteSize::mib(16),
            reserve: ByteSize::mib(16),
        }
    }
}

/// When an accepted entry is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// Before it is accepted: the entry survives a power cut.
    Commit,
    /// Within [`Config::interval`]: the entry survives a crash of the process, but a power cut loses the newest ones.
    Interval,
}

impl Config {
    /// Opens the store, and creates it if it is missing. Blocking work runs on threads of its own.
    ///
    /// Fails if another process holds the folder, if the folder is not writable, and if its data is damaged or of a
    /// newer format.
    pub async fn open(self) -> Result<EmbeddedStore, StoreError> {
        let (opened, when_opened) = oneshot::channel();
        readers::spawn("store-writer", move || match start(&self) {
            Ok((writer, store, files)) => {
                let end = WriterEnd { shared: store.shared.clone(), ended: store.ended.clone() };
                // If the receiver is gone, dropping the store closes it.
                drop(opened.send(Ok(store)));
                writer.run(&end.shared.queue);
                files.close();
            }
            Err(error) => drop(opened.send(Err(error))),
        })?;
        when_opened.await.unwrap_or_else(|_panicked| Err(is_closed_error()))
    }
}

/// Reports the end of the writer's thread when dropped, after a panic as well.
struct WriterEnd {
    shared: Arc<Shared>,
    ended: CancellationToken,
}

impl Drop for WriterEnd {
    fn drop(&mut self) {
        self.shared.close();
        self.shared.queue.abandon();
        self.ended.cancel();
    }
}

/// The resources of the writer's thread.
struct WriterFiles {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
    lock: FolderLock,
}

impl WriterFiles {
    fn close(self) {
        self.shared.close();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the embedded store panicked");
            }
        }
        drop(self.lock);
    }
}

fn start(config: &Config) -> Result<(Writer, EmbeddedStore, WriterFiles), StoreError> {
    let lock = lock::lock(&config.path)?;
    let file = config.path.join(DATABASE);
    let syncing = match config.durability {
        SyncMode::Commit => Syncing::Each,
        SyncMode::Interval => Syncing::Every(config.interval),
    };
    let (shared, asked) = new_shared(&file);
    let recent_bytes = usize::try_from(config.recent.as_u64()).unwrap_or(usize::MAX);
    let options = WriterOptions { syncing, recent_bytes, reserve_bytes: config.reserve.as_u64() };
    let writer = Writer::open(&config.path, &options, shared.clone());
    let writer = writer.map_err(|error| corruption::explained(error, &file))?;
    let (readers, mut threads) = Readers::start(&file)?;
    threads.push(readers::start_checkpointer(&file, &shared, asked)?);
    shared.readers.get_or_init(|| readers);
    let is_synced_each = config.durability == SyncMode::Commit;
    let store = EmbeddedStore {
        shared: shared.clone(),
        leases: Leases::default(),
        ended: CancellationToken::new(),
        is_synced_each,
    };
    Ok((writer, store, WriterFiles { shared, threads, lock }))
}

/// Creates the shared state of a store that is not open yet, and the receiver of checkpoint requests.
pub(super) fn new_shared(file: &Path) -> (Arc<Shared>, Receiver<()>) {
    let (checkpoints, asked) = readers::checkpoint_requests();
    let shared = Shared {
        streams: RwLock::default(),
        made: watch::Sender::new(()),
        news: watch::Sender::new(()),
        queue: WriteQueue::new(),
        damage: FileDamage::new(file.to_owned()),
        readers: OnceLock::new(),
        is_checkpointed: AtomicBool::new(false),
        checkpoints: RwLock::new(Some(checkpoints)),
        closed: CancellationToken::new(),
    };
    (Arc::new(shared), asked)
}
