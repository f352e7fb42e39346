//! The lock of the store's folder: one process at a time uses it.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::store::{StoreError, StoreErrorKind};

/// The file whose lock marks the folder as used.
const LOCK: &str = "lock";

/// Holds the folder for this process until it is dropped.
#[derive(Debug)]
pub(crate) struct FolderLock(File);

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child process that is being started shares the lock.
        if let Err(error) = self.0.unlock() {
            tracing::warn!(error = %error, "cannot unlock the folder of the store");
        }
    }
}

/// Locks the folder for this process. Creates it if it is missing.
pub(crate) fn lock(folder: &Path) -> Result<FolderLock, StoreError> {
    let name = folder.display();
    let unusable = |what: &str, error: std::io::Error| {
        let hint = "give the daemon a folder that it may write to with store.embedded.path";
        let kind = match error.kind() {
            std::io::ErrorKind::PermissionDenied => StoreErrorKind::Denied,
            std::io::ErrorKind::StorageFull => StoreErrorKind::Full,
            _ => StoreErrorKind::Unavailable,
        };
        StoreError::new(kind, format!("cannot {what} the folder `{name}`: {error}; {hint}"))
    };
    std::fs::create_dir_all(folder).map_err(|error| unusable("make", error))?;
    let file = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK));
    let file = file.map_err(|error| unusable("write to", error))?;
    match file.try_lock() {
        Ok(()) => Ok(FolderLock(file)),
        Err(TryLockError::WouldBlock) => Err(StoreError::new(
            StoreErrorKind::Unavailable,
            format!(
                "another aurora-bus holds the folder `{name}`; stop it, or set store.embedded.path to a folder of its own"
            ),
        )),
        Err(TryLockError::Error(error)) => Err(unusable("lock", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlock_frees_folder_despite_inherited_handle() {
        let folder = tempfile::TempDir::new().expect("a temporary folder");
        let held = lock(folder.path()).expect("a free folder");
        assert!(lock(folder.path()).is_err());
        let inherited = held.0.try_clone().expect("a handle");
        drop(held);
        assert!(lock(folder.path()).is_ok());
        drop(inherited);
    }
}
