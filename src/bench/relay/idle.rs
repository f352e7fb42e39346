//! What a connection costs on which nothing happens but pings.

use anyhow::Result;

use super::must_have_files;
use crate::bench::load::{HoldJob, HoldReport, Job};
use crate::bench::report::{Figure, Goal};
use crate::bench::works::{float, sockets_of};
use crate::bench::{Backend, Bench, What};

/// Memory of one connection, in KiB.
const MAX_KIB: f64 = 9.0;
/// CPU time of one connection per second, in microseconds.
const MAX_MICROS: f64 = 3.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let steps = bench.args.idle_clients_of(What::Relay);
    must_have_files(steps.iter().copied().max().unwrap_or_default())?;
    let seconds = float(bench.args.relay.idle_seconds);
    let mut rounds: Vec<Vec<HoldReport>> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("idle, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let mut daemon = bench.dashboards_daemon(backend, "", None)?;
        let relay = sockets_of(daemon.address);
        let job = Job::Hold(HoldJob { relay, steps: steps.clone(), seconds, relay_pid: daemon.pid() });
        let reports = bench.site.generate(&job, (seconds + 20.0) * float(steps.len() as u64));
        daemon.must_run()?;
        rounds.push(reports?);
    }
    for (step, clients) in steps.iter().enumerate() {
        let of = |value: fn(&HoldReport) -> f64| -> Vec<f64> {
            let reports = rounds.iter().filter_map(|reports| reports.get(step));
            reports.map(|report| value(report) / float(report.clients.max(1) as u64)).collect()
        };
        let memory = of(|report| float(report.with_bytes.saturating_sub(report.before_bytes)) / 1024.0);
        let cpu = of(|report| report.cpu * 1e6);
        let figure = |what: &str, unit, values: &[f64]| {
            Figure::new("relay", backend.name(), format!("idle, {clients} clients, {what}"), unit, values)
        };
        bench.figures.push(figure("memory of each", "KiB", &memory).with_goal(Goal::AtMost(MAX_KIB)));
        bench.figures.push(figure("CPU of each per second", "µs", &cpu).with_goal(Goal::AtMost(MAX_MICROS)));
    }
    Ok(())
}
