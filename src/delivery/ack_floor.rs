//! The ack floor of a group: the position up to which it has settled everything.
//!
//! A group that is gone, as after a `FLUSHALL`, is made again at its last known floor. It then repeats at most the
//! entries that it settled after the floor was read.

use crate::event::{EntryId, Epoch};
use crate::store::{Cursor, Start, Store, StoreError};

/// The entry id up to which a group has settled everything, in one epoch of its stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AckFloor {
    epoch: Epoch,
    pub(crate) id: EntryId,
    /// Whether the group had pending entries when the floor was read.
    pub(crate) has_pending: bool,
}

/// Makes the group if it is missing. Returns whether it was made now, and its ack floor.
///
/// A group that was lost starts again at `known` if the stream still has the same epoch, else at `start`.
pub(crate) async fn ensure_group(
    store: &dyn Store,
    cursor: &Cursor,
    start: Start,
    known: Option<AckFloor>,
) -> Result<(bool, Option<AckFloor>), StoreError> {
    let (stream, group) = (&cursor.stream, &cursor.group);
    let start = match known {
        Some(known) if store.epoch(stream).await? == known.epoch => Start::After(known.id),
        _ => start,
    };
    let is_new = store.ensure_group(stream, group, start).await?;
    Ok((is_new, read_ack_floor(store, cursor).await?))
}

/// Reads the ack floor of the cursor's group. Returns `None` if the stream or the group does not exist.
pub(crate) async fn read_ack_floor(store: &dyn Store, cursor: &Cursor) -> Result<Option<AckFloor>, StoreError> {
    let Some(status) = store.describe(&cursor.stream).await? else { return Ok(None) };
    let epoch = store.epoch(&cursor.stream).await?;
    let group = status.groups.into_iter().find(|group| group.name == cursor.group);
    Ok(group.map(|group| {
        let id = group.oldest_pending.map_or(group.last_delivered, EntryId::previous);
        AckFloor { epoch, id, has_pending: group.pending > 0 }
    }))
}
