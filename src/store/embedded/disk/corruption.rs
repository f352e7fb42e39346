//! Damage to the structure of the database file, reported with the file's name and the remedy.
//!
//! The engine can find it when the store is opened and at any later time. After that no write to the file can be
//! trusted. A chunk with a wrong checksum is another case: its entries are named and can be discarded, see
//! `schema::damaged_chunk`.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::store::{StoreError, StoreErrorKind};

/// The first damage found since the store was opened.
#[derive(Debug)]
pub(crate) struct FileDamage {
    file: PathBuf,
    found: OnceLock<String>,
}

impl FileDamage {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { file, found: OnceLock::new() }
    }

    /// Records the error of a failed call if the engine reports a damaged file.
    pub(crate) fn note(&self, error: &StoreError) {
        if error.kind() == StoreErrorKind::Corrupt
            && let Some(cause) = engine_cause(error)
        {
            self.found.get_or_init(|| {
                let text = format!("{error}; {}", remedy(&self.file));
                tracing::error!(error = cause, "{text}");
                text
            });
        }
    }

    /// Fails after damage was found: the store then refuses entries and is not ready.
    pub(crate) fn fail_if_any(&self) -> Result<(), StoreError> {
        self.found.get().map_or(Ok(()), |text| Err(StoreError::new(StoreErrorKind::Corrupt, text.clone())))
    }
}

/// Adds the remedy to an error about a damaged file.
pub(crate) fn explained(error: StoreError, file: &Path) -> StoreError {
    // An error about a foreign file already names another remedy.
    let is_told = error.to_string().contains("store.embedded.path");
    if error.kind() == StoreErrorKind::Corrupt && !is_told { error.followed_by(&remedy(file)) } else { error }
}

/// Returns the engine's own message.
fn engine_cause(error: &StoreError) -> Option<String> {
    let mut cause = error.source();
    while let Some(known) = cause {
        if known.is::<rusqlite::Error>() {
            return Some(known.to_string());
        }
        cause = known.source();
    }
    None
}

fn remedy(file: &Path) -> String {
    let name = file.display();
    format!(
        "`{name}` is damaged: stop the daemon, move its folder away, and restore a backup of the folder or start with an \
         empty one; any SQLite can read the intact part of the damaged file"
    )
}
