//! `aurora-bus-bench`: measures the daemon beside the raw ceiling of its store and beside other relays.
//!
//! Each figure is measured in turn with its ceiling, several times in the same run: absolute values depend on the
//! machine and its other load, ratios less so. The daemon, the store and the load generator are processes of their
//! own. The generator is this program, started again. Everything stays on the loopback address, in a folder that is
//! removed at the end, and within a bounded time.
//!
//! Modules from the bottom to the top: `stats`, `clock`, `procfs`, `http`, `websocket`, `resp`, `payload`, `process`
//! and `report` know only each other; `generator` does one job; `workspace` and `servers` start processes; `bench`
//! holds one run; `scenarios` measure; `run` calls them.

mod args;
mod bench;
mod clock;
mod generator;
mod http;
mod payload;
mod process;
mod procfs;
mod report;
mod resp;
mod run;
mod scenarios;
mod servers;
mod stats;
mod websocket;
mod workspace;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};

/// The allocator of the daemon too, so that ceilings within this process are comparable.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            use std::io::Write as _;
            drop(writeln!(std::io::stderr(), "error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    // Sinks measured within this process use it. It fails only if a provider is installed already.
    drop(rustls::crypto::aws_lc_rs::default_provider().install_default());
    if let Some(Command::Generate(args)) = cli.command {
        return generator::run(&args);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(run::run(cli.args));
    runtime.shutdown_background();
    outcome
}
