//! The scenario `relay`: the cost of dashboards beside other relays, and their recovery from faults.
//!
//! The same generator measures the daemon, a baseline relay, and NATS and Centrifugo if their programs are given: with
//! the same clients and events, in turn. Latency counts from just before publishing. Throughput counts events, since
//! NATS and Centrifugo put many of them into one frame. Both keep nothing in a fan-out, which is their fastest mode,
//! while the events of the daemon go through its store.

mod drain;
mod fanout;
mod filters;
mod idle_clients;
mod reconnect_storm;
mod slow_clients;

use anyhow::{Result, ensure};

use crate::args::RelayPart;
use crate::bench::{Backend, Bench};

/// Measures the selected parts. If one fails, the others are still measured.
pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let mut failures = Vec::new();
    for part in bench.args.relay.parts() {
        if let Err(error) = measure_part(bench, part, backend) {
            bench.workspace.check_interrupt()?;
            failures.push(format!("{}: {error:#}", format!("{part:?}").to_lowercase()));
        }
        bench.reset(backend)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(())
}

fn measure_part(bench: &mut Bench, part: RelayPart, backend: &Backend) -> Result<()> {
    match part {
        RelayPart::Idle => idle_clients::measure(bench, backend),
        RelayPart::Fanout => fanout::saturated(bench, backend),
        RelayPart::Latency => fanout::calm(bench, backend),
        RelayPart::Filters => filters::measure(bench, backend),
        RelayPart::Storm => reconnect_storm::measure(bench, backend),
        RelayPart::Slow => slow_clients::measure(bench, backend),
        RelayPart::Drain => drain::measure(bench, backend),
    }
}
