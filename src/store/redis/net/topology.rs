//! Who serves what: which server to ask for a key, found out again whenever that is in doubt.
//!
//! With sentinels it is the primary that they name, with a cluster the node that has the key's slot. One task asks, as
//! many of them as answer soon, and believes the one with the newest knowledge. A map that was found is kept while
//! nobody answers: what can be reached of it still works.

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

/// How long one sentinel or node may take to answer.
const ANSWER: Duration = Duration::from_secs(1);
/// How long the others are waited for once one has answered.
const OTHERS: Duration = Duration::from_millis(150);
/// How long to wait at least before asking again, and how often to ask without doubt.
const AGAIN: Duration = Duration::from_millis(200);
const UNASKED: Duration = Duration::from_secs(5);
/// The same for sentinels: a primary that they have replaced takes writes, to be lost, until they reach it.
const UNASKED_SENTINELS: Duration = Duration::from_secs(1);
/// The most nodes that are asked at a time.
const MAX_ASKED: usize = 16;
/// How long a call waits for the first answer.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
const SLOTS: u16 = 16384;
const MAX_REDIRECTIONS: u8 = 5;

/// Which server has which slots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Map {
    /// First and last slot, and who has them; in order.
    ranges: Vec<(u16, u16, Address)>,
    /// Servers that have no slots now, but may know who does.
    others: BTreeSet<Address>,
}

impl Map {
    fn everything_at(address: Address) -> Self {
        Self { ranges: vec![(0, SLOTS - 1, address)], others: BTreeSet::new() }
    }

    pub(crate) fn server_of(&self, slot: u16) -> Option<&Address> {
        let next = self.ranges.partition_point(|(_, last, _)| *last < slot);
        self.ranges.get(next).filter(|(first, ..)| *first <= slot).map(|(.., address)| address)
    }

    /// Every server that has slots, each with one of them.
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

    /// How many slots no server has.
    pub(crate) fn uncovered(&self) -> usize {
        let covered: usize = self.ranges.iter().map(|(first, last, _)| usize::from(last - first) + 1).sum();
        usize::from(SLOTS).saturating_sub(covered)
    }
}

/// Where a command goes.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) address: Address,
    /// The server takes the command only if it is asked to before.
    pub(crate) is_asking: bool,
    redirections: u8,
}

#[derive(Debug, Clone)]
enum State {
    Starting,
    Known(Arc<Map>),
    Unknown(Failure),
}

/// Knows which server to ask, and finds out again when told to doubt it.
#[derive(Debug, Clone)]
pub(crate) struct Servers {
    is_cluster: bool,
    state: watch::Receiver<State>,
    doubt: Arc<Notify>,
}

impl Servers {
    /// The knowledge, and the task that keeps it right until `stop` is cancelled.
    pub(crate) fn new(
        settings: Arc<Settings>,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let first = match &settings.topology {
            Topology::Single(address) => State::Known(Arc::new(Map::everything_at(address.clone()))),
            Topology::Sentinel { .. } | Topology::Cluster(_) => State::Starting,
        };
        let (sender, state) = watch::channel(first);
        let doubt = Arc::new(Notify::new());
        let is_cluster = matches!(settings.topology, Topology::Cluster(_));
        (Self { is_cluster, state, doubt: Arc::clone(&doubt) }, keep_finding(settings, sender, doubt, stop))
    }

    /// Whether keys of different slots may be on different servers.
    pub(crate) fn is_cluster(&self) -> bool {
        self.is_cluster
    }

    /// What is known of the servers may be wrong: find out.
    pub(crate) fn doubt(&self) {
        self.doubt.notify_one();
    }

    pub(crate) async fn map(&self) -> Result<Arc<Map>, Failure> {
        let mut state = self.state.clone();
        let known = timeout(FIRST_ANSWER, state.wait_for(|state| !matches!(state, State::Starting))).await;
        match known.as_ref().map(|state| state.as_deref()) {
            Ok(Ok(State::Known(map))) => Ok(Arc::clone(map)),
            Ok(Ok(State::Unknown(failure))) => Err(failure.clone()),
            Ok(Ok(State::Starting)) | Err(_) => Err(Failure::unavailable("no server has answered yet")),
            Ok(Err(_closed)) => Err(Failure::unavailable("the store is closed")),
        }
    }

    /// The map, if it is known already.
    pub(crate) fn known(&self) -> Option<Arc<Map>> {
        match &*self.state.borrow() {
            State::Known(map) => Some(Arc::clone(map)),
            State::Starting | State::Unknown(_) => None,
        }
    }

    /// Where a command for this key goes.
    pub(crate) async fn route(&self, key: &[u8]) -> Result<Route, Failure> {
        let map = match self.known() {
            Some(map) => map,
            None => self.map().await?,
        };
        let slot = if self.is_cluster { redis_keyslot(key) } else { 0 };
        if let Some(address) = map.server_of(slot) {
            return Ok(Route { address: address.clone(), is_asking: false, redirections: 0 });
        }
        self.doubt();
        Err(Failure::unavailable(format!("no server of the cluster has slot {slot} (see CLUSTER SLOTS)")))
    }

    /// What a failure tells of the servers, where nothing else is to be tried.
    pub(crate) fn judged(&self, failure: Failure) -> Failure {
        let is_elsewhere = failure.elsewhere.is_some();
        if is_elsewhere && !self.is_cluster {
            let reason = "the server is part of a cluster: write redis-cluster:// (store.redis.url)";
            return Failure::new(StoreErrorKind::Unsuitable, reason);
        }
        if is_elsewhere || failure.is_wrong_server {
            self.doubt();
        }
        failure
    }

    /// Where a command goes that failed like this, if it was not run and another server was named.
    pub(crate) fn after(&self, route: &Route, mut failure: Failure) -> Result<Route, Failure> {
        if !self.is_cluster {
            return Err(self.judged(failure));
        }
        let Some(elsewhere) = failure.elsewhere.take() else { return Err(self.judged(failure)) };
        if !elsewhere.is_asking {
            self.doubt();
        }
        if route.redirections >= MAX_REDIRECTIONS {
            return Err(Failure::unavailable("the cluster's nodes do not agree who has the key"));
        }
        let redirections = route.redirections + 1;
        Ok(Route { address: elsewhere.address, is_asking: elsewhere.is_asking, redirections })
    }
}

async fn keep_finding(
    settings: Arc<Settings>,
    state: watch::Sender<State>,
    doubt: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut pause = AGAIN;
    let mut known: Option<Arc<Map>> = None;
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
            Topology::Sentinel { .. } => UNASKED_SENTINELS,
            Topology::Single(_) | Topology::Cluster(_) => UNASKED,
        };
        match found {
            Ok(map) => {
                pause = AGAIN;
                is_reported = false;
                if known.as_deref() != Some(&map) {
                    let servers = map.servers().iter().map(|(server, _)| server.to_string()).collect::<Vec<_>>();
                    tracing::info!(servers = servers.join(", "), "the servers that take writes are found");
                    let map = Arc::new(map);
                    known = Some(Arc::clone(&map));
                    state.send_replace(State::Known(map));
                }
            }
            Err(failure) => {
                if !is_reported {
                    tracing::warn!(reason = %failure.reason, "cannot find out which server takes writes; trying again");
                    is_reported = true;
                }
                if known.is_none() {
                    state.send_replace(State::Unknown(failure));
                }
                pause = (pause * 2).min(settings.reconnect_max.max(AGAIN));
                unasked = Duration::ZERO;
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = async {
                tokio::time::sleep(pause).await;
                // Whether doubted or not in time is the same.
                drop(timeout(unasked, doubt.notified()).await);
            } => {}
        }
    }
    state.send_replace(State::Unknown(Failure::unavailable("the store is closed")));
}

/// What one of them says, and how new its knowledge is.
struct Answer {
    age: (bool, u64),
    map: Map,
}

async fn find(settings: &Settings, known: Option<&Map>) -> Result<Map, Failure> {
    let asked = match &settings.topology {
        Topology::Single(address) => return Ok(Map::everything_at(address.clone())),
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
        let answer = timeout(ANSWER.min(settings.command_timeout), answer).await;
        let answer = answer.unwrap_or_else(|_late| Err(Failure::unavailable("no answer in time")));
        answer.map_err(|failure| Failure { reason: format!("{address}: {}", failure.reason), ..failure })
    };
    let mut asking: FuturesUnordered<_> = asked.into_iter().map(ask).collect();
    let mut best: Option<Answer> = None;
    let mut failures: Vec<Failure> = Vec::new();
    let mut until = Instant::now() + ANSWER * 2;
    while let Ok(Some(answer)) = timeout_at(until, asking.next()).await {
        match answer {
            Ok(answer) => {
                until = until.min(Instant::now() + OTHERS);
                // Of answers that are equally new, one that tells something else is believed: the others will follow.
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
    let who = match settings.topology {
        Topology::Sentinel { .. } => "no sentinel names the primary",
        Topology::Single(_) | Topology::Cluster(_) => "no node of the cluster answers",
    };
    let kind = failures.iter().find(|failure| failure.kind != StoreErrorKind::Unavailable).map(|failure| failure.kind);
    let reasons = failures.into_iter().map(|failure| failure.reason).collect::<Vec<_>>().join("; ");
    Err(Failure::new(kind.unwrap_or(StoreErrorKind::Unavailable), format!("{who}: {reasons}")))
}

/// Whom a sentinel names.
async fn sentinel(settings: &Settings, address: &Address, service: &str) -> Result<Answer, Failure> {
    let told = |failure: Failure| match failure.kind {
        StoreErrorKind::Denied => {
            let reason = format!("the sentinel: {} (store.redis.sentinel_password)", failure.reason);
            Failure { reason, ..failure }
        }
        _ => failure,
    };
    let (connection, _router) = Connection::open(settings, address, Purpose::Sentinel).await.map_err(told)?;
    let ask = |what: &'static str| {
        let mut arguments = Arguments::with_capacity(2);
        arguments.text(what).name(service);
        connection.call("SENTINEL", arguments, ANSWER, false)
    };
    let primary = ask("GET-MASTER-ADDR-BY-NAME").await.map_err(told)?;
    if primary.is_nil() {
        let reason = format!("the sentinel knows no service `{service}` (store.redis.url)");
        return Err(Failure::new(StoreErrorKind::Unsuitable, reason));
    }
    let [host, port] = primary.tuple()?;
    let (host, port) = (host.text()?, port.text()?);
    let port = port.parse().map_err(|e| Failure::unexpected(&format!("the port {port}: {e}")))?;
    // Not every user may ask for the epoch; without it the sentinels count the same.
    let epoch = match ask("MASTER").await.and_then(Reply::named) {
        Ok(mut named) => named.find("config-epoch").and_then(|epoch| epoch.text().ok()?.parse().ok()).unwrap_or(0),
        Err(_) => 0,
    };
    Ok(Answer { age: (true, epoch), map: Map::everything_at(Address::named(&host, port, address)) })
}

/// What a node of a cluster says of all.
async fn node(settings: &Settings, address: &Address) -> Result<Answer, Failure> {
    let (connection, _router) = Connection::open(settings, address, Purpose::Exclusive).await?;
    let mut arguments = Arguments::with_capacity(1);
    arguments.text("INFO");
    let info = connection.call("CLUSTER", arguments, ANSWER, false).await?.text()?;
    let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let is_ok = value("cluster_state:") == Some("ok");
    let epoch = value("cluster_current_epoch:").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    let mut arguments = Arguments::with_capacity(1);
    arguments.text("SLOTS");
    let slots = connection.call("CLUSTER", arguments, ANSWER, false).await?;
    let mut map = Map::default();
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
        return Err(Failure::unavailable("the node belongs to no cluster yet (CLUSTER MEET)"));
    }
    Ok(Answer { age: (is_ok, epoch), map })
}

fn slot(reply: Reply) -> Result<u16, Failure> {
    let slot = u16::try_from(reply.count()?).ok().filter(|slot| *slot < SLOTS);
    slot.ok_or_else(|| Failure::unexpected("a slot that is none"))
}

/// A server as CLUSTER SLOTS describes it: host, port, and more.
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
    fn a_map_knows_the_server_of_each_slot_and_where_there_is_none() {
        let (one, two) = (Address::new("one", 1), Address::new("two", 2));
        let ranges = vec![(0, 99, one.clone()), (200, 299, two.clone()), (300, 16383, one.clone())];
        let map = Map { ranges, others: BTreeSet::new() };
        let cases =
            [(0, Some(&one)), (99, Some(&one)), (100, None), (199, None), (200, Some(&two)), (16383, Some(&one))];
        for (slot, expected) in cases {
            assert_eq!(map.server_of(slot), expected, "{slot}");
        }
        assert_eq!(map.uncovered(), 100);
        assert_eq!(map.servers(), [(one, 0), (two, 200)]);
        assert_eq!(Map::default().server_of(5), None);
    }
}
