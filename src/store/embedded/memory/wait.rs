//! The wait for new entries of many streams.

use std::time::{Duration, Instant};

use crate::event::{EntryId, StreamName};
use crate::store::StoreError;
use crate::store::embedded::{EmbeddedStore, changed};

impl EmbeddedStore {
    pub(crate) async fn wait_for_any(
        &self,
        positions: &[(StreamName, EntryId)],
        wait: Duration,
    ) -> Result<Vec<(StreamName, EntryId)>, StoreError> {
        let deadline = Instant::now() + wait;
        let mut any = self.shared.news.subscribe();
        loop {
            any.mark_unchanged();
            self.fail_if_closed()?;
            let newer = |(stream, after): &(StreamName, EntryId)| {
                let newest = *self.shared.find(stream)?.newest.borrow();
                (newest > *after).then(|| (stream.clone(), newest))
            };
            let changed_streams: Vec<_> = positions.iter().filter_map(newer).collect();
            if !changed_streams.is_empty() || !changed(&mut any, deadline, &self.shared.closed).await {
                return Ok(changed_streams);
            }
        }
    }
}
