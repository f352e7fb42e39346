//! How the store is configured, opened and ended.

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
use crate::store::embedded::disk::corruption::Damage;
use crate::store::embedded::disk::lock;
use crate::store::embedded::disk::lock::FolderLock;
use crate::store::embedded::disk::schema::is_closed_error;
use crate::store::embedded::memory::leases::Leases;
use crate::store::embedded::readers;
use crate::store::embedded::readers::Readers;
use crate::store::embedded::writer::queue::Queue;
use crate::store::embedded::writer::{DATABASE, Options, Syncing, Writer};
use crate::store::embedded::{EmbeddedStore, Shared};

/// Where the embedded store is and how durable it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The folder that the store keeps its files in; it is made where there is none.
    pub path: PathBuf,
    /// When an accepted entry is on the disk.
    pub durability: Durability,
    /// With `durability = "interval"`, how often what was accepted is written to the disk.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// Memory for the newest entries of all streams together, from which readers at the head are served.
    pub recent: ByteSize,
    /// Room kept on the disk by a file, for acknowledgements and trims to go on when the disk is full.
    pub reserve: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::from("data"),
            durability: Durability::Commit,
            interval: Duration::from_millis(50),
            recent: ByteSize::mib(16),
            reserve: ByteSize::mib(16),
        }
    }
}

/// When an accepted entry is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Before it is accepted: it survives a power cut.
    Commit,
    /// Within [`Config::interval`]: it survives a crash of the process, but a power cut takes the newest.
    Interval,
}

impl Config {
    /// Opens the store, and makes it where there is none. Blocking work is done on threads of its own.
    ///
    /// Fails where another process holds the folder, where it can't be written to, and where what is in it is damaged or
    /// of a newer format.
    pub async fn open(self) -> Result<EmbeddedStore, StoreError> {
        let (opened, when_opened) = oneshot::channel();
        readers::spawn("store-writer", move || match start(&self) {
            Ok((writer, store, files)) => {
                let end = End { shared: store.shared.clone(), ended: store.ended.clone() };
                // A store that no one takes closes itself.
                drop(opened.send(Ok(store)));
                writer.run(&end.shared.queue);
                files.close();
            }
            Err(error) => drop(opened.send(Err(error))),
        })?;
        when_opened.await.unwrap_or_else(|_panicked| Err(is_closed_error()))
    }
}

/// Tells everybody that the writer's thread has ended, also when it panicked.
struct End {
    shared: Arc<Shared>,
    ended: CancellationToken,
}

impl Drop for End {
    fn drop(&mut self) {
        self.shared.close();
        self.shared.queue.abandon();
        self.ended.cancel();
    }
}

/// What the writer's thread holds until it ends.
struct Files {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
    lock: FolderLock,
}

impl Files {
    fn close(self) {
        self.shared.close();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the embedded store had panicked");
            }
        }
        drop(self.lock);
    }
}

fn start(config: &Config) -> Result<(Writer, EmbeddedStore, Files), StoreError> {
    let lock = lock::lock(&config.path)?;
    let file = config.path.join(DATABASE);
    let syncing = match config.durability {
        Durability::Commit => Syncing::Each,
        Durability::Interval => Syncing::Every(config.interval),
    };
    let (shared, asked) = new_shared(&file);
    let recent_bytes = usize::try_from(config.recent.as_u64()).unwrap_or(usize::MAX);
    let options = Options { syncing, recent_bytes, reserve_bytes: config.reserve.as_u64() };
    let writer = Writer::open(&config.path, &options, shared.clone());
    let writer = writer.map_err(|error| corruption::explained(error, &file))?;
    let (readers, mut threads) = Readers::start(&file)?;
    threads.push(readers::start_checkpointer(&file, &shared, asked)?);
    shared.readers.get_or_init(|| readers);
    let is_synced_each = config.durability == Durability::Commit;
    let store = EmbeddedStore {
        shared: shared.clone(),
        leases: Leases::default(),
        ended: CancellationToken::new(),
        is_synced_each,
    };
    Ok((writer, store, Files { shared, threads, lock }))
}

/// What is shared while nothing is open yet, and where requests to checkpoint come out.
pub(super) fn new_shared(file: &Path) -> (Arc<Shared>, Receiver<()>) {
    let (checkpoints, asked) = readers::checkpoint_requests();
    let shared = Shared {
        streams: RwLock::default(),
        made: watch::Sender::new(()),
        news: watch::Sender::new(()),
        queue: Queue::new(),
        damage: Damage::new(file.to_owned()),
        readers: OnceLock::new(),
        is_checkpointed: AtomicBool::new(false),
        checkpoints: RwLock::new(Some(checkpoints)),
        closed: CancellationToken::new(),
    };
    (Arc::new(shared), asked)
}
