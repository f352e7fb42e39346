//! Filters in a loop: what one match costs, and nothing else.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::bench::report::Spread;
use crate::event::{Entry, EntryId, Fields};
use crate::event::{Filter, Tags};

/// How often all alerts are matched between two looks at the clock.
const TURNS: u64 = 20;

/// Match every filter against every alert, again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MatchJob {
    /// As JSON, see [`Filter::parse`].
    pub(crate) filters: Vec<String>,
    /// Payloads.
    pub(crate) alerts: Vec<String>,
    pub(crate) seconds: f64,
}

/// What a match costs.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct MatchReport {
    /// Nanoseconds, over all filters and alerts.
    pub(crate) mean_nanos: f64,
    /// Nanoseconds of the filter that costs most, over all alerts.
    pub(crate) slowest_nanos: f64,
    /// The share of matches that passed: all or none would show a loop that measures nothing.
    pub(crate) passing: f64,
}

impl MatchJob {
    pub(crate) fn run(&self) -> Result<MatchReport> {
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
        ensure!(!filters.is_empty() && !alerts.is_empty(), "there is nothing to match");
        let time = Duration::from_secs_f64(self.seconds / count(filters.len() as u64));
        let (mut nanos, mut passed, mut matches) = (Vec::new(), 0_u64, 0_u64);
        for filter in &filters {
            // Whoever else wants the processor stretches some slices, but not the one in the middle.
            let (begin, mut slices) = (Instant::now(), Vec::new());
            while begin.elapsed() < time || slices.is_empty() {
                let slice = Instant::now();
                for _ in 0..TURNS {
                    for alert in &alerts {
                        passed += u64::from(black_box(filter).matches(black_box(alert)));
                    }
                }
                slices.push(slice.elapsed().as_secs_f64() * 1e9);
            }
            let of_a_slice = TURNS * alerts.len() as u64;
            matches += of_a_slice * slices.len() as u64;
            nanos.push(Spread::of(&slices).median / count(of_a_slice));
        }
        Ok(MatchReport {
            mean_nanos: nanos.iter().sum::<f64>() / count(nanos.len() as u64),
            slowest_nanos: nanos.iter().copied().fold(0.0, f64::max),
            passing: count(passed) / count(matches),
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
fn count(of: u64) -> f64 {
    of as f64
}
