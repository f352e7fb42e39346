//! Starts the servers of a measurement: the daemon, Redis, NATS and Centrifugo.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use url::Url;

use crate::clock::sleep_until;
use crate::generator::CENTRIFUGO_API_KEY;
use crate::http::HttpClient;
use crate::process::{Process, free_address, unlimited_command};
use crate::resp::RespConnection;
use crate::workspace::{START_LIMIT, Workspace};

/// The page of the daemon that returns 200 when it is ready.
pub(crate) const READY_PATH: &str = "/ready";
/// The page of Centrifugo that returns 200 when it is ready.
pub(crate) const CENTRIFUGO_READY_PATH: &str = "/health";
/// The time limit of `--version`.
const VERSION_LIMIT: Duration = Duration::from_secs(10);

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    process: Process,
    pub(crate) address: SocketAddr,
    /// The time from its start until it was ready.
    pub(crate) started_in: Duration,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Fails, with the last lines of output, if the server has ended.
    pub(crate) fn ensure_running(&mut self) -> Result<()> {
        self.process.ensure_running()
    }

    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        self.process.exit_status().map(|status| status.is_some())
    }
}

/// The file of the daemon.
#[derive(Debug)]
pub(crate) struct DaemonProgram {
    path: PathBuf,
}

impl DaemonProgram {
    /// Finds the daemon: the given file, or `aurora-bus` beside this program.
    pub(crate) fn find(given: Option<&Path>) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the file of this program")?;
        let path = given.map_or_else(|| program.with_file_name("aurora-bus"), Path::to_owned);
        let build = if cfg!(debug_assertions) { "cargo build" } else { "cargo build --release" };
        ensure!(
            path.is_file(),
            "the daemon {} does not exist; build it with `{build}`, or give its path with --daemon",
            path.display()
        );
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of the file, in bytes.
    pub(crate) fn size(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path).context("cannot read the size of the daemon")?.len())
    }

    /// Returns the version that the daemon prints.
    pub(crate) fn version(&self, workspace: &Workspace) -> Result<String> {
        version_of(workspace, &self.path, "--version")
    }
}

/// Returns the last word that a program prints with this argument.
pub(crate) fn version_of(workspace: &Workspace, program: &Path, argument: &str) -> Result<String> {
    let text = workspace.run(Command::new(program).arg(argument), VERSION_LIMIT)?;
    let words = text.lines().next().unwrap_or_default().split(' ');
    let version =
        words.map(|word| word.trim_start_matches('v')).find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    version.map(str::to_owned).with_context(|| format!("{} printed no version: {text}", program.display()))
}

impl Workspace {
    /// Starts a daemon, at a free address if none is given, and waits until it is ready.
    pub(crate) fn start_daemon(
        &self,
        program: &DaemonProgram,
        address: Option<SocketAddr>,
        config: impl FnOnce(SocketAddr) -> String,
    ) -> Result<Server> {
        let address = address.map_or_else(free_address, Ok)?;
        let file = self.path("daemon.toml");
        fs::write(&file, config(address)).context("cannot write the configuration of the daemon")?;
        let mut command = unlimited_command(program.path());
        command.arg("serve").arg("--config").arg(&file);
        self.start_server(&mut command, "daemon", address, READY_PATH)
    }

    /// Starts a server and waits until its page `ready_path` returns 200.
    fn start_server(
        &self,
        command: &mut Command,
        files: &str,
        address: SocketAddr,
        ready_path: &str,
    ) -> Result<Server> {
        let started = Instant::now();
        let mut process = Process::spawn(command, &self.path(files))?;
        loop {
            if let Ok(mut client) = HttpClient::open(address)
                && let Ok((200, _)) = client.get(ready_path)
            {
                return Ok(Server { process, address, started_in: started.elapsed() });
            }
            process.ensure_running()?;
            self.check_interrupt()?;
            ensure!(
                started.elapsed() < START_LIMIT,
                "{} was not ready within {} s: {}",
                process.name(),
                START_LIMIT.as_secs(),
                process.last_lines()
            );
            sleep_until(Instant::now() + Duration::from_millis(1));
        }
    }

    /// Starts a NATS server without storage; returns it with the address of publishers. Its own address is that of
    /// WebSocket clients.
    pub(crate) fn start_nats(&self, program: &Path) -> Result<(Server, SocketAddr)> {
        let (publishers, address) = (free_address()?, free_address()?);
        let file = self.path("nats.conf");
        let config = format!("listen: \"{publishers}\"\nwebsocket {{ listen: \"{address}\", no_tls: true }}\n");
        fs::write(&file, config).context("cannot write the configuration of NATS")?;
        let started = Instant::now();
        let mut process = Process::spawn(unlimited_command(program).arg("-c").arg(&file), &self.path("nats"))?;
        self.wait_for("start of NATS", START_LIMIT, || {
            process.ensure_running()?;
            let is_up = [publishers, address].into_iter().all(|address| TcpStream::connect(address).is_ok());
            Ok(is_up.then_some(()))
        })?;
        Ok((Server { process, address, started_in: started.elapsed() }, publishers))
    }

    /// Starts a Centrifugo server, at a free address if none is given, and waits until it is ready.
    ///
    /// With `history` it keeps the events of its channel in Redis, which survives a kill of the server. Without, it
    /// keeps nothing, in memory.
    pub(crate) fn start_centrifugo(
        &self,
        program: &Path,
        address: Option<SocketAddr>,
        history: Option<&Url>,
    ) -> Result<Server> {
        let address = address.map_or_else(free_address, Ok)?;
        let (engine, channel) = match history {
            Some(redis) => (
                json!({"type": "redis", "redis": {"address": [redis.as_str()]}}),
                json!({"history_size": 10_000, "history_ttl": "1h", "force_recovery": true}),
            ),
            None => (json!({"type": "memory"}), json!({})),
        };
        // Limits that a measurement does not reach: slow clients are not disconnected, and recovery is complete.
        let config = json!({
            "http_server": {"address": address.ip().to_string(), "port": address.port()},
            "client": {
                "insecure": true,
                "allowed_origins": ["*"],
                "queue_max_size": 256 << 20,
                "recovery_max_publication_limit": 10_000,
            },
            "http_api": {"key": CENTRIFUGO_API_KEY},
            "channel": {"without_namespace": channel},
            "engine": engine,
            "health": {"enabled": true},
            "usage_stats": {"enabled": false},
            "log": {"level": "error"},
        });
        let file = self.path("centrifugo.json");
        fs::write(&file, config.to_string()).context("cannot write the configuration of Centrifugo")?;
        let mut command = unlimited_command(program);
        command.arg("--config").arg(&file);
        self.start_server(&mut command, "centrifugo", address, CENTRIFUGO_READY_PATH)
    }

    /// Starts a Redis server, without persistence unless `aof`.
    pub(crate) fn start_redis(&self, program: &Path, aof: bool) -> Result<(Process, Url)> {
        let address = free_address()?;
        let folder = self.path("redis-data");
        fs::create_dir_all(&folder).context("cannot make a folder for Redis")?;
        let mut command = Command::new(program);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""]);
        command.args(["--appendonly", if aof { "yes" } else { "no" }, "--appendfsync", "everysec"]);
        command.arg("--dir").arg(&folder);
        let mut process = Process::spawn(&mut command, &self.path("redis"))
            .context("give --redis-server PATH or --redis-url URL, or measure with --store embedded")?;
        let url = Url::parse(&format!("redis://{address}/0"))?;
        self.wait_for("start of Redis", START_LIMIT, || {
            process.ensure_running()?;
            if TcpStream::connect(address).is_err() {
                return Ok(None);
            }
            let connection = RespConnection::open(&url).ok();
            Ok(connection.and_then(|mut connection| connection.call(&[b"PING"]).is_ok().then_some(())))
        })?;
        Ok((process, url))
    }
}
