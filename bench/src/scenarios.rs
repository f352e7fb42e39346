//! The scenarios: each starts processes in a fixed order and adds figures to the report.

mod competitors;
mod consume;
mod fanout;
mod idle_and_start;
mod postgres;
mod publish;
mod relay;
mod webhook;

use anyhow::Result;

use crate::args::Scenario;
use crate::bench::{Backend, Bench};

/// Measures one scenario with one store and adds its figures.
pub(crate) fn measure(bench: &mut Bench, scenario: Scenario, backend: &Backend) -> Result<()> {
    match scenario {
        Scenario::All => Scenario::BASIC.into_iter().try_for_each(|scenario| measure(bench, scenario, backend)),
        Scenario::Publish => publish::measure(bench, backend),
        Scenario::Consume => consume::measure(bench, backend),
        Scenario::Latency => fanout::latency(bench, backend),
        Scenario::Fanout => fanout::fanout(bench, backend),
        Scenario::Idle => idle_and_start::idle(bench, backend),
        Scenario::Start => idle_and_start::start(bench, backend),
        Scenario::Webhook => webhook::measure(bench, backend),
        Scenario::Postgres => postgres::measure(bench),
        Scenario::Relay => relay::measure(bench, backend),
    }
}
