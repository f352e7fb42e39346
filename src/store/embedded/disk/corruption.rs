//! A database file that the engine finds damaged: told with the file's name and the way out, when the store is opened
//! and at any later time.
//!
//! A chunk whose own checksum is wrong is no such damage: its entries are told and can be given up, see
//! `tables::damaged_chunk`. Here it is the structure of the file, which nothing can be trusted to be written into any
//! more.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::store::{StoreError, StoreErrorKind};

/// What was found damaged since the store was opened.
#[derive(Debug)]
pub(crate) struct Damage {
    file: PathBuf,
    found: OnceLock<String>,
}

impl Damage {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { file, found: OnceLock::new() }
    }

    /// Looks at a failed call: where the engine says that its file is damaged, that is remembered.
    pub(crate) fn note(&self, error: &StoreError) {
        if error.kind() == StoreErrorKind::Corrupt
            && let Some(cause) = engine_cause(error)
        {
            self.found.get_or_init(|| {
                let text = format!("{error}; {}", way_out(&self.file));
                tracing::error!(error = cause, "{text}");
                text
            });
        }
    }

    /// Fails once damage was found: the store takes no more entries, and is not ready.
    pub(crate) fn fail_if_any(&self) -> Result<(), StoreError> {
        self.found.get().map_or(Ok(()), |text| Err(StoreError::new(StoreErrorKind::Corrupt, text.clone())))
    }
}

/// The same error with what can be done about a damaged file, where it is about one.
pub(crate) fn explained(error: StoreError, file: &Path) -> StoreError {
    // What is not ours is told so, with another way out.
    let is_told = error.to_string().contains("store.embedded.path");
    if error.kind() == StoreErrorKind::Corrupt && !is_told { error.followed_by(&way_out(file)) } else { error }
}

/// What the engine itself said.
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

fn way_out(file: &Path) -> String {
    let name = file.display();
    format!(
        "`{name}` is damaged: stop the daemon and move its folder away, then put a backup of the folder in its place, or \
         begin with an empty one; any SQLite shows what can still be read of the damaged file"
    )
}
