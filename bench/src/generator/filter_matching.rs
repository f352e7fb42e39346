//! Matches filters in a loop, to measure the cost of one match.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::stats::{Spread, to_f64};
use aurora_bus::event::{Entry, EntryId, Fields, Filter, Tags};

/// The number of times that all alerts are matched between two readings of the clock.
const REPEATS: u64 = 20;

/// Matches every filter against every alert, repeatedly.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FilterMatchJob {
    /// Filters as JSON, see [`Filter::parse`].
    pub(crate) filters: Vec<String>,
    /// Payloads of alerts.
    pub(crate) alerts: Vec<String>,
    pub(crate) seconds: f64,
}

/// The cost of a match.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct FilterMatchReport {
    /// Mean nanoseconds over all filters and alerts.
    pub(crate) mean_nanos: f64,
    /// Mean nanoseconds over all alerts, of the slowest filter.
    pub(crate) slowest_nanos: f64,
    /// The share of matches that passed. All or none means that the loop measures nothing.
    pub(crate) passing: f64,
}

impl FilterMatchJob {
    pub(crate) fn run(&self) -> Result<FilterMatchReport> {
        let filters: Vec<Filter> = self
            .filters
            .iter()
            .map(|text| Filter::parse(text).with_context(|| format!("not a filter: {text}")))
            .collect::<Result<_>>()?;
        let tags = |payload: &String| {
            let fields: Fields = [(Bytes::from("data"), Bytes::from(payload.clone()))].into_iter().collect();
            Tags::of(&Entry { id: EntryId::MIN, fields })
        };
        let alerts: Vec<Tags> = self.alerts.iter().map(tags).collect();
        ensure!(!filters.is_empty() && !alerts.is_empty(), "the job needs at least one filter and one alert");
        let time = Duration::from_secs_f64(self.seconds / to_f64(filters.len() as u64));
        let (mut nanos, mut passed, mut matches) = (Vec::new(), 0_u64, 0_u64);
        for filter in &filters {
            // Other load on the processor stretches some slices, but not the median.
            let (start, mut slices) = (Instant::now(), Vec::new());
            while start.elapsed() < time || slices.is_empty() {
                let slice = Instant::now();
                for _ in 0..REPEATS {
                    for alert in &alerts {
                        passed += u64::from(black_box(filter).matches(black_box(alert)));
                    }
                }
                slices.push(slice.elapsed().as_secs_f64() * 1e9);
            }
            let per_slice = REPEATS * alerts.len() as u64;
            matches += per_slice * slices.len() as u64;
            nanos.push(Spread::of(&slices).median / to_f64(per_slice));
        }
        Ok(FilterMatchReport {
            mean_nanos: nanos.iter().sum::<f64>() / to_f64(nanos.len() as u64),
            slowest_nanos: nanos.iter().copied().fold(0.0, f64::max),
            passing: to_f64(passed) / to_f64(matches),
        })
    }
}
