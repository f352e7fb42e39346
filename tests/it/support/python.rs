//! External consumers written in Python.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::{install, until};

/// The longest wait for a line of output.
const BOUND: Duration = Duration::from_mins(1);

/// A running Python program with the redis client. It is killed on drop, and a failed test prints its output.
pub(crate) struct Python {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    errors: Option<JoinHandle<String>>,
}

impl Python {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(install::program("python3", "python3"));
        if let Some(folder) = redis_client() {
            command.env("PYTHONPATH", folder);
        }
        command.args(["-c", program]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("python runs");
        let (lines, output) = (Arc::<Mutex<Vec<String>>>::default(), child.stdout.take().expect("piped"));
        let written = lines.clone();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                written.lock().expect("unpoisoned").push(line);
            }
        });
        let mut errors = child.stderr.take().expect("piped");
        let errors = thread::spawn(move || {
            let mut text = Vec::new();
            // The output before a failure helps to find its cause.
            drop(errors.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, lines, errors: Some(errors) }
    }

    /// Returns the lines of output so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("unpoisoned").clone()
    }

    /// Waits until the program has written this line.
    pub(crate) async fn wait_for_line(&self, line: &str) {
        until(line, BOUND, async || self.lines().iter().any(|written| written == line).then_some(())).await;
    }
}

impl Drop for Python {
    #[expect(clippy::print_stderr, reason = "a failed test shows the errors of its programs")]
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
        if thread::panicking()
            && let Some(Ok(errors)) = self.errors.take().map(JoinHandle::join)
        {
            eprintln!("--- a program in Python wrote\n{}\n--- and to stderr\n{errors}\n---", self.lines().join("\n"));
        }
    }
}

/// Returns the folder of Python's redis client, if Python does not find it by itself.
fn redis_client() -> Option<PathBuf> {
    let python = install::program("python3", "python3");
    let imports = |folder: &Path| {
        let mut command = Command::new(&python);
        command.args(["-c", "import redis"]).env("PYTHONPATH", folder).stderr(Stdio::null());
        command.status().expect("python runs").success()
    };
    if imports(Path::new("")) {
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-redis");
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    let lock = std::fs::File::create(folder.join("lock")).expect("the target folder can be written");
    lock.lock().expect("a local file can be locked");
    if !imports(&folder) {
        let mut pip = Command::new(install::program("pip3", "python3-pip"));
        let status = pip.args(["install", "--quiet", "--target"]).arg(&folder).arg("redis").status();
        assert!(status.expect("pip runs").success(), "Python's package `redis` can't be had; install it by hand");
    }
    Some(folder)
}
