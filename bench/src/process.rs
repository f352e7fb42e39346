//! Child processes of a measurement, each ended when its value is dropped.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};

const SHELL: &str = "/bin/sh";
/// The number of last lines that an error shows of a process.
const SHOWN_LINES: usize = 12;

/// A child process with its output in files; killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts a command, with its output in files next to `files` that end in `.out` and `.err`.
    pub(crate) fn spawn(command: &mut Command, files: &Path) -> Result<Self> {
        let program = match command.get_program() {
            program if program == SHELL => command.get_args().nth(2).unwrap_or(program),
            program => program,
        };
        let name = program.to_string_lossy().into_owned();
        let (stdout, stderr) = (files.with_extension("out"), files.with_extension("err"));
        let create = |path: &Path| File::create(path).with_context(|| format!("cannot create {}", path.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, stdout, stderr })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the exit status, or `None` if the process still runs.
    pub(crate) fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Fails, with the last lines of output, if the process has ended.
    pub(crate) fn ensure_running(&mut self) -> Result<()> {
        if let Some(status) = self.exit_status()? {
            bail!("{} ended early with {status}: {}", self.name, self.last_lines());
        }
        Ok(())
    }

    /// Fails, with the last lines of output, if the process has ended with an error.
    pub(crate) fn ensure_not_failed(&mut self) -> Result<()> {
        match self.exit_status()? {
            Some(status) if !status.success() => bail!("{} ended with {status}: {}", self.name, self.last_lines()),
            _ => Ok(()),
        }
    }

    /// Returns everything that the process wrote to its standard output.
    pub(crate) fn output(&self) -> Result<String> {
        fs::read_to_string(&self.stdout).context("cannot read the output of a process")
    }

    /// Returns the last lines of output, standard error first.
    pub(crate) fn last_lines(&self) -> String {
        let text = [&self.stderr, &self.stdout].map(|path| fs::read(path).unwrap_or_default()).concat();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().rev().take(SHOWN_LINES).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if the process has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Returns a command that runs `program` with the highest limit of open files and an empty environment.
pub(crate) fn unlimited_command(program: &Path) -> Command {
    let mut command = Command::new(SHELL);
    command.env_clear().args(["-c", r#"ulimit -n "$(ulimit -Hn)"; exec "$0" "$@""#]).arg(program);
    command
}

/// Sends a signal to a process that this measurement has started.
pub(crate) fn send_signal(pid: u32, signal: &str) -> Result<()> {
    let status = Command::new(SHELL).args(["-c", r#"kill -s "$0" "$1""#, signal, &pid.to_string()]).status();
    ensure!(status.context("cannot start a shell")?.success(), "cannot send {signal} to process {pid}");
    Ok(())
}

/// Returns a loopback address with a free port.
pub(crate) fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot find a free port")?;
    Ok(listener.local_addr()?)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::procfs::cpu_seconds;

    #[test]
    fn process_dropped_is_ended() {
        let folder = TempDir::new().unwrap();
        let process = Process::spawn(Command::new("sleep").arg("60"), &folder.path().join("sleep")).unwrap();
        let pid = process.pid();
        cpu_seconds(pid).unwrap();
        drop(process);
        cpu_seconds(pid).unwrap_err();
    }

    #[test]
    fn process_started_by_the_shell_has_its_own_name() {
        let folder = TempDir::new().unwrap();
        let mut command = unlimited_command(Path::new("/bin/true"));
        assert_eq!(Process::spawn(&mut command, &folder.path().join("true")).unwrap().name(), "/bin/true");
    }
}
