//! A primary and a replica with three sentinels, on free ports of the loopback address.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aurora_bus::store::Store;
use tempfile::TempDir;

use super::redis::{Product, RedisServer, free_port, tls_options};
use super::{install, until};
use crate::store_contract::{new_entry, unique_stream};

const BOUND: Duration = Duration::from_mins(1);

/// The service name of the servers.
pub(crate) const SERVICE: &str = "soc";

/// A primary, its replica and the sentinels. They are killed on drop.
#[derive(Debug)]
pub(crate) struct SentinelGroup {
    pub(crate) servers: [RedisServer; 2],
    sentinels: Vec<Sentinel>,
    password: Option<&'static str>,
    has_tls: bool,
}

#[derive(Debug)]
struct Sentinel {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl SentinelGroup {
    /// Starts all servers and waits until the sentinels know each other and the replica.
    pub(crate) async fn start() -> Self {
        Self::start_with(None, None).await
    }

    /// Starts them with TLS and the certificates in this folder.
    pub(crate) async fn with_tls(certificates: &Path) -> Self {
        Self::start_with(None, Some(certificates)).await
    }

    /// Starts them with sentinels that require a password.
    pub(crate) async fn with_password(password: &'static str) -> Self {
        Self::start_with(Some(password), None).await
    }

    async fn start_with(password: Option<&'static str>, certificates: Option<&Path>) -> Self {
        let server = async |more: &[&str]| {
            let port = free_port();
            let tls = certificates.map(|folder| tls_options(port, folder.to_str().expect("UTF-8")));
            let quick = ["--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"];
            let replicating = if certificates.is_some() { &["--tls-replication", "yes"][..] } else { &[] };
            let options = quick.into_iter().chain(tls.iter().flatten().map(String::as_str));
            let options: Vec<&str> = options.chain(replicating.iter().chain(more).copied()).collect();
            RedisServer::start_on(port, Product::Redis, &options).await
        };
        let primary = server(&[]).await;
        let replica = server(&["--replicaof", "127.0.0.1", &primary.port().to_string()]).await;
        let sentinels = (0..3).map(|_| Sentinel::start(primary.port(), password, certificates)).collect();
        let watched = Self { servers: [primary, replica], sentinels, password, has_tls: certificates.is_some() };
        until("sentinels that know each other", BOUND, async || {
            let knows_all = |sentinel: &Sentinel| {
                let known = watched.ask(sentinel, &["SENTINEL", "MASTER", SERVICE]);
                let lines: Vec<&str> = known.lines().collect();
                let is = |name: &str, value: &str| lines.windows(2).any(|pair| pair == [name, value]);
                is("num-slaves", "1") && is("num-other-sentinels", "2")
            };
            let is_linked = watched.servers[1].cli(&["INFO", "replication"]).contains("master_link_status:up");
            (is_linked && watched.sentinels.iter().all(knows_all)).then_some(())
        })
        .await;
        watched
    }

    /// Returns the URL for clients.
    pub(crate) fn url(&self) -> String {
        let sentinels = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port));
        let scheme = if self.has_tls { "rediss-sentinel" } else { "redis-sentinel" };
        format!("{scheme}://{}/{SERVICE}", sentinels.collect::<Vec<_>>().join(","))
    }

    /// Waits until the sentinels name this server as the primary.
    pub(crate) async fn promoted(&self, index: usize) {
        let port = self.servers[index].port().to_string();
        until("promoted replica", BOUND, async || {
            let is_named = self.sentinels.iter().all(|sentinel| {
                let named = self.ask(sentinel, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]);
                named.lines().nth(1) == Some(port.as_str())
            });
            (is_named && self.servers[index].cli(&["ROLE"]).starts_with("master")).then_some(())
        })
        .await;
    }

    /// Requests a failover to the other server.
    async fn fail_over(&self) {
        until("failover that begins", BOUND, async || {
            (self.ask(&self.sentinels[0], &["SENTINEL", "FAILOVER", SERVICE]) == "OK").then_some(())
        })
        .await;
    }

    /// Fails over while a store is in use. The store must follow to the promoted server.
    pub(crate) async fn fail_over_under(&self, store: &dyn Store) {
        let stream = unique_stream();
        store.append(&stream, vec![new_entry("x")]).await.expect("appended");
        let length_at_the_other = || self.servers[1].cli(&["XLEN", stream.as_str()]);
        until("copy", BOUND, async || (length_at_the_other() == "1").then_some(())).await;
        self.fail_over().await;
        self.promoted(1).await;
        let promoted = Instant::now();
        // The old primary accepts writes until the sentinels reach it, and loses them when it becomes a replica.
        until("append at the promoted server", BOUND, async || {
            store.append(&stream, vec![new_entry("y")]).await.ok()?;
            (length_at_the_other() != "1").then_some(())
        })
        .await;
        assert!(promoted.elapsed() < Duration::from_secs(10), "back after {:?}", promoted.elapsed());
    }

    fn ask(&self, sentinel: &Sentinel, command: &[&str]) -> String {
        let mut cli = Command::new(install::program("redis-cli", "redis-server"));
        cli.args(["-p", &sentinel.port.to_string()]);
        if self.has_tls {
            cli.args(["--tls", "--insecure"]);
        }
        if let Some(password) = self.password {
            cli.args(["--no-auth-warning", "-a", password]);
        }
        let output = cli.args(command).output().expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Sentinel {
    fn start(primary: u16, password: Option<&str>, certificates: Option<&Path>) -> Self {
        let (folder, port) = (TempDir::new().expect("a temporary folder"), free_port());
        let requirepass = password.map_or(String::new(), |password| format!("requirepass {password}\n"));
        let listens = match certificates {
            None => format!("port {port}\n"),
            Some(folder) => {
                let options = tls_options(port, folder.to_str().expect("UTF-8"));
                let lines = options.chunks(2).map(|option| format!("{}\n", option.join(" ").replacen("--", "", 1)));
                lines.chain(["tls-replication yes\n".to_owned()]).collect()
            }
        };
        let config = format!(
            "{listens}bind 127.0.0.1\ndaemonize no\n{requirepass}\
             sentinel monitor {SERVICE} 127.0.0.1 {primary} 2\n\
             sentinel down-after-milliseconds {SERVICE} 1500\n\
             sentinel failover-timeout {SERVICE} 5000\n"
        );
        let path = folder.path().join("sentinel.conf");
        fs::write(&path, config).expect("a writable folder");
        let child = Command::new(install::program("redis-server", "redis-server"))
            .arg(&path)
            .args(["--sentinel", "--dir"])
            .arg(folder.path())
            .arg("--logfile")
            .arg(folder.path().join("log"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the sentinel runs");
        Self { child, port, _folder: folder }
    }
}
