//! The workspace of a run: a folder for files, the load generator, and interruption.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::clock::sleep_until;
use crate::generator::Job;
use crate::process::{Process, unlimited_command};

/// The time limit of a process to start.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(20);
/// The time that a generator may take beyond its job.
const JOB_GRACE: Duration = Duration::from_mins(2);
/// The interval of checks while waiting for a state.
const POLL: Duration = Duration::from_millis(5);

/// Files and processes of one run. Dropping it removes the files.
#[derive(Debug)]
pub(crate) struct Workspace {
    program: PathBuf,
    folder: TempDir,
    stop: CancellationToken,
}

impl Workspace {
    /// Makes a folder within `parent`, or within the temporary folder of the system.
    pub(crate) fn new(parent: Option<&Path>, stop: CancellationToken) -> Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("aurora-bus-bench-");
        let folder = match parent {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        };
        Ok(Self {
            program: std::env::current_exe().context("cannot find the file of this program")?,
            folder: folder.context("cannot make a folder for the measurement")?,
            stop,
        })
    }

    /// Returns the path of a file or folder in the workspace, which need not exist.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Removes a folder of the workspace, if it exists.
    pub(crate) fn remove_folder(&self, name: &str) -> Result<()> {
        match fs::remove_dir_all(self.path(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.path(name).display()))
            }
            _ => Ok(()),
        }
    }

    /// Fails if the run was interrupted.
    pub(crate) fn check_interrupt(&self) -> Result<()> {
        ensure!(!self.stop.is_cancelled(), "interrupted");
        Ok(())
    }

    /// Calls `poll` every few milliseconds until it returns a value; fails after `limit`.
    pub(crate) fn wait_for<T>(
        &self,
        state: &str,
        limit: Duration,
        mut poll: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(value) = poll()? {
                return Ok(value);
            }
            self.check_interrupt()?;
            ensure!(Instant::now() < end, "{state}: not reached within {} s", limit.as_secs());
            sleep_until(Instant::now() + POLL);
        }
    }

    /// Runs a program to its end, at most for `limit`; returns its standard output.
    pub(crate) fn run(&self, command: &mut Command, limit: Duration) -> Result<String> {
        self.output_at_end(Process::spawn(command, &self.path("run"))?, limit)
    }

    fn output_at_end(&self, mut process: Process, limit: Duration) -> Result<String> {
        let status = self.wait_for("end of a process", limit, || process.exit_status())?;
        ensure!(status.success(), "{} ended with {status}: {}", process.name(), process.last_lines());
        process.output()
    }

    /// Runs a job of about `seconds` in a generator; returns its report.
    pub(crate) fn generate<T: DeserializeOwned>(&self, job: &Job, seconds: f64) -> Result<T> {
        self.finish(self.start_generator(job)?, Duration::from_secs_f64(seconds) + JOB_GRACE)
    }

    /// Starts a job in a generator, which runs concurrently.
    pub(crate) fn start_generator(&self, job: &Job) -> Result<Process> {
        Process::spawn(&mut self.generator_command(job)?, &self.path("generator"))
    }

    /// Waits for the end of a generator, at most for `limit`; returns its report.
    pub(crate) fn finish<T: DeserializeOwned>(&self, generator: Process, limit: Duration) -> Result<T> {
        serde_json::from_str(&self.output_at_end(generator, limit)?)
            .context("the report of the load generator is not valid")
    }

    /// Starts a generator that serves until it is dropped; returns it with its address.
    pub(crate) fn start_service(&self, job: &Job) -> Result<(Process, SocketAddr)> {
        let mut process = Process::spawn(&mut self.generator_command(job)?, &self.path("service"))?;
        let address = self.wait_for("address of a service", START_LIMIT, || {
            process.ensure_running()?;
            let line = process.output()?;
            line.ends_with('\n').then(|| serde_json::from_str(&line).context("not an address")).transpose()
        })?;
        Ok((process, address))
    }

    fn generator_command(&self, job: &Job) -> Result<Command> {
        let mut command = unlimited_command(&self.program);
        command.arg("generate").arg(serde_json::to_string(job)?);
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_process_is_reported_with_its_last_lines() {
        let workspace = Workspace::new(None, CancellationToken::new()).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo first >&2; echo no such thing >&2; exit 3"]);
        let error = workspace.run(&mut command, Duration::from_secs(10)).unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains('3'), "{error}");
        let folder = workspace.path("");
        drop(workspace);
        assert!(!folder.exists());
    }
}
