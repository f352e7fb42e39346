//! The cost of filters: of one match, and of many filters at many clients.

use anyhow::Result;
use serde_json::{Value, json};
use url::form_urlencoded::byte_serialize;

use crate::bench::{Backend, Bench, ensure_open_files};
use crate::generator::{FanoutReport, FilterMatchJob, FilterMatchReport, Job, Pace};
use crate::report::{Figure, Goal};
use crate::scenarios::competitors::{cpu_micros_per_event, delivery_rate, run_daemon};
use crate::stats::to_f64;

/// The number of filters of each shape.
const PER_SHAPE: usize = 10;
/// The highest time of one match, in nanoseconds.
const MAX_NANOS: f64 = 50.0;
/// The highest CPU time with filters that all pass, relative to no filters.
const MAX_RATIO: f64 = 1.3;
/// A small window: with thousands of clients, events in flight take much memory of the kernel.
const PACE: Pace = Pace::Saturate { window: 256, burst: 64 };

pub(super) fn measure(bench: &mut Bench, backend: &Backend) -> Result<()> {
    let clients = bench.args.relay.crowd;
    ensure_open_files(clients)?;
    let filters: Vec<String> = filters().iter().map(Value::to_string).collect();
    let queries: Vec<String> = filters
        .iter()
        .map(|filter| format!("filter={}", byte_serialize(filter.as_bytes()).collect::<String>()))
        .collect();
    let alerts: Vec<String> = alerts().iter().map(Value::to_string).collect();
    let seconds = to_f64(bench.args.seconds);
    let (mut matches, mut without, mut with) = (Vec::<FilterMatchReport>::new(), Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        bench.step(format!("filters, round {round}: one match"))?;
        let job = Job::FilterMatch(FilterMatchJob {
            filters: filters.clone(),
            alerts: alerts.clone(),
            seconds: seconds.min(2.0),
        });
        matches.push(bench.workspace.generate(&job, seconds)?);
        bench.step(format!("filters, {}, round {round}: {clients} clients without", backend.name()))?;
        without.push(run_daemon(bench, backend, clients, PACE, &[])?);
        bench.step(format!("filters, {}, round {round}: {clients} clients with", backend.name()))?;
        with.push(run_daemon(bench, backend, clients, PACE, &queries)?);
    }
    let count = filters.len();
    let of = |value: fn(&FilterMatchReport) -> f64| matches.iter().map(value).collect::<Vec<_>>();
    let nanos = |name: String, values: &[f64]| {
        Figure::new("relay", backend.name(), name, "ns", values).with_goal(Goal::AtMost(MAX_NANOS))
    };
    bench.figures.push(nanos(format!("one match, mean of {count} filters"), &of(|report| report.mean_nanos)));
    bench.figures.push(nanos(format!("one match, slowest of {count} filters"), &of(|report| report.slowest_nanos)));
    let beside = |name: &str, unit, value: fn(&FanoutReport) -> f64| {
        let of = |reports: &[FanoutReport]| reports.iter().map(value).collect::<Vec<_>>();
        let name = format!("{count} filters, {clients} clients{name}");
        Figure::new("relay", backend.name(), name, unit, &of(&with)).beside("no filters", &of(&without))
    };
    let cpu = beside(", relay CPU", "µs/event", cpu_micros_per_event).with_goal(Goal::RatioAtMost(MAX_RATIO));
    bench.figures.push(cpu);
    bench.figures.push(beside("", "events/s", delivery_rate));
    Ok(())
}

/// Returns typical filters of dashboards, all different, which all pass the alert of the measurement.
fn filters() -> Vec<Value> {
    let is = |key: &str, cmp: &str, val: &str| json!({"key": key, "cmp": cmp, "val": val});
    let any_of = |key: &str, vals: &[&str]| json!({"key": key, "cmp": "in", "vals": vals});
    let not = |node: Value| json!({"op": "not", "nodes": [node]});
    let filter = |shape: usize, turn: usize| {
        let other = format!("other-{turn}");
        let floor = ["low", "medium", "high"][turn % 3];
        match shape {
            0 => json!({"op": "and", "nodes": [is("severity", "gte", floor), is("source", "neq", &other)]}),
            1 => json!({"op": "and", "nodes": [
                is("severity", "gte", floor), any_of("source", &["suricata", "zeek", "wazuh", &other]),
            ]}),
            2 => json!({"op": "or", "nodes": [is("source", "eq", &other), is("technique", "prefix", "T1569")]}),
            3 => json!({"op": "and", "nodes": [
                not(is("category", "eq", &other)), is("title", "contains", "creation"),
            ]}),
            _ => json!({"op": "and", "nodes": [
                {"op": "or", "nodes": [is("source", "eq", &other), any_of("category", &["network", "cps", &other])]},
                any_of("severity", &["high", "critical"]),
                {"key": "technique", "cmp": "exists"},
                not(is("title", "prefix", &other)),
            ]}),
        }
    };
    (0..5).flat_map(|shape| (0..PER_SHAPE).map(move |turn| (shape, turn))).map(|(s, t)| filter(s, t)).collect()
}

/// Returns alerts of many kinds, some of which pass.
fn alerts() -> Vec<Value> {
    let severities = ["info", "low", "medium", "high", "critical"];
    let sources = ["suricata", "zeek", "edr", "other-3"];
    let categories = ["network", "endpoint", "cps", "other-7"];
    let titles = ["Remote service creation over SMB", "Beacon", "other-5 seen", "A login from two countries at once"];
    let techniques = [vec!["T1021.002", "T1569.002"], vec!["T1078"], vec![], vec!["T1566.001", "T1204", "T1569"]];
    (0..60)
        .map(|turn| {
            json!({
                "severity": severities[turn % 5],
                "source": sources[turn % 4],
                "category": categories[turn / 2 % 4],
                "title": titles[turn / 3 % 4],
                "mitre_techniques": techniques[turn / 5 % 4],
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use aurora_bus::event::{Entry, EntryId, Fields};
    use aurora_bus::event::{Filter, Tags};
    use bytes::Bytes;

    use super::*;
    use crate::payload::EventTemplate;

    #[test]
    fn fifty_different_filters_pass_the_alert() {
        let fields: Fields =
            [(Bytes::from("data"), Bytes::from(EventTemplate::new(500).bytes(1, 2)))].into_iter().collect();
        let tags = Tags::of(&Entry { id: EntryId::MIN, fields });
        let filters = filters();
        let texts: HashSet<String> = filters.iter().map(Value::to_string).collect();
        assert_eq!(texts.len(), 50);
        for text in texts {
            assert!(Filter::parse(&text).unwrap().matches(&tags), "{text}");
        }
    }

    #[test]
    fn filter_loop_has_passing_and_failing_alerts() {
        let text = |values: Vec<Value>| values.iter().map(Value::to_string).collect();
        let report = FilterMatchJob { filters: text(filters()), alerts: text(alerts()), seconds: 0.05 }.run().unwrap();
        assert!((0.1..0.9).contains(&report.passing), "{report:?}");
        assert!(report.mean_nanos > 0.0 && report.slowest_nanos >= report.mean_nanos, "{report:?}");
    }
}
