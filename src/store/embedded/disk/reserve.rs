//! A file of nothing that keeps room on the disk.
//!
//! When the disk is full it is removed, so that acknowledgements, trims and checkpoints go on; appends are refused until
//! there is room for it again.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often it is tried to have the room again.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
    /// Since when the room is given up, or when it was last tried to have it again.
    given_up: Option<Instant>,
}

impl Reserve {
    /// Makes the file if it is not there. Where there is no room for it, the disk counts as full.
    pub(crate) fn new(path: PathBuf, bytes: u64) -> Self {
        let mut reserve = Self { path, bytes, given_up: None };
        if let Err(error) = reserve.make() {
            tracing::error!(error = %error, bytes, "the disk of the embedded store is full");
            reserve.give_up();
        }
        reserve
    }

    /// The bytes it keeps.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the disk is full; where it was, tries now and then whether it is still, also by `has_room`.
    pub(crate) fn is_given_up(&mut self, has_room: impl FnOnce(u64) -> bool) -> bool {
        let Some(since) = self.given_up else { return false };
        if since.elapsed() < TRY_EVERY {
            return true;
        }
        if has_room(self.bytes) || self.make().is_ok() {
            self.given_up = None;
            tracing::info!("the disk of the embedded store has room again");
            return false;
        }
        self.give_up();
        true
    }

    /// Makes room.
    pub(crate) fn give_up(&mut self) {
        if self.given_up.is_none() {
            tracing::error!("the disk of the embedded store is full; entries are refused until there is room");
        }
        self.given_up = Some(Instant::now());
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(error = %error, "the reserve of the embedded store could not be removed");
        }
    }

    fn make(&self) -> std::io::Result<()> {
        if std::fs::metadata(&self.path).is_ok_and(|file| file.len() == self.bytes) {
            return Ok(());
        }
        let mut file = File::create(&self.path)?;
        let zeros = vec![0; 256 * 1024];
        let mut left = self.bytes;
        while left > 0 {
            let piece = zeros.len().min(usize::try_from(left).unwrap_or(zeros.len()));
            file.write_all(&zeros[..piece])?;
            left -= piece as u64;
        }
        Ok(())
    }
}
