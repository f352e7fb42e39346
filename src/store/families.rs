//! The members of families, and one shared wait for their new entries.
//!
//! A family's keys are kept in its key index, a stream beside the members. The first `max_keys` different keys in it
//! are the family's. Every instance reads the same ones there, so that instances need not talk to each other. One call
//! of [`Store::wait_any`] waits for all members and the key index together, and wakes the readers of single members. While
//! nothing arrives, a reader costs neither a connection nor a request of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Cursor, Range, Store, StoreError, StoreErrorKind};
use crate::event::{Delivery, Entry, EntryId, Family, Fields, NewEntry, StreamName};
use crate::readiness::{Part, Readiness};

/// The timeout of one wait for new entries.
const WAIT: Duration = Duration::from_secs(2);
/// The time that the store may take beyond that.
const GRACE: Duration = Duration::from_secs(8);
/// The interval between checks of the key index.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// The pause per member after a wait that returned entries: the more members, the more one wait costs.
const POLL_SPACING: Duration = Duration::from_micros(10);
const MAX_POLL_SPACING: Duration = Duration::from_millis(20);
/// The pause after a failure.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The pause before a member that cannot be read is tried again.
const BROKEN_FOR: Duration = Duration::from_secs(30);
/// The number of key index entries read at a time.
const PAGE: usize = 512;
/// The readiness part counts as stuck after this time without a report.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// The field of the key index's entries.
const KEY: &str = "key";

/// The declared families. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Families(Arc<[Arc<FamilyMembers>]>);

/// Why a stream cannot become a member.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The family has the maximum number of keys.
    #[error("family `{family}` already has {max_keys} keys, the maximum (max_keys)")]
    Full {
        /// The family.
        family: Family,
        /// The maximum number of keys.
        max_keys: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Families {
    /// Creates the families, each with its maximum number of keys.
    pub fn new(families: impl IntoIterator<Item = (Family, usize)>) -> Self {
        Self(families.into_iter().map(|(family, max_keys)| Arc::new(FamilyMembers::new(family, max_keys))).collect())
    }

    /// Returns the family whose pattern matches the stream, member or not.
    pub fn of(&self, stream: &StreamName) -> Option<&Arc<FamilyMembers>> {
        self.0.iter().find(|family_members| family_members.family.key_of(stream).is_some())
    }

    /// Returns the family with that declared name.
    pub fn named(&self, name: &str) -> Option<&Arc<FamilyMembers>> {
        self.0.iter().find(|family_members| family_members.family.name() == name)
    }

    /// Returns all families.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<FamilyMembers>> {
        self.0.iter()
    }

    /// Returns the metric label of a stream: for a member the family's name, because keys have no bound.
    pub fn label<'a>(&'a self, stream: &'a StreamName) -> &'a str {
        self.of(stream).map_or(stream.as_str(), |family_members| family_members.family.name())
    }

    /// Creates a readiness part for each family, for [`Families::run`].
    pub fn parts(&self, readiness: &Readiness) -> Vec<Part> {
        let part = |family_members: &Arc<FamilyMembers>| {
            readiness.part(&format!("family {}", family_members.family), Some(STALE_AFTER))
        };
        self.iter().map(part).collect()
    }

    /// Follows the families until `stop`.
    pub async fn run(self, store: Arc<dyn Store>, parts: Vec<Part>, stop: CancellationToken) {
        let mut followers = JoinSet::new();
        for (family_members, part) in self.iter().cloned().zip(parts) {
            let (store, stop) = (Arc::clone(&store), stop.clone());
            followers.spawn(async move {
                stop.run_until_cancelled(family_members.follow(&*store, &part)).await;
            });
        }
        if followers.is_empty() {
            return stop.cancelled().await;
        }
        // Each runs until it is stopped, so an earlier end is a panic.
        while let Some(ended) = followers.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "family follower panicked");
                return;
            }
        }
    }
}

/// The members of one family, as known to this instance.
#[derive(Debug)]
pub struct FamilyMembers {
    family: Family,
    max_keys: usize,
    members: RwLock<BTreeMap<StreamName, watch::Sender<EntryId>>>,
    /// Changes when a member is added, and when any member has new entries.
    changes: watch::Sender<()>,
    /// Members whose newest entry is not known yet.
    fresh: Mutex<BTreeSet<StreamName>>,
    /// The reading position in the key index. Its lock also serialises writes.
    read: tokio::sync::Mutex<IndexPosition>,
}

/// The reading position in the key index.
#[derive(Debug, Default)]
struct IndexPosition {
    last: EntryId,
    /// The number of entries read. A key index that holds fewer has lost some.
    entries: u64,
}

impl FamilyMembers {
    fn new(family: Family, max_keys: usize) -> Self {
        Self {
            family,
            max_keys,
            members: RwLock::default(),
            changes: watch::Sender::new(()),
            fresh: Mutex::default(),
            read: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the family.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// Returns the maximum number of keys.
    pub fn max_keys(&self) -> usize {
        self.max_keys
    }

    /// Returns the known members, by name.
    pub fn members(&self) -> Vec<StreamName> {
        self.read_members().keys().cloned().collect()
    }

    /// Returns the known members, each with its newest known entry.
    pub fn newest(&self) -> Vec<(StreamName, EntryId)> {
        self.read_members().iter().map(|(stream, newest)| (stream.clone(), *newest.borrow())).collect()
    }

    /// Returns the newest known entry of a member, or `None` if the stream is not a member or nothing is known yet.
    pub fn newest_of(&self, stream: &StreamName) -> Option<EntryId> {
        let newest = self.read_members().get(stream).map(|newest| *newest.borrow())?;
        (!self.fresh().contains(stream)).then_some(newest)
    }

    /// Returns the number of members.
    pub fn len(&self) -> usize {
        self.read_members().len()
    }

    /// Returns whether it has no members.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether the stream is a known member.
    pub fn has(&self, stream: &StreamName) -> bool {
        self.read_members().contains_key(stream)
    }

    /// Returns a receiver that changes when a member is added, and when any member has new entries.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Returns whether the stream is a member, even if another instance added it just now.
    pub async fn finds(&self, store: &dyn Store, stream: &StreamName) -> Result<bool, StoreError> {
        if !self.has(stream) {
            self.read_index(store).await?;
        }
        Ok(self.has(stream))
    }

    /// Adds the stream as a member; it must match the family's pattern. Safe to repeat.
    pub async fn join(&self, store: &dyn Store, stream: &StreamName) -> Result<(), JoinError> {
        if self.has(stream) {
            return Ok(());
        }
        let full = || JoinError::Full { family: self.family.clone(), max_keys: self.max_keys };
        let mut read = self.read.lock().await;
        // Another instance may have added it, or another call of this one.
        self.read_new_keys(store, &mut read).await?;
        if self.has(stream) {
            return Ok(());
        }
        let key = self.family.key_of(stream).filter(|_| self.len() < self.max_keys).ok_or_else(full)?;
        self.append_keys(store, &[key]).await?;
        self.read_new_keys(store, &mut read).await?;
        drop(read);
        if !self.has(stream) {
            return Err(full());
        }
        tracing::info!(family = %self.family, stream = %stream, members = self.len(), "family member added");
        Ok(())
    }

    /// Works like [`Store::tail`]. All readers of all members share one wait of the store.
    pub(super) async fn tail(
        &self,
        store: &dyn Store,
        stream: &StreamName,
        after: EntryId,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, StoreError> {
        let deadline = Instant::now() + wait;
        loop {
            let mut changes = self.wait_for(stream);
            let entries = store.range(stream, Range::after(after), limit).await?;
            if !entries.is_empty() || limit == 0 || !changes.changed(deadline).await {
                return Ok(entries);
            }
        }
    }

    /// Works like [`Store::fetch`], and is not cancel-safe either. All readers share one wait of the store.
    pub(super) async fn fetch(
        &self,
        store: &dyn Store,
        cursor: &Cursor,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, StoreError> {
        let deadline = Instant::now() + wait;
        loop {
            let mut changes = self.wait_for(&cursor.stream);
            let deliveries = store.fetch(cursor, limit, Duration::ZERO).await?;
            if !deliveries.is_empty() || limit == 0 || !changes.changed(deadline).await {
                return Ok(deliveries);
            }
        }
    }

    fn wait_for(&self, stream: &StreamName) -> MemberWait {
        match self.read_members().get(stream) {
            Some(newest) => MemberWait::Member(newest.subscribe()),
            None => MemberWait::NotMember(self.changes.subscribe()),
        }
    }

    fn read_members(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<StreamName, watch::Sender<EntryId>>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> std::sync::MutexGuard<'_, BTreeSet<StreamName>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends keys to the key index. A repeated key has no effect.
    async fn append_keys(&self, store: &dyn Store, keys: &[&str]) -> Result<(), StoreError> {
        let entry = |key: &&str| {
            let key = Bytes::copy_from_slice(key.as_bytes());
            let fields: Fields = [(Bytes::from_static(KEY.as_bytes()), key)].into_iter().collect();
            NewEntry { fields, idempotency: None }
        };
        for keys in keys.chunks(PAGE) {
            store.append(&self.family.key_index(), keys.iter().map(entry).collect()).await?;
        }
        Ok(())
    }

    /// Reads the new entries of the key index.
    async fn read_index(&self, store: &dyn Store) -> Result<(), StoreError> {
        let mut read = self.read.lock().await;
        self.read_new_keys(store, &mut read).await.map(drop)
    }

    /// Reads the key index from a position on, adds the members, and returns the members that it read.
    async fn read_new_keys(
        &self,
        store: &dyn Store,
        read: &mut IndexPosition,
    ) -> Result<BTreeSet<StreamName>, StoreError> {
        let mut found = BTreeSet::new();
        let mut has_new = false;
        loop {
            let page = store.range(&self.family.key_index(), Range::after(read.last), PAGE).await?;
            let Some(last) = page.last() else { break };
            (read.last, read.entries) = (last.id, read.entries + page.len() as u64);
            for stream in page.iter().filter_map(|entry| self.family.member(entry.fields.text(KEY)?).ok()) {
                if self.add(&stream) {
                    has_new = true;
                }
                found.insert(stream);
            }
        }
        if has_new {
            self.changes.send_replace(());
        }
        Ok(found)
    }

    fn add(&self, stream: &StreamName) -> bool {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        if members.contains_key(stream) {
            return false;
        }
        if members.len() >= self.max_keys {
            let max_keys = self.max_keys;
            tracing::warn!(family = %self.family, %stream, max_keys, "key of the key index ignored: the family has the maximum number of keys");
            return false;
        }
        members.insert(stream.clone(), watch::Sender::new(EntryId::MIN));
        self.fresh().insert(stream.clone());
        true
    }

    /// Wakes the readers of a member.
    fn notify(&self, stream: &StreamName, last: EntryId) {
        if let Some(newest) = self.read_members().get(stream) {
            newest.send_replace(last);
        }
    }

    async fn follow(&self, store: &dyn Store, part: &Part) {
        let mut broken = BTreeMap::new();
        let mut is_failing = false;
        loop {
            let failure = match self.read_index(store).await {
                Ok(()) => {
                    part.ready();
                    if is_failing {
                        tracing::info!(family = %self.family, "following the family again");
                    }
                    is_failing = false;
                    let Err(failure) = self.watch_members(store, part, &mut broken).await;
                    failure
                }
                Err(failure) => failure,
            };
            // One of the keys is not a stream. Describing each member finds it.
            if failure.kind() == StoreErrorKind::WrongType {
                self.fresh().extend(self.members());
            }
            if !is_failing {
                tracing::warn!(family = %self.family, error = %failure, "cannot follow the family, retrying");
            }
            is_failing = true;
            part.not_ready(format!("cannot follow the family `{}`: {failure}", self.family));
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Waits for new entries of all members and wakes their readers, until an operation fails.
    async fn watch_members(
        &self,
        store: &dyn Store,
        part: &Part,
        broken: &mut BTreeMap<StreamName, Instant>,
    ) -> Result<std::convert::Infallible, StoreError> {
        let index = self.family.key_index();
        let mut check_at = Instant::now();
        loop {
            if Instant::now() >= check_at {
                self.check_index(store).await?;
                check_at = Instant::now() + CHECK_EVERY;
            }
            let healed: Vec<StreamName> =
                broken.extract_if(.., |_, until| *until <= Instant::now()).map(|(stream, _)| stream).collect();
            self.fresh().extend(healed);
            self.describe_fresh(store, broken).await?;
            let mut positions = self.newest();
            positions.retain(|(stream, _)| !broken.contains_key(stream));
            positions.push((index.clone(), self.read.lock().await.last));
            let reply = timeout(WAIT + GRACE, store.wait_any(&positions, WAIT)).await;
            let changed = reply.unwrap_or_else(|_elapsed| {
                Err(StoreError::new(StoreErrorKind::Unavailable, "the store does not reply"))
            })?;
            part.ready();
            if changed.is_empty() {
                continue;
            }
            for (stream, last) in &changed {
                if *stream == index {
                    self.read_index(store).await?;
                } else {
                    self.notify(stream, *last);
                }
            }
            self.changes.send_replace(());
            let spacing = POLL_SPACING * u32::try_from(positions.len()).unwrap_or(u32::MAX);
            sleep(spacing.min(MAX_POLL_SPACING)).await;
        }
    }

    /// Finds the newest entry of members that were added.
    async fn describe_fresh(
        &self,
        store: &dyn Store,
        broken: &mut BTreeMap<StreamName, Instant>,
    ) -> Result<(), StoreError> {
        loop {
            let Some(stream) = self.fresh().first().cloned() else { return Ok(()) };
            match store.describe(&stream).await {
                Ok(status) => self.notify(&stream, status.map_or(EntryId::MIN, |status| status.last_id)),
                Err(error) if error.kind() == StoreErrorKind::WrongType => {
                    tracing::warn!(family = %self.family, %error, "a member of the family is not a stream");
                    broken.insert(stream.clone(), Instant::now() + BROKEN_FOR);
                }
                Err(error) => return Err(error),
            }
            self.fresh().remove(&stream);
        }
    }

    /// Restores keys that the key index has lost, alone or with all data of the store.
    async fn check_index(&self, store: &dyn Store) -> Result<(), StoreError> {
        // Locked: a concurrent read would look as if the key index had gone back.
        let mut read = self.read.lock().await;
        let status = store.describe(&self.family.key_index()).await?;
        let (last, entries) = status.map_or((EntryId::MIN, 0), |status| (status.last_id, status.length));
        if last >= read.last && entries >= read.entries {
            return Ok(());
        }
        let mut restored = IndexPosition::default();
        let found = self.read_new_keys(store, &mut restored).await?;
        let members = self.members();
        let lost = members.iter().filter(|member| !found.contains(*member));
        let lost: Vec<&str> = lost.filter_map(|member| self.family.key_of(member)).collect();
        tracing::warn!(family = %self.family, keys = lost.len(), "key index of the family lost, writing it again");
        self.append_keys(store, &lost).await?;
        self.read_new_keys(store, &mut restored).await?;
        *read = restored;
        self.fresh().extend(members);
        Ok(())
    }
}

/// A reader's wait for new entries of one stream.
enum MemberWait {
    Member(watch::Receiver<EntryId>),
    /// The stream is not a member, but may become one.
    NotMember(watch::Receiver<()>),
}

impl MemberWait {
    /// Waits for a change. Returns whether there was one before the deadline.
    async fn changed(&mut self, deadline: Instant) -> bool {
        let changed = async {
            match self {
                Self::Member(newest) => newest.changed().await.is_ok(),
                Self::NotMember(changes) => changes.changed().await.is_ok(),
            }
        };
        timeout_at(deadline, changed).await.unwrap_or(false)
    }
}
