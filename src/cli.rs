//! The sub-commands. Those that look into a running daemon speak its public HTTP API, as anyone else does.

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
/// Without a sub-command it runs the daemon, as `serve` does.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Where the configuration comes from: built-in defaults, then this file, then `AURORA_BUS__SECTION__KEY`, then flags.
#[derive(Debug, Clone, Default, Args)]
struct ConfigArgs {
    /// The configuration file [default: config/aurora-bus.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Listen here instead of `http.listen`
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Use this store instead of `store.backend`: embedded or redis
    #[arg(long, global = true, value_name = "BACKEND")]
    store: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve,
    /// Check the configuration; with --connect also what it points to
    Check(inspect::CheckArgs),
    /// Print the configuration as TOML: the effective one, or the built-in default
    Config(inspect::PrintArgs),
    /// Publish NDJSON from a file or standard input to a stream
    Publish(publish::PublishArgs),
    /// Print the entries of a stream as they come, one JSON object per line
    Tail(tail::TailArgs),
    /// Dead letters: entries that a group could not handle
    ///
    /// STREAM is a declared stream, for its own dead letters, or a stream of dead letters, for all that are in it.
    ///
    /// Exit codes: 0 all done; 1 something failed, was refused, is gone or needs --yes; 2 the arguments or the
    /// configuration are wrong.
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// Check for every group that each published entry is accounted for; exit code 1 where one is not
    Reconcile(reconcile::ReconcileArgs),
    /// Ask a running daemon whether it is healthy; for container health checks
    Health(client::ClientArgs),
    /// Make API keys and test tokens
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// The tamper-evident audit files
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Measure the daemon beside the raw ceiling of its store
    Bench(crate::bench::BenchArgs),
    /// The load generator that `bench` starts as a process of its own
    #[command(hide = true)]
    BenchLoad(crate::bench::LoadArgs),
}

impl Cli {
    /// Runs the sub-command to its end.
    ///
    /// Not an `async fn`: its caller would compile all that it awaits, after this crate and not with it.
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
            Some(Command::Bench(args)) => crate::bench::run(args).await,
            Some(Command::BenchLoad(args)) => crate::bench::load(args).await,
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

/// Tells an error with its causes, and the exit code: 2 where the configuration is to blame, or where `reconcile` got no answer, else 1.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    let mut text = format!("error: {error}");
    if let Some(invalid) = error.downcast_ref::<InvalidConfig>() {
        tell(&format!("error: {invalid}\n"));
        return ExitCode::from(2);
    }
    let is_unknown = error.downcast_ref::<reconcile::CannotReconcile>().is_some();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}\n  because: {next}");
        cause = next.source();
    }
    tell(&format!("{text}\n"));
    if is_unknown { ExitCode::from(2) } else { ExitCode::FAILURE }
}

/// Writes to standard error, where a closed one is no reason to fail.
fn tell(text: &str) {
    use std::io::Write as _;
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// Writes a line to standard output; a reader that went away is an error, so that the command ends.
fn say(line: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.write_all(b"\n")
}
