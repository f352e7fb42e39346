//! The cost of connections without any traffic but pings.

use anyhow::Result;

use crate::args::Scenario;
use crate::bench::{Backend, Bench, ensure_open_files};
use crate::generator::IdleClientsReport;
use crate::report::{Figure, Goal};
use crate::scenarios::idle_and_start::{idle_rounds, values_of};
use crate::stats::to_f64;

/// The highest memory per connection, in KiB.
const MAX_KIB: f64 = 9.0;
/// The highest CPU time per connection and second, in microseconds.
const MAX_MICROS: f64 = 3.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let steps = bench.args.idle_clients_of(Scenario::Relay);
    ensure_open_files(steps.iter().copied().max().unwrap_or_default())?;
    let rounds = idle_rounds(bench, backend, "idle", &steps, to_f64(bench.args.relay.idle_seconds))?;
    for (step, clients) in steps.iter().enumerate() {
        let figure = |name: &str, unit, values: &[f64]| {
            Figure::new("relay", backend.name(), format!("idle, {clients} clients, {name}"), unit, values)
        };
        let memory = values_of(&rounds, step, IdleClientsReport::kib_per_client);
        bench.figures.push(figure("memory of each", "KiB", &memory).with_goal(Goal::AtMost(MAX_KIB)));
        let cpu = values_of(&rounds, step, IdleClientsReport::cpu_micros_per_client);
        bench.figures.push(figure("CPU of each per second", "µs", &cpu).with_goal(Goal::AtMost(MAX_MICROS)));
    }
    Ok(())
}
