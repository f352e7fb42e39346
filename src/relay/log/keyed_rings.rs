//! Rings of the members of families, made for the first client that watches a member.
//!
//! Members that no client watches cost nothing here. The tails of all watched members wait for entries in one request
//! to the store, so that no member needs a connection of its own. A ring and its tail end when the member has had no
//! clients for a while.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::now_ms;
use crate::event::{EntryId, StreamName, StreamPattern};
use crate::relay::log::ring::{Ring, RingLimits};
use crate::relay::session::admission::ConnectError;
use crate::relay::session::broadcast::Fanout;
use crate::store::{Families, FamilyMembers, StreamStatus};

/// The placeholder of families whose members belong to one tenant each.
pub(crate) const TENANT: &str = "tenant";

/// The pause between sweeps. A member goes when two sweeps in a row find it without clients.
pub(crate) const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// A stream whose first entry is at most this much older than the request was created for that request.
const NEW_STREAM_MS: u64 = 5_000;

/// The channels to notify of a ring's changes.
#[derive(Debug, Default)]
pub(crate) struct WakeList(RwLock<Vec<Weak<Fanout>>>);

impl WakeList {
    pub(crate) fn add(&self, fanout: &Arc<Fanout>) {
        let mut fanouts = self.0.write().unwrap_or_else(PoisonError::into_inner);
        fanouts.retain(|known| known.strong_count() > 0);
        if !fanouts.iter().any(|known| known.as_ptr() == Arc::as_ptr(fanout)) {
            fanouts.push(Arc::downgrade(fanout));
        }
    }

    pub(crate) fn wake(&self) {
        for fanout in self.0.read().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            fanout.notify_all();
        }
    }
}

/// The ring of a member that has clients, or had some a moment ago.
#[derive(Debug)]
struct ActiveRing {
    ring: Arc<Ring>,
    wake_list: Arc<WakeList>,
    stop: CancellationToken,
    /// Whether the last sweep found no clients.
    is_expiring: bool,
}

/// A request to start the tail of a member.
#[derive(Debug)]
pub(crate) struct TailRequest {
    pub(crate) ring: Arc<Ring>,
    pub(crate) wake_list: Arc<WakeList>,
    pub(crate) member_start: MemberStart,
    pub(crate) stop: CancellationToken,
}

/// The facts from which a member's tail finds its first position.
#[derive(Debug)]
pub(crate) struct MemberStart {
    pub(crate) family_members: Arc<FamilyMembers>,
    /// The newest entry known at the first request, or `None` if the stream was no member then.
    last_known: Option<EntryId>,
    /// The time of the first request.
    requested_ms: u64,
}

impl MemberStart {
    /// Returns the entry after which the tail starts, given the present state of the stream.
    ///
    /// Entries may have come since the first client's request, and that client must receive them. A stream that was
    /// created for the request has no older entries. In an older stream that no instance has followed, the clock
    /// decides.
    pub(crate) fn start_after(&self, status: Option<&StreamStatus>) -> EntryId {
        let Some(status) = status else { return EntryId::MIN };
        let is_new = status.first_id.is_some_and(|first| first.ms.saturating_add(NEW_STREAM_MS) >= self.requested_ms);
        let unfollowed = if is_new { EntryId::MIN } else { EntryId::new(self.requested_ms, 0).previous() };
        self.last_known.unwrap_or(unfollowed).min(status.last_id)
    }
}

/// The rings of members that clients watch.
#[derive(Debug)]
pub(crate) struct KeyedRings {
    families: Families,
    limits: RingLimits,
    state: Mutex<KeyedRingsState>,
    /// Notified when a tail is to be started.
    pub(crate) tail_requested: Notify,
    /// The wake lists of streams that are not in a family.
    fixed: HashMap<StreamName, Arc<WakeList>>,
}

#[derive(Debug, Default)]
struct KeyedRingsState {
    active: HashMap<StreamName, ActiveRing>,
    tail_requests: Vec<TailRequest>,
}

/// Returns whether a client of `tenant` may watch this stream of a family.
///
/// A tenant may watch any member of a family that is not by tenant; the client's filter limits its entries.
pub(crate) fn may_watch(family_members: &FamilyMembers, stream: &StreamName, tenant: Option<&str>) -> bool {
    let is_by_tenant = family_members.family().placeholder() == TENANT;
    tenant.is_none_or(|tenant| !is_by_tenant || family_members.family().key_of(stream) == Some(tenant))
}

impl KeyedRings {
    pub(crate) fn new(families: Families, limits: RingLimits, rings: &[Arc<Ring>]) -> Self {
        let fixed = rings.iter().map(|ring| (ring.stream().clone(), Arc::new(WakeList::default()))).collect();
        Self { families, limits, state: Mutex::default(), tail_requested: Notify::new(), fixed }
    }

    /// Returns the wake list of a stream that is not in a family.
    pub(crate) fn wake_list_of(&self, stream: &StreamName) -> Arc<WakeList> {
        self.fixed.get(stream).cloned().unwrap_or_default()
    }

    /// Returns the families among the streams of a channel.
    pub(crate) fn families_of(&self, streams: &[StreamPattern]) -> Vec<Arc<FamilyMembers>> {
        let families = streams.iter().filter_map(StreamPattern::family);
        families.filter_map(|family| self.families.named(family.name()).cloned()).collect()
    }

    /// Returns the ring of a member, which notifies `fanout` of its changes. A client of a tenant gets members of its
    /// tenant only.
    pub(crate) fn ring(
        &self,
        family_members: &Arc<FamilyMembers>,
        stream: &StreamName,
        tenant: Option<&str>,
        fanout: &Arc<Fanout>,
    ) -> Result<Arc<Ring>, ConnectError> {
        if !may_watch(family_members, stream, tenant) {
            return Err(ConnectError::Forbidden(format!("stream `{stream}` belongs to another tenant")));
        }
        if !family_members.has(stream) && family_members.len() >= family_members.max_keys() {
            let (family, max_keys) = (family_members.family(), family_members.max_keys());
            return Err(ConnectError::TooManyKeys(format!(
                "family `{family}` already has {max_keys} keys, the maximum (max_keys)"
            )));
        }
        let mut state = self.lock();
        let KeyedRingsState { active, tail_requests } = &mut *state;
        let member = active.entry(stream.clone()).or_insert_with(|| {
            let ring = Arc::new(Ring::new(stream.clone(), self.limits));
            let (wake_list, stop) = (Arc::new(WakeList::default()), CancellationToken::new());
            let (last_known, requested_ms) = (family_members.newest_of(stream), now_ms());
            let member_start = MemberStart { family_members: Arc::clone(family_members), last_known, requested_ms };
            let (of_ring, of_list, of_stop) = (ring.clone(), wake_list.clone(), stop.clone());
            tail_requests.push(TailRequest { ring: of_ring, wake_list: of_list, member_start, stop: of_stop });
            self.tail_requested.notify_one();
            ActiveRing { ring, wake_list, stop, is_expiring: false }
        });
        member.is_expiring = false;
        member.wake_list.add(fanout);
        Ok(member.ring.clone())
    }

    /// Has `fanout` notified of the changes of a stream's ring.
    pub(crate) fn notify_on_change(&self, stream: &StreamName, fanout: &Arc<Fanout>) {
        let state = self.lock();
        let wake_list = state.active.get(stream).map(|active| &active.wake_list);
        if let Some(wake_list) = wake_list.or_else(|| self.fixed.get(stream)) {
            wake_list.add(fanout);
        }
    }

    /// Takes the requests to start tails.
    pub(crate) fn take_tail_requests(&self) -> Vec<TailRequest> {
        std::mem::take(&mut self.lock().tail_requests)
    }

    /// Removes the rings of members that no client watches, and stops their tails.
    pub(crate) fn sweep(&self) {
        self.lock().active.retain(|_, member| {
            // One reference is here and one is the tail's.
            let is_idle = Arc::strong_count(&member.ring) <= 2;
            let is_removed = is_idle && member.is_expiring;
            member.is_expiring = is_idle;
            if is_removed {
                member.stop.cancel();
            }
            !is_removed
        });
    }

    fn lock(&self) -> MutexGuard<'_, KeyedRingsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
