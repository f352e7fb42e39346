//! Two servers watched by three sentinels, of the tests' own, on free ports of the loopback address.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::redis::{Product, RedisServer, free_port};
use super::{install, until};

const BOUND: Duration = Duration::from_mins(1);

/// The name under which the sentinels know the servers.
pub(crate) const SERVICE: &str = "soc";

/// A primary, its replica, and sentinels. They are killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) servers: [RedisServer; 2],
    sentinels: Vec<Sentinel>,
    password: Option<&'static str>,
}

#[derive(Debug)]
struct Sentinel {
    child: Child,
    port: u16,
    _folder: TempDir,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        // It may be dead already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Watched {
    /// Starts all and waits until the sentinels know each other and the replica.
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// The same with sentinels that ask for a password.
    pub(crate) async fn with_password(password: &'static str) -> Self {
        Self::start_with(Some(password)).await
    }

    async fn start_with(password: Option<&'static str>) -> Self {
        let quick = ["--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"];
        let primary = RedisServer::start(Product::Redis, &quick).await;
        let port = primary.port().to_string();
        let replica =
            RedisServer::start(Product::Redis, &[&quick[..], &["--replicaof", "127.0.0.1", &port]].concat()).await;
        let sentinels = (0..3).map(|_| Sentinel::start(primary.port(), password)).collect();
        let watched = Self { servers: [primary, replica], sentinels, password };
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

    /// The URL for clients.
    pub(crate) fn url(&self) -> String {
        let sentinels = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port));
        format!("redis-sentinel://{}/{SERVICE}", sentinels.collect::<Vec<_>>().join(","))
    }

    /// Waits until the sentinels name that server.
    pub(crate) async fn promoted(&self, place: usize) {
        let port = self.servers[place].port().to_string();
        until("promoted replica", BOUND, async || {
            let is_named = self.sentinels.iter().all(|sentinel| {
                let named = self.ask(sentinel, &["SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE]);
                named.lines().nth(1) == Some(port.as_str())
            });
            (is_named && self.servers[place].cli(&["ROLE"]).starts_with("master")).then_some(())
        })
        .await;
    }

    /// Has the sentinels make the other server the primary.
    pub(crate) async fn fail_over(&self) {
        until("failover that begins", BOUND, async || {
            (self.ask(&self.sentinels[0], &["SENTINEL", "FAILOVER", SERVICE]) == "OK").then_some(())
        })
        .await;
    }

    fn ask(&self, sentinel: &Sentinel, command: &[&str]) -> String {
        let mut cli = Command::new(install::program("redis-cli", "redis-server"));
        cli.args(["-p", &sentinel.port.to_string()]);
        if let Some(password) = self.password {
            cli.args(["--no-auth-warning", "-a", password]);
        }
        let output = cli.args(command).output().expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Sentinel {
    fn start(primary: u16, password: Option<&str>) -> Self {
        let (folder, port) = (TempDir::new().expect("a temporary folder"), free_port());
        let requirepass = password.map_or(String::new(), |password| format!("requirepass {password}\n"));
        let config = format!(
            "port {port}\nbind 127.0.0.1\ndaemonize no\n{requirepass}\
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
