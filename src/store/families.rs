//! Families of streams as they are: which members there are, and when there is news of one.
//!
//! A family's keys are written down in its register, a stream beside the members. The first `max_keys` different keys in
//! it are the family's; whoever reads the register comes to the same ones, so that no instance has to ask another.
//! One call of [`Store::news`] waits for all members and the register together, and rings for those who wait for single
//! members: a reader costs neither a connection nor a question of its own while nothing comes.

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

/// How long one question for news waits.
const WAIT: Duration = Duration::from_secs(2);
/// How long the store may take beyond that.
const GRACE: Duration = Duration::from_secs(8);
/// How often it is looked whether the register is still there.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Between two questions that brought something, for each member: the more there are, the more one question costs.
const BREATH: Duration = Duration::from_micros(10);
const LONGEST_BREATH: Duration = Duration::from_millis(20);
/// Between two attempts after a failure.
const AGAIN: Duration = Duration::from_millis(500);
/// After how long a member that can't be read is tried again.
const BROKEN_FOR: Duration = Duration::from_secs(30);
/// Entries of the register read at a time.
const PAGE: usize = 512;
/// A reporter that has told nothing for so long is stuck.
const STALE_AFTER: Duration = Duration::from_secs(30);

/// The field of the register's entries.
const KEY: &str = "key";

/// The declared families. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Families(Arc<[Arc<Roster>]>);

/// Why a stream does not become a member.
#[derive(Debug, thiserror::Error)]
pub enum NotJoined {
    /// The family has as many keys as it may have.
    #[error("`{family}` has {max_keys} keys already, as many as it may have (max_keys)")]
    Full {
        /// The family.
        family: Family,
        /// The most keys that it may have.
        max_keys: usize,
    },
    /// The store did not do its part.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Families {
    /// These families, each with the most keys that it may have.
    pub fn new(families: impl IntoIterator<Item = (Family, usize)>) -> Self {
        Self(families.into_iter().map(|(family, max_keys)| Arc::new(Roster::new(family, max_keys))).collect())
    }

    /// The family that a stream would be a member of, whether it is one or not.
    pub fn of(&self, stream: &StreamName) -> Option<&Arc<Roster>> {
        self.0.iter().find(|roster| roster.family.key_of(stream).is_some())
    }

    /// The family of that declared name.
    pub fn named(&self, name: &str) -> Option<&Arc<Roster>> {
        self.0.iter().find(|roster| roster.family.name() == name)
    }

    /// Every family.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Roster>> {
        self.0.iter()
    }

    /// What a stream is counted under: a member under its family, whose keys are no labels.
    pub fn label<'a>(&'a self, stream: &'a StreamName) -> &'a str {
        self.of(stream).map_or(stream.as_str(), |roster| roster.family.name())
    }

    /// A part of the daemon for each family, for [`Families::run`].
    pub fn parts(&self, readiness: &Readiness) -> Vec<Part> {
        let part = |roster: &Arc<Roster>| readiness.part(&format!("family {}", roster.family), Some(STALE_AFTER));
        self.iter().map(part).collect()
    }

    /// Follows the families until `stop`.
    pub async fn run(self, store: Arc<dyn Store>, parts: Vec<Part>, stop: CancellationToken) {
        let mut followers = JoinSet::new();
        for (roster, part) in self.iter().cloned().zip(parts) {
            let (store, stop) = (Arc::clone(&store), stop.clone());
            followers.spawn(async move {
                stop.run_until_cancelled(roster.follow(&*store, &part)).await;
            });
        }
        if followers.is_empty() {
            return stop.cancelled().await;
        }
        // Each goes on until it is stopped: one that ends earlier has panicked.
        while let Some(ended) = followers.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "who follows a family has ended badly");
                return;
            }
        }
    }
}

/// The members of one family.
#[derive(Debug)]
pub struct Roster {
    family: Family,
    max_keys: usize,
    members: RwLock<BTreeMap<StreamName, watch::Sender<EntryId>>>,
    /// Changes when a member comes, and when there is news of any.
    changes: watch::Sender<()>,
    /// Members of which it is not known how far they are.
    fresh: Mutex<BTreeSet<StreamName>>,
    /// How far the register was read, by one at a time, who may also write.
    read: tokio::sync::Mutex<Read>,
}

/// How far the register was read.
#[derive(Debug, Default)]
struct Read {
    last: EntryId,
    /// How many entries that were. A register that holds fewer has lost some.
    entries: u64,
}

impl Roster {
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

    /// The family.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// The most keys that it may have.
    pub fn max_keys(&self) -> usize {
        self.max_keys
    }

    /// Its members, by name, as far as this instance knows by now.
    pub fn members(&self) -> Vec<StreamName> {
        self.read_members().keys().cloned().collect()
    }

    /// Its members, each with the newest entry that this instance has heard of.
    pub fn newest(&self) -> Vec<(StreamName, EntryId)> {
        self.read_members().iter().map(|(stream, newest)| (stream.clone(), *newest.borrow())).collect()
    }

    /// The newest entry of a member that this instance has heard of; nothing where it is none, or nothing is known yet.
    pub fn newest_of(&self, stream: &StreamName) -> Option<EntryId> {
        let newest = self.read_members().get(stream).map(|newest| *newest.borrow())?;
        (!self.fresh().contains(stream)).then_some(newest)
    }

    /// How many members it has.
    pub fn len(&self) -> usize {
        self.read_members().len()
    }

    /// Whether it has no members.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the stream is a member.
    pub fn has(&self, stream: &StreamName) -> bool {
        self.read_members().contains_key(stream)
    }

    /// Changes when a member comes, and when there is news of any.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Whether the stream is a member, also where another instance has made it one just now.
    pub async fn finds(&self, store: &dyn Store, stream: &StreamName) -> Result<bool, StoreError> {
        if !self.has(stream) {
            self.read_register(store).await?;
        }
        Ok(self.has(stream))
    }

    /// Makes the stream a member, if it is none; it must have a key of this family. Safe to repeat.
    pub async fn join(&self, store: &dyn Store, stream: &StreamName) -> Result<(), NotJoined> {
        if self.has(stream) {
            return Ok(());
        }
        let full = || NotJoined::Full { family: self.family.clone(), max_keys: self.max_keys };
        let mut read = self.read.lock().await;
        // Another instance may have made it one, or another call of this one.
        self.read_on(store, &mut read).await?;
        if self.has(stream) {
            return Ok(());
        }
        let key = self.family.key_of(stream).filter(|_| self.len() < self.max_keys).ok_or_else(full)?;
        self.write_down(store, &[key]).await?;
        self.read_on(store, &mut read).await?;
        drop(read);
        if !self.has(stream) {
            return Err(full());
        }
        tracing::info!(family = %self.family, stream = %stream, members = self.len(), "the family has a new member");
        Ok(())
    }

    /// As [`Store::tail`]. Many may wait for many members at the price of one.
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
            let mut bell = self.bell(stream);
            let entries = store.range(stream, Range::after(after), limit).await?;
            if !entries.is_empty() || limit == 0 || !bell.rings(deadline).await {
                return Ok(entries);
            }
        }
    }

    /// As [`Store::fetch`], and as little cancel-safe. Many may wait for many members at the price of one.
    pub(super) async fn fetch(
        &self,
        store: &dyn Store,
        cursor: &Cursor,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<Delivery>, StoreError> {
        let deadline = Instant::now() + wait;
        loop {
            let mut bell = self.bell(&cursor.stream);
            let deliveries = store.fetch(cursor, limit, Duration::ZERO).await?;
            if !deliveries.is_empty() || limit == 0 || !bell.rings(deadline).await {
                return Ok(deliveries);
            }
        }
    }

    fn bell(&self, stream: &StreamName) -> Bell {
        match self.read_members().get(stream) {
            Some(newest) => Bell::Member(newest.subscribe()),
            None => Bell::Stranger(self.changes.subscribe()),
        }
    }

    fn read_members(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<StreamName, watch::Sender<EntryId>>> {
        self.members.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> std::sync::MutexGuard<'_, BTreeSet<StreamName>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends keys to the register. One that is in it twice does no harm.
    async fn write_down(&self, store: &dyn Store, keys: &[&str]) -> Result<(), StoreError> {
        let entry = |key: &&str| {
            let key = Bytes::copy_from_slice(key.as_bytes());
            let fields: Fields = [(Bytes::from_static(KEY.as_bytes()), key)].into_iter().collect();
            NewEntry { fields, idempotency: None }
        };
        for keys in keys.chunks(PAGE) {
            store.append(&self.family.register(), keys.iter().map(entry).collect()).await?;
        }
        Ok(())
    }

    /// Reads what is new in the register.
    async fn read_register(&self, store: &dyn Store) -> Result<(), StoreError> {
        let mut read = self.read.lock().await;
        self.read_on(store, &mut read).await.map(drop)
    }

    /// Reads on in the register; says which members are written there.
    async fn read_on(&self, store: &dyn Store, read: &mut Read) -> Result<BTreeSet<StreamName>, StoreError> {
        let mut written = BTreeSet::new();
        let mut has_come = false;
        loop {
            let page = store.range(&self.family.register(), Range::after(read.last), PAGE).await?;
            let Some(last) = page.last() else { break };
            (read.last, read.entries) = (last.id, read.entries + page.len() as u64);
            for stream in page.iter().filter_map(|entry| self.family.member(entry.fields.text(KEY)?).ok()) {
                if self.add(&stream) {
                    has_come = true;
                }
                written.insert(stream);
            }
        }
        if has_come {
            self.changes.send_replace(());
        }
        Ok(written)
    }

    fn add(&self, stream: &StreamName) -> bool {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        if members.contains_key(stream) {
            return false;
        }
        if members.len() >= self.max_keys {
            let max_keys = self.max_keys;
            tracing::warn!(family = %self.family, %stream, max_keys, "a key is left out: the family has too many");
            return false;
        }
        members.insert(stream.clone(), watch::Sender::new(EntryId::MIN));
        self.fresh().insert(stream.clone());
        true
    }

    /// Rings for those who wait for a member.
    fn ring(&self, stream: &StreamName, last: EntryId) {
        if let Some(newest) = self.read_members().get(stream) {
            newest.send_replace(last);
        }
    }

    async fn follow(&self, store: &dyn Store, part: &Part) {
        let mut broken = BTreeMap::new();
        let mut is_failing = false;
        loop {
            let failure = match self.read_register(store).await {
                Ok(()) => {
                    part.ready();
                    if is_failing {
                        tracing::info!(family = %self.family, "follows the family again");
                    }
                    is_failing = false;
                    let Err(failure) = self.listen(store, part, &mut broken).await;
                    failure
                }
                Err(failure) => failure,
            };
            // Which of them is no stream is found by asking each.
            if failure.kind() == StoreErrorKind::WrongType {
                self.fresh().extend(self.members());
            }
            if !is_failing {
                tracing::warn!(family = %self.family, error = %failure, "cannot follow the family; trying again");
            }
            is_failing = true;
            part.not_ready(format!("cannot follow the family `{}`: {failure}", self.family));
            sleep(AGAIN).await;
        }
    }

    /// Rings when there is news, until something fails.
    async fn listen(
        &self,
        store: &dyn Store,
        part: &Part,
        broken: &mut BTreeMap<StreamName, Instant>,
    ) -> Result<std::convert::Infallible, StoreError> {
        let register = self.family.register();
        let mut check_at = Instant::now();
        loop {
            if Instant::now() >= check_at {
                self.check_register(store).await?;
                check_at = Instant::now() + CHECK_EVERY;
            }
            let healed: Vec<StreamName> =
                broken.extract_if(.., |_, until| *until <= Instant::now()).map(|(stream, _)| stream).collect();
            self.fresh().extend(healed);
            self.look_at_fresh(store, broken).await?;
            let mut places = self.newest();
            places.retain(|(stream, _)| !broken.contains_key(stream));
            places.push((register.clone(), self.read.lock().await.last));
            let answer = timeout(WAIT + GRACE, store.news(&places, WAIT)).await;
            let news = answer.unwrap_or_else(|_elapsed| {
                Err(StoreError::new(StoreErrorKind::Unavailable, "the store does not answer"))
            })?;
            part.ready();
            if news.is_empty() {
                continue;
            }
            for (stream, last) in &news {
                if *stream == register {
                    self.read_register(store).await?;
                } else {
                    self.ring(stream, *last);
                }
            }
            self.changes.send_replace(());
            let breath = BREATH * u32::try_from(places.len()).unwrap_or(u32::MAX);
            sleep(breath.min(LONGEST_BREATH)).await;
        }
    }

    /// Finds out how far members are that have come.
    async fn look_at_fresh(
        &self,
        store: &dyn Store,
        broken: &mut BTreeMap<StreamName, Instant>,
    ) -> Result<(), StoreError> {
        loop {
            let Some(stream) = self.fresh().first().cloned() else { return Ok(()) };
            match store.describe(&stream).await {
                Ok(status) => self.ring(&stream, status.map_or(EntryId::MIN, |status| status.last_id)),
                Err(error) if error.kind() == StoreErrorKind::WrongType => {
                    tracing::warn!(family = %self.family, %error, "a member of the family is no stream");
                    broken.insert(stream.clone(), Instant::now() + BROKEN_FOR);
                }
                Err(error) => return Err(error),
            }
            self.fresh().remove(&stream);
        }
    }

    /// Writes down again what the register has lost, alone or with the store's other data.
    async fn check_register(&self, store: &dyn Store) -> Result<(), StoreError> {
        // Nobody may read on meanwhile: that would look as if the register had gone back.
        let mut read = self.read.lock().await;
        let status = store.describe(&self.family.register()).await?;
        let (last, entries) = status.map_or((EntryId::MIN, 0), |status| (status.last_id, status.length));
        if last >= read.last && entries >= read.entries {
            return Ok(());
        }
        let mut anew = Read::default();
        let written = self.read_on(store, &mut anew).await?;
        let members = self.members();
        let lost = members.iter().filter(|member| !written.contains(*member));
        let lost: Vec<&str> = lost.filter_map(|member| self.family.key_of(member)).collect();
        tracing::warn!(family = %self.family, keys = lost.len(), "the family's register was lost; writing it anew");
        self.write_down(store, &lost).await?;
        self.read_on(store, &mut anew).await?;
        *read = anew;
        self.fresh().extend(members);
        Ok(())
    }
}

/// What tells someone who waits for entries of a stream.
enum Bell {
    Member(watch::Receiver<EntryId>),
    /// It is no member, but may become one.
    Stranger(watch::Receiver<()>),
}

impl Bell {
    /// Waits until it rings; false when the time is over before.
    async fn rings(&mut self, deadline: Instant) -> bool {
        let rang = async {
            match self {
                Self::Member(newest) => newest.changed().await.is_ok(),
                Self::Stranger(changes) => changes.changed().await.is_ok(),
            }
        };
        timeout_at(deadline, rang).await.unwrap_or(false)
    }
}
