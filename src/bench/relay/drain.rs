//! The daemon is told to stop: its clients are closed spread over a window, so that they do not come back at once.

use anyhow::Result;

use super::per;
use crate::bench::load::{DrainJob, DrainReport, Job};
use crate::bench::report::{Figure, Goal};
use crate::bench::works::{RICH_PATH, STREAM, float};
use crate::bench::{Backend, Bench, What};
use crate::relay::Config;

/// Parts of the window in which closes are counted.
const PARTS: usize = 10;
/// Closes in the fullest part and in the emptiest, beside the mean of all.
const MAX_PART: f64 = 1.5;
const MIN_PART: f64 = 0.5;
/// How much longer than the window the last close may take, in seconds.
const MAX_LATE: f64 = 1.0;

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let clients = bench.args.clients_of(What::Relay).last().copied().unwrap_or(1);
    let window_seconds = Config::default().drain_window.as_secs_f64();
    let mut rounds: Vec<DrainReport> = Vec::new();
    for round in 1..=bench.args.rounds {
        bench.step(format!("drain, {}, round {round}", backend.name()))?;
        bench.reset(backend)?;
        let daemon = bench.dashboards_daemon(backend, "", None)?;
        let job = Job::Drain(DrainJob {
            address: daemon.address,
            path: RICH_PATH.to_owned(),
            stream: STREAM.to_owned(),
            clients,
            relay_pid: daemon.pid(),
            window_seconds,
        });
        rounds.push(bench.site.generate(&job, window_seconds + 90.0)?);
    }
    let histograms: Vec<[f64; PARTS]> = rounds.iter().map(|report| histogram(&report.ends, window_seconds)).collect();
    let mean = float(clients as u64) / float(PARTS as u64);
    let of = |value: fn(&DrainReport) -> f64| rounds.iter().map(value).collect::<Vec<_>>();
    let part = |pick: fn(f64, f64) -> f64| -> Vec<f64> {
        histograms.iter().map(|parts| per(parts.iter().copied().fold(mean, pick), mean)).collect()
    };
    let figure = |what: &str, unit, values: &[f64]| {
        let name = format!("drain, {clients} clients, {what}");
        Figure::new("relay", backend.name(), name, unit, values)
    };
    let last = of(|report| report.ends.iter().copied().fold(0.0, f64::max));
    let clean = of(|report| {
        per(float(report.closes.get("4000").copied().unwrap_or_default()), float(report.ends.len() as u64))
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

/// How many ended in each part of the window; those that ended later count in the last.
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
    fn ends_are_counted_in_the_part_of_the_window_they_fall_into() {
        let parts = histogram(&[0.0, 0.49, 0.5, 2.6, 4.99, 5.0, 7.0], 5.0);
        assert!(parts.iter().zip([2.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0]).all(|(a, b)| (a - b).abs() < 0.1));
    }
}
