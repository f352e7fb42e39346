//! A stopping daemon: it closes its clients over a window, so that they do not reconnect at once.

use anyhow::Result;
use aurora_bus::relay::Config;

use crate::args::Scenario;
use crate::bench::{Backend, Bench, fleet_endpoint};
use crate::generator::{DrainJob, DrainReport, Job};
use crate::report::{Figure, Goal};
use crate::stats::{ratio, to_f64};

/// The number of parts of the window in which closes are counted.
const PARTS: usize = 10;
/// The bounds of closes in the fullest and the emptiest part, relative to the mean.
const MAX_PART: f64 = 1.5;
const MIN_PART: f64 = 0.5;
/// The time that the last close may take beyond the window, in seconds.
const MAX_LATE: f64 = 1.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let clients = bench.args.clients_of(Scenario::Relay).last().copied().unwrap_or(1);
    let window_seconds = Config::default().drain_window.as_secs_f64();
    let mut rounds: Vec<DrainReport> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("drain, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let daemon = bench.start_relay(backend, "", None)?;
        let job = Job::Drain(DrainJob {
            endpoint: fleet_endpoint(daemon.address),
            clients,
            relay_pid: daemon.pid(),
            window_seconds,
        });
        rounds.push(bench.workspace.generate(&job, window_seconds + 90.0)?);
    }
    let histograms: Vec<[f64; PARTS]> = rounds.iter().map(|report| histogram(&report.ends, window_seconds)).collect();
    let mean = to_f64(clients as u64) / to_f64(PARTS as u64);
    let of = |value: fn(&DrainReport) -> f64| rounds.iter().map(value).collect::<Vec<_>>();
    let part = |pick: fn(f64, f64) -> f64| -> Vec<f64> {
        histograms.iter().map(|parts| ratio(parts.iter().copied().fold(mean, pick), mean)).collect()
    };
    let figure = |name: &str, unit, values: &[f64]| {
        Figure::new("relay", backend.name(), format!("drain, {clients} clients, {name}"), unit, values)
    };
    let last = of(|report| report.ends.iter().copied().fold(0.0, f64::max));
    let clean = of(|report| {
        ratio(to_f64(report.closes.get("4000").copied().unwrap_or_default()), to_f64(report.ends.len() as u64))
    });
    bench.figures.extend([
        figure("closes per tenth of the window", "closes", &histograms.concat()),
        figure("fullest tenth beside the mean", "×", &part(f64::max)).with_goal(Goal::AtMost(MAX_PART)),
        figure("emptiest tenth beside the mean", "×", &part(f64::min)).with_goal(Goal::AtLeast(MIN_PART)),
        figure("last close", "s", &last).with_goal(Goal::AtMost(window_seconds + MAX_LATE)),
        figure("share closed with 4000", "of 1", &clean).with_goal(Goal::AtLeast(1.0)),
    ]);
    Ok(())
}

/// Counts the ends in each part of the window; the last part includes later ones.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a part of the window is a small number"
)]
fn histogram(ends: &[f64], window_seconds: f64) -> [f64; PARTS] {
    let mut parts = [0.0; PARTS];
    for end in ends {
        let part = (end / window_seconds * PARTS as f64) as usize;
        parts[part.min(PARTS - 1)] += 1.0;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_counted_per_part_of_the_window() {
        let parts = histogram(&[0.0, 0.49, 0.5, 2.6, 4.99, 5.0, 7.0], 5.0);
        assert!(parts.iter().zip([2.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0]).all(|(a, b)| (a - b).abs() < 0.1));
    }
}
