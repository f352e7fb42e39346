//! The scenarios `latency` and `fanout`: events to one dashboard and to many, beside the baseline relay.
//!
//! With Redis the generator publishes directly into the stream, so that only the way through the relay counts. With
//! the embedded store it publishes over HTTP, both to the daemon and to the baseline relay.

use anyhow::Result;

use super::competitors::{Comparison, Competitor, Value, cpu_cores, cpu_micros_per_event, delivery_rate};
use crate::args::Scenario;
use crate::bench::{Backend, Bench};
use crate::generator::Pace;
use crate::report::{Figure, Goal};

/// Events per second of `latency`.
const LATENCY_RATE: u32 = 1000;
/// Events per second of a calm fan-out.
const CALM_RATE: u32 = 100;
const BASELINE: [Competitor; 1] = [Competitor::BaselineRelay];

/// Measures the time from publishing to one WebSocket client.
pub(super) fn latency(bench: &mut Bench, backend: &Backend) -> Result<()> {
    // Over HTTP each connection waits for the response, which a disk may delay by milliseconds.
    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 16,
    };
    let pace = Pace::PerSecond { rate: LATENCY_RATE, connections };
    let comparison = Comparison::measure(bench, backend, "latency", &BASELINE, 1, pace)?;
    let figures: [(&str, Value, f64); 3] = [
        ("p50", |report| report.latency.p50_ms, 1.5),
        ("p99", |report| report.latency.p99_ms, 2.0),
        ("p99.9", |report| report.latency.p999_ms, f64::INFINITY),
    ];
    for (name, value, bound) in figures {
        let name = format!("{LATENCY_RATE}/s to 1 client, {name}");
        let figure = comparison.beside(Competitor::BaselineRelay, ("latency", backend, name, "ms", value));
        let has_goal = matches!(backend, Backend::Redis(_)) && bound.is_finite();
        bench.figures.push(figure.with_optional_goal(has_goal.then_some(Goal::RatioAtMost(bound))));
    }
    Ok(())
}

/// Measures one publisher and many WebSocket clients.
pub(super) fn fanout(bench: &mut Bench, backend: &Backend) -> Result<()> {
    bench.args.clients_of(Scenario::Fanout).into_iter().try_for_each(|clients| fanout_to(bench, backend, clients))
}

fn fanout_to(bench: &mut Bench, backend: &Backend, clients: usize) -> Result<()> {
    let pace = Pace::Saturate { window: 2048, burst: 64 };
    let comparison = Comparison::measure(bench, backend, "fan-out", &BASELINE, clients, pace)?;
    let figure = |comparison: &Comparison, name: String, unit, value| -> Figure {
        comparison.beside(Competitor::BaselineRelay, ("fan-out", backend, name, unit, value))
    };
    let saturated = figure(&comparison, format!("saturated, {clients} clients"), "frames/s", delivery_rate);
    bench.figures.push(saturated.with_optional_goal((clients == 500).then_some(Goal::AtLeast(1.2e6))));
    let name = format!("saturated, {clients} clients, relay CPU");
    bench.figures.push(figure(&comparison, name, "µs/frame", cpu_micros_per_event));

    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 4,
    };
    let pace = Pace::PerSecond { rate: CALM_RATE, connections };
    let comparison = Comparison::measure(bench, backend, "calm fan-out", &BASELINE, clients, pace)?;
    let figures: [(&str, &str, Value); 3] = [
        ("p50", "ms", |report| report.latency.p50_ms),
        ("p99", "ms", |report| report.latency.p99_ms),
        ("relay CPU", "cores", cpu_cores),
    ];
    for (name, unit, value) in figures {
        let name = format!("{CALM_RATE}/s to {clients} clients, {name}");
        bench.figures.push(figure(&comparison, name, unit, value));
    }
    Ok(())
}
