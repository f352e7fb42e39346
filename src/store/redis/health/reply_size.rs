//! Estimates the size of each stream's entries, so that no reply is too large to arrive in time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::event::{Entry, StreamName};

/// The maximum size of one reply.
const REPLY_BYTES: usize = 8 << 20;
/// The assumed size of an entry until some were read: 512 of them fill a reply.
const ASSUMED: usize = 16 << 10;
/// The maximum number of remembered streams. Beyond it, all are forgotten.
const MAX_STREAMS: usize = 10_000;

/// The mean size of the recently read entries of each stream, in bytes.
#[derive(Debug, Default)]
pub(crate) struct ReplySizer(Mutex<HashMap<StreamName, usize>>);

impl ReplySizer {
    /// Returns the number of entries to request, at most `limit`.
    pub(crate) fn bounded(&self, stream: &StreamName, limit: usize) -> usize {
        let size = self.lock().get(stream).copied().unwrap_or(ASSUMED);
        limit.min(REPLY_BYTES / size.max(1)).max(1)
    }

    /// Records entries that were read. The mean shrinks slowly.
    pub(crate) fn learn(&self, stream: &StreamName, entries: &[Entry]) {
        if entries.is_empty() {
            return;
        }
        let mean = entries.iter().map(|entry| entry.fields.size_bytes()).sum::<usize>() / entries.len();
        let mut sizes = self.lock();
        if let Some(known) = sizes.get_mut(stream) {
            *known = mean.max(*known / 4 * 3);
            return;
        }
        if sizes.len() >= MAX_STREAMS {
            sizes.clear();
        }
        sizes.insert(stream.clone(), mean);
    }

    /// Records that a reply did not arrive in time: it may have been too large.
    pub(crate) fn record_timeout(&self, stream: &StreamName) {
        let mut sizes = self.lock();
        let known = sizes.entry(stream.clone()).or_insert(ASSUMED);
        *known = (*known).max(ASSUMED).saturating_mul(8).min(REPLY_BYTES);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamName, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EntryId, Fields};

    fn entry(bytes: usize) -> Entry {
        let mut fields = Fields::default();
        fields.push("d", vec![0; bytes - 1]);
        Entry { id: EntryId::MIN, fields }
    }

    #[test]
    fn large_entries_are_requested_in_small_numbers() {
        let (sizes, stream) = (ReplySizer::default(), "s".parse().expect("a name"));
        assert_eq!(sizes.bounded(&stream, 500), 500);
        sizes.learn(&stream, &[entry(1 << 20), entry(1 << 20)]);
        assert_eq!(sizes.bounded(&stream, 500), 8);
        sizes.learn(&stream, &[entry(10)]);
        assert_eq!(sizes.bounded(&stream, 500), 10, "one small reply proves little");
        for _ in 0..40 {
            sizes.learn(&stream, &[entry(10)]);
        }
        assert_eq!(sizes.bounded(&stream, 500), 500);
    }

    #[test]
    fn missing_replies_halve_the_next_request() {
        let (sizes, stream) = (ReplySizer::default(), "s".parse().expect("a name"));
        let mut asked = Vec::new();
        for _ in 0..5 {
            asked.push(sizes.bounded(&stream, 500));
            sizes.record_timeout(&stream);
        }
        assert_eq!(asked, [500, 64, 8, 1, 1]);
    }
}
