//! What the daemon costs while nothing happens: memory and CPU of idle clients, start, size.

use std::fs;

use anyhow::{Context, Result};

use super::{Readers, float, sockets_of};
use crate::bench::load::{HoldJob, HoldReport, Job};
use crate::bench::process::resident_bytes;
use crate::bench::report::{Figure, Goal};
use crate::bench::{Backend, Bench, What};

/// Memory and CPU of clients that are connected and hear nothing.
pub(super) fn idle(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let steps = bench.args.idle_clients_of(What::Idle);
    let seconds = float(bench.args.seconds);
    let mut rounds: Vec<Vec<HoldReport>> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("idle clients, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let mut daemon = bench.daemon(backend, Readers::Dashboards)?;
        let relay = sockets_of(daemon.address);
        let job = Job::Hold(HoldJob { relay, steps: steps.clone(), seconds, relay_pid: daemon.pid() });
        let reports = bench.site.generate(&job, (seconds + 10.0) * float(steps.len() as u64));
        daemon.must_run()?;
        rounds.push(reports?);
    }
    for (step, clients) in steps.iter().enumerate() {
        let of = |value: fn(&HoldReport) -> f64| -> Vec<f64> {
            rounds.iter().filter_map(|reports| reports.get(step)).map(value).collect()
        };
        let memory = of(|report| {
            let bytes = report.with_bytes.saturating_sub(report.before_bytes);
            float(bytes) / 1024.0 / float(report.clients.max(1) as u64)
        });
        let name = format!("{clients} clients, memory of each");
        bench.figures.push(Figure::new("idle", backend.name(), name, "KiB", &memory).with_goal(Goal::AtMost(12.0)));
        let cpu = of(|report| report.cpu * 1e6 / float(report.clients.max(1) as u64));
        let name = format!("{clients} clients, CPU of each per second");
        bench.figures.push(Figure::new("idle", backend.name(), name, "µs", &cpu));
    }
    Ok(())
}

/// From the start of the process until it is ready, on an empty store.
pub(super) fn start(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let (mut millis, mut memory) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("start, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let daemon = bench.daemon(backend, Readers::Group)?;
        millis.push(daemon.started_in.as_secs_f64() * 1e3);
        memory.push(float(resident_bytes(daemon.pid())?) / 1_048_576.0);
    }
    let name = backend.name();
    bench.figures.push(Figure::new("start", name, "until ready", "ms", &millis).with_goal(Goal::AtMost(200.0)));
    bench.figures.push(Figure::new("start", name, "memory at rest", "MiB", &memory).with_goal(Goal::AtMost(30.0)));
    if !bench.figures.iter().any(|figure| figure.unit == "MB") {
        let size = fs::metadata(bench.site.program()).context("cannot see this program's own file")?.len();
        let size = Figure::new("start", name, "size of the program", "MB", &[float(size) / 1e6]);
        bench.figures.push(size.with_goal(Goal::AtMost(25.0)));
    }
    Ok(())
}
