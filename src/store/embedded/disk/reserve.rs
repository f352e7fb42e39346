//! A file that reserves disk space.
//!
//! When the disk is full, the file is removed, so that acknowledgements, trims and checkpoints still work. Appends are
//! refused until there is space for the file again.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The interval between attempts to restore the reserve.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The reserve of disk space.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
    /// The time when the reserve was released, or of the last attempt to restore it.
    released: Option<Instant>,
}

impl Reserve {
    /// Creates the file if it is missing. If there is no space for it, the disk counts as full.
    pub(crate) fn new(path: PathBuf, bytes: u64) -> Self {
        let mut reserve = Self { path, bytes, released: None };
        if let Err(error) = reserve.make() {
            tracing::error!(error = %error, bytes, "the disk of the embedded store is full");
            reserve.release();
        }
        reserve
    }

    /// Returns its size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns whether the disk is full. Tries to restore a released reserve now and then, if `has_room` allows it.
    pub(crate) fn is_released(&mut self, has_room: impl FnOnce(u64) -> bool) -> bool {
        let Some(since) = self.released else { return false };
        if since.elapsed() < TRY_EVERY {
            return true;
        }
        if has_room(self.bytes) || self.make().is_ok() {
            self.released = None;
            tracing::info!("disk of the embedded store has space again, accepting entries");
            return false;
        }
        self.release();
        true
    }

    /// Removes the file, which frees its space.
    pub(crate) fn release(&mut self) {
        if self.released.is_none() {
            tracing::error!("disk of the embedded store is full, refusing entries");
        }
        self.released = Some(Instant::now());
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(error = %error, "removing the disk reserve of the embedded store failed");
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
