//! Streams of families: those that someone watches have a ring and a tail, the others cost nothing here.
//!
//! Whoever asks for a member first has its ring made; its tail waits for entries together with all others that wait for
//! members, so that no member needs a connection. Once nobody has watched a member for a while, both go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::now_ms;
use crate::event::{EntryId, StreamName, StreamPattern};
use crate::relay::log::ring::{Limits, Ring};
use crate::relay::{BadParameter, Channel, Refused};
use crate::store::{Families, Roster, StreamStatus};

/// How often it is looked which members nobody watches any more; those found twice are let go.
pub(crate) const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// A stream whose first entry is not older than this when it is asked for has come into being for that.
const NEW_MS: u64 = 5_000;

/// The placeholder of families whose members are of one tenant each.
const TENANT: &str = "tenant";

/// The channels that are told of a ring's changes.
#[derive(Debug, Default)]
pub(crate) struct Wakes(RwLock<Vec<Weak<Channel>>>);

impl Wakes {
    pub(crate) fn add(&self, channel: &Weak<Channel>) {
        let mut channels = self.0.write().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|known| known.strong_count() > 0);
        if !channels.iter().any(|known| known.ptr_eq(channel)) {
            channels.push(channel.clone());
        }
    }

    pub(crate) fn wake(&self) {
        for channel in self.0.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            channel.fanout.announce();
        }
    }
}

/// A member that is watched, or was a moment ago.
#[derive(Debug)]
struct Watched {
    ring: Arc<Ring>,
    wakes: Arc<Wakes>,
    stop: CancellationToken,
    is_leaving: bool,
}

/// A member whose tail is to be begun.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) ring: Arc<Ring>,
    pub(crate) wakes: Arc<Wakes>,
    pub(crate) membership: Membership,
    pub(crate) stop: CancellationToken,
}

/// What a member's tail needs to know beside what every tail does.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) roster: Arc<Roster>,
    /// The newest entry that was known of when the member was first asked for; nothing where it was no member.
    known: Option<EntryId>,
    /// When that was.
    asked_ms: u64,
}

impl Membership {
    /// After which entry comes what came after the member was asked for, given how the stream is now.
    pub(crate) fn start(&self, status: Option<&StreamStatus>) -> EntryId {
        let Some(status) = status else { return EntryId::MIN };
        // By now it may have entries that its first client is to be given. A stream that has just come into being has no
        // others; in an older one that no one has followed, the clocks tell.
        let is_new = status.first_id.is_some_and(|first| first.ms.saturating_add(NEW_MS) >= self.asked_ms);
        let unfollowed = if is_new { EntryId::MIN } else { EntryId::new(self.asked_ms, 0).previous() };
        self.known.unwrap_or(unfollowed).min(status.last_id)
    }
}

/// The members that are watched, and the channels through which.
#[derive(Debug)]
pub(crate) struct Members {
    families: Families,
    limits: Limits,
    state: Mutex<State>,
    /// Told when a tail is to be begun.
    pub(crate) news: Notify,
    /// Who is told of the rings of streams that are of no family.
    fixed: HashMap<StreamName, Arc<Wakes>>,
}

#[derive(Debug, Default)]
struct State {
    watched: HashMap<StreamName, Watched>,
    channels: HashMap<(String, String), Weak<Channel>>,
    wanted: Vec<Wanted>,
}

/// Whether whoever is bound to this tenant may watch this stream of a family. What is of no tenant's family may be
/// watched, as far as the filter goes that comes with being bound.
fn may_watch(roster: &Roster, stream: &StreamName, tenant: Option<&str>) -> bool {
    let is_by_tenant = roster.family().placeholder() == TENANT;
    tenant.is_none_or(|tenant| !is_by_tenant || roster.family().key_of(stream) == Some(tenant))
}

impl Members {
    pub(crate) fn new(families: Families, limits: Limits, rings: &[Arc<Ring>]) -> Self {
        let fixed = rings.iter().map(|ring| (ring.stream().clone(), Arc::new(Wakes::default()))).collect();
        Self { families, limits, state: Mutex::default(), news: Notify::new(), fixed }
    }

    /// Who is told of a ring of no family.
    pub(crate) fn wakes_of(&self, stream: &StreamName) -> Arc<Wakes> {
        self.fixed.get(stream).cloned().unwrap_or_default()
    }

    /// The families among the streams of a channel.
    pub(crate) fn families_of(&self, streams: &[StreamPattern]) -> Vec<Arc<Roster>> {
        let families = streams.iter().filter_map(StreamPattern::family);
        families.filter_map(|family| self.families.named(family.name()).cloned()).collect()
    }

    /// The ring of a member, for a channel with its family. Who is bound to a tenant is given its own alone.
    pub(crate) fn ring(
        &self,
        channel: &Channel,
        stream: &StreamName,
        tenant: Option<&str>,
    ) -> Result<Arc<Ring>, Refused> {
        let roster = channel.families.iter().find(|roster| roster.family().key_of(stream).is_some());
        let roster = roster.ok_or_else(|| BadParameter::new("stream", format!("`{stream}` is not of this channel")))?;
        if !may_watch(roster, stream, tenant) {
            return Err(Refused::Forbidden(format!("`{stream}` is another tenant's")));
        }
        if !roster.has(stream) && roster.len() >= roster.max_keys() {
            let (family, max_keys) = (roster.family(), roster.max_keys());
            return Err(Refused::TooManyKeys(format!("`{family}` has {max_keys} keys already (max_keys)")));
        }
        let mut state = self.lock();
        let State { watched, wanted, .. } = &mut *state;
        let member = watched.entry(stream.clone()).or_insert_with(|| {
            let ring = Arc::new(Ring::new(stream.clone(), self.limits));
            let (wakes, stop) = (Arc::new(Wakes::default()), CancellationToken::new());
            let membership =
                Membership { roster: Arc::clone(roster), known: roster.newest_of(stream), asked_ms: now_ms() };
            wanted.push(Wanted { ring: ring.clone(), wakes: wakes.clone(), membership, stop: stop.clone() });
            self.news.notify_one();
            Watched { ring, wakes, stop, is_leaving: false }
        });
        member.is_leaving = false;
        member.wakes.add(&channel.me);
        Ok(member.ring.clone())
    }

    /// The channel as those see it who have this key: with the streams of the key in place of the families.
    pub(crate) fn keyed(&self, channel: &Channel, key: &str, tenant: Option<&str>) -> Result<Arc<Channel>, Refused> {
        let name = (channel.name.clone(), key.to_owned());
        let mut members = Vec::with_capacity(channel.families.len());
        for roster in &channel.families {
            let member = roster.family().member(key).map_err(|error| BadParameter::new("key", error.to_string()))?;
            members.push((roster, member));
        }
        if let Some((_, member)) = members.iter().find(|(roster, member)| !may_watch(roster, member, tenant)) {
            return Err(Refused::Forbidden(format!("`{member}` is another tenant's")));
        }
        if let Some(known) = self.lock().channels.get(&name).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let mut rings = channel.rings.clone();
        for (_, member) in &members {
            rings.push(self.ring(channel, member, tenant)?);
        }
        let mut state = self.lock();
        if let Some(known) = state.channels.get(&name).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let keyed = channel.with_rings(rings);
        for ring in &keyed.rings {
            let wakes = state.watched.get(ring.stream()).map(|watched| &watched.wakes);
            if let Some(wakes) = wakes.or_else(|| self.fixed.get(ring.stream())) {
                wakes.add(&keyed.me);
            }
        }
        state.channels.insert(name, Arc::downgrade(&keyed));
        Ok(keyed)
    }

    /// The tails to be begun.
    pub(crate) fn take_wanted(&self) -> Vec<Wanted> {
        std::mem::take(&mut self.lock().wanted)
    }

    /// Lets go of members that nobody watches.
    pub(crate) fn sweep(&self) {
        let mut state = self.lock();
        state.channels.retain(|_, channel| channel.strong_count() > 0);
        state.watched.retain(|_, member| {
            // One is here, the other is the tail's.
            let is_unwatched = Arc::strong_count(&member.ring) <= 2;
            let goes = is_unwatched && member.is_leaving;
            member.is_leaving = is_unwatched;
            if goes {
                member.stop.cancel();
            }
            !goes
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key that a client has by being bound to a tenant, where all families of its channel are by tenant.
pub(crate) fn own_key<'a>(channel: &Channel, tenant: Option<&'a str>) -> Option<&'a str> {
    let is_by_tenant = |roster: &Arc<Roster>| roster.family().placeholder() == TENANT;
    tenant.filter(|_| !channel.families.is_empty() && channel.families.iter().all(is_by_tenant))
}
