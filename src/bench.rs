//! `aurora-bus bench`: what this daemon does on this machine, beside what its store could do at most.
//!
//! Each figure is measured in turn with its ceiling, in the same run, several times: absolutes depend on the machine
//! and on what else it does, ratios less so. The daemon, the store and the load generator are processes of their own;
//! daemon and generator are this program, started again. Everything stays on the loopback address, in a folder that
//! is removed, and within a bounded time.
//!
//! This module speaks to the daemon through its public interface only.

mod frames;
mod http;
mod load;
mod payload;
mod process;
mod relay;
mod report;
mod resp;
mod works;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use url::Url;

pub use self::load::LoadArgs;
use self::payload::MIN_SIZE;
use self::process::{Process, Site};
use self::report::{Figure, Machine, Report};
use self::resp::{Connection, Token};
use crate::event::{NewEntry, NewEvent};

/// The most WebSocket clients: both ends of each need a port of the loopback address.
const MAX_CLIENTS: usize = 20_000;

/// What to measure, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, value_name = "WHAT", default_values_t = [What::All])]
    what: Vec<What>,
    /// The store under the daemon: redis, embedded or both
    // A text, since the whole program has a text option of the same name.
    #[arg(long, value_name = "STORE", value_parser = ["redis", "embedded", "both"], default_value = "both")]
    store: String,
    /// The Redis server to start for the measurement; redis-benchmark is looked for beside it
    #[arg(long, value_name = "PATH", default_value = "redis-server")]
    redis_server: PathBuf,
    /// An empty database of a running Redis to use instead; it is emptied again
    #[arg(long, value_name = "URL", conflicts_with = "redis_server")]
    redis_url: Option<Url>,
    /// The database to write rows to, for `postgres`: in a table of its own that is dropped again
    #[arg(long, value_name = "URL")]
    postgres_url: Option<String>,
    /// Start Redis with its append-only file on, written each second
    #[arg(long, conflicts_with = "redis_url")]
    aof: bool,
    /// How long each single run takes, about
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    seconds: u64,
    /// How many runs each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    rounds: u64,
    /// How many WebSocket clients the fan-out is measured with; if not given 500, for `relay` 200, 500 and 1000
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    clients: Vec<usize>,
    /// How many idle WebSocket clients are watched; if not given 1000 and 5000, for `relay` 10 000
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    idle_clients: Vec<usize>,
    /// How many entries wait in the stream that is consumed
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    backlog: u64,
    /// Bytes per event
    #[arg(long, value_name = "BYTES", default_value_t = 500)]
    size: usize,
    /// The folder to make the embedded store's files in; the system's for temporary files if not given
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Also write everything to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    relay: relay::RelayArgs,
}

impl BenchArgs {
    /// The numbers of clients that a fan-out is measured with.
    fn clients_of(&self, what: What) -> Vec<usize> {
        match (&*self.clients, what) {
            ([], What::Relay) => vec![200, 500, 1000],
            ([], _) => vec![500],
            (given, _) => given.to_vec(),
        }
    }

    /// The numbers of idle clients.
    fn idle_clients_of(&self, what: What) -> Vec<usize> {
        match (&*self.idle_clients, what) {
            ([], What::Relay) => vec![10_000],
            ([], _) => vec![1000, 5000],
            (given, _) => given.to_vec(),
        }
    }
}

/// One measurement, or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Everything below but webhook, relay and postgres
    All,
    /// Events accepted over HTTP, in batches and one by one
    Publish,
    /// A backlog delivered and acknowledged
    Consume,
    /// From publishing to a WebSocket client at 1000 events per second
    Latency,
    /// One stream to many WebSocket clients
    Fanout,
    /// What connected clients cost while nothing happens
    Idle,
    /// Start, memory at rest, size of the program
    Start,
    /// Entries posted by the sink, 32 at a time, beside a bare loop of the same HTTP client
    Webhook,
    /// What dashboards cost, beside a null relay and NATS, and what becomes of them in a storm; see --only
    Relay,
    /// Rows written by the sink, beside COPY by psql; needs --postgres-url
    Postgres,
}

impl What {
    const EACH: [Self; 6] = [Self::Publish, Self::Consume, Self::Latency, Self::Fanout, Self::Idle, Self::Start];

    /// How many runs a round has, for the progress bar.
    fn runs(self, args: &BenchArgs) -> u64 {
        match self {
            Self::All => Self::EACH.into_iter().map(|what| what.runs(args)).sum(),
            Self::Publish => 4,
            Self::Fanout => 4 * args.clients_of(self).len() as u64,
            Self::Relay => args.relay.runs(args.clients_of(self).len()),
            Self::Consume | Self::Latency => 2,
            Self::Idle | Self::Start => 1,
            Self::Webhook | Self::Postgres => 3,
        }
    }
}

/// The store under the daemon in one measurement.
#[derive(Debug, Clone)]
enum Backend {
    Redis(Url),
    Embedded,
}

impl Backend {
    fn name(&self) -> &'static str {
        match self {
            Self::Redis(_) => "redis",
            Self::Embedded => "embedded",
        }
    }
}

/// One call of the command.
#[derive(Debug)]
struct Bench {
    args: BenchArgs,
    site: Site,
    progress: ProgressBar,
    figures: Vec<Figure>,
}

impl Bench {
    /// Shows what runs now; fails when the measurement shall end early.
    fn step(&self, text: impl Into<String>) -> Result<()> {
        self.progress.set_message(text.into());
        self.progress.inc(1);
        self.site.check()
    }

    /// Makes the store empty.
    fn reset(&self, backend: &Backend) -> Result<()> {
        match backend {
            Backend::Redis(url) => Connection::open(url)?.call(&[b"FLUSHDB"]).map(drop),
            Backend::Embedded => self.site.clear(works::EMBEDDED_FOLDER),
        }
    }
}

/// Measures what was asked for, prints a table and writes the JSON file. Takes minutes; ends early on SIGINT and
/// SIGTERM, with nothing left behind. Fails if a measurement could not be brought to its end, after the others are
/// done and reported.
pub async fn run(args: BenchArgs) -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let mut measuring = tokio::task::spawn_blocking({
        let stop = stop.clone();
        move || measure(args, stop)
    });
    tokio::select! {
        done = &mut measuring => return done?,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    stop.cancel();
    measuring.await?
}

/// Does one job of the load generator and writes its report as a line of JSON to the standard output.
pub async fn load(args: LoadArgs) -> Result<()> {
    tokio::task::spawn_blocking(move || load::run(&args)).await?
}

fn measure(args: BenchArgs, stop: CancellationToken) -> Result<()> {
    ensure!(args.size >= MIN_SIZE, "--size is at least {MIN_SIZE}: an event is an alert of several fields");
    ensure!(args.size <= 1 << 20, "--size is at most 1 MiB, the most that one event may have");
    ensure!(args.idle_clients.is_sorted(), "--idle-clients takes rising numbers");
    let numbers = || args.clients.iter().chain(&args.idle_clients).copied().chain([args.relay.crowd()]);
    ensure!(numbers().all(|number| (1..=MAX_CLIENTS).contains(&number)), "clients are between 1 and {MAX_CLIENTS}");
    let (at, machine) = (Timestamp::now().to_string(), Machine::this());
    let site = Site::new(args.dir.as_deref(), stop)?;
    let mut versions = BTreeMap::from([("aurora-bus".to_owned(), env!("CARGO_PKG_VERSION").to_owned())]);

    let mut redis_process: Option<Process> = None;
    let mut backends = Vec::new();
    let with_stores = args.what.iter().any(|what| *what != What::Postgres);
    if with_stores && args.store != "embedded" {
        let url = if let Some(url) = &args.redis_url {
            url.clone()
        } else {
            let (process, url) = site.start_redis(&args.redis_server, args.aof)?;
            redis_process = Some(process);
            url
        };
        let (name, version) = check_redis(&url)?;
        versions.insert(name, version);
        backends.push(Backend::Redis(url));
    }
    if with_stores && args.store != "redis" {
        backends.push(Backend::Embedded);
    }

    let mut whats: Vec<_> =
        What::EACH.into_iter().filter(|what| args.what.contains(what) || args.what.contains(&What::All)).collect();
    whats.extend(args.what.contains(&What::Webhook).then_some(What::Webhook));
    whats.extend(args.what.contains(&What::Relay).then_some(What::Relay));
    let settings = settings(&args);
    let with_postgres = args.what.contains(&What::Postgres);
    let runs = whats.iter().map(|what| what.runs(&args)).sum::<u64>() * args.rounds * backends.len() as u64;
    let runs = runs + if with_postgres { What::Postgres.runs(&args) * args.rounds } else { 0 };
    let style = ProgressStyle::with_template("{elapsed_precise} {bar:24} {pos}/{len} {wide_msg}")?;
    let mut bench = Bench { args, site, progress: ProgressBar::new(runs).with_style(style), figures: Vec::new() };
    let mut failures = Vec::new();
    for what in whats {
        for backend in &backends {
            if let Err(error) = works::measure(&mut bench, what, backend) {
                bench.site.check()?;
                let what = format!("{what:?}").to_lowercase();
                failures.push(format!("{what} with {}: {error:#}", backend.name()));
            }
            bench.reset(backend)?;
        }
    }
    if with_postgres && let Err(error) = works::measure(&mut bench, What::Postgres, &Backend::Embedded) {
        bench.site.check()?;
        failures.push(format!("postgres: {error:#}"));
    }
    bench.progress.finish_and_clear();
    drop(redis_process);

    let report = Report { at, machine, versions, settings, figures: bench.figures, failures };
    write!(std::io::stdout().lock(), "{report}").context("cannot write the table")?;
    if let Some(file) = &bench.args.json {
        let json = serde_json::to_vec_pretty(&report)?;
        fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(report.failures.is_empty(), "{} measurements failed", report.failures.len());
    Ok(())
}

fn settings(args: &BenchArgs) -> BTreeMap<String, String> {
    let list = |numbers: &[usize]| match numbers {
        [] => "as by default".to_owned(),
        numbers => numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("/"),
    };
    let persistence = if args.redis_url.is_some() {
        "as found"
    } else if args.aof {
        "append-only file each second"
    } else {
        "off"
    };
    [
        ("seconds", args.seconds.to_string()),
        ("rounds", args.rounds.to_string()),
        ("clients", list(&args.clients)),
        ("idle clients", list(&args.idle_clients)),
        ("backlog", args.backlog.to_string()),
        ("size", args.size.to_string()),
        ("redis persistence", persistence.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// Name and version of the server; fails where its database holds anything, since it will be emptied.
fn check_redis(url: &Url) -> Result<(String, String)> {
    let mut connection = Connection::open(url)?;
    let keys = connection.call(&[b"DBSIZE"])?.integer().context("DBSIZE was not answered with a number")?;
    ensure!(
        keys == 0,
        "the Redis database holds {keys} keys: a measurement needs an empty one, which it empties again"
    );
    let Some(Token::Text(info)) = connection.call(&[b"INFO", b"server"])?.tokens().next() else {
        bail!("INFO was not answered with a text")
    };
    let info = String::from_utf8_lossy(info).into_owned();
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
    Ok(match field("valkey_version:") {
        Some(version) => ("valkey".to_owned(), version),
        None => ("redis".to_owned(), field("redis_version:").unwrap_or_default()),
    })
}

/// XADD of the entry that the daemon makes of an event, by `redis-benchmark` with 50 connections of 128 commands each,
/// in events per second; nothing where the program is not beside the server's.
fn redis_benchmark(bench: &Bench, url: &Url, stream: &str, events: u64) -> Result<Option<f64>> {
    let program = bench.args.redis_server.with_file_name("redis-benchmark");
    if bench.args.redis_url.is_some() || Command::new(&program).arg("--version").output().is_err() {
        return Ok(None);
    }
    let payload = payload::Template::new(bench.args.size).bytes(0, 0);
    let entry = NewEvent::parse(payload.into())?.into_entry(&NewEntry::timestamp_now(), None);
    let mut command = Command::new(&program);
    command.args(["-h", url.host_str().unwrap_or_default(), "-p", &url.port().unwrap_or(6379).to_string()]);
    command.args(["-q", "-P", "128", "-c", "50", "-n", &events.to_string(), "XADD", stream, "*"]);
    for (name, value) in entry.fields.iter() {
        command.args([std::str::from_utf8(name)?, std::str::from_utf8(value)?]);
    }
    let output = bench.site.run(&mut command, Duration::from_mins(2))?;
    let (before, _) = output.rsplit_once(" requests per second").context("redis-benchmark gave no result")?;
    let rate = before.rsplit([' ', ':']).next().unwrap_or_default();
    Ok(Some(rate.parse().with_context(|| format!("redis-benchmark gave {rate:?} as its result"))?))
}
