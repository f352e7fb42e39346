//! Hard limits of streams: refuses appends that would exceed them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Appended, Durability, Families, Store, StoreError, StoreErrorKind};
use crate::event::{Family, GroupName, NewEntry, StreamName};

/// The hard limits of streams, and the length of each stream as known to this process.
///
/// The maintenance reports the length now and then, and each append of this process adds to it. Asking the store before
/// each append would cost more than it gains. So a stream can exceed its limit by the entries that other processes
/// append between two reports.
#[derive(Debug, Clone, Default)]
pub struct HardLimits {
    fixed: Arc<HashMap<StreamName, Arc<Limit>>>,
    families: Families,
    /// The limit of each member of a family, by the family's name.
    of_families: Arc<HashMap<String, u64>>,
    members: Arc<RwLock<HashMap<StreamName, Arc<Limit>>>>,
}

#[derive(Debug)]
struct Limit {
    hard_max_len: u64,
    length: AtomicU64,
    /// The group that has not settled the oldest entry.
    holder: Mutex<Option<GroupName>>,
}

impl HardLimits {
    /// Creates limits for these streams, in entries.
    pub fn new(limits: impl IntoIterator<Item = (StreamName, u64)>) -> Self {
        let limit = |(stream, hard_max_len)| (stream, Arc::new(Limit::new(hard_max_len)));
        Self { fixed: Arc::new(limits.into_iter().map(limit).collect()), ..Self::default() }
    }

    /// Adds limits for each member of these families, in entries.
    #[must_use]
    pub fn with_families(mut self, families: Families, limits: impl IntoIterator<Item = (Family, u64)>) -> Self {
        let limit = |(family, hard_max_len): (Family, u64)| (family.name().to_owned(), hard_max_len);
        self.families = families;
        self.of_families = Arc::new(limits.into_iter().map(limit).collect());
        self
    }

    fn of(&self, stream: &StreamName) -> Option<Arc<Limit>> {
        if let Some(limit) = self.fixed.get(stream) {
            return Some(Arc::clone(limit));
        }
        let family_members = self.families.of(stream).filter(|family_members| family_members.has(stream))?;
        let hard_max_len = *self.of_families.get(family_members.family().name())?;
        if let Some(limit) = self.members.read().unwrap_or_else(PoisonError::into_inner).get(stream) {
            return Some(Arc::clone(limit));
        }
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(members.entry(stream.clone()).or_insert_with(|| Arc::new(Limit::new(hard_max_len)))))
    }

    /// Returns the known length of a stream. Call it before describing the stream, for [`HardLimits::report`].
    pub fn known(&self, stream: &StreamName) -> u64 {
        self.of(stream).map_or(0, |limit| limit.length.load(Ordering::Relaxed))
    }

    /// Records the length of a stream, and the group that has not settled the oldest entry.
    ///
    /// The length may or may not include the entries that this process appended since `known` was read. They count as
    /// not included, unless the stream would then be longer than ever known.
    pub fn report(&self, stream: &StreamName, known: u64, length: u64, holder: Option<GroupName>) {
        if let Some(limit) = self.of(stream) {
            let with_appended = |now: u64| Some(length.saturating_add(now.saturating_sub(known)).min(length.max(now)));
            // Cannot fail: the closure always returns a value.
            limit.length.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with_appended).ok();
            *limit.holder.lock().unwrap_or_else(PoisonError::into_inner) = holder;
        }
    }

    /// Checks that a stream has room for another entry.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Full`] if it has none.
    pub fn check(&self, stream: &StreamName) -> Result<(), StoreError> {
        let Some(limit) = self.of(stream) else { return Ok(()) };
        limit.reserve(stream, 1)?;
        limit.release(1);
        Ok(())
    }

    /// Appends to a stream if it has room for the entries.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Full`] if it has no room; otherwise the errors of [`Store::append_durably`].
    pub async fn append(
        &self,
        store: &dyn Store,
        stream: &StreamName,
        entries: Vec<NewEntry>,
        durability: Durability,
    ) -> Result<Vec<Appended>, StoreError> {
        let Some(limit) = self.of(stream) else {
            return store.append_durably(stream, entries, durability).await;
        };
        let count = entries.len() as u64;
        limit.reserve(stream, count)?;
        let result = store.append_durably(stream, entries, durability).await;
        let not_stored = match &result {
            Ok(appended) => appended.iter().filter(|appended| appended.duplicate).count() as u64,
            // Other entries may have been stored as well: the next report corrects the length.
            Err(error) => count.saturating_sub(error.stored()),
        };
        limit.release(not_stored);
        result
    }
}

impl Limit {
    fn new(hard_max_len: u64) -> Self {
        Self { hard_max_len, length: AtomicU64::new(0), holder: Mutex::new(None) }
    }

    /// Reserves room for this many entries.
    fn reserve(&self, stream: &StreamName, entries: u64) -> Result<(), StoreError> {
        let length = self.length.fetch_add(entries, Ordering::Relaxed);
        if length.saturating_add(entries) <= self.hard_max_len {
            return Ok(());
        }
        self.release(entries);
        let holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        let why = match &*holder {
            Some(group) => format!("group `{group}` has not settled the oldest one"),
            None => "trimming is due".to_owned(),
        };
        let limit = self.hard_max_len;
        let message = format!(
            "cannot append to stream `{stream}`: it holds {length} of at most {limit} entries \
             (retention.hard_max_len), and {why}"
        );
        Err(StoreError::new(StoreErrorKind::Full, message))
    }

    fn release(&self, entries: u64) {
        let less = |length: u64| Some(length.saturating_sub(entries));
        // Cannot fail: the closure always returns a value.
        self.length.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn append_beyond_hard_limit_is_refused() {
        let stream: StreamName = "aurora:alerts".parse().expect("a valid name");
        let limits = HardLimits::new([(stream.clone(), 10)]);
        let limit = &limits.fixed[&stream];
        limit.reserve(&stream, 9).expect("room");
        let error = limit.reserve(&stream, 2).expect_err("no room");
        assert_eq!(error.kind(), StoreErrorKind::Full);
        limit.reserve(&stream, 1).expect("room");
        limit.release(1);
        limit.reserve(&stream, 1).expect("room");
        let known = limits.known(&stream);
        limits.report(&stream, known, 3, Some("siem".parse().expect("a valid name")));
        limit.reserve(&stream, 7).expect("room");
        let error = limit.reserve(&stream, 1).expect_err("no room").to_string();
        assert!(error.contains("holds 10 of at most 10 entries") && error.contains("`siem`"), "{error}");
    }

    #[test]
    fn entries_appended_during_a_report_are_counted_once() {
        let stream: StreamName = "aurora:alerts".parse().expect("a valid name");
        let limits = HardLimits::new([(stream.clone(), 10)]);
        let known = limits.known(&stream);
        limits.fixed[&stream].reserve(&stream, 8).expect("room");
        limits.report(&stream, known, 0, None);
        assert!(limits.fixed[&stream].reserve(&stream, 3).is_err());
        // They do not count twice if the report includes them.
        limits.report(&stream, known, 8, None);
        limits.fixed[&stream].reserve(&stream, 2).expect("room");
    }
}
