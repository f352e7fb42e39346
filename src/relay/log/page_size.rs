//! The number of entries to read at a time, so that a read has about a given size.

use crate::event::Entry;

/// The maximum number of entries after a page's position. A page may also have some before it.
const MAX_PAGE: usize = 256;

/// The target size of a page in bytes. Each connection that catches up holds one page.
const PAGE_BYTES: usize = 64 * 1024;

/// The limit of the next read, adapted to the size of the entries before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageSize {
    limit: usize,
    max: usize,
    target_bytes: usize,
}

impl PageSize {
    /// Creates a limit for reads of at most `max` entries and about `target_bytes`.
    pub(crate) fn new(max: usize, target_bytes: usize) -> Self {
        Self { limit: max.min(32), max, target_bytes }
    }

    /// Returns the number of entries to read next.
    pub(crate) fn limit(self) -> usize {
        self.limit
    }

    /// Adapts the limit to the average size of these entries. It grows at most fourfold.
    pub(crate) fn adapt(&mut self, entries: &[Entry]) {
        let bytes: usize = entries.iter().map(|entry| entry.fields.size_bytes()).sum();
        if let Some(average) = bytes.checked_div(entries.len()) {
            let fitting = self.target_bytes / average.max(1);
            self.limit = fitting.clamp(1, self.max).min(self.limit * 4);
        }
    }
}

impl Default for PageSize {
    fn default() -> Self {
        Self::new(MAX_PAGE, PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::log::frame_batch::testing::entry;

    #[test]
    fn page_size_follows_the_size_of_entries() {
        let mut size = PageSize::default();
        assert_eq!(size.limit(), 32);
        let entries_of = |bytes: usize| vec![entry(1, &[("data", "x".repeat(bytes - 4).as_str())]); 32];
        size.adapt(&entries_of(100));
        assert_eq!(size.limit(), 128);
        size.adapt(&entries_of(100));
        assert_eq!(size.limit(), 256);
        size.adapt(&entries_of(1 << 20));
        assert_eq!(size.limit(), 1);
        size.adapt(&[]);
        assert_eq!(size.limit(), 1);
        size.adapt(&entries_of(500));
        assert_eq!(size.limit(), 4, "it grows fourfold at most");
    }
}
