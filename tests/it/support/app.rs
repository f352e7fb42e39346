//! The real binary under test: runs on free ports in its own folder, over HTTP and `WebSocket`s.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::until;

/// The longest wait for a daemon to start, to stop, or to reach a state.
pub(crate) const BOUND: Duration = Duration::from_mins(1);

/// A folder with a configuration. Several daemons can run in it, one after another.
#[derive(Debug)]
pub(crate) struct Home {
    folder: PathBuf,
    /// Environment variables of the daemons, besides the address to listen on.
    environment: BTreeMap<String, String>,
    /// The certificate of the authority that signed the daemons' certificates, if they use TLS.
    authority: Option<PathBuf>,
    /// Removes the folder on drop; `None` if another value owns the folder.
    _owned: Option<TempDir>,
}

impl Home {
    /// Makes a new folder with this configuration. The daemon listens on a free port.
    pub(crate) fn new(config: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let home = Self::at(folder.path(), config);
        Self { _owned: Some(folder), ..home }
    }

    /// Like [`Self::new`], with an instance name.
    pub(crate) fn named(instance: &str, config: &str) -> Self {
        let home = Self::new(config);
        fs::write(home.config_path(), format!("instance = \"{instance}\"\n{config}\n")).expect("a writable folder");
        home
    }

    /// Like [`Self::new`], in an existing folder.
    pub(crate) fn at(folder: &Path, config: &str) -> Self {
        let home = Self { folder: folder.to_owned(), environment: BTreeMap::new(), authority: None, _owned: None };
        let config = format!("instance = \"it\"\n{config}\n");
        fs::write(home.config_path(), config).expect("a writable folder");
        home
    }

    /// Sets an environment variable of all daemons that start later.
    pub(crate) fn set_env(&mut self, name: &str, value: &str) {
        self.environment.insert(name.to_owned(), value.to_owned());
    }

    /// Expects TLS from all daemons that start later, with a certificate that this authority signed.
    pub(crate) fn trust(&mut self, authority: &Path) {
        self.authority = Some(authority.to_owned());
    }

    /// Returns a path in this folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn config_path(&self) -> PathBuf {
        self.path("aurora-bus.toml")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aurora-bus"));
        command
            .args(arguments)
            .current_dir(&self.folder)
            .env_clear()
            .env("AURORA_BUS__HTTP__LISTEN", "127.0.0.1:0")
            .envs(&self.environment)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command of the binary until it ends.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    /// Starts a daemon and waits until it is ready.
    pub(crate) async fn start(&self) -> Daemon {
        let daemon = self.spawn().await.unwrap_or_else(|ended| panic!("the daemon ended: {ended:?}"));
        daemon.ready(StatusCode::OK).await;
        daemon
    }

    /// Starts a daemon and waits until it listens or has ended.
    pub(crate) async fn spawn(&self) -> Result<Daemon, Ended> {
        let config = self.config_path();
        let config = config.to_str().expect("temporary folders have names in UTF-8");
        let mut child = self
            .command(&["serve", "--config", config])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let log = Log::default();
        log.collect(child.stdout.take().expect("piped"));
        log.collect(child.stderr.take().expect("piped"));
        let mut daemon = Daemon { child, log, base: String::new(), client: client_trusting(self.authority.as_deref()) };
        let listens = until("listening daemon", BOUND, async || match daemon.log.address() {
            Some(address) => Some(Ok(address)),
            None => daemon.child.try_wait().expect("a child").map(Err),
        })
        .await;
        match listens {
            Ok(address) => {
                daemon.base = address;
                Ok(daemon)
            }
            Err(status) => Err(Ended { status, log: daemon.log.complete().await }),
        }
    }
}

/// A daemon that ended by itself.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) log: String,
}

/// The output of a daemon so far, and the number of its pipes that are still open.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    open: usize,
}

impl Log {
    fn lock(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn collect(&self, output: impl Read + Send + 'static) {
        self.lock().open += 1;
        let log = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                log.lock().lines.push(line);
            }
            log.lock().open -= 1;
        });
    }

    fn text(&self) -> String {
        self.lock().lines.join("\n")
    }

    /// Returns the whole log of a daemon that has ended.
    async fn complete(&self) -> String {
        until("end of the log", BOUND, async || (self.lock().open == 0).then_some(())).await;
        self.text()
    }

    fn address(&self) -> Option<String> {
        let lines = self.lock();
        let after = lines.lines.iter().find_map(|line| line.split("listening on http").nth(1))?;
        let (s, after) = after.split_once("://")?;
        let address: String = after.chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect();
        Some(format!("http{s}://{address}"))
    }
}

/// A running daemon. It is killed on drop, and a failed test prints its log.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    log: Log,
    base: String,
    client: reqwest::Client,
}

/// The result of one accepted event.
#[derive(Debug, Deserialize)]
pub(crate) struct Accepted {
    pub(crate) id: String,
    pub(crate) duplicate: bool,
}

#[derive(Deserialize)]
struct PublishReply {
    results: Vec<Accepted>,
}

/// The status of the response that rejected an event; `None` if there was no response.
pub(crate) type Refused = Option<StatusCode>;

/// A WebSocket to a daemon.
pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Returns an HTTP client with a timeout.
pub(crate) fn client() -> reqwest::Client {
    client_trusting(None)
}

fn client_trusting(authority: Option<&Path>) -> reqwest::Client {
    // Installing it a second time in this process has no effect.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    let mut builder = reqwest::Client::builder().timeout(Duration::from_secs(30));
    if let Some(path) = authority {
        let pem = fs::read(path).expect("the authority's certificate");
        builder = builder.tls_certs_only([reqwest::Certificate::from_pem(&pem).expect("a certificate")]);
    }
    builder.build().expect("a client")
}

impl Daemon {
    /// Returns the URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// Publishes payloads as one NDJSON batch.
    pub(crate) async fn publish(&self, stream: &str, payloads: &[String]) -> Result<Vec<Accepted>, Refused> {
        let url = self.url(&format!("/api/v1/streams/{stream}/events"));
        let request = self.client.post(url).header("content-type", "application/x-ndjson").body(payloads.join("\n"));
        let response = request.send().await.map_err(|e| e.status())?;
        let status = response.status();
        if status != StatusCode::CREATED {
            return Err(Some(status));
        }
        // A response without its whole body counts as no response.
        let reply: PublishReply = response.json().await.map_err(|_cut_off| None)?;
        assert_eq!(reply.results.len(), payloads.len(), "one result per event");
        Ok(reply.results)
    }

    /// Posts JSON and returns the status and the body of the response.
    pub(crate) async fn post(&self, path: &str, body: &serde_json::Value) -> (StatusCode, serde_json::Value) {
        let answer = self.client.post(self.url(path)).json(body).send().await.expect("a response");
        let status = answer.status();
        (status, answer.json().await.expect("JSON"))
    }

    /// Returns the status of a path, or `None` if there was no response.
    pub(crate) async fn status(&self, path: &str) -> Option<StatusCode> {
        self.client.get(self.url(path)).send().await.ok().map(|response| response.status())
    }

    /// Returns the body of a path. Fails if the status is not 200.
    pub(crate) async fn get(&self, path: &str) -> String {
        let response = self.client.get(self.url(path)).send().await.expect("a response");
        let status = response.status();
        let body = response.text().await.expect("a body");
        assert_eq!(status, StatusCode::OK, "{path}: {body}");
        body
    }

    /// Returns the body of a path with any status. It is empty if there was no response.
    pub(crate) async fn body(&self, path: &str) -> String {
        match self.client.get(self.url(path)).send().await {
            Ok(response) => response.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    /// Waits until `/ready` returns this status.
    pub(crate) async fn ready(&self, status: StatusCode) {
        until(&format!("/ready {status}"), BOUND, async || (self.status("/ready").await? == status).then_some(()))
            .await;
    }

    /// Reads every event of a stream, page by page: payloads by entry id.
    pub(crate) async fn events(&self, stream: &str) -> BTreeMap<String, String> {
        #[derive(Deserialize)]
        struct Stored {
            id: String,
            data: Box<RawValue>,
        }
        #[derive(Deserialize)]
        struct Page {
            events: Vec<Stored>,
            next: Option<String>,
        }
        let mut events = BTreeMap::new();
        let mut from = "0-0".to_owned();
        loop {
            let page = self.get(&format!("/api/v1/streams/{stream}/events?from={from}&limit=1000")).await;
            let page: Page = serde_json::from_str(&page).expect("a page of events");
            let Some(next) = page.next.filter(|_| !page.events.is_empty()) else { return events };
            from = next;
            events.extend(page.events.into_iter().map(|event| (event.id, event.data.get().to_owned())));
        }
    }

    /// Waits until a group has settled every entry of its stream.
    pub(crate) async fn handled(&self, stream: &str, group: &str) {
        #[derive(Deserialize)]
        struct Group {
            name: String,
            lag: Option<u64>,
            pending: u64,
        }
        #[derive(Deserialize)]
        struct Stream {
            groups: Vec<Group>,
        }
        until(&format!("group {group} with nothing left"), BOUND, async || {
            let stream = self.get(&format!("/api/v1/streams/{stream}")).await;
            let stream: Stream = serde_json::from_str(&stream).expect("the state of a stream");
            // The group of a new stream may not exist yet.
            let group = stream.groups.into_iter().find(|g| g.name == group)?;
            (group.lag == Some(0) && group.pending == 0).then_some(())
        })
        .await;
    }

    /// Opens a WebSocket.
    pub(crate) async fn watch(&self, path: &str) -> Socket {
        let url = self.url(path).replacen("http", "ws", 1);
        let (socket, _) = tokio_tungstenite::connect_async(url).await.expect("a WebSocket");
        socket
    }

    /// Takes the lines that the daemon has logged since the last call.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().lines)
    }

    /// Returns whether the whole output was read, because the daemon has ended.
    pub(crate) fn is_silent(&self) -> bool {
        self.log.lock().open == 0
    }

    /// Returns the process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the sum of a metric over all its labels.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await;
        let is_this = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let values = text.lines().filter(is_this).filter_map(|line| line.rsplit(' ').next());
        values.map(|value| value.parse::<u64>().expect("a count")).sum()
    }

    /// Sends a signal, such as `TERM`.
    pub(crate) fn signal(&self, signal: &str) {
        send_signal(self.child.id(), signal);
    }

    /// Kills the daemon at once, like a crash.
    pub(crate) fn crash(mut self) {
        self.child.kill().expect("the daemon runs");
        self.child.wait().expect("a child");
    }

    /// Waits until the daemon has ended.
    pub(crate) async fn ended(mut self) -> Ended {
        let status = until("end of the daemon", BOUND, async || self.child.try_wait().expect("a child")).await;
        Ended { status, log: self.log.complete().await }
    }

    /// Stops the daemon and waits for its end. Fails if the exit code is not 0.
    pub(crate) async fn stop(self) {
        self.signal("TERM");
        let ended = self.ended().await;
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    }
}

impl Drop for Daemon {
    #[expect(clippy::print_stderr, reason = "a failed test shows the log of the daemon")]
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
        if thread::panicking() {
            eprintln!("--- log of the daemon\n{}\n---", self.log.text());
        }
    }
}

/// Sends a signal to a process.
pub(crate) fn send_signal(pid: u32, signal: &str) {
    let status = Command::new("sh").args(["-c", "kill -s \"$1\" \"$2\"", "sh", signal, &pid.to_string()]).status();
    assert!(status.expect("sh runs").success(), "process {pid} does not accept {signal}");
}

/// Returns the next text message of a socket.
pub(crate) async fn next_text(socket: &mut Socket) -> String {
    let text = async {
        loop {
            match socket.next().await.expect("an open socket").expect("an open socket") {
                Message::Text(text) => return text.to_string(),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("not a text: {other:?}"),
            }
        }
    };
    tokio::time::timeout(BOUND, text).await.expect("a message in time")
}
