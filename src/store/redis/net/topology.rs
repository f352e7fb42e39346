//! Finds the server for each key, and finds it again when it may have changed.
//!
//! With sentinels it is the primary that they name; in a cluster it is the node with the key's slot. One task asks
//! several sentinels or nodes and uses the reply with the newest epoch. While none replies, the last slot map stays in
//! use, so that reachable servers still work.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fred::util::redis_keyslot;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::store::StoreErrorKind;
use crate::store::redis::config::Settings;
use crate::store::redis::net::address::{Address, Topology};
use crate::store::redis::net::connection::{Arguments, Connection, Purpose};
use crate::store::redis::net::error::Failure;
use crate::store::redis::net::reply::Reply;

/// The timeout of the reply of one sentinel or node.
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);
/// The time to wait for further replies after the first one.
const MORE_REPLIES: Duration = Duration::from_millis(150);
/// The minimum pause between discoveries.
const MIN_PAUSE: Duration = Duration::from_millis(200);
/// The interval of regular discoveries.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// The interval with sentinels. A replaced primary accepts writes, which will be lost, until the sentinels reach it.
const SENTINEL_REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// The maximum number of nodes asked in one discovery.
const MAX_ASKED: usize = 16;
/// The time that a call waits for the first discovery.
const FIRST_DISCOVERY: Duration = Duration::from_secs(2);
const SLOTS: u16 = 16384;
const MAX_REDIRECTIONS: u8 = 5;

/// The slots of each server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct SlotMap {
    /// First slot, last slot and server, in order.
    ranges: Vec<(u16, u16, Address)>,
    /// Servers without slots, which may know the others.
    others: BTreeSet<Address>,
}

impl SlotMap {
    fn everything_at(address: Address) -> Self {
        Self { ranges: vec![(0, SLOTS - 1, address)], others: BTreeSet::new() }
    }

    pub(crate) fn server_of(&self, slot: u16) -> Option<&Address> {
        let next = self.ranges.partition_point(|(_, last, _)| *last < slot);
        self.ranges.get(next).filter(|(first, ..)| *first <= slot).map(|(.., address)| address)
    }

    /// Returns every server with slots, each with one of its slots.
    pub(crate) fn servers(&self) -> Vec<(Address, u16)> {
        let mut servers: Vec<(Address, u16)> = Vec::new();
        for (first, _, address) in &self.ranges {
            if !servers.iter().any(|(known, _)| known == address) {
                servers.push((address.clone(), *first));
            }
        }
        servers
    }

    pub(crate) fn has(&self, address: &Address) -> bool {
        self.ranges.iter().any(|(.., server)| server == address)
    }

    /// Returns the number of slots without a server.
    pub(crate) fn uncovered(&self) -> usize {
        let covered: usize = self.ranges.iter().map(|(first, last, _)| usize::from(last - first) + 1).sum();
        usize::from(SLOTS).saturating_sub(covered)
    }
}

/// The destination of a command.
#[derive(Debug, Clone)]
pub(crate) struct CommandRoute {
    pub(crate) address: Address,
    /// Whether the server requires ASKING before the command.
    pub(crate) is_asking: bool,
    redirections: u8,
}

#[derive(Debug, Clone)]
enum DiscoveryState {
    Starting,
    Known(Arc<SlotMap>),
    Unknown(Failure),
}

/// Knows the server for each key, and discovers it again after [`TopologyWatcher::invalidate`].
#[derive(Debug, Clone)]
pub(crate) struct TopologyWatcher {
    is_cluster: bool,
    state: watch::Receiver<DiscoveryState>,
    doubt: Arc<Notify>,
}

impl TopologyWatcher {
    /// Creates the watcher, and the task that runs discoveries until `stop` is cancelled.
    pub(crate) fn new(
        settings: Arc<Settings>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let first = match &settings.topology {
            Topology::Single(address) => DiscoveryState::Known(Arc::new(SlotMap::everything_at(address.clone()))),
            Topology::Sentinel { .. } | Topology::Cluster(_) => DiscoveryState::Starting,
        };
        let (sender, state) = watch::channel(first);
        let doubt = Arc::new(Notify::new());
        let is_cluster = matches!(settings.topology, Topology::Cluster(_));
        (Self { is_cluster, state, doubt: Arc::clone(&doubt) }, run_discovery(settings, sender, doubt, stop))
    }

    /// Returns whether keys of different slots may be on different servers.
    pub(crate) fn is_cluster(&self) -> bool {
        self.is_cluster
    }

    /// Starts a discovery, because the slot map may be out of date.
    pub(crate) fn invalidate(&self) {
        self.doubt.notify_one();
    }

    pub(crate) async fn map(&self) -> Result<Arc<SlotMap>, Failure> {
        let mut state = self.state.clone();
        let known = timeout(FIRST_DISCOVERY, state.wait_for(|state| !matches!(state, DiscoveryState::Starting))).await;
        match known.as_ref().map(|state| state.as_deref()) {
            Ok(Ok(DiscoveryState::Known(map))) => Ok(Arc::clone(map)),
            Ok(Ok(DiscoveryState::Unknown(failure))) => Err(failure.clone()),
            Ok(Ok(DiscoveryState::Starting)) | Err(_) => Err(Failure::unavailable("no server has replied yet")),
            Ok(Err(_closed)) => Err(Failure::unavailable("the store is closed")),
        }
    }

    /// Returns the slot map, or `None` before the first discovery.
    pub(crate) fn known(&self) -> Option<Arc<SlotMap>> {
        match &*self.state.borrow() {
            DiscoveryState::Known(map) => Some(Arc::clone(map)),
            DiscoveryState::Starting | DiscoveryState::Unknown(_) => None,
        }
    }

    /// Returns the route of a command for this key.
    pub(crate) async fn route(&self, key: &[u8]) -> Result<CommandRoute, Failure> {
        let map = match self.known() {
            Some(map) => map,
            None => self.map().await?,
        };
        let slot = if self.is_cluster { redis_keyslot(key) } else { 0 };
        if let Some(address) = map.server_of(slot) {
            return Ok(CommandRoute { address: address.clone(), is_asking: false, redirections: 0 });
        }
        self.invalidate();
        Err(Failure::unavailable(format!("no server of the cluster has slot {slot} (see CLUSTER SLOTS)")))
    }

    /// Starts a discovery if a failure shows that the slot map is out of date, and adds the remedy to the failure.
    pub(crate) fn classify(&self, failure: Failure) -> Failure {
        let is_elsewhere = failure.redirect.is_some();
        if is_elsewhere && !self.is_cluster {
            let reason = "the server is part of a cluster; use the scheme redis-cluster:// (store.redis.url)";
            return Failure::new(StoreErrorKind::Unsuitable, reason);
        }
        if is_elsewhere || failure.is_wrong_server {
            self.invalidate();
        }
        failure
    }

    /// Returns the new route of a redirected command, which did not run.
    pub(crate) fn after(&self, route: &CommandRoute, mut failure: Failure) -> Result<CommandRoute, Failure> {
        if !self.is_cluster {
            return Err(self.classify(failure));
        }
        let Some(redirect) = failure.redirect.take() else { return Err(self.classify(failure)) };
        if !redirect.is_asking {
            self.invalidate();
        }
        if route.redirections >= MAX_REDIRECTIONS {
            return Err(Failure::unavailable("the nodes of the cluster disagree about the server of the key"));
        }
        let redirections = route.redirections + 1;
        Ok(CommandRoute { address: redirect.address, is_asking: redirect.is_asking, redirections })
    }
}

async fn run_discovery(
    settings: Arc<Settings>,
    state: watch::Sender<DiscoveryState>,
    doubt: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut pause = MIN_PAUSE;
    let mut known: Option<Arc<SlotMap>> = None;
    let mut is_reported = false;
    loop {
        if matches!(settings.topology, Topology::Single(_)) {
            stop.cancelled().await;
            break;
        }
        let found = tokio::select! {
            () = stop.cancelled() => break,
            found = find(&settings, known.as_deref()) => found,
        };
        let mut unasked = match settings.topology {
            Topology::Sentinel { .. } => SENTINEL_REFRESH_INTERVAL,
            Topology::Single(_) | Topology::Cluster(_) => REFRESH_INTERVAL,
        };
        match found {
            Ok(map) => {
                pause = MIN_PAUSE;
                is_reported = false;
                if known.as_deref() != Some(&map) {
                    let servers = map.servers().iter().map(|(server, _)| server.to_string()).collect::<Vec<_>>();
                    tracing::info!(servers = servers.join(", "), "found the servers that take writes");
                    let map = Arc::new(map);
                    known = Some(Arc::clone(&map));
                    state.send_replace(DiscoveryState::Known(map));
                }
            }
            Err(failure) => {
                if !is_reported {
                    tracing::warn!(reason = %failure.reason, "cannot find the server that takes writes, retrying");
                    is_reported = true;
                }
                if known.is_none() {
                    state.send_replace(DiscoveryState::Unknown(failure));
                }
                pause = (pause * 2).min(settings.reconnect_max.max(MIN_PAUSE));
                unasked = Duration::ZERO;
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = async {
                tokio::time::sleep(pause).await;
                // An invalidation and the interval have the same effect.
                drop(timeout(unasked, doubt.notified()).await);
            } => {}
        }
    }
    state.send_replace(DiscoveryState::Unknown(Failure::unavailable("the store is closed")));
}

/// The reply of one sentinel or node, with its epoch.
struct TopologyReply {
    age: (bool, u64),
    map: SlotMap,
}

async fn find(settings: &Settings, known: Option<&SlotMap>) -> Result<SlotMap, Failure> {
    let asked = match &settings.topology {
        Topology::Single(address) => return Ok(SlotMap::everything_at(address.clone())),
        Topology::Sentinel { sentinels, .. } => sentinels.iter().collect(),
        Topology::Cluster(seeds) => {
            let mut nodes: Vec<&Address> = Vec::new();
            let more = known.into_iter().flat_map(|map| map.ranges.iter().map(|(.., a)| a).chain(&map.others));
            for node in seeds.iter().chain(more) {
                if !nodes.contains(&node) && nodes.len() < MAX_ASKED {
                    nodes.push(node);
                }
            }
            nodes
        }
    };
    let ask = |address| async move {
        let answer = async {
            match &settings.topology {
                Topology::Sentinel { service, .. } => sentinel(settings, address, service).await,
                Topology::Single(_) | Topology::Cluster(_) => node(settings, address).await,
            }
        };
        let answer = timeout(REPLY_TIMEOUT.min(settings.command_timeout), answer).await;
        let answer = answer.unwrap_or_else(|_late| Err(Failure::unavailable("no reply in time")));
        answer.map_err(|failure| Failure { reason: format!("{address}: {}", failure.reason), ..failure })
    };
    let mut asking: FuturesUnordered<_> = asked.into_iter().map(ask).collect();
    let mut best: Option<TopologyReply> = None;
    let mut failures: Vec<Failure> = Vec::new();
    let mut until = Instant::now() + REPLY_TIMEOUT * 2;
    while let Ok(Some(answer)) = timeout_at(until, asking.next()).await {
        match answer {
            Ok(answer) => {
                until = until.min(Instant::now() + MORE_REPLIES);
                // Among replies with equal epochs, prefer one with a change: the other nodes will follow.
                let is_better = best
                    .as_ref()
                    .is_none_or(|best| answer.age > best.age || (answer.age == best.age && known == Some(&best.map)));
                if is_better {
                    best = Some(answer);
                }
            }
            Err(failure) => failures.push(failure),
        }
    }
    if let Some(best) = best {
        return Ok(best.map);
    }
    let subject = match settings.topology {
        Topology::Sentinel { .. } => "no sentinel named the primary",
        Topology::Single(_) | Topology::Cluster(_) => "no node of the cluster replied",
    };
    let kind = failures.iter().find(|failure| failure.kind != StoreErrorKind::Unavailable).map(|failure| failure.kind);
    let reasons = failures.into_iter().map(|failure| failure.reason).collect::<Vec<_>>().join("; ");
    Err(Failure::new(kind.unwrap_or(StoreErrorKind::Unavailable), format!("{subject}: {reasons}")))
}

/// Asks a sentinel for the primary.
async fn sentinel(settings: &Settings, address: &Address, service: &str) -> Result<TopologyReply, Failure> {
    let with_key = |failure: Failure| match failure.kind {
        StoreErrorKind::Denied => {
            let reason = format!("the sentinel: {} (store.redis.sentinel_password)", failure.reason);
            Failure { reason, ..failure }
        }
        _ => failure,
    };
    let (connection, _router) = Connection::open(settings, address, Purpose::Sentinel).await.map_err(with_key)?;
    let ask = |what: &'static str| {
        let mut arguments = Arguments::with_capacity(2);
        arguments.text(what).name(service);
        connection.call("SENTINEL", arguments, REPLY_TIMEOUT, false)
    };
    let primary = ask("GET-MASTER-ADDR-BY-NAME").await.map_err(with_key)?;
    if primary.is_nil() {
        let reason = format!("the sentinel does not know the service `{service}` (store.redis.url)");
        return Err(Failure::new(StoreErrorKind::Unsuitable, reason));
    }
    let [host, port] = primary.tuple()?;
    let (host, port) = (host.text()?, port.text()?);
    let port = port.parse().map_err(|e| Failure::unexpected(&format!("the port {port}: {e}")))?;
    // Some users lack permission for the epoch. Without it all sentinels rank equally.
    let epoch = match ask("MASTER").await.and_then(Reply::named) {
        Ok(mut named) => named.find("config-epoch").and_then(|epoch| epoch.text().ok()?.parse().ok()).unwrap_or(0),
        Err(_) => 0,
    };
    Ok(TopologyReply { age: (true, epoch), map: SlotMap::everything_at(Address::named(&host, port, address)) })
}

/// Asks a node of a cluster for the slots of all nodes.
async fn node(settings: &Settings, address: &Address) -> Result<TopologyReply, Failure> {
    let (connection, _router) = Connection::open(settings, address, Purpose::Exclusive).await?;
    let mut arguments = Arguments::with_capacity(1);
    arguments.text("INFO");
    let info = connection.call("CLUSTER", arguments, REPLY_TIMEOUT, false).await?.text()?;
    let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let is_ok = value("cluster_state:") == Some("ok");
    let epoch = value("cluster_current_epoch:").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    let mut arguments = Arguments::with_capacity(1);
    arguments.text("SLOTS");
    let slots = connection.call("CLUSTER", arguments, REPLY_TIMEOUT, false).await?;
    let mut map = SlotMap::default();
    for range in slots.list()? {
        let mut parts = range.list()?.into_iter();
        let mut next = || parts.next().ok_or_else(|| Failure::unexpected("a slot range that ends early"));
        let (first, last) = (slot(next()?)?, slot(next()?)?);
        map.ranges.push((first, last, server(next()?, address)?));
        for replica in parts {
            map.others.insert(server(replica, address)?);
        }
    }
    map.ranges.sort();
    if map.ranges.is_empty() {
        return Err(Failure::unavailable("the node is not part of a cluster yet (CLUSTER MEET)"));
    }
    Ok(TopologyReply { age: (is_ok, epoch), map })
}

fn slot(reply: Reply) -> Result<u16, Failure> {
    let slot = u16::try_from(reply.count()?).ok().filter(|slot| *slot < SLOTS);
    slot.ok_or_else(|| Failure::unexpected("an invalid slot number"))
}

/// Parses a server of CLUSTER SLOTS: host, port, and more.
fn server(reply: Reply, asked: &Address) -> Result<Address, Failure> {
    let mut parts = reply.list()?.into_iter();
    let mut next = || parts.next().ok_or_else(|| Failure::unexpected("a server without host or port"));
    let host = next()?;
    let host = if host.is_nil() { String::new() } else { host.text()? };
    let port = u16::try_from(next()?.count()?).map_err(|e| Failure::unexpected(&format!("a port: {e}")))?;
    Ok(Address::named(&host, port, asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_map_returns_server_or_none() {
        let (one, two) = (Address::new("one", 1), Address::new("two", 2));
        let ranges = vec![(0, 99, one.clone()), (200, 299, two.clone()), (300, 16383, one.clone())];
        let map = SlotMap { ranges, others: BTreeSet::new() };
        let cases =
            [(0, Some(&one)), (99, Some(&one)), (100, None), (199, None), (200, Some(&two)), (16383, Some(&one))];
        for (slot, expected) in cases {
            assert_eq!(map.server_of(slot), expected, "{slot}");
        }
        assert_eq!(map.uncovered(), 100);
        assert_eq!(map.servers(), [(one, 0), (two, 200)]);
        assert_eq!(SlotMap::default().server_of(5), None);
    }
}
