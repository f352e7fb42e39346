//! One run: checks the options, starts Redis, measures the scenarios and writes the report.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::args::{BenchArgs, Scenario, StoreChoice};
use crate::bench::{Backend, Bench};
use crate::payload::MIN_SIZE;
use crate::process::Process;
use crate::report::{Machine, Report};
use crate::resp::{RespConnection, RespToken};
use crate::scenarios;
use crate::servers::{DaemonProgram, version_of};
use crate::workspace::Workspace;

/// The highest number of WebSocket clients: both ends of each need a port of the loopback address.
const MAX_CLIENTS: usize = 20_000;
/// The largest event that the daemon accepts, in bytes.
const MAX_SIZE: usize = 1 << 20;

/// Measures the scenarios, prints a table and writes the JSON file.
///
/// Takes minutes. Ends early on SIGINT and SIGTERM, and removes all files and processes. If a scenario fails, the
/// others are still measured and reported before this fails.
pub(crate) async fn run(args: BenchArgs) -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let mut measuring = tokio::task::spawn_blocking({
        let stop = stop.clone();
        move || measure(args, stop)
    });
    tokio::select! {
        outcome = &mut measuring => return outcome?,
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    stop.cancel();
    measuring.await?
}

fn measure(args: BenchArgs, stop: CancellationToken) -> Result<()> {
    check(&args)?;
    let (at, machine) = (Timestamp::now().to_string(), Machine::this());
    let daemon = DaemonProgram::find(args.daemon.as_deref())?;
    let workspace = Workspace::new(args.dir.as_deref(), stop)?;
    let mut versions = versions(&args, &daemon, &workspace)?;

    let mut redis_process: Option<Process> = None;
    let mut backends = Vec::new();
    let has_stores = args.scenarios.iter().any(|scenario| *scenario != Scenario::Postgres);
    if has_stores && args.store != StoreChoice::Embedded {
        let url = if let Some(url) = &args.redis_url {
            url.clone()
        } else {
            let (process, url) = workspace.start_redis(&args.redis_server, args.aof)?;
            redis_process = Some(process);
            url
        };
        let (name, version) = check_redis(&url)?;
        versions.insert(name, version);
        backends.push(Backend::Redis(url));
    }
    if has_stores && args.store != StoreChoice::Redis {
        backends.push(Backend::Embedded);
    }

    let mut work = Vec::new();
    for scenario in scenarios_of(&args) {
        match scenario {
            Scenario::Postgres => work.push((scenario, Backend::Embedded)),
            _ => work.extend(backends.iter().map(|backend| (scenario, backend.clone()))),
        }
    }
    let runs = work.iter().map(|(scenario, _)| scenario.runs(&args)).sum::<u64>() * args.rounds;
    let settings = settings(&args);
    let style = ProgressStyle::with_template("{elapsed_precise} {bar:24} {pos}/{len} {wide_msg}")?;
    let progress = ProgressBar::new(runs).with_style(style);
    let mut bench = Bench { args, daemon, workspace, progress, figures: Vec::new() };
    let mut failures = Vec::new();
    for (scenario, backend) in work {
        if let Err(error) = scenarios::measure(&mut bench, scenario, &backend) {
            bench.workspace.check_interrupt()?;
            let name = format!("{scenario:?}").to_lowercase();
            failures.push(match scenario {
                Scenario::Postgres => format!("{name}: {error:#}"),
                _ => format!("{name} with {}: {error:#}", backend.name()),
            });
        }
        bench.reset(&backend)?;
    }
    bench.progress.finish_and_clear();
    drop(redis_process);

    let report = Report { at, machine, versions, settings, figures: bench.figures, failures };
    write!(std::io::stdout().lock(), "{report}").context("cannot write the table")?;
    if let Some(file) = &bench.args.json {
        let json = serde_json::to_vec_pretty(&report)?;
        fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(report.failures.is_empty(), "{} scenarios failed", report.failures.len());
    Ok(())
}

fn check(args: &BenchArgs) -> Result<()> {
    ensure!(args.size >= MIN_SIZE, "--size must be at least {MIN_SIZE}, the size of an alert without its description");
    ensure!(args.size <= MAX_SIZE, "--size must be at most {MAX_SIZE}, the largest event that the daemon accepts");
    ensure!(args.idle_clients.is_sorted(), "--idle-clients must be ascending");
    let mut numbers = args.clients.iter().chain(&args.idle_clients).copied().chain([args.relay.crowd]);
    ensure!(
        numbers.all(|number| (1..=MAX_CLIENTS).contains(&number)),
        "numbers of clients must be between 1 and {MAX_CLIENTS}"
    );
    Ok(())
}

/// Returns the scenarios in the order of measurement, each once.
fn scenarios_of(args: &BenchArgs) -> Vec<Scenario> {
    let is_given = |scenario: &Scenario| args.scenarios.contains(scenario);
    let basic = Scenario::BASIC.into_iter().filter(|scenario| is_given(scenario) || is_given(&Scenario::All));
    basic.chain([Scenario::Webhook, Scenario::Relay, Scenario::Postgres].into_iter().filter(is_given)).collect()
}

/// Returns the versions of the daemon and of the competitors.
fn versions(args: &BenchArgs, daemon: &DaemonProgram, workspace: &Workspace) -> Result<BTreeMap<String, String>> {
    let mut versions = BTreeMap::from([("aurora-bus".to_owned(), daemon.version(workspace)?)]);
    let nats = args.relay.nats_server.as_deref().map(|program| ("nats", program, "--version"));
    let centrifugo = args.relay.centrifugo.as_deref().map(|program| ("centrifugo", program, "version"));
    for (name, program, argument) in nats.into_iter().chain(centrifugo) {
        versions.insert(name.to_owned(), version_of(workspace, program, argument)?);
    }
    Ok(versions)
}

fn settings(args: &BenchArgs) -> BTreeMap<String, String> {
    let list = |numbers: &[usize]| match numbers {
        [] => "by default".to_owned(),
        numbers => numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("/"),
    };
    let persistence = if args.redis_url.is_some() {
        "as configured"
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

/// Returns name and version of the server; fails if its database holds any key, since it will be emptied.
fn check_redis(url: &Url) -> Result<(String, String)> {
    let mut connection = RespConnection::open(url)?;
    let keys = connection.call(&[b"DBSIZE"])?.integer().context("the reply to DBSIZE is not a number")?;
    ensure!(keys == 0, "the Redis database holds {keys} keys; use an empty one, since a measurement empties it");
    let Some(RespToken::Text(info)) = connection.call(&[b"INFO", b"server"])?.tokens().next() else {
        bail!("the reply to INFO is not a text")
    };
    let info = String::from_utf8_lossy(info).into_owned();
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
    Ok(match field("valkey_version:") {
        Some(version) => ("valkey".to_owned(), version),
        None => ("redis".to_owned(), field("redis_version:").unwrap_or_default()),
    })
}
