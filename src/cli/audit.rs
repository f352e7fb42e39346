//! `aurora-bus audit verify`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;

use super::{ConfigArgs, say};
use crate::sink::{SinkConfig, verify};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Find any changed, missing or reordered record
    ///
    /// Records that were cut off at the very end leave no trace in the files themselves: compare the last hash with
    /// one that was noted elsewhere.
    Verify {
        /// The folder of the audit files [default: the path of the sink `audit`]
        path: Option<PathBuf>,
    },
}

pub(super) fn run(config: &ConfigArgs, command: AuditCommand) -> anyhow::Result<()> {
    let AuditCommand::Verify { path } = command;
    let path = match path {
        Some(path) => path,
        None => match config.load()?.sinks.remove("audit") {
            Some(SinkConfig::Audit(audit)) => audit.path,
            _ => anyhow::bail!("there is no sink `audit` in the configuration: name the folder"),
        },
    };
    let report = verify(&path).with_context(|| format!("cannot read the audit files in {}", path.display()))?;
    for problem in &report.problems {
        say(&problem.to_string())?;
    }
    let time = |time: &Option<String>| time.clone().unwrap_or_else(|| "-".to_owned());
    say(&format!("files    {}\nrecords  {} ({} entries)", report.files, report.records, report.entries))?;
    say(&format!("from     {} (record {})", time(&report.first_recorded_at), report.first_seq))?;
    say(&format!("to       {} (record {})", time(&report.last_recorded_at), report.head_seq))?;
    say(&format!("head     {}", report.head_hash))?;
    if !report.is_intact() {
        let count = report.problem_count;
        anyhow::bail!(
            "{} does not verify: {count} {}",
            path.display(),
            if count == 1 { "problem" } else { "problems" }
        );
    }
    say("intact: every record follows from the one before it")?;
    Ok(())
}
