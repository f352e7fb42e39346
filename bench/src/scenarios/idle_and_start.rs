//! The scenarios `idle` and `start`: the cost of idle clients, start time, memory at rest, size of the program.

use anyhow::Result;

use crate::args::Scenario;
use crate::bench::{Backend, Bench, Readers, relay_endpoint};
use crate::generator::{IdleClientsJob, IdleClientsReport, Job};
use crate::procfs::resident_bytes;
use crate::report::{Figure, Goal};
use crate::stats::to_f64;

/// Measures memory and CPU time of connected clients that receive nothing.
pub(super) fn idle(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let steps = bench.args.idle_clients_of(Scenario::Idle);
    let rounds = idle_rounds(bench, backend, "idle clients", &steps, to_f64(bench.args.seconds))?;
    for (step, clients) in steps.iter().enumerate() {
        let memory = values_of(&rounds, step, IdleClientsReport::kib_per_client);
        let name = format!("{clients} clients, memory of each");
        bench.figures.push(Figure::new("idle", backend.name(), name, "KiB", &memory).with_goal(Goal::AtMost(12.0)));
        let cpu = values_of(&rounds, step, IdleClientsReport::cpu_micros_per_client);
        let name = format!("{clients} clients, CPU of each per second");
        bench.figures.push(Figure::new("idle", backend.name(), name, "µs", &cpu));
    }
    Ok(())
}

/// Holds idle clients at each step; returns the reports of each round.
pub(super) fn idle_rounds(
    bench: &Bench,
    backend: &Backend,
    title: &str,
    steps: &[usize],
    seconds: f64,
) -> Result<Vec<Vec<IdleClientsReport>>> {
    let mut rounds = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("{title}, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let mut daemon = bench.start_relay(backend, "", None)?;
        let relay = relay_endpoint(daemon.address);
        let job = IdleClientsJob { relay, steps: steps.to_vec(), seconds, relay_pid: daemon.pid() };
        let reports = bench.workspace.generate(&Job::IdleClients(job), (seconds + 20.0) * to_f64(steps.len() as u64));
        daemon.ensure_running()?;
        rounds.push(reports?);
    }
    Ok(rounds)
}

/// Returns a value of one step, for each round.
pub(super) fn values_of(
    rounds: &[Vec<IdleClientsReport>],
    step: usize,
    value: fn(&IdleClientsReport) -> f64,
) -> Vec<f64> {
    rounds.iter().filter_map(|reports| reports.get(step)).map(value).collect()
}

/// Measures the time from the start of the process until it is ready, on an empty store.
pub(super) fn start(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut millis, mut memory) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("start, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let daemon = bench.start_daemon(backend, Readers::Group)?;
        millis.push(daemon.started_in.as_secs_f64() * 1e3);
        memory.push(to_f64(resident_bytes(daemon.pid())?) / 1_048_576.0);
    }
    let name = backend.name();
    bench.figures.push(Figure::new("start", name, "until ready", "ms", &millis).with_goal(Goal::AtMost(200.0)));
    bench.figures.push(Figure::new("start", name, "memory at rest", "MiB", &memory).with_goal(Goal::AtMost(30.0)));
    if !bench.figures.iter().any(|figure| figure.unit == "MB") {
        let size = Figure::new("start", name, "size of the program", "MB", &[to_f64(bench.daemon.size()?) / 1e6]);
        bench.figures.push(size.with_goal(Goal::AtMost(25.0)));
    }
    Ok(())
}
