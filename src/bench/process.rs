//! The processes of a measurement, their files and what they cost.
//!
//! Every process is owned by a value that ends it when dropped, and every file lies in one folder that is removed.

use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::http::HttpClient;
use super::load::{Job, wait_until};
use super::resp::Connection;

/// How long a process may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How often a state that is waited for is looked at.
const POLL: Duration = Duration::from_millis(5);
/// Starts this program again, with higher limits than it has itself.
const SHELL: &str = "/bin/sh";
/// Clock ticks per second in `/proc`, which Linux fixes for every architecture that matters here.
const TICKS_PER_SECOND: f64 = 100.0;

/// Where a measurement happens: the program, a folder for files, and whether it shall end early.
#[derive(Debug)]
pub(crate) struct Site {
    program: PathBuf,
    folder: TempDir,
    stop: CancellationToken,
}

impl Site {
    /// Files go into a new folder within `parent`, or the system's folder for temporary files.
    pub(crate) fn new(parent: Option<&Path>, stop: CancellationToken) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("aurora-bus-bench-");
        let folder = match parent {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        };
        Ok(Self {
            program: std::env::current_exe().context("cannot find this program's own file")?,
            folder: folder.context("cannot make a folder for the measurement")?,
            stop,
        })
    }

    /// This program's own file.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// A file or folder of the measurement, which need not exist.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Removes a folder of the measurement, if it is there.
    pub(crate) fn clear(&self, name: &str) -> Result<()> {
        match fs::remove_dir_all(self.path(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path(name).display()))
            }
            _ => Ok(()),
        }
    }

    /// Fails when the measurement shall end early.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(!self.stop.is_cancelled(), "interrupted");
        Ok(())
    }

    /// Asks every few milliseconds until there is an answer; fails after `limit`.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut ask: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            self.check()?;
            ensure!(Instant::now() < end, "{what} did not come about within {} s", limit.as_secs());
            wait_until(Instant::now() + POLL);
        }
    }

    /// This program, with as many open files as the machine allows, and without settings from the environment.
    fn own_command(&self) -> Command {
        let mut command = Command::new(SHELL);
        command.env_clear().args(["-c", r#"ulimit -n "$(ulimit -Hn)"; exec "$0" "$@""#]).arg(&self.program);
        command
    }

    /// Runs a program to its end, at most for `limit`; returns what it wrote to its standard output.
    pub(crate) fn run(&self, command: &mut Command, limit: Duration) -> Result<String> {
        self.ended(Process::spawn(command, &self.path("run"))?, limit)
    }

    fn ended(&self, mut process: Process, limit: Duration) -> Result<String> {
        let status = self.wait_for("the end of a process", limit, || process.ended())?;
        ensure!(status.success(), "{} ended with {status}: {}", process.name, process.last_words());
        process.output()
    }

    /// Has a generator do a job that takes about `seconds`.
    pub(crate) fn generate<T: DeserializeOwned>(&self, job: &Job, seconds: f64) -> Result<T> {
        self.finish(self.start_generator(job)?, Duration::from_secs_f64(seconds) + Duration::from_mins(2))
    }

    /// Starts a generator, which does its job beside what comes next.
    pub(crate) fn start_generator(&self, job: &Job) -> Result<Process> {
        let mut command = self.own_command();
        command.arg("bench-load").arg(serde_json::to_string(job)?);
        Process::spawn(&mut command, &self.path("generator"))
    }

    /// Waits for a generator's end, at most for `limit`; returns its report.
    pub(crate) fn finish<T: DeserializeOwned>(&self, generator: Process, limit: Duration) -> Result<T> {
        serde_json::from_str(&self.ended(generator, limit)?)
            .context("the load generator's report is not what it should be")
    }

    /// Starts a generator that serves until its value goes, and returns where.
    pub(crate) fn start_server(&self, job: &Job) -> Result<(Process, SocketAddr)> {
        let mut command = self.own_command();
        command.arg("bench-load").arg(serde_json::to_string(job)?);
        let mut process = Process::spawn(&mut command, &self.path("server"))?;
        let address = self.wait_for("a server's address", START_LIMIT, || {
            process.must_run()?;
            let line = process.output()?;
            line.ends_with('\n').then(|| serde_json::from_str(&line).context("not an address")).transpose()
        })?;
        Ok((process, address))
    }

    /// Starts a daemon with this configuration and waits until it is ready.
    pub(crate) fn start_daemon(&self, config: impl FnOnce(SocketAddr) -> String) -> Result<Daemon> {
        self.start_daemon_at(free_address()?, config)
    }

    /// Starts a daemon at this address.
    pub(crate) fn start_daemon_at(
        &self,
        address: SocketAddr,
        config: impl FnOnce(SocketAddr) -> String,
    ) -> Result<Daemon> {
        let file = self.path("daemon.toml");
        fs::write(&file, config(address)).context("cannot write the daemon's configuration")?;
        let mut command = self.own_command();
        command.arg("serve").arg("--config").arg(&file);
        let started = Instant::now();
        let mut process = Process::spawn(&mut command, &self.path("daemon"))?;
        loop {
            if let Ok(mut client) = HttpClient::open(address)
                && let Ok((200, _)) = client.get("/ready")
            {
                return Ok(Daemon { process, address, started_in: started.elapsed() });
            }
            process.must_run()?;
            self.check()?;
            ensure!(
                started.elapsed() < START_LIMIT,
                "the daemon was not ready within {} s: {}",
                START_LIMIT.as_secs(),
                process.last_words()
            );
            wait_until(Instant::now() + Duration::from_millis(1));
        }
    }

    /// Starts a NATS server without storage; returns also where publishers and where dashboards connect.
    pub(crate) fn start_nats(&self, program: &Path) -> Result<(Process, SocketAddr, SocketAddr)> {
        let (clients, sockets) = (free_address()?, free_address()?);
        let file = self.path("nats.conf");
        let config = format!("listen: \"{clients}\"\nwebsocket {{ listen: \"{sockets}\", no_tls: true }}\n");
        fs::write(&file, config).context("cannot write NATS's configuration")?;
        let mut process = Process::spawn(Command::new(program).arg("-c").arg(&file), &self.path("nats"))?;
        self.wait_for("the start of NATS", START_LIMIT, || {
            process.must_run()?;
            let is_up = [clients, sockets].into_iter().all(|address| TcpStream::connect(address).is_ok());
            Ok(is_up.then_some(()))
        })?;
        Ok((process, clients, sockets))
    }

    /// Starts a Redis server of the measurement's own, without persistence unless `aof`.
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
        self.wait_for("the start of Redis", START_LIMIT, || {
            process.must_run()?;
            if TcpStream::connect(address).is_err() {
                return Ok(None);
            }
            Ok(Connection::open(&url).ok().and_then(|mut connection| connection.call(&[b"PING"]).is_ok().then_some(())))
        })?;
        Ok((process, url))
    }
}

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    process: Process,
    pub(crate) address: SocketAddr,
    /// From its start until it said it was ready.
    pub(crate) started_in: Duration,
}

impl Daemon {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Fails, with what it wrote last, if it has ended.
    pub(crate) fn must_run(&mut self) -> Result<()> {
        self.process.must_run()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        self.process.ended().map(|status| status.is_some())
    }
}

/// A child process with its output in files; killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    output: PathBuf,
    errors: PathBuf,
}

impl Process {
    fn spawn(command: &mut Command, files: &Path) -> Result<Self> {
        let program = command.get_program().to_string_lossy();
        let name = if program == SHELL { env!("CARGO_PKG_NAME").to_owned() } else { program.into_owned() };
        let (output, errors) = (files.with_extension("out"), files.with_extension("err"));
        let create = |path: &Path| File::create(path).with_context(|| format!("cannot create {}", path.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(create(&output)?)
            .stderr(create(&errors)?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, output, errors })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Fails, with what it wrote last, if it has ended badly.
    pub(crate) fn must_go_on(&mut self) -> Result<()> {
        match self.ended()? {
            Some(status) if !status.success() => bail!("{} ended with {status}: {}", self.name, self.last_words()),
            _ => Ok(()),
        }
    }

    fn must_run(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!("{} ended early with {status}: {}", self.name, self.last_words());
        }
        Ok(())
    }

    fn output(&self) -> Result<String> {
        let mut text = String::new();
        File::open(&self.output)
            .and_then(|mut file| file.read_to_string(&mut text))
            .context("cannot read an output")?;
        Ok(text)
    }

    /// The last lines of what it wrote.
    fn last_words(&self) -> String {
        let text = [&self.errors, &self.output].map(|path| fs::read(path).unwrap_or_default()).concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().rev().take(12).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A loopback address that nothing listens on now.
fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot find a free port")?;
    Ok(listener.local_addr()?)
}

/// CPU time that a process has used, in seconds, to a hundredth.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    parse_cpu(&stat).context("/proc/PID/stat is not what it should be")
}

/// CPU time that this process has used, in seconds.
pub(crate) fn own_cpu_seconds() -> f64 {
    cpu_seconds(std::process::id()).unwrap_or_default()
}

/// The program's name in the second field may hold spaces and parentheses: count from the last parenthesis.
fn parse_cpu(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

/// Memory of a process that no file backs, in bytes.
pub(crate) fn private_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "RssAnon:")
}

/// All resident memory of a process, in bytes.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmRSS:")
}

/// How many files a process on this machine may have open at most.
pub(crate) fn hard_open_files() -> Option<u64> {
    parse_open_files(&fs::read_to_string("/proc/self/limits").ok()?)
}

fn parse_open_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().nth(1)? {
        "unlimited" => Some(u64::MAX),
        hard => hard.parse().ok(),
    }
}

/// Memory that this machine could still give, in bytes.
pub(crate) fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    parse_kib(&text, "MemAvailable:").unwrap_or_default()
}

fn status_bytes(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    parse_kib(&status, name).with_context(|| format!("/proc/PID/status has no {name}"))
}

fn parse_kib(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_a_name_with_parentheses() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert!((parse_cpu(stat).unwrap() - 3.0).abs() < 1e-9);
        assert!(parse_cpu("42").is_none());
        assert!(cpu_seconds(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn the_hard_limit_of_open_files_is_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 20000                files     \n";
        assert_eq!(parse_open_files(limits), Some(20_000));
        assert!(hard_open_files().is_some());
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(parse_kib("VmRSS:\t    12 kB\nRssAnon:\t 8 kB\n", "RssAnon:"), Some(8192));
        assert!(available_bytes() > 0);
        assert!(private_bytes(std::process::id()).unwrap() > 0);
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn a_process_is_ended_when_its_value_goes() {
        let site = Site::new(None, CancellationToken::new()).unwrap();
        let process = Process::spawn(Command::new("sleep").arg("60"), &site.path("sleep")).unwrap();
        let pid = process.pid();
        cpu_seconds(pid).unwrap();
        drop(process);
        cpu_seconds(pid).unwrap_err();
    }

    #[test]
    fn a_failing_process_is_told_with_its_last_words() {
        let site = Site::new(None, CancellationToken::new()).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo no such thing >&2; exit 3"]);
        let error = site.run(&mut command, Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains('3'), "{error}");
        let folder = site.path("");
        drop(site);
        assert!(!folder.exists());
    }
}
