//! `aurora-bus check` and `aurora-bus config`.

use anyhow::bail;
use clap::Args;

use super::{ConfigArgs, say};
use crate::app;
use crate::config::Config;

/// What to check.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct CheckArgs {
    /// Also connect to the store and open the sinks, as `serve` would
    #[arg(long)]
    connect: bool,
}

/// Which configuration to print.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct PrintArgs {
    /// The built-in default instead of the effective configuration
    #[arg(long)]
    default: bool,
}

pub(super) async fn check(config: &ConfigArgs, args: CheckArgs) -> anyhow::Result<()> {
    let config = config.load()?;
    let groups: usize = config.streams.iter().map(|stream| stream.groups.len()).sum();
    say(&format!("configuration: {} streams, {groups} groups, {} sinks", config.streams.len(), config.sinks.len()))?;
    if let Some(validity) = app::check_files(&config)? {
        if !validity.is_valid_now() {
            bail!("http.tls.cert_file: {}", validity.warning().unwrap_or_default());
        }
        say(&format!("certificate: fits its key, good for {:.0} days", validity.days_left().floor()))?;
        if let Some(concern) = validity.warning() {
            say(&format!("warning: {concern}"))?;
        }
    }
    if args.connect {
        let status = app::check(&config).await?;
        say(&format!("store: {}", status.description))?;
        for warning in status.warnings {
            say(&format!("warning: {warning}"))?;
        }
        say("sinks: all can take entries")?;
    }
    Ok(())
}

pub(super) fn print(config: &ConfigArgs, args: PrintArgs) -> anyhow::Result<()> {
    let config = if args.default { Config::default() } else { config.load()? };
    say(config.to_toml().trim_end())?;
    Ok(())
}
