//! A cluster of three primaries with one replica each, on free ports of the loopback address.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use super::redis::{Product, RedisServer, free_port, tls_options};
use super::{install, until};

/// The longest wait for the cluster to form or to agree on a change.
const BOUND: Duration = Duration::from_mins(1);

/// Milliseconds without contact until nodes fail over, for tests that kill nodes.
const SOON: &str = "1500";
/// The same for tests that kill no node: a pause of the machine must not start a failover.
const LATE: &str = "20000";

/// The six servers of a cluster. They are killed on drop.
#[derive(Debug)]
pub(crate) struct Cluster {
    nodes: Vec<RedisServer>,
    has_tls: bool,
}

impl Cluster {
    /// Starts a cluster and waits until it works. If a primary dies, its replica is promoted after 1.5 s.
    pub(crate) async fn start() -> Self {
        Self::start_with(None, SOON).await
    }

    /// Starts a cluster whose nodes keep their roles.
    pub(crate) async fn with_stable_roles() -> Self {
        Self::start_with(None, LATE).await
    }

    /// Starts a cluster with TLS and the certificates in this folder.
    pub(crate) async fn with_tls(certificates: &Path) -> Self {
        Self::start_with(Some(certificates), LATE).await
    }

    async fn start_with(certificates: Option<&Path>, node_timeout: &str) -> Self {
        let common = [
            "--cluster-enabled",
            "yes",
            "--cluster-config-file",
            "nodes.conf",
            "--cluster-node-timeout",
            node_timeout,
            "--repl-diskless-sync-delay",
            "0",
        ];
        let mut nodes = Vec::new();
        for _ in 0..6 {
            let port = free_port_pair();
            let tls = certificates.map(|folder| tls_options(port, folder.to_str().expect("UTF-8")));
            let tls = tls.iter().flatten().map(String::as_str);
            let more =
                if certificates.is_some() { &["--tls-cluster", "yes", "--tls-replication", "yes"][..] } else { &[] };
            let options: Vec<&str> = common.into_iter().chain(tls).chain(more.iter().copied()).collect();
            nodes.push(RedisServer::start_on(port, Product::Redis, &options).await);
        }
        let addresses = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port()));
        let output = Command::new(install::program("redis-cli", "redis-server"))
            .args(if certificates.is_some() { &["--tls", "--insecure"][..] } else { &[] })
            .args(["--cluster", "create"])
            .args(addresses)
            .args(["--cluster-replicas", "1", "--cluster-yes"])
            .output()
            .expect("redis-cli runs");
        assert!(output.status.success(), "no cluster: {}", String::from_utf8_lossy(&output.stdout));
        let cluster = Self { nodes, has_tls: certificates.is_some() };
        until("cluster that works", BOUND, async || {
            let is_well = |node: &RedisServer| {
                let is_ok = node.cli(&["CLUSTER", "INFO"]).contains("cluster_state:ok");
                let info = node.cli(&["INFO", "replication"]);
                let is_linked = info.contains("master_link_status:up") || info.contains("connected_slaves:1");
                let replicas = node.cli(&["CLUSTER", "NODES"]).lines().filter(|line| line.contains("slave")).count();
                is_ok && is_linked && replicas == 3
            };
            cluster.nodes.iter().all(is_well).then_some(())
        })
        .await;
        cluster
    }

    /// Returns the cluster that tests share while one of them uses it. Such tests use distinct keys and kill no node.
    pub(crate) async fn shared() -> Arc<Self> {
        static SHARED: LazyLock<tokio::sync::Mutex<Weak<Cluster>>> = LazyLock::new(Default::default);
        let mut cluster = SHARED.lock().await;
        if let Some(cluster) = cluster.upgrade() {
            return cluster;
        }
        let started = Arc::new(Self::with_stable_roles().await);
        *cluster = Arc::downgrade(&started);
        started
    }

    /// Returns the URL for clients, with two of the nodes.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.has_tls { "rediss-cluster" } else { "redis-cluster" };
        format!("{scheme}://127.0.0.1:{},127.0.0.1:{}", self.nodes[4].port(), self.nodes[1].port())
    }

    /// Returns the indexes of the primary and the replica of a key.
    pub(crate) fn nodes_of(&self, key: &str) -> (usize, usize) {
        let slot: u16 = self.nodes[0].cli(&["CLUSTER", "KEYSLOT", key]).parse().expect("a slot");
        let nodes = self.nodes.iter().find_map(|node| {
            let nodes = node.cli(&["CLUSTER", "NODES"]);
            (!nodes.is_empty()).then_some(nodes)
        });
        let nodes = nodes.expect("a node that answers");
        let rows: Vec<Vec<&str>> = nodes.lines().map(|line| line.split_whitespace().collect()).collect();
        let has = |row: &Vec<&str>| {
            row.iter().skip(8).any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(f), Ok(l)) if (f..=l).contains(&slot))
            })
        };
        let primary = rows.iter().find(|row| has(row)).expect("someone has the slot");
        let replica = rows.iter().find(|row| row[3] == primary[0]).expect("a replica");
        let index = |row: &Vec<&str>| {
            let port = row[1].split('@').next().and_then(|address| address.rsplit(':').next());
            let port = port.and_then(|port| port.parse::<u16>().ok()).expect("a port");
            self.nodes.iter().position(|node| node.port() == port).expect("one of ours")
        };
        (index(primary), index(replica))
    }

    pub(crate) fn node(&self, index: usize) -> &RedisServer {
        &self.nodes[index]
    }

    /// Kills a node at once, like a crash.
    pub(crate) fn crash(&mut self, index: usize) {
        self.nodes[index].crash();
    }

    /// Starts a killed node again with its old files.
    pub(crate) async fn restart(&mut self, index: usize) {
        self.nodes[index].restart().await;
    }

    /// Waits until this node is a primary.
    pub(crate) async fn promoted(&self, index: usize) {
        until("promoted replica", BOUND, async || self.nodes[index].cli(&["ROLE"]).starts_with("master").then_some(()))
            .await;
    }
}

/// Returns a free port whose cluster bus port, 10 000 above, is free as well.
fn free_port_pair() -> u16 {
    loop {
        let port = free_port();
        let fellow = port.checked_add(10_000);
        if fellow.is_some_and(|fellow| TcpListener::bind(("127.0.0.1", fellow)).is_ok()) {
            return port;
        }
    }
}
