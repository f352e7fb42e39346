//! One stream to many clients: as fast as they take it, and at a calm pace.

use anyhow::Result;

use super::peers::{Goals, Sides, Value, goals};
use super::{delivered, micros_per_event, per};
use crate::bench::load::Pace;
use crate::bench::report::Goal;
use crate::bench::{Backend, Bench, What};

/// Events per second at a calm pace.
const RATE: u32 = 100;
/// The number of clients that goals of a calm pace are for.
const CALM_CLIENTS: usize = 500;
/// CPU time of the relay per delivered event when saturated, in microseconds.
const MAX_MICROS: f64 = 0.6;

/// As fast as the clients take it.
pub(super) fn saturated(bench: &mut Bench, backend: &Backend) -> Result<()> {
    for clients in bench.args.clients_of(What::Relay) {
        let what = format!("fan-out to {clients}");
        let sides = Sides::measure(bench, backend, &what, clients, Pace::Saturate { window: 2048, burst: 64 })?;
        for (peer, goal) in goals(Some(Goal::RatioAtLeast(0.5)), Some(Goal::RatioAtLeast(1.5))) {
            let name = format!("saturated, {clients} clients");
            let figure = sides.beside(peer, ("relay", backend, name, "events/s", delivered));
            bench.figures.push(figure.with_optional_goal(goal));
        }
        for (peer, goal) in goals(Some(Goal::AtMost(MAX_MICROS)), None) {
            let name = format!("saturated, {clients} clients, relay CPU");
            let figure = sides.beside(peer, ("relay", backend, name, "µs/event", micros_per_event));
            bench.figures.push(figure.with_optional_goal(goal));
        }
    }
    Ok(())
}

/// At a calm pace, one event at a time.
pub(super) fn calm(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let numbers = bench.args.clients_of(What::Relay);
    let clients = if numbers.contains(&CALM_CLIENTS) { CALM_CLIENTS } else { numbers.last().copied().unwrap_or(1) };
    // Over HTTP one connection waits for each answer, which a disk may take milliseconds for.
    let connections = match backend {
        Backend::Redis(_) => 1,
        Backend::Embedded => 4,
    };
    let pace = Pace::PerSecond { rate: RATE, connections };
    let sides = Sides::measure(bench, backend, "calm fan-out", clients, pace)?;
    let figures: [(&str, &str, Value, Goals); 3] = [
        (
            "p50",
            "ms",
            |report| report.latency.p50_ms,
            goals(Some(Goal::RatioAtMost(1.3)), Some(Goal::RatioAtMost(1.0))),
        ),
        (
            "p99",
            "ms",
            |report| report.latency.p99_ms,
            goals(Some(Goal::RatioAtMost(1.3)), Some(Goal::RatioAtMost(1.0))),
        ),
        (
            "relay CPU",
            "cores",
            |report| per(report.relay_cpu_seconds, report.seconds),
            goals(None, Some(Goal::RatioAtMost(0.5))),
        ),
    ];
    for (name, unit, value, goals) in figures {
        for (peer, goal) in goals {
            let name = format!("{RATE}/s to {clients} clients, {name}");
            let figure = sides.beside(peer, ("relay", backend, name, unit, value));
            bench.figures.push(figure.with_optional_goal(goal));
        }
    }
    Ok(())
}
