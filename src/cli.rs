//! The subcommands. Commands that query a running daemon use its public HTTP API.

mod audit;
mod client;
mod dead;
mod inspect;
mod publish;
mod reconcile;
mod serve;
mod tail;
mod token;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, InvalidConfig, Layers, load};

/// An event bus for security operations centres.
///
/// Without a subcommand it runs the daemon, like `serve`.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// The layers of the configuration: built-in default, then this file, then `AURORA_BUS__SECTION__KEY`, then flags.
#[derive(Debug, Clone, Default, Args)]
struct ConfigArgs {
    /// Configuration file [default: config/aurora-bus.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address and port to listen on, overrides `http.listen`
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Store to use, overrides `store.backend`: embedded or redis
    #[arg(long, global = true, value_name = "BACKEND")]
    store: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve,
    /// Check the configuration; with --connect also the store, the sinks and the token issuers
    Check(inspect::CheckArgs),
    /// Print the configuration as TOML: the effective one, or the built-in default
    Config(inspect::PrintArgs),
    /// Publish NDJSON from a file or standard input to a stream
    Publish(publish::PublishArgs),
    /// Print the entries of a stream as they arrive, one JSON object per line
    Tail(tail::TailArgs),
    /// List, show, replay and discard dead letters, the entries that a group gave up
    ///
    /// STREAM is a declared stream, or a stream of dead letters. A declared stream stands for its own dead letters, a
    /// stream of dead letters for all that it holds.
    ///
    /// Exit codes: 0 success; 1 a request failed, a dead letter was refused or is gone, or --yes is missing; 2 invalid
    /// arguments or configuration.
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// Check that every published entry is accounted for, per group
    ///
    /// Exit codes: 0 all accounts add up; 1 an account does not add up or is unknown; 2 no response, or invalid
    /// arguments or configuration.
    Reconcile(reconcile::ReconcileArgs),
    /// Check the health of a running daemon, for container health checks
    Health(client::ClientArgs),
    /// Create API keys and test tokens
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Verify the tamper-evident audit files
    #[command(subcommand)]
    Audit(audit::AuditCommand),
}

impl Cli {
    /// Runs the subcommand to its end.
    ///
    /// Not an `async fn`: the binary crate would then compile all commands after this crate, not together with it.
    pub fn run_on(self, runtime: &tokio::runtime::Runtime) -> anyhow::Result<()> {
        runtime.block_on(self.run())
    }

    async fn run(self) -> anyhow::Result<()> {
        match self.command {
            None | Some(Command::Serve) => serve::run(self.config.load()?).await,
            Some(Command::Check(args)) => inspect::check(&self.config, args).await,
            Some(Command::Config(args)) => inspect::print(&self.config, args),
            Some(Command::Publish(args)) => publish::run(&self.config, args).await,
            Some(Command::Tail(args)) => tail::run(&self.config, args).await,
            Some(Command::Dead(command)) => dead::run(&self.config, command).await,
            Some(Command::Reconcile(args)) => reconcile::run(&self.config, args).await,
            Some(Command::Health(args)) => client::health(&self.config, &args).await,
            Some(Command::Token(command)) => token::run(&self.config, command),
            Some(Command::Audit(command)) => audit::run(&self.config, command),
        }
    }
}

impl ConfigArgs {
    fn load(&self) -> Result<Config, InvalidConfig> {
        let mut overrides = Vec::new();
        overrides.extend(self.listen.clone().map(|listen| ("http.listen", listen)));
        overrides.extend(self.store.clone().map(|store| ("store.backend", store)));
        load(&Layers { file: self.config.clone(), environment: true, overrides })
    }
}

/// Prints an error with its causes and returns the exit code.
///
/// The code is 2 if the configuration is invalid or if `reconcile` got no response, else 1.
pub fn report_error(error: &anyhow::Error) -> ExitCode {
    let mut text = format!("error: {error}");
    if let Some(invalid) = error.downcast_ref::<InvalidConfig>() {
        eprint_text(&format!("error: {invalid}\n"));
        return ExitCode::from(2);
    }
    let is_unknown = error.downcast_ref::<reconcile::CannotReconcile>().is_some();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}\n  because: {next}");
        cause = next.source();
    }
    eprint_text(&format!("{text}\n"));
    if is_unknown { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// Writes to standard error and ignores failures: it may be closed.
fn eprint_text(text: &str) {
    use std::io::Write as _;
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// Writes a line to standard output. Fails if the reader is gone, so that the command ends.
fn print_line(line: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")
}
