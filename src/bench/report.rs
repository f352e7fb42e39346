//! What was measured: figures beside their ceilings, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::thread::available_parallelism;

use serde::{Serialize, Serializer};

/// Everything that one call of the command measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// When it began, RFC 3339.
    pub(crate) at: String,
    pub(crate) machine: Machine,
    /// Program names and their versions.
    pub(crate) versions: BTreeMap<String, String>,
    /// What was asked for: sizes, seconds, rounds.
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) figures: Vec<Figure>,
    /// Measurements that did not come to an end, and why.
    pub(crate) failures: Vec<String>,
}

/// The machine that everything ran on.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_gib: f64,
    pub(crate) kernel: String,
    /// Processes that wanted a core in the last minute, on average. Others besides ours make the figures worse.
    pub(crate) load: f64,
}

impl Machine {
    /// As it is now.
    pub(crate) fn this() -> Self {
        let field = |file: &str, name: &str| {
            let text = fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let memory = field("/proc/meminfo", "MemTotal");
        let kib: f64 = memory.split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or_default();
        Self {
            processor: field("/proc/cpuinfo", "model name"),
            cores: available_parallelism().map_or(1, usize::from),
            memory_gib: (kib / 1_048_576.0 * 10.0).round() / 10.0,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            load: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
        }
    }
}

/// One figure of the daemon, and the ceiling that was measured in turn with it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// Which measurement it belongs to.
    pub(crate) measurement: &'static str,
    /// The store under the daemon.
    pub(crate) store: &'static str,
    /// What it is.
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) daemon: Spread,
    pub(crate) ceiling: Option<Ceiling>,
    /// Why there is none, where there could be one.
    pub(crate) no_ceiling: Option<&'static str>,
    /// The daemon's median divided by the ceiling's.
    pub(crate) ratio: Option<f64>,
    pub(crate) goal: Option<Goal>,
    /// Whether the goal is met.
    pub(crate) met: Option<bool>,
}

impl Figure {
    pub(crate) fn new(
        measurement: &'static str,
        store: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        daemon: &[f64],
    ) -> Self {
        let daemon = Spread::of(daemon);
        let name = name.into();
        let (ceiling, no_ceiling, ratio, goal, met) = (None, None, None, None, None);
        Self { measurement, store, name, unit, daemon, ceiling, no_ceiling, ratio, goal, met }
    }

    /// The same with the ceiling beside it, if that was measured.
    pub(crate) fn beside(mut self, name: &'static str, runs: &[f64]) -> Self {
        if runs.is_empty() {
            return self;
        }
        let spread = Spread::of(runs);
        self.ratio = (spread.median > 0.0).then(|| self.daemon.median / spread.median);
        self.ceiling = Some(Ceiling { name, spread });
        self.judged()
    }

    /// The same with the reason why there is nothing beside it.
    pub(crate) fn not_beside(mut self, why: &'static str) -> Self {
        self.no_ceiling = Some(why);
        self
    }

    /// The same with what it should be.
    pub(crate) fn with_goal(self, goal: Goal) -> Self {
        self.with_optional_goal(Some(goal))
    }

    /// The same with what it should be, if it should be anything.
    pub(crate) fn with_optional_goal(mut self, goal: Option<Goal>) -> Self {
        self.goal = goal;
        self.judged()
    }

    fn judged(mut self) -> Self {
        self.met = self.goal.and_then(|goal| goal.is_met(self.daemon.median, self.ratio));
        self
    }
}

/// What the store, or a program that does nothing else, reached in the same run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ceiling {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    pub(crate) spread: Spread,
}

/// What several runs gave.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// All of them, in the order of running.
    pub(crate) runs: Vec<f64>,
}

impl Spread {
    /// Of at least one run; zero where there is none.
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
            write!(f, "{} ({}–{})", Number(self.median), Number(self.min), Number(self.max))
        } else {
            Number(self.median).fmt(f)
        }
    }
}

/// What a figure should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    /// The ratio to the ceiling, at least.
    RatioAtLeast(f64),
    /// The ratio to the ceiling, at most.
    RatioAtMost(f64),
    /// The figure itself, at least.
    AtLeast(f64),
    /// The figure itself, at most.
    AtMost(f64),
}

impl Goal {
    fn is_met(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Self::RatioAtLeast(bound) => ratio.map(|ratio| ratio >= bound),
            Self::RatioAtMost(bound) => ratio.map(|ratio| ratio <= bound),
            Self::AtLeast(bound) => Some(value >= bound),
            Self::AtMost(bound) => Some(value <= bound),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RatioAtLeast(bound) => write!(f, "≥ {bound} ×"),
            Self::RatioAtMost(bound) => write!(f, "≤ {bound} ×"),
            Self::AtLeast(bound) => write!(f, "≥ {}", Number(*bound)),
            Self::AtMost(bound) => write!(f, "≤ {}", Number(*bound)),
        }
    }
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A number with three digits that matter.
#[derive(Debug, Clone, Copy)]
struct Number(f64);

impl fmt::Display for Number {
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { processor, cores, memory_gib, kernel, load } = &self.machine;
        writeln!(f, "{processor}, {cores} cores, {memory_gib} GiB, Linux {kernel}, load {load} before")?;
        let list = |pairs: &BTreeMap<String, String>| {
            pairs.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
        };
        writeln!(f, "{}", list(&self.versions))?;
        writeln!(f, "{}\n", list(&self.settings))?;
        f.write_str(&table(&self.figures))?;
        for failure in &self.failures {
            writeln!(f, "\nnot measured: {failure}")?;
        }
        Ok(())
    }
}

const TITLES: [&str; 8] = ["measurement", "store", "figure", "unit", "aurora-bus", "ceiling", "ratio", "goal"];

fn table(figures: &[Figure]) -> String {
    let mut rows = vec![TITLES.map(str::to_owned)];
    rows.extend(figures.iter().map(|figure| {
        let ceiling = figure.ceiling.as_ref();
        let goal = figure.goal.map(|goal| match figure.met {
            Some(true) => format!("{goal} met"),
            Some(false) => format!("{goal} MISSED"),
            None => goal.to_string(),
        });
        [
            figure.measurement.to_owned(),
            figure.store.to_owned(),
            figure.name.clone(),
            figure.unit.to_owned(),
            figure.daemon.to_string(),
            match ceiling {
                Some(ceiling) => format!("{} {}", ceiling.spread, ceiling.name),
                None => figure.no_ceiling.unwrap_or_default().to_owned(),
            },
            figure.ratio.map(|ratio| Number(ratio).to_string()).unwrap_or_default(),
            goal.unwrap_or_default(),
        ]
    }));
    let mut widths = [0; TITLES.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end()).expect("writing to a String succeeds");
        if index == 0 {
            let rule = widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("  ");
            writeln!(out, "{rule}").expect("writing to a String succeeds");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_the_middle_of_its_runs() {
        let spread = Spread::of(&[3.0, 1.0, 2.0]);
        assert_eq!((spread.median, spread.min, spread.max), (2.0, 1.0, 3.0));
        assert!((Spread::of(&[1.0, 2.0]).median - 1.5).abs() < 1e-9);
        assert!(Spread::of(&[]).median == 0.0);
    }

    #[test]
    fn numbers_keep_three_digits_that_matter() {
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
            assert_eq!(Number(value).to_string(), text);
        }
    }

    #[test]
    fn a_goal_is_judged_once_its_ceiling_is_known() {
        let figure = Figure::new("publish", "redis", "batched", "events/s", &[60.0]).with_goal(Goal::RatioAtLeast(0.5));
        assert_eq!(figure.met, None);
        let figure = figure.beside("raw", &[100.0]);
        assert_eq!((figure.ratio, figure.met), (Some(0.6), Some(true)));
        let slow = Figure::new("latency", "redis", "p50", "ms", &[0.4]).with_goal(Goal::RatioAtMost(1.5));
        assert_eq!(slow.beside("null relay", &[0.1]).met, Some(false));
        assert_eq!(Figure::new("start", "embedded", "s", "ms", &[90.0]).with_goal(Goal::AtMost(200.0)).met, Some(true));
    }

    #[test]
    fn the_table_has_a_row_per_figure_in_straight_columns() {
        let figures = [
            Figure::new("publish", "redis", "batched", "events/s", &[150e3, 160e3, 170e3])
                .beside("raw XADD", &[300e3])
                .with_goal(Goal::RatioAtLeast(0.5)),
            Figure::new("start", "embedded", "to ready", "ms", &[30.0]),
        ];
        let text = table(&figures);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].contains("160 k (150 k–170 k)") && lines[2].ends_with("≥ 0.5 × met"), "{text}");
        assert_eq!(lines[3].chars().take(11).collect::<String>(), "start      ");
    }
}
