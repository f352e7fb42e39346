//! `aurora-bus audit verify`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;

use super::{ConfigArgs, print_line};
use crate::sink::{SinkConfig, verify};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// Find changed, missing and reordered records
    ///
    /// Records that were cut off at the end leave no trace in the files. Compare the printed head hash with a copy that
    /// is kept elsewhere.
    Verify {
        /// Folder of the audit files [default: path of the sink `audit`]
        path: Option<PathBuf>,
    },
}

pub(super) fn run(config: &ConfigArgs, command: AuditCommand) -> anyhow::Result<()> {
    let AuditCommand::Verify { path } = command;
    let path = match path {
        Some(path) => path,
        None => match config.load()?.sinks.remove("audit") {
            Some(SinkConfig::Audit(audit)) => audit.path,
            _ => anyhow::bail!("the configuration has no audit sink named `audit`: give the folder as an argument"),
        },
    };
    let report = verify(&path).with_context(|| format!("cannot read the audit files in {}", path.display()))?;
    for problem in &report.problems {
        print_line(&problem.to_string())?;
    }
    let time = |time: &Option<String>| time.clone().unwrap_or_else(|| "-".to_owned());
    print_line(&format!("files    {}\nrecords  {} ({} entries)", report.files, report.records, report.entries))?;
    print_line(&format!("from     {} (record {})", time(&report.first_recorded_at), report.first_seq))?;
    print_line(&format!("to       {} (record {})", time(&report.last_recorded_at), report.head_seq))?;
    print_line(&format!("head     {}", report.head_hash))?;
    if !report.is_intact() {
        let count = report.problem_count;
        anyhow::bail!(
            "verification of {} failed: {count} {}",
            path.display(),
            if count == 1 { "problem" } else { "problems" }
        );
    }
    print_line("intact: the hash chain has no breaks")?;
    Ok(())
}
