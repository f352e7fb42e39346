//! The hard limits of streams: appends that would exceed them are refused.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Appended, Durability, Families, Store, StoreError, StoreErrorKind};
use crate::event::{Family, GroupName, NewEntry, StreamName};

/// The hard limits of streams, and how long each stream is, as far as this process knows.
///
/// The length is told by whoever looks at the stream now and then, and grows with each append that goes through this
/// process: asking the store before each append would cost more than it gains. So a stream exceeds its limit by what
/// other processes append between two looks.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    fixed: Arc<HashMap<StreamName, Arc<Limit>>>,
    families: Families,
    /// How many entries each member of a family may hold, by the family's name.
    of_families: Arc<HashMap<String, u64>>,
    members: Arc<RwLock<HashMap<StreamName, Arc<Limit>>>>,
}

#[derive(Debug)]
struct Limit {
    hard_max_len: u64,
    length: AtomicU64,
    /// The group that keeps the oldest entry from being trimmed.
    holder: Mutex<Option<GroupName>>,
}

impl Limits {
    /// Limits for these streams, in entries.
    pub fn new(limits: impl IntoIterator<Item = (StreamName, u64)>) -> Self {
        let limit = |(stream, hard_max_len)| (stream, Arc::new(Limit::new(hard_max_len)));
        Self { fixed: Arc::new(limits.into_iter().map(limit).collect()), ..Self::default() }
    }

    /// The same with limits for each member of these families, in entries.
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
        let roster = self.families.of(stream).filter(|roster| roster.has(stream))?;
        let hard_max_len = *self.of_families.get(roster.family().name())?;
        if let Some(limit) = self.members.read().unwrap_or_else(PoisonError::into_inner).get(stream) {
            return Some(Arc::clone(limit));
        }
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(members.entry(stream.clone()).or_insert_with(|| Arc::new(Limit::new(hard_max_len)))))
    }

    /// How many entries a stream is taken to hold; asked for before a look at it.
    pub fn known(&self, stream: &StreamName) -> u64 {
        self.of(stream).map_or(0, |limit| limit.length.load(Ordering::Relaxed))
    }

    /// Tells what a look at a stream found: how many entries it holds, and which group still needs the oldest one, if
    /// any does. Whether the look has seen what was appended through this process since `known` was asked for, no one
    /// can tell: it counts as not seen, unless the stream would then be longer than it was ever known to be.
    pub fn tell(&self, stream: &StreamName, known: u64, length: u64, holder: Option<GroupName>) {
        if let Some(limit) = self.of(stream) {
            let with_appended = |now: u64| Some(length.saturating_add(now.saturating_sub(known)).min(length.max(now)));
            // It always has a value to give.
            limit.length.fetch_update(Ordering::Relaxed, Ordering::Relaxed, with_appended).ok();
            *limit.holder.lock().unwrap_or_else(PoisonError::into_inner) = holder;
        }
    }

    /// Whether a stream has room for another entry.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Full`] where it has not.
    pub fn check(&self, stream: &StreamName) -> Result<(), StoreError> {
        let Some(limit) = self.of(stream) else { return Ok(()) };
        limit.reserve(stream, 1)?;
        limit.give_back(1);
        Ok(())
    }

    /// Appends to a stream that has room for the entries.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Full`] where it has not; otherwise what [`Store::append_durably`] fails with.
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
            // Whether they were stored otherwise is unknown: the next look tells.
            Err(error) => count.saturating_sub(error.stored()),
        };
        limit.give_back(not_stored);
        result
    }
}

impl Limit {
    fn new(hard_max_len: u64) -> Self {
        Self { hard_max_len, length: AtomicU64::new(0), holder: Mutex::new(None) }
    }

    /// Makes room for so many entries, if there is any.
    fn reserve(&self, stream: &StreamName, entries: u64) -> Result<(), StoreError> {
        let length = self.length.fetch_add(entries, Ordering::Relaxed);
        if length.saturating_add(entries) <= self.hard_max_len {
            return Ok(());
        }
        self.give_back(entries);
        let holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        let why = match &*holder {
            Some(group) => format!("group `{group}` has still to handle the oldest one"),
            None => "they are about to be trimmed".to_owned(),
        };
        let limit = self.hard_max_len;
        let message = format!(
            "cannot append to stream `{stream}`: it holds {length} entries, {limit} are allowed \
             (retention.hard_max_len), and {why}"
        );
        Err(StoreError::new(StoreErrorKind::Full, message))
    }

    fn give_back(&self, entries: u64) {
        let less = |length: u64| Some(length.saturating_sub(entries));
        // It always has a value to give.
        self.length.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_takes_as_many_entries_as_are_allowed() {
        let stream: StreamName = "aurora:alerts".parse().expect("a valid name");
        let limits = Limits::new([(stream.clone(), 10)]);
        let limit = &limits.fixed[&stream];
        limit.reserve(&stream, 9).expect("room");
        let error = limit.reserve(&stream, 2).expect_err("no room");
        assert_eq!(error.kind(), StoreErrorKind::Full);
        limit.reserve(&stream, 1).expect("room");
        limit.give_back(1);
        limit.reserve(&stream, 1).expect("room");
        let known = limits.known(&stream);
        limits.tell(&stream, known, 3, Some("siem".parse().expect("a valid name")));
        limit.reserve(&stream, 7).expect("room");
        let error = limit.reserve(&stream, 1).expect_err("no room").to_string();
        assert!(error.contains("holds 10 entries, 10 are allowed") && error.contains("`siem`"), "{error}");
    }

    #[test]
    fn what_is_appended_during_a_look_is_not_forgotten() {
        let stream: StreamName = "aurora:alerts".parse().expect("a valid name");
        let limits = Limits::new([(stream.clone(), 10)]);
        let known = limits.known(&stream);
        limits.fixed[&stream].reserve(&stream, 8).expect("room");
        limits.tell(&stream, known, 0, None);
        assert!(limits.fixed[&stream].reserve(&stream, 3).is_err());
        // Nor does it count twice where the look has seen it.
        limits.tell(&stream, known, 8, None);
        limits.fixed[&stream].reserve(&stream, 2).expect("room");
    }
}
