//! A `PostgreSQL` server for one test, on a free port of the loopback address, with its files in a temporary folder.
//! It refuses to run as root. If the tests run as root, it runs as `nobody`.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::redis::{free_port, make_certificates};
use super::{install, until};

/// The longest wait for a server to start.
const BOUND: Duration = Duration::from_mins(1);
/// The longest wait for a server to stop before it is killed.
const STOP_BOUND: Duration = Duration::from_secs(5);
/// The owner's password.
pub(crate) const PASSWORD: &str = "open-sesame";

/// A running server with the database `aurora`, owned by the user `aurora`. It is stopped on drop.
#[derive(Debug)]
pub(crate) struct PostgresServer {
    child: Child,
    port: u16,
    folder: TempDir,
    options: Vec<String>,
}

impl PostgresServer {
    /// Starts a server without `fsync`. Its data does not survive a power failure.
    pub(crate) async fn start() -> Self {
        Self::start_with(&["-c", "fsync=off"], |_| {}).await
    }

    /// Returns the server that tests share while one of them uses it. Such tests use distinct tables.
    pub(crate) async fn shared() -> Arc<Self> {
        static SHARED: LazyLock<tokio::sync::Mutex<Weak<PostgresServer>>> = LazyLock::new(Default::default);
        let mut shared = SHARED.lock().await;
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new(Self::start().await);
        *shared = Arc::downgrade(&server);
        server
    }

    /// Starts a server that accepts TLS only. Its certificate is for 127.0.0.1, signed by [`Self::ca_file`].
    pub(crate) async fn with_tls() -> Self {
        let options =
            ["-c", "fsync=off", "-c", "ssl=on", "-c", "ssl_cert_file=server.pem", "-c", "ssl_key_file=server.key"];
        Self::start_with(&options, |data| {
            make_certificates(data);
            let rules = "local all all scram-sha-256\nhostssl all all 127.0.0.1/32 scram-sha-256\n";
            fs::write(data.join("pg_hba.conf"), rules).expect("the server's folder can be written");
        })
        .await
    }

    async fn start_with(options: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let data = folder.path().join("data");
        let password_file = folder.path().join("password");
        fs::write(&password_file, PASSWORD).expect("a temporary folder");
        hand_over(folder.path());
        let output = unprivileged(&install::program("initdb", "postgresql"))
            .args([
                "--username",
                "aurora",
                "--auth",
                "scram-sha-256",
                "--encoding",
                "UTF8",
                "--locale",
                "C",
                "--no-sync",
            ])
            .arg("--pwfile")
            .arg(&password_file)
            .arg("--pgdata")
            .arg(&data)
            .current_dir(folder.path())
            .output()
            .expect("initdb runs");
        assert!(output.status.success(), "initdb failed: {}", String::from_utf8_lossy(&output.stderr));
        prepare(&data);
        hand_over(&data);
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let port = free_port();
        let child = spawn(folder.path(), port, &options);
        let mut server = Self { child, port, folder, options };
        server.answers("postgres").await;
        server.sql_in("postgres", "CREATE DATABASE aurora");
        server
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Returns the URL for clients.
    pub(crate) fn url(&self) -> String {
        url_by(self.port)
    }

    /// Returns the path of the authority's certificate.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.path().join("data/ca.pem")
    }

    /// Runs SQL and returns its output: a line per row, `|` between columns.
    pub(crate) fn sql(&self, sql: &str) -> String {
        self.sql_in("aurora", sql)
    }

    fn sql_in(&self, database: &str, sql: &str) -> String {
        self.try_sql(database, sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    fn try_sql(&self, database: &str, sql: &str) -> Result<String, String> {
        let output = Command::new(install::program("psql", "postgresql-client"))
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-U", "aurora", "-d", database, "-c", sql])
            .args(["-p", &self.port.to_string(), "-h"])
            .arg(self.folder.path())
            .env("PGPASSWORD", PASSWORD)
            .output()
            .expect("psql runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Kills the server and all its processes at once, like a crash of the machine.
    pub(crate) fn crash(&mut self) {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        self.child.kill().expect("the server runs");
        for child in children.split_whitespace() {
            // Some may have ended already.
            drop(Command::new("kill").args(["-9", child]).stderr(Stdio::null()).status());
        }
        self.child.wait().expect("a child");
    }

    /// Starts the server again on the same port with its old files.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(self.folder.path(), self.port, &self.options);
        self.answers("aurora").await;
    }

    /// Waits until the server responds. Starts it again while processes of the killed server block the start.
    async fn answers(&mut self, database: &str) {
        let log = self.folder.path().join("log");
        let started = Instant::now();
        until("answering server", BOUND, async || {
            if let Some(status) = self.child.try_wait().expect("a child") {
                let log = fs::read_to_string(&log).unwrap_or_default();
                assert!(started.elapsed() < BOUND && log.contains("still in use"), "the server ended: {status}\n{log}");
                self.child = spawn(self.folder.path(), self.port, &self.options);
            }
            self.try_sql(database, "SELECT 1").ok().map(drop)
        })
        .await;
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // An immediate shutdown ends all processes of the server. It may have ended already.
        drop(Command::new("kill").args(["-QUIT", &self.child.id().to_string()]).stderr(Stdio::null()).status());
        let asked = Instant::now();
        while asked.elapsed() < STOP_BOUND && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::yield_now();
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Returns the name of a table that no other test uses.
pub(crate) fn new_table() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("results_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Returns the URL of a server at another port, such as that of a proxy.
pub(crate) fn url_by(port: u16) -> String {
    format!("postgres://aurora:{PASSWORD}@127.0.0.1:{port}/aurora")
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Returns a command that runs the program as an unprivileged user if the test runs as root.
fn unprivileged(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]).arg(program);
    command
}

/// Makes the server's user the owner of a folder and its content.
pub(crate) fn hand_over(folder: &Path) {
    if is_root() {
        let status = Command::new("chown").args(["-R", "nobody:nogroup"]).arg(folder).status().expect("chown runs");
        assert!(status.success(), "cannot hand over {}", folder.display());
    }
}

fn spawn(folder: &Path, port: u16, options: &[String]) -> Child {
    let log = fs::File::create(folder.join("log")).expect("a temporary folder");
    unprivileged(&install::program("postgres", "postgresql"))
        .arg("-D")
        .arg(folder.join("data"))
        .args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB"])
        .args(["-c", "max_connections=50", "-k"])
        .arg(folder)
        .args(options)
        .current_dir(folder)
        .env_remove("PGDATA")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("the server runs")
}
