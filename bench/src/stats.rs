//! Numbers of a run: rates, percentiles and the spread of several runs.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A number of events and the time that they took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Throughput {
    pub(crate) events: u64,
    pub(crate) seconds: f64,
}

impl Throughput {
    pub(crate) fn since(start: Instant, events: u64) -> Self {
        Self { events, seconds: start.elapsed().as_secs_f64() }
    }

    pub(crate) fn per_second(self) -> f64 {
        ratio(to_f64(self.events), self.seconds)
    }
}

/// Percentiles of durations, in milliseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Percentiles {
    pub(crate) count: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
}

impl Percentiles {
    /// Computes the percentiles of durations in nanoseconds, in any order.
    pub(crate) fn of(mut nanos: Vec<u64>) -> Self {
        nanos.sort_unstable();
        let at = |per_mille: usize| {
            let rank = (nanos.len() * per_mille).div_ceil(1000).max(1);
            nanos.get(rank - 1).map_or(0.0, |nanos| Duration::from_nanos(*nanos).as_secs_f64() * 1e3)
        };
        Self { count: nanos.len(), p50_ms: at(500), p99_ms: at(990), p999_ms: at(999), max_ms: at(1000) }
    }
}

/// The results of several runs.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// All results, in the order of the runs.
    pub(crate) runs: Vec<f64>,
}

impl Spread {
    /// Computes the spread of the runs; all values are zero if there is no run.
    pub(crate) fn of(runs: &[f64]) -> Self {
        let mut sorted = runs.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(at(middle.saturating_sub(1)), at(middle))
        } else {
            at(middle)
        };
        Self { median, min: at(0), max: at(sorted.len().saturating_sub(1)), runs: runs.to_vec() }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.runs.len() > 1 {
            write!(f, "{} ({}–{})", ThreeDigits(self.median), ThreeDigits(self.min), ThreeDigits(self.max))
        } else {
            ThreeDigits(self.median).fmt(f)
        }
    }
}

/// Prints a number with three significant digits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ThreeDigits(pub(crate) f64);

impl fmt::Display for ThreeDigits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            value if value >= 999_500.0 => (value / 1e6, " M"),
            value if value >= 9_995.0 => (value / 1e3, " k"),
            value => (value, ""),
        };
        let digits = match value {
            value if value >= 99.95 => 0,
            value if value >= 9.995 => 1,
            value if value >= 0.9995 || value <= 0.0 => 2,
            _ => 3,
        };
        write!(f, "{value:.digits$}{unit}")
    }
}

/// Returns `value / of`, or zero if `of` is not positive.
pub(crate) fn ratio(value: f64, of: f64) -> f64 {
    if of > 0.0 { value / of } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "counts and sizes of one run are far below 2^52")]
pub(crate) fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let millis = |value: u64| value * 1_000_000;
        let percentiles = Percentiles::of((1..=1000).rev().map(millis).collect());
        assert_eq!(percentiles.count, 1000);
        for (value, expected) in [
            (percentiles.p50_ms, 500.0),
            (percentiles.p99_ms, 990.0),
            (percentiles.p999_ms, 999.0),
            (percentiles.max_ms, 1000.0),
        ] {
            assert!((value - expected).abs() < 1e-9, "{value} instead of {expected}");
        }
        assert_eq!(Percentiles::of(Vec::new()).count, 0);
        assert!((Percentiles::of(vec![millis(3)]).p999_ms - 3.0).abs() < 1e-9);
    }

    #[test]
    fn spread_of_runs_has_their_median() {
        let spread = Spread::of(&[3.0, 1.0, 2.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert!((Spread::of(&[1.0, 2.0]).median - 1.5).abs() < 1e-9);
        assert!(Spread::of(&[]).median == 0.0);
    }

    #[test]
    fn numbers_are_printed_with_three_digits() {
        let cases = [
            (1_234_567.0, "1.23 M"),
            (344_000.0, "344 k"),
            (12_345.0, "12.3 k"),
            (9_300.0, "9300"),
            (12.34, "12.3"),
            (1.0, "1.00"),
            (0.1234, "0.123"),
            (0.0, "0.00"),
        ];
        for (value, text) in cases {
            assert_eq!(ThreeDigits(value).to_string(), text);
        }
    }
}
