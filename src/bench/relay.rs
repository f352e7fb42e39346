//! `aurora-bus bench relay`: what dashboards cost, and what becomes of them when something goes wrong.
//!
//! The same generator measures the daemon, a null relay that does nothing but write ready-made bytes, and NATS's
//! WebSocket listener where its program is given: same clients, same events, in turn. Latency counts from just before
//! publishing; throughput counts events, since NATS puts many of them into one frame. NATS keeps nothing here, which is
//! the best it can do, while the daemon's events go through its store.

mod drain;
mod fanout;
mod filters;
mod idle;
mod peers;
mod slow;
mod storm;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use super::load::SocketsReport;
use super::process::hard_open_files;
use super::works::float;
use super::{Backend, Bench};

/// Files that a process has open beside its clients' sockets.
const OTHER_FILES: u64 = 200;

/// What only `bench relay` takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RelayArgs {
    /// Parts of `relay` to measure; all if not given
    #[arg(long, value_enum, value_name = "PART,…", value_delimiter = ',', help_heading = "Measuring the relay")]
    only: Vec<Part>,
    /// NATS's program, to measure its WebSocket listener beside the relay
    #[arg(long, value_name = "PATH", help_heading = "Measuring the relay")]
    nats_server: Option<PathBuf>,
    /// How many clients come back in a storm, and how many have distinct filters
    #[arg(long, value_name = "N", default_value_t = 5000, help_heading = "Measuring the relay")]
    crowd: usize,
    /// How long idle clients are watched; each is pinged every 25 s
    #[arg(
        long,
        value_name = "N",
        default_value_t = 25,
        value_parser = clap::value_parser!(u64).range(1..=600),
        help_heading = "Measuring the relay"
    )]
    idle_seconds: u64,
}

/// One part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What a connection costs on which nothing happens
    Idle,
    /// One stream to many clients, as fast as they take it
    Fanout,
    /// 100 events per second to many clients
    Latency,
    /// What filters cost
    Filters,
    /// The daemon is killed, and all clients come back at once
    Storm,
    /// Some clients do not read for a while
    Slow,
    /// The daemon is told to stop
    Drain,
}

impl Part {
    const EACH: [Self; 7] =
        [Self::Idle, Self::Fanout, Self::Latency, Self::Filters, Self::Storm, Self::Slow, Self::Drain];

    fn measure(self, bench: &mut Bench, backend: &Backend) -> Result<()> {
        match self {
            Self::Idle => idle::measure(bench, backend),
            Self::Fanout => fanout::saturated(bench, backend),
            Self::Latency => fanout::calm(bench, backend),
            Self::Filters => filters::measure(bench, backend),
            Self::Storm => storm::measure(bench, backend),
            Self::Slow => slow::measure(bench, backend),
            Self::Drain => drain::measure(bench, backend),
        }
    }

    /// How many runs a round has, for the progress bar.
    fn runs(self, args: &RelayArgs, fanouts: u64) -> u64 {
        let sides = 2 + u64::from(args.nats_server.is_some());
        match self {
            Self::Fanout => sides * fanouts,
            Self::Latency => sides,
            Self::Filters => 3,
            Self::Idle | Self::Storm | Self::Slow | Self::Drain => 1,
        }
    }
}

impl RelayArgs {
    fn parts(&self) -> impl Iterator<Item = Part> {
        Part::EACH.into_iter().filter(|part| self.only.is_empty() || self.only.contains(part))
    }

    /// How many runs a round has, where the fan-out is measured with so many numbers of clients.
    pub(super) fn runs(&self, fanouts: usize) -> u64 {
        self.parts().map(|part| part.runs(self, fanouts as u64)).sum()
    }

    /// How many clients come at once.
    pub(super) fn crowd(&self) -> usize {
        self.crowd
    }
}

/// Measures every part that was asked for. One that does not come to its end does not keep the others from theirs.
pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let mut failed = Vec::new();
    for part in bench.args.relay.clone().parts() {
        if let Err(error) = part.measure(bench, backend) {
            bench.site.check()?;
            failed.push(format!("{}: {error:#}", format!("{part:?}").to_lowercase()));
        }
        bench.reset(backend)?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// Fails where a process on this machine may not have so many sockets.
fn must_have_files(clients: usize) -> Result<()> {
    let (needed, allowed) = (clients as u64 + OTHER_FILES, hard_open_files().context("cannot see the limit")?);
    ensure!(
        needed <= allowed,
        "{clients} clients need {needed} open files, and a process may have {allowed} (ulimit -Hn)"
    );
    Ok(())
}

/// Delivered events per second.
fn delivered(report: &SocketsReport) -> f64 {
    per(float(report.in_window), report.seconds)
}

/// CPU time of the relay per delivered event, in microseconds.
fn micros_per_event(report: &SocketsReport) -> f64 {
    per(report.relay_cpu_seconds * 1e6, float(report.in_window))
}

fn per(value: f64, of: f64) -> f64 {
    if of > 0.0 { value / of } else { 0.0 }
}
