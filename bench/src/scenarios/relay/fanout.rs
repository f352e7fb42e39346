//! One stream to many clients: at full speed, and at a calm pace.

use anyhow::Result;

use crate::args::Scenario;
use crate::bench::{Backend, Bench};
use crate::generator::Pace;
use crate::report::Goal;
use crate::scenarios::competitors::{
    Comparison, Competitor, Goals, Value, cpu_cores, cpu_micros_per_event, delivery_rate,
};

/// Events per second at a calm pace.
const RATE: u32 = 100;
/// The number of clients at a calm pace, if it is among the given ones.
const CALM_CLIENTS: usize = 500;
/// The highest CPU time of the relay per delivered event at full speed, in microseconds.
const MAX_MICROS: f64 = 0.6;

/// Publishes as fast as the clients receive.
pub(super) fn saturated(bench: &mut Bench, backend: &Backend) -> Result<()> {
    for clients in bench.args.clients_of(Scenario::Relay) {
        let title = format!("fan-out to {clients}");
        let pace = Pace::Saturate { window: 2048, burst: 64 };
        let comparison = Comparison::measure(bench, backend, &title, &Competitor::ALL, clients, pace)?;
        let rate_goals = [Some(Goal::RatioAtLeast(0.5)), Some(Goal::RatioAtLeast(1.5)), None];
        let name = format!("saturated, {clients} clients");
        push_figures(bench, &comparison, backend, &name, "events/s", delivery_rate, rate_goals);
        let cpu_goals = [Some(Goal::AtMost(MAX_MICROS)), None, None];
        let name = format!("saturated, {clients} clients, relay CPU");
        push_figures(bench, &comparison, backend, &name, "µs/event", cpu_micros_per_event, cpu_goals);
    }
    Ok(())
}

/// Publishes single events at a calm pace.
pub(super) fn calm(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let numbers = bench.args.clients_of(Scenario::Relay);
    let clients = if numbers.contains(&CALM_CLIENTS) { CALM_CLIENTS } else { numbers.last().copied().unwrap_or(1) };
    // Over HTTP each connection waits for the response, which a disk may delay by milliseconds.
    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 4,
    };
    let pace = Pace::PerSecond { rate: RATE, connections };
    let comparison = Comparison::measure(bench, backend, "calm fan-out", &Competitor::ALL, clients, pace)?;
    let latency_goals = [Some(Goal::RatioAtMost(1.3)), Some(Goal::RatioAtMost(1.0)), None];
    let figures: [(&str, &str, Value, Goals); 3] = [
        ("p50", "ms", |report| report.latency.p50_ms, latency_goals),
        ("p99", "ms", |report| report.latency.p99_ms, latency_goals),
        ("relay CPU", "cores", cpu_cores, [None, Some(Goal::RatioAtMost(0.5)), None]),
    ];
    for (name, unit, value, goals) in figures {
        let name = format!("{RATE}/s to {clients} clients, {name}");
        push_figures(bench, &comparison, backend, &name, unit, value, goals);
    }
    Ok(())
}

/// Adds one figure beside each competitor.
fn push_figures(
    bench: &mut Bench,
    comparison: &Comparison,
    backend: &Backend,
    name: &str,
    unit: &'static str,
    value: Value,
    goals: Goals,
) {
    for (competitor, goal) in Competitor::ALL.into_iter().zip(goals) {
        let figure = comparison.beside(competitor, ("relay", backend, name.to_owned(), unit, value));
        bench.figures.push(figure.with_optional_goal(goal));
    }
}
