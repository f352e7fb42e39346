//! A headless Chromium, controlled by the protocol of its developer tools.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use crate::support::app::{BOUND, Socket, client};
use crate::support::{install, until};

/// A browser. It and its helper processes are killed on drop.
pub(super) struct Chromium {
    child: Child,
    port: String,
    /// Removed on drop.
    profile: TempDir,
}

impl Chromium {
    pub(super) async fn start() -> Self {
        let profile = TempDir::new().expect("a temporary folder");
        let child = Command::new(install::program("chromium", "chromium"))
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--disable-component-update", "--disable-sync"])
            .args(["--disable-extensions", "--disable-default-apps", "--no-proxy-server", "--remote-debugging-port=0"])
            .args(["--disable-background-timer-throttling", "--disable-renderer-backgrounding"])
            .arg("--disable-backgrounding-occluded-windows")
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .env("HOME", profile.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("chromium runs");
        let mut browser = Self { child, port: String::new(), profile };
        let port_file = browser.profile.path().join("DevToolsActivePort");
        browser.port = until("port of the DevTools", BOUND, async || {
            let text = fs::read_to_string(&port_file).ok()?;
            text.lines().next().map(str::to_owned).filter(|_| text.contains('\n'))
        })
        .await;
        browser
    }

    /// Opens a new tab with this page.
    pub(super) async fn open(&self, url: &str) -> Tab {
        let target = format!("http://127.0.0.1:{}/json/new", self.port);
        let mut target = reqwest::Url::parse(&target).expect("a URL");
        target.set_query(Some("about:blank"));
        let answer = client().put(target).send().await.expect("an answer").json::<Value>().await.expect("JSON");
        let socket = answer["webSocketDebuggerUrl"].as_str().expect("a URL of the tab");
        let (socket, _) = tokio_tungstenite::connect_async(socket).await.expect("a tab that listens");
        let mut tab = Tab { socket, last: 0, events: Vec::new() };
        for domain in ["Runtime", "Log", "Page", "Network"] {
            tab.call(&format!("{domain}.enable"), json!({})).await;
        }
        tab.call("Page.navigate", json!({"url": url})).await;
        tab
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        let group = format!("kill -s KILL -- -{}", self.child.id());
        drop(Command::new("sh").args(["-c", &group]).status());
        drop(self.child.wait());
    }
}

/// One tab of a browser.
pub(super) struct Tab {
    socket: Socket,
    last: u64,
    /// The events of the tab so far: exceptions and log entries.
    events: Vec<Value>,
}

impl Tab {
    /// Calls a method of the protocol, and returns its result.
    pub(super) async fn call(&mut self, method: &str, params: Value) -> Value {
        self.last += 1;
        let request = json!({"id": self.last, "method": method, "params": params}).to_string();
        self.socket.send(Message::text(request)).await.expect("sent");
        let answer = async {
            loop {
                let Message::Text(text) = self.socket.next().await.expect("an open tab").expect("an open tab") else {
                    continue;
                };
                let message: Value = serde_json::from_str(&text).expect("JSON");
                if message["id"] == self.last {
                    return message;
                }
                self.events.push(message);
            }
        };
        let mut answer = timeout(BOUND, answer).await.unwrap_or_else(|_| panic!("no answer to {method}"));
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].take()
    }

    /// Evaluates an expression, and awaits its promise.
    pub(super) async fn get(&mut self, expression: &str) -> Value {
        let params = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", params).await;
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true. One that throws is not true yet.
    pub(super) async fn until(&mut self, condition: &str) {
        let expression = format!("(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()");
        let begun = std::time::Instant::now();
        while self.get(&expression).await != true {
            if begun.elapsed() >= BOUND {
                let seen = self.get("JSON.stringify(window.seen?.states ?? document.body?.innerText)").await;
                panic!("never: {condition}; the tab has {seen}");
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    /// Returns uncaught exceptions, and the browser's reports of forbidden actions.
    pub(super) async fn complaints(&mut self) -> Vec<String> {
        self.get("1").await;
        let is_complaint = |message: &&Value| match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Log.entryAdded") => message["params"]["entry"]["source"] == "security",
            _ => false,
        };
        self.events.iter().filter(is_complaint).map(ToString::to_string).collect()
    }
}
