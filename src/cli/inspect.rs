//! `aurora-bus check` and `aurora-bus config`.

use anyhow::bail;
use clap::Args;

use super::{ConfigArgs, print_line};
use crate::app;
use crate::config::Config;

/// The scope of the check.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct CheckArgs {
    /// Also connect to the store and open the sinks, as `serve` does
    #[arg(long)]
    connect: bool,
}

/// The configuration to print.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct PrintArgs {
    /// Print the built-in default instead of the effective configuration
    #[arg(long)]
    default: bool,
}

pub(super) async fn check(config: &ConfigArgs, args: CheckArgs) -> anyhow::Result<()> {
    let config = config.load()?;
    let groups: usize = config.streams.iter().map(|stream| stream.groups.len()).sum();
    print_line(&format!(
        "configuration: {} streams, {groups} groups, {} sinks",
        config.streams.len(),
        config.sinks.len()
    ))?;
    if let Some(validity) = app::check_files(&config)? {
        if !validity.is_valid_now() {
            bail!("http.tls.cert_file: {}", validity.warning().unwrap_or_default());
        }
        print_line(&format!("certificate: fits its key, good for {:.0} days", validity.days_left().floor()))?;
        if let Some(warning) = validity.warning() {
            print_line(&format!("warning: {warning}"))?;
        }
    }
    if args.connect {
        let status = app::check(&config).await?;
        print_line(&format!("store: {}", status.description))?;
        for warning in status.warnings {
            print_line(&format!("warning: {warning}"))?;
        }
        print_line("sinks: all ready")?;
    }
    Ok(())
}

pub(super) fn print(config: &ConfigArgs, args: PrintArgs) -> anyhow::Result<()> {
    let config = if args.default { Config::default() } else { config.load()? };
    print_line(config.to_toml().trim_end())?;
    Ok(())
}
