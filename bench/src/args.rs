//! The command line: scenarios, options, and the number of runs that follow from them.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use url::Url;

use crate::generator::GenerateArgs;

/// Measures aurora-bus beside the raw ceiling of its store, a baseline relay, NATS and Centrifugo.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) args: BenchArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Do one job of the load generator; started by this program itself
    #[command(hide = true)]
    Generate(GenerateArgs),
}

/// The scenarios and their options.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct BenchArgs {
    /// Scenarios to measure
    #[arg(value_enum, value_name = "SCENARIO", default_values_t = [Scenario::All])]
    pub(crate) scenarios: Vec<Scenario>,
    /// The daemon to measure [default: aurora-bus beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) daemon: Option<PathBuf>,
    /// The store of the daemon
    #[arg(long, value_enum, value_name = "STORE", default_value_t = StoreChoice::Both)]
    pub(crate) store: StoreChoice,
    /// The Redis server to start; redis-benchmark is expected beside it
    #[arg(long, value_name = "PATH", default_value = "redis-server")]
    pub(crate) redis_server: PathBuf,
    /// An empty database of a running Redis server to use instead; it is emptied at the end
    #[arg(long, value_name = "URL", conflicts_with = "redis_server")]
    pub(crate) redis_url: Option<Url>,
    /// The database of the scenario `postgres`, which creates and drops a table of its own
    #[arg(long, value_name = "URL")]
    pub(crate) postgres_url: Option<String>,
    /// Start Redis with its append-only file, synced every second
    #[arg(long, conflicts_with = "redis_url")]
    pub(crate) aof: bool,
    /// Approximate seconds per run
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub(crate) seconds: u64,
    /// Runs per figure, of which the median is reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    pub(crate) rounds: u64,
    /// Numbers of WebSocket clients of a fan-out [default: 500; for `relay` 200,500,1000]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) clients: Vec<usize>,
    /// Numbers of idle WebSocket clients, ascending [default: 1000,5000; for `relay` 10000]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) idle_clients: Vec<usize>,
    /// Entries in the stream to consume
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    pub(crate) backlog: u64,
    /// Bytes per event
    #[arg(long, value_name = "BYTES", default_value_t = 500)]
    pub(crate) size: usize,
    /// The folder for files of the embedded store [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Also write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) relay: RelayArgs,
}

/// Options of the scenario `relay`.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Options of the scenario relay")]
pub(crate) struct RelayArgs {
    /// Parts to measure [default: all]
    #[arg(long, value_enum, value_name = "PART,…", value_delimiter = ',')]
    pub(crate) only: Vec<RelayPart>,
    /// The NATS server to measure beside the relay
    #[arg(long, value_name = "PATH")]
    pub(crate) nats_server: Option<PathBuf>,
    /// The Centrifugo server (version 6) to measure beside the relay
    #[arg(long, value_name = "PATH")]
    pub(crate) centrifugo: Option<PathBuf>,
    /// Clients of the parts `storm` and `filters`
    #[arg(long, value_name = "N", default_value_t = 5000)]
    pub(crate) crowd: usize,
    /// Seconds to watch idle clients, which are pinged every 25 s
    #[arg(long, value_name = "N", default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) idle_seconds: u64,
}

/// The stores to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StoreChoice {
    Redis,
    Embedded,
    Both,
}

/// One scenario, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// All scenarios except webhook, relay and postgres
    All,
    /// Events accepted over HTTP, in batches and one by one
    Publish,
    /// A backlog delivered and acknowledged
    Consume,
    /// Latency from publishing to a WebSocket client, at 1000 events per second
    Latency,
    /// One stream to many WebSocket clients
    Fanout,
    /// The cost of idle clients
    Idle,
    /// Start time, memory at rest, size of the program
    Start,
    /// Entries posted by the webhook sink, 32 in flight, beside a bare loop of the same HTTP client
    Webhook,
    /// The cost of dashboards beside other relays, and their recovery from faults; see --only
    Relay,
    /// Rows written by the sink, beside COPY by psql; requires --postgres-url
    Postgres,
}

/// One part of the scenario `relay`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RelayPart {
    /// The cost of idle connections
    Idle,
    /// One stream to many clients, at full speed
    Fanout,
    /// 100 events per second to many clients
    Latency,
    /// The cost of filters
    Filters,
    /// The daemon is killed, and all clients reconnect at once
    Storm,
    /// Some clients do not read for a while
    Slow,
    /// The daemon is stopped
    Drain,
}

impl BenchArgs {
    /// Returns the numbers of clients of a fan-out.
    pub(crate) fn clients_of(&self, scenario: Scenario) -> Vec<usize> {
        match (&*self.clients, scenario) {
            ([], Scenario::Relay) => vec![200, 500, 1000],
            ([], _) => vec![500],
            (given, _) => given.to_vec(),
        }
    }

    /// Returns the numbers of idle clients.
    pub(crate) fn idle_clients_of(&self, scenario: Scenario) -> Vec<usize> {
        match (&*self.idle_clients, scenario) {
            ([], Scenario::Relay) => vec![10_000],
            ([], _) => vec![1000, 5000],
            (given, _) => given.to_vec(),
        }
    }
}

impl Scenario {
    /// The scenarios of [`Self::All`].
    pub(crate) const BASIC: [Self; 6] =
        [Self::Publish, Self::Consume, Self::Latency, Self::Fanout, Self::Idle, Self::Start];

    /// Returns the number of runs per round, for the progress bar.
    pub(crate) fn runs(self, args: &BenchArgs) -> u64 {
        match self {
            Self::All => Self::BASIC.into_iter().map(|scenario| scenario.runs(args)).sum(),
            Self::Publish => 4,
            Self::Fanout => 4 * args.clients_of(self).len() as u64,
            Self::Relay => args.relay.runs(args.clients_of(self).len() as u64),
            Self::Consume | Self::Latency => 2,
            Self::Idle | Self::Start => 1,
            Self::Webhook | Self::Postgres => 3,
        }
    }
}

impl RelayArgs {
    /// Returns the parts to measure.
    pub(crate) fn parts(&self) -> impl Iterator<Item = RelayPart> + use<> {
        let only = self.only.clone();
        RelayPart::value_variants().iter().copied().filter(move |part| only.is_empty() || only.contains(part))
    }

    /// Returns the number of runs per round with this many fan-outs, for the progress bar.
    fn runs(&self, fanouts: u64) -> u64 {
        let competitors = u64::from(self.nats_server.is_some()) + u64::from(self.centrifugo.is_some());
        let runs = |part| match part {
            RelayPart::Fanout => (2 + competitors) * fanouts,
            RelayPart::Latency => 2 + competitors,
            RelayPart::Filters => 3,
            RelayPart::Storm => 1 + u64::from(self.centrifugo.is_some()),
            RelayPart::Idle | RelayPart::Slow | RelayPart::Drain => 1,
        };
        self.parts().map(runs).sum()
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn scenarios_and_generator_are_distinguished() {
        let cli = Cli::try_parse_from(["bench", "publish", "relay", "--only", "storm,slow"]).unwrap();
        assert_eq!(cli.args.scenarios, [Scenario::Publish, Scenario::Relay]);
        assert_eq!(cli.args.relay.parts().collect::<Vec<_>>(), [RelayPart::Storm, RelayPart::Slow]);
        let cli = Cli::try_parse_from(["bench"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.args.scenarios, [Scenario::All]);
        let cli = Cli::try_parse_from(["bench", "generate", "{}"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Generate(_))));
    }
}
